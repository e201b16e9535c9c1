"""Store the states that the backward re-reads in the storage dtype, and nothing else per step.

Before:  adjoint(a, y: f32[B, D], ...): ...
After:   adjoint(a, y: f16[B, D], ...): y_wide: f32[B, D] = cast(y); ...

A carry that the adjoint does not read (a log-density, into which nothing is fed back) is not stored at all. Integers
and states that are no wider than the storage dtype are stored as they are.

Requires: a Loop with an adjoint.
Ensures:  the adjoint's placeholders have the dtypes in which the forward stores.
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
    """Choose the stored carries and their dtypes, and widen them where the adjoint reads them."""
    if loop.adjoint is None:
        return loop
    stored: list[int] = []
    dtypes: list[torch.dtype] = []
    for node, (kind, index) in zip(graphs.placeholders(loop.adjoint), loop.adjoint_inputs, strict=True):
        if kind == "operand" and index < loop.carries:
            stored.append(index)
            dtypes.append(storage_dtype(node, loop.policy.storage_dtype))
            _widen(loop.adjoint, node, dtypes[-1])
    graphs.refresh(loop.adjoint)
    return replace(loop, stored=tuple(stored), stored_dtypes=tuple(dtypes))


def storage_dtype(node: fx.Node, wanted: torch.dtype) -> torch.dtype:
    """The dtype in which a state is stored."""
    own: torch.dtype = graphs.value(node).dtype
    return wanted if own.is_floating_point and wanted.itemsize < own.itemsize else own


def _widen(adjoint: fx.GraphModule, node: fx.Node, dtype: torch.dtype) -> None:
    value = graphs.value(node)
    if value.dtype == dtype:
        return
    node.meta["val"] = value.to(dtype)
    with adjoint.graph.inserting_after(graphs.placeholders(adjoint)[-1]):
        wide = adjoint.graph.call_function(torch.ops.aten._to_copy.default, (node,), {"dtype": value.dtype})
    node.replace_all_uses_with(wide, delete_user_cb=lambda user: user is not wide)
