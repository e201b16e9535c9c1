"""Label every node of a step as state, time or velocity, by dataflow.

Before:  k = addmm(b, y, w);  mul = dt * k;  add = y + mul
After:   the same nodes; meta["role"] is velocity for k, state for mul and add

state:    the carries; a state plus an increment (a velocity scaled by time or by a number); a state scaled by time or
          by a number; what only moves a state's elements (views, cat, where). An increment itself, dt * k or a sum of
          several evaluations, is state if nothing but states reads it: in y + dt * k all but k is state, in
          f(dt * k) the product is velocity.
time:     what depends on no state: it follows from t, dt, other per-step inputs and invariants alone, costs little,
          and low precision cannot tell close times apart.
velocity: all the rest. meta["rank"] is its rank: what reads a state that was built from a velocity of rank n has
          rank n + 1. Velocities of one rank that do not read each other become evaluations of their own.

Only velocity is lowered. Where a next carry is linear in the carry along a path, all of the path is state, products
included: a propagator y @ R, a sum of [y, k] with the weights [1, dt]. Beside such a path a product that is scaled by
the step size is an increment, and its velocity is low. A carry that follows from a state by anything but a product (a
learned decay, a relu, a normalisation) is state all the way as well, and so is what a step gives beside the carries: a
trajectory of |y|. So is whatever nothing but the decisions of a search reads. What is left, a carry that follows from
itself through a product and a nonlinearity alone (an RNN cell), is velocity: its state is rounded in each step, and a
note says so. addmm(y, h, w) is taken apart, where y varies, to show the sum.

Requires: a Loop whose step is functional, with invariants hoisted.
Ensures:  every placeholder and call has a role; every velocity call has a rank; meta["outside"] says of each
          placeholder whether it is an invariant, or a per-step input that is not 0-d: 0-d ones are taken for times.
"""

from __future__ import annotations

import operator
from collections.abc import Set
from typing import Any

import torch
from torch import fx

from rampde_fx.ir import graphs, operator_table
from rampde_fx.ir.loops import Loop, PartitionedLoop, WidenedLoop
from rampde_fx.ir.operator_table import properties

aten = torch.ops.aten
SMALL = 0.125  # our choice: such a number may be a step size, a larger one is a weight, as in 0.5 * (y @ R) + 0.5 * z
Roles = dict[fx.Node, str]


def partition_velocity(loop: WidenedLoop) -> PartitionedLoop:
    """Write a role into every node of the step, and its rank into every velocity node."""
    step = _with_sums_apart(loop)
    if _take_outputs_apart(step, loop.carries, _roles(step, loop, promote_outputs=False)):
        step = graphs.refresh(step)
    roles = _roles(step, loop, promote_outputs=True)
    nodes, results = list(roles), graphs.results(step)[: loop.carries]
    ranks = find_ranks(nodes, roles)
    for node in nodes:
        node.meta["role"] = roles[node]
        if roles[node] == "velocity":
            node.meta["rank"] = ranks[node]
    return loop.then(PartitionedLoop, step=step, notes=(*loop.notes, *_notes(nodes, results, roles)))


def _roles(step: fx.GraphModule, loop: WidenedLoop, *, promote_outputs: bool) -> Roles:
    """The roles of all nodes of a step, in order.

    promote_outputs says whether its outputs beside the carries make states of what leads to them. Not before these
    are taken apart: what an output shares with a velocity would become state in both.
    """
    nodes = [node for node in step.graph.nodes if node.op != "output"]
    results = graphs.results(step)[: loop.carries]
    for i, node in enumerate(graphs.placeholders(step)):
        time = loop.carries <= i < loop.first_invariant and graphs.value(node).ndim == 0
        node.meta["outside"] = i >= loop.carries and not time
    roles = find_roles(nodes, loop.carries)
    linear = find_linear(nodes, results, loop.carries)
    if not all(roles[node] == "state" for node in linear):
        roles = find_roles(nodes, loop.carries, linear)
    # Terms without a step size that a linear path adds, as relu(y) in y @ R + relu(y).
    beside = [parent for node in linear for parent in node.all_input_nodes if not _can_be_added(parent, roles)]
    promoted = find_promoted([*results, *beside], roles)
    outputs = [result for result in graphs.results(step)[loop.carries :] if isinstance(result, fx.Node)]
    promoted |= _deciding(step, loop)
    if promote_outputs:
        promoted |= find_promoted(outputs, roles, velocity=graphs.ancestors(results) - promoted)
    if promoted:
        roles = find_roles(nodes, loop.carries, linear | promoted)
    _pull_increments(nodes, roles)
    return roles


def _deciding(step: fx.GraphModule, loop: Loop) -> set[fx.Node]:
    """What nothing but the decisions of a search reads: its event and its own norm of errors."""
    results, end = graphs.results(step), loop.carries + loop.estimates
    start = end - loop.controller.decisions if loop.controller is not None else end
    others = graphs.ancestors([*results[:start], *results[end:]])
    return {node for node in graphs.ancestors(results[start:end]) - others if node.op != "placeholder"}


def _notes(nodes: list[fx.Node], results: list[fx.Node], roles: Roles) -> list[str]:
    """Of each carry that follows from itself through velocity alone that it is rounded."""
    return [
        f"the state '{carry.name}' follows from itself through a product and a nonlinearity alone: each step rounds it"
        for carry, result in zip(nodes, results, strict=False)
        if graphs.is_differentiable(carry) and carry in _behind(result, roles)
    ]


def _behind(result: fx.Node, roles: Roles) -> set[fx.Node]:
    """The states and times that a velocity value follows from through velocity alone."""
    open_nodes, seen = [result], {result}
    while open_nodes:
        node = open_nodes.pop()
        parents = node.all_input_nodes if roles[node] == "velocity" else []
        open_nodes += [parent for parent in parents if parent not in seen]
        seen.update(parents)
    return seen if roles[result] == "velocity" else set()


def _with_sums_apart(loop: Loop) -> fx.GraphModule:
    """A copy of the step in which addmm(y, h, w) is y + mm(h, w) where y varies: it may be the state."""
    step = graphs.copied(loop.step)
    varying = graphs.depends_on(step.graph, graphs.placeholders(step)[: loop.carries])
    fused = [n for n in graphs.body(step) if _product_alone(n) is not None and _adds_to(n, varying)]
    for node in fused:
        with step.graph.inserting_before(node):
            product = step.graph.call_function(_product_alone(node), node.args[1:])
            terms = [node.args[0], product]
            for i, name in enumerate(("beta", "alpha")):
                if node.kwargs.get(name, 1) != 1:
                    terms[i] = step.graph.call_function(aten.mul.Tensor, (terms[i], node.kwargs[name]))
            total = step.graph.call_function(aten.add.Tensor, tuple(terms))
        for new in (product, *terms[1:], total):
            new.meta = dict(node.meta)
        node.replace_all_uses_with(total)
        step.graph.erase_node(node)
    return graphs.refresh(step) if fused else step


def _take_outputs_apart(step: fx.GraphModule, carries: int, roles: Roles) -> bool:
    """Copy what a velocity and an output of the step beside the carries share as a function of states; say if any.

    It is low in the velocity, and wide in the output. Products and what follows from them stay shared.
    """
    free: set[fx.Node] = set()
    for node in graphs.body(step):
        can_be_copied = node.op == "call_function" and not graphs.draws_random_numbers(node)
        follows = all(roles[operand] != "velocity" or operand in free for operand in node.all_input_nodes)
        if roles[node] == "velocity" and can_be_copied and not operator_table.is_product(node) and follows:
            free.add(node)
    results = graphs.results(step)
    own, path = graphs.ancestors(results[:carries]), set[fx.Node]()
    open_nodes = [result for result in results[carries:] if isinstance(result, fx.Node)]
    while open_nodes:
        node = open_nodes.pop()
        leads_on = node in free if roles[node] == "velocity" else node not in own
        if node.op == "call_function" and leads_on and node not in path:
            path.add(node)
            open_nodes += node.all_input_nodes
    if not any(graphs.is_float(node) for node in path & own):
        return False
    twin: dict[fx.Node, fx.Node] = {}
    output = step.graph.output_node()
    with step.graph.inserting_before(output):
        for node in graphs.body(step):
            if node in path:
                twin[node] = step.graph.node_copy(node, lambda operand: twin.get(operand, operand))
    told = [twin.get(result, result) if isinstance(result, fx.Node) else result for result in results[carries:]]
    output.args = ((*results[:carries], *told),)
    return True


def _product_alone(node: fx.Node) -> Any:
    """The operator of the product that a node adds to a summand; None if it does nothing of the kind."""
    name = properties(node.target).without_summand
    return getattr(aten, name).default if name else None


def _adds_to(node: fx.Node, varying: Set[fx.Node]) -> bool:
    """Whether a summand and a product are added, of which the first varies: with beta=0 it is not read."""
    return node.args[0] in varying and node.kwargs.get("beta", 1) != 0


def find_linear(nodes: list[fx.Node], results: list[fx.Node], carries: int) -> set[fx.Node]:
    """The nodes on the paths along which next carries are linear in the carries, and come back to themselves.

    Paths through a value that is scaled by the step size count only for a carry that has no other path; otherwise they
    are increments.
    """
    states = [node for node in nodes[:carries] if graphs.is_differentiable(node)]
    varying = graphs.depends_on(nodes[0].graph, nodes[:carries])
    found: set[fx.Node] = set()
    open_pairs = [(node, result) for node, result in zip(nodes, results, strict=False) if node in states]
    for small in (False, True):
        reached = _reached(nodes, states, varying, small=small)
        lead = {carry: reached[result] for carry, result in zip(nodes, results, strict=False) if carry in states}
        for carry, result in open_pairs:
            back = {other for other in lead[carry] if carry in _follow(other, lead)}
            found |= _between(result, back, reached, varying) if back else set()
        open_pairs = [(carry, result) for carry, result in open_pairs if not lead[carry]]
    return found


def _reached(
    nodes: list[fx.Node], states: list[fx.Node], varying: Set[fx.Node], *, small: bool
) -> dict[fx.Node, set[fx.Node]]:
    """The carries in which each node is linear; along paths through small values too, or not."""
    reached: dict[fx.Node, set[fx.Node]] = {}
    for node in nodes:
        operands = [] if node.op == "placeholder" or (not small and _is_small(node, varying)) else node.all_input_nodes
        linear = operator_table.linear_operands(node, varying) if operands else []
        reached[node] = {node} if node in states else set().union(*(reached[operand] for operand in linear))
    return reached


def _follow(carry: fx.Node, lead: dict[fx.Node, set[fx.Node]]) -> set[fx.Node]:
    """The carries that a carry is linear in, after any number of steps; itself included."""
    open_nodes, seen = [carry], {carry}
    while open_nodes:
        more = lead.get(open_nodes.pop(), set()) - seen
        seen |= more
        open_nodes += more
    return seen


def _between(
    result: fx.Node, back: set[fx.Node], reached: dict[fx.Node, set[fx.Node]], varying: Set[fx.Node]
) -> set[fx.Node]:
    """The nodes on the linear paths from a result to some carries, the carries left out."""
    open_nodes, seen = [result], {result}
    while open_nodes:
        node = open_nodes.pop()
        leads = [operand for operand in operator_table.linear_operands(node, varying) if reached[operand] & back]
        open_nodes += [operand for operand in leads if operand not in seen]
        seen.update(leads)
    return {node for node in seen if node.op != "placeholder"}


def _is_small(node: fx.Node, varying: Set[fx.Node]) -> bool:
    """Whether a value is scaled by the step size, by a small number, or summed up with weights that are."""
    factors = [operand for operand in node.all_input_nodes if operand not in varying]
    row = properties(node.target)
    numbers = operator_table.numbers(node.target, node.args, node.kwargs) if row.update == "scale" else []
    scales = row.update == "scale" or row.linear == "each"
    return scales and (any(map(_vanishes, factors)) or any(abs(number) <= SMALL for number in numbers))


def _vanishes(node: fx.Node) -> bool:
    """Whether a value that depends on no state vanishes with the step size: every entry is scaled by a time."""
    if node.op == "placeholder":
        return not node.meta["outside"]
    if node.target is aten.mul.Tensor:
        return any(map(_vanishes, node.all_input_nodes))
    if node.target is aten.div.Tensor or node.target is aten.pow.Tensor_Scalar:
        return isinstance(node.args[0], fx.Node) and _vanishes(node.args[0])
    passes_on = graphs.moves(node) or properties(node.target).update == "add" or node.target is aten.neg.default
    return passes_on and bool(node.all_input_nodes) and all(map(_vanishes, node.all_input_nodes))


def find_roles(nodes: list[fx.Node], carries: int, known: Set[fx.Node] = frozenset()) -> Roles:
    """Roles by forward dataflow; known states are states."""
    roles: Roles = {}
    for i, node in enumerate(nodes):
        if node.target is operator.getitem:  # an output of an operation is what the operation is
            roles[node] = roles[node.args[0]]
        elif node in known or i < carries:
            roles[node] = "state"
        elif graphs.is_number(node) or all(roles[parent] == "time" for parent in node.all_input_nodes):
            roles[node] = "time"
        else:
            roles[node] = "state" if _keeps_state(node, roles) else "velocity"
    return roles


def find_promoted(results: list[fx.Node], roles: Roles, velocity: Set[fx.Node] = frozenset()) -> set[fx.Node]:
    """The velocity nodes that become state: those on a path from a state to one of the results.

    A path ends at a product of whole tensors, and at the given velocity nodes, which stay low. In y * decay + dt * k,
    relu(y + dt * k), relu(y) + 0.1 * y all of the path is accumulation. A carried velocity (a multistep method's k)
    follows from products alone, and stays low.

    Args:
        results: Next carries; terms without a step size that a linear path adds; what a step gives beside the carries.
        roles: The roles so far.
        velocity: What stays velocity.
    """
    promoted: set[fx.Node] = set()
    for result in results:
        if roles[result] == "velocity":
            _promote(result, roles, promoted, velocity)
    return promoted


def _promote(node: fx.Node, roles: Roles, promoted: set[fx.Node], velocity: Set[fx.Node]) -> bool:
    """Whether the node comes from a state; if so, it and the path to the state are promoted."""
    if roles[node] != "velocity" or node in promoted:
        return roles[node] == "state" or node in promoted
    if operator_table.is_product(node) or node in velocity:
        return False
    varying = _varying(node, roles)
    follow = [v for v in varying if roles[v] == "state" or not _can_be_added(v, roles)] or varying
    found = [_promote(v, roles, promoted, velocity) for v in follow]
    if any(found):
        promoted.add(node)
    return any(found)


def find_ranks(nodes: list[fx.Node], roles: Roles) -> dict[fx.Node, int]:
    """The ranks: what reads a state that was built from a velocity of rank n has rank n + 1."""
    ranks: dict[fx.Node, int] = {}
    for node in nodes:
        after = (ranks[p] + (roles[node] == "state" and roles[p] == "velocity") for p in node.all_input_nodes)
        ranks[node] = max(after, default=0)
    return ranks


def _varying(node: fx.Node, roles: Roles) -> list[fx.Node]:
    """The operands that depend on a state, repetitions included."""
    return [operand for operand in graphs.operands(node) if roles[operand] != "time"]


def _scaled_operand(node: fx.Node, roles: Roles) -> fx.Node | None:
    """What a node scales by something that depends on no state, or None."""
    varying = _varying(node, roles)
    if properties(node.target).update != "scale" or len(varying) != 1:
        return None
    commutes = properties(node.target).commutes
    return varying[0] if commutes or node.args[0] is varying[0] else None


def _reads_outside(node: Any) -> bool:
    """Whether a time value also follows from a parameter or another tensor of the user's."""
    return node.meta.get("outside", False) or any(map(_reads_outside, node.all_input_nodes))


def _scaled_by_time(node: fx.Node, roles: Roles) -> fx.Node | None:
    """What a node scales by a time or a number, or None."""
    operand = _scaled_operand(node, roles)
    factors = [parent for parent in node.all_input_nodes if parent is not operand]
    return None if operand is None or any(map(_reads_outside, factors)) else operand


def _can_be_added(node: fx.Node, roles: Roles) -> bool:
    """Whether a value may be added to a state: no velocity, or a velocity times a step size, or a sum of such."""
    if roles[node] != "velocity":
        return True
    if properties(node.target).update == "add":
        return all(_can_be_added(parent, roles) for parent in node.all_input_nodes)
    if operator_table.is_matrix_product(node):
        return _is_weighted_sum(node, roles)
    if _scaled_by_time(node, roles) is not None:
        return True
    return graphs.moves(node) and all(_can_be_added(p, roles) for p in node.all_input_nodes)


def _is_weighted_sum(node: fx.Node, roles: Roles) -> bool:
    """Whether a product sums velocities with weights of time: einsum("s,sbd->bd", dt * b, k)."""
    weights = [parent for parent in node.all_input_nodes if roles[parent] == "time"]
    return operator_table.is_matrix_product(node) and len(weights) == 1 and not _reads_outside(weights[0])


def _keeps_state(node: fx.Node, roles: Roles) -> bool:
    parents = node.all_input_nodes
    if not any(roles[parent] == "state" for parent in parents):
        return False
    update = properties(node.target).update
    if update == "add":
        scaled = node.kwargs.get("alpha", 1) != 1
        return all(_can_be_added(p, roles) or (scaled and p is node.args[1]) for p in parents)
    if update == "scale":
        return _scaled_by_time(node, roles) is not None
    if update == "write":
        return True
    return graphs.moves(node) and all(roles[parent] != "velocity" for parent in parents)


def _pull_increments(nodes: list[fx.Node], roles: Roles) -> None:
    """Make states of the increments that only states and results read: dt * k, 1 - dt * z, sums of evaluations.

    And of what joins several velocities to one: each is then an output by itself, with a scale of its own.
    """
    ranks = find_ranks(nodes, roles)
    for node in reversed(nodes):
        if roles[node] != "velocity" or not all(u.op == "output" or roles[u] == "state" for u in node.users):
            continue
        # 1 - dt * z, by which a state is multiplied: rounded low, it would lose dt * z.
        summed = properties(node.target).update == "add" and _can_be_added(node, roles)
        scaled = summed or _scaled_by_time(node, roles) is not None or _is_weighted_sum(node, roles)
        joined = graphs.is_float(node) and properties(graphs.base_of_view(node).target).update == "join"
        if scaled or joined or _sums_evaluations(node, roles, ranks):
            roles[node] = "state"


def _sums_evaluations(node: fx.Node, roles: Roles, ranks: dict[fx.Node, int]) -> bool:
    varying = _varying(node, roles)
    several = len({ranks[parent] for parent in varying}) > 1 or any(roles[p] == "state" for p in varying)
    return properties(node.target).update == "add" and len(varying) == 2 and several
