"""Compensate the sums in which rounding errors pile up over the steps, if the policy says so.

Before:  step(y, ...):     y_next = y + z;  return y_next
After:   step(y, ..., e):  z_e = z + e;  y_next = y + z_e;  b = y_next - y
                           e_next = (y - (y_next - b)) + (z_e - b);  return y_next, e_next

A correction e is a carry of its own: what the last sum lost, which the next one adds. In the step the carried states
are compensated, in the adjoint the adjoints and the totals of the parameters. Corrections begin at zero, have no
gradient and are not stored.

Requires: a Loop whose nodes have roles, with its adjoint, if any, complete. Without such sums, or where the policy asks
          for none, it is left as it is.
Ensures:  every carry that is a sum of its old value and increments has a correction: these are the last placeholders
          and the last results, in the order of the carries.
Error:    O(u) instead of O(N u) in the sums over N steps, u the unit roundoff of the accumulation dtype.
Raises:   UnsupportedLoopError for a state that follows from its old value by anything but sums.
Source:   Knuth, The Art of Computer Programming 2, section 4.2.2 (TwoSum); Kahan, doi 10.1145/363707.363723; for
          Runge-Kutta methods Moller, doi 10.1007/BF01975722.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import fx

from rampde_fx.errors import UnsupportedLoopError
from rampde_fx.ir import graphs
from rampde_fx.ir.loops import CompensatedLoop, Loop, StoredLoop
from rampde_fx.ir.operator_table import properties

aten = torch.ops.aten


def compensate_sums(loop: StoredLoop) -> CompensatedLoop:
    """Compensate the sums of the step and of its adjoint."""
    if loop.policy.accumulation != "compensated":
        return loop.then(CompensatedLoop)
    _check_states(loop)
    step, corrections = _compensated(loop.step, loop.carries)
    adjoint = loop.adjoint
    if adjoint is not None:
        module, corrected = _compensated(adjoint.module, adjoint.carries)
        adjoint = replace(adjoint, module=module, corrections=corrected)
    return loop.then(CompensatedLoop, step=step, corrections=corrections, adjoint=adjoint)


def find_sums(result: fx.Node, carry: fx.Node) -> list[tuple[fx.Node, int]] | None:
    """The sums that lead from a carry to its next value, innermost first, and which operand of each is the older value;
    None if anything else is on the way."""
    if result is carry:
        return []
    if graphs.value(result).shape != graphs.value(carry).shape:
        return None
    if properties(result.target).update == "copy":  # clone, stop_gradient: the same value
        return find_sums(result.args[0], carry)
    if properties(result.target).update != "add":
        return None
    commutes = properties(result.target).commutes and not result.kwargs
    for position, operand in enumerate(result.args[: 2 if commutes else 1]):
        sums = find_sums(operand, carry) if isinstance(operand, fx.Node) else None
        if sums is not None:
            return [*sums, (result, position)]
    return None


def _check_states(loop: Loop) -> None:
    for carry, result in zip(loop.inputs().carries, loop.results().carries, strict=True):
        if graphs.is_differentiable(carry) and find_sums(result, carry) is None and _accumulates(result, carry):
            raise UnsupportedLoopError(
                f"the state '{carry.name}' cannot be accumulated with compensation: it is more than a sum of its old "
                "value and increments",
                required="updates of the form y = y + increment",
                fix='write the update so, or use PrecisionPolicy(accumulation="plain")',
                where=graphs.user_line(result) or loop.where,
            )


def _accumulates(result: fx.Node, carry: fx.Node) -> bool:
    """Whether the next value follows from the carry by operations on states."""
    open_nodes, seen = [result], {result}
    while open_nodes:
        node = open_nodes.pop()
        parents = [p for p in node.all_input_nodes if p not in seen and p.meta.get("role") == "state"]
        seen.update(parents)
        open_nodes += parents
    return carry in seen


def _compensated(graph_module: fx.GraphModule, carries: int) -> tuple[fx.GraphModule, tuple[int, ...]]:
    """A copy with a correction for every carry that is a sum, and which carries these are."""
    graph_module = graphs.copied(graph_module)
    graph, output = graph_module.graph, graph_module.graph.output_node()
    nodes = graphs.placeholders(graph_module)
    last, corrected = nodes[-1], []
    for i, carry in enumerate(nodes[:carries]):
        sums = find_sums(output.args[0][i], carry)
        if not sums or not graphs.is_differentiable(carry):
            continue
        with graph.inserting_after(last):
            correction = last = graphs.placeholder(graph, f"correction_{carry.name}")
        correction.meta["val"] = graphs.value(carry)
        for node, position in sums:
            correction = _two_sum(graph, node, position, correction)
        output.args = ((*output.args[0], correction),)
        corrected.append(i)
    return graphs.refresh(graph_module), tuple(corrected)


def _two_sum(graph: fx.Graph, node: fx.Node, position: int, correction: fx.Node) -> fx.Node:
    """Let a sum of an older value and an increment take the correction in; the correction of the next sum."""
    call: Callable[..., fx.Node] = graph.call_function
    old, increment = node.args[position], node.args[1 - position]
    with graph.inserting_before(node):
        corrected = call(node.target, (correction, increment), node.kwargs)
        total = call(aten.add.Tensor, (old, corrected))
        taken = call(aten.sub.Tensor, (total, old))
        lost_of_old = call(aten.sub.Tensor, (old, call(aten.sub.Tensor, (total, taken))))
        lost = call(aten.add.Tensor, (lost_of_old, call(aten.sub.Tensor, (corrected, taken))))
    total.meta = dict(node.meta)
    node.replace_all_uses_with(total)
    graph.erase_node(node)
    return lost
