"""rampde_fx.torchdiffeq, uncompiled: its methods, options and events against closed forms, and what is refused."""

import math
import warnings
from functools import partial

import pytest
import torch
from torch import nn

from rampde_fx import errors, torchdiffeq
from rampde_fx.torchdiffeq import odeint, odeint_adjoint, odeint_dense, odeint_event
from rampde_fx.torchdiffeq.adams import weights
from rampde_fx.torchdiffeq.options import ADAMS, ADAPTIVE, FIXED, NAMES

DOUBLE = torch.float64


def decay(t, y):
    return -y * torch.cos(t)


def exact(t):
    return torch.exp(-torch.sin(t))


def double(*numbers):
    return torch.tensor(numbers, dtype=DOUBLE)


class Counted(nn.Module):
    """A velocity that counts its evaluations and notes their times."""

    def __init__(self, velocity=decay):
        super().__init__()
        self.velocity, self.nfe, self.times = velocity, 0, []

    def forward(self, t, y):
        self.nfe += 1
        self.times.append(t.item())
        return self.velocity(t, y)


# Methods


def test_names_and_version():
    assert torchdiffeq.__all__ == ["odeint", "odeint_adjoint", "odeint_dense", "odeint_event"]
    assert torchdiffeq.__version__ == "0.2.5"
    theirs = "dopri8 dopri5 bosh3 fehlberg2 adaptive_heun euler midpoint heun2 heun3 rk4 explicit_adams"
    assert {*theirs.split(), "implicit_adams", "fixed_adams", "scipy_solver"} == set(NAMES) - {"tsit5"}


@pytest.mark.parametrize("method", ADAPTIVE)
@pytest.mark.parametrize("end", [4.0, -4.0])
def test_the_error_follows_the_tolerance(method, end):
    t, y0, found = torch.linspace(0, end, 5, dtype=DOUBLE), double(1, 1), []
    for tolerance in (1e-3, 1e-5) if method in ("adaptive_heun", "fehlberg2") else (1e-4, 1e-7):
        y = odeint(decay, y0, t, rtol=tolerance, atol=tolerance, method=method)
        found.append((y - exact(t)[:, None]).abs().max().item())
        assert found[-1] < FACTORS.get(method, 20) * tolerance
    assert found[0] > 5 * found[1]


# fehlberg2 estimates its error by a difference that has a factor of 1 / 512; dopri8 interpolates its long steps by a
# quartic, as in torchdiffeq. At the ends of steps its error follows the tolerance.
FACTORS = {"fehlberg2": 400, "dopri8": 1000, "bosh3": 40}


def test_without_a_method_it_is_dopri5_at_the_tolerances_of_torchdiffeq():
    """y' = -10 y, which one classical step from 0 to 1 takes to 291."""
    found, wanted = (
        odeint(lambda t, y: -10 * y, double(1), double(0, 1), **given)
        for given in ({}, {"method": "dopri5", "rtol": 1e-7, "atol": 1e-9})
    )
    assert torch.equal(found, wanted) and abs(found[-1].item() - math.exp(-10)) < 1e-8


ORDERS = {
    **{method: ({}, order) for method, order in zip(FIXED, (1, 2, 2, 3, 4), strict=True)},
    "explicit_adams": ({"max_order": 4}, 3),
    "implicit_adams": ({"max_order": 4}, 4),
    "fixed_adams": ({"max_order": 5}, 5),
}


@pytest.mark.parametrize("method", ORDERS)
@pytest.mark.parametrize("uniform", [True, False], ids=["uniform", "not uniform"])
def test_the_error_falls_with_the_order(method, uniform):
    """Adams methods keep their order on grids that are not uniform: the weights are those of the grid's times."""
    options, order = ORDERS[method]
    found = []
    for steps in (64, 128):
        t = torch.linspace(0, 2, steps + 1, dtype=DOUBLE)
        t = t if uniform else t + 0.1 * torch.sin(math.pi * t)
        given = {**options, "max_iters": 50} if method in ADAMS[1:] else options
        y = odeint(decay, double(1), t, rtol=1e-12, atol=1e-14, method=method, options=given)
        found.append((y[:, 0] - exact(t)).abs().max().item())
    assert math.log2(found[0] / found[1]) == pytest.approx(order, abs=0.45)


def test_weights_of_adams_methods():
    bashforth, moulton = weights((0, -1, -2, -3)), weights((1, 0, -1, -2))
    assert bashforth == pytest.approx([55 / 24, -59 / 24, 37 / 24, -9 / 24], abs=1e-15)
    assert moulton == pytest.approx([9 / 24, 19 / 24, -5 / 24, 1 / 24], abs=1e-15)


def test_rk4_is_the_three_eighths_rule():
    velocity = Counted()
    odeint(velocity, double(1), double(0, 0.3), method="rk4")
    assert velocity.times == pytest.approx([0, 0.1, 0.2, 0.3], abs=1e-15)


@pytest.mark.parametrize("solver", ["RK45", "LSODA"])
def test_scipy(solver):
    pytest.importorskip("scipy")
    t = torch.linspace(2, 0, 5, dtype=DOUBLE)
    y0 = (exact(t[0]).expand(2, 1).requires_grad_(), exact(t[0]).float())
    options = {"solver": solver, "max_step": 0.5, "eps": 1e-3}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first, second = odeint(lambda t, y: (decay(t, y[0]), decay(t, y[1])), y0, t, rtol=(1e-8, 1e-9), atol=1e-9,
                               method="scipy_solver", options=options)  # fmt: skip
    assert first.shape == (5, 2, 1) and second.shape == (5,) and not first.requires_grad
    torch.testing.assert_close(first[:, 0, 0], exact(t), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(second.double(), exact(t), rtol=1e-6, atol=1e-6)


# The state, the times and the tolerances


@pytest.mark.parametrize("method", NAMES)
def test_of_one_time_the_solution_is_the_state(method):
    y0 = (torch.ones(2, 3), torch.tensor(0.5))
    first, second = odeint(lambda t, y: y, y0, torch.tensor([1.0]), method=method)
    assert torch.equal(first, y0[0][None]) and torch.equal(second, y0[1][None])


def test_a_tuple_has_one_dtype_and_derivatives_of_any_shape_that_fits():
    y0 = (torch.ones(2, 1), torch.tensor(1.0, dtype=DOUBLE))
    t = torch.linspace(0, 1, 3, dtype=DOUBLE)
    first, second = odeint(lambda t, y: [-y[0].reshape(2).float(), -y[1].reshape(1)], y0, t)
    assert first.dtype == second.dtype == DOUBLE and first.shape == (3, 2, 1) and second.shape == (3,)
    torch.testing.assert_close(second, torch.exp(-t), rtol=1e-6, atol=0)
    y = odeint(lambda t, y: torch.tensor(2.0), torch.zeros(3), torch.tensor([0.0, 1.0]), method="euler")
    assert torch.equal(y[-1], torch.full((3,), 2.0))


def test_tolerances_of_entries_and_as_tensors():
    """A fast and a slow component: at a tolerance of its own the fast one costs nothing."""

    def cost(rtol, atol):
        velocity = Counted(lambda t, y: (torch.cos(40 * t) * y[0], -y[1]))
        odeint(velocity, (double(1, 1), double(1)), double(0, 2), rtol=rtol, atol=atol)
        return velocity.nfe

    tight = cost(1e-7, 1e-9)
    assert cost(torch.tensor(1e-7), torch.tensor(1e-9)) == cost((1e-7, 1e-7), [1e-9, 1e-9]) == tight
    assert cost((1e-7, 1e-7), (double(1e-9, 1e-9), 1e-9)) == tight
    assert cost((1e-7, 1e-7), (1e3, 1e-9)) < tight / 3
    y = odeint(decay, double(1, 1), double(0, 2), rtol=double(1e-3, 1e-8), atol=double(1e-3, 1e-8))
    assert (y[-1] - exact(double(2))).abs().max() < 1e-7


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.complex64], ids=str)
def test_states_of_every_dtype(dtype):
    rate = torch.tensor(-1 + 1j if dtype.is_complex else -1.0).to(dtype)
    t = torch.linspace(0, 1, 3, dtype=DOUBLE)
    for given in ({"rtol": 1e-2, "atol": 1e-3}, {"method": "rk4", "options": {"step_size": 0.1, "perturb": True}}):
        y = odeint(lambda t, y: rate * y, torch.ones(2, dtype=dtype), t, **given)
        assert y.dtype == dtype
        wanted = torch.exp(rate.to(torch.complex128) * t)[:, None].expand(3, 2)
        torch.testing.assert_close(y.to(torch.complex128), wanted, rtol=3e-2, atol=0)


# Gradients


@pytest.mark.parametrize("method", [*ADAPTIVE, "rk4", "implicit_adams"])
@pytest.mark.parametrize("solve", [odeint, odeint_adjoint])
def test_gradients_in_closed_form(method, solve):
    """y' = -a y cos t: of an output, dy/dy0, dy/da and, of its own time, the velocity."""

    class Rate(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Parameter(torch.tensor(0.7, dtype=DOUBLE))

        def forward(self, t, y):
            return -self.a * y * torch.cos(t)

    low = method in ("adaptive_heun", "fehlberg2")
    func, tolerance = Rate(), 1e-5 if low else 1e-8
    options = {"options": {"step_size": 0.02, "interp": "cubic"}} if method in ("rk4", "implicit_adams") else {}
    for end in (2.0, -2.0):
        y0, t = double(1, 0.5).requires_grad_(), torch.linspace(0, end, 12, dtype=DOUBLE).requires_grad_()
        y = solve(func, y0, t, rtol=tolerance, atol=tolerance, method=method, **options)
        wanted = torch.exp(-0.7 * torch.sin(t.detach()))
        for i in (4, 11):  # a derivative of an interpolant is less accurate than itself
            of_y0, of_t, of_a = torch.autograd.grad(y[i, 0], (y0, t, func.a), retain_graph=True)
            slope = (-0.7 * torch.cos(t[i]) * wanted[i]).item()
            close = dict(abs=(5000 if method == "dopri8" else 300) * tolerance)
            assert of_y0[0].item() == pytest.approx(wanted[i].item(), **close)
            assert of_a.item() == pytest.approx((-torch.sin(t[i]) * wanted[i]).item(), **close)
            assert of_t[i].item() == pytest.approx(slope, abs=1e-2 if low else 3e-4)
            # A later start by dt is a start from a state that is further on: dy0 = -f(0, y0) dt.
            assert of_t[0].item() == pytest.approx(
                0.7 * wanted[i].item(), abs=(5e4 if method == "dopri8" else 5e3) * tolerance
            )


@pytest.mark.parametrize("method", ["dopri5", "tsit5", "heun3", "rk4", "explicit_adams", "implicit_adams"])
def test_gradcheck(method):
    options = {} if method in ADAPTIVE else {"options": {"step_size": 0.1}}
    if method == "implicit_adams":
        options["options"]["max_iters"] = 30
    y0, t = double(1, 0.5).requires_grad_(), double(0, 0.35, 0.73, 0.96).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda y, t: odeint(decay, y, t, rtol=1e-9, atol=1e-9, method=method, **options), (y0, t), atol=1e-5
    )


@pytest.mark.parametrize("solve", [odeint, partial(odeint_adjoint, adjoint_params=())], ids=["odeint", "adjoint"])
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("explicit_adams", {}),
        ("explicit_adams", {"max_order": 5}),
        ("fixed_adams", {}),
        ("fixed_adams", {"implicit": 0}),
    ]
    + [("implicit_adams", {"max_iters": n}) for n in (1, 4)],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:the corrector")
def test_weights_of_adams_methods_follow_uneven_times(solve, method, options):
    """First and second derivatives by the times, through the corrector too, and tangents."""

    def func(t, y):
        return rate * y * torch.cos(3 * t)

    def last(rate_, t):
        nonlocal rate
        rate = rate_
        return solve(func, double(1), t, rtol=1e-14, atol=1e-14, method=method, options=options)[-2:]

    rate, t = double(-2), double(0, 0.1, 0.17, 0.3, 0.38, 0.5).requires_grad_()
    inputs = (double(-2).requires_grad_(), t)
    assert torch.autograd.gradcheck(last, inputs, atol=1e-8)
    assert torch.autograd.gradgradcheck(last, inputs, atol=1e-7)
    if solve is odeint:
        direction = torch.linspace(-1, 1, len(t), dtype=DOUBLE)
        jacobian = torch.autograd.functional.jacobian(partial(last, double(-2)), t)
        _, tangent = torch.func.jvp(partial(last, double(-2)), (t.detach(),), (direction,))
        torch.testing.assert_close(tangent, jacobian @ direction)


@pytest.mark.parametrize("method", ADAMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_a_state_without_dimensions_keeps_its_dtype(method, dtype):
    t = torch.linspace(0, 1, 6, requires_grad=True)
    seen = set()

    def func(t, y):
        seen.add((t.dtype, y.dtype))
        return -y

    assert odeint(func, torch.ones((), dtype=dtype), t, method=method).dtype is dtype
    assert seen == {(torch.float32, dtype)}


def test_gradients_of_the_adjoint_are_those_of_the_steps():
    """Whatever the tolerances of a backward solve; of what is not read they are zero."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(2, 2).double(), nn.Linear(2, 2)

        def forward(self, t, y):
            return torch.tanh(self.used(y))

    torch.manual_seed(0)
    model, t, found = Model(), torch.linspace(0, 1, 3, dtype=DOUBLE), []
    given = dict(adjoint_rtol=1.0, adjoint_atol=1.0, adjoint_method="euler", adjoint_options={"norm": "seminorm"})
    for solve, more in ((odeint, {}), (odeint_adjoint, {}), (odeint_adjoint, given)):
        model.zero_grad()
        solve(model, double(1, 2), t, rtol=1e-3, atol=1e-3, **more).square().sum().backward()
        found.append(model.used.weight.grad.clone())
    assert torch.equal(found[0], found[1]) and torch.equal(found[1], found[2])
    assert torch.equal(model.unused.weight.grad, torch.zeros(2, 2))
    parts = odeint_adjoint(lambda t, y: (y[0], y[1]), (double(1), double(2)), t, adjoint_params=model.parameters())
    sum(part.sum() for part in parts).backward()
    assert model.unused.bias.grad is not None


def test_what_the_adjoint_warns_of_and_refuses():
    model, t = nn.Linear(2, 2), torch.tensor([0.0, 1.0])

    def func(t, y):
        return model(y)

    with pytest.raises(errors.OptionError, match=r"adjoint_params is None.*\n.*\n.*adjoint_params=\(\)"):
        odeint_adjoint(func, torch.ones(2), t)
    with pytest.raises(errors.OptionError, match="without adjoint_options"):
        odeint_adjoint(func, torch.ones(2), t, adjoint_method="rk4", options={"first_step": 0.1}, adjoint_params=())
    with pytest.raises(errors.MethodError, match="no gradient"):
        odeint_adjoint(func, torch.ones(2), t, method="scipy_solver", adjoint_params=())
    with pytest.raises(errors.MethodError, match="'rk5'"):
        odeint_adjoint(func, torch.ones(2), t, adjoint_method="rk5", adjoint_params=())

    module = Counted(func)
    module.inner = model
    with pytest.warns(UserWarning, match=r"inner\.bias too"):
        odeint_adjoint(module, torch.ones(2), t, adjoint_params=(model.weight,))


# Options


@pytest.mark.parametrize("method", ADAPTIVE)
def test_outputs_cost_no_evaluations(method):
    counts = []
    for points in (2, 1001):
        velocity, t = Counted(), torch.linspace(0, 4, points, dtype=DOUBLE)
        y = odeint(velocity, double(1, 1), t, rtol=1e-4, atol=1e-4, method=method)
        counts.append(velocity.nfe)
        assert (y - exact(t)[:, None]).abs().max() < FACTORS.get(method, 40) * 1e-4
    assert counts[0] == counts[1]


def steps_of(**options):
    """The sizes of the steps that dopri5 tries, and those that count."""
    velocity = Counted()
    tried, counted = [], []
    velocity.callback_step = lambda t, y, dt: tried.append((t.item(), dt.item()))
    velocity.callback_accept_step = lambda t, y, dt: counted.append((t.item(), dt.item()))
    odeint(velocity, double(1), double(0, 4), rtol=1e-6, atol=1e-6, options=options)
    return tried, counted


def test_sizes_of_steps():
    assert steps_of(first_step=0.01)[0][0] == (0, 0.01)
    assert max(dt for _, dt in steps_of(max_step=0.1)[0]) <= 0.1 + 1e-15
    assert all(dt == 1.0 for _, dt in steps_of(min_step=1.0)[1])
    assert max(dt for _, dt in steps_of(first_step=0.01, ifactor=1.5)[0][:4]) <= 0.01 * 1.5**3 + 1e-15
    tried, counted = steps_of(first_step=3.0, dfactor=0.5)
    assert tried[1] == (0, pytest.approx(1.5)) and counted[0][1] < 3
    assert len(steps_of(safety=0.5)[1]) > len(steps_of()[1])
    names = "first_step min_step max_step safety ifactor dfactor max_num_steps step_t jump_t norm dtype stats"
    assert steps_of(**dict.fromkeys(names.split())) == steps_of()


def test_steps_end_where_they_must():
    starts = {t for t, _ in steps_of(step_t=double(0.3, 1.7))[1]}
    assert {0.3, 1.7} <= starts
    assert {t for t, _ in steps_of(step_t=[0.3, 1.7])[1]} == starts
    backward = Counted()
    odeint(backward, double(1), double(4, 0), options={"step_t": double(1.7, 0.3, 9.0)})
    assert any(abs(t - 1.7) < 1e-12 for t in backward.times)
    with pytest.raises(errors.OptionError, match="a time twice"):
        steps_of(step_t=double(0.3), jump_t=double(0.3))
    with pytest.raises(errors.OptionError, match="a tensor of times"):
        steps_of(jump_t=["0.3"])


@pytest.mark.parametrize("method", ADAPTIVE)
@pytest.mark.parametrize("end", [1.0, 0.0])
def test_jumps_cost_little_where_they_are_known(method, end):
    """y' = -y / 2 before t = 0.5, y from there on, forward and backward; no stage looks beyond the jump."""

    def velocity(t, y):
        return -0.5 * y if t < 0.5 else y

    t, counts = double(1 - end, end), []
    for options in ({}, {"jump_t": double(0.5)}):
        counted = Counted(velocity)
        y = odeint(counted, double(1), t, rtol=1e-5, atol=1e-5, method=method, options=options)
        counts.append(counted.nfe)
    assert counts[1] < counts[0]
    assert y[-1].item() == pytest.approx(math.exp(0.25 if end else -0.25), abs=FACTORS.get(method, 20) * 1e-5)


@pytest.mark.parametrize("method", ADAPTIVE)
@pytest.mark.parametrize("end", [1.0, 0.0])
def test_a_jump_stays_where_it_is_when_the_first_time_moves(method, end):
    """y' = 1 before t = 0.5, y from there on: y(1) = (y0 + 0.5 - t0) exp(0.5); backward y0 exp(0.5 - t0) - 0.5."""
    t = double(1 - end, 0.25 if end else 0.75, end).requires_grad_()
    options = {"jump_t": double(0.5), "step_t": double(0.3)}
    y = odeint(
        lambda t, y: torch.where(t < 0.5, 1.0, y), double(1), t, rtol=1e-6, atol=1e-6, method=method, options=options
    )
    by_first, _, by_last = torch.autograd.grad(y[-1].sum(), t)[0].tolist()
    wanted = (-math.exp(0.5), 1.5 * math.exp(0.5)) if end else (-math.exp(-0.5), 1.0)
    assert (by_first, by_last) == pytest.approx(wanted, abs=FACTORS.get(method, 20) * 1e-5)


def test_norms_see_the_state_as_the_user_has_it():
    seen = []

    def norm(state):
        seen.append(state)
        return max(part.abs().max() for part in state) if isinstance(state, tuple) else state.abs().max()

    t = torch.tensor([0.0, 1.0])
    odeint(lambda t, y: y, torch.tensor(1.0), t, options={"norm": norm})
    assert all(isinstance(state, torch.Tensor) and state.shape == () for state in seen)
    seen.clear()
    odeint(lambda t, y: y, (torch.ones(2), torch.ones(1, 3)), t, options={"norm": norm})
    assert {tuple(part.shape for part in state) for state in seen} == {((2,), (1, 3))}
    costs = []
    for factor in (1, 100):
        velocity = Counted()
        odeint(velocity, double(1), double(0, 4), options={"norm": lambda x, factor=factor: factor * x.abs().max()})
        costs.append(velocity.nfe)
    assert costs[0] < costs[1]


def test_max_num_steps_counts_between_two_output_times():
    many = torch.linspace(0, 4, 40, dtype=DOUBLE)
    assert odeint(decay, double(1), many, options={"max_num_steps": 12}).isfinite().all()
    with pytest.raises(errors.StepSizeError, match="12 steps from one output time") as raised:
        odeint(decay, double(1), double(0, 4), options={"max_num_steps": 12})
    assert isinstance(raised.value, AssertionError)


@pytest.mark.parametrize("velocity", [lambda t, y: y**2, lambda t, y: torch.where(t > 0.5, y * math.nan, y)])
def test_what_cannot_be_reached_is_an_error(velocity):
    with pytest.raises(errors.StepSizeError, match=r"fell below the resolution of t at t = (1|0\.5)\b"):
        odeint(velocity, double(1), double(0, 2))
    with pytest.raises(errors.StepSizeError, match="not finite"):
        odeint(velocity, double(math.nan), double(0, 2))


def test_the_dtype_of_times():
    velocity = Counted()
    velocity.callback_step = lambda t, y, dt: dtypes.update((t.dtype, dt.dtype))
    for dtype, wanted in ((torch.float32, torch.float32), (DOUBLE, DOUBLE)):
        dtypes = set()
        odeint(velocity, torch.ones(1), torch.tensor([0.0, 1.0]), rtol=1e-4, atol=1e-4, options={"dtype": dtype})
        assert dtypes == {wanted}


@pytest.mark.parametrize("method", [*FIXED, *ADAMS])
@pytest.mark.parametrize("end", [1.0, -1.0])
def test_perturbed_steps_are_not_evaluated_at_their_ends(method, end):
    ends = {0.0, 0.25 * end, 0.5 * end, 0.75 * end, end}
    for perturb in (False, True):
        velocity = Counted(lambda t, y: -y)
        odeint(velocity, torch.ones(1), torch.tensor([0, end]), method=method,
               options={"step_size": 0.25, "perturb": perturb})  # fmt: skip
        assert ends.isdisjoint(velocity.times) == perturb
        assert all(0 <= t * end <= 1 for t in velocity.times)


@pytest.mark.parametrize("interp, order", [("linear", 2), ("cubic", 4)])
def test_interpolation_between_fixed_steps(interp, order):
    t, found = torch.linspace(0, 2, 101, dtype=DOUBLE), []
    for size in (0.13, 0.065):
        y = odeint(decay, double(1), t, method="rk4", options={"step_size": size, "interp": interp})
        found.append((y[:, 0] - exact(t)).abs().max().item())
    assert math.log2(found[0] / found[1]) == pytest.approx(order, abs=0.5)


@pytest.mark.parametrize("reverse", [False, True])
def test_a_grid_of_ones_own(reverse):
    given = []

    def grid_constructor(func, y0, t):
        given.append((func, y0, t))
        grid = torch.linspace(0, 1, 11)
        return grid.flip(0) if reverse else grid

    t = torch.tensor([1.0, 0.55, 0.0]) if reverse else torch.tensor([0.0, 0.55, 1.0])
    y0 = (torch.tensor(1.0),)
    (y,) = odeint(growth := lambda t, y: y, y0, t, method="euler", options={"grid_constructor": grid_constructor})
    factor = 0.9 if reverse else 1.1
    wanted = torch.tensor([1, factor**4 * (1 + factor) / 2 if reverse else factor**5 * (1 + factor) / 2, factor**10])
    torch.testing.assert_close(y, wanted)
    ((func, state, times),) = given
    assert func is growth and isinstance(state, tuple) and torch.equal(times, t)
    with pytest.raises(errors.TimeGridError, match="gives 2 times from 0 to 2"):
        odeint(growth, y0, torch.tensor([0.0, 1.0]), method="rk4",
               options={"grid_constructor": lambda f, y, t: torch.tensor([0.0, 2.0])})  # fmt: skip


def test_callbacks_of_rejected_steps_and_of_fixed_ones():
    tried, counted = steps_of(first_step=3.0)
    assert len(tried) > len(counted) > 3
    calls = []

    def func(t, y):
        return tuple(-part for part in y)

    func.callback_step = lambda t, y, dt: calls.append((t.item(), type(y), dt.item()))
    odeint(func, (torch.ones(1), torch.ones(2)), torch.tensor([1.0, 0.5, 0.0]), method="heun2")
    assert calls == [(1.0, tuple, 0.5), (0.5, tuple, 0.5)]
    func.callback_reject_step = func.callback_step
    with pytest.warns(UserWarning, match="euler does not call callback_reject_step"):
        odeint(func, (torch.ones(1), torch.ones(2)), torch.tensor([0.0, 1.0]), method="euler")


@pytest.mark.parametrize(
    ("method", "option"),
    [("dopri5", "step_size"), ("rk4", "first_step"), ("explicit_adams", "implicit"), ("dopri8", "eps"), (None, "a")],
)
def test_options_that_a_method_does_not_know_are_warned_of(method, option):
    given = {"method": method, "rtol": 1e-3, "atol": 1e-3}
    t = torch.linspace(0, 1, 5)
    with pytest.warns(UserWarning, match=f"does not know the options {option}"):
        found = odeint(decay, torch.ones(1), t, **given, options={option: 0.01})
    assert torch.equal(found, odeint(decay, torch.ones(1), t, **given))


def test_an_order_below_that_of_adams_methods_is_warned_of():
    t = torch.linspace(0, 1, 9, dtype=DOUBLE)
    with pytest.warns(UserWarning, match="max_order=3 is below 4"):
        found = odeint(decay, double(1), t, method="implicit_adams", options={"max_order": 3})
    torch.testing.assert_close(found, odeint(decay, double(1), t, method="rk4"), rtol=1e-15, atol=0)
    with pytest.warns(UserWarning, match="did not converge"):
        odeint(decay, double(1), t, method="implicit_adams", options={"max_iters": 1})


def test_a_dense_solution():
    y0 = double(1, 1).requires_grad_()
    velocity = Counted()
    y = odeint_dense(velocity, y0, double(0, 4)[0], double(0, 4)[1])
    evaluations = velocity.nfe
    t = torch.linspace(0, 4, 50, dtype=DOUBLE).reshape(2, 25)
    torch.testing.assert_close(y(t), exact(t)[..., None].expand(2, 25, 2), rtol=1e-5, atol=1e-6)
    assert velocity.nfe == evaluations
    (of_y0,) = torch.autograd.grad(y(t[1, 3])[0], y0)
    assert of_y0[0].item() == pytest.approx(exact(t[1, 3]).item(), abs=1e-5)
    with pytest.raises(errors.TimeGridError, match="t = 5"):
        y(torch.tensor(5.0))
    with pytest.raises(errors.MethodError):
        odeint_dense(decay, y0, torch.tensor(0.0), torch.tensor(1.0), method="rk4")


WRONG = {
    "a list": (errors.StateError, [[torch.ones(1)], torch.ones(2)], {}),
    "integers": (errors.StateError, [torch.ones(1, dtype=torch.int64), torch.ones(2)], {}),
    "a float as t": (errors.TimeGridError, [torch.ones(1), 1.0], {}),
    "times twice": (errors.TimeGridError, [torch.ones(1), torch.tensor([0.0, 1.0, 1.0])], {}),
    "no time": (errors.TimeGridError, [torch.ones(1), torch.ones(0)], {}),
    "no such method": (errors.MethodError, [torch.ones(1), torch.tensor([0.0, 1.0])], {"method": "ralston"}),
    "no dict": (errors.OptionError, [torch.ones(1), torch.tensor([0.0, 1.0])], {"options": 3}),
    "negative": (errors.OptionError, [torch.ones(1), torch.tensor([0.0, 1.0])], {"rtol": -1e-3}),
    "with a gradient": (
        errors.OptionError,
        [torch.ones(1), torch.tensor([0.0, 1.0])],
        {"atol": torch.ones((), requires_grad=True)},
    ),
    "too many tolerances": (
        errors.OptionError,
        [(torch.ones(1), torch.ones(1)), torch.tensor([0.0, 1.0])],
        {"rtol": (1, 1, 1)},
    ),
    "both grids": (
        errors.OptionError,
        [torch.ones(1), torch.tensor([0.0, 1.0])],
        {"method": "rk4", "options": {"step_size": 0.1, "grid_constructor": len}},
    ),
    "no step": (
        errors.OptionError,
        [torch.ones(1), torch.tensor([0.0, 1.0])],
        {"method": "rk4", "options": {"step_size": 0.0}},
    ),
    "no interpolation": (
        errors.OptionError,
        [torch.ones(1), torch.tensor([0.0, 1.0])],
        {"method": "rk4", "options": {"interp": "quintic"}},
    ),
    "an order too high": (
        errors.OptionError,
        [torch.ones(1), torch.tensor([0.0, 1.0])],
        {"method": "explicit_adams", "options": {"max_order": 13}},
    ),
    "no iteration": (
        errors.OptionError,
        [torch.ones(1), torch.tensor([0.0, 1.0])],
        {"method": "implicit_adams", "options": {"max_iters": 0}},
    ),
    "no whole number of iterations": (
        errors.OptionError,
        [torch.ones(1), torch.tensor([0.0, 1.0])],
        {"method": "fixed_adams", "options": {"max_iters": 2.5}},
    ),
    "no number": (
        errors.OptionError,
        [torch.ones(1), torch.tensor([0.0, 1.0])],
        {"options": {"first_step": "a"}},
    ),
}


WRONG |= {
    f"{name}={value}": (
        errors.OptionError,
        [torch.ones(1), torch.tensor([0.0, 1.0])],
        given | {"options": {name: value}},
    )
    for given, name, value in [
        *(({}, "first_step", value) for value in (torch.ones(2), -1.0, True, 1j)),
        *(({}, "dtype", value) for value in ("float64", torch.complex64, torch.int32, float)),
        ({}, "norm", 3),
        *(({"method": "rk4"}, "step_size", value) for value in (torch.ones(2), "a", 1j, True, 0)),
        ({"method": "rk4"}, "grid_constructor", 3),
        ({"method": "explicit_adams"}, "max_order", 2.5),
    ]
}


@pytest.mark.parametrize("case", WRONG)
def test_what_means_nothing_is_refused(case):
    kind, arguments, given = WRONG[case]
    with pytest.raises(kind) as raised:
        odeint(lambda t, y: y, *arguments, **given)
    assert "required:" in str(raised.value) and "fix:" in str(raised.value)


def test_a_velocity_broadcasts():
    y = odeint(lambda t, y: 2 * y[:1], torch.ones(2), torch.tensor([0.0, 1.0]), method="euler")
    assert torch.equal(y[-1], torch.full((2,), 3.0))


@pytest.mark.parametrize(
    "velocity", [lambda t, y: y[:2], lambda t, y: (y, y), lambda t, y: 1.0, lambda t, y: y * 1j, lambda t, y: y[None]]
)
def test_what_is_no_derivative_is_refused(velocity):
    with pytest.raises(errors.StateError, match="func returns"):
        odeint(velocity, torch.ones(3), torch.tensor([0.0, 1.0]))


# Events

GRAVITY = 9.8


class Ball(nn.Module):
    """A ball that falls from a height, and is thrown back with a part of its speed."""

    def __init__(self):
        super().__init__()
        self.height = nn.Parameter(double(10)[0])
        self.part = nn.Parameter(double(0.9)[0])

    def forward(self, t, y):
        _, speed = y
        return speed, torch.full_like(speed, -GRAVITY)


def bounces(solve, count, **given):
    """The time of so many bounces, and the ball."""
    ball = Ball()
    t, state = double(0)[0], (ball.height, double(0)[0])
    for _ in range(count):
        t, (heights, speeds) = odeint_event(
            ball, state, t, event_fn=lambda t, y: y[0], odeint_interface=solve, atol=1e-10, rtol=1e-10, **given
        )
        assert abs(heights[-1].item()) < 1e-6
        state = (torch.full_like(heights[-1], 1e-12), -ball.part * speeds[-1])
    return t, ball


@pytest.mark.parametrize("solve", [odeint, odeint_adjoint])
@pytest.mark.parametrize("count", [1, 3])
def test_a_bouncing_ball_in_closed_form(solve, count):
    """The n-th bounce is at sqrt(2 h / g) (1 + 2 sum_k p^k), k < n."""
    t, ball = bounces(solve, count)
    height, part = (p.detach().clone().requires_grad_() for p in (ball.height, ball.part))
    wanted = torch.sqrt(2 * height / GRAVITY) * (1 + 2 * sum(part**k for k in range(1, count)))
    assert t.item() == pytest.approx(wanted.item(), abs=1e-7)
    found = torch.autograd.grad(t, (ball.height, ball.part), allow_unused=True)
    expected = torch.autograd.grad(wanted, (height, part), allow_unused=True)
    assert found[0].item() == pytest.approx(expected[0].item(), abs=1e-6)
    if count > 1:
        assert found[1].item() == pytest.approx(expected[1].item(), abs=1e-6)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    "given",
    [
        {"rtol": 1e-9, "atol": 1e-9},
        {"method": "bosh3", "rtol": 1e-8, "atol": 1e-9},
        {"method": "rk4", "atol": 1e-9, "options": {"step_size": 0.03, "interp": "cubic"}},
    ],
    ids=["dopri5", "bosh3", "rk4"],
)
def test_an_event_and_its_state_have_their_derivatives(given, reverse):
    """y = y0 exp(-a t) meets c at t = log(y0 / c) / a; the state there does not move with y0 or a, but with c."""
    a, y0, level = (double(x)[0].requires_grad_() for x in (0.5, 3.0, 1.2))
    sign, start = (-1 if reverse else 1), double(0.25)[0].requires_grad_()

    def event(t, y):
        return torch.stack([y - level, t * sign + 100])

    t, y = odeint_event(lambda t, y: -sign * a * y, y0, start, event_fn=event, reverse_time=reverse, **given)
    assert t.item() == pytest.approx(0.25 + sign * math.log(2.5) / 0.5, abs=1e-6)
    assert y.shape == (2,) and y[-1].item() == pytest.approx(1.2, abs=1e-6)
    by_a, by_y0, by_start = torch.autograd.grad(t, (a, y0, start), retain_graph=True)
    assert by_a.item() == pytest.approx(-sign * math.log(2.5) / 0.25, abs=1e-4)
    assert by_y0.item() == pytest.approx(sign / (3 * 0.5), abs=1e-4)
    assert by_start.item() == pytest.approx(1, abs=1e-4)
    by_level = [torch.autograd.grad(value, level, retain_graph=True)[0].item() for value in (t, y[-1])]
    assert by_level == pytest.approx([-sign / (0.5 * 1.2), 1], abs=1e-4)
    for moved in torch.autograd.grad(y[-1], (a, y0, start)):
        assert moved.item() == pytest.approx(0, abs=1e-4)


def test_odeint_gives_the_time_of_an_event_without_a_gradient():
    y0 = double(1)[0].requires_grad_()
    t, y = odeint(lambda t, y: y, y0, double(0, 1), event_fn=lambda t, y: y - 2)
    assert not t.requires_grad and y.requires_grad and t.item() == pytest.approx(math.log(2), abs=1e-7)
    t, y = odeint(lambda t, y: y, y0, double(0.5, 1), event_fn=lambda t, y: y - y0)
    assert t == 0.5 and torch.equal(y, torch.stack([y0, y0]))  # it is met at the start


def test_events_that_are_not_met():
    y0, t = double(1)[0], double(0, 1)
    with pytest.raises(errors.EventError, match="does not change its sign in 500 steps"):
        odeint(lambda t, y: -y, y0, t, event_fn=lambda t, y: y + 1, options={"max_num_steps": 500})
    with pytest.raises(errors.EventError, match="does not change its sign in 20000 steps"):
        odeint(lambda t, y: -y, y0, t, method="euler", event_fn=lambda t, y: y + 1, options={"step_size": 0.1})
    with pytest.raises(errors.EventError, match="event_fn is NaN"):
        odeint(lambda t, y: -y, y0, t, event_fn=lambda t, y: torch.sqrt(y - 0.5))
    with pytest.raises(errors.OptionError, match="without a step_size"):
        odeint(lambda t, y: -y, y0, t, method="rk4", event_fn=lambda t, y: y)
    with pytest.raises(errors.EventError, match="scipy_solver"):
        odeint(lambda t, y: -y, y0, t, method="scipy_solver", event_fn=lambda t, y: y)
    with pytest.raises(errors.TimeGridError, match="3 points beside event_fn"):
        odeint(lambda t, y: -y, y0, double(0, 1, 2), event_fn=lambda t, y: y)


def test_an_event_at_the_start_is_where_the_solution_begins():
    """A body on the ground that is thrown up: the product with the sign at the start has no slope."""
    y = torch.tensor([0.0, 1.0], requires_grad=True)
    time, states = odeint_event(
        lambda t, y: torch.stack([y[1], -torch.ones(())]), y, torch.tensor(0.0), event_fn=lambda t, y: y[0]
    )
    assert time == 0 and torch.equal(states, torch.tensor([[0.0, 1.0], [0.0, 1.0]]))
    assert torch.equal(torch.autograd.grad(time, y)[0], torch.tensor([-1.0, 0.0]))


@pytest.mark.parametrize(
    "event",
    [torch.sign, lambda y: torch.where(y > 0, 1.0, -1.0), lambda y: torch.sign(y).long()],
    ids=["sign", "where", "integer"],
)
def test_an_event_function_of_steps_has_its_time_and_state(event):
    y = torch.ones(2, requires_grad=True)
    time, states = odeint_event(lambda t, y: -y, y, torch.tensor(0.0), event_fn=lambda t, y: event(y[0] - 0.5))
    assert abs(time.item() - math.log(2)) < 1e-4 and (states[-1] - 0.5).abs().max() < 1e-4


def test_the_time_of_an_event_without_a_slope_has_the_derivative_nan():
    floor = torch.tensor(0.5, requires_grad=True)
    time, _ = odeint_event(
        lambda t, y: -y, torch.ones(2), torch.tensor(0.0),
        event_fn=lambda t, y: torch.sign(y[0] - 0.5) + floor - floor.detach(),
    )  # fmt: skip
    assert abs(time.item() - math.log(2)) < 1e-4 and torch.autograd.grad(time, floor)[0].isnan()


def grown(rate, y0):
    return odeint_event(lambda t, y: rate * y, y0, double(0), event_fn=lambda t, y: y[0] - 1)[0]


def test_derivatives_of_an_event_time_in_transforms():
    """log(1 / y0) / rate."""
    rate, y0 = double(0.7)[0], double(0.5)
    for derivative in (torch.func.grad, torch.func.jacrev, torch.func.jacfwd):
        assert derivative(grown)(rate, y0).item() == pytest.approx(-math.log(2) / 0.7**2, rel=1e-5)
    assert torch.func.jacrev(grown, 1)(rate, y0).item() == pytest.approx(-1 / (0.7 * 0.5), rel=1e-5)


def test_second_derivatives_of_an_event_time_are_refused():
    rate, y0 = double(0.7)[0].requires_grad_(), double(0.5)
    with pytest.raises(errors.SecondDerivativeError, match="create_graph=True"):
        torch.autograd.grad(grown(rate, y0), rate, create_graph=True)
    for outer in (torch.func.grad, torch.func.jacfwd):
        with pytest.raises(errors.SecondDerivativeError, match="each differentiate"):
            outer(torch.func.grad(grown))(rate.detach(), y0)
    with torch.autograd.forward_ad.dual_level(), pytest.raises(errors.SecondDerivativeError, match="forward_ad"):
        torch.autograd.grad(grown(rate, torch.autograd.forward_ad.make_dual(y0, y0)), rate)


def test_an_event_in_inference_mode():
    with torch.inference_mode():
        time, _ = odeint_event(lambda t, y: -y, torch.ones(2), torch.tensor(0.0), event_fn=lambda t, y: y[0] - 0.5)
    assert abs(time.item() - math.log(2)) < 1e-4
