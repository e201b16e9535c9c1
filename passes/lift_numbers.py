"""Take Python numbers that are inputs of the graph out of its loops.

Dynamo makes an input of a float or an int that changes, or of every one under dynamic=True, where it is read first. A
loop has no place for what computes a number: its steps read tensors and sizes.

Before:  step(t, 0); alpha = l_alpha.item(); half = alpha / 2; leaky_relu(k, half); more = count + 1
After:   more = count + 1; step(t, 0); leaky_relu(k, 0.15)

A float becomes a constant, and a guard of the graph: torch's own compilers keep no float as an input either, unless
each of its readers is an operation on a tensor that they know. Another value needs another graph.

Requires: a graph captured by Dynamo, and its first marker.
Ensures:  no node behind the marker computes a number from inputs that are numbers; none reads such a float.
Raises:   nothing.
"""

from __future__ import annotations

import torch
from torch import fx

from rampde_fx import torch_private
from rampde_fx.graphs import value


def lift_numbers(graph_module: fx.GraphModule, first: fx.Node) -> None:
    """Take numbers out of the loops of a graph, in place; first is its first marker."""
    lifted = set(graph_module.graph.find_nodes(op="placeholder"))
    for node in [node for node in graph_module.graph.nodes if _is_number(node) and node.op != "placeholder"]:
        if node.all_input_nodes and lifted.issuperset(node.all_input_nodes):
            lifted.add(node)
            if not node < first:
                first.prepend(node)
    for node in [node for node in graph_module.graph.nodes if isinstance(value(node), torch.SymFloat)]:
        readers = [user for user in node.users if not user < first]
        if readers and torch_private.is_known(value(node)):
            _replace(node, readers)


def _is_number(node: fx.Node) -> bool:
    return isinstance(value(node), (torch.SymFloat, torch.SymInt))


def _replace(node: fx.Node, readers: list[fx.Node]) -> None:
    """Give the readers of a number its value, which guards it."""
    constant = float(value(node))
    for reader in readers:
        args, kwargs = fx.map_arg((reader.args, reader.kwargs), lambda n: constant if n is node else n)
        reader.args, reader.kwargs = args, kwargs
    if not node.users and node.op != "placeholder":
        node.graph.erase_node(node)
