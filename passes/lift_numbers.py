"""Take Python numbers that are inputs of the graph out of its loops.

Dynamo makes an input of a float or an int that changes, or of every one under dynamic=True, where it is read first. A
loop has no place for them: its steps read tensors.

Before:  step(t, 0); alpha = l_alpha.item(); mul(k, alpha); half = alpha / 2; leaky_relu(k, half)
After:   half = l_alpha / 2; alpha_1 = l_alpha.to(float32); step(t, 0); mul(k, alpha_1); leaky_relu(k, 0.15)

A float input is a 0-d float64 tensor whose item is read. Where a number meets a tensor in an arithmetic operation, this
tensor takes its place, in the dtype of the result, so that another value needs no other graph. Where an operation takes
numbers alone, the number becomes a constant, and a guard of the graph.

Requires: a graph captured by Dynamo, which may hold marked loops.
Ensures:  no node behind the first marker computes a number from numbers; none reads a float that is an input.
Raises:   nothing.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from rampde_fx import torch_private
from rampde_fx.graphs import function_name, value

# Of the names of functions, methods and operators: what takes a 0-d tensor for a number, alone or in place.
_ARITHMETIC = {"add", "sub", "mul", "div", "truediv", "true_divide", "subtract", "multiply", "divide"}
_OF_NUMBERS = {operator.add, operator.sub, operator.mul, operator.truediv, operator.neg}


def lift_numbers(graph_module: fx.GraphModule, first: fx.Node) -> None:
    """Take numbers out of the loops of a graph, in place; first is its first marker."""
    tensors: dict[fx.Node, fx.Node] = {}  # of floats: the float64 tensor that holds each
    lifted: set[fx.Node] = set(graph_module.graph.find_nodes(op="placeholder"))
    for node in [node for node in graph_module.graph.nodes if _is_number(node)]:
        if not (lifted.issuperset(node.all_input_nodes) and node.op.startswith("call_")):
            continue
        _move_before(node, first)
        lifted.add(node)
        if (tensor := _as_tensor(node, tensors, first)) is not None:
            tensors[node] = tensor
    casts: dict[Any, fx.Node] = {}
    for number in [node for node in graph_module.graph.nodes if isinstance(value(node), torch.SymFloat)]:
        for user in [user for user in number.users if not (_precedes(user, first) or _is_number(user))]:
            _replace(number, user, tensors.get(number), first, casts)
    for number in reversed([node for node in graph_module.graph.nodes if _is_number(node)]):
        if not number.users and number.op.startswith("call_"):
            graph_module.graph.erase_node(number)


def _is_number(node: fx.Node) -> bool:
    return isinstance(value(node), (torch.SymFloat, torch.SymInt))


def _precedes(node: fx.Node, first: fx.Node) -> bool:
    return node < first


def _move_before(node: fx.Node, first: fx.Node) -> None:
    if not _precedes(node, first):
        first.prepend(node)


def _as_tensor(node: fx.Node, tensors: dict[fx.Node, fx.Node], first: fx.Node) -> fx.Node | None:
    """A float64 tensor with the value of a float that follows from inputs, if there is one."""
    if function_name(node) == "item":
        (source,) = node.all_input_nodes
        return source if value(source).dtype is torch.float64 and torch_private.is_known(value(node)) else None
    if node.target not in _OF_NUMBERS or not tensors.keys() >= set(node.all_input_nodes):
        return None
    with node.graph.inserting_before(first):
        twin = node.graph.call_function(node.target, fx.map_arg(node.args, tensors.__getitem__))
    twin.meta = {**node.meta, "example_value": value(tensors[node.all_input_nodes[0]])}
    return twin


def _replace(
    number: fx.Node, user: fx.Node, tensor: fx.Node | None, first: fx.Node, casts: dict[Any, fx.Node]
) -> None:
    result = value(user)
    if tensor is None or not _meets_tensor(user, number):
        if torch_private.is_known(value(number)):
            constant = float(value(number))  # guards it
            user.args, user.kwargs = fx.map_arg((user.args, user.kwargs), lambda n: constant if n is number else n)
        return
    key = (tensor, result.dtype, result.device)
    if key not in casts:
        with user.graph.inserting_before(first):
            casts[key] = user.graph.call_method("to", (tensor,), {"dtype": result.dtype, "device": result.device})
        casts[key].meta = {**number.meta, "example_value": torch_private.number_like(result)}
    user.replace_input_with(number, casts[key])


def _meets_tensor(user: fx.Node, number: fx.Node) -> bool:
    """Whether a node is an arithmetic operation of a floating tensor and the number, which a 0-d tensor may replace."""
    name = function_name(user)
    name = name.removeprefix("i") if user.target in _IN_PLACE else name.rstrip("_")
    others = [arg for arg in user.args if arg is not number]
    tensors = [value(arg) for arg in others if isinstance(arg, fx.Node)]
    floating = bool(tensors) and all(isinstance(v, torch.Tensor) and v.is_floating_point() for v in tensors)
    return name in _ARITHMETIC and not user.kwargs and len(user.args) == 2 and floating


_IN_PLACE = {operator.iadd, operator.isub, operator.imul, operator.itruediv}
