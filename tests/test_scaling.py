"""Dynamic adjoint scaling: the scale, overflow and its bounded repetition, gradients that are not finite."""

import math

import pytest
import torch

import rampde_fx
from rampde_fx.scales import power_of_two_scale
from tests.comparison import compiled, gradients, relative_errors
from tests.models import RK4, Euler


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

    def forward(self, y, t):
        for _, dt in rampde_fx.steps(t):
            y = y + dt * ((3 * torch.sin(y)) @ self.weight)
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
    with pytest.warns(UserWarning, match="computed twice; a lower target"):
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
    (loop,) = rampde_fx.explain(rampde_fx.mixed_precision(Convolution()), y, t).loops
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
