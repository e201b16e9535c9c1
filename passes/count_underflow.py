"""Count what states and parameters lose where they enter a velocity in float16.

Before:  k = velocity_0(y, w);  ...;  return y_next
After:   k = velocity_0(y, w);  ...;  n = rampde_fx.count_underflow([y, ...]) + rampde_fx.count_underflow([w])
         return y_next, n

n has three counts over the evaluations of a step: entries that are not zero and too small for eight binary digits in
float16; entries that are not zero; tensors that are subnormal as a whole. An overflow shows itself, as NaN; this would
be silent. What concerns parameters alone is counted once per call.

Requires: a lowered Loop without adjoint.
Ensures:  a step in whose velocity something enters in float16 has n, int64 (3,), as its last per-step output; every
          other loop is left as it is. count_nothing leaves every loop as it is.
"""

from __future__ import annotations

import torch
from torch import fx

from rampde_fx.ir import graphs
from rampde_fx.ir.loops import CountedLoop, LoweredLoop

COUNT = torch.ops.rampde_fx.count_underflow.default
NARROW = torch.ops.rampde_fx.narrow.default


def count_underflow(loop: LoweredLoop) -> CountedLoop:
    """Return the counts of what enters a velocity in float16."""
    counts = loop.policy.dtype is torch.float16
    groups = [group for group in find_entering(loop.step) if group] if counts else []
    if not groups:
        return loop.then(CountedLoop)
    step = graphs.copied(loop.step)
    twins = {node.name: node for node in step.graph.nodes}
    output = step.graph.output_node()
    with step.graph.inserting_before(output):
        entering = [[_real(step.graph, twins[node.name]) for node in group] for group in groups]
        count, *more = [graphs.call(step.graph, "underflow", COUNT, nodes) for nodes in entering]
        if more:
            count = graphs.call(step.graph, "underflow", torch.ops.aten.add.Tensor, count, *more)
    output.args = ((*output.args[0], count),)
    return loop.then(CountedLoop, step=graphs.refresh(step), counted=True)


def count_nothing(loop: LoweredLoop) -> CountedLoop:
    """The same without counts, for a program that nobody asks for them."""
    return loop.then(CountedLoop)


def find_entering(step: fx.GraphModule) -> tuple[list[fx.Node], list[fx.Node]]:
    """The states, and what is none, that evaluations cast to float16, each once."""
    states: dict[fx.Node, None] = {}
    parameters: dict[fx.Node, None] = {}
    for call in [node for node in step.graph.nodes if node.op == "call_module" and _is_evaluation(node)]:
        inner = graphs.placeholders(step.get_submodule(str(call.target)))
        for outer, entry in zip(call.args, inner, strict=True):
            if _has_numbers(entry) and _is_narrowed(entry) and graphs.value(outer).numel() != 0:
                group = states if outer.meta["role"] == "state" else parameters
                group[_counted(outer)] = None
    return list(states), [node for node in parameters if node not in states]


def _counted(entering: fx.Node) -> fx.Node:
    """What a chain of views begins with, up to one that leaves entries out: these an evaluation does not read."""
    while graphs.is_view(entering) and not graphs.is_part(entering):
        entering = entering.args[0]
    return entering


def _has_numbers(entry: fx.Node) -> bool:
    return graphs.is_float(entry) or (
        isinstance(graphs.value(entry), torch.Tensor) and graphs.value(entry).is_complex()
    )


def _real(graph: fx.Graph, entering: fx.Node) -> fx.Node:
    """The parts of complex numbers, of which each is cast."""
    if not graphs.value(entering).is_complex():
        return entering
    return graphs.call(graph, "parts", torch.ops.aten.view_as_real.default, entering)


def _is_evaluation(node: fx.Node) -> bool:
    return node.meta.get("role") == "velocity"


def _is_narrowed(entry: fx.Node) -> bool:
    """Whether an input of an evaluation, or a view of it, is cast to float16."""
    return any(user.target is NARROW or (graphs.is_view(user) and _is_narrowed(user)) for user in entry.users)
