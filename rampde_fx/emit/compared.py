"""What is compared is rounded, as memory has it.

Before:  m: bf16[B, 1] = aten.amax(x, [-1], True);    e: b8[B, D] = aten.eq(x, m)
After:   r: bf16[B, D] = rampde_fx.rounded(x);    s: bf16[B, 1] = rampde_fx.rounded(aten.amax(r, [-1], True))
         e: b8[B, D] = aten.eq(r, s)

Inductor has numbers of lower precision in float32, and leaves their rounding out, but for those that one kernel stores
and another one loads. So x may be compared with what x was rounded to: nothing is the maximum, and the derivative of a
maximum, which divides by how many entries are, is 0 / 0. What such a number follows from entry by entry is rounded,
too: a difference that is zero in memory is zero.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from rampde_fx.ir import graphs, operator_table
from rampde_fx.runtime import operators
from rampde_fx.torch_private import lowerings

LOW_DTYPES = (torch.float16, torch.bfloat16)

operators.library.define("rounded(Tensor x) -> Tensor", tags=(torch.Tag.pointwise,))
operators.library.impl("rounded", torch.clone, "CompositeExplicitAutograd")
ROUNDED, CAST = torch.ops.rampde_fx.rounded.default, torch.ops.prims.convert_element_type.default


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
    """What is compared with tensors, and what it follows from entry by entry."""
    found: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if _compares_tensors(node) or (node in found and _passes_on(node.target)):
            found |= {operand for operand in node.all_input_nodes if graphs.is_float(operand)}
    return found


def _compares_tensors(node: fx.Node) -> bool:
    """Whether a node compares entries of tensors with each other: a number, in the code, is rounded nowhere."""
    if not operator_table.properties(node.target).compares:
        return False
    return not operator_table.is_elementwise(node.target) or sum(map(graphs.is_float, node.all_input_nodes)) > 1


def _passes_on(target: Any) -> bool:
    row = operator_table.properties(target)
    by_entries = operator_table.is_elementwise(target) or operator_table.is_view(target)
    return by_entries or target in (operator.getitem, CAST) or row.dtype == "follows"


def _is_computed(node: fx.Node) -> bool:
    """Whether a number in low precision is made by a kernel that may leave its rounding out."""
    value = graphs.value(node)
    low = isinstance(value, torch.Tensor) and value.dtype in LOW_DTYPES
    passed_on = node.op != "call_function" or operator_table.is_view(node.target) or operator_table.is_product(node)
    return low and not passed_on
