"""odeint_event: the time of an event, with its derivative.

Source: R. T. Q. Chen, B. Amos, M. Nickel, Learning neural event functions for ordinary differential equations, ICLR
2021, section 3.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from rampde_fx.errors import SecondDerivativeError
from rampde_fx.solvers.fixed_steps import is_captured
from rampde_fx.solvers.runge_kutta import State
from rampde_fx.solvers.statistics import SolveStatistics
from rampde_fx.torch_private import callers, dynamo
from rampde_fx.torchdiffeq.interface import nothing_of, odeint
from rampde_fx.torchdiffeq.problem import Problem, problem_of
from rampde_fx.torchdiffeq.sign_changes import combined


@dynamo.never_alone
def odeint_event(
    func: Callable[[torch.Tensor, Any], Any],
    y0: Any,
    t0: torch.Tensor,
    *,
    event_fn: Callable[[torch.Tensor, Any], torch.Tensor],
    reverse_time: bool = False,
    odeint_interface: Callable[..., Any] = odeint,
    **kwargs: Any,
) -> tuple[Any, ...]:
    """Solve from t0 up to an event, as torchdiffeq.odeint_event does, with gradients of its time.

    At the event g(t, y(t)) = 0, so that by a parameter dt = -(dg + dg/dy dy) / (dg/dt + dg/dy f), dg and dy at a fixed
    time and f the velocity; the state at the event moves by f dt besides. So what event_fn reads has its gradient, too.

    Args:
        func: As in odeint, like y0.
        t0: The first time, of one entry.
        event_fn: g, a function of t and y: the event is where an entry of it first changes its sign.
        reverse_time: Whether time falls.
        odeint_interface: What solves: odeint or odeint_adjoint, with arguments of one's own or without.
        **kwargs: Further arguments of it.

    Returns:
        The time of the event, and the solution at t0 and at that time; with options={"stats": True} a SolveStatistics
        besides.

    Raises:
        EventError: if the event is not met.
        SecondDerivativeError: by a backward that is to be differentiated.
        UncompiledError: in what is compiled with fullgraph=True, if the backend does not rewrite the method.

    >>> height = torch.tensor(5.0, requires_grad=True)  # of a stone that falls for sqrt(2 h / g) seconds
    >>> t, _ = odeint_event(
    ...     lambda t, y: torch.stack([y[1], torch.tensor(-10.0)]),
    ...     torch.stack([height, torch.tensor(0.0)]),
    ...     torch.tensor(0.0),
    ...     event_fn=lambda t, y: y[0],
    ... )
    >>> t.backward()
    >>> round(t.item(), 4), round(height.grad.item(), 4)
    (1.0, 0.1)
    """
    first = t0.reshape(-1)
    t = torch.cat([first, first.detach() + (-1.0 if reverse_time else 1.0)])
    time, solution, *counted = odeint_interface(func, y0, t, event_fn=event_fn, **kwargs)
    problem = problem_of(func, y0, t)
    stacks = list(solution) if problem.is_tuple else [solution]
    time, state = _linked(problem, event_fn, time.detach(), [values[-1] for values in stacks])
    ends = [torch.cat([values[:-1], last[None]]) for values, last in zip(stacks, state, strict=True)]
    # The derivative of the time takes the velocity once more.
    more = [SolveStatistics(found.accepted, found.rejected, found.evaluations + 1) for found in counted]
    return time, problem.structured(ends), *more


def _linked(problem: Problem, event_fn: Any, time: torch.Tensor, y: State) -> tuple[torch.Tensor, State]:
    """The time and the state of an event, with their derivatives."""

    def given_event(t: torch.Tensor, state: State) -> torch.Tensor:
        return event_fn(t, problem.structured(state))

    event = combined(given_event, problem.t[0], problem.y, of_zero=1.0)  # an event at the start has a slope, too
    fixed = [leaf.detach() for leaf in y]
    with torch.no_grad():
        rates, _ = problem.checked(time, fixed)

    def along(passed: torch.Tensor) -> torch.Tensor:
        """The event function along the solution, so much time behind the event."""
        step = passed.to(problem.dtype)
        return event(time + passed, [leaf + rate * step for leaf, rate in zip(fixed, rates, strict=True)])

    value, slope = event(time, y), _slope(along, torch.zeros_like(time))
    change = _over(value.detach() - value, slope)
    if not change.requires_grad:  # an event of t alone: its time has derivatives, and they are zero
        change = change + sum((nothing_of(leaf, change) for leaf in y if leaf.requires_grad), torch.zeros_like(change))
    if not is_captured():
        if callers.takes_second_derivatives():
            raise _second_derivative("transforms of torch.func that each differentiate run")
        if change.requires_grad and not dynamo.is_transformed():
            change.register_hook(_refuse_second_derivative)
    moved = [leaf + rate * change.to(problem.dtype) for leaf, rate in zip(y, rates, strict=True)]
    return time + change.to(time.dtype), moved


def _refuse_second_derivative(gradient: torch.Tensor) -> None:
    if torch.is_grad_enabled():
        raise _second_derivative("a backward with create_graph=True runs")
    if callers.in_dual_level():
        raise _second_derivative("a backward in a level of torch.autograd.forward_ad runs")


def _second_derivative(found: str) -> SecondDerivativeError:
    """The slope and the velocity at the event, by which the time's derivative is found, are numbers."""
    return SecondDerivativeError(
        f"{found} through the time of an event",
        required="first derivatives of odeint_event",
        fix="leave create_graph and the outer derivative out",
    )


def _over(nothing: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
    """What is zero over a slope: zero, with its derivative, which is NaN where the slope is zero."""
    is_flat = slope == 0
    flat = torch.where(is_flat, nothing, 1.0).abs().sqrt()  # its derivative at 0 is NaN, its value is 0
    return torch.where(is_flat, flat, nothing / torch.where(is_flat, 1.0, slope))


def _slope(function: Callable[[torch.Tensor], torch.Tensor], at: torch.Tensor) -> torch.Tensor:
    """The derivative of a function at a number, zero where it does not depend on it."""
    if is_captured() or dynamo.is_transformed():  # Dynamo captures no call of autograd, a transform bears none
        return torch.func.grad(function)(at).detach()
    with torch.enable_grad():
        at = at.detach().requires_grad_()
        value = function(at)
        found = torch.autograd.grad(value, at, allow_unused=True)[0] if value.requires_grad else None
    return torch.zeros_like(at) if found is None else found
