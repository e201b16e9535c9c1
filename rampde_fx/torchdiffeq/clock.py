"""Time that rises, whatever the direction of the user's; the velocity, the events and the callbacks in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from rampde_fx.runtime import ordered_times
from rampde_fx.solvers.adaptive_steps import refuse_unreadable
from rampde_fx.solvers.fixed_steps import raising
from rampde_fx.solvers.runge_kutta import State
from rampde_fx.solvers.statistics import Counter, SolveStatistics, statistics
from rampde_fx.torchdiffeq.problem import Problem
from rampde_fx.torchdiffeq.recomputation import Function, Recomputation

BEFORE, AFTER = -1, 1
Event = Callable[[torch.Tensor, State], torch.Tensor]


def number(t: torch.Tensor) -> float:
    """A 0-d tensor as a number."""
    return float(t.detach())


class Clock:
    """A problem whose times rise: s t, with the velocity s f(s t, y), for s = 1 or -1.

    Args:
        problem: In the user's direction of time.
        callbacks: The user's, by their names; they are given the user's times, and sizes that are positive.
        adjoint: Those of the backward, which then computes each step once more; None where autograd keeps every step.
        has_event: Whether an event function of the user's looks at the steps.

    Raises:
        TimeGridError: if the times are not finite and strictly monotone.
    """

    def __init__(
        self,
        problem: Problem,
        callbacks: dict[str, Any],
        adjoint: dict[str, Any] | None = None,
        *,
        has_event: bool = False,
    ) -> None:
        refuse_unreadable(
            [problem.t], "the times of an odeint", required="the same times for all", fix="leave t out of vmap"
        )
        self.problem, self.callbacks, self.adjoint = problem, callbacks, adjoint or {}
        is_called_back = has_event or bool(callbacks)
        self.recomputed = None if adjoint is None else Recomputation(problem.func, is_called_back=is_called_back)
        ordered_times.monotone(problem.t.detach().cpu())
        times = problem.t.tolist()
        self.sign = -1 if len(times) > 1 and times[0] > times[1] else 1
        self.t = problem.t * self.sign if self.sign < 0 else problem.t
        self.values = [self.sign * time for time in times]
        self.counted = Counter(raising(problem.checked))

    def statistics(self, accepted: int, rejected: int) -> SolveStatistics:
        """Those of a solve with so many steps, with the evaluations so far."""
        return statistics(self.problem.t.device, accepted, rejected, self.counted.count)

    def users(self, t: torch.Tensor) -> torch.Tensor:
        """A time as the user has it."""
        return t if self.sign > 0 else -t

    def velocity(self, t: torch.Tensor, y: State) -> State:
        """The derivative by the rising time."""
        rates = self.counted(self.users(t), y)
        return rates if self.sign > 0 else [-rate for rate in rates]

    def rate(self, t: torch.Tensor, y: State) -> State:
        """The velocity outside of a step."""
        if self.recomputed is None:
            return self.velocity(t, y)
        return self.recomputed(lambda time, state: self.velocity(time[0], state), [t], y)

    def step(self, function: Function, ends: State, y: State, *others: State) -> Any:
        """One step: a function of its ends, the state there and others, whose result begins with the next state.

        It must not hold a tensor that it has computed: what is computed once more is kept with what it computed first.
        """
        if self.recomputed is None:
            return function(ends, y, *others)
        return self.recomputed(function, ends, y, *others, then=self._taken_back if self.adjoint else None)

    @torch.no_grad()
    def _taken_back(self, states: list[State], found: Any) -> None:
        """A step was taken back, from its end to its start; none is rejected."""
        (start, end), (last, *_) = states[0], found
        for name in ("callback_step_adjoint", "callback_accept_step_adjoint"):
            if name in self.adjoint:
                self._tell(self.adjoint[name], end.detach(), [leaf.detach() for leaf in last], (end - start).detach())

    def beside(self, t: torch.Tensor, side: int) -> torch.Tensor:
        """The number next to a time, before or after it, in the dtype in which func is given it."""
        time = t.to(self.problem.dtype)
        return time + (_next(time.detach(), side) - time.detach())

    def event(self, event_fn: Callable[[torch.Tensor, Any], torch.Tensor]) -> Event:
        """The user's function of time and state, as one of the rising time and of a state as a list."""
        return lambda t, y: event_fn(self.users(t), self.problem.structured(y))

    def call(self, name: str, t: torch.Tensor, y: State, dt: torch.Tensor) -> None:
        """A callback of the user's, if there is one."""
        if name in self.callbacks:
            self._tell(self.callbacks[name], t, y, dt)

    def _tell(self, callback: Any, t: torch.Tensor, y: State, dt: torch.Tensor) -> None:
        callback(self.users(t), self.problem.structured(y), dt)


def _next(time: torch.Tensor, side: int) -> torch.Tensor:
    if time.dtype != torch.float16:
        return torch.nextafter(time, time + side)
    # torch has no nextafter of float16: a step of one unit in the last place of the larger neighbour.
    number = torch.finfo(time.dtype)
    return time + side * (number.eps * time.abs()).clamp(min=number.tiny * number.eps)
