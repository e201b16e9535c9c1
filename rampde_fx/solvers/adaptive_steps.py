"""Adaptive steps: the states at every output time, by steps of a size that the error estimate allows.

Steps do not end at output times where the method interpolates: its interpolant gives the states between the ends of the
steps that count. It is plain torch code on what these steps collect, so that autograd differentiates it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from rampde_fx.errors import OptionError, TransformError, UncompiledError
from rampde_fx.frontend import marking
from rampde_fx.policy import PrecisionPolicy
from rampde_fx.runtime import kept_steps, operators, step_control
from rampde_fx.solvers.fixed_steps import (
    FIXED_OPTIONS,
    CheckedVelocity,
    Collected,
    captured_collecting,
    captured_once,
    is_captured,
    is_number,
    per_time,
    raising,
)
from rampde_fx.solvers.runge_kutta import (
    State,
    Velocity,
    attempt,
    evaluations_collecting,
    evaluations_of,
    interpolate,
    quartic_term,
    real_dtype,
    stage_time,
)
from rampde_fx.solvers.search import Asked, ends_among, first_size_of, intervals_before, searched_steps
from rampde_fx.solvers.statistics import Counter, SolveStatistics, statistics
from rampde_fx.solvers.tableau import ButcherTableau
from rampde_fx.torch_private import callers, dynamo
from rampde_fx.torch_private.refusals import refuse, shown

ADAPTIVE_OPTIONS = ("first_step", "max_steps", "safety", "ifactor", "dfactor", "status")
MAX_STEPS = 4096


class _Steps(NamedTuple):
    """The steps that count, in order, and what the solution between their ends asks for.

    Attributes:
        starts: When each begins, and the last one ends; differentiable in the times like sizes.
        sizes: Their sizes, and one more entry.
        collected: What the steps collect, one row more than steps count.
    """

    starts: torch.Tensor
    sizes: torch.Tensor
    collected: Collected


class _Solved(NamedTuple):
    """The states at every time but the first, the status of the search, the time that was reached, the statistics."""

    states: list[torch.Tensor]
    status: torch.Tensor
    reached: torch.Tensor
    counted: SolveStatistics


def adaptive_steps(
    tableau: ButcherTableau,
    velocity: CheckedVelocity,
    y: State,
    t: torch.Tensor,
    controller: step_control.Controller,
    first_size: float | None,
    policy: PrecisionPolicy | None,
    *,
    raises: bool,
    asked: Asked = Asked(),  # noqa: B008
) -> tuple[list[torch.Tensor], torch.Tensor, SolveStatistics]:
    """The states at every t, the status of the search, its statistics; steps end where the method does not interpolate.

    Where it does not raise, the states at times that were not reached are NaN. What is asked besides is asked of what
    is captured alone.
    """
    ends = torch.stack([t[0], t[-1]]) if tableau.interpolates else t
    if not is_captured():
        found, status, reached, counted = _adapt_now(
            tableau, raising(velocity), y, t, ends, controller, first_size, policy, raises
        )
    else:
        found, status, reached, counted = _adapt_later(
            tableau, velocity, y, t, ends, controller, first_size, policy, raises, asked
        )
    if not raises:
        late = (t[1:].detach() - reached) * torch.sign(t[-1] - t[0]).detach() > 0
        found = [torch.where(per_time(late, values), torch.nan, values) for values in found]
    return [torch.cat([value[None], values]) for value, values in zip(y, found, strict=True)], status, counted


def _adapt_later(
    tableau: ButcherTableau,
    velocity: CheckedVelocity,
    y: State,
    t: torch.Tensor,
    ends: torch.Tensor,
    controller: step_control.Controller,
    first_size: float | None,
    policy: PrecisionPolicy | None,
    raises: bool,
    asked: Asked,
) -> _Solved:
    """Captured: a search, and a loop over what it found."""
    interpolates = tableau.interpolates and t.shape[0] > 2
    ends = ends if asked.stops is None else ends_among(ends, asked.stops)
    node_time = asked.node_time(ends, real_dtype(y[0].dtype))
    found, searched = searched_steps(
        tableau, velocity, y, ends, controller, first_size, policy, asked, interpolates=interpolates
    )
    status, reached = found.status, found.reached
    # Where no step counts, one of size 0 is taken. What raises stands outside: a compiled no_grad would stay on.
    count = operators.found(found.count, status, reached) if raises else found.count.clamp(min=1)
    at_end = node_time is not None
    again = evaluations_collecting(tableau, at_end=at_end) if interpolates else evaluations_of(tableau)
    with dynamo.capturing_scalars():
        steps = int((count + interpolates).item())
    torch._check(steps >= 1)
    torch._check(steps <= controller.max_steps + 1)
    each = (found.intervals, found.positions, found.fractions)
    intervals, positions, fractions = (values.narrow(0, 0, steps) for values in each)
    starts, sizes = step_control.place(ends, intervals, positions, fractions)
    of_loop = torch.zeros_like(found.tried) + steps * again
    evaluations = kept_steps.evaluations(found.tried, searched, of_loop)
    counted = statistics(t.device, found.count, found.tried - found.count, evaluations)
    if interpolates:
        # One more step, of size 0, has the velocity at the end.
        starts = torch.where(torch.arange(steps, device=t.device) == count, _end(t, status, reached), starts)
        method = f"{tableau.label}, found steps, between them an interpolant of order {tableau.interpolant_order}"
        collected = captured_collecting(
            tableau, velocity, y, starts, sizes, steps, policy, method, found.tried, node_time
        )
        return _Solved(_between(tableau, t, count, _Steps(starts, sizes, collected)), status, reached, counted)
    method = f"{tableau.label}, found steps{'' if tableau.interpolates else ', which end at the output times'}"
    times = stage_time if node_time is None else node_time
    on_grid = captured_once(tableau, velocity, y, starts, sizes, steps + 1, 1, policy, method, found.tried, times)
    if t.shape[0] == 2:
        return _Solved([values[-1][None] for values in on_grid], status, reached, counted)
    order = torch.arange(t.shape[0] - 1, device=t.device) if asked.stops is None else intervals_before(ends, t)
    last_steps = torch.searchsorted(intervals, order, right=True)
    return _Solved([values[last_steps] for values in on_grid], status, reached, counted)


def _between(tableau: ButcherTableau, t: torch.Tensor, count: torch.Tensor, steps: _Steps) -> list[torch.Tensor]:
    """The states at every t but the first, between the ends of so many steps; the last one is that of the last step."""
    inner, forward = t[1:-1], torch.sign(t[-1] - t[0]).detach()
    passed = torch.searchsorted(steps.starts.detach() * forward, (inner.detach() * forward).contiguous(), right=True)
    step = torch.minimum(passed, count).clamp(min=1) - 1
    size = steps.sizes[step]
    share = (inner - steps.starts[step]) / torch.where(size == 0, 1.0, size)  # of size 0 where no step counts
    share = torch.where(passed > count, 1.0, share)  # not reached, or just
    found = steps.collected

    def states(leaf: int) -> torch.Tensor:
        grid, rates = found.states[leaf], found.rates[leaf]
        last_rates = found.end_rates[leaf][step] if found.end_rates else rates[step + 1]
        values = interpolate(
            tableau,
            per_time(share.to(grid.dtype), grid),
            per_time(size.to(grid.dtype), grid),
            (grid[step], grid[step + 1]),
            (rates[step], last_rates),
            found.quartics[leaf][step] if found.quartics else None,
        )
        return torch.cat([values, grid[count.reshape(1)]])

    return [states(leaf) for leaf in range(len(found.states))]


@dynamo.never_alone
def _adapt_now(
    tableau: ButcherTableau,
    velocity: Velocity,
    y: State,
    t: torch.Tensor,
    ends: torch.Tensor,
    controller: step_control.Controller,
    first_size: float | None,
    policy: PrecisionPolicy | None,
    raises: bool,
) -> _Solved:
    """Uncompiled: step by step. k_1 is not evaluated again where it is known."""
    marking.meet_loop(policy)
    controller = controller.with_numbers(controller.numbers(t.device))
    velocity = counter = Counter(velocity)
    times, taken, rate = ends.detach(), _Taken(tableau, t, ends), velocity(t[0], y)
    refuse_unreadable([ends, *y, *rate])
    norm = partial(step_control.error_norm, controller=controller)
    start = _detached(y), _detached(rate)
    size = first_size_of(velocity, *start, times, norm, controller.order, first_size).detach()
    search = step_control.begin(times, size, controller.max_steps)
    first: State | None = rate
    while int(search.status) == step_control.RUNNING:
        trial = step_control.propose(ends, search, controller)
        nexts, k, errors = attempt(tableau, velocity, trial.t, trial.dt, y, first)
        tried = step_control.Trial(*(value.detach() for value in trial))
        error = norm(_detached(errors), _detached(y), _detached(nexts))
        counts, search = step_control.judge(times, search, tried, error, controller)
        first = k[0]
        if counts:
            taken.add(trial, y, k, nexts)
            y, first = nexts, k[-1] if tableau.fsal else None
    reached = step_control.reached(times, search)
    if raises:
        operators.found(search.count, search.status, reached)
    found = taken.solution(velocity, _end(t, search.status, reached), y, first)
    counted = statistics(t.device, search.count, search.tried - search.count, counter.count)
    return _Solved(found, search.status, reached, counted)


def refuse_unreadable(
    values: Sequence[torch.Tensor],
    found: str = "the adaptive steps of an odeint",
    *,
    required: str = "one sequence of steps for all of a batch",
    fix: str = 'take fixed steps (method="rk4")',
) -> None:
    """Refuse what a solver that looks at its numbers cannot look at.

    Raises:
        UncompiledError: if they are captured, for a backend that does not rewrite the solve.
        TransformError: if a value is that of each entry of a batch (torch.func.vmap).
    """
    if torch.compiler.is_dynamo_compiling():
        refuse(
            UncompiledError,
            "an odeint is compiled by a backend that does not rewrite it, and reads its numbers while it runs",
            required="the rampde_fx backend round an odeint",
            fix='compile by torch.compile(..., backend="rampde_fx"), or call odeint outside of what is compiled',
        )
    if any(map(callers.is_mapped, values)):
        refuse(
            TransformError,
            f"{found} run inside of torch.func.vmap",
            required=required,
            fix=f"{fix}, or give odeint the batch as one state",
        )


def _end(t: torch.Tensor, status: torch.Tensor, reached: torch.Tensor) -> torch.Tensor:
    """The time that was reached, differentiable in the first and the last one: it is a share of their distance."""
    first, last = t[0], t[-1]
    share = (reached - first.detach()) / (last - first).detach()
    return torch.where(status == step_control.DONE, last, first + share * (last - first))


class _Taken:
    """The steps that counted so far, as far as the solution at the times reads them."""

    def __init__(self, tableau: ButcherTableau, t: torch.Tensor, ends: torch.Tensor) -> None:
        self.tableau, self.t = tableau, t
        self.interpolates = tableau.interpolates and len(t) > 2
        self.at_ends: list[State] = []
        self.rows: list[tuple[torch.Tensor, torch.Tensor, State, State, State]] = []

    def add(self, trial: step_control.Trial, y: State, k: list[State], nexts: State) -> None:
        """One step more."""
        if self.interpolates:
            self.rows.append((trial.t, trial.dt, y, k[0], quartic_term(self.tableau, k)))
        elif trial.ends_interval:
            self.at_ends.append(nexts)

    def solution(self, velocity: Velocity, end: torch.Tensor, y: State, rate: State | None) -> list[torch.Tensor]:
        """The states at every t but the first, given the last state, and the velocity there where it is known.

        They mean nothing at times that were not reached.
        """
        if not self.rows and not self.at_ends and rate is not None:  # no step counts: one of size 0, as compiled
            y = [leaf + 0 * value for leaf, value in zip(y, rate, strict=True)]
        if not self.rows:
            found = self.at_ends + [y] * (len(self.t) - 1 - len(self.at_ends))
            return [torch.stack(values) for values in zip(*found, strict=True)]
        rate = velocity(end, y) if rate is None else rate
        starts, sizes, states, rates, quartics = zip(
            *self.rows, (end, torch.zeros_like(end), y, rate, self.rows[-1][-1]), strict=True
        )
        collected = Collected(_stacked(states), _stacked(rates), _stacked(quartics), [])
        count = torch.full((), len(self.rows), device=self.t.device)
        steps = _Steps(torch.stack(starts), torch.stack(sizes), collected)
        return _between(self.tableau, self.t, count, steps)


def _stacked(states: Sequence[State]) -> list[torch.Tensor]:
    return [torch.stack(values) for values in zip(*states, strict=True)]


def _detached(state: State) -> State:
    """Without gradients, and without the tangents of forward mode, which no_grad lets through."""
    return [leaf.detach() for leaf in state]


def controller_of(
    given: dict[str, Any], tableau: ButcherTableau, rtol: Any, atol: Any
) -> tuple[step_control.Controller, float | None]:
    """The controller, and the size of the first step if it is given; tolerances as step_control.Controller has them."""
    rest = {name: value for name, value in given.items() if name != "first_step"}
    unknown = [name for name in given if name not in ADAPTIVE_OPTIONS]
    if unknown:
        refuse(
            OptionError,
            f"options={shown(given)}",
            required=f"options of {', '.join(ADAPTIVE_OPTIONS)}, or for fixed steps one of {', '.join(FIXED_OPTIONS)}",
            fix=f"leave {unknown[0]!r} out",
        )
    if is_number(rtol) and is_number(atol) and rtol == atol == 0:
        refuse(
            OptionError,
            f"rtol={shown(rtol)} and atol={shown(atol)}",
            required="a tolerance above 0",
            fix="write rtol=1e-3, atol=1e-6, or leave both out",
        )
    limits = {"first_step": 0.0, "max_steps": 0, "safety": 0.0, "ifactor": 1.0, "dfactor": 0.0}
    for name, value in given.items():
        number = is_number(value) and (name != "max_steps" or isinstance(value, int))
        if not number or not limits[name] < value < float("inf") or (name in ("safety", "dfactor") and value >= 1):
            refuse(
                OptionError,
                f"options={{{name!r}: {shown(value)}}}",
                required="positive numbers: max_steps an int, ifactor above 1, safety and dfactor below",
                fix=f"leave {name!r} out",
            )
    assert tableau.order_error is not None, "adaptive methods only"
    order = min(tableau.order, tableau.order_error) + 1
    rest = {"max_steps": MAX_STEPS, **rest}
    return step_control.Controller(order, rtol=rtol, atol=atol, **rest), given.get("first_step")
