"""The search for adaptive steps, as it is captured: one step that is tried again and again, and what it decides by."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch

from rampde_fx.frontend import marking
from rampde_fx.policy import PrecisionPolicy
from rampde_fx.runtime import operators, step_control
from rampde_fx.solvers.fixed_steps import CheckedVelocity, noting
from rampde_fx.solvers.runge_kutta import (
    NodeTime,
    State,
    Velocity,
    attempt,
    combine,
    just_inside,
    needed,
    quartic_term,
    real_dtype,
    stage_time,
    stages,
)
from rampde_fx.solvers.tableau import ButcherTableau

# A number that is positive up to an event, of a time and a state.
Positive = Callable[[torch.Tensor, State], torch.Tensor]
# A state within a step, of the share of the step and its size.
Within = Callable[[torch.Tensor, torch.Tensor], State]


class Asked(NamedTuple):
    """What is asked of a captured search besides its tolerances.

    Attributes:
        norm: Of errors, where the controller has none; it is evaluated wide.
        stops: Times at which steps end, in any order; those that are not between the first and the last one say
            nothing.
        jumps: Whether the velocity may jump at the ends of steps: then it is evaluated just inside of each step.
        event: What ends the steps where it is no longer positive; it is evaluated wide, too.
    """

    norm: step_control.Norm | None = None
    stops: torch.Tensor | None = None
    jumps: bool = False
    event: Positive | None = None

    def node_time(self, ends: torch.Tensor, dtype: torch.dtype) -> NodeTime | None:
        """The times of stages in a dtype, just inside of each step where the velocity may jump; None for all others."""
        if not self.jumps:
            return None
        number = torch.finfo(ends.dtype)
        return just_inside(4 * number.eps * ends.detach().abs().amax(), dtype)


def ends_among(t: torch.Tensor, stops: torch.Tensor) -> torch.Tensor:
    """The ends of intervals: the times t and the stops between them, in order; for each of the others the last time."""
    forward = torch.sign(t[-1] - t[0]).detach()
    first, times = t[0] * forward, t[1:] * forward
    last, given = times[-1], stops.detach().to(t).reshape(-1) * forward
    inside = (given > first) & (given < last)
    ordered = torch.sort(torch.cat([times, torch.where(inside, given, last)])).values
    again = torch.cat([torch.zeros_like(inside[:1]), ordered[1:] == ordered[:-1]])
    ordered = torch.sort(torch.where(again, last, ordered)).values
    return torch.cat([t[:1], ordered * forward])


def ends_without_last(t: torch.Tensor, stops: torch.Tensor | None) -> torch.Tensor:
    """The same of steps that only an event ends: behind the first time, and the stops, one unit of time more."""
    forward = torch.sign(t[-1] - t[0]).detach()
    if stops is None:
        return torch.stack([t[0], t[0] + forward])
    furthest = torch.maximum((stops.detach().to(t) * forward).amax(), (t[0] * forward).detach())
    last = t[0] + (furthest * forward + forward - t[0]).detach()
    return ends_among(torch.stack([t[0], last]), stops)


def intervals_before(ends: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """For each time but the first the interval that ends at it."""
    forward = torch.sign(t[-1] - t[0])
    return torch.searchsorted((ends * forward).detach(), (t[1:] * forward).detach().contiguous()) - 1


class Found(NamedTuple):
    """What a captured search found: what operators.leave_search gives."""

    intervals: torch.Tensor
    positions: torch.Tensor
    fractions: torch.Tensor
    count: torch.Tensor
    tried: torch.Tensor
    status: torch.Tensor
    reached: torch.Tensor


@torch.no_grad()
def searched_steps(
    tableau: ButcherTableau,
    velocity: CheckedVelocity,
    y: State,
    ends: torch.Tensor,
    controller: step_control.Controller,
    first_size: Any,
    policy: PrecisionPolicy | None,
    asked: Asked,
    *,
    interpolates: bool,
) -> tuple[Found, torch.Tensor]:
    """The search, captured, and its evaluations.

    It carries the velocity where that is the next step's first one, or is read at the end.
    """
    checked, problems = noting(velocity)
    marking.meet_loop(policy)
    start, times, numbers = [leaf.detach() for leaf in y], ends.detach(), controller.numbers(ends.device)
    jumping = asked.node_time(times, real_dtype(y[0].dtype))
    node_time = stage_time if jumping is None else jumping
    norm = asked.norm
    if norm is None:
        norm = partial(step_control.error_norm, controller=controller.with_numbers(numbers))
    rate = checked(node_time(times[0], times[1] - times[0], 0), start)
    size = first_size_of(checked, start, rate, times, norm, controller.order, first_size)
    if asked.event is not None:  # there may be no way to go
        size = torch.where(asked.event(times[0], start).reshape(()) == 0, -1.0, size)
    numbers = torch.cat([size[None].to(numbers.dtype), numbers])
    carries_rate = jumping is None and (tableau.fsal or interpolates)
    states = [*start, *rate] if carries_rate else start
    t_i, dt, *entered = operators.enter(times, size[None], states, marking.policy_in_force(policy))
    before, state = len(problems), entered[: len(y)]
    first = entered[len(y) :] if carries_rate else None
    nexts, k, errors = _stepped(tableau, checked, t_i, dt, state, first, node_time)
    last = k[-1] if tableau.fsal or not interpolates else checked(node_time(t_i, dt, 1), nexts)
    decisions = _decisions(asked, (errors, state, nexts), t_i, dt)
    collected = [*(leaf.clone() for leaf in k[0]), *quartic_term(tableau, k)] if interpolates else []
    if interpolates and jumping is not None:
        collected += [leaf.clone() for leaf in last]
    marking.loop_ends(once=True)
    # A velocity may return what stands outside of the loop.
    results = [*nexts, *(leaf.clone() for leaf in last)] if carries_rate else nexts
    order, most, rtol, atol = *controller[:2], known_tolerance(controller.rtol), known_tolerance(controller.atol)
    kind = f"adaptive steps of order {tableau.order}" if tableau.adaptive else "equal steps"
    method = f"{tableau.label}, {kind}{'' if asked.event is None else ' up to an event'}"
    each = len(problems) - before
    told = (len(errors), times, numbers, order, most, rtol, atol, asked.norm is not None, asked.event is not None)
    collected = [*errors, *decisions, *collected]
    found = Found(*operators.leave_search(states, results, collected, *told, method, each, max(problems)))
    return found, before + each * found.tried


def _stepped(
    tableau: ButcherTableau,
    velocity: Velocity,
    t: torch.Tensor,
    dt: torch.Tensor,
    y: State,
    first: State | None,
    node_time: NodeTime,
) -> tuple[State, list[State], State]:
    """What attempt gives; of a method without an embedded one there is no estimate of the error."""
    if tableau.adaptive:
        return attempt(tableau, velocity, t, dt, y, first, node_time)
    k = stages(tableau, velocity, t, dt, y, needed(tableau, tableau.b), first, node_time)
    return combine(y, dt, tableau.b, k), k, []


def _decisions(
    asked: Asked, of_error: tuple[State, State, State], t: torch.Tensor, dt: torch.Tensor
) -> list[torch.Tensor]:
    """The numbers that the search decides by beside the errors: values of the step, whatever they are read from."""
    found = [] if asked.norm is None else [asked.norm(*of_error)]
    if asked.event is not None:
        found.append(asked.event(t + dt, of_error[2]))
    return [number.reshape(()).clone() for number in found]


def first_size_of(
    velocity: Velocity,
    y: State,
    rate: State,
    t: torch.Tensor,
    norm: step_control.Norm,
    order: int,
    given: Any,
) -> torch.Tensor:
    """The size of the first step, NaN if the state or its velocity is not finite, or the size that is given is none."""
    with torch.no_grad():
        finite = torch.stack([leaf.isfinite().all() for leaf in (*y, *rate)]).all()
        if given is not None:
            number = step_control.scalar(given, t.device).to(t.dtype)
            return torch.where(finite & (number > 0), number, torch.nan)
        trial = step_control.trial_size(y, rate, norm)
        step = trial * torch.sign(t[-1] - t[0]).to(trial.dtype)
        second = velocity(t[0] + step.to(t.dtype), combine(y, step, [1.0], [rate]))
        size = step_control.first_step(y, rate, second, trial, norm, order).to(t.dtype)
        return torch.where(finite, size, torch.nan)


def known_tolerance(tolerance: Any) -> float:
    """A tolerance as a number: the least of several, NaN where a tensor holds one, whose value nobody asks for."""
    numbers = tolerance if isinstance(tolerance, list) else [tolerance]
    return math.nan if any(isinstance(number, torch.Tensor) for number in numbers) else min(numbers)
