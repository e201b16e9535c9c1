"""Find the states of a step that the comparison of iterations cannot see, and check that all keep their kind.

Before:  step(y, u, t, dt, w) with y carried; u: updated in place, always the same tensor
After:   step(y, u, t, dt, w) with y and u carried; u holds the final value after the loop

A tensor that the iterations update in place is a carry. In a run of one iteration nothing comes back to be compared:
there a state is an invariant from which a result, or what is written into a collecting tensor, follows. Invariants from
which a value follows that nothing reads, as the next state where the loop ends, or that an earlier run of the loop
gave, are carries that do not change, so that what follows from them counts as varying; and so are, in a step without
any state, all its inputs.

Requires: a CapturedStep.
Ensures:  every carry enters and leaves the step in one shape, dtype and device; no state is in half precision; no
          input is read by a second name after it was changed; CapturedStep.written maps carries to the outside tensors
          that they were updated in.
Raises:   MutationError for a write in place to what requires a gradient or has another name, and to what torch.compile
          loses; StateChangeError for a state that changes its kind, is in half precision, or is missing;
          UnsupportedLoopError for a Python number as a state, or a float as an input, and for a velocity in a search
          that is no function of t and y.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from rampde_fx.errors import MutationError, StateChangeError, UnsupportedLoopError
from rampde_fx.ir import graphs, operator_table
from rampde_fx.ir.captured import CapturedStep, MarkedLoop
from rampde_fx.ir.operator_table import properties
from rampde_fx.ir.origins import WAYS, same_kind, state_behind
from rampde_fx.ir.sources import CarrySource, InvariantSource, Key, Source, TimeSource
from rampde_fx.policy_text import word_of
from rampde_fx.torch_private import fake_tensors

aten = torch.ops.aten
FIX_LOW_PARAMETERS = (
    "keep the parameters in float32, without .half() or the param_dtype of fully_shard's MixedPrecisionPolicy: "
    "mixed_precision casts them"
)


def find_states(
    marked: MarkedLoop, captured: CapturedStep, *, single: bool, before: Container[str] = ()
) -> CapturedStep:
    """Add the states of a captured step that its carries lack.

    Args:
        marked: The loop, or what is left of it.
        captured: The step.
        single: Whether the run has one iteration.
        before: The calls that stand for earlier runs of the loop.
    """
    where = graphs.user_line(marked.markers[0])
    found = _carry_mutated(captured, marked, single)
    further = set[int]()
    if single:
        found, further = _carry_single_step(found)
        further |= _given_by(before, found, marked.markers[0])
    if found.carries() == 0:
        further = _contexts(found)
    found = _carry_unchanged(found, sorted(further))
    _check_operands(found.inputs, where)
    found = replace(found, step=graphs.refresh(fake_tensors.deduplicated(found.step)))
    _check_states(found, where, once=marked.from_odeint)
    if marked.searches:
        _check_search(found)
    return found


def _check_search(captured: CapturedStep) -> None:
    """A search evaluates the velocity more often than the steps that count, and again: it must be a function."""
    drawing = [node for node in captured.step.graph.nodes if graphs.draws_random_numbers(node)]
    changed = [graphs.results(captured.step)[i] for i in captured.written]
    if drawing or changed:
        raise UnsupportedLoopError(
            "the velocity of an adaptive odeint "
            + ("draws random numbers" if drawing else "changes a buffer, as BatchNorm in training does"),
            required="the same velocity whenever it is evaluated, for the estimate of the error compares evaluations",
            fix='take fixed steps, options={"num_steps": n}, or put such layers into eval()',
            where=graphs.user_line([*drawing, *changed][0]),
        )


def _carry_mutated(captured: CapturedStep, marked: MarkedLoop, single: bool) -> CapturedStep:
    """Make carries of what the step changes in place; say which outside tensors the final carries are written to."""
    inputs, step, after, carries = list(captured.inputs), captured.step, captured.after, captured.carries()
    results = graphs.results(step)[: carries + len(captured.outputs)]
    changed = [i for i, (node, now) in enumerate(zip(graphs.placeholders(step), after, strict=True)) if node is not now]
    unread = graphs.results(step)[carries + len(captured.outputs) :][: captured.unread]
    returned: set[int] = set()  # outputs that are the changed tensors themselves
    keys: dict[int, Key] = {}
    for i in changed:
        own = i < carries and results[i] is after[i]
        same = [j for j in range(carries, len(results)) if results[j] is after[i]]
        if single and not own and len(same) == 1:  # no later iteration of the run changes what is read outside
            own = True
            keys[i] = captured.outputs[same[0] - carries]
            returned.update(same)
        others = [
            graphs.base_of_view(result)
            for j, result in enumerate(results)
            if j not in returned and not (own and j == i < carries)
        ]
        kind_allows = own or (isinstance(inputs[i], InvariantSource) and not _is_leaf(inputs[i].values[0]))
        if not kind_allows or after[i] in others or _aliased(inputs, i, marked):
            raise _mutation(inputs[i], after[i])
        written = inputs[i].values[0]
        if written.op == "placeholder" and fake_tensors.loses_writes(graphs.value(written)):
            raise _lost(written, after[i])
    promoted = [i for i in changed if isinstance(inputs[i], InvariantSource)]
    order = [*range(carries), *promoted, *(i for i in range(carries, len(inputs)) if i not in promoted)]
    rest = [j for j in range(carries, len(results)) if j not in returned]
    results = [*results[:carries], *(after[i] for i in promoted), *(results[j] for j in rest), *unread]
    sources = [CarrySource(inputs[i].values, keys.get(i)) if i in promoted else inputs[i] for i in order]
    written = {j: inputs[i].values[0] for j, i in enumerate(order) if i in changed}
    return replace(
        captured,
        inputs=sources,
        outputs=[captured.outputs[j - carries] for j in rest],
        step=_rebuilt(step, order, results),
        written=written,
    )


def _is_leaf(node: fx.Node) -> bool:
    """Whether a node is a parameter, or an argument that requires a gradient."""
    return node.op in ("placeholder", "get_attr") and graphs.value(node).requires_grad


def _aliased(inputs: list[Source], i: int, marked: MarkedLoop) -> bool:
    """Whether the loop reads the memory of an input by another name as well."""
    own = fake_tensors.storage_of(graphs.value(inputs[i].values[0]))
    others = [graphs.value(node) for j, source in enumerate(inputs) if j != i for node in source.values]
    others.append(graphs.value(marked.markers[0].args[0]))
    return own in map(fake_tensors.storage_of, others)


def _lost(node: fx.Node, changed: fx.Node) -> MutationError:
    return MutationError(
        f"a step changes '{graphs.user_name(node)}' in place, a float64 tensor of shape () on the CPU: torch.compile "
        "loses what is written to such a tensor",
        required="in-place updates of other tensors",
        fix="give it the shape (1,), or float32, or an integer dtype if it counts",
        where=graphs.user_line(changed),
    )


def _mutation(source: Source, node: fx.Node) -> MutationError:
    if isinstance(source, TimeSource):
        name = f"'{source.key}'"
    elif source.values[0].op == "placeholder":
        name = f"'{graphs.user_name(source.values[0])}'"
    else:
        name = "the state, or another tensor that is computed before the loop,"
    return MutationError(
        f"a step changes {name} in place, and it requires a gradient or is also read by another name",
        required="in-place updates of the carried state only (y += ...), whose older values nobody reads",
        fix="write y = y + ... or y = y.clamp(...) instead, collect y.clone(), and clone what comes from outside "
        "before the loop",
        where=graphs.user_line(node),
    )


def _carry_single_step(captured: CapturedStep) -> tuple[CapturedStep, set[int]]:
    """In a run of one step nothing comes back: a state is an invariant from which a result follows.

    Tried in this order: through sums alone; through all but products, with a sum on the way; the same without a sum;
    by any path. Of two results that follow from the same state by sums both are states, with the same start.

    Returns:
        The step, and which of its inputs are states of which nothing reads what they become.
    """
    inputs, outputs, step = captured.inputs, captured.outputs, captured.step
    nodes, results = graphs.placeholders(step), graphs.results(step)
    results, unread = results[: len(results) - captured.unread], results[len(results) - captured.unread :]
    first_output, last_output = len(results) - len(outputs), len(results)
    # A new state may also leave the step by a write into a tensor that collects the trajectory.
    results += [_written_value(node) for node in graphs.body(step) if properties(node.target).update == "write"]
    invariants = {
        node: i
        for i, (node, s) in enumerate(zip(nodes, inputs, strict=True))
        if isinstance(s, InvariantSource) and isinstance(graphs.value(node), torch.Tensor)
    }
    pairs: dict[int, int] = {}  # the state of a result
    for way in WAYS:
        for j in reversed(range(first_output, len(results))):
            free = {n: i for n, i in invariants.items() if way.shared or i not in pairs.values()}
            state = None if j in pairs else state_behind(results[j], free, way)
            if state is not None:
                pairs[j] = state
    states = sorted(pairs, key=lambda j: (j >= last_output, j))
    carried = [i for i, s in enumerate(inputs) if isinstance(s, CarrySource)]
    rest = [i for i in range(len(inputs)) if i not in carried and i not in pairs.values()]
    order = [*carried, *(pairs[j] for j in states), *rest]
    others = [j for j in range(first_output, last_output) if j not in pairs]
    kept = [results[j] for j in [*range(first_output), *states, *others]]
    keys = [outputs[j - first_output] if j < last_output else -1 - j for j in states]
    sources = [CarrySource(inputs[pairs[j]].values, key) for j, key in zip(states, keys, strict=True)]
    found = replace(
        captured,
        inputs=[*(inputs[i] for i in carried), *sources, *(inputs[i] for i in rest)],
        outputs=[outputs[j - first_output] for j in others],
        step=_rebuilt(step, order, kept),
        unread=0,
    )
    free = {node: i for node, i in invariants.items() if i not in pairs.values() and _is_context(node)}
    left = {state for way in WAYS for value in unread if (state := state_behind(value, free, way)) is not None}
    return found, {order.index(i) for i in left}


def _is_context(node: fx.Node) -> bool:
    """Whether a value could be a state: a floating tensor that is no parameter."""
    return graphs.is_differentiable(node) and not isinstance(graphs.value(node), torch.nn.Parameter)


def _given_by(before: Container[str], captured: CapturedStep, marker: fx.Node) -> set[int]:
    """Which inputs follow from what earlier runs of the loop gave, and could be states."""
    given = {node for node in marker.graph.nodes if node.op == "call_module" and node.target in before}
    found, left = set(given), [*given]
    while left:
        readers = [user for user in left.pop().users if user < marker and user not in found]
        found.update(readers)
        left += readers
    return {
        i
        for i, source in enumerate(captured.inputs)
        if isinstance(source, InvariantSource) and source.values[0] in found and _is_context(source.values[0])
    }


def _written_value(write: fx.Node) -> Any:
    return write.args[2 if write.target is aten.index_put.default else 1]


def _contexts(captured: CapturedStep) -> set[int]:
    """In a step without a state what its outputs follow from stands for one."""
    inputs, results = captured.inputs, graphs.results(captured.step)
    needed = graphs.ancestors(results) if results else set(graphs.placeholders(captured.step))
    found = [
        (i, node)
        for i, (node, source) in enumerate(zip(graphs.placeholders(captured.step), inputs, strict=True))
        if isinstance(source, InvariantSource) and node in needed and graphs.is_differentiable(node)
    ]
    contexts = {i for i, node in found if not isinstance(graphs.value(node), torch.nn.Parameter)}
    return contexts or {i for i, _ in found}


def _carry_unchanged(captured: CapturedStep, states: list[int]) -> CapturedStep:
    """Make carries of inputs that stay as they are."""
    if not states:
        return captured
    inputs, results, carries = captured.inputs, graphs.results(captured.step), captured.carries()
    order = [*range(carries), *states, *(i for i in range(carries, len(inputs)) if i not in states)]
    step = _rebuilt(captured.step, order, results)
    output = step.graph.output_node()
    with step.graph.inserting_before(output):
        unchanged = graphs.placeholders(step)[carries : carries + len(states)]
        kept = [step.graph.call_function(aten.clone.default, (node,)) for node in unchanged]
    output.args = ((*output.args[0][:carries], *kept, *output.args[0][carries:]),)
    sources = [CarrySource(inputs[i].values, None) if i in states else inputs[i] for i in order]
    return replace(captured, inputs=sources, step=graphs.refresh(step))


def _rebuilt(step: fx.GraphModule, order: list[int], results: list[Any]) -> fx.GraphModule:
    """The step with its placeholders in another order and other results; one named again is another placeholder."""
    nodes = graphs.placeholders(step)
    graph, env = fx.Graph(), dict[fx.Node, fx.Node]()
    for i, name in zip(order, graphs.distinct(nodes[i].name for i in order), strict=True):
        placeholder = graphs.placeholder(graph, name)
        placeholder.meta = dict(nodes[i].meta)
        env.setdefault(nodes[i], placeholder)
    for node in graphs.body(step):
        env[node] = graph.node_copy(node, env.__getitem__)
    graph.output(tuple(fx.map_arg(r, env.__getitem__) for r in results))
    return graphs.refresh(fx.GraphModule(step, graph))


def _check_operands(inputs: list[Source], where: str) -> None:
    for source in inputs:
        if any(isinstance(graphs.value(node), torch.SymFloat) for node in source.values):
            raise UnsupportedLoopError(
                f"the loop reads the Python float '{graphs.user_name(source.values[0])}', which changes",
                required="tensors and ints from outside of the loop",
                fix="pass the number as a 0-d tensor",
                where=where,
            )


def _check_states(captured: CapturedStep, where: str, *, once: bool) -> None:
    carries = captured.carries()
    if carries == 0 and not graphs.body(captured.step):
        raise StateChangeError(
            "nothing is computed in a step: behind a continue, or the steps were read without computing with them, as "
            "list(steps(t)) and reversed() do",
            required="a for loop over steps(t), or over a zip or an enumerate of it, and a new state in each step",
            fix="iterate over steps(t) itself, backward in time over steps(t.flip(0)); instead of a continue multiply "
            "what is added by 0",
            where=where,
        )
    if carries == 0:
        raise StateChangeError(
            "a step carries no state, and reads no floating tensor from outside of the loop that could stand for one",
            required="a state that keeps its shape, dtype and device",
            fix="iterate over steps(t) itself, and bring the state to its final shape and dtype before the loop",
            where=_first_line(captured.step) or where,
        )
    for before, after in zip(graphs.placeholders(captured.step)[:carries], graphs.results(captured.step), strict=False):
        a, b = graphs.value(before), graphs.value(after)
        if not isinstance(a, torch.Tensor):
            raise UnsupportedLoopError(
                f"the carried value '{before.name}' is a Python number",
                required="carried values that are tensors",
                fix="start from a tensor, such as torch.zeros(...)",
                where=where,
            )
        if not same_kind(a, b):
            raise StateChangeError(
                f"the state '{before.name}' goes into the step as {graphs.description(a)} and leaves it as "
                f"{graphs.description(b)}",
                required="a state that keeps its shape, dtype and device",
                fix=_fix_of_change(a, b),
                where=graphs.user_line(after) or where,
            )
        if _is_half(a) and _accumulates(before, after):
            wide = "complex64" if a.is_complex() else "float32"
            again = f"{before.name}.to(torch.{wide})"
            fix = f"give odeint {again}" if once else f"write {before.name} = {again} before the loop"
            low = [source for source in captured.inputs if isinstance(source, InvariantSource) and _is_low(source)]
            raise StateChangeError(
                f"the state '{before.name}' is {word_of(a.dtype)}, in which its sums would round",
                required="a state in float32, float64, complex64 or complex128",
                fix=FIX_LOW_PARAMETERS if low else fix,
                where=graphs.user_line(after) or where,
            )


def _fix_of_change(before: torch.Tensor, after: torch.Tensor) -> str:
    if before.dtype is not after.dtype and (_is_half(before) or _is_half(after)):
        return "leave half() and casts out: the model, its state and t in float32; the policy alone sets low dtypes"
    return "bring the state to its final shape and dtype before the loop"


def _is_low(source: InvariantSource) -> bool:
    parameter = graphs.value(source.value)
    return isinstance(parameter, torch.nn.Parameter) and parameter.requires_grad and _is_half(parameter)


def _is_half(tensor: torch.Tensor) -> bool:
    parts = 2 if tensor.is_complex() else 1
    return graphs.has_derivatives(tensor.dtype) and tensor.dtype.itemsize < 4 * parts


def _accumulates(before: fx.Node, after: fx.Node) -> bool:
    """Whether a carry follows from itself without a matrix product: a multistep method's velocity does not."""
    open_nodes, seen = [after], {after}
    while open_nodes:
        node = open_nodes.pop()
        parents = [] if operator_table.is_product(node) else node.all_input_nodes
        open_nodes += [parent for parent in parents if parent not in seen]
        seen.update(parents)
    return before in seen


def _first_line(step: fx.GraphModule) -> str:
    lines = (graphs.user_line(node) for node in graphs.results(step) if isinstance(node, fx.Node))
    return next(filter(None, lines), "")
