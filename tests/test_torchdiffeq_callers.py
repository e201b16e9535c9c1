"""rampde_fx.torchdiffeq, whatever calls it and whatever func returns: memory, devices, transforms, times.

Each case was once a wrong number or an error without a type.
"""

import pytest
import torch
from torch import nn

import rampde_fx
from rampde_fx import errors
from rampde_fx.torchdiffeq import odeint, odeint_adjoint, odeint_dense, odeint_event
from rampde_fx.torchdiffeq.options import ADAMS, ADAPTIVE, FIXED, SCIPY

DOUBLE = torch.float64
T, Y0 = torch.linspace(0, 2, 6, dtype=DOUBLE), torch.tensor([2.0, 1.0], dtype=DOUBLE)
OURS = {"backend": "rampde_fx", "options": {"compiler": "aot_eager"}}


def predator(t, y):
    return torch.stack([y[0] - y[0] * y[1], y[0] * y[1] - y[1]])


class IntoOneTensor:
    """Each result is written where the one before it was."""

    def __init__(self, dtype=DOUBLE):
        self.rates = torch.empty(2, dtype=dtype)

    def __call__(self, t, y):
        self.rates[0] = y[0] - y[0] * y[1]
        self.rates[1] = y[0] * y[1] - y[1]
        return self.rates


def options_of(method):
    return {"solver": "RK45"} if method == SCIPY else None


@pytest.mark.parametrize("method", [*FIXED, *ADAPTIVE, *ADAMS, SCIPY])
def test_a_func_that_writes_each_result_into_one_tensor(method):
    options = options_of(method)
    wanted = odeint(predator, Y0, T, method=method, options=options)
    assert torch.equal(odeint(IntoOneTensor(), Y0, T, method=method, options=options), wanted)


def test_events_and_dense_solutions_of_such_a_func():
    times = [odeint_event(func, Y0, T[0], event_fn=lambda t, y: y[0] - 1)[0] for func in (IntoOneTensor(), predator)]
    assert torch.equal(*times)
    assert torch.equal(*(odeint_dense(func, Y0, T[0], T[-1])(T) for func in (IntoOneTensor(), predator)))
    assert torch.equal(odeint_dense(predator, Y0, T[0], 2.0)(T), odeint_dense(predator, Y0, T[0], T[-1])(T))


@pytest.mark.parametrize("method", ["rk4", "dopri5"])
def test_such_a_func_of_our_own_odeint(method):
    solutions = [rampde_fx.odeint(func, Y0, T, method=method) for func in (IntoOneTensor(), predator)]
    assert torch.equal(*solutions)


@pytest.mark.parametrize("method", ["euler", "rk4", "dopri5"])
@pytest.mark.parametrize("solve", [odeint, rampde_fx.odeint])
def test_such_a_func_is_refused_in_a_compiled_model(solve, method):
    func = IntoOneTensor(torch.float32)

    @rampde_fx.mixed_precision(dtype=torch.float32)
    def model(y, t):
        return solve(func, y, t, method=method)

    with pytest.raises(errors.MutationError, match=r"func writes its result to '\w*rates'") as caught:
        torch.compile(model, fullgraph=True, **OURS)(Y0.float(), T.float())
    assert "test_torchdiffeq_callers.py" in caught.value.where and "return a clone" in caught.value.fix


@pytest.mark.parametrize("method", ["rk4", "dopri5"])
def test_memory_that_func_itself_makes_is_written_to_in_a_compiled_model(method):
    def func(t, y):
        rates = torch.empty_like(y)
        rates[0] = y[0] - y[0] * y[1]
        rates[1] = y[0] * y[1] - y[1]
        return rates

    @rampde_fx.mixed_precision(dtype=torch.float32)
    def model(y, t):
        return odeint(func, y, t, method=method)

    found = torch.compile(model, fullgraph=True, **OURS)(Y0, T)
    torch.testing.assert_close(found, odeint(predator, Y0, T, method=method), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("event", [lambda t, y: t - 0.7, lambda t, y: (y > 1).int() - 0.5], ids=["of t", "of integers"])
def test_the_time_of_an_event_that_reads_nothing_differentiable_has_derivatives_of_zero(event):
    height, start = torch.tensor(5.0, requires_grad=True), torch.tensor(0.0, requires_grad=True)
    time, solution = odeint_event(lambda t, y: -y, height * 1, start, event_fn=event)
    assert torch.autograd.grad(time, [height, start], retain_graph=True) == (0, 0)
    (by_height,) = torch.autograd.grad(solution[-1], height)
    torch.testing.assert_close(by_height, (-time).exp().detach(), rtol=1e-5, atol=0)


class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2, device="cpu")

    def forward(self, t, y):
        return self.layer(y)


@pytest.mark.parametrize(
    "method", ["euler", "rk4", "dopri5", "dopri8", "bosh3", "implicit_adams", "explicit_adams", SCIPY]
)
def test_another_default_device(method):
    y, t = torch.ones(2, device="cpu"), torch.linspace(0, 1, 3, device="cpu")
    func, options = Linear(), options_of(method)
    solvers = [odeint] if method == SCIPY else [odeint, odeint_adjoint]
    wanted = [solve(func, y, t, method=method, options=options) for solve in solvers]
    torch.set_default_device("meta")  # one whose numbers nobody can read
    try:
        for solve, want in zip(solvers, wanted, strict=True):
            found = solve(func, y, t, method=method, options=options)
            assert torch.equal(found, want)
            if method != SCIPY:
                found.sum().backward()
        time, _ = odeint_event(lambda t, y: -y, y, t[0], event_fn=lambda t, y: y[0] - 0.5)
        dense = odeint_dense(lambda t, y: -y, y, t[0], t[-1])(t[1])
    finally:
        torch.set_default_device(None)
    assert abs(time - 0.5**0.5 * 0.98026) < 1e-3 and (dense - (-t[1]).exp()).abs().max() < 1e-6


def test_a_dense_solution_in_a_compiled_model():
    @rampde_fx.mixed_precision(dtype=torch.float32)
    def model(y, t):
        return odeint_dense(lambda t, y: -y, y, t[0], t[-1], rtol=1e-4, atol=1e-5)(t[1])

    y, t = torch.ones(3), torch.linspace(0, 1, 3)
    with pytest.raises(errors.UncompiledError, match="odeint_dense is not rewritten"):
        torch.compile(model, fullgraph=True, **OURS)(y, t)
    torch._dynamo.reset()
    with pytest.warns(errors.FullPrecisionWarning):
        assert torch.equal(torch.compile(model, **OURS)(y, t), model(y, t))


def test_what_looks_at_numbers_is_refused_under_vmap():
    def mapped(**given):
        return torch.func.vmap(lambda y: odeint(lambda t, y: torch.cos(t) * torch.tanh(y), y, T, **given))(
            Y0.expand(3, 2)
        )

    with pytest.raises(errors.TransformError, match="the iterations of an Adams method"):
        mapped(method="implicit_adams")
    with pytest.raises(errors.TransformError, match="the times of an odeint") as caught:
        torch.func.vmap(lambda s: odeint(lambda t, y: -y, Y0, s * T, method="rk4"))(Y0)
    assert "leave t out of vmap" in caught.value.fix


@pytest.mark.parametrize("interp", ["linear", "cubic"])
def test_the_first_time_beside_a_grid_of_constants(interp):
    """There the solution is y0, whatever that time is."""
    t = torch.tensor([0, 0.2, 0.5, 0.7, 1], requires_grad=True)
    options = {"grid_constructor": lambda func, y, t: torch.linspace(0, 1, 14), "interp": interp}

    def model(y, t):
        return odeint(lambda t, y: -y * t.cos(), y, t, method="rk4", options=options)

    compiled = torch.compile(rampde_fx.mixed_precision(model, dtype=torch.float32), fullgraph=True, **OURS)
    weights = torch.arange(1.0, 6)[:, None]
    found, wanted = (torch.autograd.grad((run(torch.ones(3), t) * weights).sum(), t)[0] for run in (compiled, model))
    assert found[0] == wanted[0] == 0
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=0)
