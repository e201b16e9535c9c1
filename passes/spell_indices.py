"""Read entries by 0-d integer tensors as tensor indices.

Before:  getitem(u, i)                     u[..., i, 1:]
After:   aten.index(u, [i])                aten.index(u, [None, i])[..., 1:]

Python's indexing reads the number out of such a tensor, to take a view. In a graph whose numbers may become sizes, as
they may where loops are, it then stays a number that nobody knows: of a tensor that depends on time, for one.

Requires: a graph captured by Dynamo.
Ensures:  no index of a value that is only read is a 0-d integer tensor.
Raises:   nothing. An index of what is changed in place stays as it is.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from rampde_fx import graphs, torch_private
from rampde_fx.graphs import value


def spell_indices(graph_module: fx.GraphModule) -> None:
    """Spell the indices of a graph, and of those inside it, in place."""
    for module in graph_module.modules():
        if isinstance(module, fx.GraphModule):
            for node in module.graph.find_nodes(op="call_function", target=operator.getitem):
                places = _places(node)
                if places and not any(map(graphs.mutates, node.users)):
                    _spell(node, places)


def _places(node: fx.Node) -> dict[int, int]:
    """For each 0-d integer tensor in the index, by its position there, the dimension that it indexes."""
    source, index = node.args
    if not isinstance(source, fx.Node) or not isinstance(value(source), torch.Tensor):
        return {}
    entries = index if isinstance(index, tuple) else (index,)
    used = [_dimensions(entry) for entry in entries]
    rest = value(source).ndim - sum(used)
    dimension, places = 0, {}
    for position, (entry, count) in enumerate(zip(entries, used, strict=True)):
        if _is_scalar(entry):
            places[position] = dimension
        dimension += rest if entry is Ellipsis else count
    return places


def _dimensions(entry: Any) -> int:
    """How many dimensions an entry of an index takes."""
    if entry is None or entry is Ellipsis or isinstance(entry, bool):
        return 0
    indexing = value(entry) if isinstance(entry, fx.Node) else None
    mask = isinstance(indexing, torch.Tensor) and indexing.dtype in (torch.bool, torch.uint8)
    return indexing.ndim if mask and indexing is not None else 1


def _is_scalar(entry: Any) -> bool:
    indexing = value(entry) if isinstance(entry, fx.Node) else None
    integers = (torch.int64, torch.int32, torch.int16, torch.int8)
    return isinstance(indexing, torch.Tensor) and indexing.ndim == 0 and indexing.dtype in integers


def _spell(node: fx.Node, places: dict[int, int]) -> None:
    source, index = node.args
    entries = index if isinstance(index, tuple) else (index,)
    indices: list[Any] = [None] * (1 + max(places.values()))
    rest = tuple(entry for position, entry in enumerate(entries) if position not in places)
    with node.graph.inserting_before(node):
        for position, dimension in places.items():
            indices[dimension] = _as_index(node.graph, entries[position])
        read = node.graph.call_function(torch.ops.aten.index.Tensor, (source, indices))
        read.meta = {**node.meta, "example_value": torch_private.run_fake(read)}
        if any(entry is not Ellipsis and entry != slice(None) for entry in rest):
            twin = node.graph.call_function(operator.getitem, (read, rest))
            twin.meta = dict(node.meta)
            read = twin
    node.replace_all_uses_with(read)
    node.graph.erase_node(node)


def _as_index(graph: fx.Graph, entry: fx.Node) -> fx.Node:
    if value(entry).dtype is torch.int64:
        return entry
    wide = graph.call_method("long", (entry,))
    wide.meta = {**entry.meta, "example_value": torch_private.run_fake(wide)}
    return wide
