"""Evaluate the velocity in low precision.

Before:  k: f32[B, D] = addmm(b, y, w)
After:   k: f32[B, D] = velocity_0(y, w, b)
         velocity_0:  y_lo, w_lo, b_lo: f16 = cast(...);  k_lo: f16 = addmm(b_lo, y_lo, w_lo);  return cast(k_lo)

Every evaluation is a submodule with casts of its own, so that each stage's gradient of a weight is widened before the
stages are added up. Equal evaluations share one submodule. Inside, CUDA autocast's policy holds on every device:
matrix products and convolutions low; norms, softmax, exp, log, pow and reductions fp32; the rest follows its inputs.

Requires: a Loop whose step is labelled by partition_velocity.
Ensures:  state and time nodes keep their dtype; a velocity takes and returns the accumulation dtype; a state beyond
          float16's range enters as NaN, which no activation hides.
Error:    O(u) per evaluation, u the unit roundoff of the velocity dtype, barring overflow.
Raises:   UnsupportedVelocityError, naming the node and the user's line.
Source:   arXiv 2510.23498.
"""

from __future__ import annotations

import math
import operator
from collections import Counter
from dataclasses import replace
from typing import Any

import torch
from torch import fx
from torch.fx.passes.tools_common import legalize_graph

from rampde_fx import graphs, torch_private
from rampde_fx.errors import UnsupportedVelocityError
from rampde_fx.loop import Fallback, Loop

# Operator names of torch.amp's CUDA lists (docs: "CUDA Ops that can autocast"), as they appear in ATen graphs.
LOW = set(
    """mm addmm bmm baddbmm addbmm mv addmv addr dot vdot convolution convolution_backward _prelu_kernel
    _scaled_dot_product_flash_attention _scaled_dot_product_flash_attention_backward
    _scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention_for_cpu_backward
    _scaled_dot_product_efficient_attention _scaled_dot_product_efficient_attention_backward
    _scaled_dot_product_cudnn_attention _scaled_dot_product_cudnn_attention_backward
    _scaled_dot_product_fused_attention_overrideable""".split()
)
WIDE = set(
    """exp expm1 log log10 log2 log1p pow reciprocal rsqrt acos asin cosh sinh tan erfinv softplus softplus_backward
    _softmax _log_softmax _softmax_backward_data _log_softmax_backward_data logsumexp sum prod cumsum cumprod mean var
    var_mean std std_mean norm linalg_vector_norm dist renorm native_layer_norm native_layer_norm_backward
    native_group_norm native_group_norm_backward native_batch_norm native_batch_norm_backward
    _native_batch_norm_legit _native_batch_norm_legit_no_training _native_batch_norm_legit_functional cudnn_batch_norm
    cudnn_batch_norm_backward _fused_rms_norm _fused_rms_norm_backward _cdist_forward _cdist_backward _pdist_forward
    _fft_r2c _fft_c2c _fft_c2r upsample_bilinear2d upsample_nearest2d upsample_bicubic2d""".split()
)
COMMUTATIVE = {"mul", "add"}
HALF = (torch.float16, torch.bfloat16)


def lower_velocity(loop: Loop) -> Loop:
    """Replace the velocity nodes of the step by calls of low-precision submodules, one call per evaluation."""
    step = graphs.copied(loop.step)
    names, fallbacks = [], Counter(_wide_roles(step))
    known: dict[str, str] = {}
    for nodes in find_components(step):
        enlarging = find_enlarging_views(nodes)
        inputs, outputs = _boundary(nodes, enlarging)
        velocity = graphs.extract(step, [*enlarging, *nodes], inputs, outputs)
        lowered, wide = _lower(velocity, inputs, loop.policy.velocity)
        fallbacks.update(wide)
        key = _signature(lowered)
        if key not in known:
            known[key] = f"velocity_{len(known)}"
            step.add_submodule(known[key], lowered)
        _call(step, known[key], nodes, inputs, outputs)
        names.append(known[key])
    if not _in_order(step):  # a state was built from one output before the last one was computed
        legalize_graph(step)
    graphs.refresh(step)
    found = tuple(Fallback(name, reason, count) for (name, reason), count in fallbacks.items())
    return replace(loop, step=step, stages=tuple(names), fallbacks=found)


def find_components(step: fx.GraphModule) -> list[list[fx.Node]]:
    """The evaluations: velocity nodes of one number that are connected through each other, in graph order."""
    velocity = [node for node in step.graph.nodes if node.meta.get("role") == "velocity"]
    leader: dict[fx.Node, fx.Node] = {}

    def find(node: fx.Node) -> fx.Node:
        while leader[node] is not node:
            node = leader[node]
        return node

    for node in velocity:
        leader[node] = node
        for parent in node.all_input_nodes:
            if parent in leader and parent.meta["evaluation"] == node.meta["evaluation"]:
                leader[find(parent)] = find(node)
    groups: dict[fx.Node, list[fx.Node]] = {}
    for node in velocity:
        groups.setdefault(find(node), []).append(node)
    return sorted(groups.values(), key=lambda nodes: nodes[0].meta["evaluation"])


def find_enlarging_views(nodes: list[fx.Node]) -> list[fx.Node]:
    """The views by which an evaluation reads a smaller tensor as a larger one, each behind what it is a view of.

    A cast at the entry would make the larger tensor; with the views inside the evaluation the smaller one is cast.
    """
    found: dict[fx.Node, None] = {}
    inside = set(nodes)
    inputs = (p for node in nodes for p in node.all_input_nodes if p not in inside)
    for node in filter(graphs.is_view, inputs):
        chain = [node]
        while graphs.is_view(chain[0].args[0]):
            chain.insert(0, chain[0].args[0])
        if _size(chain[0].args[0]) < _size(node):
            found.update(dict.fromkeys(chain))
    return list(found)


def _size(node: fx.Node) -> int:
    return math.prod(torch_private.size_hint(size) for size in graphs.value(node).shape)


def _in_order(step: fx.GraphModule) -> bool:
    seen: set[fx.Node] = set()
    for node in step.graph.nodes:
        if any(parent not in seen for parent in node.all_input_nodes):
            return False
        seen.add(node)
    return True


def _wide_roles(step: fx.GraphModule) -> dict[tuple[str, str], int]:
    """What is not velocity, counted by operation."""
    reasons = {"state": "state: accumulated in the dtype of the state", "time": "time: depends on no state"}
    calls = [n for n in step.graph.nodes if n.op == "call_function" and n.meta["role"] in reasons]
    floats = [n for n in calls if graphs.is_float(n) and not graphs.is_view(n)]
    return Counter((graphs.operator_name(n.target), reasons[n.meta["role"]]) for n in floats)


def _boundary(nodes: list[fx.Node], views: list[fx.Node]) -> tuple[list[fx.Node], list[fx.Node]]:
    """What a group of nodes, and views that it takes inside, read from outside; and what is read of the group outside.

    The views stay outside as well, for other readers.
    """
    inside = {*views, *nodes}
    inputs = dict.fromkeys(p for node in (*views, *nodes) for p in node.all_input_nodes if p not in inside)
    outputs = [node for node in nodes if any(user not in inside for user in node.users)]
    return list(inputs), outputs


def _lower(velocity: fx.GraphModule, inputs: list[fx.Node], dtype: torch.dtype) -> tuple[fx.GraphModule, Counter[Any]]:
    lowering = _Lowering(velocity, inputs, dtype)
    lowered = torch_private.trace(lowering.evaluate, [graphs.value(node) for node in inputs])
    return graphs.named(lowered, [_input_name(node) for node in inputs]), lowering.wide


def _input_name(node: fx.Node) -> str:
    """A state is y in every evaluation, so that equal evaluations read alike; the rest keeps its name."""
    base = graphs.base_of_view(node)
    return "y" if node.meta["role"] == "state" else base.name if base.op == "placeholder" else str(node.meta["role"])


def _signature(velocity: fx.GraphModule) -> str:
    """Equal for equal evaluations: the code, and the kinds of the inputs."""
    kinds = [_kind(graphs.value(node)) for node in graphs.placeholders(velocity)]
    return f"{velocity.code} {kinds}"


def _kind(value: Any) -> Any:
    return (value.dtype, tuple(value.shape), value.device) if isinstance(value, torch.Tensor) else type(value)


class _Lowering(fx.Interpreter):
    """Runs a velocity under the operator policy; traced, it writes the lowered graph."""

    def __init__(self, velocity: fx.GraphModule, inputs: list[fx.Node], dtype: torch.dtype) -> None:
        super().__init__(velocity)
        self.dtype = dtype
        self.wide: Counter[tuple[str, str]] = Counter()
        pairs = zip(graphs.placeholders(velocity), inputs, strict=True)
        self.at_entry = [_cast_at_entry(inner, outer) for inner, outer in pairs]
        self.states = [node.meta["role"] == "state" for node in inputs]

    def evaluate(self, *args: Any) -> tuple[Any, ...]:
        """The outputs in their original dtypes, from inputs in theirs."""
        entered = list(map(self._enter, args, self.at_entry, self.states))
        self.wide.clear()
        values = self.run(*entered)
        originals = [graphs.value(node) for node in graphs.results(self.module)]
        return tuple(_cast(now, before.dtype) for now, before in zip(values, originals, strict=True))

    def _enter(self, value: Any, low: bool, state: bool) -> Any:
        if low and state and self.dtype is torch.float16 and _is_float_tensor(value) and value.dtype != self.dtype:
            return torch.ops.rampde_fx.narrow(value)
        return _cast(value, self.dtype) if low else value

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        name = graphs.operator_name(target)
        tensors = [a for a in torch.utils._pytree.tree_leaves((args, kwargs)) if _is_float_tensor(a)]
        if name in LOW:
            to = self.dtype
        elif name in WIDE and self.dtype in HALF:
            to = torch.float32
            self.wide[name, "autocast's policy: fp32"] += 1
        elif _beyond(self.dtype, args, kwargs):
            to = torch.float32
            self.wide[name, f"a constant beyond the range of {self.dtype}"] += 1
        else:
            to = _widest([t for t in tensors if t.ndim > 0])
        back = None
        if to is None and _rounds_first(args, tensors):  # torch rounds a 0-d first operand to the other's dtype
            if name in COMMUTATIVE and not kwargs:
                args = (args[1], args[0])
            else:
                to, back = torch.float32, self.dtype
        if to is not None and target is not operator.getitem:
            keep_scalars = to != torch.float32 and name not in LOW

            def cast(value: Any) -> Any:
                return value if not _is_float_tensor(value) or (keep_scalars and value.ndim == 0) else _cast(value, to)

            kept = _statistics(target)
            args = tuple(a if i in kept else torch.utils._pytree.tree_map(cast, a) for i, a in enumerate(args))
            kwargs = torch.utils._pytree.tree_map(cast, kwargs)
        try:
            result = super().call_function(target, args, kwargs)
            return result if back is None else _cast(result, back)
        except (RuntimeError, NotImplementedError, TypeError) as error:
            raise UnsupportedVelocityError(
                f"the operation {target} of the velocity does not run in {self.dtype}: {error}",
                required="operations that exist in the velocity dtype",
                fix="use dtype=torch.float32 for this loop, or write the operation by others",
                where=graphs.user_line(self.current) if self.current is not None else "",
            ) from error

    current: fx.Node | None = None

    def run_node(self, n: fx.Node) -> Any:
        self.current = n
        return super().run_node(n)


def _rounds_first(args: Any, tensors: list[torch.Tensor]) -> bool:
    """Whether a wide 0-d value, such as a time, is the first operand of an operation on low tensors."""
    others = {tensor.dtype for tensor in tensors if tensor.ndim > 0}
    first = args[0] if args and _is_float_tensor(args[0]) and args[0].ndim == 0 else None
    return first is not None and first.dtype not in HALF and len(others) == 1 and others <= set(HALF)


def _statistics(target: Any) -> set[int]:
    """The arguments of an operation that are fp32 whatever the dtype: an attention's, for its backward."""
    schema = getattr(target, "_schema", None)
    return {i for i, argument in enumerate(schema.arguments) if argument.name == "logsumexp"} if schema else set()


def _beyond(dtype: torch.dtype, args: Any, kwargs: Any) -> bool:
    """Whether a number among the arguments overflows or vanishes in the dtype."""
    numbers = [abs(a) for a in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(a, float)]
    info = torch.finfo(dtype)
    return dtype in HALF and any(
        (info.max < number < float("inf")) or 0 < number < info.smallest_normal * info.eps for number in numbers
    )


def _is_float_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """The tensor in another dtype; ints, bools and tensors that have it already come back as they are."""
    if not _is_float_tensor(value) or value.dtype == dtype:
        return value
    return torch.ops.aten._to_copy.default(value, dtype=dtype)


def _cast_at_entry(inner: fx.Node, outer: fx.Node) -> bool:
    """States always; parameters and times unless only fp32 operations, or scalings by a 0-d value, read them."""
    if outer.meta["role"] != "time":
        return True
    if graphs.value(outer) is None or not graphs.is_float(outer) or graphs.value(outer).ndim == 0:
        return False
    return not _only_wide_readers(inner)


def _only_wide_readers(node: fx.Node) -> bool:
    def is_wide(user: fx.Node) -> bool:
        if graphs.is_view(user):
            return _only_wide_readers(user)
        return user.op == "output" or graphs.operator_name(user.target) in WIDE

    return all(map(is_wide, node.users))


def _widest(tensors: list[torch.Tensor]) -> torch.dtype | None:
    dtypes = {tensor.dtype for tensor in tensors}
    if len(dtypes) < 2:
        return None
    widest, *rest = dtypes
    for dtype in rest:
        widest = torch.promote_types(widest, dtype)
    return widest


def _call(step: fx.GraphModule, name: str, nodes: list[fx.Node], inputs: list[fx.Node], outputs: list[fx.Node]) -> None:
    """Replace the nodes by one call of the submodule and a getitem per output, where the last node stands."""
    with step.graph.inserting_before(nodes[-1]):
        call = step.graph.call_module(name, tuple(inputs))
    call.meta = {"role": "velocity", "stack_trace": outputs[0].meta.get("stack_trace")}
    previous = call
    for i, node in enumerate(outputs):
        with step.graph.inserting_after(previous):
            item = step.graph.call_function(operator.getitem, (call, i))
        item.meta = {**node.meta, "stack_trace": node.meta.get("stack_trace")}
        node.replace_all_uses_with(item)
        previous = item
    for node in reversed(nodes):
        step.graph.erase_node(node)
