"""Loops under torch.autocast: their policy alone sets their dtypes."""

from __future__ import annotations

from torch import fx

from rampde_fx.ir import graphs
from rampde_fx.ir.loops import HoistedLoop
from rampde_fx.torch_private import fake_tensors


def without_autocast(graph_module: fx.GraphModule, loop: HoistedLoop) -> fx.GraphModule:
    """A part of a loop, which turns autocast off while it runs: the policy has set the dtypes of all inside."""
    if not loop.autocast:
        return graph_module
    graph_module = graphs.copied(graph_module)
    graph, target = graph_module.graph, fake_tensors.enter_autocast
    first = graphs.body(graph_module)[0] if graphs.body(graph_module) else graph.output_node()
    with graph.inserting_before(first):
        regions = [graph.call_function(target, (device, None, False, False)) for device in fake_tensors.AUTOCAST]
    with graph.inserting_before(graph.output_node()):
        for region in reversed(regions):
            graph.call_function(fake_tensors.exit_autocast, (region,))
    graph_module.recompile()
    return graph_module
