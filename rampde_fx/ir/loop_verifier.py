"""verify(loop): whether a Loop is whole, after each pass.

Counts, names, shapes, dtypes and devices on both sides of every boundary: a step and its carries, an adjoint and what
it reads and returns, stored values and what loads them, submodules and their calls. All that is wrong is said at once.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, assert_never

import torch
from torch import fx

from rampde_fx.errors import RewriteError
from rampde_fx.ir import graphs
from rampde_fx.ir.ends import (
    ActivationSlot,
    Adjoint,
    AdjointInput,
    Cotangent,
    Gradient,
    Operand,
    Saved,
    Slot,
    StateSlot,
    Target,
    Total,
    places,
)
from rampde_fx.ir.loops import CompensatedLoop, CountedLoop, DifferentiatedLoop, KeptLoop, Loop
from rampde_fx.torch_private import shapes

ROLES = {"state", "time", "velocity", "scale", "storage"}


def verify(loop: Loop, after: str) -> None:
    """Check a loop.

    Args:
        loop: The loop, which stays as it is.
        after: The name of the pass that made it.

    Raises:
        RewriteError: naming the pass, with all reasons.
    """
    if reasons := list(faults(loop)):
        raise RewriteError(
            f"the pass {after} leaves a loop that is not whole: {'; '.join(reasons)}",
            required="loops that every pass leaves whole",
            fix="report this as a bug, with the loop; until then train the uncompiled model",
            where=loop.where,
        )


def faults(loop: Loop) -> Iterator[str]:
    """What is wrong with a loop, one sentence each."""
    adjoint = loop.adjoint if isinstance(loop, DifferentiatedLoop) else None
    slots = loop.slots if isinstance(loop, KeptLoop) else ()
    parts = loop.parts() | {"plain step": loop.plain}
    broken = [fault for name, part in parts.items() for fault in _of_graph(name, part)]
    yield from broken
    if broken:  # what follows reads the graphs
        return
    counted = [*_of_counts(loop), *(_of_adjoint_counts(adjoint) if adjoint is not None else ())]
    yield from counted
    if counted:
        return
    corrected = loop.corrections if isinstance(loop, CompensatedLoop) else ()
    yield from _returned("step", loop.step, loop.carries, corrected)
    yield from _of_roles(loop)
    if isinstance(loop, KeptLoop):
        yield from _of_slots(loop)
    if adjoint is not None:
        yield from _returned("adjoint", adjoint.module, adjoint.carries, adjoint.corrections)
        yield from _of_adjoint(loop, adjoint, slots)
        yield from _of_evaluations(loop, adjoint)


def _of_graph(name: str, module: fx.GraphModule) -> Iterator[str]:
    try:
        module.graph.lint()
    except (RuntimeError, ValueError, AttributeError) as error:
        yield f"the {name} is no graph: {str(error).splitlines()[0]}"
        return
    outputs = list(module.graph.find_nodes(op="output"))
    if len(outputs) != 1 or not isinstance(outputs[0].args[0], (tuple, list)):
        yield f"the {name} does not return one tuple"
        return
    names = [node.target for node in graphs.placeholders(module)]
    if repeated := {str(n) for n in names if names.count(n) > 1}:
        yield f"the {name} has several placeholders {', '.join(sorted(repeated))}"
    for node in module.graph.nodes:
        if node.op in ("placeholder", "call_function") and "val" not in node.meta:
            yield f"{node.name} of the {name} has no value"
        if node.op == "call_module":
            yield from _of_call(name, module, node)


def _of_call(name: str, module: fx.GraphModule, node: fx.Node) -> Iterator[str]:
    inner = module.get_submodule(str(node.target))
    if not isinstance(inner, fx.GraphModule):
        return
    taken, given = graphs.placeholders(inner), list(node.args)
    if len(taken) != len(given):
        yield f"{node.name} of the {name} is given {len(given)} values, and takes {len(taken)}"
        return
    for entry, value in zip(taken, given, strict=True):
        if isinstance(value, fx.Node) and (text := _unlike(entry, value)):
            yield f"{node.name} of the {name} takes {entry.name} as {text}"
    results = graphs.results(inner)
    for user in node.users:
        if user.target is operator.getitem and not -len(results) <= user.args[1] < len(results):
            yield f"{user.name} of the {name} reads result {user.args[1]} of {len(results)}"


def _of_counts(loop: Loop) -> Iterator[str]:
    inputs, results = graphs.placeholders(loop.step), graphs.results(loop.step)
    (stored, corrections), wanted = loop.tail(), len(loop.needs_grad)
    if len(inputs) != wanted + corrections:
        yield f"the step has {len(inputs)} placeholders, and needs_grad and the corrections say {wanted + corrections}"
    if not 0 < loop.carries <= loop.first_invariant <= wanted:
        yield f"{loop.carries} carries and {loop.per_step} per-step inputs do not fit {wanted} inputs"
    counted = isinstance(loop, CountedLoop) and loop.counted
    least = loop.carries + stored + corrections + counted
    if len(results) < least:
        yield f"the step returns {len(results)} values, and at least {least} are said"
    if (count := len(graphs.placeholders(loop.plain))) != len(loop.plain_needs_grad):
        yield f"the plain step has {count} placeholders, not {len(loop.plain_needs_grad)}"
    if isinstance(loop, CompensatedLoop):
        yield from _of_corrections("step", loop.carries, loop.corrections)


def _of_corrections(name: str, carries: int, corrections: Sequence[int]) -> Iterator[str]:
    if len(set(corrections)) != len(corrections) or not all(0 <= i < carries for i in corrections):
        yield f"the corrections of the {name} belong to the carries {corrections} of {carries}"


def _of_adjoint_counts(adjoint: Adjoint) -> Iterator[str]:
    inputs, results = graphs.placeholders(adjoint.module), graphs.results(adjoint.module)
    extra = len(adjoint.corrections)
    if len(inputs) != len(adjoint.inputs) + extra:
        yield f"the adjoint has {len(inputs)} placeholders, and {len(adjoint.inputs)} inputs are named"
    if len(results) != len(adjoint.results) + extra:
        yield f"the adjoint returns {len(results)} values, and {len(adjoint.results)} results are named"
    if adjoint.carries > min(len(adjoint.inputs), len(adjoint.results)):
        yield f"{adjoint.carries} carries do not fit the adjoint"
    yield from _of_corrections("adjoint", adjoint.carries, adjoint.corrections)
    for what, found in (("inputs", adjoint.inputs), ("results", adjoint.results)):
        if len(set(found)) != len(found):
            yield f"the {what} of the adjoint repeat"


def _returned(name: str, module: fx.GraphModule, carries: int, corrections: Sequence[int]) -> Iterator[str]:
    """A carry, and a correction, leaves as it came in."""
    inputs, results = graphs.placeholders(module), graphs.results(module)
    pairs = list(zip(inputs[:carries], results, strict=False))
    if corrections:
        pairs += zip(inputs[-len(corrections) :], results[-len(corrections) :], strict=True)
        own = [(inputs[i], inputs[len(inputs) - len(corrections) + k]) for k, i in enumerate(corrections)]
        pairs += own
    for entry, result in pairs:
        if not isinstance(result, fx.Node) or (text := _unlike(entry, result)):
            yield f"the carry {entry.name} of the {name} {f'is {text}' if isinstance(result, fx.Node) else 'is lost'}"


def _of_roles(loop: Loop) -> Iterator[str]:
    told = [node for node in loop.step.graph.nodes if "role" in node.meta]
    if wrong := [node.name for node in told if node.meta["role"] not in ROLES]:
        yield f"{', '.join(wrong)} have a role that does not exist"


def _of_slots(loop: KeptLoop) -> Iterator[str]:
    """A slot is of a carry or of an evaluation, and gives what it is of."""
    carries = [slot.carry for slot in loop.slots if isinstance(slot, StateSlot)]
    if wrong := [carry for carry in carries if not 0 <= carry < loop.carries]:
        yield f"the slots belong to the carries {wrong} of {loop.carries}"
        return
    if len(set(carries)) != len(carries):
        yield f"the carries {carries} have several slots"
    stored, calls = loop.results().stored, {node.name for node in loop.step.graph.find_nodes(op="call_module")}
    if lost := [i for i, value in enumerate(stored) if not isinstance(value, fx.Node)]:
        yield f"the stored values {lost} are lost"
        return
    values = dict(zip(places(loop.slots), stored, strict=True))
    for i, slot in enumerate(loop.slots):
        if isinstance(slot, ActivationSlot):
            if slot.evaluation not in calls:
                yield f"slot {i} is of the evaluation {slot.evaluation}, which does not exist"
            continue
        for part, entry in enumerate(graphs.placeholders(slot.load)):
            if text := _unlike(entry, values[Saved(i, part)]):
                yield f"the load of slot {i} takes {entry.name} as {text}"
        state, given = loop.inputs().carries[slot.carry], graphs.results(slot.load)
        if len(given) != 1:
            yield f"the load of slot {i} gives {len(given)} values"
        elif text := _unlike(state, given[0]):
            yield f"the load of slot {i} gives {state.name} as {text}"


def _of_adjoint(loop: Loop, adjoint: Adjoint, slots: Sequence[Slot]) -> Iterator[str]:
    inputs, results = graphs.placeholders(loop.step)[: len(loop.needs_grad)], graphs.results(loop.step)
    saved = dict(zip(places(slots), loop.results().stored, strict=True))
    for entry, node in adjoint.nodes().items():
        if not isinstance(entry, AdjointInput) or not (same := _of_the_step(entry, inputs, results, saved)):
            yield f"the adjoint reads {entry}, which does not exist"
        elif isinstance(same[0], fx.Node) and (text := _unlike(node, same[0])):
            yield f"the adjoint reads {entry} as {text}"
    for found, result in zip(adjoint.results, graphs.results(adjoint.module), strict=False):
        if not isinstance(found, Gradient):
            continue
        if not 0 <= found.operand < len(inputs):
            yield f"the adjoint returns {found} of {len(inputs)} inputs"
        elif isinstance(result, fx.Node) and not _of_one_shape(result, inputs[found.operand]):
            yield f"the gradient of {inputs[found.operand].name} has another shape than it"
    for taken, given in zip(adjoint.inputs[: adjoint.carries], adjoint.results, strict=False):
        match taken, given:
            case ((Cotangent(i) | Total(i)), Gradient(j)) if i == j:
                pass
            case _:
                yield f"the adjoint carries {taken} as {given}"


def _of_the_step(
    entry: AdjointInput, inputs: Sequence[Any], results: Sequence[Any], saved: Mapping[Saved, Any]
) -> list[Any]:
    """What an adjoint's input is of the step: one value, None where it is nothing of it; empty if it does not exist."""
    match entry:
        case Cotangent(j):
            return [results[j]] if 0 <= j < len(results) else []
        case Total(i) | Operand(i):
            return [inputs[i]] if 0 <= i < len(inputs) else []
        case Saved():
            return [saved[entry]] if entry in saved else []
        case Target():
            return [None]
        case _:
            assert_never(entry)


def _of_evaluations(loop: Loop, adjoint: Adjoint) -> Iterator[str]:
    """The calls of an evaluation are there, and a pullback has its cotangents."""
    in_step = {node.name for node in loop.step.graph.find_nodes(op="call_module")}
    calls = {node.name: node for node in adjoint.module.graph.find_nodes(op="call_module")}
    for evaluation in adjoint.evaluations:
        named = [name for name in (evaluation.forward, evaluation.pullback) if name is not None]
        if lost := [name for name in named if name not in calls]:
            yield f"the adjoint calls no {', '.join(lost)}"
        elif evaluation.step_call not in in_step:
            yield f"the step calls no {evaluation.step_call}"
        elif evaluation.pullback is not None and not 0 < evaluation.cotangents <= len(calls[evaluation.pullback].args):
            yield f"{evaluation.pullback} of the adjoint has no {evaluation.cotangents} cotangents"


def _unlike(wanted: fx.Node, found: fx.Node) -> str:
    """How a value differs from another one in dtype, shape or device; empty where it does not."""
    a, b = graphs.value(wanted), graphs.value(found)
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        return ""
    same = a.dtype == b.dtype and a.device == b.device and shapes.are_equal(a.shape, b.shape)
    return "" if same else f"{graphs.description(a)}, and is {graphs.description(b)}"


def _of_one_shape(node: fx.Node, other: fx.Node) -> bool:
    a, b = graphs.value(node), graphs.value(other)
    return isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and shapes.are_equal(a.shape, b.shape)
