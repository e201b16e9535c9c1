"""What decides is rounded, as memory has it.

Before:  m: bf16[B, 1] = aten.amax(x, [-1], True);    e: b8[B, D] = aten.eq(x, m)
After:   r: bf16[B, D] = rampde_fx.rounded(x);    s: bf16[B, 1] = rampde_fx.rounded(aten.amax(r, [-1], True))
         e: b8[B, D] = aten.eq(r, s)

Inductor has numbers of lower precision in float32, and leaves their rounding out, but for those that one kernel stores
and another one loads. So x may be compared with what x was rounded to: nothing is the maximum, and the derivative of a
maximum, which divides by how many entries are, is 0 / 0. Or a guard, where(x < 1, x, 0), is made of another x than what
it guards. So is rounded of what truth values or integers are made, what is compared with each other, and what goes into
a function that jumps, as floor does, whatever becomes of that. What such a number follows from entry by entry is
rounded, too: a difference that is zero in memory is zero. And x w and w x are one number, or a guard by one of them
would let the other one through.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from rampde_fx.ir import graphs, operator_table
from rampde_fx.ir.lowering import is_half
from rampde_fx.runtime import operators
from rampde_fx.torch_private import lowerings

operators.library.define("rounded(Tensor x) -> Tensor", tags=(torch.Tag.pointwise,))
operators.library.impl("rounded", torch.clone, "CompositeExplicitAutograd")
ROUNDED = torch.ops.rampde_fx.rounded.default
aten = torch.ops.aten
BITS = aten.view.dtype


@dataclass(frozen=True)
class RoundCompared:
    """A pass over a graph of ATen operators: rounds what decides, in place.

    Attributes:
        spelled_out: By operators of torch alone: a look at the bits, for which there must be some.
    """

    spelled_out: bool = False

    def __call__(self, graph: fx.Graph) -> None:
        _merge_commuted(graph)
        found = _compared(graph)
        for node in [node for node in graph.nodes if node in found and _is_computed(node)]:
            with graph.inserting_before(node.next):
                first, rounded = self._round(graph, node)
            # What is given back memory rounds; a signature has its name.
            for user in [user for user in node.users if user is not first and user.op != "output"]:
                user.replace_input_with(node, rounded)

    def _round(self, graph: fx.Graph, node: fx.Node) -> tuple[fx.Node, fx.Node]:
        """What reads a number, and the rounded one."""
        if not self.spelled_out:
            rounded = graphs.valued(graph, ROUNDED, node)
            return rounded, rounded
        bits = graphs.valued(graph, BITS, node, torch.int16)
        same = graphs.valued(graph, aten.bitwise_and.Scalar, bits, -1)  # two looks alone are taken for none
        return bits, graphs.valued(graph, BITS, same, graphs.value(node).dtype)

    def uuid(self) -> str:
        """What the result depends on, for Inductor's caches."""
        return repr(self)


def round_compared() -> RoundCompared:
    """The pass over what Inductor lowers, for any device."""
    lowerings.lower_rounded(ROUNDED)
    return RoundCompared()


def _merge_commuted(graph: fx.Graph) -> None:
    """Make one of low sums and products of the same two operands."""
    known: dict[Any, fx.Node] = {}
    for node in list(graph.nodes):
        plain = operator_table.properties(node.target).commutes and len(node.args) == 2 and not node.kwargs
        if not plain or not is_half(graphs.value(node)):
            continue
        first = known.setdefault((node.target, frozenset(node.args), str(graphs.value(node).stride())), node)
        if first is not node:
            node.replace_all_uses_with(first)
            graph.erase_node(node)


def _compared(graph: fx.Graph) -> set[fx.Node]:
    """What decides, and what it follows from entry by entry."""
    found: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if _decides(node) or (node in found and _passes_on(node.target)):
            found |= {operand for operand in node.all_input_nodes if graphs.is_float(operand)}
    return found


def _decides(node: fx.Node) -> bool:
    """Whether a node makes truth values or integers of numbers, compares them with each other, or jumps between two."""
    row, value = operator_table.properties(node.target), graphs.value(node)
    has_none = isinstance(value, torch.Tensor) and not (value.is_floating_point() or value.is_complex())
    return row.compares or row.jumps or (has_none and not row.reads_shape)


def _passes_on(target: Any) -> bool:
    row = operator_table.properties(target)
    by_entries = operator_table.is_elementwise(target) or operator_table.is_view(target)
    return by_entries or target is operator.getitem or row.dtype == "follows"


def _is_computed(node: fx.Node) -> bool:
    """Whether a number in low precision is made by a kernel that may leave its rounding out."""
    passed_on = node.op != "call_function" or operator_table.is_view(node.target) or operator_table.is_product(node)
    return is_half(graphs.value(node)) and not passed_on
