"""Store the states that the backward re-reads in the storage dtype, and nothing else per step.

Before:  step(y, ...): ...; return y_next          adjoint(a, y: f32[B, D], ...): ...
After:   step(y, ...): ...; return y_next, cast(y) adjoint(a, y: f16[B, D], ...): y_wide: f32[B, D] = cast(y); ...

A carry that the adjoint does not read (a log-density, into which nothing is fed back) is not stored at all. Integers
and states that are no wider than the storage dtype are stored as they are.

Requires: a Loop with an adjoint.
Ensures:  the step returns what the adjoint re-reads; the adjoint reads no carry by another way.
Error:    O(u) in the point at which each step is recomputed, u the unit roundoff of the storage dtype.
Source:   arXiv 2510.23498.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import fx

from rampde_fx import graphs
from rampde_fx.loop import Loop


def store_states(loop: Loop) -> Loop:
    """Let the step return the carries that the adjoint reads, in their storage dtype, and widen them there."""
    if loop.adjoint is None:
        return loop
    step, adjoint = graphs.copied(loop.step), graphs.copied(loop.adjoint)
    states, inputs = graphs.placeholders(step), list(loop.adjoint_inputs)
    stored: list[int] = []
    values: list[fx.Node] = []
    for position, node in enumerate(graphs.placeholders(adjoint)):
        kind, index = inputs[position]
        if kind == "operand" and index < loop.carries:
            inputs[position] = ("stored", len(stored))
            stored.append(index)
            values.append(_store(step, adjoint, states[index], node, loop.policy.storage_dtype))
    output = step.graph.output_node()
    output.args = ((*output.args[0], *values),)
    return replace(
        loop,
        step=graphs.refresh(step),
        adjoint=graphs.refresh(adjoint),
        adjoint_inputs=tuple(inputs),
        stored=tuple(stored),
    )


def storage_dtype(value: torch.Tensor, wanted: torch.dtype) -> torch.dtype:
    """The dtype in which a state is stored."""
    return wanted if value.is_floating_point() and wanted.itemsize < value.dtype.itemsize else value.dtype


def _store(
    step: fx.GraphModule, adjoint: fx.GraphModule, state: fx.Node, read: fx.Node, wanted: torch.dtype
) -> fx.Node:
    """The node that the step stores of a state; the placeholder of the adjoint becomes the same."""
    own = graphs.value(state).dtype
    dtype = storage_dtype(graphs.value(state), wanted)
    if dtype == own:
        return state
    cast = torch.ops.aten._to_copy.default
    read.meta["val"] = graphs.value(read).to(dtype)
    with adjoint.graph.inserting_after(graphs.placeholders(adjoint)[-1]):
        wide = adjoint.graph.call_function(cast, (read,), {"dtype": own})
    read.replace_all_uses_with(wide, delete_user_cb=lambda user: user is not wide)
    with step.graph.inserting_before(step.graph.output_node()):
        return step.graph.call_function(cast, (state,), {"dtype": dtype})
