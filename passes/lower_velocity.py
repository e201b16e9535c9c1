"""Evaluate the velocity in low precision.

Before:  k: f32[B, D] = addmm(b, y, w)
After:   k: f32[B, D] = velocity_0(y, w, b)
         velocity_0:  y_lo, w_lo, b_lo: f16 = cast(...);  k_lo: f16 = addmm(b_lo, y_lo, w_lo);  return cast(k_lo)

Every evaluation is a submodule with casts of its own, so that each stage's gradient of a weight is widened before the
stages are added up. Equal evaluations share one submodule. Inside, CUDA autocast's lists hold on every device: matrix
products and convolutions are low; norms, softmax, exp, log, pow and reductions float32; what works entry by entry, or
moves entries, follows its inputs. Complex numbers are wide, and so is what the operator table does not know. In float16
products of entries are float32 too, and so is what a comparison reads (rampde_fx/ir/lowering.py).

Requires: a Loop whose step is labelled by partition_velocity.
Ensures:  state and time nodes keep their dtype; a velocity takes and returns the accumulation dtype; a state beyond
          float16's range enters as NaN, which no activation hides.
Error:    O(u) per evaluation, u the unit roundoff of the velocity dtype, barring overflow.
Raises:   UnsupportedVelocityError, naming the node and the user's line.
Source:   arXiv 2510.23498.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import torch
from torch import fx
from torch.fx.passes.tools_common import legalize_graph

from rampde_fx.ir import graphs, operator_table, tracing
from rampde_fx.ir.loops import Fallback, LoweredLoop, PartitionedLoop
from rampde_fx.ir.lowering import Lowering
from rampde_fx.policy_text import word_of
from rampde_fx.torch_private import shapes

aten = torch.ops.aten


def lower_velocity(loop: PartitionedLoop) -> LoweredLoop:
    """Replace the velocity nodes of the step by calls of low-precision submodules, one call per evaluation."""
    step = graphs.copied(loop.step)
    names, fallbacks, low = [], Counter(_wide_roles(step)), 0
    known: dict[str, str] = {}
    for nodes in find_components(step):
        taken_inside = find_taken_inside(nodes)
        inputs, outputs = _boundary(nodes, taken_inside)
        velocity = graphs.extract(step, [*taken_inside, *nodes], inputs, outputs)
        lowering = Lowering(velocity, loop.policy.dtype, [node.meta["role"] != "time" for node in inputs])
        lowered = _lower(lowering, inputs)
        fallbacks.update(lowering.wide)
        low += lowering.low
        key = _signature(lowered)
        if key not in known:
            known[key] = f"velocity_{len(known)}"
            step.add_submodule(known[key], lowered)
        names.append(known[key])
        _call(step, len(names), known[key], nodes, inputs, outputs)
    if not _in_order(step):  # a state was built from one output before the last one was computed
        legalize_graph(step)
    graphs.refresh(step)
    found = tuple(Fallback(name, reason, count) for (name, reason), count in fallbacks.items())
    result = loop.then(LoweredLoop, step=step, evaluation_names=tuple(names), fallbacks=found, low_operations=low)
    note = f"nothing of the loop is evaluated in {word_of(loop.policy.dtype)}"
    return result.then(LoweredLoop, notes=(*loop.notes, note)) if result.stays_wide else result


def find_components(step: fx.GraphModule) -> list[list[fx.Node]]:
    """The evaluations: velocity nodes of one rank that are connected through each other, in graph order."""
    velocity = [node for node in step.graph.nodes if node.meta.get("role") == "velocity"]
    leader: dict[fx.Node, fx.Node] = {}

    def find(node: fx.Node) -> fx.Node:
        while leader[node] is not node:
            node = leader[node]
        return node

    for node in velocity:
        leader[node] = node
        for parent in node.all_input_nodes:
            if parent in leader and parent.meta["rank"] == node.meta["rank"]:
                leader[find(parent)] = find(node)
    groups: dict[fx.Node, list[fx.Node]] = {}
    for node in velocity:
        groups.setdefault(find(node), []).append(node)
    return sorted(groups.values(), key=lambda nodes: nodes[0].meta["rank"])


def find_taken_inside(nodes: list[fx.Node]) -> list[fx.Node]:
    """What an evaluation makes itself of its inputs: views that enlarge a smaller tensor, and casts to a
    parameter's own dtype, each behind what it is made of.

    Outside, a cast at the entry would make the larger tensor, and the gradient be rounded to the parameter's dtype.
    """
    found: dict[fx.Node, None] = {}
    inside = set(nodes)
    inputs = (p for node in nodes for p in node.all_input_nodes if p not in inside)
    for node in filter(_follows_alone, inputs):
        chain = [node]
        while _follows_alone(chain[0].args[0]):
            chain.insert(0, chain[0].args[0])
        if any(map(_narrows, chain)) or _size(chain[0].args[0]) < _size(node):
            found.update(dict.fromkeys(chain))
    return list(found)


def _follows_alone(node: fx.Node) -> bool:
    """Whether a node costs nothing, and follows from one operand."""
    return graphs.is_view(node) or _narrows(node)


def _narrows(node: fx.Node) -> bool:
    """Whether a node is the cast of a parameter to its own dtype (passes/widen_parameters.py)."""
    is_cast = node.target is aten._to_copy.default and node.meta.get("role") == "time" and graphs.is_float(node)
    return is_cast and graphs.value(node).dtype.itemsize < graphs.value(node.args[0]).dtype.itemsize


def _size(node: fx.Node) -> int:
    return math.prod(shapes.size_hint(size) for size in graphs.value(node).shape)


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
    calls = [n for n in step.graph.nodes if n.op == "call_function" and n.meta["role"] != "velocity"]
    computed = [node for node in calls if graphs.is_differentiable(node) and not graphs.is_view(node)]

    def reason(node: fx.Node) -> str:
        linear = node.meta["role"] == "state" and operator_table.is_product(node)
        return "state: the next state is linear in this product" if linear else reasons[node.meta["role"]]

    return Counter((operator_table.name_of(node.target), reason(node)) for node in computed)


def _boundary(nodes: list[fx.Node], own: list[fx.Node]) -> tuple[list[fx.Node], list[fx.Node]]:
    """What a group of nodes, and those that it takes inside, read from outside; and what is read of the group outside.

    What it takes inside stays outside as well, for other readers.
    """
    inside = {*own, *nodes}
    inputs = dict.fromkeys(p for node in (*own, *nodes) for p in node.all_input_nodes if p not in inside)
    outputs = [node for node in nodes if any(user not in inside for user in node.users)]
    return list(inputs), outputs


def _lower(lowering: Lowering, inputs: list[fx.Node]) -> fx.GraphModule:
    lowered = tracing.trace(lowering.evaluate, [graphs.value(node) for node in inputs])
    return graphs.named(lowered, [_input_name(node) for node in inputs])


def _input_name(node: fx.Node) -> str:
    """A state is y in every evaluation, so that equal evaluations read alike; another input of the step keeps its name,
    and what is computed has that of its role."""
    base = graphs.base_of_view(node)
    return "y" if node.meta["role"] == "state" else base.name if base.op == "placeholder" else str(node.meta["role"])


def _signature(velocity: fx.GraphModule) -> str:
    """Equal for equal evaluations: the code, and the kinds of the inputs."""
    kinds = [_kind(graphs.value(node)) for node in graphs.placeholders(velocity)]
    return f"{velocity.code} {kinds}"


def _kind(value: Any) -> Any:
    return (value.dtype, tuple(value.shape), value.device) if isinstance(value, torch.Tensor) else type(value)


def _call(
    step: fx.GraphModule,
    number: int,
    name: str,
    nodes: list[fx.Node],
    inputs: list[fx.Node],
    outputs: list[fx.Node],
) -> None:
    """Replace the nodes by one call of the submodule and its results, k_1 and so on, where the last node stands."""
    with step.graph.inserting_before(nodes[-1]):
        call = step.graph.call_module(name, tuple(inputs))
    call.meta = {"role": "velocity", "stack_trace": outputs[0].meta.get("stack_trace")}
    previous = call
    for i, node in enumerate(outputs):
        with step.graph.inserting_after(previous):
            item = graphs.item(step.graph, f"k_{number}" if len(outputs) == 1 else f"k_{number}_{i}", call, i)
        item.meta = {**node.meta, "stack_trace": node.meta.get("stack_trace")}
        node.replace_all_uses_with(item)
        previous = item
    for node in reversed(nodes):
        step.graph.erase_node(node)
