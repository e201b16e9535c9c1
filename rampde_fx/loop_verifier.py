"""verify(loop): whether a Loop is whole, after each pass.

Counts, names, shapes, dtypes and devices on both sides of every boundary: a step and its carries, an adjoint and what
it reads and returns, stored values and what loads them, submodules and their calls. All that is wrong is said at once.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx

from rampde_fx import graphs
from rampde_fx.errors import RewriteError
from rampde_fx.loop import VANISHED, WATCHED, Loop

ROLES = {"state", "time", "velocity"}
KINDS = {"cotangent", "total", "operand", "stored", "target"}


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
    parts = {"step": loop.step, "plain step": loop.plain, "adjoint": loop.adjoint}
    parts |= {"preamble": loop.preamble, "load": loop.load}
    broken = [fault for name, part in parts.items() if part is not None for fault in _of_graph(name, part)]
    yield from broken
    if broken:  # what follows reads the graphs
        return
    counted = list(_of_counts(loop))
    yield from counted
    if not counted:
        yield from _of_carries(loop)
        yield from _of_roles(loop)
        yield from _of_stored(loop)
        yield from _of_adjoint(loop)


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
    wanted = len(loop.needs_grad) + len(loop.corrections)
    if len(inputs) != wanted:
        yield f"the step has {len(inputs)} placeholders, and needs_grad and the corrections say {wanted}"
    if not 0 < loop.carries <= loop.first_invariant() <= len(loop.needs_grad):
        yield f"{loop.carries} carries and {loop.per_step} per-step inputs do not fit {len(loop.needs_grad)} inputs"
    least = loop.carries + len(loop.stored) + len(loop.corrections) + loop.counted
    if len(results) < least:
        yield f"the step returns {len(results)} values, and at least {least} are said"
    if (count := len(graphs.placeholders(loop.plain))) != len(loop.plain_needs_grad):
        yield f"the plain step has {count} placeholders, not {len(loop.plain_needs_grad)}"
    for name, carries, corrections in (
        ("step", loop.carries, loop.corrections),
        ("adjoint", loop.adjoint_carries, loop.adjoint_corrections),
    ):
        if len(set(corrections)) != len(corrections) or not all(0 <= i < carries for i in corrections):
            yield f"the corrections of the {name} belong to the carries {corrections} of {carries}"
    if (loop.adjoint is None) != (not loop.adjoint_inputs and not loop.adjoint_results):
        yield "an adjoint and its inputs and results are there together or not at all"
    if loop.adjoint is None:
        return
    inputs, results = graphs.placeholders(loop.adjoint), graphs.results(loop.adjoint)
    extra = len(loop.adjoint_corrections)
    if len(inputs) != len(loop.adjoint_inputs) + extra:
        yield f"the adjoint has {len(inputs)} placeholders, and {len(loop.adjoint_inputs)} inputs are named"
    if len(results) != len(loop.adjoint_results) + extra:
        yield f"the adjoint returns {len(results)} values, and {len(loop.adjoint_results)} results are named"
    if loop.adjoint_carries > min(len(loop.adjoint_inputs), len(loop.adjoint_results)):
        yield f"{loop.adjoint_carries} carries do not fit the adjoint"
    for what, found in (("inputs", loop.adjoint_inputs), ("results", loop.adjoint_results)):
        if len(set(found)) != len(found):
            yield f"the {what} of the adjoint repeat"


def _of_carries(loop: Loop) -> Iterator[str]:
    yield from _returned("step", loop.step, loop.carries, loop.corrections)
    if loop.adjoint is not None:
        yield from _returned("adjoint", loop.adjoint, loop.adjoint_carries, loop.adjoint_corrections)


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
        yield f"the roles of {', '.join(wrong)} are none"


def _of_stored(loop: Loop) -> Iterator[str]:
    if wrong := [carry for carry in loop.stored if carry is not None and not 0 <= carry < loop.carries]:
        yield f"the stored values belong to the carries {wrong} of {loop.carries}"
        return
    if lost := [i for i, value in enumerate(loop.step_outputs()[1]) if not isinstance(value, fx.Node)]:
        yield f"the stored values {lost} are lost"
        return
    if loop.load is None:
        return
    known = [carry for carry in loop.stored if carry is not None]
    taken, given = graphs.placeholders(loop.load), graphs.results(loop.load)
    states = list(dict.fromkeys(known))
    if len(taken) != len(known) or len(given) != len(states):
        yield f"the load takes {len(taken)} of {len(known)} values and gives {len(given)} of {len(states)} states"
        return
    values = [value for value, carry in zip(loop.step_outputs()[1], loop.stored, strict=True) if carry is not None]
    inputs = graphs.placeholders(loop.step)
    for entry, value in zip(taken, values, strict=True):
        if text := _unlike(entry, value):
            yield f"the load takes {entry.name} as {text}"
    for state, carry in zip(given, states, strict=True):
        if isinstance(state, fx.Node) and (text := _unlike(inputs[carry], state)):
            yield f"the load gives {inputs[carry].name} as {text}"


def _of_adjoint(loop: Loop) -> Iterator[str]:
    if loop.adjoint is None:
        return
    inputs, results = graphs.placeholders(loop.step), graphs.results(loop.step)
    stored = loop.step_outputs()[1]
    sides: dict[str, Sequence[Any]] = {"cotangent": results, "total": inputs, "operand": inputs, "stored": stored}
    for entry, (kind, index) in zip(graphs.placeholders(loop.adjoint), loop.adjoint_inputs, strict=False):
        if kind not in KINDS or (kind in sides and not 0 <= index < len(sides[kind])):
            yield f"the adjoint reads {kind} {index}, which is none"
        elif kind in sides and isinstance(sides[kind][index], fx.Node) and (text := _unlike(entry, sides[kind][index])):
            yield f"the adjoint reads {kind} {index} as {text}"
    last = len(loop.needs_grad)
    for result, i in zip(graphs.results(loop.adjoint), loop.adjoint_results, strict=False):
        if i in (WATCHED, VANISHED):
            continue
        if not 0 <= i < last:
            yield f"the adjoint returns the gradient of input {i} of {last}"
        elif isinstance(result, fx.Node) and _shape(result) != _shape(inputs[i]):
            yield f"the gradient of {inputs[i].name} has another shape than it"
    carried = zip(loop.adjoint_inputs[: loop.adjoint_carries], loop.adjoint_results, strict=False)
    for (kind, index), i in carried:
        if kind not in ("cotangent", "total") or index != i:
            yield f"the adjoint carries {kind} {index} as the gradient of input {i}"


def _unlike(wanted: fx.Node, found: fx.Node) -> str:
    """How a value differs from another one in dtype, shape or device; empty where it does not."""
    a, b = graphs.value(wanted), graphs.value(found)
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        return ""
    told = [graphs.description(tensor) for tensor in (a, b)]  # compared as text: a comparison of sizes would guard them
    return "" if told[0] == told[1] else f"{told[0]}, and is {told[1]}"


def _shape(node: fx.Node) -> Any:
    value = graphs.value(node)
    return tuple(map(str, value.shape)) if isinstance(value, torch.Tensor) else None
