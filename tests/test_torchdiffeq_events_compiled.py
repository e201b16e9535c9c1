"""Events in compiled models: closed forms, gradients against those uncompiled, and what is refused."""

import math

import pytest
import torch
from torch import nn
from torch.torch_version import TorchVersion

import rampde_fx
from rampde_fx import errors
from rampde_fx.torchdiffeq import odeint, odeint_adjoint, odeint_event

DOUBLE = torch.float64


class Fall(nn.Module):
    """A height and its velocity."""

    def __init__(self):
        super().__init__()
        self.gravity = nn.Parameter(torch.tensor(-10.0, dtype=DOUBLE))

    def forward(self, t, y):
        return y[1], self.gravity


class Stopped(nn.Module):
    """A model that solves up to a floor, which it learns, too."""

    def __init__(self, velocity, **arguments):
        super().__init__()
        self.velocity, self.arguments = velocity, arguments
        self.floor = nn.Parameter(torch.tensor(0.5, dtype=DOUBLE))

    def forward(self, y, t):
        return odeint_event(self.velocity, y, t, event_fn=lambda t, y: y[0] - self.floor, **self.arguments)


def compiled(model, dtype=DOUBLE, compiler="aot_eager"):
    torch.compiler.reset()
    model = rampde_fx.mixed_precision(model, dtype=dtype)
    return torch.compile(model, backend="rampde_fx", options={"compiler": compiler}, fullgraph=True)


def thrown(height, speed, start):
    y = tuple(torch.tensor(value, dtype=DOUBLE, requires_grad=True) for value in (height, speed))
    return y, torch.tensor(start, dtype=DOUBLE, requires_grad=True)


def outcome(run, model, y, t):
    """The event's time and state, the counts, and the gradients by the state, the time and the parameters."""
    time, solution, counted = run(y, t)
    leaves = solution if isinstance(solution, tuple) else (solution,)
    loss = time + sum((i + 2) * leaf[-1].sum() for i, leaf in enumerate(leaves))
    gradients = torch.autograd.grad(loss, (*(y if isinstance(y, tuple) else (y,)), t, *model.parameters()))
    return [time, *(leaf[-1] for leaf in leaves), *gradients], counted


def test_a_fall_ends_when_it_does_in_closed_form():
    """The time, the state and their gradients, by start, gravity and floor; by new values without a new graph."""
    model = Stopped(Fall(), rtol=1e-9, atol=1e-12, options={"stats": True})
    run = compiled(model)
    for given in ((5.0, 0.3, 0.0), (7.0, -1.0, 0.25)):
        y, start = thrown(*given)
        with torch._dynamo.config.patch(error_on_recompile=given[2] > 0):
            found, counted = outcome(run, model, y, start)
        floor, gravity = model.floor, model.velocity.gravity
        speed = torch.sqrt(y[1].square() + 2 * gravity * (floor - y[0]))
        time = start - (speed + y[1]) / gravity
        loss = time + 2 * floor - 3 * speed
        exact = torch.autograd.grad(loss, (*y, start, *model.parameters()))
        torch.testing.assert_close(found, [time, floor, -speed, *exact], rtol=1e-8, atol=1e-8)
        assert counted.accepted > 0 and counted.evaluations > 6


class Pendulum(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 8, dtype=DOUBLE)
        self.back = nn.Linear(8, 2, dtype=DOUBLE)

    def forward(self, t, y):
        return torch.stack([y[1], -4 * torch.sin(y[0])]) + 0.1 * torch.cos(t) * self.back(torch.tanh(self.linear(y)))


METHODS = {
    "dopri8": ({"method": "dopri8", "rtol": 1e-6, "atol": 1e-7}, 1e-3),
    "adaptive_heun": ({"method": "adaptive_heun", "rtol": 1e-5, "atol": 1e-6}, 1e-3),
    "as adjoint, bounded": (
        {"odeint_interface": odeint_adjoint, "rtol": 1e-7, "atol": 1e-7, "options": {"max_step": 0.1}},
        1e-5,
    ),
    "rk4": ({"method": "rk4", "options": {"step_size": 0.02}}, 1e-7),
    "cubic": ({"method": "heun3", "options": {"step_size": 0.02, "interp": "cubic"}}, 1e-7),
    "backward": ({"reverse_time": True, "rtol": 1e-8, "atol": 1e-8}, 1e-5),
}


@pytest.mark.parametrize("case", METHODS)
def test_events_are_those_uncompiled(case):
    """Steps of a size are the same ones; adaptive ones have a rule of their own for their sizes."""
    torch.manual_seed(0)
    arguments, bound = METHODS[case]
    arguments = {**arguments, "options": {**arguments.get("options", {}), "stats": True}}
    model = Stopped(Pendulum(), **arguments)
    y, t = torch.tensor([1.0, 0.3], dtype=DOUBLE, requires_grad=True), torch.tensor(0.1, dtype=DOUBLE).requires_grad_()
    wanted, counts = outcome(model, model, y, t)
    found, counted = outcome(compiled(model), model, y, t)
    torch.testing.assert_close(found, wanted, rtol=bound, atol=bound)
    if "method" in arguments and "rtol" not in arguments:
        assert counted.accepted == counts.accepted and counted.rejected == 0


def solved(event_fn, t, velocity=None, **arguments):
    def model(y):
        return odeint(velocity or (lambda t, y: torch.ones_like(y)), y, t, event_fn=event_fn, **arguments)

    return model


def test_the_first_of_several_entries_ends_the_solution_and_low_precision_does_not_move_it():
    """What the event reads is wide: in float16 a line of slope 1 would meet 1.0007 elsewhere."""
    times = torch.tensor([0.0, -1.0])
    model = solved(lambda t, y: torch.stack([1.0007 - y.sum().abs(), y.sum() + 3]), times, rtol=1e-4, atol=1e-6)
    time, states = compiled(model, torch.float16)(torch.zeros(1))
    assert time.dtype == torch.float32 and abs(time.item() + 1.0007) < 1e-5
    torch.testing.assert_close(states, torch.tensor([[0.0], [-1.0007]]), rtol=0, atol=1e-5)


def test_an_event_at_the_start_takes_no_step():
    model = solved(lambda t, y: y[0], torch.tensor([2.0, 3.0]), options={"stats": True})
    time, states, counted = compiled(model, torch.float32)(torch.tensor([0.0, 1.0]))
    assert time == 2 and torch.equal(states, torch.tensor([[0.0, 1.0], [0.0, 1.0]])) and counted.accepted == 0


def test_an_event_at_the_start_has_derivatives():
    """As y' = -y leaves the floor: where the start is higher by dy the time is later by dy."""
    model = Stopped(lambda t, y: -y)
    with torch.no_grad():
        model.floor.fill_(1.0)
    y, t = torch.ones(2, dtype=DOUBLE, requires_grad=True), torch.tensor(0.3, dtype=DOUBLE, requires_grad=True)
    time, states = compiled(model)(y, t)
    torch.testing.assert_close(time, t)
    assert torch.equal(states, torch.ones(2, 2, dtype=DOUBLE))
    found = torch.autograd.grad(time, (y, t, model.floor))
    torch.testing.assert_close(
        torch.cat([leaf.reshape(-1) for leaf in found]), torch.tensor([1.0, 0, 1, -1], dtype=DOUBLE)
    )


def test_an_event_function_that_counts_is_refused_by_its_name():
    class Counting(Stopped):
        nfe = 0

        def forward(self, y, t):
            def event_fn(t, y):
                self.nfe += 1
                return y[0] - self.floor

            return odeint_event(self.velocity, y, t, event_fn=event_fn)

    # Dynamo of torch 2.11 refuses it itself, in the loop that halves the last step.
    is_ours = torch.__version__ >= TorchVersion("2.13")
    kind, text = (
        (errors.CounterError, "changes the number 'nfe' in Python") if is_ours else (Exception, "to mutate .*Counting")
    )
    with pytest.raises(kind, match=text):
        compiled(Counting(lambda t, y: -y))(torch.ones(2, dtype=DOUBLE), torch.zeros((), dtype=DOUBLE))


NOT_MET = {
    "never": (lambda t, y: y[0] + 1, {"options": {"max_num_steps": 20}}, "does not change its sign in 20 steps"),
    "never, fixed": (lambda t, y: y[0] + 1, {"method": "euler", "options": {"step_size": 0.1}}, "20000 steps"),
    "NaN": (lambda t, y: torch.sqrt(0.5 - t) + 1, {"options": {"first_step": 1.0}}, "NaN at t = 1"),
}


@pytest.mark.parametrize("case", ["never", "NaN", pytest.param("never, fixed", marks=pytest.mark.slow)])
def test_an_event_that_is_not_met_is_an_error(case):
    event_fn, arguments, message = NOT_MET[case]
    model = solved(event_fn, torch.tensor([0.0, 1.0]), **arguments)
    with pytest.raises(errors.EventError, match=message):
        compiled(model, torch.float32)(torch.zeros(2))


REFUSED = {
    "without a size": ({"method": "rk4"}, "event_fn beside rk4 without a step_size"),
    "adams": ({"method": "explicit_adams", "options": {"step_size": 0.1}}, "explicit_adams.* is not rewritten"),
    "three times": ({"t": torch.linspace(0, 1, 3)}, "t has 3 points beside event_fn"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_no_event_can_be_found_by_is_refused(case):
    arguments, message = REFUSED[case]
    t = arguments.get("t", torch.tensor([0.0, 1.0]))
    model = solved(lambda t, y: y[0] - 1, t, **{k: v for k, v in arguments.items() if k != "t"})
    with pytest.raises(errors.RampdeError, match=message):
        compiled(model, torch.float32, "eager")(torch.zeros(2))


def test_a_ball_bounces_as_in_closed_form():
    """Two flights: the second one begins where the first one ends, and the gradient goes through both."""

    class Bouncing(nn.Module):
        def __init__(self):
            super().__init__()
            self.velocity = Fall()

        def forward(self, y, t):
            given = {"method": "heun2", "atol": 1e-12, "options": {"step_size": 0.1, "interp": "cubic"}}
            for _ in range(2):
                t, states = odeint_event(self.velocity, y, t, event_fn=lambda t, y: y[0], **given)
                y = (states[0][-1] + 1e-7, -0.5 * states[1][-1])
            return t

    model = Bouncing()
    y, start = thrown(5.0, 0.0, 0.0)
    time = compiled(model)(y, start)
    found = [time, *torch.autograd.grad(time, (y[0], start, model.velocity.gravity))]
    fall = math.sqrt(2 * 5.0 / 10)  # seconds to the ground; at half of the speed up and down again takes as long
    wanted = torch.tensor([2 * fall, fall / 5.0, 1.0, fall / 10], dtype=DOUBLE)
    torch.testing.assert_close(torch.stack(found), wanted, rtol=1e-6, atol=1e-6)
