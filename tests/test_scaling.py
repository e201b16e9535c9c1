"""Dynamic adjoint scaling: the scale, overflow and its bounded repetition, gradients that are not finite."""

import copy
import math
import random

import pytest
import torch

import rampde_fx
from rampde_fx.ir.ideal_scales import Factor, Scales
from rampde_fx.runtime import counts
from rampde_fx.runtime.scales import power_of_two_scale
from tests.comparison import compiled, gradients, relative_errors
from tests.models import RK4, Euler

U16 = 2.0**-11


@pytest.mark.parametrize("target", [1.0, 2.0**-7, 2.0**9])
@pytest.mark.parametrize("magnitude", [1.0, 1.999, 2.0, 3e-9, 7e30, 1.2e-38, 1e-41])
def test_scale_is_a_power_of_two_that_brings_the_largest_cotangent_to_the_target(magnitude, target):
    cotangent = magnitude * torch.tensor([0.3, -1.0, 0.0])
    scale = power_of_two_scale(torch.tensor(target), cotangent).item()
    power = 2.0 ** (math.frexp(torch.tensor(magnitude).item())[1] - 1)
    assert scale == min(target / max(power, 2.0**-126), 2.0**120)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_cotangents_that_are_not_finite_are_not_scaled(value):
    assert power_of_two_scale(torch.tensor(1.0), torch.tensor([1.0, value])).item() == 1.0


def test_one_scale_serves_all_cotangents_of_an_evaluation():
    assert power_of_two_scale(torch.tensor(1.0), torch.tensor([0.25]), torch.full((2, 2), -4.0)).item() == 0.25


NEIGHBOURS = torch.randint(0, 12, (2, 60), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "mean",
    [
        lambda z, v, i: z.scatter_reduce(0, i[:, None].expand(-1, 4), v, "mean", include_self=False),
        lambda z, v, i: z.scatter_reduce(0, i[:, None].expand(-1, 4), v, "mean"),
        lambda z, v, i: z.index_reduce(0, i, v, "mean"),
    ],
    ids=["of neighbours", "of neighbours and itself", "by an index"],
)
@pytest.mark.filterwarnings("ignore:index_reduce")
def test_means_over_neighbours(mean):
    """Their derivatives divide by counts that follow from the shape of a cotangent."""

    class Graph(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(4, 4)

        def forward(self, y, t):
            for _, dt in rampde_fx.steps(t):
                y = y + dt * mean(torch.zeros_like(y), torch.tanh(self.layer(y))[NEIGHBOURS[0]], NEIGHBOURS[1])
            return y

    torch.manual_seed(0)
    model, y, t = Graph(), torch.randn(12, 4), torch.linspace(0, 1, 4)
    plain = copy.deepcopy(model)
    wanted = gradients(plain, plain, y, t, 1e-9)  # which underflow where they are not scaled
    assert max(relative_errors(gradients(compiled(model, torch.float16), model, y, t, 1e-9), wanted)) < 8 * U16


class Wide(Euler):
    """A velocity whose weight gradient, a sum over the batch, is beyond float16's range."""

    def forward(self, y, t):
        for _, dt in rampde_fx.steps(t):
            y = y + dt * self.velocity.linear[1](100.0 * torch.ones_like(y).repeat(1, 2)[:, :7])
        return y


class Steep(torch.nn.Module):
    """A velocity whose gradient for the state is beyond float16's range unless the target is low."""

    def __init__(self, dim=4):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full((dim, dim), 8e4 / dim))
        self.register_buffer("same", torch.eye(dim))  # by which the gradient is multiplied: a factor is rounded

    def forward(self, y, t):
        for _, dt in rampde_fx.steps(t):
            y = y + dt * ((3 * torch.sin(y @ self.same @ self.same)) @ self.weight)
        return y


def counted():
    """Passes, repetitions and overflows since the last call, over all loops."""
    found = rampde_fx.backward_counts(reset=True).values()
    return tuple(sum(getattr(count, name) for count in found) for name in ("passes", "repeated", "overflowed"))


def test_sums_over_the_batch_do_not_overflow():
    model = Wide(dim=4)
    y, t = torch.randn(4096, 4), torch.linspace(0, 1, 4)
    wanted = gradients(model, model, y, t)
    counted()
    got = gradients(compiled(model, torch.float16), model, y, t)
    assert max(relative_errors(got, wanted)) < 2e-3
    assert counted() == (1, 0, 0)


def test_overflow_is_repeated_at_a_lower_target():
    y, t = 1e-3 * (1 + torch.rand(16, 4)), torch.linspace(0, 1e-6, 4)
    wanted = gradients(Steep(), Steep(), y, t)
    found = {}
    for attempts in (1, 3):
        torch._dynamo.reset()
        counted()
        model, scaling = Steep(), rampde_fx.AdjointScaling(target=1.0, max_attempts=attempts)
        found[attempts] = gradients(compiled(model, torch.float16, scaling=scaling), model, y, t)
        assert counted() == ((1, 0, 1) if attempts == 1 else (1, 1, 0))
    assert not found[1][1].isfinite().all()
    assert max(relative_errors(found[3][:2], wanted[:2])) < 2e-3


def test_systematic_repetition_warns_and_a_lower_target_ends_it():
    y, t = 1e-3 * (1 + torch.rand(4, 4)), torch.linspace(0, 1e-6, 2)
    model = Steep()
    function = compiled(model, torch.float16)
    with pytest.warns(UserWarning, match="computed again; a lower target"):
        for _ in range(20):
            gradients(function, model, y, t)
    counted()
    model = Steep()
    function = compiled(model, torch.float16, scaling=rampde_fx.AdjointScaling(target=2.0**-8))
    for _ in range(20):
        gradients(function, model, y, t)
    assert counted() == (20, 0, 0)


def test_target_of_a_convolution_leaves_room_for_its_weight_gradient():
    class Convolution(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Conv2d(2, 2, 3, padding=1)

        def forward(self, y, t):
            for _, dt in rampde_fx.steps(t):
                y = y + dt * self.layer(y)
            return y

    y, t = 1 + torch.rand(64, 2, 32, 32), torch.linspace(0, 1, 4)
    model = Convolution()
    wanted = gradients(model, model, y, t)
    (loop,) = rampde_fx.explain(rampde_fx.mixed_precision(Convolution(), dtype=torch.float16), y, t).loops
    assert loop.target == 2.0**-2  # 2^14 / (64 * 32 * 32)
    counted()
    got = gradients(compiled(model, torch.float16), model, y, t)
    assert max(relative_errors(got, wanted)[:2]) < 2e-3
    assert counted() == (1, 0, 0)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_incoming_gradients_that_are_not_finite_pass_through(value):
    model = RK4()
    y, t = torch.randn(8, 5, requires_grad=True), torch.linspace(0, 1, 4)
    function = compiled(model, torch.float16)
    counted()
    (function(y, t) * torch.tensor(value)).sum().backward()
    assert counted() == (1, 0, 0)
    assert not y.grad.isfinite().any()
    assert not any(p.grad.isfinite().all() for p in model.parameters())


def test_adjoint_scaling_problem():
    """y' = -(a t^2 + b t + c) y: a solution near fp16's largest number, gradients against the closed form.

    Source: arXiv 2510.23498; a = 8, b = -10, c = 2^-16, T = 2.65, 400 points, y0 = 65504 / 180, loss y(T)^2 / 2, RK4.
    """
    theta = [torch.tensor(v, requires_grad=True) for v in (8.0, -10.0, 2.0**-16)]

    def velocity(t, y):
        a, b, c = theta
        return -(a * t**2 + b * t + c) * y

    @rampde_fx.mixed_precision(dtype=torch.float16)
    def solve(y, t):
        for t_i, h in rampde_fx.steps(t):
            k1 = velocity(t_i, y)
            k2 = velocity(t_i + h / 2, y + h / 2 * k1)
            k3 = velocity(t_i + h / 2, y + h / 2 * k2)
            k4 = velocity(t_i + h, y + h * k3)
            y = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        return y

    T, y0 = 2.65, torch.full((1,), 65504 / 180, requires_grad=True)
    a, b, c = (p.item() for p in theta)
    y = (65504 / 180) * math.exp(-(a * T**3 / 3 + b * T**2 / 2 + c * T))
    function = torch.compile(solve, backend="rampde_fx", options={"compiler": "aot_eager"})
    result = function(y0, torch.linspace(0, T, 400))
    (result.square() / 2).sum().backward()
    wanted = [y**2 / (65504 / 180), -(y**2) * T**3 / 3, -(y**2) * T**2 / 2, -(y**2) * T]
    errors = [abs(p.grad.item() / w - 1) for p, w in zip((y0, *theta), wanted, strict=True)]
    assert abs(result.item() / y - 1) < 5e-4
    assert max(errors) < 1e-3, errors


def heads(y, first, second, trunk, a, b, t):
    """Three states on one trunk: a trajectory, and two that it feeds."""
    for _, dt in rampde_fx.steps(t):
        h = torch.tanh(y @ trunk)
        y, first, second = y + dt * (h @ a), first + dt * (h @ b), second + dt * torch.sin(h @ b)
    return y, first, second


def gradients_of_heads(function, weights, dtype):
    generator = torch.Generator().manual_seed(0)
    sizes = ((8, 4), (4, 16), (16, 4), (16, 1))
    y, *leaves = (torch.randn(n, m, generator=generator).div(2).to(dtype).requires_grad_() for n, m in sizes)
    zeros = torch.zeros(8, 1, dtype=dtype)
    outputs = function(y, zeros, zeros.clone(), *leaves, torch.linspace(0, 1, 9, dtype=dtype))
    loss = sum(w * out.sum() for w, out in zip(weights, outputs, strict=True))
    return torch.autograd.grad(loss, [y, *leaves])


@pytest.mark.parametrize("policy", [{}, {"checkpoint": "none"}, {"checkpoint": 3}, {"loop": "unroll"}], ids=str)
def test_outputs_of_any_weight_have_gradients_of_their_own_scale(policy):
    function = compiled(heads, torch.float16, **policy)
    for weights in ((1, 1e-8, 1e-8), (1e-8, 1, 1), (1, 1e-6, 1e-12), (1e-20, 1e-25, 1e-30), (1, 0, 1e-10)):
        got = gradients_of_heads(function, weights, torch.float32)
        wanted = gradients_of_heads(heads, weights, torch.float64)
        assert max(relative_errors(list(got), [w.float() for w in wanted])) <= 5e-3, weights


@pytest.mark.parametrize("join", [lambda a, b: torch.cat([a, b], 1), lambda a, b: torch.stack([a, b], 1)[..., 0]])
def test_heads_that_are_joined_to_one_state_have_scales_of_their_own(join):
    """A density beside a state, and two costs: columns of one tensor, as much of the field's code has them."""

    def flow(y, a, b, t):
        for _, dt in rampde_fx.steps(t):
            y = y + dt * join(torch.sin(y[:, :1] @ a), torch.sin(y[:, 1:] @ b))
        return y

    for weight in (1e-9, 1e-4, 1.0, 1e6):

        def run(function, dtype, weight=weight):
            generator = torch.Generator().manual_seed(0)
            y, a, b = (torch.randn(n, m, generator=generator).to(dtype) for n, m in ((4, 2), (1, 1), (1, 1)))
            leaves = [x.requires_grad_() for x in (y, a, b)]
            final = function(*leaves, torch.linspace(0, 1, 5, dtype=dtype))
            return torch.autograd.grad((final * torch.tensor([1.0, weight], dtype=dtype)).sum(), leaves)

        got, wanted = run(compiled(flow, torch.float16), torch.float32), run(flow, torch.float64)
        parts = zip([*got[0].unbind(1), *got[1:]], [*wanted[0].unbind(1), *wanted[1:]], strict=True)
        assert max((x - w).norm() / w.norm() for x, w in parts) <= 5e-3


def test_a_gradient_that_vanishes_within_one_cotangent_is_counted_and_warned_of():
    """One column of a state has a weight of 1e-9 beside the other: its own parameter's gradient becomes zero."""
    first, second = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])

    def flow(y, a, b, t):
        for _, dt in rampde_fx.steps(t):
            y = y + dt * (torch.sin(y[:, :1] @ a) * first + torch.sin(y[:, 1:] @ b) * second)
        return y

    y, a, b, t = torch.ones(4, 2), torch.ones(1, 1), torch.ones(1, 1), torch.linspace(0, 1, 5)
    rampde_fx.backward_counts(reset=True)
    leaves = [a.requires_grad_(), b.requires_grad_()]
    out = compiled(flow, torch.float16)(y, *leaves, t)
    with pytest.warns(UserWarning, match="1 gradients are zero as a whole"):
        torch.autograd.grad((out * torch.tensor([1.0, 1e-9])).sum(), leaves)
    (count,) = rampde_fx.backward_counts(reset=True).values()
    assert count.passes == 1 and count.vanished == 4 * 4  # the entries of that column, in four steps


@pytest.mark.parametrize("policy", [{}, {"checkpoint": "none"}, {"checkpoint": 3}, {"loop": "unroll"}], ids=str)
@pytest.mark.parametrize("size", [1e-8, 1e-4, 1.0])
def test_layers_with_learned_gains_of_any_size_have_their_gradients(size, policy):
    """Two layers, each behind a gain, and a number."""

    def flow(y, a, b, gains, t):
        for _, dt in rampde_fx.steps(t):
            h = torch.tanh(y @ a) + gains[0] * torch.tanh(y @ b)
            y = y + dt * (gains[1] * (h @ b) + 1e-5 * size * torch.sin(y @ a))
        return y

    def run(function, dtype):
        generator = torch.Generator().manual_seed(1)
        y, a, b, gains = (torch.randn(n, 6, generator=generator).to(dtype).div(2) for n in (5, 6, 6, 2))
        leaves = [x.requires_grad_() for x in (a, b, gains.mul(size))]
        final = function(y, *leaves, torch.linspace(0, 1, 5, dtype=dtype))
        return torch.autograd.grad((final * torch.linspace(-1, 2, 30, dtype=dtype).view(5, 6)).sum(), leaves)

    got = run(compiled(flow, torch.float16, **policy), torch.float32)
    assert max(relative_errors(list(got), [w.float() for w in run(flow, torch.float64)])) <= 5e-3


def in_other_units(factor):
    """Layers whose results are in other units, and weights behind them that are as much smaller or larger."""

    class InOtherUnits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList(torch.nn.Linear(6, 6) for _ in range(4))
            for layer in self.layers[1:]:
                layer.weight.data.div_(factor)
            self.scale = torch.nn.Parameter(torch.tensor(float(factor)))

        def forward(self, y, t):
            for _, dt in rampde_fx.steps(t):
                x = self.layers[0](y)
                for layer in self.layers[1:]:
                    x = layer(self.scale * torch.tanh(x))
                y = y + dt * x
            return y

    return InOtherUnits()


class Divided(torch.nn.Module):
    """Parts of a velocity that are divided by a large parameter."""

    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(6, 6), torch.nn.Linear(6, 6)
        self.unit = torch.nn.Parameter(torch.full((6,), 1e8))

    def forward(self, y, t):
        for _, dt in rampde_fx.steps(t):
            h = torch.tanh(self.first(y))
            y = y + dt * (h + self.second(h) / self.unit)
        return y


class Normalised(torch.nn.Module):
    """A residual layer whose norm begins with a small weight."""

    def __init__(self, norm):
        super().__init__()
        self.first, self.second, self.norm = torch.nn.Linear(6, 6), torch.nn.Linear(6, 6), norm
        norm.weight.data.mul_(1e-7)

    def forward(self, y, t):
        for _, dt in rampde_fx.steps(t):
            y = y + dt * (torch.sin(y) + self.norm(torch.tanh(self.second(torch.tanh(self.first(y))))))
        return y


class Converted(torch.nn.Module):
    """Layers that compute in other units and convert back."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(6, 6) for _ in range(3))

    def forward(self, y, t):
        for _, dt in rampde_fx.steps(t):
            x = y
            for layer in self.layers:
                x = torch.tanh(layer(x) * 1e-6 / 1e-6)
            y = y + dt * x
        return y


class TwoBlocks(torch.nn.Module):
    """Two residual blocks behind norms, each with a small learned scale."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(6, 6) for _ in range(3))
        self.norms = torch.nn.ModuleList(torch.nn.LayerNorm(6) for _ in range(2))
        self.scales = torch.nn.Parameter(torch.full((2,), 1e-8))

    def forward(self, y, t):
        for _, dt in rampde_fx.steps(t):
            x = y
            for layer, norm, scale in zip(self.layers, self.norms, self.scales, strict=False):
                x = x + scale * torch.tanh(layer(norm(x)))
            y = y + dt * self.layers[2](x)
        return y


class Deep(torch.nn.Module):
    """Residual blocks behind norms, each with small learned scales, and a norm at the end."""

    def __init__(self, blocks, scale):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(6, 6) for _ in range(blocks))
        self.norms = torch.nn.ModuleList(torch.nn.LayerNorm(6) for _ in range(blocks + 1))
        self.scales = torch.nn.Parameter(torch.full((blocks, 6), scale))

    def forward(self, y, t):
        for _, dt in rampde_fx.steps(t):
            x = y
            for layer, norm, scale in zip(self.layers, self.norms, self.scales, strict=False):
                x = x + scale * torch.tanh(layer(norm(x)))
            y = y + dt * torch.tanh(self.norms[-1](x))
        return y


class Behind(torch.nn.Module):
    """Residual layers, each with a small result."""

    def __init__(self, between, layers=2, **parameters):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(6, 6) for _ in range(layers))
        self.last = torch.nn.Linear(6, 6)
        self.parameters_between = torch.nn.ParameterDict({k: torch.as_tensor(v) for k, v in parameters.items()})
        self.between, self.names = between, tuple(parameters)

    def forward(self, y, t):
        given = {name: self.parameters_between[name] for name in self.names}
        for _, dt in rampde_fx.steps(t):
            x = y
            for layer in self.layers:
                x = x + self.between(torch.tanh(layer(x)), **given)
            y = y + dt * (torch.sin(y) + self.between(torch.tanh(self.last(x)), **given))
        return y


def normed_by(variance):
    def between(x):
        return torch.nn.functional.batch_norm(x, torch.zeros_like(x[0]), torch.full_like(x[0], variance))

    return between


ONE_LARGE = torch.tensor([1e6, 1, 1, 1, 1, 1])
FACTORS = {
    "deep, scales of 1e-8": lambda: Deep(3, 1e-8),
    "deep, scales of 1e-3": lambda: Deep(8, 1e-3),
    "0.02 six times": lambda: Behind(lambda x: x * 0.02, 6),
    "0.9 nine times": lambda: Behind(lambda x, a: a * x, 9, a=torch.full((6,), 0.9)),
    "two small and a large one": lambda: Behind(lambda x, a, b: a * b * x * 1e5, a=1e-6, b=1e-6),
    "per cent": lambda: Behind(lambda x: x * 100 / 256 * 0.02),
    "small, then large in one entry": lambda: Behind(lambda x, a, b: a * x * b, a=torch.full((6,), 1e-6), b=ONE_LARGE),
    "large in one entry, then small": lambda: Behind(lambda x, a, b: a * x * b, a=ONE_LARGE, b=1e-6),
    "small, then divided": lambda: Behind(lambda x, a: 1e-9 * x / a, a=torch.tensor([1e-9, 1, 1, 1, 1, 1])),
    "large, then small": lambda: Behind(lambda x, a, b: a * x * b, a=1e3, b=1e-9),
    "softplus": lambda: Behind(lambda x, a: torch.nn.functional.softplus(a) * x, a=-18.0),
    "lerp": lambda: Behind(lambda x, a: torch.lerp(torch.zeros_like(x), x, a), a=torch.full((6,), 1e-8)),
    "ldexp": lambda: Behind(lambda x: torch.ldexp(x, torch.tensor(-27.0))),
    "running variance": lambda: Behind(normed_by(1e14)),
    "converted": Converted,
    "two blocks": TwoBlocks,
    "units of 100": lambda: in_other_units(100),
    "units of 1000": lambda: in_other_units(1000),
    "units of 1/1000": lambda: in_other_units(1e-3),
    "divided": Divided,
    "layer norm": lambda: Normalised(torch.nn.LayerNorm(6)),
    "group norm": lambda: Normalised(torch.nn.GroupNorm(1, 6)),
    "batch norm": lambda: Normalised(torch.nn.BatchNorm1d(6).eval()),
}


@pytest.mark.parametrize("model", FACTORS)
def test_gradients_of_float16_behind_factors_of_any_size(model):
    torch.manual_seed(0)
    model = FACTORS[model]()
    exact, y, t = copy.deepcopy(model).double(), torch.randn(8, 6), torch.linspace(0, 1, 4)
    compiled(model, torch.float16)(y, t).square().sum().backward()
    assert next(iter(rampde_fx.backward_counts().values())).repeated == 0
    exact(y.double(), t.double()).square().sum().backward()
    wanted = [p.grad.float() for p in exact.parameters()]
    errors = relative_errors([p.grad for p in model.parameters()], wanted)
    assert max(errors) < 5 * U16, errors


@pytest.mark.parametrize("loss", [1e-25, 1e-12, 1.0, 1e12, 1e20])
def test_a_loss_of_any_size_behind_a_learned_factor(loss):
    """Within float32's range: its squares would be beyond."""
    torch.manual_seed(0)
    model = Behind(lambda x, a: a * x, a=torch.full((6,), 0.9))
    exact, y, t = copy.deepcopy(model).double(), torch.randn(8, 6), torch.linspace(0, 1, 4)
    (compiled(model, torch.float16)(y, t).square().sum() * loss).backward()
    exact(y.double(), t.double()).square().sum().backward()
    errors = relative_errors([p.grad.double() / loss for p in model.parameters()], [p.grad for p in exact.parameters()])
    assert max(errors) < 5 * U16, errors


@pytest.mark.parametrize(
    "factor, takes", [(2.0**-5.9, False), (0.9, False), (60.0, False), (2.0**-6.1, True), (1e-8, True)]
)
def test_a_known_factor_near_one_takes_no_multiplication(factor, takes):
    def products(number):
        def flow(y, a, b, t):
            for _, dt in rampde_fx.steps(t):
                y = y + dt * torch.sin(number * torch.tanh(y @ a) @ b)
            return y

        leaves = [torch.randn(n, 6, requires_grad=True) for n in (8, 6, 6)]
        marked = rampde_fx.mixed_precision(flow, dtype=torch.float16)
        (loop,) = rampde_fx.explain(marked, *leaves, torch.linspace(0, 1, 4)).loops
        inner = [module for module in loop.adjoint.modules() if isinstance(module, torch.fx.GraphModule)]
        return sum(node.target is torch.ops.aten.mul.Tensor for module in inner for node in module.graph.nodes)

    assert products(factor) - products(1.0) == takes


def test_scales_of_random_factors_are_powers_of_two_within_their_bounds():
    """And what they make of a value is, but for the bounds, between 1/2 and 2 of the product of all factors."""
    generator = random.Random(0)
    for _ in range(300):
        scales, numbers = Scales(), [10 ** generator.uniform(-4, 4) for _ in range(generator.randint(1, 6))]
        scale = scales.own(0)
        for number in numbers:
            scale = scales.behind(scale, Factor(number=number))
        own = torch.tensor(2.0 ** generator.randint(-100, 100))
        value = scales.values([scale], {0: own}, {}, torch.tensor(1.0))[scale].item()
        assert math.frexp(value)[0] == 0.5
        wanted = own.item() * min(max(1 / math.prod(numbers), 1.0), 2.0**64)
        assert min(wanted, 2.0**120) / 2.01 < value < min(wanted, 2.0**120) * 1.01


@pytest.mark.parametrize("policy", [{}, {"loop": "unroll"}, {"checkpoint": 2}, {"scaling": "none"}], ids=str)
@pytest.mark.parametrize("joined", [lambda q, p: torch.cat([q, p], 1), lambda q, p: q + p], ids=["cat", "sum"])
def test_states_that_are_views_of_one_tensor_and_leave_as_one(joined, policy):
    """A Hamiltonian: the cotangents of q and p are slices of one, or are one."""

    class Leapfrog(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.h = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Softplus(), torch.nn.Linear(8, 1))

        def forward(self, y, t):
            q, p = y[:, :3], y[:, 3:]
            for _, dt in rampde_fx.steps(t):
                p = p - dt / 2 * torch.func.grad(lambda q: self.h(q).sum())(q)
                q = q + dt * p
                p = p - dt / 2 * torch.func.grad(lambda q: self.h(q).sum())(q)
            return joined(q, p)

    torch.manual_seed(0)
    model, found = Leapfrog(), []
    y, t = torch.randn(8, 6, requires_grad=True), torch.linspace(0, 1, 5, requires_grad=True)
    for run in (compiled(model, torch.float16, "aot_eager", **policy), model):
        found.append(torch.autograd.grad(run(y, t).sum(), [y, t, *model.h[0].parameters()]))
    assert max(relative_errors(*found)) < 10 * U16


@pytest.mark.parametrize("policy", [{}, {"checkpoint": 3}], ids=str)
def test_states_that_overflow_where_they_are_stored_give_gradients_of_nan(policy):
    def flow(y, t):
        for _, dt in rampde_fx.steps(t):
            y = y + dt * torch.tanh(y * 1e-5)
        return y

    y = torch.full((4,), 1e5, requires_grad=True)
    out = compiled(flow, torch.float16, **policy)(y, torch.linspace(0, 1, 9))
    assert torch.autograd.grad(out.sum(), y)[0].isnan().all()


def test_a_loss_of_zero_is_not_warned_of(recwarn):
    out = gradients_of_heads(compiled(heads, torch.float16), (1, 0, 0), torch.float32)
    assert out[-1].abs().max() == 0 and not recwarn.list


def test_states_that_lose_their_digits_where_they_enter_are_counted_and_warned_of():
    def flow(y, t):
        for _, dt in rampde_fx.steps(t):
            y = y + dt * torch.sin(3 * y)
        return y

    t = torch.linspace(0, 1, 5)
    rampde_fx.state_counts(reset=True)
    function = compiled(flow, torch.float16)
    with pytest.warns(UserWarning, match="lie below 2\\^-17") as warned:
        function(1e-7 * torch.linspace(-2, 1, 12), t)
    assert warned[0].filename == __file__
    (count,) = rampde_fx.state_counts(reset=True).values()
    assert count == rampde_fx.StateCount(entries=48, underflowed=48, subnormal=4)
    function(torch.linspace(-2, 1, 12), t)
    (count,) = rampde_fx.state_counts(reset=True).values()
    assert count == rampde_fx.StateCount(entries=48, underflowed=0)


@pytest.mark.parametrize("is_read", [False, True])
@pytest.mark.parametrize("split", [False, True])
def test_a_part_of_a_state_that_no_velocity_reads_is_not_counted(is_read, split):
    """The log-density of a flow, behind the position in one tensor: it begins at zero."""

    def flow(y, t):
        for _, dt in rampde_fx.steps(t):
            z, change = y.split([2, 1], dim=1) if split else (y[:, :-1], y[:, -1:])
            middle = z + dt / 2 * torch.sin(3 * z)
            rate = 1e-6 * torch.cos(middle)[:, :1]
            y = y + dt * torch.cat([torch.sin(3 * middle), rate * torch.exp(change) if is_read else rate], dim=1)
        return y

    y = torch.cat([torch.linspace(1, 2, 16).reshape(8, 2), torch.full((8, 1), 1e-6)], dim=1).requires_grad_()
    rampde_fx.state_counts(reset=True)
    compiled(flow, torch.float16)(y, torch.linspace(0, 1, 5))
    (count,) = rampde_fx.state_counts(reset=True).values()
    assert (count.underflowed > 0) == is_read and count.entries >= 4 * 2 * 16


def of_two_states(x, v, a, t):
    for _, dt in rampde_fx.steps(t):
        k = torch.tanh(x[:, :2] @ a)
        r = (v[:, :2] / 1e-8) ** 2 * 1e-8
        x, v = x + dt * torch.cat([k, k[:, :1]], 1), v + dt * torch.cat([r, r[:, :1]], 1)
    return x, v


def of_a_sum(x, v, a, t):
    for _, dt in rampde_fx.steps(t):
        k = torch.tanh((v + 1)[:, :2] @ a)
        r = (v[:, :2] / 1e-8) ** 2 * 1e-8
        v = v + dt * torch.cat([k * 1e-8, r[:, :1]], 1)
    return v


def of_complex_numbers(x, v, a, t):
    z = torch.view_as_complex(v[:, :2].contiguous())
    for _, dt in rampde_fx.steps(t):
        k = torch.tanh(torch.view_as_real(z) @ a * 1e4) * 1e-8
        z = z + dt * torch.view_as_complex(k)
    return torch.view_as_real(z)


@pytest.mark.parametrize("flow", [of_two_states, of_a_sum, of_complex_numbers])
def test_a_part_is_counted_whatever_else_is_cut_like_it(flow):
    x, a, t = torch.ones(8, 3), torch.eye(2).requires_grad_(), torch.linspace(0, 1, 5)
    v = (3e-9 * torch.rand(8, 3) + 1e-9).requires_grad_()
    rampde_fx.state_counts(reset=True)
    compiled(flow, torch.float16)(x, v, a, t)
    (count,) = rampde_fx.state_counts(reset=True).values()
    assert count.underflowed >= 4 * 16


@pytest.mark.parametrize("velocity", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_states_that_lose_their_digits_where_they_are_stored_alone_are_counted(velocity, monkeypatch):
    """A state in units of 1e-7, which the velocity reads in a wider range: the backward would read it from float16."""

    def flow(y, a, t):
        for _, dt in rampde_fx.steps(t):
            y = y + dt * 1e-7 * torch.tanh((y / 1e-7) @ a)
        return y

    monkeypatch.setattr(counts, "_warned", set())
    rampde_fx.state_counts(reset=True)
    y, a = 1e-7 * torch.linspace(-2, 1, 12).view(4, 3), torch.eye(3, requires_grad=True)
    with pytest.warns(UserWarning, match="stored for its backward"):
        compiled(flow, velocity, storage=torch.float16)(y, a, torch.linspace(0, 1, 5))
    (count,) = rampde_fx.state_counts(reset=True).values()
    assert count.underflowed == 4 * 12 and count.subnormal == 4
    scaled = compiled(flow, velocity, storage=torch.float16, storage_scaling="dynamic")  # near miss
    scaled(y, a, torch.linspace(0, 1, 5))
    assert sum(count.underflowed for count in rampde_fx.state_counts(reset=True).values()) == 0


def test_states_are_not_counted_in_other_dtypes():
    def flow(y, t):
        for _, dt in rampde_fx.steps(t):
            y = y + dt * torch.sin(3 * y)
        return y

    rampde_fx.state_counts(reset=True)
    compiled(flow, torch.bfloat16)(1e-7 * torch.linspace(-2, 1, 12), torch.linspace(0, 1, 5))
    assert rampde_fx.state_counts() == {}


@pytest.mark.parametrize("policy", [{}, {"checkpoint": 2}, {"loop": "unroll"}], ids=str)
def test_a_state_that_begins_at_infinity_has_gradients(policy):
    """A running minimum: the infinity is the user's, in the stored state, too."""

    def flow(y, a, t):
        least = torch.full((5,), torch.inf, dtype=y.dtype)
        for _, dt in rampde_fx.steps(t):
            least = torch.minimum(least, y.norm(dim=1))
            y = y + dt * torch.tanh(y @ a)
        return y, least

    def run(function, dtype):
        y, a = (torch.linspace(-1, 2, n * 3, dtype=dtype).sin().view(n, 3).requires_grad_() for n in (5, 3))
        final, least = function(y, a, torch.linspace(0, 1, 5, dtype=dtype))
        return torch.autograd.grad(final.sum() + least.square().sum(), (y, a))

    got = run(compiled(flow, torch.float16, **policy), torch.float32)
    assert max(relative_errors(list(got), [w.float() for w in run(flow, torch.float64)])) <= 5e-3
