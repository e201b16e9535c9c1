"""Every pass by itself: the graph before and after."""

from dataclasses import replace

import torch
from expecttest import TestCase

import rampde_fx
from rampde_fx.backend import STEP_PASSES
from rampde_fx.ir import graphs, operator_table, tracing
from rampde_fx.ir.ends import Adjoint, Cotangent, Gradient, Operand, Saved, StateSlot, Statistics, Target, Vanished
from rampde_fx.ir.sources import CarrySource, IndexSource, InvariantSource, SeedSource
from rampde_fx.passes.capture_step import capture_step
from rampde_fx.passes.emit_loop import emit_loop
from rampde_fx.passes.find_loops import find_loops
from rampde_fx.passes.find_states import find_states
from rampde_fx.passes.generate_adjoint import generate_adjoint
from rampde_fx.passes.hoist_invariants import hoist_invariants
from rampde_fx.passes.lower_velocity import find_components, find_taken_inside, lower_velocity
from rampde_fx.passes.match_iterations import match_iterations
from rampde_fx.passes.partition_velocity import partition_velocity
from rampde_fx.passes.replay_random import replay_random
from rampde_fx.passes.roll_loop import roll_loop
from rampde_fx.passes.scale_adjoint import scale_adjoint
from rampde_fx.passes.watch_adjoint import watch_adjoint
from rampde_fx.passes.widen_gradients import find_sums, widen_gradients, with_wide_sums
from rampde_fx.torch_private import fake_tensors
from tests.golden import printed, without_captured_inputs

aten = torch.ops.aten


@rampde_fx.mixed_precision(dtype=torch.float16)
def flow(y, w, g, t):
    for t_i, dt in rampde_fx.steps(t):
        y = y + dt * torch.tanh(y @ (g * w) + t_i)
    return y


ARGUMENTS = (torch.zeros(3, 5, requires_grad=True), torch.ones(5, 5), torch.ones(5), torch.linspace(0, 1, 4))


@rampde_fx.mixed_precision(dtype=torch.float16)
def diffusion(y, t):
    for _, dt in rampde_fx.steps(t):
        y = y + dt * torch.nn.functional.dropout(y, 0.4) + torch.rand(5)
    return y


def through(function, arguments=ARGUMENTS, model=flow):
    """What the function returns for the captured graph, under its fake mode."""
    found = []

    def backend(graph_module, _):
        with fake_tensors.fake_mode_of(graph_module):
            found.append(function(graphs.copied(graph_module)))
        return graph_module.forward

    torch.compile(model, backend=backend, fullgraph=True)(*arguments)
    return found[0]


def marked(graph_module):
    (loop,) = find_loops(graph_module, gradients=True, autocast=False)
    return loop


def rolled(graph_module):
    loop = marked(graph_module)
    run = match_iterations(loop)
    captured = find_states(loop, capture_step(graph_module, loop, run), single=False)
    return roll_loop(graph_module, loop, run, captured, "loop_0")


def after(*passes):
    """The loop after some step passes."""

    def run(graph_module):
        loop = rolled(graph_module)
        for step_pass in passes:
            loop = step_pass(loop)
        return loop

    return through(run)


def shown(loop, part="step"):
    found = getattr(loop, part)
    return printed(found.module if isinstance(found, Adjoint) else found)


class TestPasses(TestCase):
    maxDiff = None

    def test_find_loops(self):
        loop = through(marked)
        assert [marker.args[1] for marker in loop.markers] == [0, 1, 2]
        assert [len(nodes) for nodes in loop.iterations] == [8, 8, 8] and loop.with_gradients
        assert loop.policy == rampde_fx.PrecisionPolicy(torch.float16)

    def test_match_iterations(self):
        run = through(lambda graph_module: match_iterations(marked(graph_module)))
        sources = {source for row in run.sources for source in row if not isinstance(source, int | str)}
        assert len(run.iterations) == 3
        assert {s.key for s in sources if isinstance(s, CarrySource)} == {5}
        assert {type(s) for s in sources} == {CarrySource, InvariantSource}
        assert run.outputs == {5: [2]}

    def test_roll_loop(self):
        def run(graph_module):
            rolled(graph_module)
            return without_captured_inputs(graph_module.graph.python_code("self").src)

        self.assertExpectedInline(
            through(run),
            """\



    getitem = l_args_3_[slice(0, 3, None)]
    clone = getitem.clone();  getitem = None
    getitem_1 = l_args_3_[slice(0, 3, None)]
    getitem_2 = l_args_3_[slice(1, 4, None)]
    sub = torch.sub(getitem_2, getitem_1);  getitem_2 = getitem_1 = None
    loop_0 = self.loop_0(l_args_0_, clone, sub, l_args_2_, l_args_1_);  l_args_0_ = clone = sub = l_args_2_ = l_args_1_ = None
    getitem_3 = loop_0[0];  loop_0 = None
    end = torch.ops.rampde_fx.end(l_args_3_);  l_args_3_ = end = None
    return (getitem_3,)
    """,
        )
        self.assertExpectedInline(
            shown(after()),
            """\
class GraphModule(torch.nn.Module):
    def forward(self, args_0: "f32[3, 5]", t: "f32[]", dt: "f32[]", args_2: "f32[5]", args_1: "f32[5, 5]"):
        mul: "f32[5, 5]" = aten.mul.Tensor(args_2, args_1)
        mm: "f32[3, 5]" = aten.mm.default(args_0, mul)
        add: "f32[3, 5]" = aten.add.Tensor(mm, t)
        tanh: "f32[3, 5]" = aten.tanh.default(add)
        mul_1: "f32[3, 5]" = aten.mul.Tensor(dt, tanh)
        add_1: "f32[3, 5]" = aten.add.Tensor(args_0, mul_1)
        return (add_1,)
""",
        )

    def test_replay_random(self):
        def run(graph_module):
            loop = marked(graph_module)
            captured = replay_random(capture_step(graph_module, loop, match_iterations(loop)))
            again = replay_random(captured)
            assert again is captured and [type(source) for source in captured.inputs[-2:]] == [IndexSource, SeedSource]
            return printed(captured.step)

        self.assertExpectedInline(
            through(run, (ARGUMENTS[0], ARGUMENTS[3]), diffusion),
            """\
class GraphModule(torch.nn.Module):
    def forward(self, args_0: "f32[3, 5]", dt: "f32[]", index: "i64[]", seed: "i64[]"):
        empty_like: "f32[3, 5]" = aten.empty_like.default(args_0)
        bernoulli: "f32[3, 5]" = rampde_fx.bernoulli.default(seed, index, 0, empty_like, 0.6)
        div: "f32[3, 5]" = aten.div.Scalar(bernoulli, 0.6)
        mul: "f32[3, 5]" = aten.mul.Tensor(args_0, div)
        mul_1: "f32[3, 5]" = aten.mul.Tensor(dt, mul)
        add: "f32[3, 5]" = aten.add.Tensor(args_0, mul_1)
        empty: "f32[5]" = aten.empty.memory_format([5], device = device(type='cpu'), pin_memory = False)
        uniform: "f32[5]" = rampde_fx.uniform.default(seed, index, 1, empty)
        add_1: "f32[3, 5]" = aten.add.Tensor(add, uniform)
        return (add_1, args_0, dt)
""",
        )

    def test_hoist_invariants(self):
        loop = after(hoist_invariants)
        self.assertExpectedInline(
            shown(loop, "preamble"),
            """\
class GraphModule(torch.nn.Module):
    def forward(self, args_2: "f32[5]", args_1: "f32[5, 5]"):
        mul: "f32[5, 5]" = aten.mul.Tensor(args_2, args_1)
        return (mul,)
""",
        )
        self.assertExpectedInline(
            shown(loop),
            """\
class GraphModule(torch.nn.Module):
    def forward(self, args_0: "f32[3, 5]", t: "f32[]", dt: "f32[]", mul: "f32[5, 5]"):
        mm: "f32[3, 5]" = aten.mm.default(args_0, mul)
        add: "f32[3, 5]" = aten.add.Tensor(mm, t)
        tanh: "f32[3, 5]" = aten.tanh.default(add)
        mul_1: "f32[3, 5]" = aten.mul.Tensor(dt, tanh)
        add_1: "f32[3, 5]" = aten.add.Tensor(args_0, mul_1)
        return (add_1,)
""",
        )
        assert hoist_invariants(loop).step is loop.step

    def test_partition_velocity(self):
        loop = after(hoist_invariants, partition_velocity)
        roles = {node.name: node.meta["role"] for node in loop.step.graph.nodes if node.op != "output"}
        wanted = {"args_0": "state", "t": "time", "dt": "time", "mul": "time", "mm": "velocity", "add": "velocity",
                  "tanh": "velocity", "mul_1": "state", "add_1": "state"}  # fmt: skip
        assert roles == wanted

    def test_lower_velocity(self):
        self.assertExpectedInline(
            shown(after(hoist_invariants, partition_velocity, lower_velocity)),
            """\
class GraphModule(torch.nn.Module):
    def forward(self, args_0: "f32[3, 5]", t: "f32[]", dt: "f32[]", mul: "f32[5, 5]"):
        velocity_0 = self.velocity_0(args_0, mul, t)
        k_1: "f32[3, 5]" = velocity_0[0]
        mul_1: "f32[3, 5]" = aten.mul.Tensor(dt, k_1)
        add_1: "f32[3, 5]" = aten.add.Tensor(args_0, mul_1)
        return (add_1,)
    class velocity_0(torch.nn.Module):
        def forward(self, y: "f32[3, 5]", mul: "f32[5, 5]", t: "f32[]"):
            narrow: "f16[3, 5]" = rampde_fx.narrow.default(y, dtype = torch.float16)
            narrow_1: "f16[5, 5]" = rampde_fx.narrow.default(mul, dtype = torch.float16)
            mm: "f16[3, 5]" = aten.mm.default(narrow, narrow_1)
            mark_overflow: "f16[3, 5]" = rampde_fx.mark_overflow.default(mm, [])
            add: "f16[3, 5]" = aten.add.Tensor(mark_overflow, t)
            mark_overflow_1: "f16[3, 5]" = rampde_fx.mark_overflow.default(add, [t])
            tanh: "f16[3, 5]" = aten.tanh.default(mark_overflow_1)
            _to_copy: "f32[3, 5]" = aten._to_copy.default(tanh, dtype = torch.float32)
            return (_to_copy,)
""",
        )

    def test_generate_adjoint(self):
        loop = after(hoist_invariants, partition_velocity, lower_velocity, generate_adjoint)
        self.assertExpectedInline(
            shown(loop, "adjoint"),
            """\
class GraphModule(torch.nn.Module):
    def forward(self, adjoint_args_0: "f32[3, 5]", args_0: "f32[3, 5]", t: "f32[]", dt: "f32[]", mul: "f32[5, 5]"):
        velocity_0_forward = self.velocity_0_forward(args_0, mul, t)
        residual_1_tanh: "f16[3, 5]" = velocity_0_forward[1]
        residual_1_t_1: "f16[5, 5]" = velocity_0_forward[2]
        mul_2: "f32[3, 5]" = aten.mul.Tensor(adjoint_args_0, dt)
        velocity_0_pullback = self.velocity_0_pullback(residual_1_tanh, residual_1_t_1, mul_2)
        grad_args_0: "f32[3, 5]" = velocity_0_pullback[0]
        adjoint_args_0_next: "f32[3, 5]" = aten.add.Tensor(adjoint_args_0, grad_args_0)
        return (adjoint_args_0_next,)
    class velocity_0_forward(torch.nn.Module):
        def forward(self, y: "f32[3, 5]", mul: "f32[5, 5]", t: "f32[]"):
            narrow: "f16[3, 5]" = rampde_fx.narrow.default(y, dtype = torch.float16)
            narrow_1: "f16[5, 5]" = rampde_fx.narrow.default(mul, dtype = torch.float16)
            mm: "f16[3, 5]" = aten.mm.default(narrow, narrow_1)
            mark_overflow: "f16[3, 5]" = rampde_fx.mark_overflow.default(mm, [])
            add: "f16[3, 5]" = aten.add.Tensor(mark_overflow, t)
            mark_overflow_1: "f16[3, 5]" = rampde_fx.mark_overflow.default(add, [t])
            tanh: "f16[3, 5]" = aten.tanh.default(mark_overflow_1)
            _to_copy: "f32[3, 5]" = aten._to_copy.default(tanh, dtype = torch.float32)
            t_1: "f16[5, 5]" = aten.t.default(narrow_1)
            return (_to_copy, tanh, t_1)
    class velocity_0_pullback(torch.nn.Module):
        def forward(self, tanh: "f16[3, 5]", t_1: "f16[5, 5]", cotangent_0: "f32[3, 5]"):
            _to_copy_1: "f16[3, 5]" = aten._to_copy.default(cotangent_0, dtype = torch.float16)
            tanh_backward: "f16[3, 5]" = aten.tanh_backward.default(_to_copy_1, tanh)
            mm_1: "f16[3, 5]" = aten.mm.default(tanh_backward, t_1)
            _to_copy_2: "f32[3, 5]" = aten._to_copy.default(mm_1, dtype = torch.float32)
            return (_to_copy_2,)
""",
        )
        assert loop.adjoint.inputs == (Cotangent(0), *map(Operand, range(4)))
        assert loop.adjoint.results == (Gradient(0),)

    def test_a_view_that_enlarges_is_cast_before_it_is_one(self):
        @rampde_fx.mixed_precision(dtype=torch.float16)
        def batched(y, w, t):
            for _, dt in rampde_fx.steps(t):
                z = torch.tanh(y)[:, None, :] * w.t()
                y = y + dt * (z @ w.t().expand(3, 5, 5)).sum(1)
            return y

        arguments = torch.zeros(3, 5, requires_grad=True), torch.ones(5, 5, requires_grad=True), ARGUMENTS[-1]

        def run(graph_module):
            return lower_velocity(partition_velocity(hoist_invariants(rolled(graph_module)))).step

        step = through(run, arguments, batched)
        velocity = step.velocity_0
        casts = velocity.graph.find_nodes(op="call_function", target=torch.ops.rampde_fx.narrow.default)
        entering = [node for node in casts if node.args[0].op == "placeholder"]
        assert [tuple(graphs.value(node).shape) for node in graphs.placeholders(velocity)] == [(5, 5), (3, 5)]
        assert sorted(tuple(graphs.value(node).shape) for node in entering) == [(3, 5), (5, 5)]
        (product,) = velocity.graph.find_nodes(op="call_function", target=aten.bmm.default)
        weight = product.args[1]
        assert graphs.value(weight).stride(0) == 0 and graphs.value(weight).dtype is torch.float16
        flow_step = after(hoist_invariants, partition_velocity).step
        assert [find_taken_inside(nodes) for nodes in find_components(flow_step)] == [[]]

    def test_scale_adjoint(self):
        loop = after(hoist_invariants, partition_velocity, lower_velocity, generate_adjoint, scale_adjoint)
        calls = "\n".join(line for line in shown(loop, "adjoint").split("\n") if "class " not in line)
        self.assertExpectedInline(
            calls.split("    def forward(self, y")[0],
            """\
    def forward(self, adjoint_args_0: "f32[3, 5]", args_0: "f32[3, 5]", t: "f32[]", dt: "f32[]", mul: "f32[5, 5]", target: "f32[]"):
        velocity_0_forward = self.velocity_0_forward(args_0, mul, t)
        residual_1_tanh: "f16[3, 5]" = velocity_0_forward[1]
        residual_1_t_1: "f16[5, 5]" = velocity_0_forward[2]
        mul_2: "f32[3, 5]" = aten.mul.Tensor(adjoint_args_0, dt)
        adjoint_scale_0 = self.adjoint_scale_0(target, mul_2)
        scale_0: "f32[]" = adjoint_scale_0[0]
        vanished: "f32[]" = adjoint_scale_0[1]
        mul_2_scaled: "f32[3, 5]" = aten.mul.Tensor(mul_2, scale_0)
        velocity_0_pullback = self.velocity_0_pullback(residual_1_tanh, residual_1_t_1, mul_2_scaled)
        grad_args_0: "f32[3, 5]" = velocity_0_pullback[0]
        grad_args_0_unscaled: "f32[3, 5]" = aten.div.Tensor(grad_args_0, scale_0)
        adjoint_args_0_next: "f32[3, 5]" = aten.add.Tensor(adjoint_args_0, grad_args_0_unscaled)
        return (adjoint_args_0_next, vanished)
    """,
        )
        assert loop.adjoint.inputs[-1] == Target()

    def test_watch_adjoint(self):
        passes = hoist_invariants, partition_velocity, lower_velocity, generate_adjoint, scale_adjoint
        loop = after(*passes, lambda loop: watch_adjoint(replace(loop, monitored=True)))
        calls = "\n".join(line for line in shown(loop, "adjoint").split("\n") if "class " not in line)
        self.assertExpectedInline(
            calls.split("    def forward(self, y")[0],
            """\
    def forward(self, adjoint_args_0: "f32[3, 5]", args_0: "f32[3, 5]", t: "f32[]", dt: "f32[]", mul: "f32[5, 5]", target: "f32[]"):
        velocity_0_forward = self.velocity_0_forward(args_0, mul, t)
        residual_1_tanh: "f16[3, 5]" = velocity_0_forward[1]
        residual_1_t_1: "f16[5, 5]" = velocity_0_forward[2]
        mul_2: "f32[3, 5]" = aten.mul.Tensor(adjoint_args_0, dt)
        adjoint_scale_0 = self.adjoint_scale_0(target, mul_2)
        scale_0: "f32[]" = adjoint_scale_0[0]
        vanished: "f32[]" = adjoint_scale_0[1]
        mul_2_scaled: "f32[3, 5]" = aten.mul.Tensor(mul_2, scale_0)
        velocity_0_pullback = self.velocity_0_pullback(residual_1_tanh, residual_1_t_1, mul_2_scaled)
        grad_args_0: "f32[3, 5]" = velocity_0_pullback[0]
        adjoint_statistics_0 = self.adjoint_statistics_0(scale_0, mul_2, grad_args_0)
        statistics: "f32[5]" = adjoint_statistics_0[0]
        grad_args_0_unscaled: "f32[3, 5]" = aten.div.Tensor(grad_args_0, scale_0)
        adjoint_args_0_next: "f32[3, 5]" = aten.add.Tensor(adjoint_args_0, grad_args_0_unscaled)
        stack_default: "f32[1, 5]" = aten.stack.default([statistics])
        return (adjoint_args_0_next, vanished, stack_default)
    """,
        )
        assert loop.adjoint.results == (Gradient(0), Vanished(), Statistics())
        unwatched = after(*passes)
        assert watch_adjoint(unwatched).adjoint is unwatched.adjoint

    def test_widen_gradients(self):
        before = after(hoist_invariants, partition_velocity, lower_velocity, generate_adjoint)
        loop = after(hoist_invariants, partition_velocity, lower_velocity, generate_adjoint, widen_gradients)
        kinds = [
            [str(n.meta["val"].dtype) for n in module.graph.find_nodes(op="call_function", target=aten.mm.default)]
            for module in (before.adjoint.module.velocity_0_pullback, loop.adjoint.module.velocity_0_pullback)
        ]
        assert kinds == [["torch.float16"], ["torch.float32"]]
        assert find_sums(loop.adjoint.module.velocity_0_pullback) == {}

    def test_a_weight_makes_one_product_for_a_whole_batch(self):
        """As in eager, where the weight needs a gradient: else one product, and one weight gradient, for each entry."""

        @rampde_fx.mixed_precision(dtype=torch.float16)
        def batched(y, w, t):
            for _, dt in rampde_fx.steps(t):
                z = torch.tanh(y)[:, None, :] * w.t()
                y = y + dt * torch.nn.functional.linear(z, w).sum(1)
            return y

        arguments = torch.zeros(3, 5, requires_grad=True), torch.ones(5, 5, requires_grad=True), ARGUMENTS[-1]

        def run(graph_module):
            return generate_adjoint(lower_velocity(partition_velocity(hoist_invariants(rolled(graph_module)))))

        loop = through(run, arguments, batched)
        products = [
            [tuple(graphs.value(factor).shape) for factor in node.args]
            for module in (loop.step.velocity_0, loop.adjoint.module.velocity_0_pullback)
            for node in graphs.body(module)
            if operator_table.is_product(node)
        ]
        assert products == [[(15, 5), (5, 5)], [(5, 15), (15, 5)], [(15, 5), (5, 5)]]

    def test_widen_the_sums_of_a_weight_that_is_read_twice(self):
        def traced(_):
            with fake_tensors.fake_mode():
                factors = [torch.empty(shape, dtype=torch.float16) for shape in ((3, 7), (3, 5), (7,), (7, 5))]

            def pullback(y, b, c, d):
                weight = (b.t() @ y).t() + y.t() @ b + d
                return [weight.float(), (y @ c + y.sum(1)).float(), torch.relu(y.t() @ b).float()]

            module = tracing.trace(pullback, factors)
            return printed(with_wide_sums(module, find_sums(module)))

        self.assertExpectedInline(
            through(traced),
            """\
class GraphModule(torch.nn.Module):
    def forward(self, y_1: "f16[3, 7]", b_1: "f16[3, 5]", c_1: "f16[7]", d_1: "f16[7, 5]"):
        t: "f16[5, 3]" = aten.t.default(b_1)
        _to_copy_default: "f32[5, 3]" = aten._to_copy.default(t, dtype = torch.float32)
        _to_copy_default_1: "f32[3, 7]" = aten._to_copy.default(y_1, dtype = torch.float32)
        mm: "f32[5, 7]" = aten.mm.default(_to_copy_default, _to_copy_default_1)
        t_1: "f32[7, 5]" = aten.t.default(mm)
        t_2: "f16[7, 3]" = aten.t.default(y_1)
        _to_copy_default_2: "f32[7, 3]" = aten._to_copy.default(t_2, dtype = torch.float32)
        _to_copy_default_3: "f32[3, 5]" = aten._to_copy.default(b_1, dtype = torch.float32)
        mm_1: "f32[7, 5]" = aten.mm.default(_to_copy_default_2, _to_copy_default_3)
        add: "f32[7, 5]" = aten.add.Tensor(t_1, mm_1)
        _to_copy_default_4: "f32[7, 5]" = aten._to_copy.default(d_1, dtype = torch.float32)
        add_1: "f32[7, 5]" = aten.add.Tensor(add, _to_copy_default_4)
        _to_copy_default_5: "f32[3, 7]" = aten._to_copy.default(y_1, dtype = torch.float32)
        _to_copy_default_6: "f32[7]" = aten._to_copy.default(c_1, dtype = torch.float32)
        mv: "f32[3]" = aten.mv.default(_to_copy_default_5, _to_copy_default_6)
        sum_1: "f32[3]" = aten.sum.dim_IntList(y_1, [1], dtype = torch.float32)
        add_2: "f32[3]" = aten.add.Tensor(mv, sum_1)
        t_3: "f16[7, 3]" = aten.t.default(y_1)
        mm_2: "f16[7, 5]" = aten.mm.default(t_3, b_1)
        relu: "f16[7, 5]" = aten.relu.default(mm_2)
        _to_copy_2: "f32[7, 5]" = aten._to_copy.default(relu, dtype = torch.float32)
        return [add_1, add_2, _to_copy_2]
""",
        )

    def test_widen_gradients_by_device_and_dtype(self):
        def run(device, dtype):
            def traced(_):
                with fake_tensors.fake_mode():
                    factors = [torch.empty(shape, dtype=dtype, device=device) for shape in ((3, 7), (3, 5))]
                module = tracing.trace(lambda y, b: [(y.t() @ b).t().float(), b.sum(0).float()], factors)
                return printed(with_wide_sums(module, find_sums(module))).replace(
                    ", device = device(type='cuda', index=0)", ""
                )

            return through(traced)

        self.assertExpectedInline(
            run("cuda", torch.bfloat16),
            """\
class GraphModule(torch.nn.Module):
    def forward(self, y_1: "bf16[3, 7]", b_1: "bf16[3, 5]"):
        t: "bf16[7, 3]" = aten.t.default(y_1)
        mm: "f32[7, 5]" = aten.mm.dtype(t, b_1, torch.float32)
        t_1: "f32[5, 7]" = aten.t.default(mm)
        sum_1: "f32[5]" = aten.sum.dim_IntList(b_1, [0], dtype = torch.float32)
        return [t_1, sum_1]
""",
        )
        self.assertExpectedInline(
            run("cpu", torch.float16),
            """\
class GraphModule(torch.nn.Module):
    def forward(self, y_1: "f16[3, 7]", b_1: "f16[3, 5]"):
        t: "f16[7, 3]" = aten.t.default(y_1)
        _to_copy_default: "f32[7, 3]" = aten._to_copy.default(t, dtype = torch.float32)
        _to_copy_default_1: "f32[3, 5]" = aten._to_copy.default(b_1, dtype = torch.float32)
        mm: "f32[7, 5]" = aten.mm.default(_to_copy_default, _to_copy_default_1)
        t_1: "f32[5, 7]" = aten.t.default(mm)
        sum_1: "f32[5]" = aten.sum.dim_IntList(b_1, [0], dtype = torch.float32)
        return [t_1, sum_1]
""",
        )
        self.assertExpectedInline(
            run("cpu", torch.bfloat16),
            """\
class GraphModule(torch.nn.Module):
    def forward(self, y_1: "bf16[3, 7]", b_1: "bf16[3, 5]"):
        t: "bf16[7, 3]" = aten.t.default(y_1)
        mm: "bf16[7, 5]" = aten.mm.default(t, b_1)
        t_1: "bf16[5, 7]" = aten.t.default(mm)
        _to_copy: "f32[5, 7]" = aten._to_copy.default(t_1, dtype = torch.float32)
        sum_1: "f32[5]" = aten.sum.dim_IntList(b_1, [0], dtype = torch.float32)
        return [_to_copy, sum_1]
""",
        )

    def test_store_states(self):
        before, loop = after(*STEP_PASSES.passes[:-2]), after(*STEP_PASSES.passes[:-1])
        (slot,) = loop.slots
        assert isinstance(slot, StateSlot) and slot.carry == 0 and loop.adjoint.inputs[1] == Saved(0)
        kinds = {node.name: node.meta["val"].dtype for node in graphs.placeholders(loop.adjoint.module)}
        assert kinds["args_0"] is torch.float16 and kinds["adjoint_args_0"] is torch.float32
        assert len(graphs.body(loop.adjoint.module)) == len(graphs.body(before.adjoint.module)) + 1
        count, stored = graphs.results(loop.step)[1:]
        assert loop.counted and count.meta["val"].dtype is torch.int64
        assert stored.meta["val"].dtype is torch.float16 and stored.args[0].name == "args_0"

    def test_emit_loop(self):
        def run(graph_module):
            loop = rolled(graph_module)
            for step_pass in STEP_PASSES:
                loop = step_pass(loop)
            (call,) = [node for node in graph_module.graph.nodes if node.target == "loop_0"]
            emit_loop(graph_module, call, loop)
            graph_module.delete_submodule("loop_0")
            graph_module.recompile()
            return without_captured_inputs(printed(graph_module))

        self.assertExpectedInline(
            through(run),
            """\
class GraphModule(torch.nn.Module):
        getitem = l_args_3_[slice(0, 3, None)]
        clone = getitem.clone()
        getitem_1 = l_args_3_[slice(0, 3, None)]
        getitem_2 = l_args_3_[slice(1, 4, None)]
        sub = torch.sub(getitem_2, getitem_1)
        loop_0_preamble = self.loop_0_preamble(l_args_2_, l_args_1_)
        getitem_4 = loop_0_preamble[0]
        loop_0_forward = self.loop_0_forward
        loop_0_backward = self.loop_0_backward
        autograd_function_apply = higher_order.autograd_function_apply(loop_0_forward, loop_0_backward, l_args_0_, clone, sub, getitem_4, non_differentiable_idx = [1], saved_for_backward_idx = [0, 1, 2, 3])
        getitem_3: "f32[3, 5]" = autograd_function_apply[0]
        end: "f32[]" = rampde_fx.end(l_args_3_)
        return (getitem_3,)
    class loop_0_preamble(torch.nn.Module):
        def forward(self, args_2: "f32[5]", args_1: "f32[5, 5]"):
            mul: "f32[5, 5]" = aten.mul.Tensor(args_2, args_1)
            return (mul,)
    class loop_0_forward(torch.nn.Module):
        def forward(self, args_0: "f32[3, 5]", t: "f32[3]", dt: "f32[3]", mul: "f32[5, 5]"):
            clone: "f32[3, 5]" = aten.clone.default(args_0, memory_format = torch.contiguous_format)
            narrow: "f16[5, 5]" = rampde_fx.narrow.default(mul, dtype = torch.float16)
            abs_1: "f32[5, 5]" = aten.abs.default(mul)
            ne: "b8[5, 5]" = aten.ne.Scalar(abs_1, 0)
            lt: "b8[5, 5]" = aten.lt.Scalar(abs_1, 7.62939453125e-06)
            bitwise_and: "b8[5, 5]" = aten.bitwise_and.Tensor(ne, lt)
            sum_1: "i64[]" = aten.sum.default(bitwise_and)
            sum_2: "i64[]" = aten.sum.default(ne)
            amax: "f32[]" = aten.amax.default(abs_1)
            stack: "f32[1]" = aten.stack.default([amax])
            ne_1: "b8[1]" = aten.ne.Scalar(stack, 0)
            lt_1: "b8[1]" = aten.lt.Scalar(stack, 6.103515625e-05)
            bitwise_and_1: "b8[1]" = aten.bitwise_and.Tensor(ne_1, lt_1)
            sum_3: "i64[]" = aten.sum.default(bitwise_and_1)
            stack_1: "i64[3]" = aten.stack.default([sum_1, sum_2, sum_3])
            scan_combine_graph_0 = self.scan_combine_graph_0
            scan = higher_order.scan(scan_combine_graph_0, [clone], [t, dt], (narrow, stack_1))
            getitem: "f32[3, 5]" = scan[0]
            getitem_1: "i64[3, 3]" = scan[1]
            getitem_2: "f16[3, 3, 5]" = scan[2]
            sum_4: "i64[3]" = aten.sum.dim_IntList(getitem_1, [0])
            record_forward: "f32[]" = rampde_fx.record_forward.default(getitem, None, 3, 1, sum_4, 'test_passes.py')
            add: "f32[3, 5]" = aten.add.Tensor(getitem, record_forward)
            return ((add, getitem_1), (getitem_2, t, dt, mul))
        class scan_combine_graph_0(torch.nn.Module):
            def forward(self, arg0_1: "f32[3, 5]", arg1_1: "f32[]", arg2_1: "f32[]", arg3_1: "f16[5, 5]", arg4_1: "i64[3]"):
                narrow: "f16[3, 5]" = rampde_fx.narrow.default(arg0_1, dtype = torch.float16)
                mm: "f16[3, 5]" = aten.mm.default(narrow, arg3_1)
                mark_overflow: "f16[3, 5]" = rampde_fx.mark_overflow.default(mm, [])
                add: "f16[3, 5]" = aten.add.Tensor(mark_overflow, arg1_1)
                mark_overflow_1: "f16[3, 5]" = rampde_fx.mark_overflow.default(add, [arg1_1])
                tanh: "f16[3, 5]" = aten.tanh.default(mark_overflow_1)
                _to_copy: "f32[3, 5]" = aten._to_copy.default(tanh, dtype = torch.float32)
                mul: "f32[3, 5]" = aten.mul.Tensor(arg2_1, _to_copy)
                add_1: "f32[3, 5]" = aten.add.Tensor(arg0_1, mul)
                abs_1: "f32[3, 5]" = aten.abs.default(arg0_1)
                ne: "b8[3, 5]" = aten.ne.Scalar(abs_1, 0)
                lt: "b8[3, 5]" = aten.lt.Scalar(abs_1, 7.62939453125e-06)
                bitwise_and: "b8[3, 5]" = aten.bitwise_and.Tensor(ne, lt)
                sum_1: "i64[]" = aten.sum.default(bitwise_and)
                sum_2: "i64[]" = aten.sum.default(ne)
                amax: "f32[]" = aten.amax.default(abs_1)
                stack: "f32[1]" = aten.stack.default([amax])
                ne_1: "b8[1]" = aten.ne.Scalar(stack, 0)
                lt_1: "b8[1]" = aten.lt.Scalar(stack, 6.103515625e-05)
                bitwise_and_1: "b8[1]" = aten.bitwise_and.Tensor(ne_1, lt_1)
                sum_3: "i64[]" = aten.sum.default(bitwise_and_1)
                stack_1: "i64[3]" = aten.stack.default([sum_1, sum_2, sum_3])
                add_2: "i64[3]" = aten.add.Tensor(stack_1, arg4_1)
                narrow_1: "f16[3, 5]" = rampde_fx.narrow.default(arg0_1, dtype = torch.float16)
                clone: "f32[3, 5]" = aten.clone.default(add_1, memory_format = torch.contiguous_format)
                clone_1: "i64[3]" = aten.clone.default(add_2, memory_format = torch.contiguous_format)
                clone_2: "f16[3, 5]" = aten.clone.default(narrow_1, memory_format = torch.contiguous_format)
                return [clone, clone_1, clone_2]
    class loop_0_backward(torch.nn.Module):
        def forward(self, adjoint_args_0: "f32[3, 5]", cotangent_0: "i64[3, 3]", stored_args_0: "f16[3, 3, 5]", t: "f32[3]", dt: "f32[3]", mul: "f32[5, 5]"):
            ne: "b8[3, 3, 5]" = aten.ne.Tensor(stored_args_0, stored_args_0)
            any_1: "b8[]" = aten.any.default(ne)
            stack: "b8[1]" = aten.stack.default([any_1])
            any_2: "b8[]" = aten.any.default(stack)
            logical_not: "b8[]" = aten.logical_not.default(any_2)
            abs_1: "f32[3, 5]" = aten.abs.default(adjoint_args_0)
            lt: "b8[3, 5]" = aten.lt.Scalar(abs_1, inf)
            all_1: "b8[]" = aten.all.default(lt)
            stack_1: "b8[1]" = aten.stack.default([all_1])
            all_2: "b8[]" = aten.all.default(stack_1)
            bitwise_and: "b8[]" = aten.bitwise_and.Tensor(all_2, logical_not)
            full: "f32[]" = aten.full.default([], 1.0, dtype = torch.float32, device = device(type='cpu'), pin_memory = False)
            zeros: "f32[3, 5]" = aten.zeros.default([3, 5], dtype = torch.float32, device = device(type='cpu'), pin_memory = False)
            zeros_1: "i64[]" = aten.zeros.default([], dtype = torch.int64, device = device(type='cpu'), pin_memory = False)
            ones: "b8[]" = aten.ones.default([], dtype = torch.bool, device = device(type='cpu'), pin_memory = False)
            while_loop_cond_graph_0 = self.while_loop_cond_graph_0
            while_loop_body_graph_0 = self.while_loop_body_graph_0
            while_loop = higher_order.while_loop(while_loop_cond_graph_0, while_loop_body_graph_0, (zeros_1, ones, full, zeros), (adjoint_args_0, cotangent_0, stored_args_0, t, dt, mul, bitwise_and))
            getitem: "i64[]" = while_loop[0]
            getitem_3: "f32[3, 5]" = while_loop[3]
            scalar_tensor: "f32[]" = aten.scalar_tensor.default(nan, dtype = torch.float32)
            where: "f32[3, 5]" = aten.where.self(logical_not, getitem_3, scalar_tensor)
            record_backward: "f32[]" = rampde_fx.record_backward.default(where, None, 3, 1, getitem, 'test_passes.py')
            add: "f32[3, 5]" = aten.add.Tensor(where, record_backward)
            return (add, None, None, None)
        class while_loop_cond_graph_0(torch.nn.Module):
            def forward(self, arg0_1: "i64[]", arg1_1: "b8[]", arg2_1: "f32[]", arg3_1: "f32[3, 5]", arg4_1: "f32[3, 5]", arg5_1: "i64[3, 3]", arg6_1: "f16[3, 3, 5]", arg7_1: "f32[3]", arg8_1: "f32[3]", arg9_1: "f32[5, 5]", arg10_1: "b8[]"):
                lt: "b8[]" = aten.lt.Scalar(arg0_1, 3)
                bitwise_and: "b8[]" = aten.bitwise_and.Tensor(arg1_1, lt)
                return bitwise_and
        class while_loop_body_graph_0(torch.nn.Module):
            def forward(self, arg0_1: "i64[]", arg1_1: "b8[]", arg2_1: "f32[]", arg3_1: "f32[3, 5]", arg4_1: "f32[3, 5]", arg5_1: "i64[3, 3]", arg6_1: "f16[3, 3, 5]", arg7_1: "f32[3]", arg8_1: "f32[3]", arg9_1: "f32[5, 5]", arg10_1: "b8[]"):
                clone: "f32[]" = aten.clone.default(arg2_1)
                narrow: "f16[5, 5]" = rampde_fx.narrow.default(arg9_1, dtype = torch.float16)
                t: "f16[5, 5]" = aten.t.default(narrow)
                _to_copy: "f32[5, 5]" = aten._to_copy.default(t, dtype = torch.float32)
                clone_1: "f32[3, 5]" = aten.clone.default(arg4_1, memory_format = torch.contiguous_format)
                arange: "i64[3]" = aten.arange.start_step(2, -1, -1, device = device(type='cpu'), pin_memory = False)
                scan_combine_graph_0 = self.scan_combine_graph_0
                scan = higher_order.scan(scan_combine_graph_0, [clone_1], [arange], (arg6_1, arg7_1, arg8_1, clone, narrow, _to_copy))
                getitem: "f32[3, 5]" = scan[0]
                getitem_1: "f32[3]" = scan[1]
                flip: "f32[3]" = aten.flip.default(getitem_1, [0])
                lt: "b8[]" = aten.lt.Scalar(arg2_1, 0)
                where: "f32[3, 5]" = aten.where.self(lt, arg3_1, getitem)
                sum_1: "f32[]" = aten.sum.default(flip)
                abs_1: "f32[3, 5]" = aten.abs.default(where)
                lt_1: "b8[3, 5]" = aten.lt.Scalar(abs_1, inf)
                all_1: "b8[]" = aten.all.default(lt_1)
                stack: "b8[1]" = aten.stack.default([all_1])
                all_2: "b8[]" = aten.all.default(stack)
                bitwise_not: "b8[]" = aten.bitwise_not.default(all_2)
                bitwise_and: "b8[]" = aten.bitwise_and.Tensor(arg10_1, bitwise_not)
                eq: "b8[3, 5]" = aten.eq.Scalar(where, 0)
                all_3: "b8[]" = aten.all.default(eq)
                bitwise_and_1: "b8[]" = aten.bitwise_and.Scalar(all_3, True)
                stack_1: "b8[1]" = aten.stack.default([bitwise_and_1])
                sum_2: "i64[]" = aten.sum.default(stack_1)
                _to_copy_1: "f32[]" = aten._to_copy.default(bitwise_and, dtype = torch.float32)
                _to_copy_2: "f32[]" = aten._to_copy.default(sum_2, dtype = torch.float32)
                stack_2: "f32[3]" = aten.stack.default([_to_copy_1, sum_1, _to_copy_2])
                record_sweep: "b8[]" = rampde_fx.record_sweep.default(stack_2, arg0_1, 3, 'test_passes.py')
                add: "i64[]" = aten.add.Tensor(arg0_1, 1)
                mul: "f32[]" = aten.mul.Tensor(arg2_1, 0.00390625)
                return (add, record_sweep, mul, where)
            class scan_combine_graph_0(torch.nn.Module):
                def forward(self, arg0_1: "f32[3, 5]", arg1_1: "i64[]", arg2_1: "f16[3, 3, 5]", arg3_1: "f32[3]", arg4_1: "f32[3]", arg5_1: "f32[]", arg6_1: "f16[5, 5]", arg7_1: "f32[5, 5]"):
                    index: "f16[3, 5]" = aten.index.Tensor(arg2_1, [arg1_1])
                    index_1: "f32[]" = aten.index.Tensor(arg3_1, [arg1_1])
                    index_2: "f32[]" = aten.index.Tensor(arg4_1, [arg1_1])
                    mm: "f16[3, 5]" = aten.mm.default(index, arg6_1)
                    mark_overflow: "f16[3, 5]" = rampde_fx.mark_overflow.default(mm, [])
                    add: "f16[3, 5]" = aten.add.Tensor(mark_overflow, index_1)
                    mark_overflow_1: "f16[3, 5]" = rampde_fx.mark_overflow.default(add, [index_1])
                    tanh: "f16[3, 5]" = aten.tanh.default(mark_overflow_1)
                    mul: "f32[3, 5]" = aten.mul.Tensor(arg0_1, index_2)
                    abs_1: "f32[3, 5]" = aten.abs.default(mul)
                    amax: "f32[]" = aten.amax.default(abs_1)
                    view: "i32[]" = aten.view.dtype(amax, torch.int32)
                    detach: "i32[]" = aten.detach.default(view)
                    bitwise_and: "i32[]" = aten.bitwise_and.Scalar(detach, 2139095040)
                    view_1: "f32[]" = aten.view.dtype(bitwise_and, torch.float32)
                    detach_1: "f32[]" = aten.detach.default(view_1)
                    clamp: "f32[]" = aten.clamp.default(detach_1, 1.1754943508222875e-38)
                    div: "f32[]" = aten.div.Tensor(arg5_1, clamp)
                    clamp_1: "f32[]" = aten.clamp.default(div, None, 1.329227995784916e+36)
                    abs_2: "f32[]" = aten.abs.default(amax)
                    ne: "b8[]" = aten.ne.Scalar(abs_2, inf)
                    eq: "b8[]" = aten.eq.Tensor(amax, amax)
                    mul_1: "b8[]" = aten.mul.Tensor(eq, ne)
                    ones_like: "f32[]" = aten.ones_like.default(clamp_1, pin_memory = False)
                    where: "f32[]" = aten.where.self(mul_1, clamp_1, ones_like)
                    mul_2: "f32[3, 5]" = aten.mul.Tensor(mul, where)
                    abs_3: "f32[3, 5]" = aten.abs.default(mul_2)
                    ne_1: "b8[3, 5]" = aten.ne.Scalar(abs_3, 0)
                    le: "b8[3, 5]" = aten.le.Scalar(abs_3, 2.9802322387695312e-08)
                    bitwise_and_1: "b8[3, 5]" = aten.bitwise_and.Tensor(ne_1, le)
                    sum_1: "i64[]" = aten.sum.default(bitwise_and_1)
                    _to_copy: "f32[]" = aten._to_copy.default(sum_1, dtype = torch.float32)
                    _to_copy_1: "f16[3, 5]" = aten._to_copy.default(mul_2, dtype = torch.float16)
                    tanh_backward: "f16[3, 5]" = aten.tanh_backward.default(_to_copy_1, tanh)
                    _to_copy_2: "f32[3, 5]" = aten._to_copy.default(tanh_backward, dtype = torch.float32)
                    mm_1: "f32[3, 5]" = aten.mm.default(_to_copy_2, arg7_1)
                    div_1: "f32[3, 5]" = aten.div.Tensor(mm_1, where)
                    add_1: "f32[3, 5]" = aten.add.Tensor(arg0_1, div_1)
                    clone: "f32[3, 5]" = aten.clone.default(add_1, memory_format = torch.contiguous_format)
                    clone_1: "f32[]" = aten.clone.default(_to_copy, memory_format = torch.contiguous_format)
                    return [clone, clone_1]
""",
        )
