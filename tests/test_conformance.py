"""odeint on the problems of torchdiffeq's tests, held to the tolerances of those tests.

The times are float64, so that the float32 states have times of another dtype.
"""

import pytest
import torch
from torch import nn

import rampde_fx
from rampde_fx.solvers.tableau import METHODS
from tests.comparison import compiled, relative_errors
from tests.problems import PROBLEMS, Constant, Sine, Spiral, exact, times

DIRECTIONS = pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)

TOLERANCES = {"constant": 3e-4, "sine": 3e-4, "linear": 2e-3, "exp": 5e-2}
# Steps between two times, by the order of the method, that leave a discretisation error below the tolerance.
STEPS = {"sine": {1: 512, 2: 160, 3: 16, 4: 8, 5: 4, 8: 1}, "linear": {1: 2048, 2: 128, 3: 16, 4: 5, 5: 2, 8: 1}}
# Largest errors of the gradients of y0, t and the parameters, in float64.
ADJOINT_TOLERANCES = {"constant": 1e-12, "sine": 5e-3, "linear": 1e-5, "exp": 1e-2}


def tolerance(method, problem):
    if METHODS[method].order == 1:
        return 5e-2  # 3e-4 on the sine problem would take 300,000 steps
    return 4e-3 if method == "bosh3" else TOLERANCES[problem]


def arguments(method, *problems):
    order = METHODS[method].order
    return {
        "method": method,
        "options": {"num_steps": max([1, *(STEPS.get(p, {}).get(order, 1) for p in problems)])},
    }


def largest_error(got, wanted):
    return ((got.double() - wanted) / wanted).abs().max().item()


def error_of(problem, backward, dtype, **solver):
    """The largest error of the uncompiled solution of a problem; the initial state must be the given one."""
    t = times(backward)
    wanted = exact(PROBLEMS[problem]().double(), t)
    velocity, y0 = PROBLEMS[problem]().to(dtype), wanted[0].to(dtype)
    with torch.no_grad():
        got = rampde_fx.odeint(velocity, y0, t, **solver)
    assert got.dtype == dtype and got.shape == wanted.shape
    assert torch.equal(got[0], y0)
    return largest_error(got, wanted)


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("method", METHODS)
@DIRECTIONS
@DTYPES
def test_the_solution_is_within_the_tolerance(method, problem, backward, dtype):
    assert error_of(problem, backward, dtype, **arguments(method, problem)) < tolerance(method, problem)


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("method", [name for name, tableau in METHODS.items() if tableau.adaptive])
@DIRECTIONS
@DTYPES
def test_adaptive_steps_are_within_the_tolerance(method, problem, backward, dtype):
    """At torchdiffeq's default tolerances, and those that its tests give dopri8."""
    tight = {"rtol": 1e-12, "atol": 1e-14} if dtype == torch.float64 else {"rtol": 1e-7, "atol": 1e-7}
    error = error_of(problem, backward, dtype, method=method, **(tight if method == "dopri8" else {}))
    assert error < tolerance(method, problem)


class Together(nn.ModuleDict):
    """All problems as one, so that one compilation serves them."""

    def __init__(self):
        super().__init__({name: problem() for name, problem in PROBLEMS.items()})

    def forward(self, t, y):
        return {name: problem(t, y[name]) for name, problem in self.items()}


@pytest.mark.parametrize("method, dtype", [("heun3", torch.float32), ("rk4", torch.float64)], ids=str)
def test_compiled_solution_and_adjoint_are_within_the_tolerance(method, dtype):
    """The adjoint is held against backpropagation through the uncompiled solver."""
    model, bound = Together().to(dtype), {torch.float32: 5e-6, torch.float64: 1e-13}[dtype]

    def solve(y0, t):
        return rampde_fx.odeint(model, y0, t, **arguments(method, *PROBLEMS))

    run = compiled(solve, dtype)
    for t in (times(), times(backward=True)):
        wanted = {name: exact(problem().double(), t) for name, problem in PROBLEMS.items()}
        y0 = {name: values[0].to(dtype).requires_grad_() for name, values in wanted.items()}
        t.requires_grad_()
        got, plain = run(y0, t), solve(y0, t)
        for name, problem in model.items():
            assert got[name].dtype == dtype
            assert largest_error(got[name], wanted[name]) < tolerance(method, name)
            cotangent = torch.rand_like(got[name])
            inputs = (y0[name], t, *problem.parameters())
            pairs = [
                torch.autograd.grad(solution[name], inputs, cotangent, retain_graph=True, materialize_grads=True)
                for solution in (got, plain)
            ]
            for found, through in zip(*pairs, strict=True):
                assert (found - through).norm() <= bound * through.norm()
                assert dtype == torch.float32 or (found - through).abs().max() < ADJOINT_TOLERANCES[name]


@pytest.mark.parametrize("method", METHODS)
def test_gradcheck(method):
    """From beside the line a t + b, where the derivative of the velocity does not vanish."""
    model, t = Constant().double(), times().requires_grad_()
    y0 = (exact(model, t)[0] + 0.3).requires_grad_()

    def solve(y0, t, a, b):
        return rampde_fx.odeint(
            lambda t, y: torch.func.functional_call(model, {"a": a, "b": b}, (t, y)), y0, t, **arguments(method)
        )

    assert torch.autograd.gradcheck(solve, (y0, t, *model.parameters()))


def test_the_adjoint_of_a_cubic_spiral():
    """Against backpropagation in float32, as torchdiffeq does, and in float64."""
    options, cotangent = {"num_steps": 100}, 0.1 * torch.rand(10, 2)

    def gradients(dtype, wrap=lambda function: function):
        model, t = Spiral().to(dtype), torch.linspace(0, 25, 10, dtype=dtype, requires_grad=True)
        y0 = torch.tensor([2.0, 0.0], dtype=dtype, requires_grad=True)
        solution = wrap(lambda y0, t: rampde_fx.odeint(model, y0, t, method="rk4", options=options))(y0, t)
        return torch.autograd.grad(solution, (y0, t, model.matrix), cotangent.to(dtype))

    adjoint = gradients(torch.float32, lambda function: compiled(function, torch.float32))
    for dtype in (torch.float32, torch.float64):
        for found, wanted, bound in zip(adjoint, gradients(dtype), (3e-4, 1e-4, 2e-3), strict=True):
            assert (found - wanted).abs().max() < bound


def test_float32_times_of_a_float64_state():
    model = Sine()

    def solve(y0, t):
        return rampde_fx.odeint(model, y0, t, method="rk4", options={"num_steps": 8})

    t = times(dtype=torch.float32).requires_grad_()
    wanted = exact(model, t.double())
    y0 = wanted[0].clone().requires_grad_()
    cotangent, found = torch.rand(10, dtype=torch.float64), []
    for run in (solve, compiled(solve, torch.float64)):
        got = run(y0, t)
        assert got.dtype == torch.float64 and largest_error(got, wanted) < TOLERANCES["sine"]
        found.append(torch.autograd.grad(got, (y0, t), cotangent))
        assert [gradient.dtype for gradient in found[-1]] == [torch.float64, torch.float32]
    assert max(relative_errors(*found)) < 2e-6


@pytest.mark.parametrize("wrap", [lambda f: f, lambda f: compiled(f, torch.float32)], ids=["uncompiled", "compiled"])
def test_a_module_that_the_velocity_does_not_use_has_no_gradient(wrap):
    model = Constant()
    model.unused = nn.Linear(1, 1)
    t = times(dtype=torch.float32)
    run = wrap(lambda y0, t: rampde_fx.odeint(model, y0, t, method="midpoint"))
    run(exact(model, t)[0] + 0.3, t).sum().backward()
    assert model.a.grad != 0 and model.b.grad != 0
    assert all(p.grad is None or not p.grad.any() for p in model.unused.parameters())
