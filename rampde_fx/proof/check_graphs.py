"""What check does with captured graphs: policies in them, runs without their random numbers, compilations."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from rampde_fx.emit.inductor_passes import inductor_passes
from rampde_fx.ir import graphs
from rampde_fx.ir.captured import begins_iteration
from rampde_fx.ir.loops import LoopNode
from rampde_fx.policy import MONITORED, PrecisionPolicy
from rampde_fx.runtime import phase_log
from rampde_fx.torch_private import inductor
from rampde_fx.validation.widening import AsWritten


class Seeded(AsWritten):
    """Runs a graph whose loops are rolled up without drawing their seeds."""

    def run_node(self, n: fx.Node) -> Any:
        loops = [user for user in n.users if user.op == "call_module"]
        if n.target is torch.randint and any(isinstance(self.fetch_attr(str(u.target)), LoopNode) for u in loops):
            return torch.zeros((), dtype=torch.int64, device=n.kwargs["device"])
        return super().run_node(n)


def always(policy: PrecisionPolicy) -> Callable[[PrecisionPolicy], PrecisionPolicy]:
    """A policy for every loop, whatever its own is."""
    return lambda _: policy


def policies_of(graph_module: fx.GraphModule) -> list[PrecisionPolicy]:
    """The policies that the markers carry."""
    markers = filter(begins_iteration, graphs.all_nodes(graph_module))
    told = dict.fromkeys(str(marker.args[-1]).removeprefix(MONITORED) for marker in markers)
    return [PrecisionPolicy.parse(text) for text in told if text]


def compile_alone(compiler: str, graph_module: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    """A rewritten graph, compiled by one of the backend's compilers."""
    with inductor.compile_settings():
        watch = functools.partial(phase_log.lowering, [])
        return inductor.compile_graph(compiler, graph_module, example_inputs, {}, None, inductor_passes(), None, watch)
