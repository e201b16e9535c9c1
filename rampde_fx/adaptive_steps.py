"""Adaptive steps: the states at every output time, by steps of a size that the error estimate allows."""

from __future__ import annotations

from typing import Any

import torch

from rampde_fx import marking, operators, step_control, torch_private
from rampde_fx.errors import OptionError, refuse
from rampde_fx.fixed_steps import (
    FIXED_OPTIONS,
    CheckedVelocity,
    captured_once,
    is_captured,
    is_number,
    noting,
    per_time,
    raising,
)
from rampde_fx.policy import PrecisionPolicy
from rampde_fx.runge_kutta import State, Velocity, attempt, combine
from rampde_fx.tableau import ButcherTableau

ADAPTIVE_OPTIONS = ("first_step", "max_steps", "safety", "ifactor", "dfactor", "status")
MAX_STEPS = 4096


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
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The states at every t, by steps that end at each of them, and the status of the search.

    Where it does not raise, the states at times that were not reached are NaN.
    """
    if not is_captured():
        return _adapt_now(tableau, raising(velocity), y, t, controller, first_size, policy, raises=raises)
    checked, problems = noting(velocity)
    marking.meet_loop(policy)
    with torch.no_grad():
        start, times = [leaf.detach() for leaf in y], t.detach()
        rate = checked(times[0], start)
        size = _first_size(checked, start, rate, times, controller, first_size)
        states = [*start, *rate] if tableau.fsal else start
        t_i, dt, *entered = operators.enter(times, size[None], states, marking.policy_in_force(policy))
        first = entered[len(y) :] if tableau.fsal else None
        nexts, k, errors = attempt(tableau, checked, t_i, dt, entered[: len(y)], first)
        marking.loop_ends(once=True)
        results = [*nexts, *k[-1]] if tableau.fsal else nexts
        intervals, positions, fractions, count, status, reached, ended = operators.leave_search(
            states, results, errors, times, controller.numbers(), max(problems)
        )
    # Where no step counts, one of size 0 is taken. What raises stands outside: a compiled no_grad would stay on.
    count = operators.found(count, status, reached) if raises else count.clamp(min=1)
    with torch_private.capturing_scalars():
        steps = int(count.item())
    torch._check(steps >= 1)
    torch._check(steps <= controller.max_steps)
    intervals, positions, fractions = (steps_.narrow(0, 0, steps) for steps_ in (intervals, positions, fractions))
    starts, sizes = step_control.place(t, intervals, positions, fractions)
    on_grid = captured_once(tableau, velocity, y, starts, sizes, steps + 1, 1, policy)
    order = torch.arange(t.shape[0] - 1, device=t.device)
    if t.shape[0] == 2:
        found = [values[-1][None] for values in on_grid]
    else:
        ends = torch.searchsorted(intervals, order, right=True)
        found = [values[ends] for values in on_grid]
    if not raises:
        found = [torch.where(per_time(order < ended, values), values, torch.nan) for values in found]
    return [torch.cat([value[None], values]) for value, values in zip(y, found, strict=True)], status


@torch_private.never_alone
def _adapt_now(
    tableau: ButcherTableau,
    velocity: Velocity,
    y: State,
    t: torch.Tensor,
    controller: step_control.Controller,
    first_size: float | None,
    policy: PrecisionPolicy | None,
    *,
    raises: bool,
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Uncompiled: step by step. k_1 is not evaluated again where it is known."""
    marking.meet_loop(policy)
    times, found, rate = t.detach(), [y], velocity(t[0], y)
    size = _first_size(velocity, _detached(y), _detached(rate), times, controller, first_size).detach()
    search = step_control.begin(times, size, controller.max_steps)
    first: State | None = rate
    while int(search.status) == step_control.RUNNING:
        trial = step_control.propose(t, search)
        nexts, k, errors = attempt(tableau, velocity, trial.t, trial.dt, y, first)
        norm = step_control.error_norm(_detached(errors), _detached(y), _detached(nexts), controller)
        tried = step_control.Trial(*(value.detach() for value in trial))
        counts, search = step_control.judge(times, search, tried, norm, controller)
        first = k[0]
        if counts:
            y, first = nexts, k[-1] if tableau.fsal else None
            if trial.ends_interval:
                found.append(y)
    if raises:
        operators.found(search.count, search.status, step_control.reached(times, search))
    found += [[torch.full_like(leaf, torch.nan) for leaf in y]] * (t.shape[0] - len(found))
    return [torch.stack(values) for values in zip(*found, strict=True)], search.status


def _detached(state: State) -> State:
    """Without gradients, and without the tangents of forward mode, which no_grad lets through."""
    return [leaf.detach() for leaf in state]


@torch.no_grad()
def _first_size(
    velocity: Velocity,
    y: State,
    rate: State,
    t: torch.Tensor,
    controller: step_control.Controller,
    given: float | None,
) -> torch.Tensor:
    """The size of the first step, NaN if the state or its velocity is not finite."""
    finite = torch.stack([leaf.isfinite().all() for leaf in (*y, *rate)]).all()
    if given is not None:
        return torch.where(finite, torch.full_like(t[0], given), torch.nan)
    trial = step_control.trial_size(y, rate, controller)
    step = trial * torch.sign(t[1] - t[0]).to(trial.dtype)
    second = velocity(t[0] + step.to(t.dtype), combine(y, step, [1.0], [rate]))
    size = step_control.first_step(y, rate, second, trial, controller).to(t.dtype)
    return torch.where(finite, size, torch.nan)


def controller_of(
    given: dict[str, Any], tableau: ButcherTableau, rtol: float, atol: float
) -> tuple[step_control.Controller, float | None]:
    """The controller, and the size of the first step if it is given."""
    rest = {name: value for name, value in given.items() if name != "first_step"}
    unknown = [name for name in given if name not in ADAPTIVE_OPTIONS]
    if unknown:
        refuse(
            OptionError,
            f"options={given}",
            required=f"options of {', '.join(ADAPTIVE_OPTIONS)}, or for fixed steps one of {', '.join(FIXED_OPTIONS)}",
            fix=f"leave {unknown[0]!r} out",
        )
    if rtol == atol == 0:
        refuse(
            OptionError,
            f"rtol={rtol!r} and atol={atol!r}",
            required="a tolerance above 0",
            fix="write rtol=1e-3, atol=1e-6, or leave both out",
        )
    limits = {"first_step": 0.0, "max_steps": 0, "safety": 0.0, "ifactor": 1.0, "dfactor": 0.0}
    for name, value in given.items():
        number = is_number(value) and (name != "max_steps" or isinstance(value, int))
        if not number or not limits[name] < value < float("inf") or (name in ("safety", "dfactor") and value >= 1):
            refuse(
                OptionError,
                f"options={{{name!r}: {value!r}}}",
                required="positive numbers: max_steps an int, ifactor above 1, safety and dfactor below",
                fix=f"leave {name!r} out",
            )
    assert tableau.order_error is not None, "adaptive methods only"
    order = min(tableau.order, tableau.order_error) + 1
    return step_control.Controller(order, rtol, atol, **{"max_steps": MAX_STEPS, **rest}), given.get("first_step")
