"""Form the sums of a pullback in float32: those that leave it, such as a weight's over the batch, and long ones inside.

Before:  dw_lo: f16[D, H] = add(mm(y_lo.T, b_lo), mm(z_lo.T, c_lo));        dw: f32[D, H] = cast(dw_lo)
After:   dw: f32[D, H] = add(mm(y_lo.T, b_lo, out_dtype=f32), mm(z_lo.T, c_lo, out_dtype=f32))           on CUDA
         dw: f32[D, H] = add(mm(cast(y_lo.T), cast(b_lo)), ...)      float16 on other devices, the same numbers

A sum over the batch is what overflows float16 first, and rounding it to float16 is needless: tensor cores sum in
float32. A weight that a velocity reads more than once has several such sums, which are added up wide too. On other
devices bfloat16 products stay as they are, for they cannot overflow; a plain sum is widened on every device.

What adds up many terms one by one, such as the derivative of an index or of an embedding, takes float32 and is rounded
once, as does every operation that the operator table does not know.

Requires: a Loop behind generate_adjoint. One without an adjoint, or with a velocity in float32 or float64, is left as
          it is.
Ensures:  products and sums that reach a wide result of a pullback through views and additions alone stay in float32;
          no operation rounds each of its partial sums.
Source:   arXiv 2510.23498 accumulates gradients in high precision.
"""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from rampde_fx.ir import graphs, operator_table
from rampde_fx.ir.loops import DifferentiatedLoop, SummedLoop
from rampde_fx.ir.lowering import HALF
from rampde_fx.ir.operator_table import properties

aten = torch.ops.aten
CAST = aten._to_copy.default
ADD = aten.add.Tensor
WIDE = {"dtype": torch.float32}


def widen_gradients(loop: DifferentiatedLoop) -> SummedLoop:
    """Widen the sums of every pullback of the adjoint."""
    if loop.adjoint is None or loop.policy.dtype not in HALF:
        return loop.then(SummedLoop)
    adjoint = graphs.copied(loop.adjoint.module)
    pullbacks = {str(call.target) for _, call in loop.adjoint.pullbacks()}
    for name in pullbacks:
        module = adjoint.get_submodule(name)
        if find_low_accumulations(module):
            module = with_wide_accumulations(module)
            adjoint.add_submodule(name, module)
        found = find_sums(module)
        if found:
            adjoint.add_submodule(name, with_wide_sums(module, found))
    return loop.then(SummedLoop, adjoint=replace(loop.adjoint, module=graphs.refresh(adjoint)))


def find_low_accumulations(module: fx.GraphModule) -> list[fx.Node]:
    """The operations that may add terms up in low precision one by one."""

    def accumulates(node: fx.Node) -> bool:
        row = properties(node.target)
        once = row.dtype == "low" or row.rounded_once
        known = once or operator_table.follows_operands(node.target, node.args, node.kwargs)
        return not known and any(map(_is_low, node.all_input_nodes))

    return [node for node in graphs.body(module) if accumulates(node)]


def with_wide_accumulations(module: fx.GraphModule) -> fx.GraphModule:
    """A copy of a pullback in which these take float32 and give what they gave, rounded once."""
    module = graphs.copied(module)
    graph = module.graph
    for node in find_low_accumulations(module):
        low = [item for item in node.users if item.target is operator.getitem] if _is_list(node) else [node]
        low = [(item, graphs.value(item).dtype) for item in low if _is_low(item)]
        with graph.inserting_before(node):
            wide = {
                operand: graph.call_function(CAST, (operand,), WIDE)
                for operand in filter(_is_low, node.all_input_nodes)
            }
        node.args, node.kwargs = fx.map_arg((node.args, node.kwargs), lambda n, wide=wide: wide.get(n, n))
        for item, dtype in low:
            with graph.inserting_after(item):
                rounded = graph.call_function(CAST, (item,), {"dtype": dtype})
            widening = [user for user in item.users if user.target is CAST and user.kwargs == WIDE]
            item.replace_all_uses_with(rounded, delete_user_cb=lambda user, own=rounded: user is not own)
            for user in widening:
                user.replace_all_uses_with(item)
    return graphs.refresh(module)


def _is_list(node: fx.Node) -> bool:
    return isinstance(graphs.value(node), (tuple, list))


def find_sums(module: fx.GraphModule) -> dict[str, list[str]]:
    """The casts by which results leave wide, each with what is to be wide before it: by name, in graph order."""
    found: dict[str, list[str]] = {}
    leaving = {_before_views(result) for result in graphs.results(module)}
    for cast in graphs.body(module):
        if cast in leaving and cast.target is CAST and graphs.value(cast).dtype.itemsize > 2:
            region = _region(cast.args[0])
            found[cast.name] = [node.name for node in graphs.body(module) if node in region]
    return {cast: names for cast, names in found.items() if names}


def _before_views(node: Any) -> Any:
    while graphs.is_view(node) and len(node.users) == 1:
        node = node.args[0]
    return node


def _region(node: fx.Node) -> set[fx.Node]:
    """The sums that a value is made of by views and additions, with these, as far as nothing else reads them."""
    if len(node.users) != 1 or not _is_low(node) or node.target is aten.view.dtype:
        return set()
    if _is_narrow_sum(node):
        return {node}
    if node.target is CAST and not _is_low(node.args[0]):  # a parameter in another low dtype
        return {node}
    terms = node.args[:1] if graphs.is_view(node) or node.target is CAST else node.args if node.target is ADD else ()
    sums = set().union(*(_region(term) for term in terms if isinstance(term, fx.Node)))
    return {node, *sums} if sums else set()


def _is_low(node: fx.Node) -> bool:
    value = graphs.value(node)
    return isinstance(value, torch.Tensor) and value.dtype in HALF


def _is_narrow_sum(node: fx.Node) -> bool:
    fits = graphs.value(node).dtype is torch.bfloat16 and graphs.value(node).device.type != "cuda"
    return properties(node.target).rounded_once or (operator_table.is_matrix_product(node) and not fits)


def with_wide_sums(module: fx.GraphModule, found: dict[str, list[str]]) -> fx.GraphModule:
    """A copy of a pullback with the found sums formed in float32."""
    module = graphs.copied(module)
    nodes = {node.name: node for node in module.graph.nodes}
    for cast, names in found.items():
        wide = {nodes[name] for name in names}
        for node in (nodes[name] for name in names):
            with module.graph.inserting_before(node):
                _widen(module.graph, node, wide)
        _drop_float32_cast(nodes[cast])
    return graphs.refresh(module)


def _widen(graph: fx.Graph, node: fx.Node, wide: set[fx.Node]) -> None:
    """Form a sum in float32; what is made of sums follows from its operands."""

    def cast(operand: fx.Node) -> fx.Node:
        return operand if operand in wide else graph.call_function(CAST, (operand,), {"dtype": torch.float32})

    row = properties(node.target)
    if row.rounded_once or node.target is CAST:
        node.kwargs = {**node.kwargs, "dtype": torch.float32}
    elif row.wide_overload and graphs.value(node).device.type == "cuda":
        node.args, node.target = (*node.args, torch.float32), getattr(node.target.overloadpacket, row.wide_overload)
    elif not graphs.is_view(node):  # of products with vectors too: Inductor fuses these casts with the sum
        node.args = fx.map_arg(node.args, cast)


def _drop_float32_cast(cast: fx.Node) -> None:
    if graphs.value(cast).dtype is torch.float32:
        cast.replace_all_uses_with(cast.args[0])
        cast.graph.erase_node(cast)
