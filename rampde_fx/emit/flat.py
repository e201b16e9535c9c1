"""A step or an adjoint as one graph: what it calls is copied into it, and our operators are spelt out."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from rampde_fx.ir import decompositions, graphs, tracing
from rampde_fx.runtime import operators
from rampde_fx.torch_private import fake_tensors

SPELT = {**decompositions.DECOMPOSITIONS, **operators.DECOMPOSITIONS}


def flat(graph_module: fx.GraphModule) -> fx.GraphModule:
    """One graph without submodules, with equal nodes merged and needless casts folded.

    Nothing is traced but the operators that are spelt out, each once for operands of one kind: a trace of the whole
    takes more than twice as long.
    """
    flattening, nodes = _Flattening(), graphs.placeholders(graph_module)
    inputs = [graphs.placeholder(flattening.graph, node.name) for node in nodes]
    for node, twin in zip(nodes, inputs, strict=True):
        twin.meta = dict(node.meta)
    flattening.graph.output(tuple(flattening.inlined(graph_module, inputs)))
    tracing.spell_sizes(flattening.graph)
    flattening.graph.eliminate_dead_code()
    made = fake_tensors.deduplicated(fx.GraphModule(flattening.held, flattening.graph))
    made = graphs.named(made, [node.name for node in nodes])
    _fold_casts(made)
    return made


class _Flattening:
    """The graph that is being made, and what its get_attr nodes hold."""

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.held: dict[str, Any] = {}
        self.spelt: dict[tuple[Any, ...], fx.GraphModule] = {}

    def inlined(self, module: fx.GraphModule, args: list[Any], *, spelt: bool = False) -> list[Any]:
        """The results of a module, which may be spelt out already, for nodes of the graph."""
        env: dict[fx.Node, Any] = dict(zip(graphs.placeholders(module), args, strict=True))
        parts: dict[fx.Node, list[Any]] = {}  # of calls that are no node of the graph
        for node in graphs.body(module):
            if node.op == "call_module":
                inner = module.get_submodule(str(node.target))
                parts[node] = self.inlined(inner, fx.map_arg(list(node.args), env.__getitem__))
            elif node.target is operator.getitem and node.args[0] in parts:
                env[node] = parts[node.args[0]][node.args[1]]
            elif graphs.stops_gradient(node):
                env[node] = env[node.args[0]]
            elif node.target in SPELT and not spelt:
                given = [env[operand] for operand in node.all_input_nodes]
                results = self.inlined(self._spelt_out(node), given, spelt=True)
                if isinstance(graphs.value(node), torch.Tensor):
                    env[node] = results[0]
                else:
                    parts[node] = results
            elif node.op == "get_attr":
                env[node] = self._hold(module, node)
            else:
                env[node] = self.graph.node_copy(node, env.__getitem__)
        return fx.map_arg(list(graphs.results(module)), env.__getitem__)

    def _spelt_out(self, node: fx.Node) -> fx.GraphModule:
        """What computes a node from its operands."""
        nodes = node.all_input_nodes
        numbers = {operand: f"%{i}" for i, operand in enumerate(nodes)}
        spelling = [fx.map_arg(part, lambda n: numbers[n]) for part in (node.args, node.kwargs)]
        key = (node.target, repr(spelling), *(_kind(graphs.value(operand)) for operand in nodes))
        if key not in self.spelt:

            def call(*values: Any) -> list[Any]:
                env = dict(zip(nodes, values, strict=True))
                args, kwargs = (fx.map_arg(part, env.__getitem__) for part in (node.args, node.kwargs))
                result = node.target(*args, **kwargs)
                return [result] if isinstance(result, torch.Tensor) else list(result)

            values = [graphs.value(operand) for operand in nodes]
            self.spelt[key] = tracing.trace(call, values, gradients=False, decompositions=operators.DECOMPOSITIONS)
        return self.spelt[key]

    def _hold(self, module: fx.GraphModule, node: fx.Node) -> fx.Node:
        """A node that reads what the module holds: the body of a loop inside of a velocity."""
        value = getattr(module, str(node.target))
        name = next((name for name, held in self.held.items() if held is value), f"held_{len(self.held)}")
        self.held[name] = value
        twin = self.graph.get_attr(name)
        twin.meta = dict(node.meta)
        return twin


def _kind(value: Any) -> str:
    """What a trace depends on, of an operand."""
    if not isinstance(value, torch.Tensor):
        return str(value)
    return f"{value.dtype}{tuple(value.shape)}{value.stride()}{value.device}"


def _fold_casts(body: fx.GraphModule) -> None:
    """A cast up and back down again is nothing."""
    cast, narrows = torch.ops.aten._to_copy.default, torch.ops.rampde_fx.narrow.default
    for node in list(body.graph.nodes):
        wide = node.args[0] if node.target in (cast, narrows) and list(node.kwargs) == ["dtype"] else None
        if isinstance(wide, fx.Node) and wide.target is cast and list(wide.kwargs) == ["dtype"]:
            narrow = wide.args[0]
            low, high = graphs.value(narrow).dtype, graphs.value(wide).dtype
            if graphs.value(node).dtype == low and torch.promote_types(low, high) == high:
                node.replace_all_uses_with(narrow)
    body.graph.eliminate_dead_code()
    body.recompile()
