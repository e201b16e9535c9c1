"""rampde_fx.torchdiffeq in compiled models: against itself uncompiled, and what is not rewritten."""

import warnings

import pytest
import torch
from torch import nn

import rampde_fx
from rampde_fx import errors
from rampde_fx.torchdiffeq import odeint, odeint_adjoint

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


class Jumping(nn.Module):
    """A velocity that is another one before t = 0.5."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, t, y):
        return torch.where(t < 0.5, torch.tanh(self.linear(y)), 0.3 * y.square() + torch.cos(5 * t))


class Told(nn.Module):
    """A solve whose options and tolerances hold tensors that the model is given."""

    def __init__(self, velocity, make, **arguments):
        super().__init__()
        self.velocity, self.make, self.arguments = velocity, make, arguments

    def forward(self, y, t, given):
        made = self.make(given)
        options = {**made.pop("options", {}), "stats": True}
        return odeint(self.velocity, y, t, **{"rtol": 1e-6, "atol": 1e-7, **self.arguments, **made}, options=options)


def told(run, model, t, given):
    """The solution, the gradients by the state, the times and the weights, and the numbers of steps."""
    y = torch.linspace(-1, 1, 6, dtype=DOUBLE).reshape(2, 3).requires_grad_()
    t = t.clone().requires_grad_()
    solution, counted = run(y, t, given)
    gradients = torch.autograd.grad(solution[1:].square().sum(), (y, t, *model.parameters()))
    return [solution, *gradients], (int(counted.accepted), int(counted.rejected), int(counted.evaluations))


def jumps(given):
    return {"options": {"jump_t": given}}


UP, DOWN = torch.tensor([0.0, 0.3, 0.7, 1.0], dtype=DOUBLE), torch.tensor([1.0, 0.6, 0.2, 0.0], dtype=DOUBLE)
AT_HALF, AMONG_OTHERS = torch.tensor([0.5], dtype=DOUBLE), torch.tensor([3.0, 0.5, -1.0, 0.8, 0.5, 0.0], dtype=DOUBLE)
JUMPS = {
    "dopri5": ({}, UP, AT_HALF),
    "dopri5, backward, among others": ({}, DOWN, AMONG_OTHERS),
    "bosh3, no time between": ({"method": "bosh3"}, UP[::3], AMONG_OTHERS),
    "dopri8, whose steps end at the times": ({"method": "dopri8"}, DOWN, AMONG_OTHERS),
    "adaptive_heun": ({"method": "adaptive_heun", "rtol": 1e-5}, UP, AT_HALF),
    "tsit5, largest entry": ({"method": "tsit5"}, UP, AT_HALF),
}


@pytest.mark.parametrize("case", JUMPS)
def test_steps_end_where_the_velocity_jumps(case):
    """Few steps are rejected, and all gradients are right, that of the first time included."""
    torch.manual_seed(0)
    arguments, t, times = JUMPS[case]

    def norm(errors):
        return errors.abs().max()

    def make(given):
        return {"options": {"jump_t": given, **({"norm": norm} if "largest" in case else {})}}

    velocity = Jumping().double()
    exact, _ = told(Told(velocity, jumps, rtol=1e-11, atol=1e-13), velocity, t, torch.tensor([0.5], dtype=DOUBLE))
    model = Told(velocity, make, **arguments)
    _, wanted = told(model, model, t, AT_HALF)
    found, counts = told(marked(model), model, t, times)
    torch.testing.assert_close(found, exact, rtol=5e-5, atol=5e-5)
    further = len(times.unique()) + 3 * len(t) + wanted[0] // 10
    assert counts[0] <= wanted[0] + further and counts[1] <= wanted[1] + 2


def test_without_the_time_of_the_jump_its_gradient_is_of_steps_across_it():
    """The case that the one above must tell apart: many more steps, and the first time moves the jump."""
    torch.manual_seed(0)
    velocity = Jumping().double()
    at, across = (
        told(Told(velocity, make, rtol=1e-6, atol=1e-7), velocity, UP, AT_HALF) for make in (jumps, lambda given: {})
    )
    assert across[1][1] > at[1][1] + 3 and abs((at[0][2] - across[0][2])[0]) > 1


STEPS = {
    "step_t": lambda given: {"options": {"step_t": torch.stack([0.1 * given, 0.05 * given])}},
    "bounds": lambda given: {"options": {"min_step": 0.02 * given, "max_step": 0.03 * given, "first_step": 0.02}},
    "one size": lambda given: {"options": {"min_step": 0.04 * given, "max_step": 0.04 * given}},
    "norm": lambda given: {"options": {"norm": lambda error: (given * error).abs().max()}},
    "tolerances of entries": lambda given: {
        "rtol": given * torch.linspace(1e-6, 1e-5, 3, dtype=DOUBLE),
        "atol": given * torch.tensor([[1e-6], [1e-7]]),
    },
    "numbers": lambda given: {"options": {"first_step": 0.01 * given, "safety": 0.4 * given, "ifactor": 2 * given}},
}


@pytest.mark.parametrize("case", STEPS)
def test_what_sets_the_steps_is_an_input(case):
    """Of new values the same graph finds the steps that are found uncompiled, or as many but for the rules' difference;
    the gradients are those of a close solution.
    """
    torch.manual_seed(0)
    velocity = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    model = Told(lambda t, y: velocity(y) * torch.cos(3 * t), STEPS[case])
    model.layers = velocity
    exact, _ = told(Told(model.velocity, lambda given: {}, rtol=1e-11, atol=1e-13), velocity, UP, None)
    run, all_counts = marked(model), []
    for first, value in enumerate((1.0, 2.0)):
        given = torch.tensor(value, dtype=DOUBLE)
        with torch._dynamo.config.patch(error_on_recompile=first > 0):
            found, counts = told(run, model, UP, given)
        _, wanted = told(model, model, UP, given)
        by_time, exactly = found.pop(2), exact[2]  # the slope of the quartic between the ends, one order less accurate
        torch.testing.assert_close(found, [*exact[:2], *exact[3:]], rtol=2e-5, atol=2e-5)
        torch.testing.assert_close(by_time, exactly, rtol=2e-4, atol=2e-4)
        assert abs(counts[0] - wanted[0]) <= 2 and abs(counts[1] - wanted[1]) <= 1, (counts, wanted)
        all_counts.append(counts)
    assert all_counts[0] != all_counts[1] or case == "step_t"


def test_no_step_is_larger_than_max_step_nor_smaller_than_min_step():
    """A step of min_step counts whatever its error: y' = 100 cos(100 t) in steps of a tenth."""
    model = Told(
        lambda t, y: 100 * torch.cos(100 * t) * torch.ones_like(y),
        lambda given: {"options": {"min_step": given, "max_step": given}},
    )
    _, counted = marked(model, compiler="eager")(torch.zeros(2).double(), UP[::3], torch.tensor(0.1))
    assert [int(value) for value in counted] == [10, 0, counted.evaluations] and counted.evaluations < 65


PERTURBED = {
    "rk4": {"method": "rk4", "options": {"step_size": 0.1, "perturb": True}},
    "cubic": {"method": "heun3", "options": {"step_size": 0.1, "perturb": True, "interp": "cubic"}},
    "between the times": {"method": "rk4", "options": {"perturb": True}},
}


@pytest.mark.parametrize("case", PERTURBED)
def test_perturbed_stages_are_on_the_inner_side_of_a_jump(case):
    torch.manual_seed(0)
    # Without a size the steps end at the times; otherwise no time is the end of one, where the linear solution has two
    # slopes.
    t = torch.tensor([0.0, 0.5, 1.0] if "between" in case else [0.0, 0.33, 0.72, 1.0])
    model = Solved(odeint, PERTURBED[case], Jumping())
    states = torch.linspace(-1, 1, 6).reshape(2, 3)

    def solution(run):
        y, times = states.clone().requires_grad_(), t.clone().requires_grad_()
        found = run(y, times)
        return [found, *torch.autograd.grad(found.square().sum(), (y, times, *model.parameters()))]

    torch.testing.assert_close(solution(marked(model, torch.float32)), solution(model), rtol=2e-4, atol=2e-5)


REFUSED_OPTIONS = {
    "min_step": ({"min_step": -1.0}, "'min_step': -1.0.* a number of at least 0, or a tensor"),
    "jump_t": ({"jump_t": 0.5}, "'jump_t': 0.5.* a tensor of times"),
}


@pytest.mark.parametrize("case", REFUSED_OPTIONS)
def test_what_means_nothing_is_refused_compiled(case):
    options, message = REFUSED_OPTIONS[case]
    with pytest.raises(errors.OptionError, match=f"(?s){message}"):
        marked(Solved(odeint, {"options": options}, Jumping()), torch.float32, "eager")(torch.ones(2, 3), UP.float())


def with_callback():
    velocity = Pair()
    velocity.callback_step = lambda t, y, dt: None
    return velocity


NOT_REWRITTEN = {
    "explicit_adams": (odeint, Pair, {"method": "explicit_adams"}),
    "implicit_adams": (odeint_adjoint, Pair, {"method": "implicit_adams"}),
    "scipy_solver": (odeint, Pair, {"method": "scipy_solver"}),
    "callback_step": (odeint, with_callback, {}),
}


@pytest.mark.parametrize("case", NOT_REWRITTEN)
def test_what_is_not_rewritten_is_refused_by_its_name(case):
    solve, velocity, arguments = NOT_REWRITTEN[case]
    model = Solved(solve, arguments, velocity())
    y, t = (torch.ones(2, 3), torch.tensor(1.0)), torch.tensor([0.0, 1.0])
    with pytest.raises(errors.UncompiledError, match=rf"{case}.* is not rewritten"):
        marked(model, torch.float16, "eager")(y, t)


@pytest.mark.parametrize("case", ["implicit_adams", "callback_step"])
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


BY_ANOTHER_BACKEND = {
    "fixed": lambda func, y, t: odeint(func, y, t, method="rk4"),
    "adaptive": odeint,
    "adams": lambda func, y, t: odeint(func, y, t, method="implicit_adams"),
    "adjoint": lambda func, y, t: odeint_adjoint(func, y, t, adjoint_params=()),
    "odeint": rampde_fx.odeint,
}


@pytest.mark.parametrize("solve", BY_ANOTHER_BACKEND.values(), ids=BY_ANOTHER_BACKEND)
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_a_forgotten_backend_is_told(solve, backend):
    torch.compiler.reset()
    function = torch.compile(rampde_fx.mixed_precision(solve, dtype=torch.float16), backend=backend, fullgraph=True)
    with pytest.raises(errors.UncompiledError, match=r'fix: compile by torch\.compile\(\.\.\., backend="rampde_fx"\)'):
        function(lambda t, y: -y, torch.ones(4, 2), torch.linspace(0, 1, 5))
