"""Fixed steps on a grid: the solution at the times, between the steps by interpolation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import torch

from rampde_fx.errors import OptionError, TimeGridError
from rampde_fx.solvers.runge_kutta import State, combine, interpolate, needed, stage_time, stages
from rampde_fx.solvers.tableau import ButcherTableau
from rampde_fx.torchdiffeq.clock import AFTER, BEFORE, Clock

INTERPOLATIONS = ("linear", "cubic")


class Step(NamedTuple):
    """One step that was taken.

    Attributes:
        start: Its time, 0-d.
        end: Likewise.
        before: The state at its start.
        after: The state at its end.
        rate: The velocity at its start.
    """

    start: torch.Tensor
    end: torch.Tensor
    before: State
    after: State
    rate: State


# From the start, the end, and the state: the next state, and the velocity at the start.
Scheme = Callable[[torch.Tensor, torch.Tensor, State], tuple[State, State]]


def runge_kutta(tableau: ButcherTableau, clock: Clock, *, perturb: bool) -> Scheme:
    """One step of a method; with perturb the stages at its ends are evaluated just inside of it."""
    wanted = needed(tableau, tableau.b)

    def advance(ends: State, y: State) -> tuple[State, State]:
        start, end = ends

        def node_time(t: torch.Tensor, dt: torch.Tensor, c: float) -> torch.Tensor:
            if c in (0, 1) and perturb:
                return clock.beside(*((start, AFTER) if c == 0 else (end, BEFORE)))
            return end if c == 1 else stage_time(t, dt, c)

        dt = end - start
        k = stages(tableau, clock.velocity, start, dt, y, wanted, node_time=node_time)
        return combine(y, dt, tableau.b, k), k[0]

    return lambda start, end, y: clock.step(advance, [start, end], y)


def grid_of(clock: Clock, options: dict[str, Any]) -> torch.Tensor:
    """The rising ends of all steps.

    Raises:
        TimeGridError: if the user's grid does not rise from the first time to the last.
    """
    if (constructor := options.get("grid_constructor")) is not None:
        problem = clock.problem
        grid = constructor(problem.func, problem.structured(problem.y), problem.t)
        grid = clock.users(grid.to(problem.t.device))
        values = grid.tolist()
        rising = all(a < b for a, b in pairwise(values))
        if not rising or (values[0], values[-1]) != (clock.values[0], clock.values[-1]):
            raise TimeGridError(
                f"grid_constructor gives {len(values)} times from {values[0]:g} to {values[-1]:g}",
                required="times that are strictly monotone, the first and the last one those of t",
                fix="begin with t[0] and end with t[-1]",
            )
        return grid
    if (size := options.get("step_size")) is None:
        return clock.t
    t = clock.t
    count = int(torch.ceil((t[-1] - t[0]).detach() / _positive(size)))
    inner = t[0] + torch.arange(count, dtype=t.dtype, device=t.device) * size
    return torch.cat([inner[inner < t[-1]], t[-1:]])


def _positive(size: Any) -> Any:
    if not size > 0:
        raise OptionError(
            f'options={{"step_size": {size!r}}}',
            required="a positive number, in the unit of t",
            fix="give the magnitude; t says whether time runs backward",
        )
    return size


def solution_on(clock: Clock, scheme: Scheme, grid: torch.Tensor, interp: str) -> list[State]:
    """The state at every time."""
    found, ahead = [clock.problem.y], 1
    for step, end in zip(_steps(clock, scheme, grid), grid.tolist()[1:], strict=True):
        between = None
        while ahead < len(clock.values) and end >= clock.values[ahead]:
            between = between or within(clock, step, interp)
            found.append(between(clock.t[ahead]))
            ahead += 1
    return found


def _steps(clock: Clock, scheme: Scheme, grid: torch.Tensor) -> Iterator[Step]:
    y = clock.problem.y
    for start, end in pairwise(grid):
        clock.call("callback_step", start, y, end - start)
        nexts, rate = scheme(start, end, y)
        yield Step(start, end, y, nexts, rate)
        y = nexts


def equal_steps(clock: Clock, scheme: Scheme, size: Any) -> Iterator[Step]:
    """Steps of one size from the first time on, without an end."""
    y, start = clock.problem.y, clock.t[0].to(clock.problem.dtype)
    while True:
        end = start + _positive(size)
        nexts, rate = scheme(start, end, y)
        yield Step(start, end, y, nexts, rate)
        y, start = nexts, end


def within(clock: Clock, step: Step, interp: str) -> Callable[[torch.Tensor], State]:
    """The solution as a function of the time within a step.

    Raises:
        OptionError: if there is no such interpolation.
    """
    if interp not in INTERPOLATIONS:
        raise OptionError(
            f'options={{"interp": {interp!r}}}', required="one of linear, cubic", fix='write {"interp": "cubic"}'
        )
    size = step.end - step.start
    last = clock.rate(step.end, step.after) if interp == "cubic" else []

    def linear(t: torch.Tensor) -> State:
        rest = (step.end - t) / size  # from the end, so that the state there is met without rounding
        return [b - rest.to(clock.problem.dtype) * (b - a) for a, b in zip(step.before, step.after, strict=True)]

    def cubic(t: torch.Tensor) -> State:
        share, length = (x.to(clock.problem.dtype) for x in ((t - step.start) / size, size))
        rows = zip(step.before, step.after, step.rate, last, strict=True)
        return [interpolate(None, share, length, (a, b), (f, g), None) for a, b, f, g in rows]

    return linear if interp == "linear" else cubic
