"""What lives on from a forward to its backward, whatever is saved: parameters, and what else the user holds.

What follows from it alone, such as a parameter in low precision, is made again by the backward. The partitioner would
save it: the casts of the forward and of the backward are one node to it, and a node that a scan reads is never one that
costs nothing to make again.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import fx, nn

from rampde_fx.emit.autocast import without_autocast
from rampde_fx.ir import graphs
from rampde_fx.ir.effects import Observer
from rampde_fx.ir.loops import HoistedLoop
from rampde_fx.torch_private import dynamo, fake_tensors, higher_order


def lasts(node: fx.Node) -> bool:
    """Whether a value of a captured graph is one that lives on, a view of it, or made again from such by a preamble.

    What is made of a buffer, but for its casts, does not: a user may update the buffer before the backward, as an
    average of weights is, and eager code has saved what was made of it.
    """
    return higher_order.is_recomputed(node) or _shows(node, _is_held)


def is_trained(node: fx.Node) -> bool:
    """Whether a value lives on that has a gradient: eager code, too, reads it in its backward."""
    return higher_order.is_recomputed(node) or _shows(node, _has_gradient)


def _shows(node: fx.Node, is_held: Callable[[fx.Node], bool]) -> bool:
    storage = fake_tensors.storage_of(graphs.value(node))
    held = [other for other in _inputs(node.graph) if fake_tensors.storage_of(graphs.value(other)) == storage]
    return storage is not None and any(map(is_held, held)) and storage not in _written(held, storage)


def _inputs(graph: fx.Graph) -> list[fx.Node]:
    return [*graph.find_nodes(op="placeholder"), *graph.find_nodes(op="get_attr")]


def _is_held(node: fx.Node) -> bool:
    """Whether the user holds it until the backward: of a model, or for its gradient."""
    return node.op == "get_attr" or dynamo.is_static_input(node) or _has_gradient(node)


def _has_gradient(node: fx.Node) -> bool:
    value = graphs.value(node)
    is_leaf = isinstance(value, torch.Tensor) and value.is_leaf and value.requires_grad
    return is_leaf or isinstance(value, nn.Parameter)


def _written(nodes: Iterable[fx.Node], storage: int) -> set[int]:
    """The storages that those write to which read a storage, by whatever view."""
    observer, found, seen = Observer(), set[int](), set[fx.Node]()
    open_nodes = list(nodes)
    while open_nodes:
        for user in open_nodes.pop().users:
            if user in seen:
                continue
            seen.add(user)
            if user.op != "call_module" and user.target is not higher_order.autograd_function_apply:  # a loop: pure
                found |= observer.written(user)
            if fake_tensors.storage_of(graphs.value(user)) == storage:
                open_nodes.append(user)
    return found


def make_again(graph_module: fx.GraphModule, held: Iterable[fx.Node]) -> None:
    """Have the backward make again what the body of a loop makes of placeholders alone that live on."""
    for node in _made_alone(graph_module, held):
        higher_order.recompute_in_backward(node)


def emit_call(graph_module: fx.GraphModule, name: str, operands: Sequence[fx.Node], loop: HoistedLoop) -> fx.Node:
    """A call, where the graph inserts, of a submodule that has no backward of its own.

    What it makes of invariants alone that live on is a submodule of its own, to be made again by the backward: to the
    partitioner it is the same node as what a loop with a backward makes of them.
    """
    module = graph_module.get_submodule(name)
    inputs, graph = graphs.placeholders(module), graph_module.graph
    held = {i: node for i, node in enumerate(operands) if i >= loop.first_invariant and lasts(node)}
    made = _made_alone(module, [inputs[i] for i in held])
    ends = {graphs.base_of_view(node) for node in made if not made.keys() >= node.users.keys()}
    read = [node for node in made if node in ends and isinstance(graphs.value(node), torch.Tensor)]
    if not read:
        return graph.call_module(name, tuple(operands))
    casts = graphs.part(module, [inputs[i] for i in held], read)
    graph_module.add_submodule(f"{name}_casts", without_autocast(casts, loop))
    others = [node for node in graphs.body(module) if node not in read]
    rest = graphs.extract(module, others, [*inputs, *read], graphs.results(module))
    rest.graph.eliminate_dead_code()
    rest.recompile()
    graph_module.add_submodule(name, rest)
    made_again = graph.call_module(f"{name}_casts", tuple(held.values()))
    higher_order.recompute_in_backward(made_again)
    given = [graph.call_function(operator.getitem, (made_again, i)) for i in range(len(read))]
    return graph.call_module(name, (*operands, *given))


def _made_alone(graph_module: fx.GraphModule, held: Iterable[fx.Node]) -> dict[fx.Node, None]:
    """The nodes that follow from some placeholders alone, in order."""
    found: dict[fx.Node, None] = {}
    alone = set(held)
    for node in graphs.body(graph_module):
        if node.all_input_nodes and alone.issuperset(node.all_input_nodes):
            alone.add(node)
            found[node] = None
    return found
