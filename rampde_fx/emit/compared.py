"""What is compared is rounded, as memory has it.

Before:  m: bf16[B, 1] = aten.amax(x, [-1], True);    e: b8[B, D] = aten.eq(x, m)
After:   r: bf16[B, D] = rampde_fx.rounded(x);    s: bf16[B, 1] = rampde_fx.rounded(aten.amax(r, [-1], True))
         e: b8[B, D] = aten.eq(r, s)

Inductor has numbers of lower precision in float32, and leaves their rounding out, but for those that one kernel stores
and another one loads. So x may be compared with what x was rounded to: nothing is the maximum, and the derivative of a
maximum, which divides by how many entries are, is 0 / 0. Or a guard, where(x < 1, x, 0), is made of another x than what
it guards. What such a number follows from entry by entry is rounded, too: a difference that is zero in memory is zero.
How many entries are below a number of the code may be counted of either.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from rampde_fx.ir import graphs, operator_table
from rampde_fx.ir.lowering import HALF
from rampde_fx.runtime import operators
from rampde_fx.torch_private import lowerings

operators.library.define("rounded(Tensor x) -> Tensor", tags=(torch.Tag.pointwise,))
operators.library.impl("rounded", torch.clone, "CompositeExplicitAutograd")
ROUNDED = torch.ops.rampde_fx.rounded.default


@dataclass(frozen=True)
class RoundCompared:
    """A pass over what Inductor lowers: rounds what is compared, in place."""

    def __call__(self, graph: fx.Graph) -> None:
        found = _compared(graph)
        for node in [node for node in graph.nodes if node in found and _is_computed(node)]:
            with graph.inserting_after(node):
                rounded = graphs.valued(graph, ROUNDED, node)
            node.replace_all_uses_with(rounded, delete_user_cb=lambda user, own=rounded: user is not own)

    def uuid(self) -> str:
        """What the result depends on, for Inductor's caches."""
        return repr(self)


def round_compared() -> RoundCompared:
    """The pass, for any device."""
    lowerings.lower_rounded(ROUNDED)
    return RoundCompared()


def _compared(graph: fx.Graph) -> set[fx.Node]:
    """What is compared, and what it follows from entry by entry."""
    found: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if _compares(node) or (node in found and _passes_on(node.target)):
            found |= {operand for operand in node.all_input_nodes if graphs.is_float(operand)}
    return found


def _compares(node: fx.Node) -> bool:
    """Whether a node compares entries with each other, or with a number by which entries are chosen."""
    if not operator_table.properties(node.target).compares:
        return False
    with_number = operator_table.is_elementwise(node.target) and sum(map(graphs.is_float, node.all_input_nodes)) < 2
    return not with_number or _chooses(node)


def _chooses(mask: fx.Node) -> bool:
    """Whether truth values, in whatever dtype, meet entries, and are not only counted."""
    return any(map(_meets_entries, mask.users))


def _meets_entries(user: fx.Node) -> bool:
    """Whether what reads truth values lets them meet entries; another graph may: of an output, and in a loop."""
    target, by_entries = user.target, operator_table.is_elementwise(user.target)
    if operator_table.is_cast(target) or operator_table.is_view(target) or (by_entries and _is_bool(user)):
        return _chooses(user)
    follows = operator_table.properties(target).dtype == "follows"
    return by_entries or follows or not isinstance(target, torch._ops.OpOverload)


def _is_bool(node: fx.Node) -> bool:
    value = graphs.value(node)
    return isinstance(value, torch.Tensor) and value.dtype is torch.bool


def _passes_on(target: Any) -> bool:
    row = operator_table.properties(target)
    by_entries = operator_table.is_elementwise(target) or operator_table.is_view(target)
    return by_entries or target is operator.getitem or row.dtype == "follows"


def _is_computed(node: fx.Node) -> bool:
    """Whether a number in low precision is made by a kernel that may leave its rounding out."""
    value = graphs.value(node)
    low = isinstance(value, torch.Tensor) and value.dtype in HALF
    passed_on = node.op != "call_function" or operator_table.is_view(node.target) or operator_table.is_product(node)
    return low and not passed_on
