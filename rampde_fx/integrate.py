"""odeint: the initial value problem of a neural ODE in one call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils import _pytree as pytree

from rampde_fx import marking, operators, torch_private
from rampde_fx.errors import OptionError, StateError, TimeGridError, velocity_error
from rampde_fx.policy import PrecisionPolicy
from rampde_fx.runge_kutta import State, Velocity, advance
from rampde_fx.tableau import ButcherTableau, tableau_of

CheckedVelocity = Callable[[torch.Tensor, State], tuple[State, str]]
FIXED_OPTIONS = ("step_size", "num_steps")


def odeint(
    func: Callable[[torch.Tensor, Any], Any],
    y0: Any,
    t: torch.Tensor,
    *,
    method: str | ButcherTableau = "rk4",
    rtol: float = 1e-7,
    atol: float = 1e-9,
    options: Mapping[str, Any] | None = None,
    policy: PrecisionPolicy | None = None,
) -> Any:
    """Integrate dy/dt = func(t, y) from y(t[0]) = y0, and return y at every t.

    Uncompiled it is plain torch code in the dtype of y0. In a model compiled for the rampde_fx backend it is one loop,
    captured once whatever the number of steps, and rewritten as a loop over steps(t) is.

    Args:
        func: The velocity: takes t, a 0-d tensor of y0's dtype, and y, of y0's structure; returns dy/dt, of the
            structure, shapes and dtypes of y0. It may read any tensors; gradients reach all of them.
        y0: Initial state: a real floating tensor of any shape, or a nested tuple, list or dict of such.
        t: Times of the solution, shape (M,) with M >= 2, floating, strictly monotone; it may run backward. Time is
            computed in t's dtype.
        method: A name of METHODS, or a ButcherTableau of one's own.
        rtol: Relative tolerance of an adaptive method.
        atol: Absolute tolerance of an adaptive method.
        options: For fixed steps {"num_steps": n}, equal steps between two output times, or {"step_size": h}, steps of
            this size from t[0] on, the last one shortened; the solution between two of them is interpolated linearly.
            Without either, one step leads from each time to the next.
        policy: How the backend is to rewrite it; where None, as the surrounding mixed_precision says.

    Returns:
        The solution, of the structure and dtypes of y0, each tensor with a first dimension of M more; y0 comes first.

    Raises:
        StateError: if y0 is not of real floating tensors, or func returns another structure, shape or dtype.
        TimeGridError: if t is not a floating, strictly monotone 1-D tensor of at least two points.
        MethodError: if there is no such method.
        OptionError: naming an option that does not exist or means nothing.

    Source: Hairer, Norsett and Wanner, Solving Ordinary Differential Equations I, 1993, section II.1.

    >>> t = torch.linspace(0, 1, 11)
    >>> y = odeint(lambda t, y: -y, torch.ones(3), t)
    >>> y.shape, bool(torch.allclose(y[-1], torch.exp(torch.tensor(-1.0))))
    (torch.Size([11, 3]), True)
    """
    leaves, structure = _flat_state(y0)
    tableau = tableau_of(method)
    t = _times(t, leaves)
    step_size, count = _fixed_options(options, tableau)
    velocity = _velocity(func, leaves, structure)
    if step_size is not None:
        trajectories = _equal_steps(tableau, velocity, leaves, t, step_size, policy)
    else:
        trajectories = _steps_between(tableau, velocity, leaves, t, count, policy)
    return pytree.tree_unflatten(trajectories, structure)


def _steps_between(
    tableau: ButcherTableau,
    velocity: CheckedVelocity,
    y: State,
    t: torch.Tensor,
    count: int,
    policy: PrecisionPolicy | None,
) -> list[torch.Tensor]:
    """The states at every t, by `count` equal steps from each time to the next."""
    starts, sizes = t[:-1], t[1:] - t[:-1]
    if count > 1:
        sizes = sizes / count
        offsets = torch.arange(count, dtype=t.dtype, device=t.device)
        starts = (starts[:, None] + sizes[:, None] * offsets).flatten()
        sizes = sizes[:, None].expand(-1, count).flatten()
    if torch.compiler.is_compiling() and torch_private.rewritten_later():
        return _captured_once(tableau, velocity, y, starts, sizes, t.shape[0], count, policy)
    marking.warn_if_uncompiled()
    found = [y]
    for i in range(starts.shape[0]):
        y = advance(tableau, _raising(velocity), starts[i], sizes[i], y)
        if (i + 1) % count == 0:
            found.append(y)
    return [torch.stack(values) for values in zip(*found, strict=True)]


def _captured_once(
    tableau: ButcherTableau,
    velocity: CheckedVelocity,
    y: State,
    starts: torch.Tensor,
    sizes: torch.Tensor,
    outputs: int,
    every: int,
    policy: PrecisionPolicy | None,
) -> list[torch.Tensor]:
    """One step between markers, which stands for all of them."""
    encoded = marking.policy_under_way() if policy is None else policy.encoded
    problems: list[str] = []

    def checked(t: torch.Tensor, state: State) -> State:
        rates, problem = velocity(t, state)
        problems.append(problem)
        return state if problem else rates

    t, dt, *entered = operators.enter(starts, sizes, y, encoded)
    nexts = advance(tableau, checked, t, dt, entered)
    # An exception here would be a graph break in the loop, and lost.
    return list(operators.leave(y, nexts, outputs, every, max(problems)))


def _equal_steps(
    tableau: ButcherTableau,
    velocity: CheckedVelocity,
    y: State,
    t: torch.Tensor,
    step_size: float,
    policy: PrecisionPolicy | None,
) -> list[torch.Tensor]:
    """The states at every t, interpolated linearly between steps of one size from t[0] on."""
    span = (t[-1] - t[0]).detach()
    with torch_private.capturing_scalars():
        count = int((torch.ceil(span.abs() / step_size + 1) - 1).to(torch.int64).item())
    torch._check(count >= 1)
    inner = t[0] + torch.arange(count, dtype=t.dtype, device=t.device) * (step_size * torch.sign(span))
    grid = torch.cat([inner, t[-1:]])
    on_grid = _steps_between(tableau, velocity, y, grid, 1, policy)
    if t.shape[0] == 2:
        return [torch.stack([values[0], values[-1]]) for values in on_grid]
    forward = torch.sign(span)
    last = torch.searchsorted(grid * forward, (t * forward).contiguous()).clamp(min=1)
    share = (t - grid[last - 1]) / (grid[last] - grid[last - 1])
    return [_between(values[last - 1], values[last], share) for values in on_grid]


def _between(left: torch.Tensor, right: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    weight = share.to(left.dtype).reshape(-1, *[1] * (left.ndim - 1))
    return left + weight * (right - left)


def _flat_state(y0: Any) -> tuple[State, pytree.TreeSpec]:
    leaves, structure = pytree.tree_flatten(y0)
    wrong = [leaf for leaf in leaves if not (isinstance(leaf, torch.Tensor) and leaf.is_floating_point())]
    if wrong or not leaves:
        raise StateError(
            f"y0 holds {_kind(wrong[0])}" if wrong else "y0 holds no tensor",
            required="a real floating tensor, or a nested tuple, list or dict of such",
            fix="convert integers by .float(); view complex tensors by torch.view_as_real",
        )
    return list(leaves), structure


def _kind(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)}"
    return f"a {type(value).__name__}"


def _raising(velocity: CheckedVelocity) -> Velocity:
    def checked(t: torch.Tensor, state: State) -> State:
        rates, problem = velocity(t, state)
        if problem:
            raise velocity_error(problem)
        return rates

    return checked


def _velocity(func: Callable[[torch.Tensor, Any], Any], y: State, structure: pytree.TreeSpec) -> CheckedVelocity:
    """The user's function on flat states; with what it returns, what is wrong with it."""
    dtype = y[0].dtype
    for leaf in y[1:]:
        dtype = torch.promote_types(dtype, leaf.dtype)

    def velocity(t: torch.Tensor, state: State) -> tuple[State, str]:
        rates, found = pytree.tree_flatten(func(t.to(dtype), pytree.tree_unflatten(state, structure)))
        if found != structure:
            return state, f"func returns {found}, and y0 is {structure}"
        for before, after in zip(state, rates, strict=True):
            if not isinstance(after, torch.Tensor) or (before.shape, before.dtype) != (after.shape, after.dtype):
                return state, f"func returns {_kind(after)} as the derivative of {_kind(before)}"
        return list(rates), ""

    return velocity


def _times(t: torch.Tensor, y: State) -> torch.Tensor:
    if not isinstance(t, torch.Tensor) or t.ndim != 1 or not t.is_floating_point() or t.shape[0] < 2:
        raise TimeGridError(
            f"t is {_kind(t)}",
            required="a floating 1-D tensor of at least two time points",
            fix="pass torch.linspace(t0, t1, number_of_times), or torch.tensor([t0, t1])",
        )
    return operators.monotone(t.to(y[0].device))


def _fixed_options(options: Mapping[str, Any] | None, tableau: ButcherTableau) -> tuple[float | None, int]:
    """The step size, and the number of steps between two times."""
    given = dict(options or {})
    unknown = [name for name in given if name not in FIXED_OPTIONS]
    if unknown or len(given) > 1:
        raise OptionError(
            f"options={given}",
            required=f"at most one of {', '.join(FIXED_OPTIONS)}",
            fix='write options={"num_steps": n} for n equal steps between two output times',
        )
    step_size, count = given.get("step_size"), given.get("num_steps", 1)
    if step_size is not None and not (isinstance(step_size, (int, float)) and 0 < step_size < float("inf")):
        raise OptionError(
            f'options={{"step_size": {step_size!r}}}',
            required="a positive number, in the unit of t",
            fix="give the magnitude; t says whether time runs backward",
        )
    if isinstance(count, bool) or not isinstance(count, (int, torch.SymInt)) or count < 1:
        raise OptionError(
            f'options={{"num_steps": {count!r}}}',
            required="an int of at least 1",
            fix='write options={"num_steps": 4} for four steps between two output times',
        )
    return step_size, count
