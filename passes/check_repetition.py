"""Check that a step of odeint does the same when it is done again, and take the second one out.

Before:  enter(...), nodes of one step, again(t), nodes of the next step, leave(...)
After:   enter(...), nodes of one step, leave(...)

`enter`, `again` and `leave` are markers of odeint, defined in rampde_fx/runtime/operators.py. One captured step stands
for all. A velocity that keeps something in Python from one evaluation to the next (a counter that it computes with, an
iterator, a tensor that it makes at its first call) is another function in each step. odeint therefore captures a second
step behind the first one, from its results, and both must be equal.

Requires: a graph captured by Dynamo.
Ensures:  no marker `again`, and between it and `leave` only numbers that are read behind the loop.
Raises:   UnsupportedLoopError for a velocity that is not a function of t and y.
"""

from __future__ import annotations

import operator

from torch import fx

from rampde_fx.errors import UnsupportedLoopError
from rampde_fx.ir import graphs
from rampde_fx.runtime import operators


def check_repetition(graph_module: fx.GraphModule) -> None:
    """Check every odeint of a graph, and of those inside it, in place."""
    for module in [m for m in graph_module.modules() if isinstance(m, fx.GraphModule)]:
        if _is_nested(module):
            continue  # find_loops refuses it
        for again in module.graph.find_nodes(op="call_function", target=operators.again):
            _check(list(module.graph.nodes), again)
        module.recompile()


def _is_nested(module: fx.GraphModule) -> bool:
    """Whether an odeint of a graph is called in the velocity of another one."""
    under_way = False
    for node in module.graph.nodes:
        if node.target is operators.enter and under_way:
            return True
        if node.target in (operators.enter, operators.leave, operators.leave_search):
            under_way = node.target is operators.enter
    return False


def _check(nodes: list[fx.Node], again: fx.Node) -> None:
    middle = nodes.index(again)
    begin = max(i for i in range(middle) if nodes[i].target is operators.enter)
    end = min(i for i in range(middle, len(nodes)) if nodes[i].target is operators.leave)
    enter, leave = nodes[begin], nodes[end]
    for node in nodes[begin:end]:
        # normalize(..., out=u), by which spectral_norm updates its buffer, gives u: both steps then read u by one name.
        if isinstance(written := node.kwargs.get("out"), fx.Node):
            node.replace_all_uses_with(written)
    second = nodes[middle + 1 : end]
    different = find_difference(enter, nodes[begin + 1 : middle], second, leave.args[1])
    if different is not None:
        raise UnsupportedLoopError(
            "the velocity of an odeint does something else in the second step than in the first: it keeps something in "
            "Python, such as a counter, an iterator or a tensor that it makes at its first call, or takes a number out "
            "of a tensor, such as int(t) or float(y.norm())",
            required="a velocity that is a function of t and y: one captured step stands for all",
            fix="make what it keeps before odeint, or write the steps as a loop over rampde_fx.steps(t); compute with "
            "tensors: u[torch.searchsorted(times, t)] instead of u[int(t * n)], self.n.add_(1) instead of self.n += 1",
            where=graphs.user_line(different) or graphs.user_line(enter),
        )
    for node in (*reversed(second), again):
        if not node.users:  # a number that is still read after the loop stays
            node.graph.erase_node(node)


def first_iterations(graph_module: fx.GraphModule) -> fx.GraphModule:
    """A copy of a captured graph that runs, with the captured steps alone of a loop, one of an odeint."""
    copy = graphs.copied(graph_module)
    check_repetition(copy)
    for module in copy.modules():
        if isinstance(module, fx.GraphModule):
            for node in module.graph.find_nodes(op="call_function", target=operators.enter):
                node.target = operators.first_step
            for node in module.graph.find_nodes(op="call_function", target=operators.repeat):
                node.target = operators.captured_values
            module.recompile()
    return copy


def find_difference(
    enter: fx.Node, first: list[fx.Node], second: list[fx.Node], nexts: list[fx.Node]
) -> fx.Node | None:
    """The first node by which two steps differ, the second one from the results of the first; None if none does."""
    entered = {node.args[1] - 2: node for node in first if _reads(node, enter)}
    steps = [
        [node for node in nodes if not _reads(node, enter) and not graphs.is_number(node)] for nodes in (first, second)
    ]
    twins: dict[fx.Node, fx.Node | None] = {node: entered.get(j) for j, node in enumerate(nexts)}
    for a, b in zip(*steps, strict=False):
        read = [twins.get(operand, operand) for operand in graphs.operands(b)]
        if graphs.operation(a) != graphs.operation(b) or read != graphs.operands(a):
            return b
        twins[b] = a
    lengths = [len(nodes) for nodes in steps]
    return None if lengths[0] == lengths[1] else (*steps[0], *steps[1])[-1]


def _reads(node: fx.Node, enter: fx.Node) -> bool:
    return node.target is operator.getitem and node.args[0] is enter
