"""From which state a result of a step follows, where nothing comes back to be compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from rampde_fx.ir import graphs, operator_table
from rampde_fx.ir.operator_table import properties

# A state keeps its identity through updates by these, whatever it is scaled by and whatever is added.
CHAIN = ("add", "scale", "copy")


def _by_sums(node: fx.Node) -> list[fx.Node]:
    return node.all_input_nodes if properties(node.target).update in CHAIN else []


def _without_a_product(node: fx.Node) -> list[fx.Node]:
    if not operator_table.is_product(node):
        return node.all_input_nodes
    return [node.args[0]] if _adds(node) else []


def _adds(node: fx.Node) -> bool:
    row = properties(node.target)
    return row.update == "add" or row.first_is_summand


def _by_any_path(node: fx.Node) -> list[fx.Node]:
    return node.all_input_nodes


@dataclass(frozen=True)
class Way:
    """How a result may follow from a state.

    Attributes:
        operands: Those of a node through which the state may have come.
        adds: Whether there must be a sum on the way.
        shared: Whether several results may follow from one state.
    """

    operands: Callable[[fx.Node], list[fx.Node]]
    adds: bool = False
    shared: bool = False


WAYS = (Way(_by_sums), Way(_without_a_product, adds=True, shared=True), Way(_without_a_product), Way(_by_any_path))


def state_behind(result: Any, candidates: dict[fx.Node, int], way: Way) -> int | None:
    """The candidate from which the result follows in the given way.

    If there are several, no parameter, one that the step reads elsewhere too, and the leftmost of these.
    """
    if not isinstance(result, fx.Node) or not isinstance(graphs.value(result), torch.Tensor):
        return None
    found: dict[fx.Node, None] = {}
    start = (result, not way.adds)  # and whether the sum has been met
    open_nodes, seen = [start], {start}
    while open_nodes:
        node, summed = open_nodes.pop()
        if summed and node in candidates and same_kind(graphs.value(node), graphs.value(result)):
            found[node] = None
        parents = [(p, summed or _adds(node)) for p in way.operands(node)]
        parents = [pair for pair in dict.fromkeys(parents) if pair not in seen]
        seen.update(parents)
        open_nodes += reversed(parents)
    ranked = sorted(found, key=lambda n: (isinstance(graphs.value(n), torch.nn.Parameter), len(n.users) == 1))
    return candidates[ranked[0]] if ranked else None


def same_kind(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors have one shape, dtype and device."""
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device
