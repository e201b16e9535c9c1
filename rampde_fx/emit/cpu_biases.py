"""Biases of small products on a CPU: added by what reads the product, instead of copied into its place first.

Before:  h: f32[B, H] = aten.addmm(bias, x, w)
After:   p: f32[B, H] = aten.mm(x, w);   h: f32[B, H] = aten.add(p, bias)

In float32 addmm fills its result with the bias and adds the product to it, which costs as much as a small product. A
sum that elementwise operations read is fused with them. In lower precision the sum would round once more: there addmm
stays, as it does where something else reads it. This runs behind Inductor's own passes, which join the two.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from rampde_fx.ir import graphs, operator_table

aten = torch.ops.aten


@dataclass(frozen=True)
class SplitBiases:
    """A pass over what Inductor lowers: takes biases out of products, in place."""

    def __call__(self, graph: fx.Graph) -> None:
        for node in graph.find_nodes(op="call_function", target=aten.addmm.default):
            value = graphs.value(node)
            if value.dtype is torch.float32 and value.device.type == "cpu" and not node.kwargs and _is_fused(node):
                _split(graph, node)

    def uuid(self) -> str:
        """What the result depends on, for Inductor's caches."""
        return repr(self)


def _is_fused(node: fx.Node) -> bool:
    """Whether all that reads it are operations of entries, which Inductor computes in one kernel with a sum."""
    return bool(node.users) and all(operator_table.is_elementwise(user.target) for user in node.users)


def _split(graph: fx.Graph, node: fx.Node) -> None:
    bias, first, second = node.args
    with graph.inserting_before(node):
        product = graph.call_function(aten.mm.default, (first, second))
        total = graph.call_function(aten.add.Tensor, (product, bias))
    product.meta["val"] = total.meta["val"] = graphs.value(node)
    node.replace_all_uses_with(total)
    graph.erase_node(node)
