"""The operators that rampde_fx adds to torch: markers, and what a rewritten graph shows as one node.

Any other backend decomposes the markers step and end to plain slices of t, gradients included; enter and leave are for
this one. The rest appears in rewritten graphs only. What Inductor is to fuse is spelt out at emission, by
DECOMPOSITIONS, or has a lowering (emit/inductor_passes.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from rampde_fx.errors import (
    OptionError,
    UnsupportedLoopError,
    event_is_nan,
    event_not_met,
    not_finite,
    step_too_small,
    too_many_steps,
)
from rampde_fx.runtime import counts, monitoring, ordered_times, scales, step_control
from rampde_fx.runtime.raised import noted
from rampde_fx.torch_private import kernels

_Function = Callable[..., torch.Tensor]
library = torch.library.Library("rampde_fx", "DEF")
library.define("step(Tensor t, int i, str policy) -> (Tensor, Tensor)")
library.define("end(Tensor t) -> Tensor")
# In place of end, where all later iterations repeat the captured ones: what the values that move on are at last.
library.define("repeat(Tensor t, Tensor[] moving) -> Tensor[]")
# What a list holds to which each iteration appends, stacked: what it held before the last captured iteration, then what
# that one and all later ones append.
library.define("collect(Tensor t, int captured, Tensor[] before, Tensor[] each) -> Tensor")
# A loop of which one step is captured: enter gives that step's (t, dt, *states), leave the trajectories of the states,
# the initial ones included, at the end of every few steps, then what is collected of each of these. It is told which
# search found the steps, if one did, by one of its results; what the method is; what is wrong with the velocity.
library.define("enter(Tensor t, Tensor dt, Tensor[] states, str policy) -> Tensor[]")
library.define(
    "leave(Tensor[] states, Tensor[] nexts, Tensor[] collected, Tensor? search, SymInt outputs, SymInt every,"
    " str method, int evaluations, str problem) -> Tensor[]"
)
library.define("needs_backend(Tensor x) -> Tensor")
# Between the step that stands for all and the one behind it, which is captured to be compared with it.
library.define("again(Tensor t) -> Tensor")
# The same for a search for adaptive steps: leave_search gives intervals, positions and fractions of the steps that
# count, their number, that of all that were tried, the status and the time that was reached. What is collected are so
# many errors, the decisions, and what the loop behind it collects of each step. The numbers are the first step's size
# and those of a step_control.Controller, whose constants and tolerances are given beside them.
library.define(
    "leave_search(Tensor[] states, Tensor[] nexts, Tensor[] collected, int errors, Tensor t, Tensor numbers,"
    " int order, SymInt max_steps, Scalar rtol, Scalar atol, bool own_norm, bool until_event, str method,"
    " int evaluations, str problem) -> Tensor[]"
)
# How many steps of one size lead from the first time to the last, computed on the host, which asks for it.
library.define("count_steps(Tensor t, Tensor step_size) -> Tensor")
# The number of steps that a search found, once the host has seen that it found them all.
library.define("found(Tensor count, Tensor status, Tensor reached) -> Tensor")
# What to add to the time points of odeint: 0, once they are checked where they are known. A sum, so that it has every
# derivative.
library.define("monotone(Tensor t) -> Tensor")
# The user's detach() in a step, as an operation of its own: tracing leaves detach nodes that mean nothing.
library.define("stop_gradient(Tensor x) -> Tensor")
# A tensor in a dtype of less range; what is finite and lies beyond it becomes NaN, for a velocity may hide an inf.
library.define("narrow(Tensor x, *, ScalarType dtype) -> Tensor", tags=(torch.Tag.pointwise,))
# The result of an operation on the operands, elementwise ones: NaN where it is infinite and they are finite.
library.define("mark_overflow(Tensor x, Tensor[] operands) -> Tensor", tags=(torch.Tag.pointwise,))
# Random numbers as a function of a seed, the index of a step, the draw within the step and the entry: of the shape,
# dtype and device of like.
for _name, _more in (("uniform", ""), ("normal", ""), ("bernoulli", ", float p")):
    library.define(f"{_name}(Tensor seed, Tensor index, int draw, Tensor like{_more}) -> Tensor")
# One run of the reverse loop, counted on the host where the loop decides whether to run again. The outcome, float32
# (3,): whether a gradient overflowed, how many entries of cotangents vanished, how many gradients are zero as a whole.
library.define("record_sweep(Tensor outcome, Tensor attempt, int attempts, str loop) -> Tensor")
# Of what enters a velocity in float16 how many entries are not zero and lose digits, how many are not zero, and how
# many tensors are subnormal there as a whole.
library.define("count_underflow(Tensor[] states) -> Tensor")
# A zero of the dtype of like, once a run of a loop is noted: its number of steps, as a number or as the length of a
# stack; the evaluations, or VJPs, of each; and what count_underflow gave in all steps, or how often a reverse loop ran.
_run = "Tensor like, Tensor? stack, int steps, int each"
library.define(f"record_forward({_run}, Tensor? counts, str loop) -> Tensor")
library.define(f"record_backward({_run}, Tensor? runs, str loop) -> Tensor")
# A zero, once it is noted how many steps a search tried, and how many of them count; neither is waited for.
library.define("record_search(Tensor tried, Tensor accepted, int each, str loop) -> Tensor")
# The same values, once the open monitors have what a run of the reverse loop returned for them.
library.define("record_adjoint(Tensor[] values, Tensor statistics, Tensor attempt, str loop) -> Tensor[]")


SMALLEST_NORMAL = 2.0**-14  # of float16
FEW_DIGITS = 2.0**-17  # below this it keeps less than 8 binary digits of a number
FAILURES = {
    step_control.TOO_MANY_STEPS: too_many_steps,
    step_control.STEP_TOO_SMALL: step_too_small,
    step_control.NOT_FINITE: not_finite,
    step_control.NOT_MET: event_not_met,
    step_control.EVENT_IS_NAN: event_is_nan,
}


def _step(t: torch.Tensor, i: int, policy: str) -> tuple[torch.Tensor, torch.Tensor]:
    return t[i], t[i + 1] - t[i]


def _end(t: torch.Tensor) -> torch.Tensor:
    return t[-1]


def _repeat(t: torch.Tensor, moving: list[torch.Tensor]) -> list[torch.Tensor]:
    return [torch.ops.rampde_fx.needs_backend(x) for x in moving]


def captured_values(t: torch.Tensor, moving: list[torch.Tensor]) -> list[torch.Tensor]:
    """What repeat gives if nothing is repeated."""
    return [x.clone() for x in moving]


def _collect(t: torch.Tensor, captured: int, before: list[torch.Tensor], each: list[torch.Tensor]) -> torch.Tensor:
    rows = torch.stack(each)
    later = rows.expand(t.shape[0] - captured, *rows.shape).flatten(0, 1)
    return torch.cat([torch.stack(before), later]) if before else later


def first_step(t: torch.Tensor, dt: torch.Tensor, states: list[torch.Tensor], policy: str) -> list[torch.Tensor]:
    """What enter gives the first step."""
    return [t[0], dt[0], *states]


def _enter(t: torch.Tensor, dt: torch.Tensor, states: list[torch.Tensor], policy: str) -> list[torch.Tensor]:
    return [torch.ops.rampde_fx.needs_backend(x) for x in first_step(t, dt, states, policy)]


def _leave(
    states: list[torch.Tensor],
    nexts: list[torch.Tensor],
    collected: list[torch.Tensor],
    search: torch.Tensor | None,
    outputs: int,
    every: int,
    method: str,
    evaluations: int,
    problem: str,
) -> list[torch.Tensor]:
    trajectories = [
        torch.cat([state[None], after.expand(outputs - 1, *after.shape)])
        for state, after in zip(states, nexts, strict=True)
    ]
    return [*trajectories, *(value[None].repeat(outputs - 1, *[1] * value.ndim) for value in collected)]


def _leave_search(
    states: list[torch.Tensor],
    nexts: list[torch.Tensor],
    collected: list[torch.Tensor],
    errors: int,
    t: torch.Tensor,
    numbers: torch.Tensor,
    order: int,
    max_steps: int,
    rtol: float,
    atol: float,
    own_norm: bool,
    until_event: bool,
    method: str,
    evaluations: int,
    problem: str,
) -> list[torch.Tensor]:
    search = step_control.begin(t, numbers[0], max_steps)
    count, tried, status = search.count + 1, search.tried + 1, search.status + step_control.DONE
    return [search.intervals, search.positions, search.fractions, count, tried, status, t[-1].clone()]


def _count_steps(t: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
    ends, step_size = t[[0, -1]].cpu(), float(size)
    least = torch.finfo(t.dtype).eps * float(ends.abs().amax())
    if step_size < least:
        raise noted(
            OptionError(
                f'options={{"step_size": {step_size!r}}} with times up to {float(ends.abs().amax()):g} in {t.dtype}',
                required=f"steps that these times resolve, of {least:.2g} or more",
                fix="take larger steps, or give t in float64",
            )
        )
    return (torch.ceil((ends[1] - ends[0]).abs() / step_size + 1) - 1).to(torch.int64)


def _found(count: torch.Tensor, status: torch.Tensor, reached: torch.Tensor) -> torch.Tensor:
    if (outcome := int(status)) in FAILURES:
        raise noted(FAILURES[outcome](int(count), float(reached)))
    return count.clone()


def _needs_backend(x: torch.Tensor) -> torch.Tensor:
    raise UnsupportedLoopError(
        "odeint was compiled for the rampde_fx backend, which one step of it stands for, and runs under another one",
        required="the backend that the model was captured for",
        fix='compile by torch.compile(model, backend="rampde_fx")',
    )


def _narrow(x: torch.Tensor, *, dtype: torch.dtype) -> torch.Tensor:
    return _mark_overflow(x.to(dtype), [x])


def _mark_overflow(x: torch.Tensor, operands: list[torch.Tensor]) -> torch.Tensor:
    overflowed = scales.are_infinite(x)
    for operand in operands:
        overflowed = overflowed & ~scales.are_infinite(operand)
    return torch.where(overflowed, float("nan"), x)


def _times(x: torch.Tensor, factor: int) -> torch.Tensor:
    """x times factor modulo 2^32, without an overflow of int64."""
    return (x * (factor & 0xFFFF) + ((x * (factor >> 16) & 0xFFFF) << 16)) & 0xFFFFFFFF


def _hash(x: torch.Tensor) -> torch.Tensor:
    """A bijection of 32-bit words with little bias: lowbias32 of C. Wellons, Prospecting for hash functions, 2018."""
    x = _times(x ^ (x >> 16), 0x7FEB352D)
    x = _times(x ^ (x >> 15), 0x846CA68B)
    return x ^ (x >> 16)


def _word(seed: torch.Tensor, index: torch.Tensor, draw: int, like: torch.Tensor) -> torch.Tensor:
    """A 32-bit word for every entry of like."""
    key = _hash(((seed >> 32) & 0xFFFFFFFF) ^ _hash(index & 0xFFFFFFFF))
    key = _hash(key ^ draw)
    entry = torch.arange(like.numel(), device=like.device).reshape(like.shape) & 0xFFFFFFFF
    return _hash(_hash(entry ^ key) ^ (seed & 0xFFFFFFFF))


def _fraction(word: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A number of [0, 1) from a word, with as many digits as the dtype holds."""
    digits = {torch.float16: 11, torch.bfloat16: 8}.get(dtype, 24)
    return (word >> (32 - digits)).to(torch.float32) * 2.0**-digits


# A draw has two words: a normal number needs both.
def _uniform(seed: torch.Tensor, index: torch.Tensor, draw: int, like: torch.Tensor) -> torch.Tensor:
    return _fraction(_word(seed, index, 2 * draw, like), like.dtype).to(like.dtype)


def _normal(seed: torch.Tensor, index: torch.Tensor, draw: int, like: torch.Tensor) -> torch.Tensor:
    """Box and Muller's transform, doi 10.1214/aoms/1177706645."""
    first, second = (_fraction(_word(seed, index, 2 * draw + i, like), torch.float32) for i in range(2))
    return (torch.sqrt(-2 * torch.log1p(-first)) * torch.cos(2 * math.pi * second)).to(like.dtype)


def _bernoulli(seed: torch.Tensor, index: torch.Tensor, draw: int, like: torch.Tensor, p: float) -> torch.Tensor:
    return (_fraction(_word(seed, index, 2 * draw, like), torch.float32) < p).to(like.dtype)


def _record_sweep(outcome: torch.Tensor, attempt: torch.Tensor, attempts: int, loop: str) -> torch.Tensor:
    overflow, vanished, zeros = outcome.tolist()
    last = int(attempt) + 1 == attempts
    counts.record(loop, int(attempt), overflow=bool(overflow), last=last, vanished=int(vanished), zeros=int(zeros))
    return torch.tensor(bool(overflow))


def _count_underflow(states: list[torch.Tensor]) -> torch.Tensor:
    sizes = [state.abs() for state in states]
    lost = [((size != 0) & (size < FEW_DIGITS)).sum() for size in sizes]
    present = [(size != 0).sum() for size in sizes]
    largest = torch.stack([size.amax().to(torch.float32) for size in sizes])
    subnormal = ((largest != 0) & (largest < SMALLEST_NORMAL)).sum()
    return torch.stack([sum(lost[1:], lost[0]), sum(present[1:], present[0]), subnormal])


def _record_forward(
    like: torch.Tensor, stack: torch.Tensor | None, steps: int, each: int, total: torch.Tensor | None, loop: str
) -> torch.Tensor:
    counts.record_evaluations(loop, forward=each * (steps if stack is None else stack.shape[0]))
    if total is not None:
        counts.record_states(loop, total)
    return torch.zeros((), dtype=like.dtype, device=like.device)


def _record_backward(
    like: torch.Tensor, stack: torch.Tensor | None, steps: int, each: int, runs: torch.Tensor | None, loop: str
) -> torch.Tensor:
    times = 1 if runs is None else int(runs)  # the host's own
    counts.record_evaluations(loop, backward=times * each * (steps if stack is None else stack.shape[0]))
    return torch.zeros((), dtype=like.dtype, device=like.device)


def _record_search(tried: torch.Tensor, accepted: torch.Tensor, each: int, loop: str) -> torch.Tensor:
    counts.record_search(loop, tried, accepted, each)
    return torch.zeros_like(tried)


def _record_adjoint(
    values: list[torch.Tensor], statistics: torch.Tensor, attempt: torch.Tensor, loop: str
) -> list[torch.Tensor]:
    monitoring.record(loop, int(attempt), statistics)
    return [value.clone() for value in values]


library.impl("step", _step, "CompositeImplicitAutograd")
library.impl("end", _end, "CompositeImplicitAutograd")
library.impl("repeat", _repeat, "CompositeImplicitAutograd")
library.impl("collect", _collect, "CompositeImplicitAutograd")
library.impl("again", torch.clone, "CompositeExplicitAutograd")
library.impl("enter", _enter, "CompositeImplicitAutograd")
library.impl("leave", _leave, "CompositeImplicitAutograd")
library.impl("needs_backend", _needs_backend, "CompositeExplicitAutograd")
library.impl("leave_search", _leave_search, "CompositeImplicitAutograd")
library.impl("count_steps", _count_steps, "CompositeExplicitAutograd")
library.impl("found", _found, "CompositeExplicitAutograd")
library.impl("monotone", ordered_times.monotone, "CompositeExplicitAutograd")
torch.library.register_autograd("rampde_fx::needs_backend", lambda ctx, gradient: gradient, lib=library)
library.impl("stop_gradient", torch.clone, "CompositeExplicitAutograd")
library.impl("stop_gradient", kernels.below_autograd(torch.ops.rampde_fx.stop_gradient), "Autograd")
library.impl("narrow", _narrow, "CompositeExplicitAutograd")
torch.library.register_autograd(
    "rampde_fx::narrow",
    lambda ctx, gradient: gradient.to(ctx.dtype),
    setup_context=lambda ctx, inputs, keyword_only_inputs, output: setattr(ctx, "dtype", inputs[0].dtype),
    lib=library,
)
library.impl("mark_overflow", _mark_overflow, "CompositeExplicitAutograd")
torch.library.register_autograd(
    "rampde_fx::mark_overflow",
    lambda ctx, gradient: (gradient, [None] * ctx.operands),
    setup_context=lambda ctx, inputs, output: setattr(ctx, "operands", len(inputs[1])),
    lib=library,
)
library.impl("record_sweep", _record_sweep, "CPU")
library.impl("count_underflow", _count_underflow, "CompositeExplicitAutograd")
library.impl("count_underflow", kernels.below_autograd(torch.ops.rampde_fx.count_underflow), "Autograd")
_records: dict[str, _Function] = {
    "record_forward": _record_forward,
    "record_backward": _record_backward,
    "record_search": _record_search,
}
for _name, _function in _records.items():
    library.impl(_name, _function, "CompositeExplicitAutograd")
    library.impl(_name, kernels.below_autograd(getattr(torch.ops.rampde_fx, _name)), "Autograd")
library.impl("record_adjoint", _record_adjoint, "CompositeExplicitAutograd")
_distributions: dict[str, _Function] = {"uniform": _uniform, "normal": _normal, "bernoulli": _bernoulli}
# Without these a kernel runs on fake tensors, and fixes symbolic sizes.
_fakes: dict[str, _Function] = {
    "stop_gradient": torch.empty_like,
    "again": torch.empty_like,
    "needs_backend": torch.empty_like,
    "count_steps": lambda *_: torch.empty((), dtype=torch.int64),
    "found": lambda count, *_: torch.empty_like(count),
    "monotone": lambda t: t.new_empty(()),
    "narrow": lambda x, *, dtype: torch.empty_like(x, dtype=dtype),
    "mark_overflow": lambda x, operands: torch.empty_like(x),
    "count_underflow": lambda states: torch.empty(3, dtype=torch.int64, device=states[0].device),
    "record_forward": lambda like, *_: like.new_empty(()),
    "record_backward": lambda like, *_: like.new_empty(()),
    "record_search": lambda tried, *_: torch.empty_like(tried),
    "record_sweep": lambda outcome, *_: torch.empty((), dtype=torch.bool),
    "record_adjoint": lambda values, *_: [torch.empty_like(value) for value in values],
    **dict.fromkeys(_distributions, lambda seed, index, draw, like, *_: torch.empty_like(like)),
}
for _name, _fake in _fakes.items():
    torch.library.register_fake(f"rampde_fx::{_name}", _fake, lib=library)

# What these two compute, by operators of torch alone.
MARKS: dict[Any, _Function] = {
    torch.ops.rampde_fx.narrow.default: _narrow,
    torch.ops.rampde_fx.mark_overflow.default: _mark_overflow,
}
DECOMPOSITIONS: dict[Any, _Function] = {
    torch.ops.rampde_fx.count_underflow.default: _count_underflow,
}
for _name, _function in _distributions.items():
    _operator = getattr(torch.ops.rampde_fx, _name)
    library.impl(_name, _function, "CompositeExplicitAutograd")
    library.impl(_name, kernels.below_autograd(_operator), "Autograd")
    DECOMPOSITIONS[_operator.default] = _function
step, end = torch.ops.rampde_fx.step, torch.ops.rampde_fx.end
again = torch.ops.rampde_fx.again
repeat, collect = torch.ops.rampde_fx.repeat, torch.ops.rampde_fx.collect
enter, leave = torch.ops.rampde_fx.enter, torch.ops.rampde_fx.leave
leave_search, found = torch.ops.rampde_fx.leave_search, torch.ops.rampde_fx.found
monotone, count_steps = torch.ops.rampde_fx.monotone, torch.ops.rampde_fx.count_steps
