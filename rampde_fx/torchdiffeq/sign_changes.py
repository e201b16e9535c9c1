"""Where a solution changes the sign of an event function: the step in which it does, and the time within it."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from rampde_fx.errors import event_is_nan, event_not_met
from rampde_fx.solvers.runge_kutta import State, combine
from rampde_fx.torchdiffeq.adaptive import Adaptive
from rampde_fx.torchdiffeq.clock import Clock, Event, number
from rampde_fx.torchdiffeq.grids import Scheme, equal_steps, within
from rampde_fx.torchdiffeq.problem import Tolerance

MOST_STEPS = 20_000  # of a fixed size; adaptive ones have max_num_steps

Within = Callable[[torch.Tensor], State]


@torch.no_grad()
def combined(event: Event, t: torch.Tensor, y: State, *, of_zero: float = 0.0) -> Event:
    """The least of an event function's entries, each times its sign at the start: the first of them that changes it.

    An entry that is zero there counts as met at once; `of_zero` is the sign that it has instead.
    """
    signs = torch.sign(event(t, y))
    signs = torch.where(signs == 0, of_zero, signs)
    return lambda t, y: (event(t, y) * signs).min()


def event_by_adaptive(steps: Adaptive, event: Event, tolerance: float) -> tuple[torch.Tensor, State]:
    """The time of the event, and the state then.

    Raises:
        EventError: if max_num_steps steps do not lead to it.
    """
    start, y = steps.last.start, steps.clock.problem.y
    sign = _sign(event, start, y)
    if sign == 0:
        return start, _at_once(start, y, steps.next_rate)
    tried = 0
    while _sign(event, steps.last.end, steps.last.states[1]) == sign:
        if tried >= int(steps.control.max_num_steps):
            raise event_not_met(tried, number(steps.clock.users(steps.last.end)))
        steps.advance()
        tried += 1
    return _found(event, sign, (steps.last.start, steps.last.end), steps.at, tolerance)


def event_on_grid(
    clock: Clock, scheme: Scheme, size: float, interp: str, event: Event, tolerance: float
) -> tuple[torch.Tensor, State, int]:
    """The same by steps of one size, and the number of these.

    Raises:
        EventError: if it is not met.
    """
    start, y = clock.t[0].to(clock.problem.dtype), clock.problem.y
    sign = _sign(event, start, y)
    if sign == 0:
        return start, _at_once(start, y, clock.rate(start, y)) if start.requires_grad else y, 0
    for count, step in enumerate(equal_steps(clock, scheme, size), 1):
        if _sign(event, step.end, step.after) != sign:
            return *_found(event, sign, (step.start, step.end), within(clock, step, interp), tolerance), count
        if count == MOST_STEPS:
            break
    raise event_not_met(MOST_STEPS, number(clock.users(step.end)))


def _at_once(start: torch.Tensor, y: State, rate: State) -> State:
    """The state where a solution begins, at that time: a later start is one from a state that is further on."""
    return combine(y, start.detach() - start, [1.0], [rate])


def closest(tolerances: list[Tolerance]) -> float:
    """The least of the absolute tolerances, to which the time of an event is found."""
    return min(float(value.min()) if isinstance(value, torch.Tensor) else float(value) for value in tolerances)


@torch.no_grad()
def _sign(event: Event, t: torch.Tensor, y: State) -> float:
    value = number(event(t, y))
    if math.isnan(value):
        raise event_is_nan(0, number(t))
    return float((value > 0) - (value < 0))


@torch.no_grad()
def _bisected(
    event: Event, sign: float, ends: tuple[torch.Tensor, torch.Tensor], within: Within, tolerance: float
) -> torch.Tensor:
    """The time of the change of sign, by halving the step."""
    left, right = (end.detach() for end in ends)
    resolved = max(tolerance, torch.finfo(left.dtype).eps * max(abs(number(left)), abs(number(right))))
    for _ in range(max(0, math.ceil(math.log2(number(right - left) / resolved)))):
        middle = (left + right) / 2
        if _sign(event, middle, within(middle)) == sign:
            left = middle
        else:
            right = middle
    return (left + right) / 2


def _found(
    event: Event, sign: float, ends: tuple[torch.Tensor, torch.Tensor], within: Within, tolerance: float
) -> tuple[torch.Tensor, State]:
    time = _bisected(event, sign, ends, within, tolerance)
    return time, within(time)
