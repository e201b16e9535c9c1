"""Roll a run of equal iterations up into one step, as functional ATen.

Before:  step(t, 0), nodes of iteration 0, step(t, 1), nodes of iteration 1, ..., end(t)
After:   carry_1, ..., output_1, ... = loop(initial carries, stacked per-step inputs, invariants)

The step is traced with make_fx under functionalisation, so that an affine update is a handful of ATen operations
however it was spelled, in-place updates included, and a velocity that uses torch.func is plain ATen.

Requires: a Run whose operands stand before the loop.
Ensures:  the loop is one LoopNode call; its results are the final carries, then the per-step outputs stacked along a
          new first dimension. A tensor that the loop updated in place holds its final value after the loop.
Raises:   StateChangeError, MutationError, RandomVelocityError, UnsupportedLoopError.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from rampde_fx import graphs, torch_private
from rampde_fx.errors import MutationError, RampdeError, RandomVelocityError, StateChangeError, UnsupportedLoopError
from rampde_fx.loop import Loop, LoopNode, MarkedLoop, Run, Source

aten = torch.ops.aten
# A state keeps its identity through these, whatever it is scaled by and whatever is added.
CHAIN = {
    aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.neg.default, aten.clone.default,
    aten.expand.default,
}  # fmt: skip
WRITES = {aten.select_scatter.default, aten.slice_scatter.default, aten.index_put.default}


def roll_loop(graph_module: fx.GraphModule, marked: MarkedLoop, run: Run, name: str) -> Loop:
    """Replace the first iterations of a marked loop, a Run, by a call of a LoopNode of the given name."""
    where = graphs.user_line(marked.markers[0])
    inputs, step, outputs = _torch_step(graph_module, run)
    values = [_fake(source, marked) for source in inputs]
    step, after = _functional(step, values)
    _check_random(step)
    inputs, step, written = _carry_mutated(inputs, step, after, outputs, marked)
    if len(run.iterations) == 1:
        inputs, outputs, step = _carry_single_step(inputs, outputs, step)
    _check_operands(inputs, where)
    step = graphs.refresh(torch_private.deduplicated(step))
    loop = _loop(marked, inputs, step, len(run.iterations), where)
    _check_states(loop)
    _replace(graph_module, marked, run, name, loop, inputs, outputs, written)
    return loop


def _torch_step(graph_module: fx.GraphModule, run: Run) -> tuple[list[Source], fx.GraphModule, list[Any]]:
    """One iteration as a module: its inputs (carries first), and after the next carries the keys of its outputs."""
    inputs = _ordered_inputs(run)
    carries = [source for source in inputs if source.kind == "carry"]
    graph = fx.Graph()
    names = graphs.distinct(_name(source) for source in inputs)
    place: dict[Any, fx.Node] = {s: graph.placeholder(name) for s, name in zip(inputs, names, strict=True)}
    place.update({source.key: place[source] for source in inputs if source.kind == "time"})
    for position, (node, row) in enumerate(zip(run.iterations[0], run.sources, strict=True)):
        operands = iter(row)
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda _, operands=operands: place[next(operands)])
        place[position] = graph.create_node(node.op, node.target, args, kwargs, node.name)
        place[position].meta = dict(node.meta)
    last = len(run.iterations) - 1
    finals = {source.key for source in carries if len(source.values) == 1}
    outputs = [key for key, ks in run.outputs.items() if ks != [last] or key not in finals]
    nexts = [place[_next(source)] for source in carries]
    graph.output((*nexts, *(place[key] for key in outputs)))
    return inputs, fx.GraphModule(graph_module, graph), outputs


def _next(carry: Source) -> Any:
    """What replaces a carry: a value of the iteration, or of a longer lag the carry that is one step younger."""
    return carry.key if len(carry.values) == 1 else replace(carry, values=carry.values[1:])


def _ordered_inputs(run: Run) -> list[Source]:
    """The distinct inputs of an iteration: carries, times, per-step inputs, invariants."""
    found: dict[Source, None] = {}
    for source in (s for row in run.sources for s in row if isinstance(s, Source)):
        found[source] = None
        younger = source
        while younger.kind == "carry" and len(younger.values) > 1:
            younger = _next(younger)
            found[younger] = None
    keys = [s for row in run.sources for s in row if not isinstance(s, Source)]
    keys += [source.key for source in found if source.kind == "carry"]
    found.update({Source("time", (), key): None for key in (*keys, *run.outputs) if key in ("t", "dt")})
    order = ("carry", "time", "per_step", "invariant")
    return sorted(found, key=lambda source: order.index(source.kind))


def _name(source: Source) -> str:
    return str(source.key) if source.kind == "time" else graphs.readable(source.values[0].name)


def _fake(source: Source, marked: MarkedLoop) -> Any:
    if source.kind == "time":
        return torch_private.detached(graphs.value(marked.markers[0].args[0])[0])
    return torch_private.detached(graphs.value(source.values[0]))


def _functional(step: fx.GraphModule, values: list[Any]) -> tuple[fx.GraphModule, list[fx.Node]]:
    """The step as functional ATen, and for every placeholder the node that holds its value after the step."""

    def results_and_inputs(*args: Any) -> tuple[Any, ...]:
        results = _Captured(step).run(*args)
        return *results, *(arg for arg in args if isinstance(arg, torch.Tensor))

    names = [node.name for node in graphs.placeholders(step)]
    try:
        traced = graphs.named(torch_private.trace(results_and_inputs, values, functionalize=True), names)
    except (RuntimeError, TypeError, NotImplementedError, AttributeError) as error:
        if isinstance(error, RampdeError):
            raise
        raise UnsupportedLoopError(
            f"a step cannot be traced to functional ATen: {error}",
            required="a step of functional torch operations on dense tensors",
            fix="move the operation out of the loop, or write it by others",
            where=graphs.user_line(step.graph.output_node().all_input_nodes[0]),
        ) from error
    results = graphs.results(traced)
    count = len(graphs.results(step))
    tensors = iter(results[count:])
    inputs = graphs.placeholders(traced)
    after = [
        next(tensors) if isinstance(value, torch.Tensor) else node for node, value in zip(inputs, values, strict=True)
    ]
    return traced, after


class _Captured(fx.Interpreter):
    """Runs a captured step; what it detaches, or computes under no_grad, gets a gradient of zero by stop_gradient."""

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.op not in ("call_function", "call_method") or (torch.is_grad_enabled() and not _detaches(n)):
            return result
        stop = torch.ops.rampde_fx.stop_gradient
        return torch.utils._pytree.tree_map_only(
            torch.Tensor, lambda x: stop(x) if x.is_floating_point() else x, result
        )

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if isinstance(target, torch._ops.HigherOrderOperator):  # find_loops lets those in that run their body
            return _Captured(args[0]).run(*args[1:])
        return super().call_function(target, args, kwargs)


def _detaches(node: fx.Node) -> bool:
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return name in ("detach", "detach_") or (name == "getattr" and node.args[1] == "data")


def _check_random(step: fx.GraphModule) -> None:
    for node in step.graph.nodes:
        if torch_private.draws_random_numbers(node):
            raise RandomVelocityError(
                f"a step of the loop draws random numbers ({node.target})",
                required="a step that computes the same when the backward recomputes it",
                fix="draw before the loop and use the drawn tensor in it; call eval(), or use p=0, for dropout",
                where=graphs.user_line(node),
            )


def _carry_mutated(
    inputs: list[Source], step: fx.GraphModule, after: list[fx.Node], outputs: list[Any], marked: MarkedLoop
) -> tuple[list[Source], fx.GraphModule, dict[int, fx.Node]]:
    """Make carries of what the step changes in place; say which outside tensors the final carries are written to."""
    nodes = graphs.placeholders(step)
    carries = sum(source.kind == "carry" for source in inputs)
    results = graphs.results(step)[: carries + len(outputs)]
    changed = [i for i, (node, now) in enumerate(zip(nodes, after, strict=True)) if node is not now]
    for i in changed:
        own = i < carries and results[i] is after[i]
        others = [graphs.base_of_view(result) for j, result in enumerate(results) if not (own and j == i)]
        kind_allows = own or (inputs[i].kind == "invariant" and inputs[i].values[0].op != "placeholder")
        if not kind_allows or after[i] in others or _aliased(inputs, i, marked):
            raise _mutation(inputs[i], after[i])
    promoted = [i for i in changed if inputs[i].kind == "invariant"]
    order = [*range(carries), *promoted, *(i for i in range(carries, len(inputs)) if i not in promoted)]
    results = [*results[:carries], *(after[i] for i in promoted), *results[carries:]]
    sources = [replace(inputs[i], kind="carry") if i in promoted else inputs[i] for i in order]
    written = {j: inputs[i].values[0] for j, i in enumerate(order) if i in changed}
    return sources, _rebuilt(step, order, results), written


def _aliased(inputs: list[Source], i: int, marked: MarkedLoop) -> bool:
    """Whether the loop reads the memory of an input by another name as well."""
    own = torch_private.storage_of(graphs.value(inputs[i].values[0]))
    others = [graphs.value(node) for j, source in enumerate(inputs) if j != i for node in source.values]
    others.append(graphs.value(marked.markers[0].args[0]))
    return own in map(torch_private.storage_of, others)


def _mutation(source: Source, node: fx.Node) -> MutationError:
    name = graphs.readable(source.values[0].name) if source.values else source.key
    return MutationError(
        f"a step changes '{name}' in place, and '{name}' is a buffer, an argument, or is also read by another name",
        required="in-place updates of the carried state only (y += ...), whose older values nobody reads",
        fix="write y = y + ... instead, collect y.clone(), clone what comes from outside before the loop, and call "
        "eval() for BatchNorm",
        where=graphs.user_line(node),
    )


def _carry_single_step(
    inputs: list[Source], outputs: list[Any], step: fx.GraphModule
) -> tuple[list[Source], list[Any], fx.GraphModule]:
    """In a run of one step nothing comes back: a state is an invariant from which an output follows by sums alone."""
    nodes, results = graphs.placeholders(step), graphs.results(step)
    first_output, last_output = len(results) - len(outputs), len(results)
    # A new state may also leave the step by a write into a tensor that collects the trajectory.
    results += [node.args[1] for node in graphs.body(step) if node.target in WRITES]
    pairs: dict[int, int] = {}
    for j in range(first_output, len(results)):
        free = [i for i, s in enumerate(inputs) if s.kind == "invariant" and i not in pairs]
        state = _state_behind(results[j], {nodes[i]: i for i in free})
        if state is not None:
            pairs[state] = j
    carried = [i for i, s in enumerate(inputs) if s.kind == "carry"]
    order = [*carried, *pairs, *(i for i in range(len(inputs)) if i not in carried and i not in pairs)]
    rest = [j for j in range(first_output, last_output) if j not in pairs.values()]
    kept = [results[j] for j in [*range(first_output), *pairs.values(), *rest]]
    keys = {j: outputs[j - first_output] if j < last_output else -1 - j for j in pairs.values()}
    sources = [Source("carry", inputs[i].values, keys[pairs[i]]) if i in pairs else inputs[i] for i in order]
    return sources, [outputs[j - first_output] for j in rest], _rebuilt(step, order, kept)


def _state_behind(result: fx.Node, candidates: dict[fx.Node, int]) -> int | None:
    """The candidate from which the result follows by sums and scalings: if there are several, one that the step reads
    elsewhere too, and the leftmost of these."""
    found: list[fx.Node] = []
    open_nodes, seen = [result], {result}
    while open_nodes:
        node = open_nodes.pop()
        if node in candidates and _same_kind(graphs.value(node), graphs.value(result)):
            found.append(node)
        parents = [p for p in node.all_input_nodes if p not in seen] if node.target in CHAIN else []
        seen.update(parents)
        open_nodes += reversed(parents)
    found.sort(key=lambda node: len(node.users) == 1)
    return candidates[found[0]] if found else None


def _same_kind(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device


def _rebuilt(step: fx.GraphModule, order: list[int], results: list[Any]) -> fx.GraphModule:
    """The step with its placeholders in another order and other results."""
    nodes = graphs.placeholders(step)
    body = [node for node in step.graph.nodes if node.op not in ("placeholder", "output")]
    graph, env = fx.Graph(), {}
    for i in order:
        env[nodes[i]] = graph.placeholder(nodes[i].name)
        env[nodes[i]].meta = dict(nodes[i].meta)
    for node in body:
        env[node] = graph.node_copy(node, env.__getitem__)
    graph.output(tuple(fx.map_arg(r, env.__getitem__) for r in results))
    return graphs.refresh(fx.GraphModule(step, graph))


def _loop(marked: MarkedLoop, inputs: list[Source], step: fx.GraphModule, steps: int, where: str) -> Loop:
    t = graphs.value(marked.markers[0].args[0])

    def needs_grad(source: Source) -> bool:
        if not marked.differentiated:
            return False
        if source.kind == "time":
            return t.requires_grad
        return any(getattr(graphs.value(node), "requires_grad", False) for node in source.values)

    kinds = [source.kind for source in inputs]
    wanted = tuple(map(needs_grad, inputs))
    return Loop(
        policy=marked.policy,
        steps=steps,
        where=where,
        step=step,
        plain=step,
        carries=kinds.count("carry"),
        per_step=kinds.count("time") + kinds.count("per_step"),
        plain_needs_grad=wanted,
        needs_grad=wanted,
        differentiated=any(wanted),
    )


def _check_operands(inputs: list[Source], where: str) -> None:
    for source in inputs:
        if any(isinstance(graphs.value(node), torch.SymFloat) for node in source.values):
            raise UnsupportedLoopError(
                f"the loop reads the Python float '{graphs.readable(source.values[0].name)}', which changes",
                required="tensors and ints from outside of the loop",
                fix="pass the number as a 0-d tensor",
                where=where,
            )


def _check_states(loop: Loop) -> None:
    if loop.carries == 0:
        raise StateChangeError(
            "a step carries no state: no result follows by sums from something of its own shape and dtype",
            required="a state that keeps its shape, dtype and device",
            fix="iterate over steps(t) itself, and bring the state to its final shape and dtype before the loop",
            where=_first_line(loop.step) or loop.where,
        )
    for before, after in zip(graphs.placeholders(loop.step)[: loop.carries], graphs.results(loop.step), strict=False):
        a, b = graphs.value(before), graphs.value(after)
        if not isinstance(a, torch.Tensor) or a.is_complex():
            kind = "a complex tensor" if isinstance(a, torch.Tensor) else "a Python number"
            raise UnsupportedLoopError(
                f"the carried value '{before.name}' is {kind}",
                required="carried values that are real tensors",
                fix="start from a tensor, such as torch.zeros(...); view a complex one by torch.view_as_real",
                where=loop.where,
            )
        if not _same_kind(a, b):
            raise StateChangeError(
                f"the state '{before.name}' goes into the step as {_describe(a)} and leaves it as {_describe(b)}",
                required="a state that keeps its shape, dtype and device",
                fix="bring the state to its final shape and dtype before the loop",
                where=graphs.user_line(after) or loop.where,
            )


def _first_line(step: fx.GraphModule) -> str:
    lines = (graphs.user_line(node) for node in graphs.results(step) if isinstance(node, fx.Node))
    return next(filter(None, lines), "")


def _describe(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)} on {tensor.device}"


def _replace(
    graph_module: fx.GraphModule,
    marked: MarkedLoop,
    run: Run,
    name: str,
    loop: Loop,
    inputs: list[Source],
    outputs: list[Any],
    written: dict[int, fx.Node],
) -> None:
    """Put the LoopNode behind the run's last iteration and take the iterations out."""
    graph, count = graph_module.graph, len(run.iterations)
    following = [*marked.markers, marked.end][count]
    graph_module.add_submodule(name, LoopNode(loop))
    with graph.inserting_before(following):
        operands = _distinct_memory(graph, [_operand(graph, source, marked, count) for source in inputs])
        call = graph.call_module(name, tuple(operands))
        results = [_getitem(graph, call, i) for i in range(loop.carries + len(outputs))]
        for i, target in written.items():
            if target.op == "placeholder" or _shared(graph, target, run):
                results[i] = graph.call_method("copy_", (target, results[i]))
        _rewire(graph, marked, run, inputs, outputs, results)
    for nodes in reversed(run.iterations):
        for node in reversed(nodes):
            graph.erase_node(node)
    for marker in marked.markers[:count]:
        for user in list(marker.users):
            graph.erase_node(user)
        graph.erase_node(marker)
    for result in results:
        if result.op == "call_function" and not result.users:
            graph.erase_node(result)


def _shared(graph: fx.Graph, target: fx.Node, run: Run) -> bool:
    """Whether a node outside of the run, other than the target, shows the target's memory, or reads the target."""
    inside = {node for nodes in run.iterations for node in nodes}
    storage = torch_private.storage_of(graphs.value(target))
    others = (node for node in graph.nodes if node is not target and node not in inside)
    return any(torch_private.storage_of(graphs.value(n)) == storage or target in n.all_input_nodes for n in others)


def _getitem(graph: fx.Graph, node: fx.Node, index: Any) -> fx.Node:
    return graph.call_function(operator.getitem, (node, index))


def _distinct_memory(graph: fx.Graph, operands: list[fx.Node]) -> list[fx.Node]:
    """Clones of the operands that show the memory of an earlier one: a scan takes no two views of one tensor."""
    seen: set[int | None] = {None}
    made: list[fx.Node] = []
    for node in operands:
        storage = torch_private.storage_of(graphs.value(node))
        repeated = storage is not None and storage in seen
        made.append(graph.call_method("clone", (node,)) if repeated else node)
        seen.add(storage)
    return made


def _operand(graph: fx.Graph, source: Source, marked: MarkedLoop, count: int) -> fx.Node:
    if source.kind == "time":
        first = marked.markers[0].args[1]
        t = marked.markers[0].args[0]
        starts = _getitem(graph, t, slice(first, first + count))
        if source.key == "t":
            return graph.call_method("clone", (starts,))
        ends = _getitem(graph, t, slice(first + 1, first + 1 + count))
        return graph.call_function(torch.sub, (ends, starts))
    if source.kind == "per_step":
        return graph.call_function(torch.stack, (list(source.values),))
    return source.values[0]


def _rewire(
    graph: fx.Graph, marked: MarkedLoop, run: Run, inputs: list[Source], outputs: list[Any], results: list[fx.Node]
) -> None:
    """Let the readers outside of the run read the loop's results."""
    inside, last = {node for nodes in run.iterations for node in nodes}, len(run.iterations) - 1
    finals = {s.key: results[i] for i, s in enumerate(inputs) if s.kind == "carry" and len(s.values) == 1}
    carries = sum(source.kind == "carry" for source in inputs)
    stacked = dict(zip(outputs, results[carries:], strict=True))
    for key in run.outputs:
        nodes = [_value_of(run, marked, k, key) for k in range(last + 1)]
        if key in stacked:
            _rewrite_stacks(graph, nodes, stacked[key], {node for rest in marked.iterations for node in rest})
        pieces: Callable[[int], fx.Node] = _unbound(graph, stacked.get(key))
        for k, node in enumerate(nodes):
            readers = [] if node is None else [user for user in node.users if user not in inside]
            if readers:
                read = finals[key] if k == last and key in finals else pieces(k)
                read.meta.setdefault("example_value", graphs.value(node))
            for user in readers:
                user.replace_input_with(node, read)


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
