"""Adaptive steps: how large the next one is, and whether the last one counts. Plain torch code on 0-d tensors.

It runs as it stands in an uncompiled odeint, and inside the while loop that the backend emits for a compiled one. A
step never passes the end of an interval: of the one from the first time to the last where the method interpolates,
otherwise of that between two output times. Its place is a fraction of the interval, and the fractions are constants of
the derivative. So the times' gradients are those of the steps that were taken.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

RUNNING, DONE, TOO_MANY_STEPS, STEP_TOO_SMALL, NOT_FINITE, NOT_MET, EVENT_IS_NAN = range(7)
# How far a step may be stretched so that no sliver is left before the end of an interval.
STRETCH = 1.01
ROUNDED = 1 + 1e-9  # the same of a step that is as large as it may be: what rounding leaves over
OTHERS = 5  # numbers of a Controller behind its tolerances


# Of an error, relative to the states before and after the step.
Norm = Callable[[Sequence[torch.Tensor], Sequence[torch.Tensor], Sequence[torch.Tensor]], torch.Tensor]


class Controller(NamedTuple):
    """The controller of the step size.

    A step counts if r, the norm of its error estimate, weighted by atol + rtol |y|, is at most 1. The next one is
    larger by safety * r^(-1 / q), which aims at r = safety^q. If r has grown from r' of the step before, it is larger
    by safety^0.65 * r^(-0.85 / q) * r'^(0.2 / q), which aims at the same, and foresees that r goes on growing: fewer
    steps are rejected.

    Args:
        order: q, the order of the error estimate in the step size.
        max_steps: The most steps that may count; four times as many may be tried.
        rtol: Relative tolerance. Like all that follow a number, or a 0-d tensor: then its value may change from call to
            call of one compilation. Of tolerances there may be a list, one for each tensor of the state.
        atol: Absolute tolerance, a list where rtol is one.
        safety: Factor below 1.
        ifactor: The most that a step may be larger than the one before.
        dfactor: The least that it may be of the one before.
        min_step: A step of this size or less counts, whatever its error; none is smaller but at the end of an interval.
        max_step: No step is larger.
        own_norm: Whether the step itself gives the norm of its error.
        until_event: Whether the steps end where a number that the step gives is no longer positive, and not before.

    Source: K. Gustafsson, ACM Transactions on Mathematical Software 17, 1991, 533-554, doi 10.1145/210232.210242;
        Hairer and Wanner, Solving Ordinary Differential Equations II, 1996, section IV.2. The exponents are those of
        their program DOPRI5, beta = 0.2 / q.
    """

    order: int
    max_steps: int
    rtol: Any
    atol: Any
    safety: Any = 0.9
    ifactor: Any = 10.0
    dfactor: Any = 0.2
    min_step: Any = 0.0
    max_step: Any = math.inf
    own_norm: bool = False
    until_event: bool = False

    def numbers(self, device: torch.device) -> torch.Tensor:
        """What may change from call to call, as one float64 tensor: tolerances and those of a step."""
        tolerances = [*self.rtol, *self.atol] if isinstance(self.rtol, list) else [self.rtol, self.atol]
        values = [*tolerances, self.safety, self.ifactor, self.dfactor, self.min_step, self.max_step]
        return torch.stack([scalar(value, device) for value in values])

    def with_numbers(self, numbers: torch.Tensor) -> Controller:
        """The controller with these numbers instead of its own."""
        each = [numbers[i] for i in range(numbers.shape[0])]
        count = (len(each) - OTHERS) // 2
        rtol, atol = each[:count], each[count : 2 * count]
        tolerances = (rtol[0], atol[0]) if count == 1 else (rtol, atol)
        safety, ifactor, dfactor, min_step, max_step = each[2 * count :]
        own = (safety, ifactor, dfactor, min_step, max_step, self.own_norm, self.until_event)
        return Controller(self.order, self.max_steps, tolerances[0], tolerances[1], *own)

    @property
    def decisions(self) -> int:
        """How many numbers a step gives, behind the estimates of its error, that nothing but the control reads."""
        return self.own_norm + self.until_event

    def of_tensor(self, index: int) -> tuple[Any, Any]:
        """The tolerances of one of the state's tensors."""
        return (self.rtol[index], self.atol[index]) if isinstance(self.rtol, list) else (self.rtol, self.atol)


def scalar(value: float | torch.SymFloat, device: torch.device) -> torch.Tensor:
    """A number as a 0-d float64 tensor: a sum, for AOTAutograd makes tensors of symbolic numbers in sums."""
    return torch.zeros((), dtype=torch.float64, device=device) + value


class Search(NamedTuple):
    """The steps so far. All are 0-d tensors but the last three, for the steps that count, of shape (max_steps + 1,).

    Attributes:
        interval: Index of the interval's end that the next step starts from, or has passed.
        position: Where in the interval the next step starts, from 0 to 1.
        size: Proposed size of the next step, positive.
        previous: Norm of the error of the last step that counted.
        rejected: Whether the last step did not count.
        status: RUNNING, DONE, TOO_MANY_STEPS, STEP_TOO_SMALL or NOT_FINITE.
        count: Number of steps that count.
        tried: Number of steps in all.
        intervals: The interval of each step.
        positions: Where in its interval each step starts.
        fractions: The size of each step as a fraction of its interval.
    """

    interval: torch.Tensor
    position: torch.Tensor
    size: torch.Tensor
    previous: torch.Tensor
    rejected: torch.Tensor
    status: torch.Tensor
    count: torch.Tensor
    tried: torch.Tensor
    intervals: torch.Tensor
    positions: torch.Tensor
    fractions: torch.Tensor


class Trial(NamedTuple):
    """One step to be tried; all are 0-d tensors.

    Attributes:
        t: Its start, differentiable in the times.
        dt: Its size, differentiable in the times.
        fraction: Its size as a fraction of its interval.
        ends_interval: Whether it ends at the end of its interval.
        smallest: Whether t resolves no smaller one.
        least: Whether it is no larger than min_step, and counts whatever its error.
    """

    t: torch.Tensor
    dt: torch.Tensor
    fraction: torch.Tensor
    ends_interval: torch.Tensor
    smallest: torch.Tensor
    least: torch.Tensor


def begin(t: torch.Tensor, first_step: torch.Tensor, max_steps: int) -> Search:
    """Before the first step: first_step is its size, positive.

    It is NaN where there is no finite velocity to start with, and negative where no step is asked for.
    """
    usable = first_step.isfinite() & t.isfinite().all()
    index = torch.zeros((), dtype=torch.int64, device=t.device)
    number = torch.zeros((), dtype=t.dtype, device=t.device)
    return Search(
        interval=index.clone(),
        position=number.clone(),
        size=first_step.to(t.dtype).clone(),
        previous=torch.ones_like(number),
        rejected=torch.zeros_like(index, dtype=torch.bool),
        status=torch.where(usable, torch.where(first_step < 0, DONE, RUNNING), torch.full_like(index, NOT_FINITE)),
        count=index.clone(),
        tried=index.clone(),
        intervals=torch.zeros(max_steps + 1, dtype=torch.int64, device=t.device),
        positions=torch.zeros(max_steps + 1, dtype=t.dtype, device=t.device),
        fractions=torch.zeros(max_steps + 1, dtype=t.dtype, device=t.device),
    )


def place(
    t: torch.Tensor, interval: torch.Tensor, position: torch.Tensor, fraction: torch.Tensor
) -> list[torch.Tensor]:
    """Starts and sizes of steps from their fractions, differentiable in t."""
    left = t.index_select(0, interval.reshape(-1)).reshape(interval.shape)
    length = t.index_select(0, interval.reshape(-1) + 1).reshape(interval.shape) - left
    return [left + position * length, fraction * length]


def reached(t: torch.Tensor, search: Search) -> torch.Tensor:
    """The time up to which the steps that count lead."""
    end = t.index_select(0, search.interval.reshape(1)).reshape(())
    _, passed = place(t, search.interval.clamp(max=t.shape[0] - 2), search.position, search.position)
    return end + passed


def propose(t: torch.Tensor, search: Search, controller: Controller) -> Trial:
    """The next step to be tried: as large as proposed and as t resolves, or up to the end of the interval.

    The last interval has no end where an event ends the steps.
    """
    left, length = place(t, search.interval, torch.zeros_like(search.position), torch.ones_like(search.position))
    start, rest = left + search.position * length, 1 - search.position
    least = _resolution(start.detach(), search.position * length.detach())
    span = length.detach().abs()
    low, high = controller.min_step.to(t.dtype), controller.max_step.to(t.dtype)
    size = torch.minimum(torch.maximum(search.size, low), high)
    fraction = torch.maximum(size, least) / span
    ends = (fraction * STRETCH >= rest) & (rest * span <= high * ROUNDED)
    if controller.until_event:
        ends = ends & ~_is_last(t, search.interval + 1)
    size = torch.where(ends, rest * span, size)
    # As the positions are rounded, so that the steps add up to the interval.
    fraction = torch.where(ends, rest, (search.position + fraction) - search.position)
    return Trial(start, fraction * length, fraction, ends, search.size <= least, size <= low)


def _is_last(t: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Whether an entry of t is its last time, which may stand there several times."""
    return t.index_select(0, index.reshape(1)).reshape(()) == t[-1]


def _resolution(t: torch.Tensor, passed: torch.Tensor) -> torch.Tensor:
    """The least step that moves both t and the position in the interval, of which so much has passed."""
    number = torch.finfo(t.dtype)
    return (number.eps * torch.maximum(t.abs(), passed.abs())).clamp(min=number.tiny / number.eps)


def error_norm(
    errors: Sequence[torch.Tensor],
    before: Sequence[torch.Tensor],
    after: Sequence[torch.Tensor],
    controller: Controller,
) -> torch.Tensor:
    """The largest root mean square, over the tensors of the state, of the error over atol + rtol max(|y|, |y'|)."""
    norms = [
        _norm(error.abs(), torch.maximum(y.abs(), y_next.abs()), *controller.of_tensor(i))
        for i, (error, y, y_next) in enumerate(zip(errors, before, after, strict=True))
        if error.numel()
    ]
    if not norms:
        return torch.zeros((), device=errors[0].device)  # no entry, no error
    return torch.stack([norm.to(norms[0].dtype) for norm in norms]).amax()


def _norm(error: torch.Tensor, height: torch.Tensor, rtol: torch.Tensor, atol: torch.Tensor) -> torch.Tensor:
    """The root mean square of the error over atol + rtol height, in float32 at least, without an overflow."""
    dtype = torch.promote_types(error.dtype, torch.float32)
    rtol, atol = rtol.to(dtype), atol.to(dtype)
    weight = atol + rtol * height.to(dtype)
    ratio = torch.where(error == 0, 0.0, error.to(dtype) / weight)  # atol may be 0 and the state as well
    ratio = torch.where(weight.isfinite(), ratio, torch.inf)
    largest = ratio.abs().amax()
    unit = torch.where((largest > 0) & largest.isfinite(), largest, 1.0)
    return unit * (ratio / unit).square().mean().sqrt()


def judged(
    t: torch.Tensor,
    search: Search,
    trial: Trial,
    told: Sequence[torch.Tensor],
    states: tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]],
    controller: Controller,
) -> tuple[torch.Tensor, Search]:
    """The same of what a step gives: the estimates of its error, then the controller's decisions.

    It led from one of the states to the other.
    """
    errors, decisions = told[: len(told) - controller.decisions], told[len(told) - controller.decisions :]
    before, after = (state[: len(errors)] for state in states)
    norm = decisions[0] if controller.own_norm else error_norm(errors, before, after, controller)
    return judge(t, search, trial, norm, controller, decisions[-1] if controller.until_event else None)


def judge(
    t: torch.Tensor,
    search: Search,
    trial: Trial,
    norm: torch.Tensor,
    controller: Controller,
    event: torch.Tensor | None = None,
) -> tuple[torch.Tensor, Search]:
    """Whether a step that was tried counts (a 0-d bool), and what follows; event is positive before the event."""
    norm = torch.where(norm.isfinite(), norm, float("inf")).to(search.size.dtype)
    counts = (norm <= 1) | trial.least
    # A step that is rounded up must not be proposed again when it does not count.
    used = torch.where(counts, trial.dt.abs(), torch.minimum(trial.dt.abs(), search.size))
    size = used * _factor(norm, search, controller)
    # A step that was cut at the end of an interval says nothing against the size that had been proposed.
    size = torch.where(counts & trial.ends_interval, torch.maximum(size, search.size), size)
    here = (torch.arange(controller.max_steps + 1, device=t.device) == search.count) & counts
    ended = counts & trial.ends_interval
    interval, count = search.interval + ended, search.count + counts
    tried = search.tried + 1
    too_small = ~counts & trial.smallest
    too_many = (count >= controller.max_steps) | (tried >= 4 * controller.max_steps)
    status = torch.where(too_many, TOO_MANY_STEPS if event is None else NOT_MET, search.status)
    status = torch.where(too_small, STEP_TOO_SMALL, status)
    if event is None:
        status = torch.where(_is_last(t, interval), DONE, status)
    else:
        status = torch.where(counts & ~(event > 0), torch.where(event.isnan(), EVENT_IS_NAN, DONE), status)
    position = torch.where(ended, 0.0, search.position + trial.fraction)
    return counts, Search(
        interval=interval,
        position=torch.where(counts, position, search.position),
        size=size,
        previous=torch.where(counts, norm.clamp(min=1e-4), search.previous),
        rejected=~counts,
        status=status,
        count=count,
        tried=tried,
        intervals=torch.where(here, search.interval, search.intervals),
        positions=torch.where(here, search.position, search.positions),
        fractions=torch.where(here, trial.fraction, search.fractions),
    )


def _factor(norm: torch.Tensor, search: Search, controller: Controller) -> torch.Tensor:
    q = controller.order
    safety, most, least = (x.to(norm.dtype) for x in (controller.safety, controller.ifactor, controller.dfactor))
    damped = safety**0.65 * norm ** (-0.85 / q) * search.previous ** (0.2 / q)
    grows = (norm > search.previous) & (norm <= 1)
    most = torch.where((norm > 1) | search.rejected, 1.0, most)
    factor = torch.where(grows, damped, safety * norm ** (-1 / q))
    return torch.maximum(torch.minimum(factor, most), least)


def first_step(
    start: Sequence[torch.Tensor],
    rate: Sequence[torch.Tensor],
    second: Sequence[torch.Tensor],
    trial: torch.Tensor,
    norm: Norm,
    order: int,
) -> torch.Tensor:
    """A size for the first step, from the velocities at the start and after an Euler step of the trial size.

    Source: Hairer, Norsett and Wanner, Solving Ordinary Differential Equations I, 1993, section II.4.
    """
    slope = norm(rate, start, start)
    change = norm([b - a for a, b in zip(rate, second, strict=True)], start, start) / trial
    largest = torch.maximum(slope, change)
    size = torch.where(largest <= 1e-15, (trial * 1e-3).clamp(min=1e-6), (0.01 / largest) ** (1 / order))
    # The Euler step may leave what the velocity is defined on, or be lost in the resolution of the state.
    return torch.where(change.isfinite(), torch.minimum(100 * trial, size), trial * 1e-3)


def trial_size(start: Sequence[torch.Tensor], rate: Sequence[torch.Tensor], norm: Norm) -> torch.Tensor:
    """The size of the Euler step that first_step looks at."""
    height, slope = (norm(values, start, start) for values in (start, rate))
    return torch.where((height < 1e-5) | (slope < 1e-5), 1e-6, 0.01 * height / slope)
