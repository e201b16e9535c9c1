"""Write u[i], with a 0-d integer tensor i, as an index by a tensor.

Before:  getitem(u, i)                     u[..., i, 1:]
After:   read_at(u, (i,), {0: 0})          read_at(u, (..., i, 1:), {1: 1}): {place in the index: dimension of u}

read_at is aten.index(u, [i]), and aten.index(u, [None, i])[..., 1:].

Python's indexing reads the number out of such a tensor, to take a view; Dynamo keeps it as a symbol. Where the index is
computed from a time, in a step or outside of the loop, the symbol has no known value, and the rewrite would fail.

Requires: a graph captured by Dynamo.
Ensures:  no index of a value that is only read is a 0-d integer tensor.
Raises:   nothing. An index of what is changed in place stays as it is.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from rampde_fx import indices
from rampde_fx.ir.effects import Observer
from rampde_fx.ir.graphs import value


def spell_indices(graph_module: fx.GraphModule) -> None:
    """Spell the indices of a graph, and of those inside it, in place."""
    observer = Observer()
    for module in graph_module.modules():
        if isinstance(module, fx.GraphModule):
            # A reader first: what an index by a tensor does to its source is known once it is spelled.
            for node in reversed(module.graph.find_nodes(op="call_function", target=operator.getitem)):
                places = _places(node)
                if places and not any(observer.effects(user).writes for user in node.users):
                    _spell(node, places)


def _places(node: fx.Node) -> dict[int, int]:
    source, index = node.args
    if not isinstance(source, fx.Node) or not isinstance(value(source), torch.Tensor):
        return {}
    entries = index if isinstance(index, tuple) else (index,)
    return indices.scalar_places(value(source), [_known(entry) for entry in entries])


def _known(entry: Any) -> Any:
    return value(entry) if isinstance(entry, fx.Node) else entry


def _spell(node: fx.Node, places: dict[int, int]) -> None:
    source, index = node.args
    entries = index if isinstance(index, tuple) else (index,)
    with node.graph.inserting_before(node):
        read = node.graph.call_function(indices.read_at, (source, entries, places))
    read.meta = dict(node.meta)
    node.replace_all_uses_with(read)
    node.graph.erase_node(node)
