"""Golden graphs: the rewritten step and adjoint, and what each pass does, on a tiny case (B = 3, D = 5, H = 7)."""

import torch
from expecttest import TestCase

import rampde_fx
from tests.golden import printed
from tests.models import RK4, Flow


class Linear(Flow):
    """Euler on the smallest velocity that has everything: tanh(y W + t)."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(5, 5))

    def forward(self, y, t):
        for t_i, dt in rampde_fx.steps(t):
            y = y + dt * torch.tanh(y @ self.weight + t_i)
        return y


def explained(form, dtype=torch.float16, **policy):
    model = rampde_fx.mixed_precision(form(), policy=rampde_fx.PrecisionPolicy(velocity=dtype, **policy))
    return rampde_fx.explain(model, torch.zeros(3, 5, requires_grad=True), torch.linspace(0, 1, 5)).loops[0]


class TestGolden(TestCase):
    maxDiff = None

    def test_euler_step(self):
        self.assertExpectedInline(
            printed(explained(Linear).step),
            """\
class GraphModule(torch.nn.Module):
    def forward(self, y: "f32[3, 5]", t: "f32[]", dt: "f32[]", weight: "f32[5, 5]"):
        velocity_0 = self.velocity_0(y, weight, t)
        k_1: "f32[3, 5]" = velocity_0[0]
        mul: "f32[3, 5]" = aten.mul.Tensor(dt, k_1)
        add_1: "f32[3, 5]" = aten.add.Tensor(y, mul)
        underflow: "i64[3]" = rampde_fx.count_underflow.default([y])
        underflow_1: "i64[3]" = rampde_fx.count_underflow.default([weight])
        underflow_2: "i64[3]" = aten.add.Tensor(underflow, underflow_1)
        y_stored: "f16[3, 5]" = rampde_fx.narrow.default(y, dtype = torch.float16)
        return (add_1, underflow_2, y_stored)
    class velocity_0(torch.nn.Module):
        def forward(self, y: "f32[3, 5]", weight: "f32[5, 5]", t: "f32[]"):
            narrow: "f16[3, 5]" = rampde_fx.narrow.default(y, dtype = torch.float16)
            narrow_1: "f16[5, 5]" = rampde_fx.narrow.default(weight, dtype = torch.float16)
            mm: "f16[3, 5]" = aten.mm.default(narrow, narrow_1)
            mark_overflow: "f16[3, 5]" = rampde_fx.mark_overflow.default(mm, [])
            add: "f16[3, 5]" = aten.add.Tensor(mark_overflow, t)
            mark_overflow_1: "f16[3, 5]" = rampde_fx.mark_overflow.default(add, [t])
            tanh: "f16[3, 5]" = aten.tanh.default(mark_overflow_1)
            _to_copy: "f32[3, 5]" = aten._to_copy.default(tanh, dtype = torch.float32)
            return (_to_copy,)
""",
        )

    def test_euler_adjoint(self):
        self.assertExpectedInline(
            printed(explained(Linear).adjoint),
            """\
class GraphModule(torch.nn.Module):
    def forward(self, adjoint_y: "f32[3, 5]", total_weight: "f32[5, 5]", y: "f16[3, 5]", t: "f32[]", dt: "f32[]", weight: "f32[5, 5]", target: "f32[]"):
        y_wide: "f32[3, 5]" = aten._to_copy.default(y, dtype = torch.float32)
        velocity_0_forward = self.velocity_0_forward(y_wide, weight, t)
        residual_1_tanh: "f16[3, 5]" = velocity_0_forward[1]
        residual_1_t_1: "f16[5, 3]" = velocity_0_forward[2]
        residual_1_t_2: "f16[5, 5]" = velocity_0_forward[3]
        mul_1: "f32[3, 5]" = aten.mul.Tensor(adjoint_y, dt)
        adjoint_scale_0 = self.adjoint_scale_0(target, mul_1)
        scale_0: "f32[]" = adjoint_scale_0[0]
        vanished: "f32[]" = adjoint_scale_0[1]
        mul_1_scaled: "f32[3, 5]" = aten.mul.Tensor(mul_1, scale_0)
        velocity_0_pullback = self.velocity_0_pullback(residual_1_tanh, residual_1_t_1, residual_1_t_2, mul_1_scaled)
        grad_y: "f32[3, 5]" = velocity_0_pullback[0]
        grad_y_unscaled: "f32[3, 5]" = aten.div.Tensor(grad_y, scale_0)
        grad_weight: "f32[5, 5]" = velocity_0_pullback[1]
        grad_weight_unscaled: "f32[5, 5]" = aten.div.Tensor(grad_weight, scale_0)
        adjoint_y_next: "f32[3, 5]" = aten.add.Tensor(adjoint_y, grad_y_unscaled)
        total_weight_next: "f32[5, 5]" = aten.add.Tensor(total_weight, grad_weight_unscaled)
        return (adjoint_y_next, total_weight_next, vanished)
    class velocity_0_forward(torch.nn.Module):
        def forward(self, y: "f32[3, 5]", weight: "f32[5, 5]", t: "f32[]"):
            narrow: "f16[3, 5]" = rampde_fx.narrow.default(y, dtype = torch.float16)
            narrow_1: "f16[5, 5]" = rampde_fx.narrow.default(weight, dtype = torch.float16)
            mm: "f16[3, 5]" = aten.mm.default(narrow, narrow_1)
            mark_overflow: "f16[3, 5]" = rampde_fx.mark_overflow.default(mm, [])
            add: "f16[3, 5]" = aten.add.Tensor(mark_overflow, t)
            mark_overflow_1: "f16[3, 5]" = rampde_fx.mark_overflow.default(add, [t])
            tanh: "f16[3, 5]" = aten.tanh.default(mark_overflow_1)
            _to_copy: "f32[3, 5]" = aten._to_copy.default(tanh, dtype = torch.float32)
            t_1: "f16[5, 3]" = aten.t.default(narrow)
            t_2: "f16[5, 5]" = aten.t.default(narrow_1)
            return (_to_copy, tanh, t_1, t_2)
    class adjoint_scale_0(torch.nn.Module):
        def forward(self, target: "f32[]", cotangent_0: "f32[3, 5]"):
            abs_1: "f32[3, 5]" = aten.abs.default(cotangent_0)
            amax: "f32[]" = aten.amax.default(abs_1)
            view: "i32[]" = aten.view.dtype(amax, torch.int32)
            bitwise_and: "i32[]" = aten.bitwise_and.Scalar(view, 2139095040)
            view_1: "f32[]" = aten.view.dtype(bitwise_and, torch.float32)
            clamp: "f32[]" = aten.clamp.default(view_1, 1.1754943508222875e-38)
            div: "f32[]" = aten.div.Tensor(target, clamp)
            clamp_1: "f32[]" = aten.clamp.default(div, None, 1.329227995784916e+36)
            abs_2: "f32[]" = aten.abs.default(amax)
            ne: "b8[]" = aten.ne.Scalar(abs_2, inf)
            eq: "b8[]" = aten.eq.Tensor(amax, amax)
            mul: "b8[]" = aten.mul.Tensor(eq, ne)
            ones_like: "f32[]" = aten.ones_like.default(clamp_1, pin_memory = False)
            where: "f32[]" = aten.where.self(mul, clamp_1, ones_like)
            mul_1: "f32[3, 5]" = aten.mul.Tensor(cotangent_0, where)
            abs_3: "f32[3, 5]" = aten.abs.default(mul_1)
            ne_1: "b8[3, 5]" = aten.ne.Scalar(abs_3, 0)
            le: "b8[3, 5]" = aten.le.Scalar(abs_3, 2.9802322387695312e-08)
            bitwise_and_1: "b8[3, 5]" = aten.bitwise_and.Tensor(ne_1, le)
            sum_1: "i64[]" = aten.sum.default(bitwise_and_1)
            _to_copy: "f32[]" = aten._to_copy.default(sum_1, dtype = torch.float32)
            return [where, _to_copy]
    class velocity_0_pullback(torch.nn.Module):
        def forward(self, tanh: "f16[3, 5]", t_1: "f16[5, 3]", t_2: "f16[5, 5]", cotangent_0: "f32[3, 5]"):
            _to_copy_1: "f16[3, 5]" = aten._to_copy.default(cotangent_0, dtype = torch.float16)
            tanh_backward: "f16[3, 5]" = aten.tanh_backward.default(_to_copy_1, tanh)
            _to_copy_default: "f32[5, 3]" = aten._to_copy.default(t_1, dtype = torch.float32)
            _to_copy_default_1: "f32[3, 5]" = aten._to_copy.default(tanh_backward, dtype = torch.float32)
            mm_1: "f32[5, 5]" = aten.mm.default(_to_copy_default, _to_copy_default_1)
            _to_copy_default_2: "f32[3, 5]" = aten._to_copy.default(tanh_backward, dtype = torch.float32)
            _to_copy_default_3: "f32[5, 5]" = aten._to_copy.default(t_2, dtype = torch.float32)
            mm_2: "f32[3, 5]" = aten.mm.default(_to_copy_default_2, _to_copy_default_3)
            return (mm_2, mm_1)
""",
        )

    def test_euler_adjoint_without_scaling(self):
        self.assertExpectedInline(
            printed(explained(Linear, torch.bfloat16).adjoint),
            """\
class GraphModule(torch.nn.Module):
    def forward(self, adjoint_y: "f32[3, 5]", total_weight: "f32[5, 5]", y: "bf16[3, 5]", t: "f32[]", dt: "f32[]", weight: "f32[5, 5]"):
        y_wide: "f32[3, 5]" = aten._to_copy.default(y, dtype = torch.float32)
        velocity_0_forward = self.velocity_0_forward(y_wide, weight, t)
        residual_1_tanh: "bf16[3, 5]" = velocity_0_forward[1]
        residual_1_t_1: "bf16[5, 3]" = velocity_0_forward[2]
        residual_1_t_2: "bf16[5, 5]" = velocity_0_forward[3]
        mul_1: "f32[3, 5]" = aten.mul.Tensor(adjoint_y, dt)
        velocity_0_pullback = self.velocity_0_pullback(residual_1_tanh, residual_1_t_1, residual_1_t_2, mul_1)
        grad_y: "f32[3, 5]" = velocity_0_pullback[0]
        grad_weight: "f32[5, 5]" = velocity_0_pullback[1]
        adjoint_y_next: "f32[3, 5]" = aten.add.Tensor(adjoint_y, grad_y)
        total_weight_next: "f32[5, 5]" = aten.add.Tensor(total_weight, grad_weight)
        return (adjoint_y_next, total_weight_next)
    class velocity_0_forward(torch.nn.Module):
        def forward(self, y: "f32[3, 5]", weight: "f32[5, 5]", t: "f32[]"):
            _to_copy: "bf16[3, 5]" = aten._to_copy.default(y, dtype = torch.bfloat16)
            _to_copy_1: "bf16[5, 5]" = aten._to_copy.default(weight, dtype = torch.bfloat16)
            mm: "bf16[3, 5]" = aten.mm.default(_to_copy, _to_copy_1)
            add: "bf16[3, 5]" = aten.add.Tensor(mm, t)
            tanh: "bf16[3, 5]" = aten.tanh.default(add)
            _to_copy_2: "f32[3, 5]" = aten._to_copy.default(tanh, dtype = torch.float32)
            t_1: "bf16[5, 3]" = aten.t.default(_to_copy)
            t_2: "bf16[5, 5]" = aten.t.default(_to_copy_1)
            return (_to_copy_2, tanh, t_1, t_2)
    class velocity_0_pullback(torch.nn.Module):
        def forward(self, tanh: "bf16[3, 5]", t_1: "bf16[5, 3]", t_2: "bf16[5, 5]", cotangent_0: "f32[3, 5]"):
            _to_copy_3: "bf16[3, 5]" = aten._to_copy.default(cotangent_0, dtype = torch.bfloat16)
            tanh_backward: "bf16[3, 5]" = aten.tanh_backward.default(_to_copy_3, tanh)
            mm_1: "bf16[5, 5]" = aten.mm.default(t_1, tanh_backward)
            mm_2: "bf16[3, 5]" = aten.mm.default(tanh_backward, t_2)
            _to_copy_4: "f32[5, 5]" = aten._to_copy.default(mm_1, dtype = torch.float32)
            _to_copy_5: "f32[3, 5]" = aten._to_copy.default(mm_2, dtype = torch.float32)
            return (_to_copy_5, _to_copy_4)
""",
        )

    def test_rk4_step(self):
        self.assertExpectedInline(
            printed(explained(RK4).step),
            """\
class GraphModule(torch.nn.Module):
    def forward(self, y: "f32[3, 5]", t: "f32[]", dt: "f32[]", velocity_linear_0_weight: "f32[7, 6]", velocity_linear_0_bias: "f32[7]", velocity_linear_1_weight: "f32[5, 7]", velocity_linear_1_bias: "f32[5]"):
        expand: "f32[3, 1]" = aten.expand.default(t, [3, 1])
        cat: "f32[3, 6]" = aten.cat.default([y, expand], 1)
        t_1: "f32[6, 7]" = aten.t.default(velocity_linear_0_weight)
        t_2: "f32[7, 5]" = aten.t.default(velocity_linear_1_weight)
        velocity_0 = self.velocity_0(velocity_linear_0_bias, cat, t_1, velocity_linear_1_bias, t_2)
        k_1: "f32[3, 5]" = velocity_0[0]
        div: "f32[]" = aten.div.Tensor(dt, 2)
        add: "f32[]" = aten.add.Tensor(t, div)
        mul: "f32[3, 5]" = aten.mul.Tensor(div, k_1)
        add_1: "f32[3, 5]" = aten.add.Tensor(y, mul)
        expand_1: "f32[3, 1]" = aten.expand.default(add, [3, 1])
        cat_1: "f32[3, 6]" = aten.cat.default([add_1, expand_1], 1)
        velocity_1 = self.velocity_0(velocity_linear_0_bias, cat_1, t_1, velocity_linear_1_bias, t_2)
        k_2: "f32[3, 5]" = velocity_1[0]
        mul_1: "f32[3, 5]" = aten.mul.Tensor(div, k_2)
        add_3: "f32[3, 5]" = aten.add.Tensor(y, mul_1)
        cat_2: "f32[3, 6]" = aten.cat.default([add_3, expand_1], 1)
        velocity_2 = self.velocity_0(velocity_linear_0_bias, cat_2, t_1, velocity_linear_1_bias, t_2)
        k_3: "f32[3, 5]" = velocity_2[0]
        add_4: "f32[]" = aten.add.Tensor(t, dt)
        mul_2: "f32[3, 5]" = aten.mul.Tensor(dt, k_3)
        add_5: "f32[3, 5]" = aten.add.Tensor(y, mul_2)
        expand_3: "f32[3, 1]" = aten.expand.default(add_4, [3, 1])
        cat_3: "f32[3, 6]" = aten.cat.default([add_5, expand_3], 1)
        velocity_3 = self.velocity_0(velocity_linear_0_bias, cat_3, t_1, velocity_linear_1_bias, t_2)
        k_4: "f32[3, 5]" = velocity_3[0]
        div_4: "f32[]" = aten.div.Tensor(dt, 6)
        mul_3: "f32[3, 5]" = aten.mul.Tensor(k_2, 2)
        add_6: "f32[3, 5]" = aten.add.Tensor(k_1, mul_3)
        mul_4: "f32[3, 5]" = aten.mul.Tensor(k_3, 2)
        add_7: "f32[3, 5]" = aten.add.Tensor(add_6, mul_4)
        add_8: "f32[3, 5]" = aten.add.Tensor(add_7, k_4)
        mul_5: "f32[3, 5]" = aten.mul.Tensor(div_4, add_8)
        add_9: "f32[3, 5]" = aten.add.Tensor(y, mul_5)
        underflow: "i64[3]" = rampde_fx.count_underflow.default([cat, cat_1, cat_2, cat_3])
        underflow_1: "i64[3]" = rampde_fx.count_underflow.default([velocity_linear_0_bias, velocity_linear_0_weight, velocity_linear_1_bias, velocity_linear_1_weight])
        underflow_2: "i64[3]" = aten.add.Tensor(underflow, underflow_1)
        y_stored: "f16[3, 5]" = rampde_fx.narrow.default(y, dtype = torch.float16)
        return (add_9, underflow_2, y_stored)
    class velocity_0(torch.nn.Module):
        def forward(self, velocity_linear_0_bias: "f32[7]", y: "f32[3, 6]", velocity_linear_0_weight: "f32[6, 7]", velocity_linear_1_bias: "f32[5]", velocity_linear_1_weight: "f32[7, 5]"):
            narrow: "f16[7]" = rampde_fx.narrow.default(velocity_linear_0_bias, dtype = torch.float16)
            narrow_1: "f16[3, 6]" = rampde_fx.narrow.default(y, dtype = torch.float16)
            narrow_2: "f16[6, 7]" = rampde_fx.narrow.default(velocity_linear_0_weight, dtype = torch.float16)
            narrow_3: "f16[5]" = rampde_fx.narrow.default(velocity_linear_1_bias, dtype = torch.float16)
            narrow_4: "f16[7, 5]" = rampde_fx.narrow.default(velocity_linear_1_weight, dtype = torch.float16)
            addmm: "f16[3, 7]" = aten.addmm.default(narrow, narrow_1, narrow_2)
            mark_overflow: "f16[3, 7]" = rampde_fx.mark_overflow.default(addmm, [narrow])
            tanh: "f16[3, 7]" = aten.tanh.default(mark_overflow)
            addmm_1: "f16[3, 5]" = aten.addmm.default(narrow_3, tanh, narrow_4)
            mark_overflow_1: "f16[3, 5]" = rampde_fx.mark_overflow.default(addmm_1, [narrow_3])
            _to_copy: "f32[3, 5]" = aten._to_copy.default(mark_overflow_1, dtype = torch.float32)
            return (_to_copy,)
""",
        )

    def test_rk4_adjoint(self):
        self.assertExpectedInline(
            printed(explained(RK4).adjoint),
            """\
class GraphModule(torch.nn.Module):
    def forward(self, adjoint_y: "f32[3, 5]", total_velocity_linear_0_weight: "f32[7, 6]", total_velocity_linear_0_bias: "f32[7]", total_velocity_linear_1_weight: "f32[5, 7]", total_velocity_linear_1_bias: "f32[5]", y: "f16[3, 5]", t: "f32[]", dt: "f32[]", velocity_linear_0_weight: "f32[7, 6]", velocity_linear_0_bias: "f32[7]", velocity_linear_1_weight: "f32[5, 7]", velocity_linear_1_bias: "f32[5]", target: "f32[]"):
        y_wide: "f32[3, 5]" = aten._to_copy.default(y, dtype = torch.float32)
        expand: "f32[3, 1]" = aten.expand.default(t, [3, 1])
        cat: "f32[3, 6]" = aten.cat.default([y_wide, expand], 1)
        t_1: "f32[6, 7]" = aten.t.default(velocity_linear_0_weight)
        t_2: "f32[7, 5]" = aten.t.default(velocity_linear_1_weight)
        velocity_0_forward = self.velocity_0_forward(velocity_linear_0_bias, cat, t_1, velocity_linear_1_bias, t_2)
        residual_1_narrow_1: "f16[3, 6]" = velocity_0_forward[1]
        residual_1_tanh: "f16[3, 7]" = velocity_0_forward[2]
        residual_1_t: "f16[5, 7]" = velocity_0_forward[3]
        residual_1_t_3: "f16[7, 6]" = velocity_0_forward[4]
        k_1: "f32[3, 5]" = velocity_0_forward[0]
        div: "f32[]" = aten.div.Tensor(dt, 2)
        add: "f32[]" = aten.add.Tensor(t, div)
        mul: "f32[3, 5]" = aten.mul.Tensor(div, k_1)
        add_1: "f32[3, 5]" = aten.add.Tensor(y_wide, mul)
        expand_1: "f32[3, 1]" = aten.expand.default(add, [3, 1])
        cat_1: "f32[3, 6]" = aten.cat.default([add_1, expand_1], 1)
        velocity_0_forward_1 = self.velocity_0_forward(velocity_linear_0_bias, cat_1, t_1, velocity_linear_1_bias, t_2)
        residual_2_narrow_1: "f16[3, 6]" = velocity_0_forward_1[1]
        residual_2_tanh: "f16[3, 7]" = velocity_0_forward_1[2]
        residual_2_t: "f16[5, 7]" = velocity_0_forward_1[3]
        residual_2_t_3: "f16[7, 6]" = velocity_0_forward_1[4]
        k_2: "f32[3, 5]" = velocity_0_forward_1[0]
        mul_1: "f32[3, 5]" = aten.mul.Tensor(div, k_2)
        add_3: "f32[3, 5]" = aten.add.Tensor(y_wide, mul_1)
        cat_2: "f32[3, 6]" = aten.cat.default([add_3, expand_1], 1)
        velocity_0_forward_2 = self.velocity_0_forward(velocity_linear_0_bias, cat_2, t_1, velocity_linear_1_bias, t_2)
        residual_3_narrow_1: "f16[3, 6]" = velocity_0_forward_2[1]
        residual_3_tanh: "f16[3, 7]" = velocity_0_forward_2[2]
        residual_3_t: "f16[5, 7]" = velocity_0_forward_2[3]
        residual_3_t_3: "f16[7, 6]" = velocity_0_forward_2[4]
        k_3: "f32[3, 5]" = velocity_0_forward_2[0]
        add_4: "f32[]" = aten.add.Tensor(t, dt)
        mul_2: "f32[3, 5]" = aten.mul.Tensor(dt, k_3)
        add_5: "f32[3, 5]" = aten.add.Tensor(y_wide, mul_2)
        expand_3: "f32[3, 1]" = aten.expand.default(add_4, [3, 1])
        cat_3: "f32[3, 6]" = aten.cat.default([add_5, expand_3], 1)
        velocity_0_forward_3 = self.velocity_0_forward(velocity_linear_0_bias, cat_3, t_1, velocity_linear_1_bias, t_2)
        residual_4_narrow_1: "f16[3, 6]" = velocity_0_forward_3[1]
        residual_4_tanh: "f16[3, 7]" = velocity_0_forward_3[2]
        residual_4_t: "f16[5, 7]" = velocity_0_forward_3[3]
        residual_4_t_3: "f16[7, 6]" = velocity_0_forward_3[4]
        div_4: "f32[]" = aten.div.Tensor(dt, 6)
        mul_6: "f32[3, 5]" = aten.mul.Tensor(adjoint_y, div_4)
        mul_7: "f32[3, 5]" = aten.mul.Tensor(mul_6, 2)
        mul_8: "f32[3, 5]" = aten.mul.Tensor(mul_6, 2)
        adjoint_scale_0 = self.adjoint_scale_0(target, mul_6)
        scale_0: "f32[]" = adjoint_scale_0[0]
        vanished: "f32[]" = adjoint_scale_0[1]
        mul_6_scaled: "f32[3, 5]" = aten.mul.Tensor(mul_6, scale_0)
        velocity_0_pullback = self.velocity_0_pullback(residual_4_narrow_1, residual_4_tanh, residual_4_t, residual_4_t_3, mul_6_scaled)
        grad_velocity_linear_0_bias: "f32[7]" = velocity_0_pullback[0]
        grad_velocity_linear_0_bias_unscaled: "f32[7]" = aten.div.Tensor(grad_velocity_linear_0_bias, scale_0)
        grad_cat_3: "f32[3, 6]" = velocity_0_pullback[1]
        grad_cat_3_unscaled: "f32[3, 6]" = aten.div.Tensor(grad_cat_3, scale_0)
        grad_t_1: "f32[6, 7]" = velocity_0_pullback[2]
        grad_t_1_unscaled: "f32[6, 7]" = aten.div.Tensor(grad_t_1, scale_0)
        grad_velocity_linear_1_bias: "f32[5]" = velocity_0_pullback[3]
        grad_velocity_linear_1_bias_unscaled: "f32[5]" = aten.div.Tensor(grad_velocity_linear_1_bias, scale_0)
        grad_t_2: "f32[7, 5]" = velocity_0_pullback[4]
        grad_t_2_unscaled: "f32[7, 5]" = aten.div.Tensor(grad_t_2, scale_0)
        slice_1: "f32[3, 5]" = aten.slice.Tensor(grad_cat_3_unscaled, 1, 0, 5)
        mul_9: "f32[3, 5]" = aten.mul.Tensor(slice_1, dt)
        grad_velocity_2: "f32[3, 5]" = aten.add.Tensor(mul_7, mul_9)
        adjoint_scale_1 = self.adjoint_scale_0(target, grad_velocity_2)
        scale_1: "f32[]" = adjoint_scale_1[0]
        vanished_1: "f32[]" = adjoint_scale_1[1]
        grad_velocity_2_scaled: "f32[3, 5]" = aten.mul.Tensor(grad_velocity_2, scale_1)
        velocity_0_pullback_1 = self.velocity_0_pullback(residual_3_narrow_1, residual_3_tanh, residual_3_t, residual_3_t_3, grad_velocity_2_scaled)
        grad_velocity_linear_0_bias_1: "f32[7]" = velocity_0_pullback_1[0]
        grad_velocity_linear_0_bias_1_unscaled: "f32[7]" = aten.div.Tensor(grad_velocity_linear_0_bias_1, scale_1)
        grad_cat_2: "f32[3, 6]" = velocity_0_pullback_1[1]
        grad_cat_2_unscaled: "f32[3, 6]" = aten.div.Tensor(grad_cat_2, scale_1)
        grad_t_3: "f32[6, 7]" = velocity_0_pullback_1[2]
        grad_t_3_unscaled: "f32[6, 7]" = aten.div.Tensor(grad_t_3, scale_1)
        grad_velocity_linear_1_bias_1: "f32[5]" = velocity_0_pullback_1[3]
        grad_velocity_linear_1_bias_1_unscaled: "f32[5]" = aten.div.Tensor(grad_velocity_linear_1_bias_1, scale_1)
        grad_t_4: "f32[7, 5]" = velocity_0_pullback_1[4]
        grad_t_4_unscaled: "f32[7, 5]" = aten.div.Tensor(grad_t_4, scale_1)
        grad_velocity_linear_0_bias_2: "f32[7]" = aten.add.Tensor(grad_velocity_linear_0_bias_unscaled, grad_velocity_linear_0_bias_1_unscaled)
        grad_t_5: "f32[6, 7]" = aten.add.Tensor(grad_t_1_unscaled, grad_t_3_unscaled)
        grad_velocity_linear_1_bias_2: "f32[5]" = aten.add.Tensor(grad_velocity_linear_1_bias_unscaled, grad_velocity_linear_1_bias_1_unscaled)
        grad_t_6: "f32[7, 5]" = aten.add.Tensor(grad_t_2_unscaled, grad_t_4_unscaled)
        slice_2: "f32[3, 5]" = aten.slice.Tensor(grad_cat_2_unscaled, 1, 0, 5)
        grad_y: "f32[3, 5]" = aten.add.Tensor(slice_1, slice_2)
        mul_10: "f32[3, 5]" = aten.mul.Tensor(slice_2, div)
        grad_velocity_1: "f32[3, 5]" = aten.add.Tensor(mul_8, mul_10)
        adjoint_scale_2 = self.adjoint_scale_0(target, grad_velocity_1)
        scale_2: "f32[]" = adjoint_scale_2[0]
        vanished_2: "f32[]" = adjoint_scale_2[1]
        grad_velocity_1_scaled: "f32[3, 5]" = aten.mul.Tensor(grad_velocity_1, scale_2)
        velocity_0_pullback_2 = self.velocity_0_pullback(residual_2_narrow_1, residual_2_tanh, residual_2_t, residual_2_t_3, grad_velocity_1_scaled)
        grad_velocity_linear_0_bias_3: "f32[7]" = velocity_0_pullback_2[0]
        grad_velocity_linear_0_bias_3_unscaled: "f32[7]" = aten.div.Tensor(grad_velocity_linear_0_bias_3, scale_2)
        grad_cat_1: "f32[3, 6]" = velocity_0_pullback_2[1]
        grad_cat_1_unscaled: "f32[3, 6]" = aten.div.Tensor(grad_cat_1, scale_2)
        grad_t_7: "f32[6, 7]" = velocity_0_pullback_2[2]
        grad_t_7_unscaled: "f32[6, 7]" = aten.div.Tensor(grad_t_7, scale_2)
        grad_velocity_linear_1_bias_3: "f32[5]" = velocity_0_pullback_2[3]
        grad_velocity_linear_1_bias_3_unscaled: "f32[5]" = aten.div.Tensor(grad_velocity_linear_1_bias_3, scale_2)
        grad_t_8: "f32[7, 5]" = velocity_0_pullback_2[4]
        grad_t_8_unscaled: "f32[7, 5]" = aten.div.Tensor(grad_t_8, scale_2)
        grad_velocity_linear_0_bias_4: "f32[7]" = aten.add.Tensor(grad_velocity_linear_0_bias_2, grad_velocity_linear_0_bias_3_unscaled)
        grad_t_9: "f32[6, 7]" = aten.add.Tensor(grad_t_5, grad_t_7_unscaled)
        grad_velocity_linear_1_bias_4: "f32[5]" = aten.add.Tensor(grad_velocity_linear_1_bias_2, grad_velocity_linear_1_bias_3_unscaled)
        grad_t_10: "f32[7, 5]" = aten.add.Tensor(grad_t_6, grad_t_8_unscaled)
        slice_3: "f32[3, 5]" = aten.slice.Tensor(grad_cat_1_unscaled, 1, 0, 5)
        grad_y_1: "f32[3, 5]" = aten.add.Tensor(grad_y, slice_3)
        mul_11: "f32[3, 5]" = aten.mul.Tensor(slice_3, div)
        grad_velocity_0: "f32[3, 5]" = aten.add.Tensor(mul_6, mul_11)
        adjoint_scale_3 = self.adjoint_scale_0(target, grad_velocity_0)
        scale_3: "f32[]" = adjoint_scale_3[0]
        vanished_3: "f32[]" = adjoint_scale_3[1]
        grad_velocity_0_scaled: "f32[3, 5]" = aten.mul.Tensor(grad_velocity_0, scale_3)
        velocity_0_pullback_3 = self.velocity_0_pullback(residual_1_narrow_1, residual_1_tanh, residual_1_t, residual_1_t_3, grad_velocity_0_scaled)
        grad_velocity_linear_0_bias_5: "f32[7]" = velocity_0_pullback_3[0]
        grad_velocity_linear_0_bias_5_unscaled: "f32[7]" = aten.div.Tensor(grad_velocity_linear_0_bias_5, scale_3)
        grad_cat: "f32[3, 6]" = velocity_0_pullback_3[1]
        grad_cat_unscaled: "f32[3, 6]" = aten.div.Tensor(grad_cat, scale_3)
        grad_t_11: "f32[6, 7]" = velocity_0_pullback_3[2]
        grad_t_11_unscaled: "f32[6, 7]" = aten.div.Tensor(grad_t_11, scale_3)
        grad_velocity_linear_1_bias_5: "f32[5]" = velocity_0_pullback_3[3]
        grad_velocity_linear_1_bias_5_unscaled: "f32[5]" = aten.div.Tensor(grad_velocity_linear_1_bias_5, scale_3)
        grad_t_12: "f32[7, 5]" = velocity_0_pullback_3[4]
        grad_t_12_unscaled: "f32[7, 5]" = aten.div.Tensor(grad_t_12, scale_3)
        grad_velocity_linear_0_bias_6: "f32[7]" = aten.add.Tensor(grad_velocity_linear_0_bias_4, grad_velocity_linear_0_bias_5_unscaled)
        grad_t_13: "f32[6, 7]" = aten.add.Tensor(grad_t_9, grad_t_11_unscaled)
        grad_velocity_linear_1_bias_6: "f32[5]" = aten.add.Tensor(grad_velocity_linear_1_bias_4, grad_velocity_linear_1_bias_5_unscaled)
        grad_t_14: "f32[7, 5]" = aten.add.Tensor(grad_t_10, grad_t_12_unscaled)
        t_3: "f32[5, 7]" = aten.t.default(grad_t_14)
        t_4: "f32[7, 6]" = aten.t.default(grad_t_13)
        slice_4: "f32[3, 5]" = aten.slice.Tensor(grad_cat_unscaled, 1, 0, 5)
        grad_y_2: "f32[3, 5]" = aten.add.Tensor(grad_y_1, slice_4)
        adjoint_y_next: "f32[3, 5]" = aten.add.Tensor(adjoint_y, grad_y_2)
        total_velocity_linear_0_weight_next: "f32[7, 6]" = aten.add.Tensor(total_velocity_linear_0_weight, t_4)
        total_velocity_linear_0_bias_next: "f32[7]" = aten.add.Tensor(total_velocity_linear_0_bias, grad_velocity_linear_0_bias_6)
        total_velocity_linear_1_weight_next: "f32[5, 7]" = aten.add.Tensor(total_velocity_linear_1_weight, t_3)
        total_velocity_linear_1_bias_next: "f32[5]" = aten.add.Tensor(total_velocity_linear_1_bias, grad_velocity_linear_1_bias_6)
        vanished_4: "f32[]" = aten.add.Tensor(vanished, vanished_1)
        vanished_5: "f32[]" = aten.add.Tensor(vanished_4, vanished_2)
        vanished_6: "f32[]" = aten.add.Tensor(vanished_5, vanished_3)
        return (adjoint_y_next, total_velocity_linear_0_weight_next, total_velocity_linear_0_bias_next, total_velocity_linear_1_weight_next, total_velocity_linear_1_bias_next, vanished_6)
    class velocity_0_forward(torch.nn.Module):
        def forward(self, velocity_linear_0_bias: "f32[7]", y: "f32[3, 6]", velocity_linear_0_weight: "f32[6, 7]", velocity_linear_1_bias: "f32[5]", velocity_linear_1_weight: "f32[7, 5]"):
            narrow: "f16[7]" = rampde_fx.narrow.default(velocity_linear_0_bias, dtype = torch.float16)
            narrow_1: "f16[3, 6]" = rampde_fx.narrow.default(y, dtype = torch.float16)
            narrow_2: "f16[6, 7]" = rampde_fx.narrow.default(velocity_linear_0_weight, dtype = torch.float16)
            narrow_3: "f16[5]" = rampde_fx.narrow.default(velocity_linear_1_bias, dtype = torch.float16)
            narrow_4: "f16[7, 5]" = rampde_fx.narrow.default(velocity_linear_1_weight, dtype = torch.float16)
            addmm: "f16[3, 7]" = aten.addmm.default(narrow, narrow_1, narrow_2)
            mark_overflow: "f16[3, 7]" = rampde_fx.mark_overflow.default(addmm, [narrow])
            tanh: "f16[3, 7]" = aten.tanh.default(mark_overflow)
            addmm_1: "f16[3, 5]" = aten.addmm.default(narrow_3, tanh, narrow_4)
            mark_overflow_1: "f16[3, 5]" = rampde_fx.mark_overflow.default(addmm_1, [narrow_3])
            _to_copy: "f32[3, 5]" = aten._to_copy.default(mark_overflow_1, dtype = torch.float32)
            t: "f16[5, 7]" = aten.t.default(narrow_4)
            t_3: "f16[7, 6]" = aten.t.default(narrow_2)
            return (_to_copy, narrow_1, tanh, t, t_3)
    class adjoint_scale_0(torch.nn.Module):
        def forward(self, target: "f32[]", cotangent_0: "f32[3, 5]"):
            abs_1: "f32[3, 5]" = aten.abs.default(cotangent_0)
            amax: "f32[]" = aten.amax.default(abs_1)
            view: "i32[]" = aten.view.dtype(amax, torch.int32)
            bitwise_and: "i32[]" = aten.bitwise_and.Scalar(view, 2139095040)
            view_1: "f32[]" = aten.view.dtype(bitwise_and, torch.float32)
            clamp: "f32[]" = aten.clamp.default(view_1, 1.1754943508222875e-38)
            div: "f32[]" = aten.div.Tensor(target, clamp)
            clamp_1: "f32[]" = aten.clamp.default(div, None, 1.329227995784916e+36)
            abs_2: "f32[]" = aten.abs.default(amax)
            ne: "b8[]" = aten.ne.Scalar(abs_2, inf)
            eq: "b8[]" = aten.eq.Tensor(amax, amax)
            mul: "b8[]" = aten.mul.Tensor(eq, ne)
            ones_like: "f32[]" = aten.ones_like.default(clamp_1, pin_memory = False)
            where: "f32[]" = aten.where.self(mul, clamp_1, ones_like)
            mul_1: "f32[3, 5]" = aten.mul.Tensor(cotangent_0, where)
            abs_3: "f32[3, 5]" = aten.abs.default(mul_1)
            ne_1: "b8[3, 5]" = aten.ne.Scalar(abs_3, 0)
            le: "b8[3, 5]" = aten.le.Scalar(abs_3, 2.9802322387695312e-08)
            bitwise_and_1: "b8[3, 5]" = aten.bitwise_and.Tensor(ne_1, le)
            sum_1: "i64[]" = aten.sum.default(bitwise_and_1)
            _to_copy: "f32[]" = aten._to_copy.default(sum_1, dtype = torch.float32)
            return [where, _to_copy]
    class velocity_0_pullback(torch.nn.Module):
        def forward(self, narrow_1: "f16[3, 6]", tanh: "f16[3, 7]", t: "f16[5, 7]", t_3: "f16[7, 6]", cotangent_0: "f32[3, 5]"):
            _to_copy_1: "f16[3, 5]" = aten._to_copy.default(cotangent_0, dtype = torch.float16)
            mm: "f16[3, 7]" = aten.mm.default(_to_copy_1, t)
            t_1: "f16[5, 3]" = aten.t.default(_to_copy_1)
            _to_copy_default: "f32[5, 3]" = aten._to_copy.default(t_1, dtype = torch.float32)
            _to_copy_default_1: "f32[3, 7]" = aten._to_copy.default(tanh, dtype = torch.float32)
            mm_1: "f32[5, 7]" = aten.mm.default(_to_copy_default, _to_copy_default_1)
            t_2: "f32[7, 5]" = aten.t.default(mm_1)
            sum_1: "f32[1, 5]" = aten.sum.dim_IntList(_to_copy_1, [0], True, dtype = torch.float32)
            view: "f32[5]" = aten.reshape.default(sum_1, [5])
            tanh_backward: "f16[3, 7]" = aten.tanh_backward.default(mm, tanh)
            _to_copy_default_4: "f32[3, 7]" = aten._to_copy.default(tanh_backward, dtype = torch.float32)
            _to_copy_default_5: "f32[7, 6]" = aten._to_copy.default(t_3, dtype = torch.float32)
            mm_2: "f32[3, 6]" = aten.mm.default(_to_copy_default_4, _to_copy_default_5)
            t_4: "f16[7, 3]" = aten.t.default(tanh_backward)
            _to_copy_default_2: "f32[7, 3]" = aten._to_copy.default(t_4, dtype = torch.float32)
            _to_copy_default_3: "f32[3, 6]" = aten._to_copy.default(narrow_1, dtype = torch.float32)
            mm_3: "f32[7, 6]" = aten.mm.default(_to_copy_default_2, _to_copy_default_3)
            t_5: "f32[6, 7]" = aten.t.default(mm_3)
            sum_2: "f32[1, 7]" = aten.sum.dim_IntList(tanh_backward, [0], True, dtype = torch.float32)
            view_1: "f32[7]" = aten.reshape.default(sum_2, [7])
            return (view_1, mm_2, t_5, view, t_2)
""",
        )
