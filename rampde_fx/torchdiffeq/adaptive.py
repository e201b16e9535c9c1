"""Adaptive steps as torchdiffeq takes them, uncompiled: its rule for the sizes, and each of its options.

Steps do not end at output times but at the last one, and at the times of step_t and jump_t. Between their ends the
method's interpolant gives the solution, of dopri8 a quartic one as in torchdiffeq. Sizes are constants of the
derivative, so that gradients are those of the steps that were taken. The pairs of order 2 begin a step with the last
stage of the one before, which was evaluated near its end: they keep their order, at the cost that they have there.

Source: E. Hairer, S. P. Norsett, G. Wanner, Solving Ordinary Differential Equations I, 2nd edition, 1993, section II.4.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from rampde_fx.errors import OptionError, max_num_steps_used, not_finite, step_too_small
from rampde_fx.solvers.adaptive_steps import refuse_unreadable
from rampde_fx.solvers.fixed_steps import is_number
from rampde_fx.solvers.runge_kutta import (
    State,
    combine,
    increment,
    interpolate,
    needed,
    quartic_term,
    real_dtype,
    stage_time,
    stages,
)
from rampde_fx.solvers.statistics import SolveStatistics
from rampde_fx.solvers.tableau import PAIRS_OF_ORDER_2, ButcherTableau
from rampde_fx.torch_private.refusals import refuse, shown
from rampde_fx.torchdiffeq.clock import AFTER, BEFORE, Clock, number
from rampde_fx.torchdiffeq.problem import Tolerance

STOPS = ("step_t", "jump_t")


class Control(NamedTuple):
    """What the sizes of steps follow from.

    Args:
        rtol: Relative tolerances, one of each tensor of the state: numbers, or tensors that broadcast with it.
        atol: Absolute tolerances likewise.
        norm: Of the errors over the tolerances, in the structure of the state; None for the largest root mean square
            of its tensors.
        first_step: Size of the first step, None for one that follows from the velocity.
        min_step: A step of this size counts, whatever its error.
        max_step: No step is larger.
        safety: Factor of the step size.
        ifactor: The most that a step may be larger than the one before.
        dfactor: The least that a step after one that did not count may be of it.
        max_num_steps: The most that may be tried between two output times.
    """

    rtol: list[Tolerance]
    atol: list[Tolerance]
    norm: Callable[[Any], Any] | None = None
    first_step: Any = None
    min_step: Any = 0.0
    max_step: Any = math.inf
    safety: Any = 0.9
    ifactor: Any = 10.0
    dfactor: Any = 0.2
    max_num_steps: int = 2**31 - 1


class Step(NamedTuple):
    """A step that counted: its ends, the states and velocities there, and its quartic term."""

    start: torch.Tensor
    end: torch.Tensor
    states: tuple[State, State]
    rates: tuple[State, State]
    quartic: State


def stops_of(name: str, times: Any, device: torch.device) -> torch.Tensor:
    """The times of step_t or jump_t."""
    if isinstance(times, (list, tuple)) and all(is_number(time) for time in times):
        return torch.tensor(times, dtype=torch.float64, device=device)
    if not isinstance(times, torch.Tensor):
        refuse(
            OptionError,
            f"options={{{name!r}: {shown(times)}}}",
            required="a tensor of times, or a list of numbers",
            fix="write torch.tensor([0.5]), say",
        )
    return times.reshape(-1)


class Stops:
    """Times at which a step ends, those of step_t, jump_t and the last one.

    Args:
        clock: The problem.
        options: The user's.
        last: The last time, None where an event ends the solution.
        dtype: Of times.

    Raises:
        OptionError: if a time is among step_t and jump_t twice, or they are no tensors.
    """

    def __init__(self, clock: Clock, options: dict[str, Any], last: float | None, dtype: torch.dtype) -> None:
        given = {}
        for name in STOPS:
            times = options.get(name)
            given[name] = [] if times is None else clock.users(stops_of(name, times, clock.t.device).to(dtype)).tolist()
        every = [*given["step_t"], *given["jump_t"]]
        if len(set(every)) < len(every):
            raise OptionError(
                "step_t and jump_t hold a time twice",
                required="times that differ, of both together",
                fix="leave the repeated times out",
            )
        self.jumps = set(given["jump_t"])
        self.times = sorted({*every, *([] if last is None else [last])})

    def before(self, start: float, end: float) -> float | None:
        """The first of them within a step, or at its end."""
        place = bisect_right(self.times, start)
        return self.times[place] if place < len(self.times) and self.times[place] <= end else None


class Adaptive:
    """Steps of an adaptive method, one after another, from the first time on.

    Args:
        tableau: The method.
        clock: The problem.
        control: What the sizes follow from.
        stops: Times at which a step ends.
        dtype: Of times.
    """

    def __init__(
        self, tableau: ButcherTableau, clock: Clock, control: Control, stops: Stops, dtype: torch.dtype
    ) -> None:
        self.tableau, self.clock, self.control, self.stops, self.dtype = tableau, clock, control, stops, dtype
        assert tableau.order_error is not None, "adaptive methods only"
        self.difference = difference_of(tableau)
        self.order = min(tableau.order, tableau.order_error) + 1
        self.step = step_of(tableau, clock)
        start = clock.t[0].to(dtype)
        y = clock.problem.y
        rate = clock.rate(start, y)
        self.values = clock.t.to(dtype).tolist()
        self.shares = tableau.fsal or tableau.name in PAIRS_OF_ORDER_2
        self.last = Step(start, start, (y, y), (rate, rate), [])
        self.next_rate, self.count, self.tried = rate, 0, 0
        refuse_unreadable([*y, *rate])
        if not all(bool(leaf.isfinite().all()) for leaf in (*y, *rate)):
            raise not_finite(0, number(clock.users(start)))
        given = control.first_step
        self.size = float(self._first_size(start, y, rate) if given is None else given)

    def advance(self) -> bool:
        """Try a step; whether it counts."""
        (_, start, (_, y), _, _), rate, control = self.last, self.next_rate, self.control
        size = self.size if math.isfinite(self.size) else 0.0
        size = min(max(size, float(control.min_step)), float(control.max_step))
        self.clock.call("callback_step", start, y, self._time(size))
        end, stop = self._end(start, size)
        tried = end.detach() - start.detach()
        size = size if stop is None else number(tried)
        nexts, k = self.clock.step(self.step, [start, end], y, rate)
        errors = increment(_detached(y), tried, self.difference, [_detached(stage) for stage in k])
        ends = zip(_detached(y), _detached(nexts), strict=True)
        norm = self._norm(errors, [torch.maximum(a.abs(), b.abs()) for a, b in ends])
        counts = norm <= 1 or size <= float(control.min_step)
        self.tried += 1
        self.clock.call("callback_accept_step" if counts else "callback_reject_step", start, y, tried)
        following = size * self._factor(norm)
        if counts:
            self._take(start, end, y, nexts, k, jumps=stop in self.stops.jumps)
            # A step that ends where it must says nothing against a larger size that had been proposed.
            following = following if stop is None else max(following, self.size)
        self.size = following
        return counts

    def statistics(self) -> SolveStatistics:
        """Of the steps so far."""
        return self.clock.statistics(self.count, self.tried - self.count)

    def at(self, t: torch.Tensor) -> State:
        """The state at a time within the last step that counted, differentiable in it."""
        return self.within(self.last, t)

    def within(self, step: Step, t: torch.Tensor) -> State:
        """The state at a time within a step."""
        start, end, (first, last), (rate, last_rate), quartic = step
        size = end - start
        share, length = (x.to(self.clock.problem.dtype) for x in ((t.to(self.dtype) - start) / size, size))
        if number(t) == number(end):  # without rounding
            return [y + (share - 1) * length * f for y, f in zip(last, last_rate, strict=True)]
        quartics = quartic or [None] * len(first)
        rows = zip(first, last, rate, last_rate, quartics, strict=True)
        return [interpolate(self.tableau, share, length, (a, b), (f, g), term) for a, b, f, g, term in rows]

    def _time(self, value: float) -> torch.Tensor:
        return torch.full((), value, dtype=self.dtype, device=self.clock.t.device)

    def _end(self, start: torch.Tensor, size: float) -> tuple[torch.Tensor, float | None]:
        """Where a step of this size ends, and the stop that it ends at, if any."""
        end = start + self._time(size)
        if not number(end) > number(start):
            raise step_too_small(self.count, number(self.clock.users(start)))
        stop = self.stops.before(number(start), number(end))
        # A stop stays where it is when the first time moves, and with it a jump of the velocity.
        return (end, None) if stop is None else (self._time(stop), stop)

    def _take(
        self, start: torch.Tensor, end: torch.Tensor, y: State, nexts: State, k: list[State], *, jumps: bool
    ) -> None:
        last = k[-1] if self.shares else self.clock.rate(self.clock.beside(end, BEFORE), nexts)
        self.last = Step(start, end, (y, nexts), (k[0], last), quartic_term(self.tableau, k))
        self.count += 1
        self.next_rate = self.clock.rate(self.clock.beside(end, AFTER), nexts) if jumps else last

    @torch.no_grad()
    def _norm(self, errors: State, heights: State) -> float:
        """Of the errors over atol + rtol height: NaN counts as infinite."""
        ratios = ratios_of(errors, heights, self.control.rtol, self.control.atol)
        norm = self.control.norm
        found = largest_mean(ratios) if norm is None else norm(self.clock.problem.structured(ratios))
        value = float(abs(found))  # of a tensor as of a number, without a copy on the default device
        return math.inf if math.isnan(value) else value

    def _factor(self, norm: float) -> float:
        """By how much the next step is larger than the one that was tried."""
        control = self.control
        least = float(control.dfactor) if norm >= 1 else 1.0
        if norm == 0:
            return float(control.ifactor)
        return min(float(control.ifactor), max(float(control.safety) / norm ** (1 / self.order), least))

    @torch.no_grad()
    def _first_size(self, start: torch.Tensor, y: State, rate: State) -> float:
        y, rate = _detached(y), _detached(rate)
        heights = [leaf.abs() for leaf in y]
        height, slope = self._norm(y, heights), self._norm(rate, heights)
        trial = 1e-6 if height < 1e-5 or slope < 1e-5 else 0.01 * height / slope
        if trial == 0:  # the slope is beyond the tolerances' numbers
            return trial
        dt = self._time(trial)
        second = self.clock.velocity(start + dt, combine(y, dt, [1.0], [rate]))
        change = self._norm([b - a for a, b in zip(rate, second, strict=True)], heights) / trial
        if math.isinf(change):  # the trial step leaves what the velocity is defined on
            return trial * 1e-3
        largest = max(slope, change)
        size = max(1e-6, trial * 1e-3) if largest <= 1e-15 else (0.01 / largest) ** (1 / self.order)
        return min(100 * trial, size)


def difference_of(tableau: ButcherTableau) -> list[float]:
    """The weights of the method less those of its embedded one."""
    assert tableau.b_error is not None, "adaptive methods only"
    return [b - other for b, other in zip(tableau.b, tableau.b_error, strict=True)]


def step_of(tableau: ButcherTableau, clock: Clock) -> Callable[[State, State, State], tuple[State, list[State]]]:
    """One step, from its ends and the state and the velocity at its start.

    It gives the next state and the velocities of the stages; those at the end are evaluated just before it.
    """
    weights = (tableau.b, difference_of(tableau), (tableau.interpolant or (0.0,))[:-1])
    wanted = needed(tableau, *(row for row in weights if row))

    def step(ends: State, y: State, rate: State) -> tuple[State, list[State]]:
        start, end = ends

        def node_time(t: torch.Tensor, dt: torch.Tensor, c: float) -> torch.Tensor:
            return clock.beside(end, BEFORE) if c == 1 else stage_time(t, dt, c)

        dt = end - start
        k = stages(tableau, clock.velocity, start, dt, y, wanted, rate, node_time)
        return combine(y, dt, tableau.b, k), k

    return step


def ratios_of(
    errors: Sequence[torch.Tensor], heights: State, rtol: list[Tolerance], atol: list[Tolerance]
) -> list[torch.Tensor]:
    """The errors over atol + rtol height, in float32 at least."""
    found = []
    for error, height, relative, absolute in zip(errors, heights, rtol, atol, strict=True):
        wide = torch.promote_types(error.dtype, torch.float32)
        weight = absolute + relative * height.detach().to(real_dtype(wide))
        found.append(torch.where(error == 0, 0.0, error.to(wide) / weight))  # atol may be 0 and the state as well
    return found


def largest_mean(ratios: State) -> torch.Tensor:
    """The largest root mean square; an empty tensor has none."""
    means = [ratio.abs().square().mean().sqrt() for ratio in ratios if ratio.numel()]
    return torch.stack([mean.to(means[0].dtype) for mean in means]).amax() if means else torch.zeros(())


def _detached(state: State) -> State:
    """Without gradients, and without the tangents of forward mode."""
    return [leaf.detach() for leaf in state]


def solution_at(steps: Adaptive) -> list[State]:
    """The state at every time."""
    clock = steps.clock
    found = [clock.problem.y]
    for t, value in zip(clock.t[1:], steps.values[1:], strict=True):
        tried, most = 0, int(steps.control.max_num_steps)
        while value > number(steps.last.end):
            if tried >= most:
                raise max_num_steps_used(most, number(clock.users(steps.last.end)))
            steps.advance()
            tried += 1
        found.append(steps.at(t))
    return found
