"""Compare the iterations of a marked loop, and find the run of equal ones with which it begins.

The backend rolls that run up and asks again, until nothing is left.

Before:  iteration 0: mul(dt_0, k_0), add(y_init, mul);   iteration 1: mul_1(dt_1, k_1), add_1(add, mul_1);   ...
After:   one Run with the carry y: y_init at first, then the value at the position of add in the iteration before.

Two iterations are equal if they apply the same operations with the same constants to values from the same places. A
value that iteration k takes from iteration k - d, and the first d iterations take from outside, is a carry (d > 1 in
multistep methods). What differs but comes from outside is a per-step input; an operation whose constant differs but
whose operands all come from outside (weights[i]) is moved before the loop, and becomes a per-step input, if it computes
the same there.

Of a loop that was captured until it repeats the last run goes on: it has two iterations or more, and what they have of
their own is rows of a tensor, by the number of the step. The one iteration of an odeint is a run as it stands: its
markers name the carries.

The captured graph changes in three ways, in which it computes the same: such varying operations, and sizes that follow
from sizes outside, move before the loop; what reads a number for logging (y.norm().item()), or asserts something, moves
behind it.

Requires: a MarkedLoop.
Ensures:  the run is as long as can be; an iteration that differs from the next one is a run of one.
Raises:   RewriteError where the iterations of a loop that was captured until it repeats differ; MutationError for a
          velocity of odeint that returns memory to which it writes again; UnsupportedLoopError for a step that computes
          with a number that it reads, or has sizes that depend on data, and for a value of a step of odeint that is
          read outside of it.
"""

from __future__ import annotations

import operator
from collections.abc import Container, Iterator
from typing import Any

import torch
from torch import fx

from rampde_fx.errors import MutationError, UnsupportedLoopError
from rampde_fx.ir import graphs
from rampde_fx.ir.captured import MarkedLoop, Owner, Run, begins_iteration, owner_of, reads_end
from rampde_fx.ir.effects import Observer, call, gradient_modes
from rampde_fx.ir.graphs import value
from rampde_fx.ir.repeats import check_extension, read_at_end
from rampde_fx.ir.sources import CarrySource, InvariantSource, Key, PerStepSource, Source, TimeSource
from rampde_fx.torch_private import fake_tensors, shapes

Place = tuple[int, Key] | None  # (how many iterations back, key), or None for a value from outside


def match_iterations(marked: MarkedLoop) -> Run:
    """The longest run of equal iterations at the beginning of the loop."""
    _sink_readers(marked)
    if marked.from_odeint:
        return _one_step_of_odeint(marked)
    iterations = [_without_time(nodes) for nodes in marked.iterations]
    iterations = _hoist_varying(marked, _hoist_sizes(marked, iterations))
    owner = owner_of(iterations, marked.markers)
    length, places = _longest_run(iterations, owner)
    run = iterations[:length]
    sources = [
        [_source([graphs.operands(nodes[p])[slot] for nodes in run], place) for slot, place in enumerate(row)]
        for p, row in enumerate(places)
    ]
    extended = marked.repeats and length == len(iterations)
    outputs = _outputs(run, owner, marked, extended=extended)
    unread = _unread(run[0], outputs) if length == 1 else ()
    found = Run(run, sources, outputs, extended=extended, unread=unread)
    if extended:
        check_extension(marked, found)
    return found


def _sink_readers(marked: MarkedLoop) -> None:
    """Move behind the loop what reads a number from a tensor for logging, and what asserts something of one."""
    readers = [node for nodes in marked.iterations for node in nodes if _reads_number(node)]
    if not readers:
        return
    inside = {node for nodes in marked.iterations for node in nodes}
    written = Observer().written_among(inside)
    moved: list[fx.Node] = []
    for node in reversed(readers):
        shown = {fake_tensors.storage_of(value(operand)) for operand in node.all_input_nodes}
        if not (marked.from_odeint or shown & written) and inside.isdisjoint(node.users):
            marked.end.append(node)
            inside.remove(node)
            moved.append(node)
    stays = [node for node in readers if node not in moved]
    if stays:
        raise _number_read(stays[0])
    for nodes in marked.iterations:
        nodes[:] = [node for node in nodes if node in inside]


def _reads_number(node: fx.Node) -> bool:
    return shapes.is_data_dependent(value(node)) or graphs.function_name(node) in ("_assert_async", "_assert")


def _number_read(node: fx.Node) -> UnsupportedLoopError:
    sized = [p for p in node.all_input_nodes if any(map(shapes.is_data_dependent, _shape(p)))]
    if sized:
        return UnsupportedLoopError(
            f"the size of '{sized[0].name}' depends on the values of a tensor",
            required="sizes that are known before the loop",
            fix="write torch.where(mask, x, 0) instead of x[mask], sums over a mask instead of nonzero(), and "
            "torch.zeros(n).index_add(0, i, ones) instead of bincount(i)",
            where=graphs.user_line(sized[0]),
        )
    return UnsupportedLoopError(
        f"a step reads a number from a tensor, by item(), float(), int(), bool() or an assertion: '{node.name}'",
        required="steps that compute with tensors, and numbers that the steps themselves do not read",
        fix="keep it a tensor in the loop (y.norm() instead of y.norm().item()), and call item() after the loop",
        where=graphs.user_line(node),
    )


def _shape(node: fx.Node) -> tuple[Any, ...]:
    return tuple(value(node).shape) if isinstance(value(node), torch.Tensor) else ()


def _one_step_of_odeint(marked: MarkedLoop) -> Run:
    """The one iteration that stands for all: enter names its states, leave what they become."""
    (enter,), left = marked.markers, marked.left()
    nodes = [n for n in marked.iterations[0] if not (n.target is operator.getitem and n.args[0] is enter)]
    position = {node: i for i, node in enumerate(nodes)}
    keys, further = ([position[node] for node in results] for results in (left.nexts, left.collected))
    entered: list[Source] = [TimeSource("t"), TimeSource("dt")]
    entered += [CarrySource((state,), key) for state, key in zip(left.states, keys, strict=True)]

    def source(operand: fx.Node) -> Source | Key:
        if operand in position:
            return position[operand]
        inside = operand.target is operator.getitem and operand.args[0] is enter
        return entered[operand.args[1]] if inside else InvariantSource(operand)

    _check_results(nodes, {*position, *enter.users})
    for node in nodes:
        if any(user not in position and user is not marked.end for user in node.users):
            raise UnsupportedLoopError(
                "a value of a step of odeint is read outside of it",
                required="a velocity that returns what it computes, and keeps nothing",
                fix="integrate the value as a state, or collect it in a loop over steps(t)",
                where=graphs.user_line(node),
            )
    sources = [[source(operand) for operand in graphs.operands(node)] for node in nodes]
    return Run([nodes], sources, {key: [] for key in _stacked(marked, keys, further)}, tuple(entered))


def _check_results(nodes: list[fx.Node], inside: Container[fx.Node]) -> None:
    """Refuse a velocity that returns memory from outside to which it writes: all stages would be one tensor."""
    written = Observer().written_among(nodes)
    for node in filter(graphs.is_ours, nodes) if written else ():
        for operand in node.all_input_nodes:
            if operand not in inside and fake_tensors.storage_of(value(operand)) in written:
                raise MutationError(
                    f"func writes its result to '{graphs.user_name(operand)}', where its results before are, too",
                    required="a new tensor from every evaluation",
                    fix="return a clone of it, or make it in func",
                    where=graphs.user_line(node),
                )


def _stacked(marked: MarkedLoop, keys: list[int], further: list[int]) -> list[int]:
    """Keys of what is wanted of every step: errors of a search; what is collected, and the trajectories of states.

    Of a trajectory whose end alone is read nothing is wanted.
    """
    if marked.searches:
        return further
    whole = {user.args[1] for user in marked.end.users if not all(map(reads_end, user.users))}
    return [key for j, key in enumerate([*keys, *further]) if j in whole]


def _without_time(nodes: list[fx.Node]) -> list[fx.Node]:
    return [n for n in nodes if not (n.target is operator.getitem and _begins_iteration(n.args[0]))]


def _begins_iteration(node: object) -> bool:
    return isinstance(node, fx.Node) and begins_iteration(node)


def _hoist_sizes(marked: MarkedLoop, iterations: list[list[fx.Node]]) -> list[list[fx.Node]]:
    """Move sizes that follow from outside sizes before the loop: Dynamo computes each once, where it is read first."""
    inside = {node for nodes in iterations for node in nodes}
    for node in [node for nodes in iterations for node in nodes]:
        operands = node.all_input_nodes
        if operands and all(_is_size(n) for n in (node, *operands)) and inside.isdisjoint(operands):
            marked.markers[0].prepend(node)
            inside.remove(node)
    return [[node for node in nodes if node in inside] for nodes in iterations]


def _is_size(node: fx.Node) -> bool:
    return isinstance(value(node), (int, torch.SymInt))


def _hoist_varying(marked: MarkedLoop, iterations: list[list[fx.Node]]) -> list[list[fx.Node]]:
    """Move operations on outside values whose constants differ between iterations before the loop.

    Only what computes the same there: it writes to nothing, draws no random numbers, and reads nothing that the loop
    writes to by any name. What is computed without gradients in the loop is before it, too.
    """
    if len({len(nodes) for nodes in iterations}) != 1:
        return iterations
    modes = [gradient_modes(nodes, outer=marked.with_gradients) for nodes in iterations]
    columns = list(zip(*iterations, strict=True))
    movable = [  # () where the iterations compute under different modes: nothing of it is moved
        column if len(set(mode)) == 1 else () for column, mode in zip(columns, zip(*modes, strict=True), strict=True)
    ]
    moved = _varying(movable, _computed_outside(marked, iterations, movable))
    for column, gradients in zip(columns, modes[0], strict=True):
        if column[0] in moved:
            _move(list(column), marked.markers[0], gradients, marked.with_gradients)
    return [[node for node in nodes if node not in moved] for nodes in iterations]


def _computed_outside(
    marked: MarkedLoop, iterations: list[list[fx.Node]], columns: list[tuple[fx.Node, ...]]
) -> set[fx.Node]:
    """The nodes of the columns that compute the same before the loop, all nodes of a column or none."""
    graph, observer = marked.markers[0].graph, Observer()
    inside = {node for nodes in iterations for node in nodes}
    heads = set(filter(begins_iteration, graph.nodes))
    markers = heads | {user for head in heads for user in head.users if user.target is operator.getitem}
    written = observer.written_among(inside)
    found: set[fx.Node] = set()
    for column in columns:
        reads = {i for node in column for i in node.all_input_nodes}
        shown = {fake_tensors.storage_of(value(node)) for node in (*reads, *column)}
        computed = all(_computes(node) and not observer.has_effects(node) for node in column)
        if computed and not shown & written and all(i in found or i not in inside | markers for i in reads):
            found.update(column)
    return found


def _computes(node: fx.Node) -> bool:
    """Whether a node makes tensors: of modes, sizes and transforms nothing is moved."""
    leaves = torch.utils._pytree.tree_leaves(value(node))
    return node.op in ("call_function", "call_method") and any(isinstance(leaf, torch.Tensor) for leaf in leaves)


def _varying(columns: list[tuple[fx.Node, ...]], outside: set[fx.Node]) -> set[fx.Node]:
    """Of what is computed outside, what differs between iterations, and what that is computed from."""
    found: set[fx.Node] = set()
    for column in columns:
        differs = len(set(map(graphs.operation, column))) > 1
        if outside.issuperset(column) and (differs or any(i in found for node in column for i in node.all_input_nodes)):
            found.update(column)
    for column in reversed(columns):
        if outside.issuperset(column) and any(user in found for node in column for user in node.users):
            found.update(column)
    return found


def _move(nodes: list[fx.Node], first_marker: fx.Node, gradients: bool, outer: bool) -> None:
    """Move nodes before the loop, and the mode with them; they leave any torch.func transform in which they stood."""
    for node in nodes:
        values = dict(zip(node.all_input_nodes, map(value, node.all_input_nodes), strict=True))
        with fake_tensors.fake_mode(), torch.set_grad_enabled(gradients):
            node.meta["example_value"] = call(node, values)
    if gradients is not outer:
        nodes = [_switch(first_marker, gradients), *nodes, _switch(first_marker, outer)]
    for node in nodes:
        first_marker.prepend(node)


def _switch(first_marker: fx.Node, gradients: bool) -> fx.Node:
    return first_marker.graph.call_function(torch._C._set_grad_enabled, (gradients,))


def _longest_run(iterations: list[list[fx.Node]], owner: Owner) -> tuple[int, list[list[Place]]]:
    """How many iterations from the first on are equal, and where each of their operands comes from."""
    first = iterations[0]
    operations = [graphs.operation(node) for node in first]
    places = [[_place(0, operand, owner) for operand in graphs.operands(node)] for node in first]
    for k, nodes in enumerate(iterations[1:], 1):
        if [graphs.operation(node) for node in nodes] != operations:
            return k, places
        now = [[_place(k, operand, owner) for operand in graphs.operands(node)] for node in nodes]
        if not all(
            _continues(old, new, k) for a, b in zip(places, now, strict=True) for old, new in zip(a, b, strict=True)
        ):
            return k, places
        if not all(_alike(a, b) for a, b in _outside_pairs(first, nodes, now)):
            return k, places
        places = now
    return len(iterations), places


def _place(k: int, operand: fx.Node, owner: Owner) -> Place:
    if operand not in owner:
        return None
    iteration, key = owner[operand]
    return k - iteration, key


def _continues(old: Place, new: Place, k: int) -> bool:
    """Whether iteration k may read from the new place where iteration k - 1 read from the old one."""
    if old is None and new is not None:  # a carry: up to here from outside, and from the first iteration now
        lag, _ = new
        return lag == k
    return old == new


def _outside_pairs(
    first: list[fx.Node], nodes: list[fx.Node], places: list[list[Place]]
) -> Iterator[tuple[fx.Node, fx.Node]]:
    for a, b, row in zip(first, nodes, places, strict=True):
        for x, y, place in zip(graphs.operands(a), graphs.operands(b), row, strict=True):
            if place is None:
                yield x, y


def _alike(a: fx.Node, b: fx.Node) -> bool:
    """Whether one step can take either value: the same node, or tensors that can be stacked."""
    if a is b:
        return True
    x, y = value(a), value(b)
    both = isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor)
    return both and x.shape == y.shape and x.dtype == y.dtype and x.device == y.device


def _source(values: list[fx.Node], place: Place) -> Source | Key:
    if place is not None and place[0] == 0:
        return place[1]
    if place is not None:
        return CarrySource(tuple(values[: place[0]]), place[1])
    if all(node is values[0] for node in values):
        return InvariantSource(values[0])
    return PerStepSource(tuple(values))


def _outputs(run: list[list[fx.Node]], owner: Owner, marked: MarkedLoop, *, extended: bool) -> dict[Key, list[int]]:
    """Which values of the run are read outside of it."""
    inside = {node for nodes in run for node in nodes}
    found: dict[Key, list[int]] = {}
    for node, (k, key) in owner.items():
        if k < len(run) and any(user not in inside for user in node.users):
            read = read_at_end(node, k, marked, len(run)) if extended else (k,)
            for iteration in read:
                found.setdefault(key, []).append(iteration)
    return found


def _unread(nodes: list[fx.Node], outputs: dict[Key, list[int]]) -> tuple[Key, ...]:
    """The floating tensors of an iteration from which nothing follows that is read outside of it."""
    read = graphs.ancestors([node for position, node in enumerate(nodes) if position in outputs])
    return tuple(position for position, node in enumerate(nodes) if node not in read and graphs.is_float(node))
