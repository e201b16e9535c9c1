"""Roll a run of equal iterations up into one loop.

Before:  step(t, 0), nodes of iteration 0, step(t, 1), nodes of iteration 1, ..., end(t)
         or the first iterations, then repeat(t, values), where all later ones repeat these
         or enter(t, dt, states), nodes of one iteration, leave(states, nexts) or leave_search(...), from odeint
After:   carry_1, ..., output_1, ... = loop(initial carries, stacked per-step inputs, invariants)

Requires: a Run whose operands stand before the loop, and its CapturedStep with all states found.
Ensures:  the loop is one LoopNode call; its results are the final carries, then the per-step outputs stacked along a
          new first dimension. A tensor that the loop updated in place holds its final value after the loop; no two
          operands show the same memory.
Raises:   MutationError for a write behind the loop to what leaves it under two names.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any, assert_never

import torch
from torch import fx

from rampde_fx.emit.lasting import lasts
from rampde_fx.errors import MutationError
from rampde_fx.ir import graphs
from rampde_fx.ir.captured import CapturedStep, LeaveSearch, MarkedLoop, Run, owner_of, reads_end
from rampde_fx.ir.dtypes_of_layers import in_dtypes_of_step, in_own_dtypes, notes_on_dtypes
from rampde_fx.ir.effects import Observer
from rampde_fx.ir.loops import Loop, LoopNode
from rampde_fx.ir.repeats import RepeatedResults
from rampde_fx.ir.rows import index_of_all, maker, rows_of_reads
from rampde_fx.ir.sources import (
    CarrySource,
    IndexSource,
    InvariantSource,
    PerStepSource,
    SeedSource,
    Source,
    TimeSource,
    carries_among,
)
from rampde_fx.runtime.step_control import Controller
from rampde_fx.torch_private import fake_tensors, higher_order, shapes

PER_STEP = (TimeSource, PerStepSource, IndexSource)


def roll_loop(graph_module: fx.GraphModule, marked: MarkedLoop, run: Run, captured: CapturedStep, name: str) -> Loop:
    """Replace the first iterations of a marked loop, a Run, by a call of a LoopNode of the given name."""
    starts = graphs.value(marked.markers[0].args[0])
    steps: Any = len(run.iterations)
    if run.from_odeint:
        steps = shapes.number_of(starts.shape[0])
    elif run.extended:
        steps = shapes.number_of(starts.shape[0] - 1 - marked.markers[0].args[1])
    loop = _loop(marked, run, captured, steps)
    _replace(graph_module, marked, run, captured, name, loop)
    return loop


def _loop(marked: MarkedLoop, run: Run, captured: CapturedStep, steps: Any) -> Loop:
    inputs, step = captured.inputs, captured.step

    def needs_grad(source: Source) -> bool:
        if not marked.with_gradients:
            return False
        if isinstance(source, TimeSource):
            return graphs.value(_times(marked, source.key)).requires_grad
        return any(getattr(graphs.value(node), "requires_grad", False) for node in source.values)

    wanted = tuple(map(needs_grad, inputs))
    sources = [node for node, needed in zip(graphs.placeholders(step), wanted, strict=True) if needed]
    reached = graphs.depends_on(step.graph, sources, by_gradient=True)
    controller = _controller(marked) if marked.searches else None
    left = marked.left() if marked.from_odeint else None
    # Of a search nothing is differentiated, nor summed: it is one step, tried again and again.
    return Loop(
        policy=replace(marked.policy, accumulation="plain", checkpoint="step") if marked.searches else marked.policy,
        steps=steps,
        where=graphs.user_line(marked.markers[0]),
        step=step,
        plain=step,
        carries=captured.carries(),
        per_step=sum(isinstance(source, PER_STEP) for source in inputs),
        plain_needs_grad=wanted,
        needs_grad=wanted,
        differentiated=any(node in reached and graphs.is_differentiable(node) for node in graphs.results(step)),
        monitored=marked.monitored,
        autocast=marked.autocast,
        controller=controller,
        evaluations=None if left is None else left.evaluations,
        method="" if left is None else left.method,
        named=_named(marked, run, captured) if marked.from_odeint else (),
        estimates=marked.leave_search().errors + controller.decisions if controller else 0,
        notes=notes_on_dtypes(captured),
    )


def _named(marked: MarkedLoop, run: Run, captured: CapturedStep) -> tuple[int, ...]:
    """The number of the step's result that is each of the next states, and of what is collected."""
    left = marked.left()
    keys = [run.iterations[0].index(node) for node in (*left.nexts, *left.collected)]
    carried = {source.key: i for i, source in enumerate(carries_among(captured.inputs))} if marked.searches else {}
    stacked = {key: captured.carries() + i for i, key in enumerate(captured.outputs)}
    return tuple(stacked.get(key, carried.get(key, -1)) for key in keys)


def _controller(marked: MarkedLoop) -> Controller:
    """The controller of a search. Tolerances are as they were at the capture; what they are now is an operand, too."""
    left = LeaveSearch(*fx.map_arg(marked.end.args, graphs.value))
    numbers = left.order, int(left.max_steps), shapes.hint_of(left.rtol), shapes.hint_of(left.atol)
    return Controller(*numbers, own_norm=left.own_norm, until_event=left.until_event)


def _times(marked: MarkedLoop, key: Any) -> fx.Node:
    """The grid t; of an odeint the starts or the sizes of its steps; of a search its intervals, or its numbers."""
    if marked.searches:
        return marked.leave_search().numbers if key == "dt" else marked.leave_search().t
    grid, second, *_ = marked.markers[0].args  # step(t, i, ...) or enter(t, dt, ...)
    return second if marked.from_odeint and key == "dt" else grid


def _replace(
    graph_module: fx.GraphModule,
    marked: MarkedLoop,
    run: Run,
    captured: CapturedStep,
    name: str,
    loop: Loop,
) -> None:
    """Put the LoopNode behind the run's last iteration and take the iterations out."""
    graph, count = graph_module.graph, len(run.iterations)
    inputs, outputs = captured.inputs, captured.outputs
    following = [*marked.markers, marked.end][count]
    graph_module.add_submodule(name, LoopNode(loop))
    with graph.inserting_before(following):
        operands = [_operand(graph, s, marked, loop.steps, run.extended) for s in inputs]
        operands = in_dtypes_of_step(graph, captured, operands)
        operands = _own_memory(graph, operands, _written_behind(following) if loop.differentiated else set())
        # Torch would differentiate a scan that no gradient comes back to.
        if marked.with_gradients and not loop.differentiated:
            operands = [_without_gradient(graph, node) for node in operands]
        search = {} if marked.searches or not run.from_odeint else {"search": marked.leave().search}
        call = graph.call_module(name, tuple(operands), search)
        found = [_getitem(graph, call, i) for i in range(loop.carries + len(outputs))]
        results = in_own_dtypes(graph, run, captured, found)
        for i, target in captured.written.items():
            if target.op == "placeholder" or _shared(graph, target, run):
                results[i] = graph.call_method("copy_", (target, results[i]))
        if marked.searches:
            _replace_findings(graph, marked, call)
        elif run.from_odeint:
            _replace_trajectories(graph, marked, run, captured, results)
        elif run.extended:
            _repeated_results(graph, marked, run, captured, results).rewire()
        else:
            _rewire(graph, marked, run, inputs, outputs, results)
    for nodes in reversed(run.iterations):
        for node in reversed(nodes):
            graph.erase_node(node)
    for marker in marked.markers[:count]:
        for user in list(marker.users):
            graph.erase_node(user)
        graph.erase_node(marker)
    for result in dict.fromkeys((*results, *found)):
        if result.op == "call_function" and not result.users:
            graph.erase_node(result)


def _shared(graph: fx.Graph, target: fx.Node, run: Run) -> bool:
    """Whether a node outside of the run, other than the target, shows the target's memory, or reads the target."""
    inside = {node for nodes in run.iterations for node in nodes}
    memory = fake_tensors.storage_of(graphs.value(target))
    others = (node for node in graph.nodes if node is not target and node not in inside)
    return any(fake_tensors.storage_of(graphs.value(n)) == memory or target in n.all_input_nodes for n in others)


def _getitem(graph: fx.Graph, node: fx.Node, index: Any) -> fx.Node:
    return graph.call_function(operator.getitem, (node, index))


def _own_memory(graph: fx.Graph, operands: list[fx.Node], written: set[int]) -> list[fx.Node]:
    """Clones of some operands: of those that show the memory of an earlier one, for a scan takes no two views of one
    tensor, and of those that are written to behind the loop, for its backward reads them as they were.
    """
    seen, made = set[int](), list[fx.Node]()
    for node in operands:
        memory = _memory(node)
        cloned = memory is not None and memory in seen | written
        made.append(graph.call_method("clone", (node,)) if cloned else node)
        if cloned and lasts(node):
            higher_order.recompute_in_backward(made[-1])
        seen |= set() if memory is None else {memory}
    return made


def _without_gradient(graph: fx.Graph, node: fx.Node) -> fx.Node:
    value = graphs.value(node)  # None of what was stacked here
    return graph.call_method("detach", (node,)) if value is None or getattr(value, "requires_grad", False) else node


def _operand(graph: fx.Graph, source: Source, marked: MarkedLoop, count: Any, extended: bool) -> fx.Node:
    first = 0 if marked.from_odeint else marked.markers[0].args[1]
    match source:
        case IndexSource(device):
            end = first + count
            if extended and not isinstance(count, int):  # no graph holds a symbolic number
                size = graph.call_method("size", (marked.markers[0].args[0], 0))
                end = graph.call_function(operator.sub, (size, 1))
            return graph.call_function(torch.arange, (first, end), {"device": torch.device(device)})
        case SeedSource(device):
            return graph.call_function(torch.randint, (0, 2**62, ()), {"device": torch.device(device)})
        case TimeSource() if marked.from_odeint:
            times = _times(marked, source.key)
            clone = graph.call_method("clone", (times,))
            clone.meta["example_value"] = graphs.value(times)
            return clone
        case TimeSource(key):
            t = marked.markers[0].args[0]
            starts = _getitem(graph, t, slice(first, -1 if extended else first + count))
            if key == "t":
                return graph.call_method("clone", (starts,))
            ends = _getitem(graph, t, slice(first + 1, None if extended else first + 1 + count))
            return graph.call_function(torch.sub, (ends, starts))
        case PerStepSource(values) if extended:
            return _rows(graph, values, marked.markers[0])
        case PerStepSource(values):
            return graph.call_function(torch.stack, (list(values),))
        case CarrySource() | InvariantSource():
            return source.values[0]
        case _:
            assert_never(source)


def _rows(graph: fx.Graph, values: tuple[fx.Node, ...], marker: fx.Node) -> fx.Node:
    """All rows from the first of some values on, up to the end of the loop."""
    rows = rows_of_reads(values)
    assert rows is not None, "check_extension"
    base, (grid, first, *_) = values[0].args[0], marker.args
    make = maker(graph, values[0].meta, gradients=graphs.value(values[0]).requires_grad)
    taken = make(operator.getitem, base, index_of_all(make, rows, grid, first))
    return make("clone", make(torch.movedim, taken, rows.dimension(graphs.value(base).ndim), 0))


def _rewire(
    graph: fx.Graph, marked: MarkedLoop, run: Run, inputs: list[Source], outputs: list[Any], results: list[fx.Node]
) -> None:
    """Let the readers outside of the run read the loop's results."""
    inside, last = {node for nodes in run.iterations for node in nodes}, len(run.iterations) - 1
    carries = carries_among(inputs)
    finals = {source.key: results[i] for i, source in enumerate(carries) if source.is_latest}
    stacked = dict(zip(outputs, results[len(carries) :], strict=True))
    written = _written_behind(marked.end)
    _check_names(run, marked, written)
    for key in run.outputs:
        nodes = [_value_of(run, marked, k, key) for k in range(last + 1)]
        if key in stacked and written.isdisjoint(map(_memory, nodes)):
            _rewrite_stacks(graph, nodes, stacked[key], {node for rest in marked.iterations for node in rest})
        pieces: Callable[[int], fx.Node] = _unbound(graph, stacked.get(key))
        for k, node in enumerate(nodes):
            readers = [] if node is None else [user for user in node.users if user not in inside]
            if readers:
                read = finals[key] if k == last and key in finals else pieces(k)
                read.meta.setdefault("example_value", graphs.value(node))
            for user in readers:
                user.replace_input_with(node, read)


def _repeated_results(
    graph: fx.Graph, marked: MarkedLoop, run: Run, captured: CapturedStep, results: list[fx.Node]
) -> RepeatedResults:
    carries = carries_among(captured.inputs)
    return RepeatedResults(
        graph,
        marked,
        owner_of(run.iterations, marked.markers),
        {(s.key, s.lag): results[i] for i, s in enumerate(carries) if s.key is not None},
        dict(zip(captured.outputs, results[len(carries) :], strict=True)),
        _written_behind(marked.end),
    )


def _memory(node: fx.Node | None) -> int | None:
    return None if node is None else fake_tensors.storage_of(graphs.value(node))


def _written_behind(node: fx.Node) -> set[int]:
    """The memory that is written to behind a node."""
    observer, node, found = Observer(), node.next, set()
    while node.op != "root":
        found |= observer.written(node)
        node = node.next
    return found


def _check_names(run: Run, marked: MarkedLoop, written: set[int]) -> None:
    """Refuse writes to what leaves the loop under two names: the loop's results are tensors of their own."""
    for k in range(len(run.iterations)):
        names: dict[int, fx.Node] = {}
        for node in (_value_of(run, marked, k, key) for key, read in run.outputs.items() if k in read):
            memory = _memory(node)
            if node is None or memory is None or memory not in written or node in names.values():
                continue
            if memory in names:
                raise MutationError(
                    f"'{graphs.user_name(node)}' and '{graphs.user_name(names[memory])}' of a step show the same"
                    " memory, and it is updated in place after the loop",
                    required="in-place updates of what leaves the loop under one name",
                    fix="collect a clone(), or write y = y * 2 instead of y *= 2",
                    where=graphs.user_line(node),
                )
            names[memory] = node


def _replace_findings(graph: fx.Graph, marked: MarkedLoop, call: fx.Node) -> None:
    """Let the readers of leave_search read what the search gives."""
    leave = marked.end
    for finding in list(leave.users):
        finding.replace_all_uses_with(_getitem(graph, call, finding.args[1]))
        graph.erase_node(finding)
    leave.args = ()  # what it reads goes away with the iteration


def _replace_trajectories(
    graph: fx.Graph, marked: MarkedLoop, run: Run, captured: CapturedStep, results: list[fx.Node]
) -> None:
    """Let the readers of leave read the loop's results."""
    end, left = marked.end, marked.leave()
    carries = captured.carries()
    stacked = dict(zip(captured.outputs, results[carries:], strict=True))
    keys = [run.iterations[0].index(node) for node in (*left.nexts, *left.collected)]
    finals = {(s.values, s.key): results[i] for i, s in enumerate(carries_among(captured.inputs))}
    for trajectory in list(end.users):
        j = trajectory.args[1]
        if j >= len(left.states):
            trajectory.replace_all_uses_with(stacked[keys[j]])
            graph.erase_node(trajectory)
            continue
        for user in [user for user in trajectory.users if reads_end(user)]:
            index = user.args[1]
            last = finals[(left.states[j],), keys[j]]
            last = _getitem(graph, last, index[1:]) if isinstance(index, tuple) else last
            last.meta.setdefault("example_value", graphs.value(user))
            user.replace_all_uses_with(last)
            graph.erase_node(user)
        if trajectory.users:
            afterwards = stacked[keys[j]]
            if left.every != 1:
                afterwards = _getitem(graph, afterwards, slice(left.every - 1, None, left.every))
            start = graph.call_method("unsqueeze", (left.states[j], 0))
            whole = graph.call_function(torch.cat, ([start, afterwards],))
            whole.meta = dict(trajectory.meta)
            trajectory.replace_all_uses_with(whole)
        graph.erase_node(trajectory)
    end.args = ()  # what it reads goes away with the iteration


def _value_of(run: Run, marked: MarkedLoop, k: int, key: Any) -> fx.Node | None:
    if isinstance(key, int):
        return run.iterations[k][key]
    index = ("t", "dt").index(key)
    return next((user for user in marked.markers[k].users if user.args[1] == index), None)


def _unbound(graph: fx.Graph, stacked: fx.Node | None) -> Callable[[int], fx.Node]:
    """Single values of a stacked output, through one unbind: its gradient is one stack."""
    made: list[fx.Node] = []

    def piece(k: int) -> fx.Node:
        if not made:
            made.append(graph.call_function(torch.unbind, (stacked,)))
        # A clone, for the user may update what he collected in place.
        return graph.call_method("clone", (_getitem(graph, made[0], k),))

    return piece


def _rewrite_stacks(graph: fx.Graph, nodes: list[fx.Node | None], stacked: fx.Node, iterations: set[fx.Node]) -> None:
    """After the loop torch.stack([before..., every value, after...]) reads the stacked output as a whole."""
    if nodes[0] is None:
        return
    for user in [user for user in nodes[0].users if user not in iterations]:
        parts = list(user.args[0]) if user.target is torch.stack and user.args else []
        start = parts.index(nodes[0]) if nodes[0] in parts else 0
        if parts[start : start + len(nodes)] != nodes or _dimension(user) != 0:
            continue
        before, after = parts[:start], parts[start + len(nodes) :]
        with graph.inserting_before(user):
            groups = [[graph.call_function(torch.stack, (group,))] if group else [] for group in (before, after)]
            whole = graph.call_function(torch.cat, ([*groups[0], stacked, *groups[1]],))
        whole.meta = dict(user.meta)
        user.replace_all_uses_with(whole)
        graph.erase_node(user)


def _dimension(stack: fx.Node) -> Any:
    return stack.args[1] if len(stack.args) > 1 else stack.kwargs.get("dim", 0)
