"""Compensated accumulation: the roundoff of the sums over the steps does not pile up."""

import copy

import pytest
import torch
from expecttest import TestCase
from torch import nn

import rampde_fx
from rampde_fx import errors
from tests.comparison import compiled, gradients, relative_errors
from tests.golden import printed
from tests.models import AdamsBashforth, Decay, Euler, Trajectory


def reference_of(model, y, t):
    wide = copy.deepcopy(model).double()
    return gradients(wide, wide, y.double(), t.double())


def errors_of(model, y, t, reference, **policy):
    torch._dynamo.reset()
    mine = copy.deepcopy(model)
    got = gradients(compiled(mine, torch.float32, compiler="eager", **policy), mine, y, t)
    return relative_errors([g.double() for g in got], reference)


def test_roundoff_of_states_and_gradients_does_not_grow_with_the_steps():
    model = Euler()
    y, t = torch.randn(3, 5), torch.linspace(0, 1, 257)
    reference = reference_of(model, y, t)
    plain = errors_of(model, y, t, reference)
    better = errors_of(model, y, t, reference, accumulation="compensated")
    u = torch.finfo(torch.float32).eps / 2
    for before, after in zip(plain[:2] + plain[3:], better[:2] + better[3:], strict=True):  # t: no sum over steps
        assert after < 3 * u and after < before / 2, (plain, better)


@rampde_fx.mixed_precision(policy=rampde_fx.PrecisionPolicy(torch.float16, accumulation="compensated", loop="scan"))
def drift(y, t):
    for _, dt in rampde_fx.steps(t):
        y = y + dt * torch.cos(0.0 * y)
    return y


# Increments of 2^-12 to states whose last digit is 2^-11.
DRIFT = (torch.full((2, 3), 4096.0), torch.linspace(0, 2.0**-6, 65))


def test_increments_below_the_last_digit_are_not_lost():
    y, t = DRIFT
    function = torch.compile(drift, backend="rampde_fx", options={"compiler": "eager"})
    assert torch.equal(function(y, t), y + 2.0**-6)
    assert torch.equal(drift(y, t), y)  # eager stands still


@pytest.mark.parametrize("form", [AdamsBashforth, Trajectory])
def test_other_forms_of_a_sum(form):
    model = form()
    y, t = torch.randn(3, 5), torch.linspace(0, 1, 6)
    reference = reference_of(model, y, t)
    assert max(errors_of(model, y, t, reference, accumulation="compensated")) < 2e-6


def test_a_state_that_is_more_than_a_sum_is_refused():
    with pytest.raises(errors.UnsupportedLoopError, match="cannot be accumulated with compensation") as raised:
        compiled(Decay(), torch.float16, accumulation="compensated")(torch.randn(3, 5), torch.linspace(0, 1, 4))
    assert "torch.exp(-self.rate * dt) * y" in str(raised.value) and "fix:" in str(raised.value)


class Decayless(nn.Module):
    """The smallest step with a weight."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(5))

    def forward(self, y, t):
        for _, dt in rampde_fx.steps(t):
            y = y + dt * (self.weight * y)
        return y


class TestCompensateSums(TestCase):
    maxDiff = None

    def test_step_and_adjoint(self):
        policy = rampde_fx.PrecisionPolicy(torch.float32, accumulation="compensated")
        model = rampde_fx.mixed_precision(Decayless(), policy=policy)
        (loop,) = rampde_fx.explain(model, torch.zeros(3, 5, requires_grad=True), torch.linspace(0, 1, 5)).loops
        self.assertExpectedInline(
            printed(loop.step),
            """\
class GraphModule(torch.nn.Module):
    def forward(self, y: "f32[3, 5]", dt: "f32[]", weight: "f32[5]", correction_y: "f32[3, 5]"):
        velocity_0 = self.velocity_0(weight, y)
        k_1: "f32[3, 5]" = velocity_0[0]
        mul_1: "f32[3, 5]" = aten.mul.Tensor(dt, k_1)
        add_tensor: "f32[3, 5]" = aten.add.Tensor(correction_y, mul_1)
        add_tensor_1: "f32[3, 5]" = aten.add.Tensor(y, add_tensor)
        sub_tensor: "f32[3, 5]" = aten.sub.Tensor(add_tensor_1, y)
        sub_tensor_1: "f32[3, 5]" = aten.sub.Tensor(add_tensor_1, sub_tensor)
        sub_tensor_2: "f32[3, 5]" = aten.sub.Tensor(y, sub_tensor_1)
        sub_tensor_3: "f32[3, 5]" = aten.sub.Tensor(add_tensor, sub_tensor)
        add_tensor_2: "f32[3, 5]" = aten.add.Tensor(sub_tensor_2, sub_tensor_3)
        return (add_tensor_1, y, add_tensor_2)
    class velocity_0(torch.nn.Module):
        def forward(self, weight: "f32[5]", y: "f32[3, 5]"):
            mul: "f32[3, 5]" = aten.mul.Tensor(weight, y)
            return (mul,)
""",
        )
        self.assertExpectedInline(
            printed(loop.adjoint),
            """\
class GraphModule(torch.nn.Module):
    def forward(self, adjoint_y: "f32[3, 5]", total_weight: "f32[5]", y: "f32[3, 5]", dt: "f32[]", weight: "f32[5]", correction_adjoint_y: "f32[3, 5]", correction_total_weight: "f32[5]"):
        mul_2: "f32[3, 5]" = aten.mul.Tensor(adjoint_y, dt)
        velocity_0_pullback = self.velocity_0_pullback(weight, y, mul_2)
        grad_weight: "f32[5]" = velocity_0_pullback[0]
        grad_y: "f32[3, 5]" = velocity_0_pullback[1]
        add_tensor: "f32[3, 5]" = aten.add.Tensor(correction_adjoint_y, grad_y)
        add_tensor_1: "f32[3, 5]" = aten.add.Tensor(adjoint_y, add_tensor)
        sub_tensor: "f32[3, 5]" = aten.sub.Tensor(add_tensor_1, adjoint_y)
        sub_tensor_1: "f32[3, 5]" = aten.sub.Tensor(add_tensor_1, sub_tensor)
        sub_tensor_2: "f32[3, 5]" = aten.sub.Tensor(adjoint_y, sub_tensor_1)
        sub_tensor_3: "f32[3, 5]" = aten.sub.Tensor(add_tensor, sub_tensor)
        add_tensor_2: "f32[3, 5]" = aten.add.Tensor(sub_tensor_2, sub_tensor_3)
        add_tensor_3: "f32[5]" = aten.add.Tensor(correction_total_weight, grad_weight)
        add_tensor_4: "f32[5]" = aten.add.Tensor(total_weight, add_tensor_3)
        sub_tensor_4: "f32[5]" = aten.sub.Tensor(add_tensor_4, total_weight)
        sub_tensor_5: "f32[5]" = aten.sub.Tensor(add_tensor_4, sub_tensor_4)
        sub_tensor_6: "f32[5]" = aten.sub.Tensor(total_weight, sub_tensor_5)
        sub_tensor_7: "f32[5]" = aten.sub.Tensor(add_tensor_3, sub_tensor_4)
        add_tensor_5: "f32[5]" = aten.add.Tensor(sub_tensor_6, sub_tensor_7)
        return (add_tensor_1, add_tensor_4, add_tensor_2, add_tensor_5)
    class velocity_0_pullback(torch.nn.Module):
        def forward(self, weight: "f32[5]", y: "f32[3, 5]", cotangent_0: "f32[3, 5]"):
            mul_1: "f32[3, 5]" = aten.mul.Tensor(cotangent_0, weight)
            mul_2: "f32[3, 5]" = aten.mul.Tensor(cotangent_0, y)
            sum_1: "f32[1, 5]" = aten.sum.dim_IntList(mul_2, [0], True)
            view: "f32[5]" = aten.reshape.default(sum_1, [5])
            return (view, mul_1)
""",
        )
