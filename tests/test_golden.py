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
        getitem: "f32[3, 5]" = velocity_0[0]
        mul: "f32[3, 5]" = aten.mul.Tensor(dt, getitem)
        add_1: "f32[3, 5]" = aten.add.Tensor(y, mul)
        count_underflow_default: "i64[3]" = rampde_fx.count_underflow.default([y])
        count_underflow_default_1: "i64[3]" = rampde_fx.count_underflow.default([weight])
        add_tensor: "i64[3]" = aten.add.Tensor(count_underflow_default, count_underflow_default_1)
        narrow_default: "f16[3, 5]" = rampde_fx.narrow.default(y, dtype = torch.float16)
        return (add_1, add_tensor, narrow_default)
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
        _to_copy_default: "f32[3, 5]" = aten._to_copy.default(y, dtype = torch.float32)
        velocity_0_forward = self.velocity_0_forward(_to_copy_default, weight, t)
        getitem: "f16[3, 5]" = velocity_0_forward[1]
        getitem_1: "f16[5, 3]" = velocity_0_forward[2]
        getitem_2: "f16[5, 5]" = velocity_0_forward[3]
        mul_1: "f32[3, 5]" = aten.mul.Tensor(adjoint_y, dt)
        adjoint_scale_0 = self.adjoint_scale_0(target, mul_1)
        getitem_6: "f32[]" = adjoint_scale_0[0]
        getitem_7: "f32[]" = adjoint_scale_0[1]
        mul_tensor: "f32[3, 5]" = aten.mul.Tensor(mul_1, getitem_6)
        velocity_0_pullback = self.velocity_0_pullback(getitem, getitem_1, getitem_2, mul_tensor)
        getitem_4: "f32[3, 5]" = velocity_0_pullback[0]
        div_tensor: "f32[3, 5]" = aten.div.Tensor(getitem_4, getitem_6)
        getitem_5: "f32[5, 5]" = velocity_0_pullback[1]
        div_tensor_1: "f32[5, 5]" = aten.div.Tensor(getitem_5, getitem_6)
        add_tensor_1: "f32[3, 5]" = aten.add.Tensor(adjoint_y, div_tensor)
        add_tensor_2: "f32[5, 5]" = aten.add.Tensor(total_weight, div_tensor_1)
        return (add_tensor_1, add_tensor_2, getitem_7)
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
        _to_copy_default: "f32[3, 5]" = aten._to_copy.default(y, dtype = torch.float32)
        velocity_0_forward = self.velocity_0_forward(_to_copy_default, weight, t)
        getitem: "bf16[3, 5]" = velocity_0_forward[1]
        getitem_1: "bf16[5, 3]" = velocity_0_forward[2]
        getitem_2: "bf16[5, 5]" = velocity_0_forward[3]
        mul_1: "f32[3, 5]" = aten.mul.Tensor(adjoint_y, dt)
        velocity_0_pullback = self.velocity_0_pullback(getitem, getitem_1, getitem_2, mul_1)
        getitem_4: "f32[3, 5]" = velocity_0_pullback[0]
        getitem_5: "f32[5, 5]" = velocity_0_pullback[1]
        add_tensor: "f32[3, 5]" = aten.add.Tensor(adjoint_y, getitem_4)
        add_tensor_1: "f32[5, 5]" = aten.add.Tensor(total_weight, getitem_5)
        return (add_tensor, add_tensor_1)
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
        getitem: "f32[3, 5]" = velocity_0[0]
        div: "f32[]" = aten.div.Tensor(dt, 2)
        add: "f32[]" = aten.add.Tensor(t, div)
        mul: "f32[3, 5]" = aten.mul.Tensor(div, getitem)
        add_1: "f32[3, 5]" = aten.add.Tensor(y, mul)
        expand_1: "f32[3, 1]" = aten.expand.default(add, [3, 1])
        cat_1: "f32[3, 6]" = aten.cat.default([add_1, expand_1], 1)
        velocity_1 = self.velocity_0(velocity_linear_0_bias, cat_1, t_1, velocity_linear_1_bias, t_2)
        getitem_1: "f32[3, 5]" = velocity_1[0]
        mul_1: "f32[3, 5]" = aten.mul.Tensor(div, getitem_1)
        add_3: "f32[3, 5]" = aten.add.Tensor(y, mul_1)
        cat_2: "f32[3, 6]" = aten.cat.default([add_3, expand_1], 1)
        velocity_2 = self.velocity_0(velocity_linear_0_bias, cat_2, t_1, velocity_linear_1_bias, t_2)
        getitem_2: "f32[3, 5]" = velocity_2[0]
        add_4: "f32[]" = aten.add.Tensor(t, dt)
        mul_2: "f32[3, 5]" = aten.mul.Tensor(dt, getitem_2)
        add_5: "f32[3, 5]" = aten.add.Tensor(y, mul_2)
        expand_3: "f32[3, 1]" = aten.expand.default(add_4, [3, 1])
        cat_3: "f32[3, 6]" = aten.cat.default([add_5, expand_3], 1)
        velocity_3 = self.velocity_0(velocity_linear_0_bias, cat_3, t_1, velocity_linear_1_bias, t_2)
        getitem_3: "f32[3, 5]" = velocity_3[0]
        div_4: "f32[]" = aten.div.Tensor(dt, 6)
        mul_3: "f32[3, 5]" = aten.mul.Tensor(getitem_1, 2)
        add_6: "f32[3, 5]" = aten.add.Tensor(getitem, mul_3)
        mul_4: "f32[3, 5]" = aten.mul.Tensor(getitem_2, 2)
        add_7: "f32[3, 5]" = aten.add.Tensor(add_6, mul_4)
        add_8: "f32[3, 5]" = aten.add.Tensor(add_7, getitem_3)
        mul_5: "f32[3, 5]" = aten.mul.Tensor(div_4, add_8)
        add_9: "f32[3, 5]" = aten.add.Tensor(y, mul_5)
        count_underflow_default: "i64[3]" = rampde_fx.count_underflow.default([cat, cat_1, cat_2, cat_3])
        count_underflow_default_1: "i64[3]" = rampde_fx.count_underflow.default([velocity_linear_0_bias, velocity_linear_0_weight, velocity_linear_1_bias, velocity_linear_1_weight])
        add_tensor: "i64[3]" = aten.add.Tensor(count_underflow_default, count_underflow_default_1)
        narrow_default: "f16[3, 5]" = rampde_fx.narrow.default(y, dtype = torch.float16)
        return (add_9, add_tensor, narrow_default)
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
        _to_copy_default: "f32[3, 5]" = aten._to_copy.default(y, dtype = torch.float32)
        expand: "f32[3, 1]" = aten.expand.default(t, [3, 1])
        cat: "f32[3, 6]" = aten.cat.default([_to_copy_default, expand], 1)
        t_1: "f32[6, 7]" = aten.t.default(velocity_linear_0_weight)
        t_2: "f32[7, 5]" = aten.t.default(velocity_linear_1_weight)
        velocity_0_forward = self.velocity_0_forward(velocity_linear_0_bias, cat, t_1, velocity_linear_1_bias, t_2)
        getitem: "f16[3, 6]" = velocity_0_forward[1]
        getitem_1: "f16[3, 7]" = velocity_0_forward[2]
        getitem_2: "f16[5, 7]" = velocity_0_forward[3]
        getitem_3: "f16[7, 6]" = velocity_0_forward[4]
        getitem_4: "f32[3, 5]" = velocity_0_forward[0]
        div: "f32[]" = aten.div.Tensor(dt, 2)
        add: "f32[]" = aten.add.Tensor(t, div)
        mul: "f32[3, 5]" = aten.mul.Tensor(div, getitem_4)
        add_1: "f32[3, 5]" = aten.add.Tensor(_to_copy_default, mul)
        expand_1: "f32[3, 1]" = aten.expand.default(add, [3, 1])
        cat_1: "f32[3, 6]" = aten.cat.default([add_1, expand_1], 1)
        velocity_0_forward_1 = self.velocity_0_forward(velocity_linear_0_bias, cat_1, t_1, velocity_linear_1_bias, t_2)
        getitem_5: "f16[3, 6]" = velocity_0_forward_1[1]
        getitem_6: "f16[3, 7]" = velocity_0_forward_1[2]
        getitem_7: "f16[5, 7]" = velocity_0_forward_1[3]
        getitem_8: "f16[7, 6]" = velocity_0_forward_1[4]
        getitem_9: "f32[3, 5]" = velocity_0_forward_1[0]
        mul_1: "f32[3, 5]" = aten.mul.Tensor(div, getitem_9)
        add_3: "f32[3, 5]" = aten.add.Tensor(_to_copy_default, mul_1)
        cat_2: "f32[3, 6]" = aten.cat.default([add_3, expand_1], 1)
        velocity_0_forward_2 = self.velocity_0_forward(velocity_linear_0_bias, cat_2, t_1, velocity_linear_1_bias, t_2)
        getitem_10: "f16[3, 6]" = velocity_0_forward_2[1]
        getitem_11: "f16[3, 7]" = velocity_0_forward_2[2]
        getitem_12: "f16[5, 7]" = velocity_0_forward_2[3]
        getitem_13: "f16[7, 6]" = velocity_0_forward_2[4]
        getitem_14: "f32[3, 5]" = velocity_0_forward_2[0]
        add_4: "f32[]" = aten.add.Tensor(t, dt)
        mul_2: "f32[3, 5]" = aten.mul.Tensor(dt, getitem_14)
        add_5: "f32[3, 5]" = aten.add.Tensor(_to_copy_default, mul_2)
        expand_3: "f32[3, 1]" = aten.expand.default(add_4, [3, 1])
        cat_3: "f32[3, 6]" = aten.cat.default([add_5, expand_3], 1)
        velocity_0_forward_3 = self.velocity_0_forward(velocity_linear_0_bias, cat_3, t_1, velocity_linear_1_bias, t_2)
        getitem_15: "f16[3, 6]" = velocity_0_forward_3[1]
        getitem_16: "f16[3, 7]" = velocity_0_forward_3[2]
        getitem_17: "f16[5, 7]" = velocity_0_forward_3[3]
        getitem_18: "f16[7, 6]" = velocity_0_forward_3[4]
        div_4: "f32[]" = aten.div.Tensor(dt, 6)
        mul_6: "f32[3, 5]" = aten.mul.Tensor(adjoint_y, div_4)
        mul_7: "f32[3, 5]" = aten.mul.Tensor(mul_6, 2)
        mul_8: "f32[3, 5]" = aten.mul.Tensor(mul_6, 2)
        adjoint_scale_0 = self.adjoint_scale_0(target, mul_6)
        getitem_40: "f32[]" = adjoint_scale_0[0]
        getitem_41: "f32[]" = adjoint_scale_0[1]
        mul_tensor: "f32[3, 5]" = aten.mul.Tensor(mul_6, getitem_40)
        velocity_0_pullback = self.velocity_0_pullback(getitem_15, getitem_16, getitem_17, getitem_18, mul_tensor)
        getitem_20: "f32[7]" = velocity_0_pullback[0]
        div_tensor: "f32[7]" = aten.div.Tensor(getitem_20, getitem_40)
        getitem_21: "f32[3, 6]" = velocity_0_pullback[1]
        div_tensor_1: "f32[3, 6]" = aten.div.Tensor(getitem_21, getitem_40)
        getitem_22: "f32[6, 7]" = velocity_0_pullback[2]
        div_tensor_2: "f32[6, 7]" = aten.div.Tensor(getitem_22, getitem_40)
        getitem_23: "f32[5]" = velocity_0_pullback[3]
        div_tensor_3: "f32[5]" = aten.div.Tensor(getitem_23, getitem_40)
        getitem_24: "f32[7, 5]" = velocity_0_pullback[4]
        div_tensor_4: "f32[7, 5]" = aten.div.Tensor(getitem_24, getitem_40)
        slice_1: "f32[3, 5]" = aten.slice.Tensor(div_tensor_1, 1, 0, 5)
        mul_9: "f32[3, 5]" = aten.mul.Tensor(slice_1, dt)
        add_tensor_1: "f32[3, 5]" = aten.add.Tensor(mul_7, mul_9)
        adjoint_scale_1 = self.adjoint_scale_0(target, add_tensor_1)
        getitem_42: "f32[]" = adjoint_scale_1[0]
        getitem_43: "f32[]" = adjoint_scale_1[1]
        mul_tensor_1: "f32[3, 5]" = aten.mul.Tensor(add_tensor_1, getitem_42)
        velocity_0_pullback_1 = self.velocity_0_pullback(getitem_10, getitem_11, getitem_12, getitem_13, mul_tensor_1)
        getitem_25: "f32[7]" = velocity_0_pullback_1[0]
        div_tensor_5: "f32[7]" = aten.div.Tensor(getitem_25, getitem_42)
        getitem_26: "f32[3, 6]" = velocity_0_pullback_1[1]
        div_tensor_6: "f32[3, 6]" = aten.div.Tensor(getitem_26, getitem_42)
        getitem_27: "f32[6, 7]" = velocity_0_pullback_1[2]
        div_tensor_7: "f32[6, 7]" = aten.div.Tensor(getitem_27, getitem_42)
        getitem_28: "f32[5]" = velocity_0_pullback_1[3]
        div_tensor_8: "f32[5]" = aten.div.Tensor(getitem_28, getitem_42)
        getitem_29: "f32[7, 5]" = velocity_0_pullback_1[4]
        div_tensor_9: "f32[7, 5]" = aten.div.Tensor(getitem_29, getitem_42)
        add_tensor_2: "f32[7]" = aten.add.Tensor(div_tensor, div_tensor_5)
        add_tensor_3: "f32[6, 7]" = aten.add.Tensor(div_tensor_2, div_tensor_7)
        add_tensor_4: "f32[5]" = aten.add.Tensor(div_tensor_3, div_tensor_8)
        add_tensor_5: "f32[7, 5]" = aten.add.Tensor(div_tensor_4, div_tensor_9)
        slice_2: "f32[3, 5]" = aten.slice.Tensor(div_tensor_6, 1, 0, 5)
        add_tensor_6: "f32[3, 5]" = aten.add.Tensor(slice_1, slice_2)
        mul_10: "f32[3, 5]" = aten.mul.Tensor(slice_2, div)
        add_tensor_7: "f32[3, 5]" = aten.add.Tensor(mul_8, mul_10)
        adjoint_scale_2 = self.adjoint_scale_0(target, add_tensor_7)
        getitem_44: "f32[]" = adjoint_scale_2[0]
        getitem_45: "f32[]" = adjoint_scale_2[1]
        mul_tensor_2: "f32[3, 5]" = aten.mul.Tensor(add_tensor_7, getitem_44)
        velocity_0_pullback_2 = self.velocity_0_pullback(getitem_5, getitem_6, getitem_7, getitem_8, mul_tensor_2)
        getitem_30: "f32[7]" = velocity_0_pullback_2[0]
        div_tensor_10: "f32[7]" = aten.div.Tensor(getitem_30, getitem_44)
        getitem_31: "f32[3, 6]" = velocity_0_pullback_2[1]
        div_tensor_11: "f32[3, 6]" = aten.div.Tensor(getitem_31, getitem_44)
        getitem_32: "f32[6, 7]" = velocity_0_pullback_2[2]
        div_tensor_12: "f32[6, 7]" = aten.div.Tensor(getitem_32, getitem_44)
        getitem_33: "f32[5]" = velocity_0_pullback_2[3]
        div_tensor_13: "f32[5]" = aten.div.Tensor(getitem_33, getitem_44)
        getitem_34: "f32[7, 5]" = velocity_0_pullback_2[4]
        div_tensor_14: "f32[7, 5]" = aten.div.Tensor(getitem_34, getitem_44)
        add_tensor_8: "f32[7]" = aten.add.Tensor(add_tensor_2, div_tensor_10)
        add_tensor_9: "f32[6, 7]" = aten.add.Tensor(add_tensor_3, div_tensor_12)
        add_tensor_10: "f32[5]" = aten.add.Tensor(add_tensor_4, div_tensor_13)
        add_tensor_11: "f32[7, 5]" = aten.add.Tensor(add_tensor_5, div_tensor_14)
        slice_3: "f32[3, 5]" = aten.slice.Tensor(div_tensor_11, 1, 0, 5)
        add_tensor_12: "f32[3, 5]" = aten.add.Tensor(add_tensor_6, slice_3)
        mul_11: "f32[3, 5]" = aten.mul.Tensor(slice_3, div)
        add_tensor_13: "f32[3, 5]" = aten.add.Tensor(mul_6, mul_11)
        adjoint_scale_3 = self.adjoint_scale_0(target, add_tensor_13)
        getitem_46: "f32[]" = adjoint_scale_3[0]
        getitem_47: "f32[]" = adjoint_scale_3[1]
        mul_tensor_3: "f32[3, 5]" = aten.mul.Tensor(add_tensor_13, getitem_46)
        velocity_0_pullback_3 = self.velocity_0_pullback(getitem, getitem_1, getitem_2, getitem_3, mul_tensor_3)
        getitem_35: "f32[7]" = velocity_0_pullback_3[0]
        div_tensor_15: "f32[7]" = aten.div.Tensor(getitem_35, getitem_46)
        getitem_36: "f32[3, 6]" = velocity_0_pullback_3[1]
        div_tensor_16: "f32[3, 6]" = aten.div.Tensor(getitem_36, getitem_46)
        getitem_37: "f32[6, 7]" = velocity_0_pullback_3[2]
        div_tensor_17: "f32[6, 7]" = aten.div.Tensor(getitem_37, getitem_46)
        getitem_38: "f32[5]" = velocity_0_pullback_3[3]
        div_tensor_18: "f32[5]" = aten.div.Tensor(getitem_38, getitem_46)
        getitem_39: "f32[7, 5]" = velocity_0_pullback_3[4]
        div_tensor_19: "f32[7, 5]" = aten.div.Tensor(getitem_39, getitem_46)
        add_tensor_14: "f32[7]" = aten.add.Tensor(add_tensor_8, div_tensor_15)
        add_tensor_15: "f32[6, 7]" = aten.add.Tensor(add_tensor_9, div_tensor_17)
        add_tensor_16: "f32[5]" = aten.add.Tensor(add_tensor_10, div_tensor_18)
        add_tensor_17: "f32[7, 5]" = aten.add.Tensor(add_tensor_11, div_tensor_19)
        t_3: "f32[5, 7]" = aten.t.default(add_tensor_17)
        t_4: "f32[7, 6]" = aten.t.default(add_tensor_15)
        slice_4: "f32[3, 5]" = aten.slice.Tensor(div_tensor_16, 1, 0, 5)
        add_tensor_18: "f32[3, 5]" = aten.add.Tensor(add_tensor_12, slice_4)
        add_tensor_19: "f32[3, 5]" = aten.add.Tensor(adjoint_y, add_tensor_18)
        add_tensor_20: "f32[7, 6]" = aten.add.Tensor(total_velocity_linear_0_weight, t_4)
        add_tensor_21: "f32[7]" = aten.add.Tensor(total_velocity_linear_0_bias, add_tensor_14)
        add_tensor_22: "f32[5, 7]" = aten.add.Tensor(total_velocity_linear_1_weight, t_3)
        add_tensor_23: "f32[5]" = aten.add.Tensor(total_velocity_linear_1_bias, add_tensor_16)
        add_tensor: "f32[]" = aten.add.Tensor(getitem_41, getitem_43)
        add_tensor_24: "f32[]" = aten.add.Tensor(add_tensor, getitem_45)
        add_tensor_25: "f32[]" = aten.add.Tensor(add_tensor_24, getitem_47)
        return (add_tensor_19, add_tensor_20, add_tensor_21, add_tensor_22, add_tensor_23, add_tensor_25)
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
