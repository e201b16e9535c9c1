"""odeint: the initial value problem of a neural ODE in one call."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, overload

import torch
from torch.utils import _pytree as pytree

from rampde_fx.errors import OptionError, PolicyError, StateError, TimeGridError
from rampde_fx.frontend import marking
from rampde_fx.frontend.marking import is_real, is_time_grid
from rampde_fx.policy import MONITORED, PrecisionPolicy
from rampde_fx.runtime import operators, ordered_times
from rampde_fx.solvers.adaptive_steps import adaptive_steps, controller_of
from rampde_fx.solvers.fixed_steps import (
    CheckedVelocity,
    fixed_options,
    is_number,
    is_refused_later,
    of_one_size,
    refused_later,
    steps_along,
    steps_between,
)
from rampde_fx.solvers.runge_kutta import State, evaluations_of, real_dtype
from rampde_fx.solvers.statistics import statistics, taken_out
from rampde_fx.solvers.tableau import ButcherTableau, tableau_of
from rampde_fx.torch_private import dynamo
from rampde_fx.torch_private.refusals import described, refuse, shown

ORDER = "a function of t and y that returns dy/dt, the initial state, the times"
IN_ORDER = "write odeint(func, y0, t), in this order"
TIME_NAMES = {"t", "time"}
S = TypeVar("S")  # of a state: a tensor, or a tree of them
AUTOCAST_CHOOSES = {torch.float16, torch.bfloat16, torch.float32}
# The relative tolerance that a velocity in each dtype can reach, a few unit roundoffs.
REACHED = {torch.float64: 1e-7, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}


@overload
def odeint(
    func: Callable[[torch.Tensor, S], S],
    y0: S,
    t: torch.Tensor,
    *,
    method: str | ButcherTableau = ...,
    rtol: float | None = ...,
    atol: float | None = ...,
    options: None = ...,
    policy: PrecisionPolicy | None = ...,
) -> S: ...
@overload
def odeint(
    func: Callable[[torch.Tensor, Any], Any],
    y0: Any,
    t: torch.Tensor,
    *,
    method: str | ButcherTableau = ...,
    rtol: float | None = ...,
    atol: float | None = ...,
    options: Mapping[str, Any],
    policy: PrecisionPolicy | None = ...,
) -> Any: ...
def odeint(
    func: Callable[[torch.Tensor, Any], Any],
    y0: Any,
    t: torch.Tensor,
    *,
    method: str | ButcherTableau = "dopri5",
    rtol: float | None = None,
    atol: float | None = None,
    options: Mapping[str, Any] | None = None,
    policy: PrecisionPolicy | None = None,
) -> Any:
    """Integrate dy/dt = func(t, y) from y(t[0]) = y0, and return y at every t.

    Uncompiled it is plain torch code in the dtype of y0. In a model compiled for the rampde_fx backend it is one loop,
    captured once whatever the number of steps, and rewritten as a loop over steps(t) is.

    Args:
        func: The velocity: takes t, a 0-d tensor of y0's dtype (real where that is complex), and y, of y0's
            structure; returns dy/dt, of the structure, shapes and dtypes of y0. It may read any tensors; gradients
            reach all of them.
        y0: Initial state: a floating or complex tensor of any shape, or a nested tuple, list or dict of such.
        t: Times of the solution, shape (M,) with M >= 2, floating, strictly monotone; it may run backward. Time is
            computed in t's dtype.
        method: A name of METHODS, or a ButcherTableau of one's own. Methods with embedded weights (bosh3, dopri5,
            tsit5, dopri8) adapt their steps.
        rtol: Relative tolerance of adaptive steps. It should not be below the unit roundoff of the velocity's dtype,
            on which the default depends: 1e-7 for float64, 1e-6 for float32, 1e-3 for float16, 1e-2 for bfloat16.
        atol: Absolute tolerance of adaptive steps; by default a hundredth of the default of rtol.
        options: Of fixed steps one of these; without either, one step leads from each time to the next.

            - "num_steps", an int: as many equal steps between two output times; with any method.
            - "step_size": steps of this size from t[0] on, the last one shortened; the solution between two of them
              is interpolated linearly.

            Adaptive steps do not end at output times where the method interpolates (all but dopri8). They take these.

            - "first_step": its size; no step is smaller than t resolves.
            - "max_steps" (4096): the most that may count, over all of t.
            - "safety" (0.9), "ifactor" (10), "dfactor" (0.2): of the step size's control.
            - "status": True, for the pair that is described below.

            All steps take "stats": True, for the SolveStatistics that is described below.

        policy: How the backend is to rewrite it; where None, as the surrounding mixed_precision says.

    Returns:
        The solution, of the structure and dtypes of y0, each tensor with a first dimension of M more; y0 comes first.
        With options={"status": True} a pair of it and a 0-d int64 tensor: 1 if the last time was reached, 2 after too
        many steps, 3 if a step that t resolves no smaller was rejected, 4 if y0 or its velocity is not finite; times
        that were not reached are NaN then. With options={"stats": True} a SolveStatistics comes last: the numbers of
        steps that count and that do not, and of evaluations.

    Raises:
        StateError: if y0 is not of floating or complex tensors, or func is no function or returns another structure,
            shape or dtype.
        TimeGridError: if t is not a floating, finite, strictly monotone 1-D tensor of at least two points.
        MethodError: if there is no such method.
        OptionError: naming an option or a tolerance that does not exist, or means nothing to the method.
        PolicyError: if policy is no PrecisionPolicy.
        StepSizeError: if adaptive steps do not reach the last time.
        UncompiledError: of adaptive steps, if fullgraph=True compiles them for a backend that does not rewrite them.

    Source: Hairer, Norsett and Wanner, Solving Ordinary Differential Equations I, 1993, section II.1.

    >>> t = torch.linspace(0, 1, 11)
    >>> y = odeint(lambda t, y: -y, torch.ones(3), t, method="rk4")
    >>> y.shape, bool(torch.allclose(y[-1], torch.exp(torch.tensor(-1.0))))
    (torch.Size([11, 3]), True)
    """
    leaves, structure = _flat_state(y0)
    tableau = tableau_of(method)
    t = _times(t, leaves)
    _check_policy(policy)
    given = _given(options)
    steps_adapt = tableau.adaptive and "num_steps" not in given
    _check_fit(tableau, given, rtol, atol, adapt=steps_adapt)
    velocity = _velocity(func, leaves, structure)
    asks_stats = taken_out(given, "stats", "a SolveStatistics")
    asks_status = steps_adapt and taken_out(given, "status", "a status")
    if is_refused_later():
        solution = pytree.tree_unflatten(refused_later(leaves, t, policy), structure)
        told: tuple[Any, ...] = (torch.ones((), dtype=torch.int64),) if asks_status else ()
        told += (statistics(t.device, 0, 0, 0),) if asks_stats else ()
        return (solution, *told) if told else solution
    t = _checked(t)
    if steps_adapt:
        text, dtype = marking.policy_in_force(policy), str(real_dtype(leaves[0].dtype))
        device = leaves[0].device.type
        rtol = default_tolerance("rtol", text, dtype, device) if rtol is None else rtol
        atol = default_tolerance("atol", text, dtype, device) if atol is None else atol
        controller, first_size = controller_of(given, tableau, rtol, atol)
        trajectories, status, counted = adaptive_steps(
            tableau, velocity, leaves, t, controller, first_size, policy, raises=not asks_status
        )
        more = ((status,) if asks_status else ()) + ((counted,) if asks_stats else ())
        solution = pytree.tree_unflatten(trajectories, structure)
        return (solution, *more) if more else solution
    step_size, count = fixed_options(given)
    if step_size is not None:
        starts, sizes, steps = of_one_size(t, step_size)
        trajectories = steps_along(tableau, velocity, leaves, t, starts, sizes, steps, policy)
    else:
        steps = (t.shape[0] - 1) * count
        trajectories = steps_between(tableau, velocity, leaves, t, count, policy)
    solution = pytree.tree_unflatten(trajectories, structure)
    return (solution, statistics(t.device, steps, 0, steps * evaluations_of(tableau))) if asks_stats else solution


def _flat_state(y0: Any) -> tuple[State, pytree.TreeSpec]:
    leaves, structure = pytree.tree_flatten(y0)
    wrong = [leaf for leaf in leaves if not is_state(leaf)]
    if wrong and callable(wrong[0]):
        refuse(StateError, f"y0 is {described(wrong[0])}, which can be called", required=ORDER, fix=IN_ORDER)
    if wrong or not leaves:
        refuse(
            StateError,
            f"y0 holds {described(wrong[0])}" if wrong else "y0 holds no tensor",
            required="a floating or complex tensor, or a nested tuple, list or dict of such",
            fix="convert integers and float8 by .float(), arrays by torch.from_numpy",
        )
    return list(leaves), structure


def is_state(value: Any) -> bool:
    """Whether it is a tensor in whose dtype a state can be summed up."""
    return is_real(value) or (isinstance(value, torch.Tensor) and value.dtype in (torch.complex64, torch.complex128))


def _velocity(func: Callable[[torch.Tensor, Any], Any], y: State, structure: pytree.TreeSpec) -> CheckedVelocity:
    """The user's function on flat states; with what it returns, what is wrong with it."""
    if not callable(func):
        refuse(
            StateError,
            f"func is {described(func)}",
            required=ORDER,
            fix=IN_ORDER,
        )
    if not torch.compiler.is_dynamo_compiling():
        check_order_of_parameters(func)
    dtype = y[0].dtype
    for leaf in y[1:]:
        dtype = torch.promote_types(dtype, leaf.dtype)
    dtype = real_dtype(dtype)
    if is_under_autocast(y[0].device.type) and dtype.itemsize < 4:  # of a layer before odeint: no time is half
        dtype = torch.float32

    def velocity(t: torch.Tensor, state: State) -> tuple[State, str]:
        rates, found = pytree.tree_flatten(func(t.to(dtype), pytree.tree_unflatten(state, structure)))
        if found != structure:
            return state, f"func returns {found}, and y0 is {structure}"
        if is_under_autocast(t.device.type):
            rates = [_as_state(before, after) for before, after in zip(state, rates, strict=True)]
        for before, after in zip(state, rates, strict=True):
            if not isinstance(after, torch.Tensor) or (before.shape, before.dtype) != (after.shape, after.dtype):
                order = "; is it func(y, t)? It is called as func(t, y)" if before.ndim and _is_like(after, t) else ""
                return state, f"func returns {described(after)} as the derivative of {described(before)}{order}"
        return list(rates), ""

    return velocity


def _is_like(value: Any, t: torch.Tensor) -> bool:
    return isinstance(value, torch.Tensor) and value.shape == t.shape


@dynamo.never_alone
def check_order_of_parameters(func: Callable[..., Any]) -> None:
    """Refuse a velocity in scipy's order, as far as the names of its parameters tell."""
    try:
        parameters = inspect.signature(getattr(func, "forward", func)).parameters.values()
    except (TypeError, ValueError):  # one without a signature, written in C
        return
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)][:2]
    if len(names) == 2 and names[1] in TIME_NAMES and names[0] not in TIME_NAMES:
        refuse(
            StateError,
            f"func takes ({', '.join(names)}), and is called as func(t, y)",
            required="the time first, as in torchdiffeq and in scipy's solve_ivp",
            fix=f"write odeint(lambda t, y: func(y, t), y0, t), or let func take ({names[1]}, {names[0]})",
        )


def is_under_autocast(device: str) -> bool:
    """Whether autocast sets the dtypes of products on a device."""
    return _has_autocast(device) and torch.is_autocast_enabled(device)


@dynamo.constant
def _has_autocast(device: str) -> bool:  # which torch 2.11 cannot ask while it captures
    return torch.amp.is_autocast_available(device)


def _as_state(before: torch.Tensor, after: Any) -> Any:
    """A derivative in the dtype of its state, where autocast has chosen one of the two."""
    chosen = isinstance(after, torch.Tensor) and {before.dtype, after.dtype} <= AUTOCAST_CHOOSES
    return after.type_as(before) if chosen else after


def _check_policy(policy: PrecisionPolicy | None) -> None:
    if policy is not None and not isinstance(policy, PrecisionPolicy):
        refuse(
            PolicyError,
            f"policy={shown(policy)}",
            required="a PrecisionPolicy, or None for that of the surrounding mixed_precision",
            fix="write policy=rampde_fx.PrecisionPolicy(torch.float16)",
        )


@dynamo.constant
def default_tolerance(name: str, policy: str, dtype: str, device: str) -> float:
    """The default of rtol or atol: what the coarser of a policy's velocity and a state's dtype can reach on a device.

    >>> default_tolerance("rtol", str(PrecisionPolicy(torch.float16)), "torch.float32", "cpu")
    0.001
    """
    dtypes = [getattr(torch, dtype.removeprefix("torch."))]
    if text := policy.removeprefix(MONITORED):
        dtypes.append(PrecisionPolicy.parse(text).chosen_for(device).dtype)
    rtol = max(REACHED[reached] for reached in dtypes)
    return rtol if name == "rtol" else rtol / 100


def _check_fit(
    tableau: ButcherTableau, given: dict[str, Any], rtol: float | None, atol: float | None, *, adapt: bool
) -> None:
    """Refuse tolerances of steps that do not adapt, and a step size of steps that do."""
    for name, value in (("rtol", rtol), ("atol", atol)):
        if value is not None and not (is_number(value) and 0 <= value < float("inf")):
            refuse(
                OptionError,
                f"{name}={shown(value)}",
                required="tolerances that are finite numbers of at least 0",
                fix="write rtol=1e-3, atol=1e-6, or leave both out",
            )
    if adapt and "step_size" in given:
        refuse(
            OptionError,
            f'options={{"step_size": {given["step_size"]!r}}} beside {tableau.name}, which adapts its steps',
            required="tolerances for adaptive steps, or a step size for fixed ones",
            fix='write method="rk4" with the step size, or options={"num_steps": 4} for fixed steps of any method',
        )
    if not adapt and (rtol is not None or atol is not None):
        refuse(
            OptionError,
            f"rtol={shown(rtol)} and atol={shown(atol)} beside fixed steps of {tableau.name}",
            required="tolerances for adaptive steps alone",
            fix='leave both out, or write method="dopri5" without num_steps for steps that adapt to them',
        )


def _given(options: Mapping[str, Any] | None) -> dict[str, Any]:
    if options is not None and not isinstance(options, Mapping):
        refuse(
            OptionError,
            f"options={shown(options)}",
            required="a dict of options by their names",
            fix='write options={"num_steps": 4}',
        )
    return {} if options is None else dict(options)


def _times(t: torch.Tensor, y: State) -> torch.Tensor:
    if not is_time_grid(t) and len(y) == 1 and is_time_grid(y[0]):
        refuse(TimeGridError, f"t is {described(t)}, and y0 could be the times", required=ORDER, fix=IN_ORDER)
    if not is_time_grid(t):
        refuse(
            TimeGridError,
            f"t is {described(t)}",
            required="a floating 1-D tensor of at least two time points",
            fix="pass torch.linspace(t0, t1, number_of_times), or torch.tensor([t0, t1])",
        )
    return t.to(y[0].device)


def _checked(t: torch.Tensor) -> torch.Tensor:
    """The times, NaN or refused where they are not in order. What is exported holds no operators of ours."""
    return t + (ordered_times.zero_if_ordered if dynamo.is_exporting() else operators.monotone)(t.detach())
