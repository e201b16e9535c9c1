"""Tracing: a function of flat arguments becomes a functional ATen graph."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import fx

from rampde_fx.errors import UnsupportedLoopError
from rampde_fx.ir import operator_table
from rampde_fx.ir.decompositions import DECOMPOSITIONS
from rampde_fx.torch_private import fake_tensors, shapes

aten = torch.ops.aten

MAX_CONSTANT = 64


def trace(
    function: Callable[..., Any],
    args: Sequence[Any],
    *,
    functionalize: bool = False,
    gradients: bool = True,
    decompositions: Mapping[Any, Callable[..., Any]] = MappingProxyType({}),
) -> fx.GraphModule:
    """Trace a function of flat arguments to a functional ATen graph with true metadata.

    Gradients are on by default, for under no_grad a velocity's own torch.func.vjp is traced into zeros.
    """
    graph_module = fake_tensors.graph_of(
        function, args, {**DECOMPOSITIONS, **decompositions}, functionalize=functionalize, gradients=gradients
    )
    for node in list(graph_module.graph.nodes):
        row = operator_table.properties(node.target)
        if row.traced == "dropped":  # what tracing leaves behind and a functional graph does not need
            node.replace_all_uses_with(node.args[0])
        if node.target is aten._conj.default and not isinstance(node.args[0], fx.Node):  # of a constant of the user's
            node.replace_all_uses_with(node.args[0].conjugate())
        if row.traced == "reshape":  # a view of the traced strides; passes may bring others
            node.target = aten.reshape.default
        if node.op == "get_attr" and isinstance(constant := getattr(graph_module, node.target, None), torch.Tensor):
            _spell_out(node, constant)
        assert not _writes(node), f"{node.target} writes to a tensor: what reads it would not depend on what is written"
    spell_sizes(graph_module.graph)
    graph_module.graph.eliminate_dead_code()
    graph_module.recompile()
    return graph_module


def spell_sizes(graph: fx.Graph) -> None:
    """Compute the sizes of tensors on the way from the inputs' own.

    Else a number would follow from the tensor whose size it is: from a velocity, where it is none.
    """
    inputs = graph.find_nodes(op="placeholder")
    read = [
        node
        for node in graph.nodes
        if isinstance(node.meta.get("val"), torch.SymInt)
        and operator_table.properties(node.target).reads_shape
        and node.args[0].op != "placeholder"
    ]
    if not read:
        return
    with graph.inserting_before(inputs[-1].next):
        known = _sizes_of_inputs(graph)
    for node in read:
        with graph.inserting_before(node):
            last = node.prev
            spelt = shapes.spell(node.meta["val"], known)
        while (last := last.next) is not node:
            last.meta["val"] = last.target(*fx.map_arg(last.args, lambda number: number.meta["val"]))
        if spelt is not None:
            node.replace_all_uses_with(spelt)


def _sizes_of_inputs(graph: fx.Graph) -> dict[Any, fx.Node]:
    """The nodes of what the inputs' sizes depend on: of symbols, or of quotients and products of these."""
    inputs = graph.find_nodes(op="placeholder")
    known = {shapes.symbol_alone(node.meta.get("val")): node for node in reversed(inputs)}
    known.pop(None, None)
    for node in inputs:
        value = node.meta.get("val")
        for i, size in enumerate(value.shape if isinstance(value, torch.Tensor) else ()):
            if not isinstance(size, torch.SymInt):
                continue
            part, factor, constant = shapes.as_linear(size)
            if part not in known:
                known[part] = graph.call_function(aten.sym_size.int, (node, i))
                known[part].meta["val"] = size
                for function, number, neutral in ((operator.sub, constant, 0), (operator.floordiv, factor, 1)):
                    if number != neutral:
                        before = known[part]
                        known[part] = graph.call_function(function, (before, number))
                        known[part].meta["val"] = function(before.meta["val"], number)
    return known


def _writes(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _spell_out(node: fx.Node, constant: torch.Tensor) -> None:
    """Make a small constant tensor from numbers; a graph inside of a graph cannot own tensors."""
    if constant.numel() > MAX_CONSTANT:
        raise UnsupportedLoopError(
            f"a step makes a constant tensor of {constant.numel()} entries from Python numbers",
            required=f"constants of at most {MAX_CONSTANT} entries inside the loop",
            fix="make the tensor before the loop",
        )
    with fake_tensors.unfaked():
        numbers, like = constant.flatten().tolist(), {"dtype": constant.dtype, "device": constant.device}
    graph = node.graph
    with graph.inserting_before(node):
        entries = [graph.call_function(aten.full.default, ([], number), like) for number in numbers]
        whole = graph.call_function(aten.stack.default, (entries,)) if entries else None
        shaped = graph.call_function(aten.reshape.default, (whole, list(constant.shape)))
    shaped.meta = dict(node.meta)
    node.replace_all_uses_with(shaped)


class LinalgChecks(fake_tensors.TorchDispatchMode):
    """Collects what linear algebra would check, and raise, where it is captured: a graph has no place for that.

    Attributes:
        infos: LAPACK's codes, 0 for each matrix that could be solved, factored or decomposed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.infos: list[torch.Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is aten._linalg_check_errors.default:
            self.infos.append(args[0])
            return None
        return func(*args, **(kwargs or {}))
