"""What a call solves where it is not compiled, by the kind of its method."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from rampde_fx.errors import EventError, OptionError, TimeGridError
from rampde_fx.frontend import marking
from rampde_fx.solvers.fixed_steps import is_number
from rampde_fx.solvers.runge_kutta import State
from rampde_fx.solvers.statistics import SolveStatistics
from rampde_fx.torch_private import dynamo
from rampde_fx.torch_private.refusals import refuse
from rampde_fx.torchdiffeq.adams import Adams
from rampde_fx.torchdiffeq.adaptive import Adaptive, Control, Step, Stops, solution_at
from rampde_fx.torchdiffeq.clock import Clock, Event, number
from rampde_fx.torchdiffeq.grids import Scheme, grid_of, runge_kutta, solution_on
from rampde_fx.torchdiffeq.options import SCIPY, kind_of, tableau_of
from rampde_fx.torchdiffeq.problem import Problem, Tolerance
from rampde_fx.torchdiffeq.scipy_solver import solution_by_scipy
from rampde_fx.torchdiffeq.sign_changes import closest, combined, event_by_adaptive, event_on_grid


class Call(NamedTuple):
    """A call of odeint, its arguments checked.

    Attributes:
        problem: The function, the initial state and the times.
        method: A name of options.NAMES.
        options: Those that the method takes.
        callbacks: Those that it calls.
        rtol: Relative tolerances, one of each tensor of the state.
        atol: Absolute tolerances likewise.
        adjoint: The callbacks of a backward that computes each step once more; None where autograd keeps every step.
    """

    problem: Problem
    method: str
    options: dict[str, Any]
    callbacks: dict[str, Any]
    rtol: list[Tolerance]
    atol: list[Tolerance]
    adjoint: dict[str, Any] | None = None


@dynamo.never_compiled
def solution_now(call: Call) -> tuple[list[torch.Tensor], SolveStatistics]:
    """The states at the times, a tensor for each of the state's, and the statistics."""
    marking.meet_loop()
    clock = Clock(call.problem, call.callbacks, call.adjoint)
    kind = kind_of(call.method)
    if kind == "adaptive":
        steps = _adaptive(call, clock, ends=True)
        rows, counted = solution_at(steps), steps.statistics()
    elif kind == "scipy":
        rows, counted = solution_by_scipy(clock, call.rtol, call.atol, call.options), clock.statistics(0, 0)
    else:
        interp = call.options.get("interp", "linear")
        grid = grid_of(clock, call.options)
        rows, counted = solution_on(clock, _scheme(call, clock), grid, interp), clock.statistics(len(grid) - 1, 0)
    return [torch.stack(values) for values in zip(*rows, strict=True)], counted


@dynamo.never_compiled
def event_now(call: Call, event_fn: Any) -> tuple[torch.Tensor, list[torch.Tensor], SolveStatistics]:
    """The time of the event, without a gradient, the states at the first time and at that time, the statistics."""
    marking.meet_loop()
    clock = Clock(call.problem, call.callbacks, call.adjoint, has_event=True)
    event = combined(clock.event(event_fn), clock.t[0], call.problem.y)
    kind = kind_of(call.method)
    if kind == "scipy":
        raise EventError(
            f'event_fn beside method="{SCIPY}"', required="steps that can be looked at", fix='take "dopri5"'
        )
    if kind == "adaptive":
        steps = _adaptive(call, clock, ends=False)
        (time, state), counted = event_by_adaptive(steps, event, closest(call.atol)), steps.statistics()
    else:
        time, state, count = _event_on_grid(call, clock, event)
        counted = clock.statistics(count, 0)
    both = zip(call.problem.y, state, strict=True)
    return clock.users(time.detach()).to(call.problem.t), [torch.stack(ends) for ends in both], counted


def size_of_event_steps(call: Call) -> Any:
    """The size of the fixed steps that lead to an event."""
    size = call.options.get("step_size")
    if size is None or (is_number(size) and size == 0):
        refuse(
            OptionError,
            f"event_fn beside {call.method} without a step_size",
            required="a size of the steps that lead to the event",
            fix='write options={"step_size": 0.01}',
        )
    return size


def _event_on_grid(call: Call, clock: Clock, event: Event) -> tuple[torch.Tensor, State, int]:
    size, interp = size_of_event_steps(call), call.options.get("interp", "linear")
    return event_on_grid(clock, _scheme(call, clock), size, interp, event, closest(call.atol))


def _adaptive(call: Call, clock: Clock, *, ends: bool) -> Adaptive:
    dtype = torch.promote_types(call.options.get("dtype", torch.float64), call.problem.dtype)
    names = [name for name in Control._fields if name in call.options]
    control = Control(call.rtol, call.atol, **{name: call.options[name] for name in names})
    stops = Stops(clock, call.options, clock.t[-1].to(dtype).item() if ends else None, dtype)
    return Adaptive(tableau_of(call.method), clock, control, stops, dtype)


def _scheme(call: Call, clock: Clock) -> Scheme:
    if kind_of(call.method) == "fixed":
        return runge_kutta(tableau_of(call.method), clock, perturb=bool(call.options.get("perturb")))
    implicit = call.method != "explicit_adams" and bool(call.options.get("implicit", True))
    return Adams(clock, (call.rtol, call.atol), implicit=implicit, options=call.options)


@dynamo.never_compiled
def dense_now(call: Call) -> Callable[[torch.Tensor], Any]:
    """The solution as a function of the time."""
    marking.meet_loop()
    clock = Clock(call.problem, call.callbacks)
    steps = _adaptive(call, clock, ends=True)
    taken: list[Step] = []
    while number(steps.last.end) < steps.values[-1]:
        if steps.advance():
            taken.append(steps.last)
    ends = [number(step.end) for step in taken]

    def at(t: torch.Tensor) -> State:
        time = clock.users(t)
        if not steps.values[0] <= number(time) <= steps.values[-1]:
            raise TimeGridError(
                f"a dense solution was asked for t = {number(t):g}",
                required=f"times between {call.problem.t[0]:g} and {call.problem.t[-1]:g}",
                fix="solve up to this time",
            )
        return steps.within(taken[bisect_left(ends, number(time))], time)

    def solution(t: torch.Tensor) -> Any:
        rows = [at(time) for time in t.reshape(-1)]
        stacks = (torch.stack(values) for values in zip(*rows, strict=True))
        return call.problem.structured(values.reshape(*t.shape, *values.shape[1:]) for values in stacks)

    return dynamo.never_compiled(solution)
