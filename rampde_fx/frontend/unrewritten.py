"""Say where a marked loop or target that was to be compiled is not rewritten, and runs in full precision.

Four places know of it:

- A loop that runs as plain Python inside of a call of torch.compile: after a graph break, in code that Dynamo skips,
  beyond its limit of recompilations.
- A loop that Dynamo captures for a backend that does not rewrite it, or that torch.export captures.
- A marked target that ends, captured or not, without any marked loop in it.
- A rewritten loop in which no operation is left for low precision.

What runs uncompiled on purpose is left alone: plain eager code, torch.compiler.disable, a stance of torch.compiler.
"""

from __future__ import annotations

import inspect
import warnings
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import fx

from rampde_fx.errors import CounterError, FullPrecisionWarning, UnsupportedLoopError, raising
from rampde_fx.runtime import phase_log
from rampde_fx.torch_private import dynamo, refusals, sharded, side_effects

BACKEND = "rampde_fx"  # key of a graph's meta: whether the rewrite, or the whole backend, has taken it
FULLGRAPH = (
    'call torch._dynamo.reset(), for torch skips code that it gave up on, and torch.compile(..., backend="rampde_fx", '
    "fullgraph=True) raises an error that says why"
)

ANOTHER_BACKEND = (
    "a loop over rampde_fx.steps(t), or an odeint, with a precision policy is compiled by a backend that does not "
    "rewrite it: it runs without mixed precision",
    'compile by torch.compile(..., backend="rampde_fx")',
)
EXPORTED = (
    "a loop over rampde_fx.steps(t), or an odeint, with a precision policy is exported by torch.export, which does not "
    "rewrite it: the program runs without mixed precision",
    "call rampde_fx.export(model, ...)",
)

Place = tuple[str, str, int]  # name, file and line of what is marked


class Target:
    """A call of a mixed_precision target that is under way.

    Attributes:
        policy: Its policy, encoded.
        place: The name and the line of what is marked.
        outer: The target around it, None for the outermost.
    """

    def __init__(self, policy: str, place: Place, outer: Target | None) -> None:
        self.policy, self.place, self.outer = policy, place, outer


def place_of(function: Any) -> Place:
    """Where the function that is marked stands."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    name = getattr(function, "__qualname__", type(function).__name__)
    return (name, code.co_filename, code.co_firstlineno) if code is not None else (name, "unknown", 0)


_met: set[Place] = set()  # targets in which a marked loop was met
# What was said, by the call of torch.compile: the warnings module forgets it wherever torch changes filters.
_said: WeakKeyDictionary[Any, set[str]] = WeakKeyDictionary()


@dynamo.never_alone
def loop_runs(target: Target | None, *, has_policy: bool) -> None:
    """A marked loop runs uncompiled."""
    _meet(target)
    if has_policy and torch.compiler.is_exporting():
        _say_at(loop_runs, *dynamo.running_line(), *EXPORTED)
    callback = dynamo.compilation_asked()
    if callback is not None and _is_ours(callback):
        _say_uncompiled(callback)
    elif callback is not None and has_policy:
        _say_another_backend(callback)


def loop_is_captured(target: Target | None) -> None:
    """A marked loop with a policy is captured by Dynamo."""
    _meet(target)
    refusals.refuse_grad_in_loops()
    notes = dynamo.notes_of_capture(_after_backend)
    _met.update(notes.get("entered", ()))
    notes.setdefault("loops", []).append(dynamo.captured_line())
    notes["open"] = [side_effects.numbers_kept()]
    notes["begun"] = [phase_log.now()]


def loop_ends(*, once: bool) -> None:
    """The end of a marked loop is captured: of all of its steps, or of the one that stands for all.

    A number that one step changes counts captures, and no steps. One that all steps change is counted, but where Dynamo
    finds another number in a module at the next call, it compiles anew.
    """
    notes = dynamo.notes_of_capture(_after_backend)
    if begun := notes.pop("begun", []):
        phase_log.tell_done("{}:{}".format(*notes["loops"][-1]), "captured", begun[0])
    if not (opened := notes.pop("open", [])):  # a loop without a policy, which runs as it is
        return
    before: dict[Any, Any] = opened[0]
    for (owner, name), number in side_effects.numbers_kept().items():
        if (owner, name) in before:
            counts = once and before[owner, name] != number
        else:
            counts = side_effects.was_read(owner, name) and (once or side_effects.is_specialized(owner))
        if counts:
            notes.setdefault("counters", []).append(side_effects.name_of(owner, name))


def shards_are_refused() -> bool:
    """Whether hooks of FSDP2 are inside of the loop that begins, which is then refused behind the backend."""
    if not (name := sharded.hooked_inside()):
        return False
    file, line = dynamo.captured_line()
    error = UnsupportedLoopError(
        f"fully_shard is round '{name}', whose hooks gather its parameters in each call: in every step of the loop",
        required="parameters that are gathered once, before the loop",
        fix=f"call fully_shard on the module that is compiled alone, and not on '{name}' inside it",
        where=f"{file}:{line}",
    )
    dynamo.notes_of_capture(_after_backend).setdefault("refused", []).append(error)
    return True


def target_is_entered(place: Place) -> None:
    """Dynamo captures the beginning of a marked target; one in a step, a velocity, say, is rewritten with the loop."""
    notes = dynamo.notes_of_capture(_after_backend)
    if notes.get("open"):
        _met.add(place)
    notes.setdefault("entered", []).append(place)


def body_begins(policy: str) -> bool:
    """Whether a marked target is captured in the body of a higher-order operation; the notes then hold its policy."""
    if not dynamo.captures_body():
        return False
    dynamo.notes_of_capture(_after_backend).setdefault("policies", []).append(policy)
    return True


def body_ends() -> None:
    """The marked target in the body has ended."""
    dynamo.notes_of_capture(_after_backend)["policies"].pop()


def policy_of_body() -> str:
    """The policy of the innermost marked target in the body that is captured, or an empty string."""
    policies = dynamo.notes_of_capture(_after_backend).get("policies") if dynamo.captures_body() else None
    return policies[-1] if policies else ""


def target_is_left(place: Place) -> None:
    """Dynamo captures the end of a marked target."""
    notes = dynamo.notes_of_capture(_after_backend)
    entered = notes.get("entered", [])
    if place in entered:  # else it began in another graph
        while entered.pop() != place:
            pass
        notes.setdefault("left", []).append(place)


@dynamo.never_alone
def target_ends(place: Place) -> None:
    """A marked target has run uncompiled; its parts may have been compiled."""
    callback = dynamo.compilation_asked()
    if place not in _met and callback is not None and _is_ours(callback):
        _say_empty(callback, place)


@dynamo.never_alone
def _is_ours(callback: Any) -> bool:
    return dynamo.is_of(dynamo.innermost(callback), "rampde_fx")


@dynamo.never_alone
def _meet(target: Target | None) -> None:
    while target is not None:
        _met.add(target.place)
        target = target.outer


def _after_backend(graph_module: fx.GraphModule, backend: Any, notes: dict[str, list[Any]]) -> Any:
    """Say what is wrong with a graph that is compiled; what is to run instead of it, if anything."""
    taken = graph_module.meta.get(BACKEND)
    if refused := notes.get("refused"):
        return raising(refused[0])
    if taken and notes.get("counters"):
        return raising(_counts(notes["counters"][0], notes["loops"][-1]))
    if not taken and _stands_for_steps(graph_module):
        dynamo.capture_plainly()
    for file, line in () if taken else notes.get("loops", ()):
        _say_at(backend, file, line, *(EXPORTED if torch.compiler.is_exporting() else ANOTHER_BACKEND))
    for target in notes.get("left", ()) if taken == "backend" else ():
        if target not in _met:
            _say_empty(backend, target)
    return None


def _stands_for_steps(graph_module: fx.GraphModule) -> bool:
    """Whether one step in a graph, or in a body inside it, stands for all of an odeint's."""
    modules = [module for module in graph_module.modules() if isinstance(module, fx.GraphModule)]
    target = torch.ops.rampde_fx.enter
    return any(module.graph.find_nodes(op="call_function", target=target) for module in modules)


def _counts(name: str, line: tuple[str, int]) -> CounterError:
    return CounterError(
        f"a marked loop changes the number {name!r} in Python, as a counter of evaluations does",
        required="a loop that keeps its numbers in tensors: one compiled step stands for all",
        fix=f"leave {name!r} out, and call rampde_fx.evaluation_counts() after the model has run",
        where=f"{line[0]}:{line[1]}",
    )


@dynamo.never_compiled
def _say_uncompiled(asked: Any) -> None:
    _say_at(
        asked,
        *dynamo.running_line(),
        "a loop over rampde_fx.steps(t), or an odeint, in a compiled model runs uncompiled, without mixed precision: "
        "there is a graph break in it or around it (torch.autograd.grad in a velocity makes one, torch.func.vjp none), "
        "torch skips its code after one, or has compiled it torch._dynamo.config.recompile_limit times already",
        FULLGRAPH,
    )


@dynamo.never_compiled
def _say_another_backend(asked: Any) -> None:
    _say_at(asked, *dynamo.running_line(), *ANOTHER_BACKEND)


def loop_stays_wide(where: str, dtype: torch.dtype) -> None:
    """A loop is rewritten, and nothing of it is in low precision."""
    file, _, line = where.partition(", in ")[0].rpartition(":")
    _say_at(
        loop_stays_wide,
        file or "an unknown file",
        int(line or 0),
        f"nothing in a marked loop is evaluated in {dtype}: its steps are sums and scalings of states, operations that "
        "stay in fp32, or do not depend on a state",
        "rampde_fx.explain(model, ...) says what stays wide, and why; leave the mark out if that is meant",
    )


@dynamo.never_compiled
def _say_empty(asked: Any, place: Place) -> None:
    name, file, line = place
    _say_at(
        asked,
        file,
        line,
        f"{name} is marked by mixed_precision, and there is no marked loop in it: nothing was rewritten, and it runs "
        "without mixed precision",
        "write its loop over time as `for t_i, dt in rampde_fx.steps(t)` or as rampde_fx.odeint; mark and compile what "
        "calls odeint, where this is its velocity; or leave the mark out",
    )


def _say_at(asked: Any, file: str, line: int, found: str, fix: str) -> None:
    message = f"{found}.\n  at: {file}:{line}\n  fix: {fix}."
    said = _said.setdefault(asked, set())
    if message not in said:
        said.add(message)
        warnings.warn_explicit(message, FullPrecisionWarning, file, line, module="rampde_fx")
