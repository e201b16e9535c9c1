"""Capture a marked Python loop once: its first iterations, until all later ones are known to repeat the last of them.

steps asks here before each iteration that Dynamo traces. Pictures of the interpreter's state at the heads of iterations
k - 1 and k are compared. If they differ by nothing but nodes that moved on by one iteration, Dynamo traces iteration k
as it traced iteration k - 1, with these nodes moved on; so the next heads differ by nothing else either, and by
induction all later iterations repeat. docs/how_it_works.md has the proof. Then `repeat` stands for them in the graph,
and gives what the nodes that move are at last. Until then, and wherever anything is not understood, the loop is
captured iteration by iteration.
"""

from __future__ import annotations

import contextlib
import functools
import operator
import sys
from typing import Any, Literal

import torch
from torch import fx

from rampde_fx.errors import MissingTorchNameError
from rampde_fx.torch_private import step_numbers, traced_iterators
from rampde_fx.torch_private.collected_lists import Later, collect_on
from rampde_fx.torch_private.dynamo import capture_log, captured_line, current_capture, notes_so_far
from rampde_fx.torch_private.interpreter_state import Picture
from rampde_fx.torch_private.names import Names
from rampde_fx.torch_private.shapes import TensorifyScalarRestartAnalysis, size_hint
from rampde_fx.torch_private.state_parts import Irregular, Item, Number
from rampde_fx.torch_private.step_numbers import NumberedLoop

_torch = Names(
    {
        "torch._dynamo.symbolic_convert": "InliningGeneratorInstructionTranslator InstructionTranslatorBase",
        "torch._dynamo.utils": "set_example_value",
        "torch._dynamo.variables": "ConstantVariable",
        "torch._dynamo.variables.builder": "wrap_fx_proxy",
        "torch._dynamo.variables.builtin": "BuiltinVariable",
        "torch._dynamo.variables.functions": "LocalGeneratorObjectVariable",
    },
    everywhere=False,
)

Ahead = Literal["step", "end", "repeat"]
LEAST = 3  # iterations that are captured of a loop that repeats; a shorter one is captured as a whole
HEADS = 12  # that are compared before the loop is captured as a whole
IN_FULL = "rampde_fx_in_full"  # attribute of what Dynamo keeps from one attempt at a function to the next
COMPARED = "rampde_fx_compared"  # likewise, once iterations of a loop are compared
HEADS_OF = "rampde_fx_heads"  # attributes of the frame of steps
COUNTED = "rampde_fx_counted"
NOTES = "captured"  # key of the notes of a capture


def takes_repeats(backend: Any) -> Any:
    """The backend, which is given graphs in which repeat stands for the iterations to come."""
    setattr(backend, traced_iterators.TAKES_REPEATS, True)
    with contextlib.suppress(MissingTorchNameError, AttributeError):  # of another torch: they are traced as ever
        traced_iterators.teach_dynamo()
    return backend


def compares_iterations() -> bool:
    """Whether the loop that begins in the frame of steps is to be captured once; else as a whole."""
    capture = current_capture()
    try:
        if not traced_iterators.takes_repeats():
            return False
        if size_hint(_steps_of(_frames()[0])) <= LEAST:
            return False
        if reason := getattr(capture.root_tx.speculation_log, IN_FULL, ""):
            _note(reason)
            return False
        _watch_all_locals()
        setattr(capture.root_tx.speculation_log, COMPARED, True)
        return True
    except Exception as error:
        _note(f"{type(error).__name__}: {error}")
        return False


@functools.cache
def _watch_all_locals() -> None:
    """Have Dynamo capture loops in full where the code asks for all of its locals, by whatever name.

    A picture leaves out the locals that the code does not name again, and those that it counts alone.
    """
    builtin: Any = _torch.BuiltinVariable
    snapshot = getattr(builtin, "_call_frame_locals_snapshot", None)
    if snapshot is None:  # this torch captures no locals()
        return

    @functools.wraps(snapshot)
    def noticed(frame: Any) -> Any:
        if hasattr(current_capture().root_tx.speculation_log, COMPARED):
            capture_in_full("the code asks for all of its locals")
        return snapshot(frame)

    builtin._call_frame_locals_snapshot = staticmethod(noticed)


def ahead(i: int) -> Ahead:
    """What follows in a loop whose iterations are compared: step i, the end, or what repeats up to the end."""
    frames = _frames()
    counted: NumberedLoop | None = vars(frames[0]).get(COUNTED)
    if counted is not None:
        counted.iteration = i
    if not i < _steps_of(frames[0]):
        if counted is not None:
            step_numbers.capture_with_numbers(counted, "")
        return "end"
    heads: list[Picture] | None = vars(frames[0]).setdefault(HEADS_OF, [])
    if heads is None:
        return "step"
    reason = ""
    try:
        if _repeats(frames, heads, i):
            setattr(frames[0], HEADS_OF, None)
            return "repeat"
        if len(heads) < HEADS:
            return "step"
        reason = ", ".join(filter(None, (_difference(heads[-2], heads[-1]), step_numbers.reason_of(captured_line()))))
    except Irregular as irregular:
        reason = str(irregular)
    except TensorifyScalarRestartAnalysis:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
    if counted is not None:
        step_numbers.capture_with_numbers(counted, "")
    setattr(frames[0], HEADS_OF, None)
    _note(reason)
    return "step"


def why_in_full(where: str) -> str:
    """Of a loop of the capture under way, given by its line, why it was captured as a whole; empty if unknown."""
    noted = notes_so_far().get(NOTES, [])
    # What is typed at a prompt has no file, and is noted without a line.
    lines = ((f"{file}:{line}," if file else "<", reason) for file, line, reason in noted)
    return next((reason for line, reason in lines if where.startswith(line)), "")


def _note(reason: str) -> None:
    notes_so_far().setdefault(NOTES, []).append((*captured_line(), reason))


def capture_in_full(reason: str) -> None:
    """Have Dynamo capture the model again, its loops iteration by iteration.

    Raises:
        TensorifyScalarRestartAnalysis: which Dynamo catches.
    """
    log = current_capture().root_tx.speculation_log
    if hasattr(log, IN_FULL):
        return
    log.clear()  # the next attempt takes another way
    setattr(log, IN_FULL, reason)
    raise TensorifyScalarRestartAnalysis


def _frames() -> list[Any]:
    """The frames that Dynamo interprets: that of steps, which asks, and those around it."""
    found: list[Any] = []
    frame: Any = sys._getframe()
    while frame is not None:
        own = frame.f_locals.get("self") if frame.f_code.co_name == "run" else None
        if isinstance(own, _torch.InstructionTranslatorBase):
            found.append(own)
        frame = frame.f_back
    return found


def _steps_of(frame: Any) -> Any:
    """N, from the frame of steps."""
    return _grid(frame).node.meta["example_value"].shape[0] - 1


def _grid(frame: Any) -> fx.Proxy:
    proxy: fx.Proxy = frame.symbolic_locals["t"].as_proxy()
    return proxy


def _repeats(frames: list[Any], heads: list[Picture], i: int) -> bool:
    """Whether iteration i and all after it repeat the one before; then the graph says so."""
    steps, around = frames[0], frames[1:]
    loops = _loops(steps, around)
    heads.append(Picture(steps, around, loops))
    if _are_counted(heads) and _count(steps, heads[-1], heads[-2], i):
        heads[-1] = Picture(steps, around, loops)
    if i < LEAST:
        return False
    nodes = _places(steps)
    known, longest = 0, 1  # a single pair is not enough: between two heads a counter may jump once
    for k in range(i, 0, -1):  # the pairs of equal heads at the end
        lag = _lag(heads[k - 1], heads[k], k, nodes)
        if lag is None or (k == i and _number_that_differs(heads[k - 1], heads[k])):
            break
        known, longest = known + 1, max(longest, lag)
    if known < 1 + longest:
        return False
    _require_no_numbers(nodes)
    _finish(frames, heads, i, nodes)
    return True


def _loops(steps: Any, around: list[Any]) -> int:
    """How many frames stand in a for loop over what the one before yields; the last of them is no generator.

    A generator that is read otherwise, by list() for one, fills something that no frame shows.
    """
    yields, count = steps, 0
    for frame in around:
        instruction, top = frame.current_instruction, frame.stack[-1].unwrap() if frame.stack else None
        is_read = isinstance(top, _torch.LocalGeneratorObjectVariable) and top.inline_tracer is yields
        if instruction.opname != "FOR_ITER" or not is_read:
            raise Irregular("steps(t), or what yields its steps, is not what a for loop runs over")
        yields, count = frame, count + 1
        if not isinstance(frame, _torch.InliningGeneratorInstructionTranslator):
            return count
    raise Irregular("no loop")


def _are_counted(heads: list[Picture]) -> bool:
    """Whether the last heads differ by numbers that each iteration moved on by the same amount."""
    if len(heads) < 3 or not heads[-3].word == heads[-2].word == heads[-1].word:
        return False
    rows = list(zip(*(head.numbers for head in heads[-3:]), strict=True))
    return any(a.value != b.value for a, b, _ in rows) and all(
        b.value - a.value == c.value - b.value and a.slope == b.slope == c.slope == 0 for a, b, c in rows
    )


def _count(steps: Any, head: Picture, before: Picture, i: int) -> bool:
    """Have the numbers that moved on stand for what they are in each iteration to come, if that is to be tried."""
    loop = NumberedLoop(captured_line(), _grid(steps), i)
    if hasattr(capture_log(), step_numbers.READ) and loop.place in getattr(capture_log(), step_numbers.READ):
        return False
    if not size_hint(_steps_of(steps)) > i + 1 or vars(steps).get(COUNTED) is not None:
        return False
    setattr(steps, COUNTED, loop)
    step_numbers.begin(loop)
    for old, new in zip(before.numbers, head.numbers, strict=True):
        if new.holder is not None and new.value != old.value:
            new.holder[new.name] = step_numbers.step_number(new.value, new.value - old.value, loop)
    return True


def _places(steps: Any) -> dict[fx.Node, tuple[int, int]]:
    """Of every node of the loop so far its iteration, and its place there."""
    places: dict[fx.Node, tuple[int, int]] = {}
    iteration, place = -1, 0
    for node in steps.output.current_tracer.graph.nodes:
        if node.target is torch.ops.rampde_fx.step:
            iteration, place = (0 if node.args[1] == 0 else iteration + 1), 0
            places = places if iteration else {}
        if iteration >= 0 and node.op != "placeholder":
            places[node] = (iteration, place)
            place += 1
    return places


def _lag(old: Picture, new: Picture, k: int, places: dict[fx.Node, tuple[int, int]]) -> int | None:
    """How many iterations back the head of iteration k reaches, if it is that of k - 1, moved on by one iteration."""
    if old.word != new.word or len(old.nodes) != len(new.nodes):
        return None
    if any(b.value - a.value != b.slope for a, b in zip(old.numbers, new.numbers, strict=True)):
        return None
    moved = _moved(old, new)
    if moved is None:
        return None
    for before, after in moved.items():
        if before is not after and (
            before not in places or after not in places or places[after] != (places[before][0] + 1, places[before][1])
        ):
            return None
    return max((k - places[node][0] for before, node in moved.items() if before is not node), default=1)


def _moved(old: Picture, new: Picture) -> dict[fx.Node, fx.Node] | None:
    """Which node stands in the new picture in the place of each node of the old one; None if that is no bijection."""
    pairs = list(zip(old.nodes, new.nodes, strict=True))
    for (_, before), (_, after) in zip(old.lists, new.lists, strict=True):
        grown = len(after) - len(before)
        if grown < 0 or grown > len(before) or not all(map(Item.stays, before, after)):
            return None
        for last, more in zip(before[len(before) - grown :], after[len(before) :], strict=True) if grown else ():
            if not last.moves_on(more):
                return None
            pairs += zip(last.nodes, more.nodes, strict=True)
    moved = dict(pairs)
    one_to_one = len(set(moved.values())) == len(moved) and all(moved[a] is b for a, b in pairs)
    return moved if one_to_one else None


def _number_that_differs(old: Picture, new: Picture) -> tuple[Number, Number] | None:
    """The first number of two states that is not moved on as it is known to be."""
    pairs = zip(old.numbers, new.numbers, strict=False)
    return next(((a, b) for a, b in pairs if a.slope != b.slope or b.value - a.value != b.slope), None)


def _difference(old: Picture, new: Picture) -> str:
    """The first difference of two states, for the report."""
    number = _number_that_differs(old, new)
    for k, (label, before, after) in enumerate(zip(new.labels, old.word, new.word, strict=False)):
        if number is not None and number[1].place == k + 1:
            return f"{number[1].label} differs from iteration to iteration: {number[0].value}, then {number[1].value}"
        if before != after:
            known = all(len(entry) == 2 and isinstance(entry[0], type) for entry in (before, after))
            told = f": {before[1]!r}, then {after[1]!r}" if known else ""
            return f"{label} differs from iteration to iteration{told}"
    return "what is read of earlier iterations differs from iteration to iteration"


def _require_no_numbers(places: dict[fx.Node, tuple[int, int]]) -> None:
    """Refuse what reads a number from a tensor, or asserts something: each iteration has to do it itself."""
    for node in places:
        value, name = node.meta.get("example_value"), str(getattr(node.target, "__name__", node.target))
        is_number = isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool) and not value.node.has_hint()
        if is_number or "assert" in name or "version" in name:
            raise Irregular(f"a step reads a number from a tensor, or asserts something: '{node.name}'")


def _finish(frames: list[Any], heads: list[Picture], i: int, places: dict[fx.Node, tuple[int, int]]) -> None:
    """Put repeat into the graph, and what it gives into the place of the nodes that move."""
    steps, (old, new) = frames[0], heads[-2:]
    output, grid = steps.output, _grid(steps)
    moving = [b for a, b in zip(old.nodes, new.nodes, strict=True) if a is not b]
    grown = [len(after) - len(before) for (_, before), (_, after) in zip(old.lists, new.lists, strict=True)]
    if not new.bare.isdisjoint(moving):
        raise Irregular("something other than a tensor moves on with the iterations")
    for (_, items), count in zip(new.lists, grown, strict=True):
        own = [node for item in items[len(items) - count :] for node in item.nodes]
        earlier = [node for item in items[len(items) - 2 * count : len(items) - count] for node in item.nodes]
        if not places.keys() >= set(own) or any(a is b for a, b in zip(earlier, own, strict=True)):
            raise Irregular("each iteration appends the same value to a list")
    later = [
        Later.of(grid, i, tracked, count) if count else None
        for (tracked, _), count in zip(new.lists, grown, strict=True)
    ]
    _fill_in_numbers(steps, new.numbers, i)
    held = [new.holders[node][0].proxy for node in moving]
    repeat = output.create_proxy("call_function", torch.ops.rampde_fx.repeat, (grid, held), {})
    _torch.set_example_value(repeat.node, [node.meta["example_value"] for node in moving])
    finals: dict[fx.Node, fx.Proxy] = {}
    for j, node in enumerate(moving):
        finals[node] = output.create_proxy("call_function", operator.getitem, (repeat, j), {})
        _torch.set_example_value(finals[node].node, node.meta["example_value"])
    for (tracked, _), rest in zip(new.lists, later, strict=True):
        collect_on(tracked, rest, finals)
    for node, final in finals.items():
        for holder in new.holders[node]:
            holder.proxy = final


def _fill_in_numbers(steps: Any, numbers: list[Number], i: int) -> None:
    """Make each number of the step what it is after the loop."""
    moving = [number for number in numbers if number.slope]
    count = step_numbers.leave(_steps_of(steps)) if moving else None
    for number in moving:
        if isinstance(count, int):
            final = _torch.ConstantVariable.create(number.value + number.slope * (count - i))
        else:
            final = _symbolic(steps, number.value - number.slope * (i + 1), number.slope)
        step_numbers.become(number.tracked, final)
    step_numbers.end()


def _symbolic(steps: Any, offset: int, factor: int) -> Any:
    """factor * t.shape[0] + offset, as Dynamo tracks a symbolic number."""
    output = steps.output
    size = output.create_proxy("call_method", "size", (_grid(steps), 0), {})
    number = _torch.wrap_fx_proxy(steps, size)
    for function, operand in ((operator.mul, factor), (operator.add, offset)):
        proxy = output.create_proxy("call_function", function, (number.as_proxy(), operand), {})
        number = _torch.wrap_fx_proxy(steps, proxy)
    return number
