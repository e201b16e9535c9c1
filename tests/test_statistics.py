"""SolveStatistics: steps that count and that do not, and evaluations; compiled and uncompiled."""

import pytest
import torch

import rampde_fx
from rampde_fx import SolveStatistics, errors, torchdiffeq
from rampde_fx.runtime import step_control
from rampde_fx.solvers.tableau import METHODS
from rampde_fx.torchdiffeq.options import ADAMS, ADAPTIVE, FIXED, kind_of
from tests.counting import calls, counted
from tests.models import Solved
from tests.test_odeint import compiled

INTERFACES = {"rampde_fx": rampde_fx.odeint, "torchdiffeq": torchdiffeq.odeint}
T2, T9 = torch.tensor([0.0, 3.0], dtype=torch.float64), torch.linspace(0, 3, 9, dtype=torch.float64)


def oscillation(t, y):
    return -y * (1 + 4 * torch.sin(5 * t))


class Counted:
    """A velocity that counts its calls, as users of torchdiffeq write it."""

    def __init__(self):
        self.nfe = 0

    def __call__(self, t, y):
        self.nfe += 1
        return oscillation(t, y)


def numbers(statistics):
    assert isinstance(statistics, SolveStatistics)
    assert all(value.dtype == torch.int64 and value.ndim == 0 for value in statistics)
    return tuple(map(int, statistics))


CASES = [
    *(("rampde_fx", method, {}, t) for method in METHODS for t in (T2, T9)),
    ("rampde_fx", "rk4", {"step_size": 0.17}, T9),
    ("rampde_fx", "dopri5", {"num_steps": 3}, T9),
    ("rampde_fx", "dopri5", {"first_step": 3.0}, T9),
    *(("torchdiffeq", method, {}, t) for method in (*ADAPTIVE, *FIXED, *ADAMS) for t in (T2, T9)),
    ("torchdiffeq", "rk4", {"step_size": 0.17, "interp": "cubic"}, T9),
    ("torchdiffeq", "midpoint", {"grid_constructor": lambda func, y, t: torch.linspace(0, 3, 25).double()}, T9),
    ("torchdiffeq", "dopri5", {"first_step": 3.0, "step_t": torch.tensor([1.0, 2.0])}, T9),
    ("torchdiffeq", "dopri5", {"jump_t": torch.tensor([1.0])}, T9),
    ("torchdiffeq", "fixed_adams", {"step_size": 0.05}, T9),
]


@pytest.mark.parametrize(("interface", "method", "options", "t"), CASES, ids=str)
def test_uncompiled_every_call_of_the_velocity_is_counted(interface, method, options, t):
    func, y0 = Counted(), torch.ones(2, dtype=torch.float64, requires_grad=True)
    solution, found = INTERFACES[interface](func, y0, t, method=method, options={**options, "stats": True})
    accepted, rejected, evaluations = numbers(found)
    assert evaluations == func.nfe
    assert torch.equal(solution, INTERFACES[interface](oscillation, y0, t, method=method, options=options))
    if interface == "rampde_fx":
        fixed = not METHODS[method].adaptive or "num_steps" in options
    else:
        fixed = kind_of(method) != "adaptive"
    if fixed:
        assert rejected == 0 and accepted >= len(t) - 1
    else:
        assert accepted > 3 and (rejected > 0) >= ("first_step" in options)


COMPILED = [
    *(("rampde_fx", method, {}, t) for method in ("bosh3", "dopri5", "dopri8") for t in (T2, T9)),
    ("rampde_fx", "rk4", {"step_size": 0.17}, T9),
    ("rampde_fx", "heun3", {"num_steps": 3}, T9),
    ("rampde_fx", "dopri5", {"first_step": 3.0}, T9),
    *(("torchdiffeq", method, {}, T9) for method in ("dopri5", "fehlberg2", "rk4")),
    ("torchdiffeq", "rk4", {"step_size": 0.17, "interp": "cubic"}, T9),
    ("torchdiffeq", "rk4", {"step_size": 0.17}, T9),
]


@pytest.mark.parametrize(("interface", "method", "options", "t"), COMPILED, ids=str)
@pytest.mark.parametrize("gradients", [True, False], ids=["training", "no_grad"])
def test_compiled_every_evaluation_is_counted(interface, method, options, t, gradients):
    how = dict(method=method, options={**options, "stats": True})

    @rampde_fx.mixed_precision(dtype=torch.float64)
    def flow(y0):
        return INTERFACES[interface](lambda t, y: counted(oscillation(t, y)), y0, t, **how)

    run = torch.compile(flow, backend="rampde_fx", options={"compiler": "eager"}, fullgraph=True)
    y0 = torch.ones(2, dtype=torch.float64, requires_grad=True)
    with torch.set_grad_enabled(gradients):
        run(y0)
        calls.clear()
        solution, found = run(y0)
    # Up to torch 2.11 a scan that is run uncompiled calls its body once more, for the shapes of its results.
    if torch.__version__ >= (2, 12) or kind_of(method) == "adaptive":
        assert numbers(found)[2] == len(calls)
    if (interface, kind_of(method)) != ("torchdiffeq", "adaptive"):  # whose sizes follow another rule uncompiled
        torch.testing.assert_close(solution, flow(y0)[0])


def test_a_changing_number_of_times_is_counted():
    run = compiled(Solved(oscillation, method="rk4", options={"stats": True}))
    found = [numbers(run(torch.ones(2), torch.linspace(0, 1, points))[1]) for points in (4, 9, 12)]
    assert found == [(3, 0, 12), (8, 0, 32), (11, 0, 44)]


def test_a_status_comes_before_the_statistics():
    options = {"status": True, "stats": True, "max_steps": 10}
    for run in (model := Solved(oscillation, method="bosh3", rtol=1e-6, atol=1e-6, options=options), compiled(model)):
        _, status, found = run(torch.ones(2), torch.tensor([0.0, 2.0]))
        assert status == step_control.TOO_MANY_STEPS and numbers(found)[0] == 10


@pytest.mark.parametrize("y0", [torch.ones(2), (torch.ones(2), torch.ones(()))], ids=["tensor", "tuple"])
@pytest.mark.parametrize("solver", ["odeint", "odeint_adjoint"])
def test_torchdiffeq_returns_them_last(y0, solver):
    rate = torch.nn.Parameter(torch.tensor(0.5))

    def velocity(t, y):
        return tuple(-rate * leaf for leaf in y) if isinstance(y, tuple) else -rate * y

    more = {"adjoint_params": (rate,)} if solver == "odeint_adjoint" else {}
    solve = getattr(torchdiffeq, solver)
    solution, found = solve(velocity, y0, torch.linspace(0, 1, 3), options={"stats": True}, **more)
    assert isinstance(solution, type(y0)) and numbers(found)[0] > 0
    assert numbers(solve(velocity, y0, torch.zeros(1), options={"stats": True}, **more)[1]) == (0, 0, 0)


@pytest.mark.parametrize("arguments", [{}, {"method": "rk4", "options": {"step_size": 0.01}}], ids=str)
def test_statistics_of_a_solve_up_to_an_event(arguments):
    options = {**arguments.get("options", {}), "stats": True}
    func, y0 = Counted(), torch.ones(1, dtype=torch.float64)
    how = {**arguments, "options": options, "event_fn": lambda t, y: y[0] - 0.9}
    _, solution, found = torchdiffeq.odeint(func, y0, T2, **how)
    assert numbers(found)[2] == func.nfe and solution.shape == (2, 1)
    func.nfe = 0
    _, solution, found = torchdiffeq.odeint_event(func, y0, torch.tensor(0.0), **how)
    assert numbers(found)[2] == func.nfe and solution[-1, 0].item() == pytest.approx(0.9, abs=1e-4)


def test_scipy_does_not_tell_its_steps():
    with pytest.raises(errors.OptionError, match="scipy_solver, which does not tell its steps"):
        torchdiffeq.odeint(oscillation, torch.ones(1), T2, method="scipy_solver", options={"stats": True})


@pytest.mark.parametrize("interface", INTERFACES)
def test_stats_is_true_or_false(interface):
    with pytest.raises(errors.OptionError, match=r"stats.: 'yes'"):
        INTERFACES[interface](oscillation, torch.ones(1), T2, method="rk4", options={"stats": "yes"})
    solution = INTERFACES[interface](oscillation, torch.ones(1), T2, method="rk4", options={"stats": False})
    assert isinstance(solution, torch.Tensor)


@pytest.mark.parametrize("method", ["dopri5", "dopri8", "rk4"])
def test_a_check_compares_the_solution_alone(method):
    """The model's own code evaluates less often than its rewrite where a search and a loop both evaluate."""
    model = Solved(oscillation, method=method, options={"stats": True}, policy=rampde_fx.PrecisionPolicy(torch.float32))
    y0 = torch.ones(2, requires_grad=True)
    result = rampde_fx.check(
        model, y0, torch.tensor([0.0, 0.5, 1.0]), policies=[rampde_fx.PrecisionPolicy(torch.float32)]
    )
    assert [list(row.value_errors) for row in result.rows] == [["output[0]"]] * 2
