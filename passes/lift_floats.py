"""Give marked loops 0-d tensors for the Python floats that they read and that change from call to call.

Before:  step(t, 0);  rate = l_self_rate.item();  k = mul(y, rate);  ...
After:   rate = l_self_rate.item();  rate_1 = add(zeros(()), rate).to(float32);  step(t, 0);  k = mul(y, rate_1);  ...

Dynamo makes a float that has changed an input of the graph: a float64 tensor, and its item(), a symbolic number. The
body of a loop takes tensors, so that an operation that takes either gets the tensor, in the dtype in which the number
would have been used. So one compilation serves every value. What computes such numbers from one another moves before
the loop.

Any other operation, such as leaky_relu's slope, takes numbers alone. Then Dynamo captures the model again with the
number as it is, guards it, and compiles anew when it changes; a number that follows from sizes alone is guarded here.

Requires: a graph captured by Dynamo.
Ensures:  no operation of a marked loop reads a symbolic float, except those that item() reads inside the loop.
Raises:   TensorifyScalarRestartAnalysis, which Dynamo catches.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import fx

from rampde_fx.ir import graphs
from rampde_fx.ir.captured import begins_loop, ends_loop
from rampde_fx.ir.graphs import value
from rampde_fx.ir.operator_table import properties_of_captured
from rampde_fx.torch_private import fake_tensors, shapes


def lift_floats(graph_module: fx.GraphModule) -> None:
    """Rewrite a graph, and those inside of it, in place."""
    for module in [m for m in graph_module.modules() if isinstance(m, fx.GraphModule)]:
        _Lifting(module.graph).run()


class _Lifting:
    """One graph, and the tensors that are made in it."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.made: dict[tuple[fx.Node, torch.dtype, torch.device], fx.Node] = {}
        self.inside: set[fx.Node] = set()  # of the loop that is open
        self.left: list[torch.SymFloat] = []  # could not be lifted: to be captured again, as the numbers they are

    def run(self) -> None:
        """Lift what can be lifted; have the rest captured again."""
        self._fold()
        head: fx.Node | None = None
        for node in list(self.graph.nodes):
            if ends_loop(node):
                head, self.inside, self.made = None, set(), {}
            elif head is not None:
                self._visit(node, head)
            elif begins_loop(node):
                head = node
        if self.left:
            shapes.capture_again_with(self.left)

    def _fold(self) -> None:
        """What Dynamo has computed of numbers that it captured anew, which are constants now."""
        for node in list(self.graph.nodes):
            if node.op == "call_function" and _of_floats(node) and not node.all_input_nodes:
                node.replace_all_uses_with(node.target(*node.args, **node.kwargs))
                self.graph.erase_node(node)

    def _visit(self, node: fx.Node, head: fx.Node) -> None:
        if _of_floats(node):
            self._spell_sizes(node, head)
            if not any(operand in self.inside for operand in node.all_input_nodes):
                head.prepend(node)
                return
        self.inside.add(node)
        numbers = self._numbers(node)
        if numbers and not _takes_tensors(node):
            known = {number: shapes.known_now(value(number)) for number in numbers}
            self.left += [value(number) for number in numbers if known[number] is None]
            put = partial(_put, known)
            node.args, node.kwargs = fx.map_arg(node.args, put), fx.map_arg(node.kwargs, put)
        elif numbers:
            self._scale_first(node, head)
            self._lift(node, head)

    def _spell_sizes(self, node: fx.Node, head: fx.Node) -> None:
        """Give a number the sizes of tensors of the loop that it reads as the graph's inputs have them."""
        known = {shapes.symbol_alone(value(size)): size for size in self.graph.find_nodes(op="placeholder")}
        for size in node.all_input_nodes:
            if size in self.inside and isinstance(value(size), torch.SymInt):
                with self.graph.inserting_before(head):
                    spelt = shapes.spell(value(size), known)
                if spelt is not None:
                    spelt.meta["example_value"] = value(size)
                    node.replace_input_with(size, spelt)

    def _numbers(self, node: fx.Node) -> list[fx.Node]:
        """The symbolic floats from outside of the loop that a node reads."""
        return [operand for operand in node.all_input_nodes if _is_float(operand) and operand not in self.inside]

    def _scale_first(self, node: fx.Node, head: fx.Node) -> None:
        """add(y, k, alpha=number) becomes add(y, mul(k, number))."""
        if not node.kwargs:
            return
        summand, alpha = node.args[1], node.kwargs["alpha"]
        with self.graph.inserting_before(node):
            product = self.graph.call_function(torch.mul, (summand, alpha))
        product.meta = {**node.meta, "example_value": value(summand)}
        node.args, node.kwargs = (node.args[0], product), {}
        self.inside.add(product)
        self._lift(product, head)

    def _lift(self, node: fx.Node, head: fx.Node) -> None:
        kind = _kind(node)
        assert kind is not None, "it takes tensors"
        for number in self._numbers(node):
            with self.graph.inserting_before(head):
                node.replace_input_with(number, self._tensor(number, *kind))

    def _tensor(self, number: fx.Node, dtype: torch.dtype, device: torch.device) -> fx.Node:
        """The number as a 0-d tensor: a sum with a tensor, for AOTAutograd makes tensors of numbers in sums alone."""
        key = (number, dtype, device)
        if key not in self.made:
            graph, wide = self.graph, (torch.float64, torch.device("cpu"))
            zero = _valued(graph.call_function(torch.zeros, ((),), {"dtype": torch.float64}), *wide)
            total = _valued(graph.call_function(torch.add, (zero, number)), *wide)
            self.made[key] = _valued(graph.call_method("to", (total, device, dtype)), dtype, device)
        return self.made[key]


def _put(known: dict[fx.Node, float | None], operand: fx.Node) -> Any:
    number = known.get(operand)
    return operand if number is None else number


def _valued(node: fx.Node, dtype: torch.dtype, device: torch.device) -> fx.Node:
    node.meta["example_value"] = fake_tensors.fake_number(dtype, device)
    return node


def _is_float(node: fx.Node) -> bool:
    return isinstance(value(node), torch.SymFloat)


def _of_floats(node: fx.Node) -> bool:
    """Whether a node computes a number from Python floats; one from a tensor may depend on where it stands."""
    if isinstance(value(node), torch.SymFloat):
        return shapes.hint_of(value(node)) is not None
    return isinstance(value(node), (torch.SymBool, torch.SymInt)) and any(map(_is_float, node.all_input_nodes))


def _takes_tensors(node: fx.Node) -> bool:
    """Whether a node computes the same of a tensor of its kind as of a number."""
    row = properties_of_captured(graphs.function_name(node))
    if not row.takes_tensors or _kind(node) is None:
        return False
    if not node.kwargs:
        return True
    scaled = row.update == "add" and list(node.kwargs) == ["alpha"]
    return scaled and graphs.is_float(node.args[1])


def _kind(node: fx.Node) -> tuple[torch.dtype, torch.device] | None:
    """The dtype in which a node uses a number, and the device; None of one that computes in no floating dtype."""
    tensors = [n for n in node.all_input_nodes if isinstance(value(n), torch.Tensor)]
    floating = [value(n) for n in (node, *tensors) if graphs.is_float(n)]
    if not tensors or not floating:
        return None
    like = floating[0]
    # Halves compute with a number in float32, and stay halves beside a 0-d tensor unless they are 0-d themselves.
    narrow = like.dtype.itemsize < 4 and like.ndim > 0
    return (torch.float32 if narrow else like.dtype), like.device
