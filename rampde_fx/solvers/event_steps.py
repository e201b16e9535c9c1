"""Steps up to an event, as they are captured: a search that the event ends, and the time of the event in its last step.

The steps that the search finds are those of a loop, which has the adjoint. The event is located by halving the last
step, on what interpolates it. So the time is a constant, and the state then has the derivative at a fixed time.
"""

from __future__ import annotations

from typing import Any

import torch

from rampde_fx.runtime import kept_steps, operators, step_control
from rampde_fx.solvers.fixed_steps import CheckedVelocity, captured_collecting, captured_once
from rampde_fx.solvers.runge_kutta import (
    State,
    combine,
    evaluations_collecting,
    evaluations_of,
    interpolate,
    real_dtype,
    stage_time,
)
from rampde_fx.solvers.search import Asked, Positive, Within, ends_without_last, searched_steps
from rampde_fx.solvers.statistics import SolveStatistics, statistics
from rampde_fx.solvers.tableau import ButcherTableau
from rampde_fx.torch_private import dynamo


def until_event(
    tableau: ButcherTableau,
    velocity: CheckedVelocity,
    y: State,
    t: torch.Tensor,
    controller: step_control.Controller,
    first_size: Any,
    asked: Asked,
    tolerance: torch.Tensor,
    *,
    linear: bool = False,
) -> tuple[torch.Tensor, State, SolveStatistics]:
    """The time of an event, without a gradient, the state then, the statistics.

    Args:
        tableau: The method; one without an embedded method takes steps of the controller's min_step.
        velocity: The velocity.
        y: The initial state.
        t: The first time, and one that says the direction.
        controller: What the sizes of steps follow from.
        first_size: Of the first step, None for one that follows from the velocity.
        asked: With the event.
        tolerance: How closely the time is found, as far as times resolve it.
        linear: Whether a step is interpolated linearly, instead of by the method's own interpolant.
    """
    ends = ends_without_last(t, asked.stops)
    found, searched = searched_steps(
        tableau, velocity, y, ends, controller, first_size, None, asked, interpolates=not linear
    )
    # What raises stands outside of the search: a compiled no_grad would stay on.
    count = operators.found(found.count, found.status, found.reached)
    last = (count - 1).clamp(min=0)
    with dynamo.capturing_scalars():
        steps = int((last + 1 if linear else count + 1).item())
    torch._check(steps >= 1)
    torch._check(steps <= controller.max_steps + 1)
    each = (found.intervals, found.positions, found.fractions)
    starts, sizes = step_control.place(ends, *(values.narrow(0, 0, steps) for values in each))
    start, size = _row(starts, last), _row(sizes, last)
    if not linear:  # one more step, of size 0, has the velocity at the end
        starts = torch.where(torch.arange(steps, device=t.device) == count, start + size, starts)
    within, again = _last_step(tableau, velocity, y, (starts, sizes, steps), (last, count), asked, found.tried, linear)
    evaluations = kept_steps.evaluations(found.tried, searched, torch.zeros_like(found.tried) + steps * again)

    def at(time: torch.Tensor) -> State:
        return within((time - start) / torch.where(size == 0, 1.0, size), size)

    assert asked.event is not None, "it ends at one"
    time = _located(asked.event, (start.detach(), (start + size).detach()), at, tolerance)
    state = at(time)
    if t.requires_grad:  # of a solution that ends where it begins, a later start is one from a state that is further on
        rates, _ = velocity(t[0], y)
        state = combine(state, torch.where(found.count == 0, time - start, 0.0), [1.0], [rates])
        evaluations = evaluations + 1
    return time, state, statistics(t.device, found.count, found.tried - found.count, evaluations)


def _last_step(
    tableau: ButcherTableau,
    velocity: CheckedVelocity,
    y: State,
    grid: tuple[torch.Tensor, torch.Tensor, int],
    rows: tuple[torch.Tensor, torch.Tensor],
    asked: Asked,
    search: torch.Tensor,
    linear: bool,
) -> tuple[Within, int]:
    """The state within the last step, as a function of the share of the step and its size; evaluations of each step.

    The loop runs over the starts and sizes of the steps; rows are those of the start and the end of the last one.
    """
    (starts, sizes, steps), (first, end), dtype = grid, rows, real_dtype(y[0].dtype)
    node_time = asked.node_time(starts, dtype)
    method = f"{tableau.label}, {'found' if tableau.adaptive else 'equal'} steps up to an event"
    if linear:
        times = stage_time if node_time is None else node_time
        on_grid = captured_once(tableau, velocity, y, starts, sizes, steps + 1, 1, None, method, search, times)
        pairs = [(_row(values, first), _row(values, first + 1)) for values in on_grid]
        return lambda share, size: [a + share.to(dtype) * (b - a) for a, b in pairs], evaluations_of(tableau)
    found = captured_collecting(tableau, velocity, y, starts, sizes, steps, None, method, search, node_time)
    ends = [(_row(values, first), _row(values, end)) for values in found.states]
    at_end = [(rate, first) for rate in found.end_rates] or [(rate, end) for rate in found.rates]
    rates = [(_row(rate, first), _row(last, row)) for rate, (last, row) in zip(found.rates, at_end, strict=True)]
    quartics = [_row(values, first) for values in found.quartics] or [None] * len(y)

    def within(share: torch.Tensor, size: torch.Tensor) -> State:
        pieces = zip(ends, rates, quartics, strict=True)
        return [interpolate(tableau, share.to(dtype), size.to(dtype), *piece) for piece in pieces]

    return within, evaluations_collecting(tableau, at_end=node_time is not None)


def _row(values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """The entry at a 0-d index, whose number nobody asks for."""
    return values[index.reshape(1)][0]


@torch.no_grad()
def _located(
    event: Positive, ends: tuple[torch.Tensor, torch.Tensor], at: Any, tolerance: torch.Tensor
) -> torch.Tensor:
    """The time within a step from which on the event function is not positive, by halving the step."""
    left, right = ends
    resolved = torch.maximum(
        tolerance.to(left.dtype), torch.finfo(left.dtype).eps * torch.maximum(*map(torch.abs, ends))
    )

    def wide(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return (right - left).abs() > resolved

    def halved(left: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        middle = (left + right) / 2
        before = event(middle, at(middle)).reshape(()) > 0
        return torch.where(before, middle, left), torch.where(before, right, middle)

    left, right = dynamo.while_loop(wide, halved, (left.clone(), right.clone()))
    return (left + right) / 2
