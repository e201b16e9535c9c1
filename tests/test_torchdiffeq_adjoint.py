"""odeint_adjoint uncompiled: gradients of the steps that were taken, each of which the backward computes once more."""

import gc
import math
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from rampde_fx import errors
from rampde_fx.torchdiffeq import odeint, odeint_adjoint, odeint_event
from rampde_fx.torchdiffeq.options import ADAPTIVE
from tests.adjoint_solves import (
    DOUBLE,
    METHODS,
    Net,
    Normed,
    adjoint,
    assert_as_odeint,
    double,
    gradients,
    options_of,
    times,
)

# Gradients


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("end", [1.0, -1.0])
def test_gradients_are_those_of_odeint(method, end):
    assert_as_odeint(Net(), double(0.3, -0.7), times(end), **options_of(method))


@pytest.mark.parametrize("method", ["dopri5", "adaptive_heun", "dopri8", "rk4", "implicit_adams"])
def test_gradients_of_tuples_and_of_what_a_closure_holds(method):
    """Leaves and what was computed before the call, of which the step's function knows nothing."""
    rate, scale = double(0.7)[0].requires_grad_(), double(0.3, 0.4).requires_grad_()
    computed = scale.exp()

    def func(t, y):
        return (-rate * y[0] * torch.cos(t), computed * y[1] * y[0].sum())

    y0 = (torch.ones(1, dtype=torch.float32), double(0.5, 0.2))
    wanted = [
        gradients(solve, func, y0, times(), (rate, computed), **options_of(method)) for solve in (odeint, adjoint)
    ]
    torch.testing.assert_close(wanted[1], wanted[0], rtol=1e-12, atol=1e-13)
    y = adjoint(func, y0, times(), **options_of(method))[1]
    (found,) = torch.autograd.grad(y.sum(), scale, retain_graph=True)
    (expected,) = torch.autograd.grad(odeint(func, y0, times(), **options_of(method))[1].sum(), scale)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


OPTIONS = {
    "jump_t": {"jump_t": double(0.5)},
    "step_t": {"step_t": double(0.21, 0.5)},
    "max_step": {"max_step": 0.1},
    "rejected": {"first_step": 0.9},
    "perturb": {"step_size": 0.25, "perturb": True},
    "cubic": {"step_size": 0.3, "interp": "cubic"},
    "grid": {"grid_constructor": lambda f, y, t: torch.cat([t[:1], t[:1] + 0.3, t[-1:]])},
}


@pytest.mark.parametrize("option", OPTIONS)
def test_gradients_with_options(option):
    for method in ("dopri5", "dopri8", "adaptive_heun") if len(OPTIONS) - 3 > list(OPTIONS).index(option) else (
        "rk4", "heun3", "explicit_adams",
    ):  # fmt: skip
        given = {"rtol": 1e-4, "atol": 1e-5, "method": method, "options": OPTIONS[option]}
        assert_as_odeint(Net(), double(0.3, -0.7), times(), **given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64, torch.complex128], ids=str)
def test_gradients_of_every_dtype(dtype):
    rate = torch.tensor(-1 + 1j if dtype.is_complex else -1.0).to(dtype).requires_grad_()
    y0 = torch.tensor([1, 0.5], dtype=dtype)
    wanted = assert_as_odeint(lambda t, y: rate * y, y0, times(), (rate,), rtol=1e-3, atol=1e-4)
    assert wanted[-1].abs() > 0.1


@pytest.mark.parametrize("method", ["dopri5", "bosh3", "rk4", "explicit_adams"])
def test_derivatives_of_derivatives(method):
    rate, y0, t = double(0.7)[0].requires_grad_(), double(0.5, 0.8).requires_grad_(), double(0, 0.4, 0.9)

    def end(y0, rate):
        return odeint_adjoint(lambda t, y: -rate * y**2 * torch.cos(t), y0, t, adjoint_params=(), **options_of(method))

    given = {**options_of(method), "rtol": 1e-9, "atol": 1e-9}
    assert torch.autograd.gradgradcheck(
        lambda y, a: odeint_adjoint(lambda t, y: -a * y**2, y, t, adjoint_params=(), **given)[-1], (y0, rate), atol=1e-5
    )
    found = []
    for solve in (odeint, adjoint):
        y = solve(lambda t, y: -rate * y**2 * torch.cos(t), y0, t, **given)
        first = torch.autograd.grad(y[-1].sum(), (y0, rate), create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), (y0, rate), create_graph=True)
        third = torch.autograd.grad(sum(g.sum() for g in second), (y0, rate))
        found.append([*first, *second, *third])
    torch.testing.assert_close(found[1], found[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["grad", "jvp", "vmap", "hessian"])
def test_transforms_of_a_solve(name):
    """A transform bears no hooks on saved tensors: inside of one every step is kept."""
    model, t = Net(), double(0, 0.5)

    def end(y, solve):
        return solve(lambda t, y: torch.tanh(y) * torch.cos(t), y, t, method="rk4", options={"step_size": 0.1})[-1]

    y = double(0.3, -0.7)
    transforms = {
        "grad": lambda f: torch.func.grad(lambda y: f(y).sum())(y),
        "jvp": lambda f: torch.func.jvp(f, (y,), (torch.ones_like(y),))[1],
        "vmap": lambda f: torch.vmap(f)(torch.stack([y, 2 * y])),
        "hessian": lambda f: torch.func.hessian(lambda y: f(y).square().sum())(y),
    }
    found, wanted = (transforms[name](lambda y, solve=solve: end(y, solve)) for solve in (adjoint, odeint))
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)
    assert model.nfe == 0


def test_a_backward_may_run_twice():
    model = Net()
    y = odeint_adjoint(model, double(0.3, -0.7), times(), rtol=1e-3, atol=1e-4)
    loss = y.square().sum()
    first = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    partial = torch.autograd.grad(loss, [model.last.bias], retain_graph=True)
    second = torch.autograd.grad(loss, list(model.parameters()))
    assert all(map(torch.equal, first, second)) and torch.equal(partial[0], first[-1])


class OfState(nn.Module):
    """A velocity that does not depend on time."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, t, y):
        return self.net(y)


@pytest.mark.parametrize("frozen", [True, False])
def test_modes_and_what_needs_gradients_may_change_before_the_backward(frozen):
    """In the backward they are as they were, and behind it as they are."""
    found = []
    for solve in (odeint, odeint_adjoint):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Dropout(0.3)).double()
        y = double(0.3, -0.7, 0.1, 0.5).reshape(2, 2).requires_grad_()
        loss = solve(OfState(model), y, times(), method="rk4").square().sum()
        model.eval()
        if frozen:
            model.requires_grad_(False)
        loss.backward()
        assert not any(module.training for module in model.modules())
        assert not frozen or not any(p.requires_grad for p in model.parameters())
        found.append([y.grad, *(p.grad for p in model.parameters()), *model.buffers()])
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-13)


def test_modules_are_looked_into_behind_however_much_data():
    found = []
    for solve in (odeint, odeint_adjoint):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))).double()
        model.table = [[float(i) for i in range(1000)] for _ in range(12)]
        y = double(0.3, -0.7, 0.1, 0.5).reshape(2, 2).requires_grad_()
        solve(OfState(model), y, times(), method="rk4").square().sum().backward()
        found.append([y.grad, *(p.grad for p in model.parameters()), *model.buffers()])
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("fails", ["changed", "changed back"])
def test_what_was_refused_once_is_not_taken_the_next_time(fails):
    """The tensors of an evaluation that is another one are let go."""
    model = Net()
    model.register_forward_hook(lambda module, given, output: output * module.factor)
    model.factor = double(1.5)
    y0 = double(0.3, -0.7).requires_grad_()
    end = odeint_adjoint(model, y0, double(0, 1), method="rk4")[-1]
    wanted = torch.autograd.grad(end.sum(), y0, retain_graph=True)
    model.factor = double(2.5)
    for _ in range(6):
        with pytest.raises(errors.RecomputationError):
            torch.autograd.grad(end.sum(), y0, retain_graph=True)
    if fails == "changed back":
        model.factor = double(1.5)
        assert torch.equal(torch.autograd.grad(end.sum(), y0)[0], wanted[0])


# Velocities


class Divergence(nn.Module):
    """As in FFJORD: the second part of the state follows from a derivative of the first one's velocity."""

    def __init__(self):
        super().__init__()
        self.net = Net()

    def forward(self, t, y):
        with torch.enable_grad():
            x = y[0].requires_grad_()
            rate = self.net(t, x)
            (slope,) = torch.autograd.grad(rate.sum(), x, create_graph=True)
        return rate, slope.sum(-1)


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_a_velocity_that_differentiates_is_evaluated_no_more_for_it(method):
    func, y0 = Divergence(), (double(0.3, -0.7), torch.zeros((), dtype=DOUBLE))
    assert_as_odeint(func, y0, times(), **options_of(method))
    counts = []
    for solve in (odeint, odeint_adjoint):
        func.net.nfe = 0
        y = solve(func, y0, times(), **options_of(method))
        counts.append(func.net.nfe)
    assert counts[0] == counts[1]
    y[1].sum().backward()
    assert func.net.nfe <= 2 * counts[0]


class Noisy(Net):
    def forward(self, t, y):
        return super().forward(t, nn.functional.dropout(y, 0.4))


@pytest.mark.parametrize("given", [options_of("rk4"), {"rtol": 1, "atol": 10}, options_of("explicit_adams")], ids=str)
def test_random_numbers_are_those_of_the_forward(given):
    wanted = assert_as_odeint(Noisy(), double(0.3, -0.7), times(), **given)
    torch.manual_seed(2)
    assert not torch.equal(gradients(odeint, Noisy(), double(0.3, -0.7), times(), **given)[1], wanted[1])
    torch.manual_seed(1)
    y = odeint_adjoint(Noisy(), double(0.3, -0.7), times(), **given)
    before = torch.get_rng_state()
    y.sum().backward()
    assert torch.equal(torch.get_rng_state(), before)


def test_autocast_is_that_of_the_forward():
    model, y0, found = Net(dtype=torch.float32), torch.tensor([[0.3, -0.7]]), []
    dtypes = set()
    model.last.register_forward_hook(lambda module, given, output: dtypes.add(output.dtype))
    for solve in (odeint, odeint_adjoint):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            y = solve(model, y0, times(points=3).float(), method="rk4")
        y.sum().backward()
        found.append([parameter.grad.clone() for parameter in model.parameters()])
    assert dtypes == {torch.bfloat16}
    torch.testing.assert_close(found[1], found[0], rtol=1e-6, atol=0)


class Lazy(Net):
    """Noise that is made once, and a number that counts."""

    def __init__(self):
        super().__init__()
        self.noise = None

    def forward(self, t, y):
        if self.noise is None:
            self.noise = torch.randn_like(y)
        return super().forward(t, y) * self.noise


class Checkpointed(Net):
    def forward(self, t, y):
        return checkpoint(super().forward, t, y, use_reentrant=False)


class InParts(Net):
    """Writes into a tensor of its own."""

    def forward(self, t, y):
        rate = torch.zeros_like(y)
        rate[..., 0] = -y[..., 1]
        rate[..., 1] = super().forward(t, y)[..., 0]
        return rate


class Energy(Net):
    """The derivative of a number by the state, which keeps its graph, with a parameter as it is."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, 4, dtype=DOUBLE).reshape(2, 2))

    def forward(self, t, y):
        with torch.enable_grad():
            y = y if y.requires_grad else y.requires_grad_()
            return -torch.autograd.grad(torch.sin(y @ self.weight).sum(), y, create_graph=True)[0]


class OfALeaf(Energy):
    """A leaf of each evaluation's own."""

    def forward(self, t, y):
        with torch.enable_grad():
            x = y.detach().requires_grad_()
            rate = torch.autograd.grad(torch.sin(x @ self.weight).sum(), x, create_graph=True)[0]
        return rate - y


class OnAGraph(Net):
    """A sparse buffer, which has no equality."""

    def __init__(self):
        super().__init__()
        self.register_buffer("adjacent", torch.eye(2, dtype=DOUBLE).to_sparse())

    def forward(self, t, y):
        return self.adjacent @ super().forward(t, y)


@pytest.mark.parametrize("kind", [Energy, OfALeaf, OnAGraph])
@pytest.mark.parametrize("inference", [False, True])
def test_velocities_that_are_the_same_in_the_backward_pass(kind, inference):
    found = []
    for solve in (odeint, odeint_adjoint):
        model = kind()
        with torch.inference_mode(inference):
            y0 = double(0.3, -0.7, 0.2, 0.9).reshape(2, 2)
        solve(model, y0.clone() if solve is odeint else y0, times(), method="rk4").square().sum().backward()
        gradients = [parameter.grad for parameter in model.parameters()]
        found.append([gradient for gradient in gradients if gradient is not None and gradient.any()])
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("kind", [Lazy, Normed, Checkpointed, InParts])
def test_velocities_of_other_kinds(kind):
    y0 = double(0.3, -0.7, 0.2, 0.9).reshape(2, 2)
    for given in (options_of("dopri5"), options_of("rk4")):
        torch.manual_seed(0)
        assert_as_odeint(kind(), y0, times(), **given)


def test_a_compiled_velocity():
    compiled = torch.compile(Net().last.forward, backend="aot_eager")
    model = nn.Linear(2, 8).double()

    def func(t, y):
        return compiled(torch.tanh(model(y)))

    assert_as_odeint(func, double(0.3, -0.7), times(), tuple(model.parameters()), **options_of("rk4"))


def test_a_backward_in_inference_mode():
    model = Net()
    y0, found = double(0.3, -0.7).requires_grad_(), []
    for solve in (odeint, odeint_adjoint):
        loss = solve(model, y0, times(), method="rk4").square().sum()
        with torch.inference_mode():
            found.append([gradient.clone() for gradient in torch.autograd.grad(loss, [y0, *model.parameters()])])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


class Transformed(nn.Module):
    """A velocity with a derivative by a transform, which counts, keeps statistics, notes and draws."""

    TRANSFORMS: ClassVar = {
        "vjp": lambda f, y, e: torch.func.vjp(f, y)[1](e)[0],
        "jvp": lambda f, y, e: torch.func.jvp(f, (y,), (e,))[1],
        "grad": lambda f, y, e: torch.func.grad(lambda y: (f(y) * e).sum())(y),
        "jacrev in vmap": lambda f, y, e: torch.vmap(torch.func.jacrev(f))(y).sum(1) * e,
        "jacfwd in vmap": lambda f, y, e: torch.vmap(torch.func.jacfwd(f))(y).sum(1) * e,
        "hessian": lambda f, y, e: torch.func.hessian(lambda y: f(y).square().sum())(y).sum((2, 3)) * e,
    }

    def __init__(self, transform):
        super().__init__()
        self.transform, self.count, self.noted = self.TRANSFORMS[transform], 0, []
        self.layer, self.norm = nn.Linear(2, 2, dtype=DOUBLE), nn.BatchNorm1d(2, dtype=DOUBLE)

    def forward(self, t, y):
        self.count += 1
        y = self.norm(y)
        found = self.transform(lambda y: torch.tanh(self.layer(y)), y, torch.randn(y.shape, dtype=DOUBLE))
        self.noted.append(found.detach().square().sum())
        return nn.functional.dropout(found, 0.3) * torch.sin(y)


@pytest.mark.parametrize("transform", Transformed.TRANSFORMS)
def test_a_velocity_that_calls_a_transform_is_evaluated_once_in_the_forward(transform):
    """Transforms refuse hooks on saved tensors: what they save is kept, the rest is computed once more."""
    found = []
    for solve in (odeint, odeint_adjoint):
        torch.manual_seed(0)
        model, y = Transformed(transform), double(0.3, -0.7, 0.1, 0.5, 1.0, 0.2).reshape(3, 2).requires_grad_()
        loss = solve(model, y, times(), method="rk4")[-1].square().sum()
        noted = [model.count, *model.noted]
        loss.backward()
        found.append(
            [loss, y.grad, *(p.grad for p in model.parameters()), *model.buffers(), *map(torch.as_tensor, noted)]
        )
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-13)
    assert found[0][-len(noted)] == 4 * (len(times()) - 1)


@pytest.mark.parametrize("inner", [odeint, adjoint])
def test_a_velocity_that_solves_calls_a_transform(inner):
    """Under the hooks of both solves."""
    found = []
    for solve in (odeint, adjoint):
        torch.manual_seed(0)
        model, y0 = Transformed("vjp"), double(0.3, -0.7, 0.1, 0.5).reshape(2, 2).requires_grad_()
        model.norm = nn.Identity()

        def func(t, y, solve=inner if solve is adjoint else odeint, model=model):
            return solve(model, torch.sin(y), double(0, 0.5), method="euler")[-1]

        loss = solve(func, y0, double(0, 0.5, 1), method="euler")[-1].square().sum()
        found.append([loss, *torch.autograd.grad(loss, [y0, *model.parameters()])])
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize("fullgraph", [True, False])
@pytest.mark.parametrize("first", [odeint, adjoint])
def test_a_transform_in_a_part_that_was_compiled_apart(compiler, fullgraph, first):
    layer, norm, found = nn.Linear(2, 2).double(), nn.BatchNorm1d(2).double(), []
    compiled = torch.compile(lambda y: torch.func.vjp(layer, y)[1](y)[0], backend=compiler, fullgraph=fullgraph)
    y0 = double(0.3, -0.7, 0.1, 0.5).reshape(2, 2).requires_grad_()
    for solve in (first, odeint, adjoint):
        loss = (
            solve(lambda t, y: compiled(torch.sin(norm(y))), y0, double(0, 0.5, 1), method="euler")[-1].square().sum()
        )
        found.append([loss, *torch.autograd.grad(loss, [y0, layer.weight, norm.weight])])
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(found[2], found[0], rtol=1e-12, atol=1e-13)
    assert int(norm.num_batches_tracked) == 6


def test_another_thread_compiles_a_transform_meanwhile():
    def other():
        compiled = torch.compile(lambda y: torch.func.vjp(torch.sin, y)[1](y)[0], backend="eager", fullgraph=True)
        return compiled(double(0.3))

    def func(t, y):
        with ThreadPoolExecutor(1) as pool:
            return y * pool.submit(other).result()

    y0 = double(0.5).requires_grad_()
    adjoint(func, y0, double(0, 1), method="euler")[-1].sum().backward()
    assert y0.grad.item() == pytest.approx(1 + 0.3 * math.cos(0.3))


def test_a_frozen_module_of_torchscript_has_no_mode():
    class Script(nn.Module):
        def forward(self, y):
            return torch.sin(y)

    part = torch.jit.freeze(torch.jit.script(Script().eval()))
    found = []
    for solve in (odeint, adjoint):
        y0 = double(0.5).requires_grad_()
        solve(lambda t, y: part(y), y0, times(), method="rk4").sum().backward()
        found.append(y0.grad)
    torch.testing.assert_close(*found, rtol=1e-12, atol=0)


def test_hooks_of_the_users_are_refused_by_a_transform_as_in_odeint():
    func = Transformed("vjp")
    known = vars(torch._C._autograd).copy()

    def forward(t, y):
        with torch.autograd.graph.save_on_cpu():
            return func(t, y)

    for solve in (odeint, adjoint):
        func.norm = nn.Identity()
        with pytest.raises(RuntimeError, match="saved tensor hooks"):
            solve(forward, double(0.3, -0.7, 0.1, 0.5).reshape(2, 2), times(), method="rk4")
    assert vars(torch._C._autograd) == known  # nothing of ours is left


@pytest.mark.parametrize("solve", [odeint, odeint_adjoint])
def test_swapped_arguments_are_told_as_such(solve):
    class OfScipy(nn.Module):
        def forward(self, y, t):
            return -y

    with pytest.raises(errors.StateError, match=r"func is a float64 tensor(.|\n)*odeint\(func, y0, t\), in this order"):
        solve(double(0.3, -0.7), Net(), times())
    with pytest.raises(errors.StateError, match=r"\(y, t\)"):
        solve(OfScipy(), double(0.3, -0.7), times())


def test_tangents_of_forward_mode_are_those_of_odeint():
    """Of a dual level outside of torch.func, by the state and by the times; and gradients inside of it."""
    model = Net()
    for given in (options_of("dopri5"), options_of("rk4"), options_of("explicit_adams")):
        found = []
        for solve in (odeint, odeint_adjoint):
            with torch.autograd.forward_ad.dual_level():
                y0 = torch.autograd.forward_ad.make_dual(double(0.3, -0.7), double(1, 2))
                t = torch.autograd.forward_ad.make_dual(times(), times().square())
                y = solve(model, y0, t, **given)
                gradient = torch.autograd.grad(y.sum(), model.first.weight)[0]
                found.append([*torch.autograd.forward_ad.unpack_dual(y), gradient])
        torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-13)


# Memory


def kept(solve, func, y0, t, **given):
    """The bytes of the tensors that autograd keeps for the backward, each memory once, without the parameters."""
    alive = weakref.WeakSet()

    class Saved:
        def __init__(self, tensor):
            self.tensor = tensor.detach()
            alive.add(self)

    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
        y = solve(func, y0, t, **given)
    gc.collect()
    storages = {saved.tensor.untyped_storage().data_ptr(): saved.tensor.untyped_storage().nbytes() for saved in alive}
    of_parameters = {parameter.untyped_storage().data_ptr() for parameter in func.parameters()}
    assert y.requires_grad
    return sum(size for place, size in storages.items() if place not in of_parameters)


@pytest.mark.parametrize(("method", "states"), [("rk4", 1), ("dopri5", 2), ("bosh3", 2), ("dopri8", 2),
                                                ("explicit_adams", 2), ("euler", 1)])  # fmt: skip
def test_one_state_per_step_is_kept(method, states):
    """And a velocity where the next step begins with it, whatever the velocity computes."""
    rows, steps = 64, 20
    y0, t = torch.ones(rows, 2, dtype=DOUBLE), double(0, 1)
    options = {"max_step": 1 / steps, "first_step": 1 / steps} if method in ADAPTIVE else {"step_size": 1 / steps}
    found = []
    for width in (8, 64):
        given = {"method": method, "options": options, "rtol": 1e-3, "atol": 1e-3}
        found.append(kept(odeint_adjoint, Net(width), y0, t, **given))
        assert kept(odeint, Net(width), y0, t, **given) > (1 if width == 8 else 4) * found[-1]
    one = y0.nbytes
    assert found[0] == found[1]
    assert found[0] <= states * (steps + 3) * one + 100 * steps  # and the ends of steps


def test_a_solve_leaves_no_memory():
    """What is kept to be computed once more holds nothing that was computed."""
    for given in (options_of("dopri5"), options_of("rk4"), options_of("implicit_adams")):
        model = Net()
        y = odeint_adjoint(model, double(0.3, -0.7).requires_grad_(), times(), **given)
        watched, net = weakref.ref(y), weakref.ref(model)
        del y, model
        gc.collect()
        assert watched() is None and net() is None


@pytest.mark.parametrize("method", ["dopri5", "rk4", "implicit_adams"])
def test_a_backward_leaves_no_memory(method):
    """Nothing is left of what it computed once more."""
    model, results = Net(), []
    model.first.register_forward_hook(lambda module, given, output: results.append(weakref.ref(output)))
    y = odeint_adjoint(model, double(0.3, -0.7).requires_grad_(), times(), **options_of(method))
    evaluated = len(results)
    y.sum().backward()
    assert len(results) > evaluated
    del y
    gc.collect()
    assert not any(result() is not None for result in results)


def test_hooks_of_the_users_see_what_is_kept():
    """States move to where the user has them; one that was changed in place before the call is no error."""
    model, y0 = Net(), torch.zeros(2, dtype=DOUBLE).normal_().requires_grad_()
    found = []
    for solve in (odeint, odeint_adjoint):
        with torch.autograd.graph.saved_tensors_hooks(lambda x: x.detach().numpy().copy(), torch.from_numpy):
            y = solve(model, y0, times(), method="rk4")
        found.append(torch.autograd.grad(y.sum(), (y0, *model.parameters())))
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=0)


# Evaluations and callbacks of the backward


@pytest.mark.parametrize("method", ["euler", "midpoint", "heun3", "rk4"])
def test_the_backward_evaluates_where_the_forward_did(method):
    model, t = Net(), double(0, 0.25, 0.5, 1)
    y = odeint_adjoint(model, double(0.3, -0.7), t, method=method)
    forward, model.times = model.times, []
    y.sum().backward()
    per_step = len(forward) // 3
    steps = [forward[i : i + per_step] for i in range(0, len(forward), per_step)]
    assert model.times == [time for step in reversed(steps) for time in step]


def test_rejected_steps_cost_nothing_in_the_backward():
    model, accepted = Net(), []
    model.callback_accept_step = lambda t, y, dt: accepted.append(t)
    y = odeint_adjoint(model, double(0.3, -0.7), times(3.0), rtol=1e-4, atol=1e-4, options={"first_step": 3.0})
    forward, model.nfe = model.nfe, 0
    y.sum().backward()
    assert model.nfe == 6 * len(accepted) + 1 < forward  # the velocity at the first time is the one more


class Single(Net):
    """The state is a tuple of one tensor."""

    def forward(self, t, y):
        return (super().forward(t, y[0]),)


def calls_back(model, y0, names=("step", "accept_step", "reject_step"), **given):
    """The solution, the starts and sizes of its steps, and the calls of its backward by their names."""
    calls, forward = {name: [] for name in names}, []
    model.callback_step = lambda t, y, dt: forward.append((t.item(), dt.item()))
    for name, called in calls.items():
        setattr(
            model, f"callback_{name}_adjoint", lambda t, y, dt, called=called: called.append((t.item(), y, dt.item()))
        )
    y = odeint_adjoint(model, y0, torch.linspace(1, 0, 9, dtype=DOUBLE), **given)
    assert not any(calls.values())
    (y[0] if isinstance(y, tuple) else y).sum().backward()
    return y, forward, calls


@pytest.mark.parametrize("method", ["rk4", "explicit_adams", "implicit_adams"])
def test_callbacks_of_the_backward(method):
    """Once for each step, in the order of the backward, with the state at the end at which it begins."""
    (y,), forward, calls = calls_back(Single(), (double(0.3, -0.7),), names=("step",), method=method)
    steps = calls["step"]
    assert [end + dt for end, _, dt in steps] == pytest.approx([start for start, _ in forward[::-1]], abs=1e-15)
    assert [dt for *_, dt in steps] == [dt for _, dt in forward[::-1]] == [0.125] * 8
    assert all(isinstance(state, tuple) and not state[0].requires_grad for _, state, _ in steps)
    torch.testing.assert_close(torch.stack([state for _, (state,), _ in steps]), y[1:].flip(0), rtol=1e-14, atol=0)


def test_callbacks_of_the_backward_of_adaptive_steps():
    """Each counts, and none is rejected, whatever the forward has rejected."""
    model, given = Net(), {"rtol": 1e-9, "atol": 1e-9, "options": {"first_step": 0.9}}
    y, forward, calls = calls_back(model, double(0.3, -0.7), **given)
    assert len(calls["step"]) < len(forward) and not calls["reject_step"]
    assert [(t, dt) for t, _, dt in calls["accept_step"]] == [(t, dt) for t, _, dt in calls["step"]]
    assert calls["step"][0][0] == pytest.approx(0, abs=1e-15)
    assert sum(dt for *_, dt in calls["step"]) == pytest.approx(1, abs=1e-15)
    torch.testing.assert_close(calls["step"][0][1], y[-1], rtol=1e-14, atol=0)


def test_callbacks_that_a_method_does_not_call_are_warned_of():
    model = Net()
    model.callback_accept_step_adjoint = model.callback_step_adjoint = lambda t, y, dt: None
    with pytest.warns(UserWarning, match="euler does not call callback_accept_step_adjoint$"):
        odeint_adjoint(model, double(0.3, -0.7), times(), method="euler")


def test_without_gradients_nothing_is_kept_or_called():
    model, calls = Net(), []
    model.callback_step_adjoint = lambda t, y, dt: calls.append(t)
    with torch.no_grad():
        y = odeint_adjoint(model, double(0.3, -0.7), times(), method="rk4")
    assert not y.requires_grad and not calls
    torch.testing.assert_close(y, odeint(model, double(0.3, -0.7), times(), method="rk4"), rtol=0, atol=0)


# Events


@pytest.mark.parametrize("given", [{"rtol": 1e-6, "atol": 1e-8}, options_of("rk4"), options_of("explicit_adams")],
                         ids=["dopri5", "rk4", "explicit_adams"])  # fmt: skip
def test_events(given):
    """y' = -a y from y0 meets c at log(y0 / c) / a."""

    class Decay(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.nfe = nn.Parameter(double(0.7)[0]), 0

        def forward(self, t, y):
            self.nfe += 1
            return -self.a * y

    given = {**given, "options": {**given.get("options", {}), "interp": "cubic"}} if "method" in given else given
    found, func = [], Decay()
    for solve in (odeint, odeint_adjoint):
        y0 = double(2).requires_grad_()
        t, y = odeint_event(func, y0, double(0)[0], event_fn=lambda t, y: y[0] - 1, odeint_interface=solve, **given)
        func.nfe = 0
        found.append([t, y, *torch.autograd.grad(t + y[-1, 0], (func.a, y0))])
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-14)
    assert func.nfe > 4
    time, _, by_a, by_y0 = found[1]
    assert time.item() == pytest.approx(torch.log(double(2)).item() / 0.7, abs=1e-5)
    assert by_a.item() == pytest.approx(-torch.log(double(2)).item() / 0.49, abs=1e-3)
    assert by_y0.item() == pytest.approx(1 / (0.7 * 2), abs=1e-3)


def test_a_module_is_solved_inside_of_transforms():
    """Its parameters are reached there, too: by sums, which torch.func differentiates and batches."""
    torch.manual_seed(0)
    layer, y, t = torch.nn.Linear(2, 2), torch.randn(3, 2), torch.linspace(0, 1, 3)

    class Velocity(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, t, y):
            return torch.tanh(self.layer(y))

    found = [
        torch.func.vmap(torch.func.grad(lambda y, solve=solve: solve(Velocity(), y, t, method="rk4").sum()))(y)
        for solve in (odeint, odeint_adjoint)
    ]
    assert torch.equal(*found) and found[0].count_nonzero() == 6
