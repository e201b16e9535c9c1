"""Dynamic adjoint scaling: the scale, overflow and its bounded repetition, gradients that are not finite."""

import math

import pytest
import torch

import rampde_fx
from rampde_fx.passes.scale_adjoint import adjoint_scale
from tests.comparison import compiled, gradients, relative_errors
from tests.models import RK4, Euler


@pytest.mark.parametrize("target", [1.0, 2.0**-7, 2.0**9])
@pytest.mark.parametrize("magnitude", [1.0, 1.999, 2.0, 3e-9, 7e30, 1.2e-38, 1e-41])
def test_scale_is_a_power_of_two_that_brings_the_largest_cotangent_to_the_target(magnitude, target):
    cotangent = magnitude * torch.tensor([0.3, -1.0, 0.0])
    scale = adjoint_scale(torch.tensor(target), cotangent).item()
    power = 2.0 ** (math.frexp(torch.tensor(magnitude).item())[1] - 1)
    assert scale == min(target / max(power, 2.0**-126), 2.0**120)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_cotangents_that_are_not_finite_are_not_scaled(value):
    assert adjoint_scale(torch.tensor(1.0), torch.tensor([1.0, value])).item() == 1.0


def test_one_scale_serves_all_cotangents_of_an_evaluation():
    assert adjoint_scale(torch.tensor(1.0), torch.tensor([0.25]), torch.full((2, 2), -4.0)).item() == 0.25


class Wide(Euler):
    """An evaluation whose weight gradient, a sum over the batch, overflows fp16 unless the target is low."""

    def __init__(self):
        super().__init__(dim=4)

    def forward(self, y, t):
        for _, dt in rampde_fx.steps(t):
            y = y + dt * self.velocity.linear[1](100.0 * torch.ones_like(y).repeat(1, 2)[:, :7])
        return y


def test_overflow_is_repeated_at_a_lower_target():
    model = Wide()
    y, t = torch.randn(4096, 4), torch.linspace(0, 1, 4)
    wanted = gradients(model, model, y, t)
    once = rampde_fx.AdjointScaling(target=1.0, max_attempts=1)
    overflowed = gradients(compiled(model, torch.float16, scaling=once), model, y, t)
    assert not all(g.isfinite().all() for g in overflowed)
    torch._dynamo.reset()
    again = rampde_fx.AdjointScaling(target=1.0, max_attempts=3)
    assert (
        max(relative_errors(gradients(compiled(model, torch.float16, scaling=again), model, y, t)[:4], wanted[:4]))
        < 2e-3
    )


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_incoming_gradients_that_are_not_finite_pass_through(value):
    model = RK4()
    y, t = torch.randn(8, 5, requires_grad=True), torch.linspace(0, 1, 4)
    function = compiled(model, torch.float16)
    (function(y, t) * torch.tensor(value)).sum().backward()
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
