"""rampde_fx.torchdiffeq in compiled models: against itself uncompiled, and what is not rewritten."""

import warnings

import pytest
import torch
from torch import nn

import rampde_fx
from rampde_fx import errors
from rampde_fx.torchdiffeq import odeint, odeint_adjoint, odeint_event

DOUBLE = torch.float64


class Pair(nn.Module):
    """A velocity of two tensors."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, t, y):
        return torch.tanh(self.linear(y[0])) * torch.cos(t), -y[1] * y[0].square().mean()


class Solved(nn.Module):
    def __init__(self, solve, arguments, velocity):
        super().__init__()
        self.solve, self.arguments, self.velocity = solve, arguments, velocity

    def forward(self, y, t):
        return self.solve(self.velocity, y, t, **self.arguments)


def marked(model, dtype=DOUBLE, compiler="aot_eager", *, fullgraph=True):
    torch.compiler.reset()
    model = rampde_fx.mixed_precision(model, dtype=dtype)
    return torch.compile(model, backend="rampde_fx", options={"compiler": compiler}, fullgraph=fullgraph)


def outcome(run, model, t):
    """The solution, and the gradients of a loss by the states, the times and the weights."""
    y = tuple(
        leaf.requires_grad_() for leaf in (torch.linspace(-1, 1, 6).double().reshape(2, 3), torch.ones(()).double())
    )
    t = t.clone().requires_grad_()
    solution = run(y, t)
    loss = sum((part.reshape(len(t), -1).square().sum(1) * torch.arange(len(t))).sum() for part in solution)
    gradients = torch.autograd.grad(loss, (*y, t, *model.parameters()))
    return [*solution, *gradients]


RISING, FALLING = torch.linspace(0, 1, 6, dtype=DOUBLE), torch.linspace(1, 0, 6, dtype=DOUBLE)
FIXED = {
    "rk4": ({"method": "rk4"}, FALLING),
    "steps of a size": ({"method": "heun2", "options": {"step_size": 0.07}}, RISING),
    "cubic": ({"method": "rk4", "options": {"step_size": 0.17, "interp": "cubic"}}, FALLING),
    "a grid": (
        {"method": "heun3", "options": {"grid_constructor": lambda f, y, t: torch.linspace(0, 1, 9, dtype=t.dtype)}},
        RISING,
    ),
}


@pytest.mark.parametrize("case", FIXED)
def test_fixed_steps_are_those_uncompiled(case):
    torch.manual_seed(0)
    arguments, t = FIXED[case]
    model = Solved(odeint, arguments, Pair().double())
    wanted = outcome(model, model, t)
    torch.testing.assert_close(outcome(marked(model), model, t), wanted, rtol=1e-11, atol=1e-11)


ADAPTIVE = {
    "dopri5, by default": ({}, RISING, 1e-4),
    "tolerances of entries": ({"rtol": (1e-6, 1e-5), "atol": [torch.tensor(1e-6), 1e-5]}, FALLING, 5e-3),
    "adaptive_heun": ({"method": "adaptive_heun", "rtol": 1e-4, "atol": 1e-4}, RISING, 5e-3),
    "as adjoint": (
        {"rtol": 1e-6, "atol": 1e-6, "options": {"first_step": 0.1, "max_num_steps": 40, "safety": 0.8}},
        RISING,
        1e-3,
    ),
}


@pytest.mark.parametrize("case", ADAPTIVE)
def test_adaptive_steps_are_within_the_tolerances(case):
    torch.manual_seed(0)
    arguments, t, bound = ADAPTIVE[case]
    model = Solved(odeint_adjoint if case == "as adjoint" else odeint, arguments, Pair().double())
    wanted = outcome(model, model, t)
    torch.testing.assert_close(outcome(marked(model), model, t), wanted, rtol=bound, atol=bound)


def test_a_tolerance_of_its_own_counts_when_it_is_compiled():
    """A fast component with a coarse tolerance costs nothing."""
    found = []
    for atol in ((1e-4, 1e-4), (1e3, 1e-4)):
        model = Solved(odeint, {"rtol": 1e-4, "atol": atol}, lambda t, y: (torch.cos(20 * t) * y[0], -y[1]))
        rampde_fx.evaluation_counts(reset=True)
        marked(model, compiler="eager")((torch.ones(2).double(), torch.ones(2).double()), torch.tensor([0.0, 1.0]))
        found.append(max(count.forward for count in rampde_fx.evaluation_counts().values()))
    assert found[1] < found[0] / 2


def test_of_one_time_the_solution_is_the_state_compiled():
    model = Solved(odeint, {}, Pair())
    y = (torch.ones(2, 3), torch.tensor(1.0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", errors.FullPrecisionWarning)  # there is no loop
        first, second = marked(model, torch.float16, "eager")(y, torch.tensor([0.5]))
    assert torch.equal(first, y[0][None]) and torch.equal(second, y[1][None])


def with_callback():
    velocity = Pair()
    velocity.callback_step = lambda t, y, dt: None
    return velocity


def stopped(func, y, t, **arguments):
    return odeint_event(func, y, t[0], event_fn=lambda t, y: y[1] - 0.9, **arguments)


NOT_REWRITTEN = {
    "explicit_adams": (odeint, Pair, {"method": "explicit_adams"}),
    "implicit_adams": (odeint_adjoint, Pair, {"method": "implicit_adams"}),
    "scipy_solver": (odeint, Pair, {"method": "scipy_solver"}),
    "perturb": (odeint, Pair, {"method": "rk4", "options": {"perturb": True}}),
    "step_t": (odeint, Pair, {"options": {"step_t": torch.tensor([0.5])}}),
    "jump_t": (odeint, Pair, {"options": {"jump_t": torch.tensor([0.5])}}),
    "min_step": (odeint, Pair, {"options": {"min_step": 0.1}}),
    "max_step": (odeint, Pair, {"options": {"max_step": 0.1}}),
    "norm": (odeint, Pair, {"options": {"norm": lambda y: y[0].abs().max()}}),
    "for each entry": (odeint, Pair, {"rtol": (torch.full((2, 3), 1e-3), 1e-3)}),
    "event_fn": (odeint, Pair, {"event_fn": lambda t, y: y[1] - 0.9}),
    "odeint_event": (stopped, Pair, {}),
    "callback_step": (odeint, with_callback, {}),
}


@pytest.mark.parametrize("case", NOT_REWRITTEN)
def test_what_is_not_rewritten_is_refused_by_its_name(case):
    solve, velocity, arguments = NOT_REWRITTEN[case]
    model = Solved(solve, arguments, velocity())
    y, t = (torch.ones(2, 3), torch.tensor(1.0)), torch.tensor([0.0, 1.0])
    with pytest.raises(Exception, match=rf"UncompiledError: .*{case}.* is not rewritten. required: .* fix: .*"):
        marked(model, torch.float16, "eager")(y, t)


@pytest.mark.parametrize("case", ["implicit_adams", "jump_t", "odeint_event"])
def test_without_fullgraph_it_runs_uncompiled_and_is_warned_of(case):
    solve, velocity, arguments = NOT_REWRITTEN[case]
    torch.manual_seed(0)
    model = Solved(solve, arguments, velocity())
    y, t = (torch.ones(2, 3), torch.tensor(1.0)), torch.tensor([0.0, 1.0])
    wanted = model(y, t)
    with pytest.warns(errors.FullPrecisionWarning):
        found = marked(model, torch.float16, "eager", fullgraph=False)(y, t)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
@pytest.mark.parametrize("kind", ["alike", "broadcast", "another shape"])
def test_sizes_may_change(method, kind):
    """Numbers of rows and of times that are symbols in the second graph; velocities not of the state's shape."""
    linear = nn.Linear(2, 2).double()
    velocities = {
        "alike": lambda t, y: torch.tanh(linear(y)),
        "broadcast": lambda t, y: torch.tanh(linear(y)).mean(0, keepdim=True),
        "another shape": lambda t, y: (torch.tanh(linear(y[0])).reshape(-1),),
    }
    func, is_tuple = velocities[kind], kind == "another shape"

    def solve(y, t):
        return odeint(func, (y,) if is_tuple else y, t, rtol=1e-5, atol=1e-6, method=method)

    compiled = marked(solve)
    for rows, points in ((4, 3), (6, 3), (5, 7)):
        y, t = (
            torch.linspace(-1, 1, 2 * rows, dtype=DOUBLE).reshape(rows, 2),
            torch.linspace(0, 1, points, dtype=DOUBLE),
        )
        found, wanted = (run(y, t)[0] if is_tuple else run(y, t) for run in (compiled, solve))
        torch.testing.assert_close(found, wanted, rtol=1e-12 if method == "rk4" else 1e-4, atol=1e-12)
        gradients = [torch.autograd.grad(part.square().sum(), linear.weight)[0] for part in (found, wanted)]
        torch.testing.assert_close(*gradients, rtol=1e-12 if method == "rk4" else 1e-3, atol=1e-12)
