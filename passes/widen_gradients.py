"""Form the sums that leave a pullback wide, such as a weight's over the batch, in float32 from the start.

Before:  dw_lo: f16[D, H] = add(mm(y_lo.T, b_lo), mm(z_lo.T, c_lo));        dw: f32[D, H] = cast(dw_lo)
After:   dw: f32[D, H] = add(mm(y_lo.T, b_lo, out_dtype=f32), mm(z_lo.T, c_lo, out_dtype=f32))           on CUDA
         dw: f32[D, H] = add(mm(cast(y_lo.T), cast(b_lo)), ...)      float16 on other devices, the same numbers

A sum over the batch is what overflows float16 first, and rounding it to float16 is needless: tensor cores sum in
float32. A weight that a velocity reads more than once has several such sums, which are added up wide too. On other
devices bfloat16 products stay as they are, for they cannot overflow; a plain sum is widened on every device.

Requires: a Loop with an adjoint whose velocity is float16 or bfloat16.
Ensures:  matrix products and sums of which a pullback's wide result is made, by views and additions alone, are no
          longer rounded to the lower dtype.
Source:   arXiv 2510.23498 accumulates gradients in high precision.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import fx

from rampde_fx import graphs
from rampde_fx.loop import Loop

aten = torch.ops.aten
CAST = aten._to_copy.default
ADD = aten.add.Tensor
PRODUCT = {aten.mm.default: aten.mm.dtype, aten.bmm.default: aten.bmm.dtype}
# Products with vectors have no operator with a wide result; Inductor fuses the casts of their factors with the sum.
VECTOR = {aten.mv.default, aten.dot.default}
SUM = {aten.sum.dim_IntList, aten.sum.default}
HALF = (torch.float16, torch.bfloat16)


def widen_gradients(loop: Loop) -> Loop:
    """Widen the sums of every pullback of the adjoint."""
    if loop.adjoint is None or loop.policy.velocity not in HALF:
        return loop
    adjoint = graphs.copied(loop.adjoint)
    pullbacks = {node.target for node in graphs.body(adjoint) if node.meta.get("cotangents")}
    for name in pullbacks:
        module = adjoint.get_submodule(name)
        found = find_sums(module)
        if found:
            adjoint.add_submodule(name, widened(module, found))
    return replace(loop, adjoint=graphs.refresh(adjoint))


def find_sums(module: fx.GraphModule) -> dict[str, list[str]]:
    """The casts by which results leave wide, each with what is to be wide before it: by name, in graph order."""
    found: dict[str, list[str]] = {}
    leaving = {_before_views(result) for result in graphs.results(module)}
    for cast in graphs.body(module):
        if cast in leaving and cast.target is CAST and graphs.value(cast).dtype.itemsize > 2:
            region = _region(cast.args[0])
            found[cast.name] = [node.name for node in graphs.body(module) if node in region]
    return {cast: names for cast, names in found.items() if names}


def _before_views(node: Any) -> Any:
    while graphs.is_view(node) and len(node.users) == 1:
        node = node.args[0]
    return node


def _region(node: fx.Node) -> set[fx.Node]:
    """The sums that a value is made of by views and additions, with these, as far as nothing else reads them."""
    if len(node.users) != 1 or not _is_low(node) or node.target is aten.view.dtype:
        return set()
    if _is_narrow_sum(node):
        return {node}
    terms = node.args[:1] if graphs.is_view(node) else node.args if node.target is ADD else ()
    sums = set().union(*(_region(term) for term in terms if isinstance(term, fx.Node)))
    return {node, *sums} if sums else set()


def _is_low(node: fx.Node) -> bool:
    value = graphs.value(node)
    return isinstance(value, torch.Tensor) and value.dtype in HALF


def _is_narrow_sum(node: fx.Node) -> bool:
    fits = graphs.value(node).dtype is torch.bfloat16 and graphs.value(node).device.type != "cuda"
    return node.target in SUM or ((node.target in PRODUCT or node.target in VECTOR) and not fits)


def widened(module: fx.GraphModule, found: dict[str, list[str]]) -> fx.GraphModule:
    """A copy of a pullback with the found sums formed in float32."""
    module = graphs.copied(module)
    nodes = {node.name: node for node in module.graph.nodes}
    for cast, names in found.items():
        wide = {nodes[name] for name in names}
        for node in (nodes[name] for name in names):
            with module.graph.inserting_before(node):
                _widen(module.graph, node, wide)
        _drop_float32_cast(nodes[cast])
    return graphs.refresh(module)


def _widen(graph: fx.Graph, node: fx.Node, wide: set[fx.Node]) -> None:
    """Form a sum in float32; what is made of sums follows from its operands."""

    def cast(operand: fx.Node) -> fx.Node:
        return operand if operand in wide else graph.call_function(CAST, (operand,), {"dtype": torch.float32})

    if node.target in SUM:
        node.kwargs = {**node.kwargs, "dtype": torch.float32}
    elif node.target in PRODUCT and graphs.value(node).device.type == "cuda":
        node.args, node.target = (*node.args, torch.float32), PRODUCT[node.target]
    elif not graphs.is_view(node):
        node.args = fx.map_arg(node.args, cast)


def _drop_float32_cast(cast: fx.Node) -> None:
    if graphs.value(cast).dtype is torch.float32:
        cast.replace_all_uses_with(cast.args[0])
        cast.graph.erase_node(cast)
