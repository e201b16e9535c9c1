"""torchdiffeq's functions: odeint, odeint_adjoint and odeint_dense."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from rampde_fx.errors import MethodError, OptionError, TimeGridError
from rampde_fx.solvers.fixed_steps import is_captured, is_refused_later, refused_later
from rampde_fx.solvers.statistics import SolveStatistics, statistics, taken_out
from rampde_fx.torch_private import dynamo
from rampde_fx.torch_private.refusals import refuse
from rampde_fx.torchdiffeq.compared import note_other
from rampde_fx.torchdiffeq.compiled import event_later, follows_capture, refuse_compiled, solution_later
from rampde_fx.torchdiffeq.options import (
    ADJOINT,
    CALLBACKS,
    SCIPY,
    callbacks_of,
    kind_of,
    known_method,
    known_options,
)
from rampde_fx.torchdiffeq.problem import problem_of, tolerances, warn
from rampde_fx.torchdiffeq.uncompiled import Call, dense_now, event_now, solution_now


@dynamo.never_alone
def odeint(
    func: Callable[[torch.Tensor, Any], Any],
    y0: Any,
    t: torch.Tensor,
    *,
    rtol: Any = 1e-7,
    atol: Any = 1e-9,
    method: str | None = None,
    options: dict[str, Any] | None = None,
    event_fn: Callable[[torch.Tensor, Any], torch.Tensor] | None = None,
) -> Any:
    """Solve dy/dt = func(t, y) from y(t[0]) = y0, as torchdiffeq.odeint does.

    Args:
        func: The velocity: takes t, a 0-d tensor of y0's dtype (real where that is complex), and y as y0 is; returns
            dy/dt, expanded to y's shape and converted to its dtype. Its attributes callback_step(t0, y0, dt),
            callback_accept_step and callback_reject_step, if it has them, are called at each step that is tried.
        y0: A floating or complex tensor of any shape, or a tuple of such. The tensors of a tuple are converted to one
            dtype.
        t: Times, shape (M,), floating, strictly monotone; of one time the solution is y0.
        rtol: Relative tolerance of adaptive steps: a number, a tensor that broadcasts with y0, or of a tuple y0 one for
            each entry.
        atol: Absolute tolerance likewise. The error of a step counts by the root mean square of its entries, of a tuple
            by the largest of its tensors'.
        method: Adaptive steps by adaptive_heun, fehlberg2, bosh3, dopri5 (where None), tsit5, dopri8; fixed ones by
            euler, midpoint, heun2, heun3, rk4 (the 3/8 rule), explicit_adams, implicit_adams (or fixed_adams); SciPy's
            without gradients by scipy_solver.
        options: Of adaptive steps first_step, min_step, max_step, step_t and jump_t (times at which steps end, a tensor
            or a list; velocities jump at the latter), safety, ifactor, dfactor, max_num_steps (between two output
            times), norm, dtype (of times, float64). Of fixed ones step_size or grid_constructor(func, y0, t), without
            either the steps lead from each time to the next; interp ("linear" or "cubic") and perturb; of Adams methods
            max_order, max_iters and implicit. Of scipy_solver solver, min_step and max_step. Others are warned of. Of
            all but scipy_solver also stats, which torchdiffeq does not have.
        event_fn: A function of t and y that ends the solution where an entry of it first changes its sign.

    Returns:
        The solution as y0 is, each tensor with a first dimension of M more. With event_fn a pair of the time of the
        event, without a gradient, and the solution at t[0] and at that time. With options={"stats": True} a
        SolveStatistics besides, the last of what is returned.

    Raises:
        StateError: if y0 is neither a floating or complex tensor nor a tuple of such, or func gives no derivative.
        TimeGridError: if t is not a floating, finite, strictly monotone 1-D tensor, or not of two points beside
            event_fn.
        MethodError: if there is no such method.
        OptionError: if an option or a tolerance means nothing.
        StepSizeError: if adaptive steps do not reach the last time. It is an AssertionError, too.
        EventError: if the event is not met.
        UncompiledError: in what is compiled with fullgraph=True, if the backend does not rewrite it.

    Source: E. Hairer, S. P. Norsett, G. Wanner, Solving Ordinary Differential Equations I, 2nd edition, 1993, chapter
        II; R. T. Q. Chen et al., Neural ordinary differential equations, NeurIPS 2018, arXiv 1806.07366.

    >>> y = odeint(lambda t, y: -y, torch.ones(3), torch.linspace(0, 1, 11))
    >>> y.shape, bool(torch.allclose(y[-1], torch.exp(torch.tensor(-1.0))))
    (torch.Size([11, 3]), True)
    """
    options, asks_stats = _without_stats(options, method)
    return _solved(_call(func, y0, t, rtol, atol, method, options), event_fn, asks_stats=asks_stats)


def _solved(call: Call, event_fn: Any, *, asks_stats: bool) -> Any:
    """What odeint returns."""
    t = call.problem.t
    if event_fn is not None:
        *found, counted = _until_event(call, event_fn)
        return (*found, counted) if asks_stats else tuple(found)
    if t.shape[0] == 1:
        states, counted = [leaf[None] for leaf in call.problem.y], statistics(t.device, 0, 0, 0)
    elif is_refused_later():
        states, counted = refused_later(call.problem.y, call.problem.t, None), statistics(t.device, 0, 0, 0)
    else:
        as_captured = is_captured() or follows_capture(call)
        states, counted = solution_later(call) if as_captured else solution_now(call)
    solution = call.problem.structured(states)
    return (solution, counted) if asks_stats else solution


@dynamo.never_alone
def odeint_adjoint(
    func: Callable[[torch.Tensor, Any], Any],
    y0: Any,
    t: torch.Tensor,
    *,
    rtol: Any = 1e-7,
    atol: Any = 1e-9,
    method: str | None = None,
    options: dict[str, Any] | None = None,
    event_fn: Callable[[torch.Tensor, Any], torch.Tensor] | None = None,
    adjoint_rtol: Any = None,
    adjoint_atol: Any = None,
    adjoint_method: str | None = None,
    adjoint_options: dict[str, Any] | None = None,
    adjoint_params: Iterable[torch.Tensor] | None = None,
) -> Any:
    """Solve as odeint does, with torchdiffeq.odeint_adjoint's arguments.

    The backward is the discrete adjoint: the exact gradient of the steps that were taken, where torchdiffeq's solves
    another equation backward, to tolerances of its own. So adjoint_rtol, adjoint_atol, adjoint_method and
    adjoint_options, with a norm of any kind, are taken and set nothing. One state per step is kept, uncompiled with a
    velocity where the next step needs it, and the backward computes each step once more: func is evaluated, with the
    random numbers and under the autocast of the forward. Compiled, the policy's checkpoint keeps fewer.

    Args:
        func: As in odeint; a Module where adjoint_params is None. Its attributes callback_step_adjoint(t0, y0, dt) and,
            of adaptive steps, callback_accept_step_adjoint are called uncompiled at each step that is taken back, from
            its end t0, where the solution is y0, by dt > 0; callback_reject_step_adjoint never is.
        y0: As in odeint, like t, rtol, atol, method, options and event_fn.
        adjoint_params: Parameters that have a gradient even where func does not read them: zero. Gradients reach what
            else func reads, too; of a Module's parameters that are left out it is warned. None for all that func has.

    Raises:
        OptionError: if func is no Module and adjoint_params is None, or adjoint_options do not follow from options.
        MethodError: if method is scipy_solver, which has no gradient, and one is required.
        RecomputationError: by the backward, if a step is not what it was: what func reads was changed in place, say.
    """
    if adjoint_params is None and callable(func) and not isinstance(func, nn.Module):
        refuse(
            OptionError,
            "func is no Module, and adjoint_params is None",
            required="a Module, whose parameters are known, or the parameters",
            fix="write adjoint_params=(), for gradients reach whatever func reads",
        )
    module: Any = func
    if adjoint_params is None:
        adjoint_params = module.parameters() if callable(func) else ()  # what is no function is refused as in odeint
    parameters = tuple(adjoint_params)
    _check_adjoint(func, parameters, method, options, adjoint_method, adjoint_options)
    options, asks_stats = _without_stats(options, method)
    call = _call(func, y0, t, rtol, atol, method, options)
    found = _solved(call._replace(adjoint=_callbacks_back(func, call.method)), event_fn, asks_stats=asks_stats)
    if not parameters:
        return found
    place = int(event_fn is not None)
    if place == 0 and not asks_stats:
        return _reaching(found, parameters)
    return *found[:place], _reaching(found[place], parameters), *found[place + 1 :]


def _check_adjoint(
    func: Any,
    parameters: tuple[torch.Tensor, ...],
    method: Any,
    options: Any,
    adjoint_method: Any,
    adjoint_options: Any,
) -> None:
    """Refuse what has no meaning, and say what is not done."""
    name, backward = known_method(method), known_method(method if adjoint_method is None else adjoint_method)
    if name != backward and options is not None and adjoint_options is None:
        refuse(
            OptionError,
            f"adjoint_method={backward!r} beside options of {name}, without adjoint_options",
            required="adjoint_options for another method",
            fix="leave adjoint_method out: the backward takes the steps of the forward",
        )
    if name == SCIPY:
        refuse(
            MethodError,
            f'odeint_adjoint with method="{SCIPY}", whose steps have no gradient',
            required="a method of this package, or odeint for a solution alone",
            fix='take "dopri5"',
        )
    if isinstance(func, nn.Module):
        known = {id(parameter) for parameter in parameters}
        others = [name for name, p in func.named_parameters() if p.requires_grad and id(p) not in known]
        if others:
            warn(
                f"gradients reach {', '.join(others)} too, which adjoint_params leaves out; freeze what is to have none"
            )


def _callbacks_back(func: Any, method: str) -> dict[str, Any] | None:
    """The callbacks of the backward; None where it is compiled, which calls none."""
    if not is_captured():
        return callbacks_of(func, method, ADJOINT)
    unused = [callback + ADJOINT for callback in CALLBACKS if hasattr(func, callback + ADJOINT)]
    if unused:
        warn(f"{', '.join(unused)} is not called: what is compiled calls nothing of Python in its backward")
    return None


def _reaching(solution: Any, parameters: tuple[torch.Tensor, ...]) -> Any:
    """A solution with a gradient of zero for all parameters: an optimizer, or DDP, may ask for it.

    As sums of no entries, which every transform of torch.func and Dynamo take.
    """
    if isinstance(solution, tuple):
        return _reaching(solution[0], parameters), *solution[1:]
    reached = [nothing_of(parameter, solution) for parameter in parameters if parameter.requires_grad]
    return solution + sum(reached) if reached else solution


def nothing_of(parameter: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Zero, as the sum of none of a parameter's entries: its gradient is zero, whatever it holds."""
    none = parameter.reshape(-1)[:0].sum()
    return (none.real if none.is_complex() and not like.is_complex() else none).to(like)


@dynamo.never_alone
def odeint_dense(
    func: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    y0: torch.Tensor,
    t0: torch.Tensor,
    t1: torch.Tensor,
    *,
    rtol: Any = 1e-7,
    atol: Any = 1e-9,
    method: str | None = None,
    options: dict[str, Any] | None = None,
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Solve from t0 to t1, as torchdiffeq.odeint_dense does: the solution as a function of the time.

    Args:
        func: As in odeint, like y0, rtol, atol and options.
        t0: The first time, 0-d.
        t1: The last time, 0-d, after or before t0.
        method: One whose steps adapt; dopri5 where None.

    Returns:
        A function of times between t0 and t1, a tensor of any shape, that gives y with their dimensions in front. It
        evaluates func no more, and has gradients.

    Raises:
        MethodError: if the steps of the method do not adapt.
        UncompiledError: in what is compiled with fullgraph=True.
        TimeGridError: by the function that is returned, if a time is not between t0 and t1.

    >>> y = odeint_dense(lambda t, y: -y, torch.ones(3), torch.tensor(0.0), torch.tensor(1.0))
    >>> y(torch.tensor(0.5)).shape, y(torch.tensor([0.1, 0.7])).shape
    (torch.Size([3]), torch.Size([2, 3]))
    """
    if is_captured():
        refuse_compiled("odeint_dense", "take odeint with the times in t")
    last = torch.as_tensor(t1, device=t0.device).reshape(()).to(t0)
    return _dense(func, y0, torch.stack([t0.reshape(()), last]), rtol, atol, method, options)


@dynamo.never_compiled
def _dense(
    func: Any, y0: Any, t: torch.Tensor, rtol: Any, atol: Any, method: Any, options: Any
) -> Callable[[torch.Tensor], torch.Tensor]:
    call = _call(func, y0, t, rtol, atol, method, options)
    if kind_of(call.method) != "adaptive":
        raise MethodError(
            f"odeint_dense with method={call.method!r}", required="a method whose steps adapt", fix='take "dopri5"'
        )
    return dense_now(call)


def _call(func: Any, y0: Any, t: Any, rtol: Any, atol: Any, method: Any, options: Any) -> Call:
    """The arguments, checked."""
    problem, name = problem_of(func, y0, t), known_method(method)
    given, callbacks = known_options(name, options), callbacks_of(func, name)
    tolerance = tolerances("rtol", rtol, problem), tolerances("atol", atol, problem)
    return Call(problem, name, given, callbacks, *tolerance)


def _without_stats(options: Any, method: Any) -> tuple[Any, bool]:
    """The options without "stats", and whether that is asked for."""
    if not isinstance(options, Mapping) or "stats" not in options:
        return options, False
    given = dict(options)
    if given["stats"] is None:
        given["stats"] = False
    asked = taken_out(given, "stats", "a SolveStatistics")
    if asked and method == SCIPY:
        refuse(
            OptionError,
            f'options={{"stats": True}} of {SCIPY}, which does not tell its steps',
            required="a method of this package",
            fix='take "dopri5", or count the calls of func',
        )
    return given, asked


def _until_event(call: Call, event_fn: Any) -> tuple[torch.Tensor, Any, SolveStatistics]:
    if call.problem.t.shape[0] != 2:
        refuse(
            TimeGridError,
            f"t has {call.problem.t.shape[0]} points beside event_fn",
            required="two points: the first time, and one that says the direction",
            fix="write torch.tensor([t0, t1])",
        )
    if is_refused_later():
        states = refused_later(call.problem.y, call.problem.t, None)
        return call.problem.t[0], call.problem.structured(states), statistics(call.problem.t.device, 0, 0, 0)
    note_other("a solve that ends at an event")
    time, solution, counted = event_later(call, event_fn) if is_captured() else event_now(call, event_fn)
    return time, call.problem.structured(solution), counted
