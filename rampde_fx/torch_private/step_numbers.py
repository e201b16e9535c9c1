"""Numbers that every iteration of a marked loop moves on by the same amount: counters, and the index of the step.

A step number stands for the number that it is in each iteration to come. It may be moved on by numbers, handed about,
compared where the outcome is the same up to the last iteration, and be an index into a tensor; the graph then has the
number that it is in the iteration under way. Whoever asks for anything else might act by its value: the loop is then
captured again, with plain numbers.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import fx

from rampde_fx.torch_private.dynamo import capture_log, captured_line, put_methods
from rampde_fx.torch_private.names import Names
from rampde_fx.torch_private.shapes import TensorifyScalarRestartAnalysis

_torch = Names(
    {
        "torch._dynamo.exc": "ObservedException SpeculationRestartAnalysis TorchDynamoException Unsupported",
        "torch._dynamo.symbolic_convert": "InstructionTranslatorBase",
        "torch._dynamo.variables": "ConstantVariable TensorVariable SymNodeVariable TupleVariable VariableTracker",
        "torch._dynamo.variables.builtin": "BuiltinVariable",
    },
    everywhere=False,
)

READ = (
    "rampde_fx_read"  # attribute of what Dynamo keeps from one attempt to the next: who read a loop's numbers, and why
)
ALIVE = "rampde_fx_counted"  # likewise: the loop that is traced with step numbers
LEFT = "rampde_fx_left"  # likewise: numbers that loops left follow from numbers of steps that are symbolic
PLAIN = "rampde_fx_plain"  # likewise: numbers that loops leave are plain, and the graph is of one number of steps
# What Dynamo asks of whatever it hands about, and what says nothing of the value.
HANDED_ABOUT = {
    "__class__", "__dict__", "_is_name_set", "_nonvar_fields", "is_realized", "is_tensor", "mutation_type",
    "python_type", "realize", "set_name_hint", "set_source_location", "source", "source_location", "unwrap",
    "user_stack",
}  # fmt: skip
OPERANDS = 4  # that an instruction takes, at most, where it writes a number
Moved = Callable[[int, int], int]


@dataclass
class NumberedLoop:
    """A marked loop that is traced with step numbers.

    Attributes:
        place: File and line where it begins.
        grid: The time points.
        iteration: The iteration under way.
    """

    place: tuple[str, int]
    grid: fx.Proxy
    iteration: int

    def last(self, value: int, slope: int) -> Any:
        """What a number of the iteration under way is in the last one."""
        return value + slope * (self.grid.node.meta["example_value"].shape[0] - 2 - self.iteration)


def reason_of(place: tuple[str, int]) -> str:
    """Who read the numbers of a loop in an earlier attempt; empty if nobody did."""
    reasons: dict[tuple[str, int], str] = getattr(capture_log(), READ, {})
    return reasons.get(place, "")


def begin(loop: NumberedLoop) -> None:
    """From here on a loop is traced with step numbers."""
    _teach_dynamo()
    setattr(capture_log(), ALIVE, loop)


def end() -> None:
    """No step number is left that the program could read."""
    setattr(capture_log(), ALIVE, None)


def leave(steps: Any) -> Any:
    """The number of steps from which the numbers that a loop leaves follow: a plain one, or as the capture has it."""
    if not isinstance(steps, int) and hasattr(capture_log(), PLAIN):
        return int(steps)
    if not isinstance(steps, int):
        setattr(capture_log(), LEFT, True)
    return steps


def capture_with_numbers(loop: NumberedLoop, reason: str) -> NoReturn:
    """Have Dynamo capture the model again, the loop with plain numbers.

    Raises:
        TensorifyScalarRestartAnalysis: which Dynamo catches.
    """
    vars(capture_log()).setdefault(READ, {})[loop.place] = reason
    _capture_again()


def _leave_plain_numbers() -> None:
    """Have Dynamo capture the model again, if its loops left symbolic numbers, which Dynamo knows less of."""
    log = capture_log()
    if not hasattr(log, LEFT) or hasattr(log, PLAIN):
        return
    setattr(log, PLAIN, True)
    _capture_again()


def _capture_again() -> NoReturn:
    capture_log().clear()  # the next attempt takes another way
    end()
    raise TensorifyScalarRestartAnalysis


def _hold_symbolic(operands: list[Any]) -> bool:
    """Whether one of the operands, or an entry of a tuple among them, is a symbolic number."""
    tuples = [entry for operand in operands if isinstance(operand, _torch.TupleVariable) for entry in operand.items]
    return any(isinstance(entry, _torch.SymNodeVariable) for entry in (*operands, *tuples))


def _is_read(loop: NumberedLoop) -> NoReturn:
    capture_with_numbers(loop, "and is read in {}:{}".format(*captured_line()))


def step_number(value: int, slope: int, loop: NumberedLoop) -> Any:
    """What Dynamo is to track instead of a number that every iteration moves on by a slope."""
    return _tracker()(value, slope, loop)


def slope_of(tracked: Any) -> int:
    """By how much every iteration moves a tracked value on; 0 of all that are no step numbers."""
    return parts_of(tracked)[1] if is_step_number(tracked) else 0


def is_step_number(tracked: Any) -> bool:
    """Whether Dynamo tracks a step number."""
    return type(tracked) is _tracker()


def parts_of(tracked: Any) -> tuple[int, int, NumberedLoop]:
    """Value, slope and loop of a step number."""
    own = object.__getattribute__(tracked, "__dict__")
    return own["number"], own["slope"], own["loop"]


def become(tracked: Any, final: Any) -> None:
    """Make a step number what it is after the loop, wherever it stands."""
    own = object.__getattribute__(tracked, "__dict__")
    own.clear()
    own.update(vars(final))
    object.__setattr__(tracked, "__class__", type(final))


@functools.cache
def _tracker() -> Any:
    class StepNumberVariable(_torch.VariableTracker):  # type: ignore[name-defined]
        """A step number, as Dynamo tracks it: whatever asks for more than what all values have reads it."""

        def __init__(self, number: int, slope: int, loop: NumberedLoop, **rest: Any) -> None:
            super().__init__(**rest)
            own = object.__getattribute__(self, "__dict__")
            own.update(number=number, slope=slope, loop=loop)

        def __getattribute__(self, name: str) -> Any:
            if name not in HANDED_ABOUT:
                _is_read(parts_of(self)[2])
            return super().__getattribute__(name)

        def python_type(self) -> type:
            return int

    return StepNumberVariable


@functools.cache
def _teach_dynamo() -> None:
    """Have Dynamo move step numbers on and index by them; where it knows no other way, they are read."""
    builtin, tensor, frame = _torch.BuiltinVariable, _torch.TensorVariable, _torch.InstructionTranslatorBase
    make_handler, get, put = builtin._make_handler, tensor.method___getitem__, tensor.method___setitem__
    take_step = frame.step

    @functools.wraps(make_handler)
    def made(function: Any, types: list[type], has_kwargs: bool) -> Any:
        if _tracker() in types:
            return functools.partial(_called, function)
        handler = make_handler(function, types, has_kwargs)
        if function is operator.getitem and types[1:] == [_torch.TupleVariable]:
            return functools.partial(_entry, handler)
        return handler

    @functools.wraps(get)
    def read(self: Any, tx: Any, *args: Any, **kwargs: Any) -> Any:
        return get(self, tx, *(_in_bounds(self, index) for index in args), **kwargs)

    @functools.wraps(put)
    def written(self: Any, tx: Any, key: Any, value: Any) -> Any:
        return put(self, tx, _in_bounds(self, key), value)

    @functools.wraps(take_step)
    def step(self: Any) -> Any:
        operands = self.stack[-OPERANDS:]
        try:
            return take_step(self)
        except (_torch.Unsupported, _torch.SpeculationRestartAnalysis):
            loop: NumberedLoop | None = getattr(capture_log(), ALIVE, None)
            if loop is not None:  # with plain numbers there may be a way
                _is_read(loop)
            if self.one_graph or self.error_on_graph_break or _hold_symbolic(operands):
                _leave_plain_numbers()
            raise
        except _torch.ObservedException:
            if _hold_symbolic(operands):
                _leave_plain_numbers()
            raise
        except _torch.TorchDynamoException:
            raise
        except Exception:  # Dynamo's own: it formats symbolic numbers as strings
            _leave_plain_numbers()
            raise

    builtin._make_handler = staticmethod(made)
    builtin.call_function_handler_cache.clear()
    put_methods(tensor, __getitem__=read, __setitem__=written)
    frame.step = step


def _called(function: Any, tx: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
    """A builtin of step numbers and others."""
    args = [arg.realize() for arg in args]
    if function is operator.getitem and isinstance(args[0], _torch.TensorVariable):
        return args[0].call_method(tx, "__getitem__", args[1:], {})
    loop = next(parts_of(arg)[2] for arg in (*args, *kwargs.values()) if is_step_number(arg))
    if function is setattr and hasattr(_torch.BuiltinVariable, "call_setattr") and not is_step_number(args[0]):
        return _torch.BuiltinVariable(setattr).call_setattr(tx, *args)
    if function in OF_THE_TYPE and not kwargs:
        some = [_torch.ConstantVariable.create(0) if is_step_number(arg) else arg for arg in args]
        return _torch.BuiltinVariable(function).call_function(tx, some, {})
    pairs = [pair for pair in map(_number_and_slope, args) if pair is not None]
    if len(pairs) < len(args) or kwargs:
        _is_read(loop)
    if function in COMPARISONS:
        return _torch.ConstantVariable.create(_decided(function, loop, *pairs))
    if function not in MOVES or any(isinstance(arg, _torch.SymNodeVariable) for arg in args):
        _is_read(loop)
    number, slope = MOVES[function](loop, *pairs)
    return step_number(number, slope, loop) if slope else _torch.ConstantVariable.create(number)


def _entry(handler: Callable[..., Any], tx: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
    """An entry by several numbers."""
    if isinstance(args[0], _torch.TensorVariable) and any(map(is_step_number, args[1].items)):
        return args[0].call_method(tx, "__getitem__", args[1:], {})
    return handler(tx, args, kwargs)


Pair = tuple[Any, int]


def _number_and_slope(tracked: Any) -> Pair | None:
    if is_step_number(tracked):
        return parts_of(tracked)[:2]
    if isinstance(tracked, _torch.SymNodeVariable) and isinstance(tracked.sym_num, torch.SymInt):
        return tracked.sym_num, 0
    plain = isinstance(tracked, _torch.ConstantVariable) and type(tracked.value) is int
    return (tracked.value, 0) if plain else None


def _decided(function: Callable[..., Any], loop: NumberedLoop, a: Pair, b: Pair) -> bool:
    """What a comparison gives in all iterations from the one under way on: their difference runs one way."""
    now, slope = a[0] - b[0], a[1] - b[1]
    last = loop.last(now, slope)
    if bool(now < 0) and bool(last < 0):
        return bool(function(-1, 0))
    if bool(now > 0) and bool(last > 0):
        return bool(function(1, 0))
    if slope == 0 and bool(now == 0):
        return bool(function(0, 0))
    reaches = function in (operator.lt, operator.ge) and bool(now >= 0) and bool(last >= 0)
    reaches |= function in (operator.gt, operator.le) and bool(now <= 0) and bool(last <= 0)
    if not reaches:
        _is_read(loop)
    return bool(function(0, 0))


def _plus(loop: NumberedLoop, a: Pair, b: Pair) -> Pair:
    return a[0] + b[0], a[1] + b[1]


def _minus(loop: NumberedLoop, a: Pair, b: Pair) -> Pair:
    return a[0] - b[0], a[1] - b[1]


def _times(loop: NumberedLoop, a: Pair, b: Pair) -> Pair:
    if a[1] and b[1]:
        _is_read(loop)
    return a[0] * b[0], a[0] * b[1] + a[1] * b[0]


def _same(loop: NumberedLoop, a: Pair) -> Pair:
    return a


OF_THE_TYPE = {isinstance, type, callable, hasattr}  # what is the same of all numbers
COMPARISONS = {operator.lt, operator.le, operator.gt, operator.ge, operator.eq, operator.ne}
MOVES: dict[Any, Callable[..., Pair]] = {
    operator.add: _plus, operator.iadd: _plus, operator.sub: _minus, operator.isub: _minus, operator.mul: _times,
    operator.imul: _times, operator.pos: _same, operator.index: _same, int: _same,
    operator.neg: lambda loop, a: (-a[0], -a[1]),
}  # fmt: skip


def _in_bounds(tensor: Any, index: Any) -> Any:
    """An index into a tensor, its step numbers as they are in the iteration under way.

    In every iteration to come they must be entries of their dimension, counted from its start: none may wrap round.
    """
    is_tuple = type(index) is _torch.TupleVariable
    entries = index.items if is_tuple else [index]
    if not any(map(is_step_number, entries)):
        return index
    sizes = iter(_sizes(tensor, entries))
    found = []
    for entry, size in zip(entries, sizes, strict=True):
        if is_step_number(entry):
            number, slope, loop = parts_of(entry)
            if size is None or slope < 0 or number < 0 or not bool(loop.last(number, slope) < size):
                _is_read(loop)
            found.append(_torch.ConstantVariable.create(number))
        else:
            found.append(entry)
    return _torch.TupleVariable(found) if is_tuple else found[0]


def _sizes(tensor: Any, entries: list[Any]) -> list[Any]:
    """Of each entry of an index the size of the dimension that it reads; None where nobody knows it."""
    shape = list(tensor.proxy.node.meta["example_value"].shape)
    values = [None if is_step_number(e) or not e.is_python_constant() else (e.as_python_constant(),) for e in entries]
    consumes = [value not in ((None,), (...,)) for value in values]
    found: list[Any] = []
    for k, value in enumerate(values):
        is_single = is_step_number(entries[k]) or (value is not None and type(value[0]) in (int, slice))
        if not consumes[k]:
            found.append(None)
        elif not is_single:
            return [None] * len(entries)
        else:
            after_ellipsis = (...,) in values[:k]
            place = -sum(consumes[k:]) if after_ellipsis else sum(consumes[:k])
            found.append(shape[place] if -len(shape) <= place < len(shape) else None)
    return found
