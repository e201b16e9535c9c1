"""Casts of factors on a CPU: in front of views that merge dimensions or divide them, instead of behind.

Before:  v: f32[B * D, H] = aten.reshape(x, [B * D, H]);   c: f16[B * D, H] = rampde_fx.narrow(v)
After:   n: f16[B, D, H] = rampde_fx.narrow(x);            c: f16[B * D, H] = aten.reshape(n, [B * D, H])

Behind such a view Inductor computes every entry by itself, with divisions for its place: 45 us instead of 4 for
64 x 8 x 64 entries. In front of it the cast is fused with what makes the entries, vector by vector, and the view of a
whole tensor costs nothing. What makes no entries one by one, such as a convolution, stays as it is. So does what others
read: operations of entries would have the divisions then, and a convolution, which takes channels last, a copy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from rampde_fx.ir import graphs, operator_table
from rampde_fx.torch_private import shapes

aten = torch.ops.aten
CASTS = (torch.ops.prims.convert_element_type.default, torch.ops.rampde_fx.narrow.default)


@dataclass(frozen=True)
class MoveCasts:
    """A pass over what Inductor lowers: moves casts to the front of views, in place."""

    def __call__(self, graph: fx.Graph) -> None:
        for node in list(graph.nodes):
            view = node.args[0] if node.target in CASTS else None
            if is_merged(view) and graphs.value(node).device.type == "cpu" and _is_factor(node):
                _move(graph, node, view)

    def uuid(self) -> str:
        """What the result depends on, for Inductor's caches."""
        return repr(self)


def is_merged(node: Any) -> bool:
    """Whether it merges or divides dimensions of what an operation of entries makes."""
    if not graphs.is_view(node) or not operator_table.is_elementwise(node.args[0].target):
        return False
    seen, made = graphs.value(node), graphs.value(node.args[0])
    return seen.dim() != made.dim() and all(shapes.has_no_more_entries(*pair) for pair in ((seen, made), (made, seen)))


def _is_factor(node: fx.Node) -> bool:
    """Whether all that read it, its transpose or a cast of it are products of matrices."""
    return bool(node.users) and all(
        operator_table.properties(user.target).product == "matrices"
        or (user.target in (aten.permute.default, *CASTS) and _is_factor(user))
        for user in node.users
    )


def _move(graph: fx.Graph, cast: fx.Node, view: fx.Node) -> None:
    with graph.inserting_before(cast):
        first = graphs.valued(graph, cast.target, view.args[0], *cast.args[1:], **cast.kwargs)
        moved = graphs.valued(graph, view.target, first, *view.args[1:])
    cast.replace_all_uses_with(moved)
    graph.erase_node(cast)
    if not view.users:
        graph.erase_node(view)
