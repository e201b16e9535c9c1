"""Python numbers that the compiler takes for inputs: under dynamic=True all, otherwise those that change."""

import pytest
import torch
from torch import nn

import rampde_fx
from tests.comparison import relative_errors

FP16 = 2.5e-3
OWN = rampde_fx.ButcherTableau(a=((), (0.5,)), b=(0.0, 1.0), c=(0.0, 0.5), order=2, source="the midpoint rule, as ours")


def data(dtype=torch.float32):
    y, w = torch.linspace(-2, 2, 12).view(4, 3), torch.eye(3) - 0.4
    return y.to(dtype), w.to(dtype).requires_grad_(), torch.linspace(0, 1, 5, dtype=dtype)


def outcome(function, dtype=torch.float32, **given):
    y, w, t = data(dtype)
    result = function(y, w, t, **given)
    return [result.detach(), *torch.autograd.grad(result.square().sum(), w)]


def compiled(function, **settings):
    marked = rampde_fx.mixed_precision(function, dtype=torch.float16)
    return torch.compile(marked, backend="rampde_fx", options={"compiler": "aot_eager"}, **settings)


def close(function, plain, **given):
    """Whether values and gradients are those of float64, in mixed precision."""
    wanted = [value.float() for value in outcome(plain, torch.float64, **given)]
    errors = relative_errors(outcome(function, **given), wanted)
    return max(errors) < FP16 and min(errors) > 1e-7


@pytest.mark.parametrize("method", ["rk4", "ssprk33", "bosh3", "dopri5", "own"])
def test_odeint(method):
    tolerances = {"rtol": 2e-3, "atol": 1e-3} if method in ("bosh3", "dopri5") else {}

    def flow(y, w, t):
        tableau = OWN if method == "own" else method
        return rampde_fx.odeint(lambda t, y: torch.tanh(y @ w), y, t, method=tableau, **tolerances)[-1]

    assert close(compiled(flow, dynamic=True), flow)


@pytest.mark.parametrize("options", [{"step_size": 0.15}, {"num_steps": 3}])
def test_options_of_odeint(options):
    def flow(y, w, t):
        return rampde_fx.odeint(lambda t, y: torch.tanh(y @ w), y, t, method="midpoint", options=options)[-1]

    assert close(compiled(flow, dynamic=True), flow)


class Numbers(nn.Module):
    """Floats and an int of a module, where a tensor may take their place and where not."""

    def __init__(self):
        super().__init__()
        self.gain, self.slope, self.order, self.shift = 0.3, 0.1, 3, 1.5

    def forward(self, y, w, t):
        half = self.gain / 2
        for _, dt in rampde_fx.steps(t):
            k = torch.tanh(y @ w) * self.gain + (y * self.shift).sin().mul(half)
            k = k - half / (2.5 + y.square()) + self.order * torch.nn.functional.leaky_relu(k, 2 * self.slope)
            y = y + dt * half * k
            y += 1e-3 * self.gain * dt
        return y


@pytest.mark.parametrize("fullgraph", [False, True])
def test_numbers_of_a_module(fullgraph):
    model = Numbers()
    assert close(compiled(Numbers(), dynamic=True, fullgraph=fullgraph), model)


def test_a_float_that_changes_is_right_every_time():
    def flow(y, w, t, gain):
        for _, dt in rampde_fx.steps(t):
            y = y + dt * torch.tanh(y @ w) * gain
        return y

    function = compiled(flow)
    assert all(close(function, flow, gain=gain) for gain in (0.3, 0.7, -1.1))


def test_a_number_that_is_an_argument_of_an_operator():
    def flow(y, w, t, slope):
        for _, dt in rampde_fx.steps(t):
            y = y + dt * torch.nn.functional.leaky_relu(y @ w, slope)
        return y

    function = compiled(flow, dynamic=True)
    for slope in (0.3, 0.7, 0.01):
        assert close(function, flow, slope=slope)
