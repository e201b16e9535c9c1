"""Form the sums in a pullback that leave it wide, such as a weight's over the batch, in float32 from the start.

Before:  dw_lo: f16[D, H] = mm(y_lo.T, b_lo);        dw: f32[D, H] = cast(dw_lo)
After:   dw: f32[D, H] = mm(y_lo.T, b_lo, out_dtype=f32)                                 on CUDA
         dw: f32[D, H] = mm(cast(y_lo.T), cast(b_lo))      float16 on other devices, the same numbers

A sum over the batch is what overflows float16 first, and rounding it to float16 is needless: tensor cores sum in
float32. On other devices bfloat16 products stay as they are, for they cannot overflow; a plain sum is widened on
every device.

Requires: a Loop with an adjoint whose velocity is float16 or bfloat16.
Ensures:  matrix products and sums whose only reader is a cast to a wider dtype are no longer rounded to the lower one.
Source:   arXiv 2510.23498 accumulates gradients in high precision.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import fx

from rampde_fx import graphs
from rampde_fx.loop import Loop

aten = torch.ops.aten
CAST = aten._to_copy.default
PRODUCT = {aten.mm.default: aten.mm.dtype, aten.bmm.default: aten.bmm.dtype}
SUM = {aten.sum.dim_IntList, aten.sum.default}
HALF = (torch.float16, torch.bfloat16)


def widen_gradients(loop: Loop) -> Loop:
    """Widen the sums of every pullback of the adjoint."""
    if loop.adjoint is None or loop.policy.velocity not in HALF:
        return loop
    adjoint = graphs.copied(loop.adjoint)
    for name, module in list(adjoint.named_children()):
        found = find_sums(module)
        if found:
            adjoint.add_submodule(name, widened(module, found))
    return replace(loop, adjoint=graphs.refresh(adjoint))


def find_sums(module: fx.GraphModule) -> dict[str, str]:
    """The casts to a wider dtype of what a sum or a product made, and that sum or product, by name."""
    found: dict[str, str] = {}
    for cast in module.graph.find_nodes(op="call_function", target=CAST):
        node = cast.args[0]
        while graphs.is_view(node) and len(node.users) == 1:
            node = node.args[0]
        if _is_narrow_sum(node) and len(node.users) == 1 and graphs.value(cast).dtype.itemsize > 2:
            found[cast.name] = node.name
    return found


def _is_narrow_sum(node: fx.Node) -> bool:
    if not isinstance(graphs.value(node), torch.Tensor) or graphs.value(node).dtype not in HALF:
        return False
    low = graphs.value(node).dtype is torch.bfloat16 and graphs.value(node).device.type != "cuda"
    return node.target in SUM or (node.target in PRODUCT and not low)


def widened(module: fx.GraphModule, found: dict[str, str]) -> fx.GraphModule:
    """A copy of a pullback with the found sums formed in float32."""
    module = graphs.copied(module)
    nodes = {node.name: node for node in module.graph.nodes}
    for cast, name in found.items():
        _widen(module.graph, nodes[name])
        _drop_float32_cast(nodes[cast])
    return graphs.refresh(module)


def _widen(graph: fx.Graph, node: fx.Node) -> None:
    wide = {"dtype": torch.float32}
    with graph.inserting_before(node):
        if node.target in SUM:
            new = graph.call_function(node.target, node.args, {**node.kwargs, **wide})
        elif graphs.value(node).device.type == "cuda":
            new = graph.call_function(PRODUCT[node.target], (*node.args, torch.float32))
        else:
            factors = tuple(graph.call_function(CAST, (factor,), wide) for factor in node.args)
            new = graph.call_function(node.target, factors)
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    graph.erase_node(node)


def _drop_float32_cast(cast: fx.Node) -> None:
    if graphs.value(cast).dtype is torch.float32:
        cast.replace_all_uses_with(cast.args[0])
        cast.graph.erase_node(cast)
