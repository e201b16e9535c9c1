"""Faults of the reference package, EmoryMLIP/rampde (arXiv 2510.23498): ours has none, and the checks would notice.

Every fault has a check of numbers, and a variant of our own code with that fault in it. The check passes on our code
(test_ours_has_not) and fails on the variant (test_check_notices). All run the rewritten graph as it is, by the compiler
"eager": the faults are in the rewrite, and AOTAutograd and Inductor have tests of their own.

Tolerances are a few unit roundoffs u of the velocity dtype: a velocity and its VJP round O(1) times an evaluation, the
steps are short, and all sums are fp32. Where low precision rounds nothing, numbers must be equal.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from unittest import mock

import pytest
import torch
from torch import fx, nn

import rampde_fx
from rampde_fx import backend, errors
from rampde_fx.ir import decompositions, graphs
from rampde_fx.ir.ends import Cotangent, Target
from rampde_fx.ir.sources import InvariantSource
from rampde_fx.passes import emit_loop, generate_adjoint, roll_loop, scale_adjoint
from rampde_fx.policy import PrecisionPolicy
from rampde_fx.runtime import counts, operators
from rampde_fx.torch_private.higher_order import scan_op, while_loop_op
from tests.comparison import compiled, relative_errors

steps = rampde_fx.steps
aten = torch.ops.aten
U16, U32 = 2.0**-11, 2.0**-24  # unit roundoffs of float16 and float32
FP16 = 5 * U16  # the bound of docs/numerics.md on gradients
T = torch.linspace(0, 1, 5)


class Layer(nn.Module):
    """y' = tanh(W y + b), the trajectory by Euler's method."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, y, t):
        states = []
        for _, dt in steps(t):
            y = y + dt * torch.tanh(self.linear(y))
            states.append(y)
        return torch.stack(states)


def elementwise(y, t, w):
    for _, dt in steps(t):
        y = y + dt * torch.tanh(w * y)
    return y


def mixed(function, dtype=torch.float16, **policy):
    return compiled(copy.deepcopy(function), dtype, "eager", **policy)


def leaves(*shapes):
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


def assert_gradients_agree(function, loss, inputs, bound=FP16, dtype=torch.float16, **policy):
    """The mixed-precision gradients of a loss agree with eager's: those of the inputs and of a module's parameters."""
    twin, found = copy.deepcopy(function), []
    for run, owner in ((compiled(twin, dtype, "eager", **policy), twin), (function, function)):
        parameters = owner.parameters() if isinstance(owner, nn.Module) else []
        wanted = [x for x in (*inputs, *parameters) if x.requires_grad]
        found.append(torch.autograd.grad(loss(run(*inputs)), wanted, allow_unused=True, materialize_grads=True))
    assert max(relative_errors(*found)) < bound, relative_errors(*found)


def replace_pass(patch, old, new):
    patch.setattr(
        backend, "STEP_PASSES", tuple(new if step_pass is old else step_pass for step_pass in backend.STEP_PASSES)
    )


def replace_scale(patch, scales):
    """Let the scale of every VJP of a step be scales(given, loop)[step] instead of one of its own.

    given maps Cotangent(i) to the gradient of result i of the loop, and Target() to the target.
    """
    sweep, is_stepwise = emit_loop._Backward._sweep, emit_loop._Backward._is_stepwise

    def sweep_with_scales(self, given):
        return sweep(self, {**given, Target(): scales(given, self.loop)})

    patch.setattr(emit_loop._Backward, "_sweep", sweep_with_scales)
    patch.setattr(
        emit_loop._Backward, "_is_stepwise", lambda self, entry: entry == Target() or is_stepwise(self, entry)
    )
    patch.setattr(scale_adjoint, "power_of_two_scale", lambda target, *_: target.clone())


# 1. The increment is formed in low precision: small steps vanish.


def check_small_increments():
    def line(y, t):
        for _, dt in steps(t):
            y = y + dt * torch.cos(0 * y)  # 1, in float16 too
        return y

    n, dt = 32, 1e-4
    moved = mixed(line)(torch.ones(3), torch.linspace(0, n * dt, n + 1)) - 1
    assert (moved - n * dt).abs().max() < n * U32 + U16 * n * dt  # every fp32 sum near 1 rounds by u at most


def increments_are_velocity(patch):
    """partition_velocity takes the states' sums for velocity: y + dt * k is one evaluation, in low precision."""
    partition = backend.partition_velocity

    def broken(loop):
        loop = partition(loop)
        for node in graphs.body(loop.step):
            if node.meta["role"] == "state":
                node.meta.update(role="velocity", rank=0)
        return loop

    replace_pass(patch, partition, broken)


# 2. The trajectory is returned in low precision; a float16 state above 65504 becomes inf.


def check_trajectory_is_wide():
    def line(y, t):
        states = []
        for _, dt in steps(t):
            y = y + dt * torch.sign(y)
            states.append(y)
        return torch.stack(states)

    y, t = torch.ones(3), torch.arange(9) * 2.0**-10  # every state is exact in fp32; bfloat16's spacing is 2^-7
    assert torch.equal(mixed(line, torch.bfloat16)(y, t), line(y, t))


def trajectory_is_rounded(patch):
    """What a step returns beside its next states is rounded to the velocity dtype after lower_velocity."""
    lower = backend.lower_velocity

    def broken(loop):
        loop = lower(loop)
        graph, output = loop.step.graph, loop.step.graph.output_node()
        with graph.inserting_before(output):
            low = [
                graph.call_function(aten._to_copy.default, (node,), {"dtype": loop.policy.velocity})
                for node in output.args[0][loop.carries :]
            ]
            wide = [graph.call_function(aten._to_copy.default, (node,), {"dtype": torch.float32}) for node in low]
        output.args = ((*output.args[0][: loop.carries], *wide),)
        return replace(loop, step=graphs.refresh(loop.step))

    replace_pass(patch, lower, broken)


def check_large_states_are_stored():
    inputs = [torch.full((3,), 7e4, requires_grad=True), T, torch.full((3,), 2.0**-16, requires_grad=True)]
    policy = {"storage": torch.float16, "storage_scaling": "dynamic"}
    # The derivative is read at a stored state: one rounding, which 1 / cosh^2 near 1 does not double.
    assert_gradients_agree(elementwise, torch.sum, inputs, 2 * U16, torch.float32, **policy)


def stored_states_are_not_scaled(patch):
    """PrecisionPolicy.scales_storage is False whatever the policy says."""
    patch.setattr(PrecisionPolicy, "scales_storage", property(lambda self: False))


def check_large_states_are_loud():
    function, t, w = mixed(elementwise), 1000 * T, torch.full((3,), 2.0**-16)
    within = torch.full((3,), 6e4)
    assert max(relative_errors([function(within, t, w) - within], [elementwise(within, t, w) - within])) < FP16
    assert function(torch.full((3,), 7e4), t, w).isnan().all()  # tanh(inf) = 1 would be a wrong number


def states_are_cast_to_inf(patch):
    """The operator narrow is a plain cast, so that a state beyond 65504 enters the velocity as inf."""
    patch.setattr(operators, "_mark_overflow", lambda x, operands: x)


# 3. The loss gradient reaches the solver in float16.


def check_small_losses():
    model, y = Layer(), torch.randn(4, 3, requires_grad=True)
    function, wanted = mixed(model), torch.autograd.grad(model(y, T)[-1].sum(), y)
    for scale in (1e-7, 1e-9):
        (got,) = torch.autograd.grad(scale * function(y, T)[-1].sum(), y)
        assert max(relative_errors([got / scale], wanted)) < FP16


def incoming_gradients_are_narrow(patch):
    """The cotangents of the loop's results are rounded to float16."""
    run = emit_loop._Backward.run

    def broken(self, *args):
        count = self.loop.carries + len(self.emission.outputs)
        return run(self, *(x.to(torch.float16).to(x.dtype) for x in args[:count]), *args[count:])

    patch.setattr(emit_loop._Backward, "run", broken)


# 4. The scale is initialised from the gradient at the last time: a loss that does not touch y(T) fails.


def check_loss_on_an_inner_state():
    assert_gradients_agree(Layer(), lambda states: states[1].square().mean(), [*leaves((4, 3)), T])


def scale_of_the_last_time(patch):
    """One scale for all steps, of the gradient at the last time."""

    def scales(given, loop):
        cotangents = [(e.result, v) for e, v in given.items() if isinstance(e, Cotangent) and v.is_floating_point()]
        last = sum(value if i < loop.carries else value[-1] for i, value in cotangents)
        return (given[Target()] / 2.0 ** torch.floor(torch.log2(last.abs().amax()))).expand(loop.steps)

    replace_scale(patch, scales)


# 5. The scale is raised by looking at the unscaled adjoint: it doubles until it overflows.


class Watching(fx.Interpreter):
    """Runs an adjoint and keeps the largest magnitude of what each pullback is given."""

    def __init__(self, adjoint):
        super().__init__(adjoint)
        self.largest = []

    def call_module(self, target, args, kwargs):
        if target.endswith("_pullback"):
            self.largest.append(args[-1].abs().max().item())
        return super().call_module(target, args, kwargs)


def check_scale_follows_the_adjoint():
    model, y, t = Layer(), torch.randn(4, 3), torch.linspace(0, 1, 21)  # 2^20 is beyond float16
    function = compiled(model, torch.float16, "eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    counts.backward_counts(reset=True)
    for _ in range(10):
        optimizer.zero_grad()
        function(y, t).square().sum().backward()
        optimizer.step()
    (count,) = counts.backward_counts(reset=True).values()
    assert (count.passes, count.repeated) == (10, 0)
    (loop,) = rampde_fx.explain(model, y, t).loops
    for magnitude in (1e-12, 1.0, 1e12):
        values = []
        for node in graphs.placeholders(loop.adjoint):
            like, cotangent = node.meta["val"], node.name.startswith(("adjoint", "cotangent"))
            value = torch.rand(like.shape).to(like.dtype) * (magnitude if cotangent else 1.0)
            values.append(torch.tensor(loop.target) if node.name == "target" else value)
        watching = Watching(loop.adjoint)
        watching.run(*values)
        assert watching.largest and all(loop.target <= x < 2 * loop.target for x in watching.largest)


def scale_doubles_every_step(patch):
    """The scale doubles from step to step of the reverse loop, whatever the scaled adjoint is."""
    replace_scale(patch, lambda given, loop: given[Target()] * 2.0 ** torch.arange(loop.steps - 1, -1, -1))


# 6. N (2 P + 4) + 4 host synchronisations in a backward, of N steps and P parameters.


def host_reads(graph_module, repeated):
    """How often a run of the graph hands a device's value to the host; a scan's body counts so many times."""
    total = 0
    for node in graph_module.graph.nodes:
        if node.target is scan_op:
            total += repeated * host_reads(graph_module.get_submodule(node.args[0].target), repeated)
        elif node.target is while_loop_op:  # one attempt
            total += sum(host_reads(graph_module.get_submodule(arg.target), repeated) for arg in node.args[:2])
        elif node.op == "call_function":
            read, made = ([graphs.value(n) for n in nodes] for nodes in (node.all_input_nodes, [node]))
            total += any(map(on_device, read)) and not all(map(on_device, torch.utils._pytree.tree_leaves(made)))
    return total


def on_device(value):
    return isinstance(value, torch.Tensor) and value.device.type != "cpu"


def check_host_reads():
    class Deep(nn.Module):
        def __init__(self, layers):
            super().__init__()
            self.net = nn.Sequential(*(nn.Linear(3, 3) for _ in range(layers)))

        def forward(self, y, t):
            for _, dt in steps(t):
                y = y + dt * torch.tanh(self.net(y))
            return y

    def inspect(graph_module, _):
        backend.rewrite(graph_module)
        found.append(host_reads(graph_module.get_submodule("loop_0_backward"), n))
        return graph_module.forward

    found = []
    for n, layers in ((3, 1), (7, 3)):
        torch._dynamo.reset()
        model = rampde_fx.mixed_precision(
            Deep(layers).to("meta"), dtype=torch.float16
        )  # stands for a device: nothing is computed
        y = torch.empty(4, 3, device="meta", requires_grad=True)
        torch.compile(model, backend=inspect, fullgraph=True)(y, torch.empty(n + 1, device="meta"))
    assert found == [1, 1]  # the overflow flag, once an attempt


def scales_and_flags_are_read_on_the_host(patch):
    """Every scale, and the flag of every gradient, goes by way of the host."""
    scale = scale_adjoint.power_of_two_scale
    patch.setattr(scale_adjoint, "power_of_two_scale", lambda *args: scale(*args).to("cpu").to(args[1].device))
    patch.setattr(
        emit_loop,
        "finite",
        lambda tensors: torch.stack([x.isfinite().all().to("cpu") for x in tensors]).all().to(tensors[0].device),
    )


# 7. The fp32 path adds into the caller's gradient tensor.


def check_callers_gradient_is_untouched():
    model, y, t = Layer(), torch.randn(4, 3, requires_grad=True), torch.linspace(0, 1, 3)

    def last(y, t):
        for _, dt in steps(t):
            y = y + dt * torch.tanh(model.linear(y))
        return y

    z = y.detach().clone().requires_grad_()
    branch = 1.0 * z  # made before the loop, so that its backward runs after the loop's
    out = compiled(last, torch.float32, "eager")(y, t) + branch
    given, kept = torch.ones_like(out), torch.ones_like(out)
    found = [torch.autograd.grad(out, (y, z), given, retain_graph=True) for _ in range(2)]
    assert torch.equal(given, kept)
    wanted = (torch.autograd.grad(last(y, t), y, kept)[0], kept)
    # fp32 throughout, in another order of the sums: a rounding or two for each of the two steps.
    assert all(max(relative_errors(list(got), list(wanted))) < 8 * U32 for got in found)


def adjoints_are_added_in_place(patch):
    """The reverse loop starts in the caller's tensor, and adds a step's increment into it."""

    def add_into(self, before, cotangent):
        if before is None or cotangent is None:
            return cotangent if before is None else before
        target = aten.add_.Tensor if before.op == "placeholder" else aten.add.Tensor
        return self.graph.call_function(target, (before, cotangent))

    patch.setattr(generate_adjoint._Transposition, "_sum", add_into)
    patch.setattr("rampde_fx.emit.recurrence.owned", lambda value: value)


# 8. It crashes on t.requires_grad with a batch, a frozen parameter, a plain function as velocity, and a 0-d state.


def check_gradient_of_t():
    # All terms of the sum over the entries have one sign: low precision costs no more here than elsewhere.
    y, t, w = (x.requires_grad_() for x in (1 + torch.rand(4, 3), T.clone(), torch.rand(3)))
    assert_gradients_agree(elementwise, torch.sum, [y, t, w])


def gradient_of_t_keeps_the_batch(patch):
    """The adjoint does not sum the gradient of a step size over the entries of the state."""
    generate = backend.generate_adjoint

    def broken(loop):
        loop = generate(loop)
        for node in graphs.body(loop.adjoint.module):
            if node.target in (aten.sum.dim_IntList, aten.sum.default):
                node.replace_all_uses_with(node.args[0])
        graphs.refresh(loop.adjoint.module)
        return loop

    replace_pass(patch, generate, broken)


def check_frozen_parameter():
    model = Layer()
    model.linear.bias.requires_grad_(False)
    assert_gradients_agree(model, lambda states: states[-1].sum(), [*leaves((4, 3)), T])


def frozen_parameters_are_differentiated(patch):
    """Derivatives are asked for by every floating operand that is no time, whether it requires a gradient or not."""
    differentiate = generate_adjoint._differentiate

    def broken(function, values, wanted, given):
        operands = [v.detach().requires_grad_() if i in wanted else v for i, v in enumerate(values)]
        outputs = function(*operands)
        flat = list(outputs) if isinstance(outputs, (tuple, list)) else [outputs]
        everything = [v for v in operands if isinstance(v, torch.Tensor) and v.is_floating_point() and v.ndim]
        torch.autograd.grad([flat[i] for i in given], everything, list(given.values()), allow_unused=True)
        return differentiate(function, values, wanted, given)

    patch.setattr(generate_adjoint, "_differentiate", broken)


def check_plain_function_as_velocity():
    y, w = leaves((4, 3), (3, 3))

    def velocity(y):
        return torch.tanh(y @ w)

    def flow(y, t, w):
        for _, dt in steps(t):
            y = y + dt * velocity(y)
        return y

    assert_gradients_agree(flow, torch.sum, [y, T, w])


def gradients_of_modules_alone(patch):
    """Of the tensors that all steps read, only a module's parameters have gradients."""
    make = roll_loop._loop

    def broken(marked, run, captured, count):
        loop = make(marked, run, captured, count)
        sources = zip(loop.needs_grad, captured.inputs, strict=True)
        wanted = tuple(
            need and (not isinstance(source, InvariantSource) or "parameters" in source.values[0].name)
            for need, source in sources
        )
        return replace(loop, plain_needs_grad=wanted, needs_grad=wanted, differentiated=any(wanted))

    patch.setattr(roll_loop, "_loop", broken)


def check_scalar_state():
    assert_gradients_agree(elementwise, torch.sum, [*leaves(()), T, *leaves(())])


def scale_expects_a_batch(patch):
    """The largest cotangent is looked for over the dimensions behind the batch."""
    scale = scale_adjoint.power_of_two_scale
    patch.setattr(scale_adjoint, "power_of_two_scale", lambda target, *v: scale(target, *(x.flatten(1) for x in v)))


# 9. Double backward is silently wrong.


def check_second_derivative():
    model, y, t = Layer(), torch.randn(4, 3, requires_grad=True), torch.linspace(0, 1, 3)
    found = []
    for function in (mixed(model, torch.float32), model):
        try:
            (gradient,) = torch.autograd.grad(function(y, t)[-1].sum(), y, create_graph=True)
            found.append(torch.autograd.grad(gradient.square().sum(), y, materialize_grads=True)[0])
        except errors.SecondDerivativeError:
            return
    assert max(relative_errors(found[:1], found[1:])) < 100 * U32


def second_derivatives_are_not_refused(patch):
    """The backend returns the compiled function without the check of its backward."""
    patch.setattr(backend, "_guarded", lambda compiled, loops: compiled)


# 10. Dropout masks are not replayed in the recomputation; BatchNorm's statistics are updated twice.


def check_dropout():
    def flow(y, t):
        for _, dt in steps(t):
            y = y + dt * nn.functional.dropout(torch.relu(y), 0.4)
        return y

    y = (1 + torch.rand(4, 3)).requires_grad_()
    out = mixed(flow, torch.float32)(y, T)
    (gradient,) = torch.autograd.grad(out.sum(), y)
    # The flow of a positive y is linear, entry by entry: y(T) is its derivative times y.
    assert max(relative_errors([gradient * y], [out])) < 3 * len(T) * U32


def masks_are_drawn_again(patch):
    """replay_random leaves the draws to torch's generator, in the recomputation as in the forward."""
    patch.setattr(backend, "replay_random", lambda captured: captured)


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3)

    def forward(self, y, t):
        for _, dt in steps(t):
            y = y + dt * self.norm(y)
        return y


def check_batch_norm():
    eager = Normed()
    model = copy.deepcopy(eager)
    y = 3 * torch.randn(8, 3) + 1
    for run in (compiled(model, torch.float32, "eager"), eager):
        run(y, T).square().mean().backward()
    found, wanted = (list(owner.buffers()) for owner in (model, eager))
    assert torch.equal(found[2], wanted[2])  # the number of batches
    # A statistic is a sum over 8 entries, of states that sums of the same length led to in four steps.
    assert max(relative_errors(found[:2], wanted[:2])) < 64 * U32


def statistics_are_updated_twice(patch):
    """Every update of the running statistics is made twice."""
    operator = aten._native_batch_norm_legit_functional.default
    update = decompositions.DECOMPOSITIONS[operator]

    def broken(x, weight, bias, mean, var, *settings):
        mean, var = update(x, weight, bias, mean, var, *settings)[3:]
        return update(x, weight, bias, mean, var, *settings)

    patch.setitem(decompositions.DECOMPOSITIONS, operator, broken)


# 11. param.data is swapped during the backward.


def check_interrupted_backward():
    y, w = torch.randn(4, 3), nn.Parameter(torch.rand(3))
    function, before, pointer = mixed(elementwise), w.detach().clone(), w.data_ptr()
    loss = function(y, T, w).sum()
    with mock.patch.object(counts, "record", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        loss.backward()  # in the middle of the loop's backward
    assert w.dtype is before.dtype and w.data_ptr() == pointer and torch.equal(w, before) and w.grad is None
    function(y, T, w).sum().backward()
    elementwise(y, T, twin := before.clone().requires_grad_()).sum().backward()
    assert max(relative_errors([w.grad], [twin.grad])) < FP16


def parameters_are_narrow_during_the_backward(patch):
    """Before the loop's backward param.data becomes float16, after it float32 again."""
    refuse = backend._guarded

    def broken(compiled, loops):
        def run(*args):
            outputs = refuse(compiled, loops)(*args)
            parameters = [arg for arg in args if isinstance(arg, nn.Parameter)]
            kept = [p.data for p in parameters]

            def narrow(_):
                for p in parameters:
                    p.data = p.data.half()

            def restore(*_):
                for p, data in zip(parameters, kept, strict=True):
                    p.data = data

            for out in outputs:
                out.grad_fn.register_prehook(narrow)
                out.grad_fn.register_hook(restore)
            return outputs

        return run

    patch.setattr(backend, "_guarded", broken)


def check_replicas_stay_equal():
    model, y = Layer(), torch.randn(4, 3)
    found = []
    for _ in range(2):
        torch._dynamo.reset()  # as another process would, each replica compiles for itself
        replica, history = copy.deepcopy(model), []
        function = compiled(replica, torch.float16, "eager")
        optimizer = torch.optim.SGD(replica.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            function(y, T).square().mean().backward()
            history += [p.grad.clone() for p in replica.parameters()]
            optimizer.step()
        found.append([*history, *replica.parameters()])
    assert all(torch.equal(first, second) for first, second in zip(*found, strict=True))


def scaling_remembers(patch):
    """The scaling's target depends on what was compiled before."""
    targets = iter([1.0, 2.0**-16])
    patch.setattr(scale_adjoint, "find_target", lambda adjoint: next(targets))


# 12. States of different shapes fail; one scale covers all components; parameters outside of the velocity are lost.


def check_states_of_different_shapes():
    def flow(u, v, t, w):
        for _, dt in steps(t):
            h = torch.tanh(u @ w)  # one evaluation has two results, and a VJP of two cotangents
            u, v = u + dt * torch.sin(v[:, None] * h), v + dt * h.square().mean(1)
        return u, v

    u, v, w = leaves((4, 3), (4,), (3, 3))
    assert_gradients_agree(flow, lambda out: out[0].sum() + out[1].square().sum(), [u, v, T, w])


def terms_are_added_as_they_are_scaled(patch):
    """What follows from cotangents of different scales is added without bringing it to one scale."""
    patch.setattr(scale_adjoint, "_times", lambda graph, reader, term, ratio: term)


def check_small_beside_large_component():
    def flow(u, v, t, a, b):
        for _, dt in steps(t):
            u, v = u + dt * torch.tanh(u @ a), v + dt * torch.tanh(v @ b)
        return u, v

    u, v, a, b = leaves((4, 3), (4,), (3, 3), (4, 4))
    assert_gradients_agree(flow, lambda out: out[0].sum() + 1e-9 * out[1].sum(), [u, v, T, a, b])


def one_scale_covers_all_components(patch):
    """One scale for all evaluations, of the largest gradient of any state."""
    scale = scale_adjoint.power_of_two_scale

    def scales(given, loop):
        cotangents = [v for e, v in given.items() if isinstance(e, Cotangent) and v.is_floating_point()]
        return scale(given[Target()], *cotangents).expand(loop.steps)

    replace_scale(patch, scales)


def check_parameters_outside_of_the_velocity():
    class Conditioned(Layer):
        def __init__(self):
            super().__init__()
            self.embed = nn.Linear(3, 3)

        def forward(self, y, t):
            context, first = self.embed(y), self.linear.weight[:1]
            for _, dt in steps(t):
                y = y + dt * torch.tanh(self.linear(y) + context) * first
            return y

    assert_gradients_agree(Conditioned(), torch.sum, [*leaves((4, 3)), T])


@dataclass(frozen=True)
class Fault:
    """A fault by its number above: a check that it is absent, a variant of ours that has it, how the check fails."""

    number: str
    check: Callable[[], None]
    variant: Callable[[pytest.MonkeyPatch], None]
    fails_by: type[Exception] = AssertionError


FAULTS = [
    Fault("1", check_small_increments, increments_are_velocity),
    Fault("2", check_trajectory_is_wide, trajectory_is_rounded),
    Fault("2", check_large_states_are_stored, stored_states_are_not_scaled),
    Fault("2", check_large_states_are_loud, states_are_cast_to_inf),
    Fault("3", check_small_losses, incoming_gradients_are_narrow),
    Fault("4", check_loss_on_an_inner_state, scale_of_the_last_time),
    Fault("5", check_scale_follows_the_adjoint, scale_doubles_every_step),
    Fault("6", check_host_reads, scales_and_flags_are_read_on_the_host),
    Fault("7", check_callers_gradient_is_untouched, adjoints_are_added_in_place, errors.RewriteError),
    Fault("8", check_gradient_of_t, gradient_of_t_keeps_the_batch, errors.RewriteError),
    Fault("8", check_frozen_parameter, frozen_parameters_are_differentiated, errors.UnsupportedVelocityError),
    Fault("8", check_plain_function_as_velocity, gradients_of_modules_alone),
    Fault("8", check_scalar_state, scale_expects_a_batch, errors.RewriteError),
    Fault("9", check_second_derivative, second_derivatives_are_not_refused),
    Fault("10", check_dropout, masks_are_drawn_again),
    Fault("10", check_batch_norm, statistics_are_updated_twice),
    Fault("11", check_interrupted_backward, parameters_are_narrow_during_the_backward),
    Fault("11", check_replicas_stay_equal, scaling_remembers),
    Fault("12", check_states_of_different_shapes, terms_are_added_as_they_are_scaled),
    Fault("12", check_small_beside_large_component, one_scale_covers_all_components),
    Fault("12", check_parameters_outside_of_the_velocity, gradients_of_modules_alone),
]
each_fault = pytest.mark.parametrize(
    "fault", FAULTS, ids=lambda fault: f"{fault.number}-{fault.check.__name__.removeprefix('check_')}"
)


@each_fault
def test_ours_has_not(fault):
    fault.check()


@each_fault
def test_check_notices(fault, monkeypatch):
    fault.variant(monkeypatch)
    with pytest.raises(fault.fails_by):
        fault.check()
