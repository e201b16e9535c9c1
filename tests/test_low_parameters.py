"""Parameters in float16 or bfloat16 beside a float32 state: their gradients are summed up wide, and cast down once."""

import pytest
import torch

import rampde_fx
from rampde_fx.passes.widen_parameters import find_narrow
from tests.comparison import compiled, relative_errors


def layers(y, a, b, c, t):
    """Low weights, one that is normalised before the loop, and one that differs from step to step."""
    normal = b / b.float().norm().to(b.dtype) * 3
    for i, (_, dt) in enumerate(rampde_fx.steps(t)):
        y = y + dt * ((torch.tanh(y.to(a.dtype) @ a) @ normal).to(y.dtype) + c[i % 4].to(y.dtype))
    return y


def gradients(function, state, parameters, steps=64):
    generator = torch.Generator().manual_seed(0)
    sizes = ((64, 8), (8, 32), (32, 8), (4, 8))
    y, *weights = (torch.randn(n, m, generator=generator) / 4 for n, m in sizes)
    own = parameters if parameters.itemsize == 2 else torch.bfloat16
    leaves = [w.to(own).to(parameters).requires_grad_() for w in weights]
    final = function(y.to(state), *leaves, torch.linspace(0, 1, steps + 1, dtype=state))
    return torch.autograd.grad(final.square().mean(), leaves)


@pytest.mark.parametrize("policy", [{}, {"checkpoint": "none"}, {"checkpoint": 9}], ids=str)
@pytest.mark.parametrize("velocity", [torch.bfloat16, torch.float16, torch.float32])
def test_gradients_are_rounded_once(velocity, policy):
    """In bfloat16 the sum of 64 roundings would be off by several times the bound."""
    got = gradients(compiled(layers, velocity, **policy), torch.float32, torch.bfloat16)
    wanted = gradients(layers, torch.float64, torch.float64)
    assert all(gradient.dtype is torch.bfloat16 for gradient in got)
    errors = relative_errors([g.double() for g in got], list(wanted))
    assert max(errors) <= torch.finfo(torch.bfloat16).eps, errors


def test_float16_parameters_under_a_float16_policy():
    got = gradients(compiled(layers, torch.float16), torch.float32, torch.float16, steps=16)
    assert all(g.dtype is torch.float16 and g.isfinite().all() for g in got)


def test_wide_parameters_and_those_without_gradients_enter_as_they_are():
    def flow(y, a, b, t):
        for _, dt in rampde_fx.steps(t):
            y = y + dt * torch.tanh(y @ a + b.float())
        return y

    marked = rampde_fx.mixed_precision(flow, dtype=torch.bfloat16)
    y, a, b = torch.ones(3, 4), torch.eye(4, requires_grad=True), torch.ones(4, dtype=torch.bfloat16)
    (loop,) = rampde_fx.explain(marked, y, a, b, torch.linspace(0, 1, 5)).loops
    found = {record.name: record.loop for record in loop.passes}
    assert find_narrow(found["hoist_invariants"]) == []
    assert found["widen_parameters"].step is found["hoist_invariants"].step
    assert found["widen_parameters"].preamble is found["hoist_invariants"].preamble


def test_low_parameters_are_told_of():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.Sequential(*[torch.nn.Linear(2, 2) for _ in range(2)])

        def forward(self, y, t):
            for _, dt in rampde_fx.steps(t):
                y = y + dt * self.layers(y.to(self.layers[0].weight.dtype)).to(y.dtype)
            return y

    rampde_fx.mixed_precision(Model, dtype=torch.float16)
    arguments = torch.ones(3, 2), torch.linspace(0, 1, 5)
    (note,) = rampde_fx.explain(Model().half(), *arguments).loops[0].notes
    assert note == (
        "in float16: layers_0_weight, layers_0_bias, layers_1_weight and 1 more; gradients are summed up in float32 and"
        " rounded to float16 once, at the end; where an optimizer updates these tensors themselves, it loses small"
        " steps"
    )
    assert rampde_fx.explain(Model(), *arguments).loops[0].notes == ()
    with torch.no_grad():
        assert rampde_fx.explain(Model().half(), *arguments).loops[0].notes == ()
