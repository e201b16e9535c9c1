"""Take what computes Python numbers from inputs of the graph out of its loops.

Dynamo turns an int that changes, and under dynamic=True each int, into an input of the graph, and computes with it
where it is first read. That may be inside of a loop, whose steps read tensors and sizes alone.

Before:  step(t, 0);  more = count + 1;  k = y.narrow(0, 0, more)
After:   more = count + 1;  step(t, 0);  k = y.narrow(0, 0, more)

Requires: a graph captured by Dynamo, whose floats lift_floats has lifted, and its first marker.
Ensures:  no node behind the marker computes a number from inputs of the graph alone: from numbers, or as a size of a
          tensor (y.size(0)).
Raises:   nothing.
"""

from __future__ import annotations

import torch
from torch import fx

from rampde_fx.ir.graphs import value


def lift_numbers(graph_module: fx.GraphModule, first: fx.Node) -> None:
    """Take numbers out of the loops of a graph, in place; first is its first marker."""
    lifted = set(graph_module.graph.find_nodes(op="placeholder"))
    for node in [node for node in graph_module.graph.nodes if _is_number(node) and node.op != "placeholder"]:
        if node.all_input_nodes and lifted.issuperset(node.all_input_nodes):
            lifted.add(node)
            if not node < first:
                first.prepend(node)


def _is_number(node: fx.Node) -> bool:
    return isinstance(value(node), (torch.SymFloat, torch.SymInt))
