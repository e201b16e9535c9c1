"""odeint: the initial value problem of a neural ODE in one call."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils import _pytree as pytree

from rampde_fx import adaptive, marking, operators, torch_private
from rampde_fx.errors import OptionError, StateError, TimeGridError, velocity_error
from rampde_fx.policy import PrecisionPolicy
from rampde_fx.runge_kutta import State, Velocity, advance, attempt, combine
from rampde_fx.tableau import ButcherTableau, tableau_of

CheckedVelocity = Callable[[torch.Tensor, State], tuple[State, str]]
FIXED_OPTIONS = ("step_size", "num_steps")
ADAPTIVE_OPTIONS = ("first_step", "max_steps", "safety", "ifactor", "dfactor")
MAX_STEPS = 4096


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
    given = dict(options or {})
    steps_adapt = tableau.adaptive and not any(name in given for name in FIXED_OPTIONS)
    velocity = _velocity(func, leaves, structure)
    if steps_adapt:
        controller, first_size = _controller(given, tableau, rtol, atol)
        trajectories = _adaptive_steps(tableau, velocity, leaves, t, controller, first_size, policy)
        return pytree.tree_unflatten(trajectories, structure)
    if (rtol, atol) != (1e-7, 1e-9) and not torch.compiler.is_compiling():
        warnings.warn("rtol and atol mean nothing to fixed steps", stacklevel=2)
    step_size, count = _fixed_options(given)
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
    checked, problems = _noting(velocity)
    t, dt, *entered = operators.enter(starts, sizes, y, _encoded(policy))
    nexts = advance(tableau, checked, t, dt, entered)
    return list(operators.leave(y, nexts, outputs, every, max(problems)))


def _encoded(policy: PrecisionPolicy | None) -> str:
    return marking.policy_under_way() if policy is None else policy.encoded


def _noting(velocity: CheckedVelocity) -> tuple[Velocity, list[str]]:
    """A velocity that notes what is wrong; an exception would be a graph break in the loop, and lost."""
    problems: list[str] = []

    def checked(t: torch.Tensor, state: State) -> State:
        rates, problem = velocity(t, state)
        problems.append(problem)
        return state if problem else rates

    return checked, problems


def _adaptive_steps(
    tableau: ButcherTableau,
    velocity: CheckedVelocity,
    y: State,
    t: torch.Tensor,
    controller: adaptive.Controller,
    first_size: float | None,
    policy: PrecisionPolicy | None,
) -> list[torch.Tensor]:
    """The states at every t, by steps that end at each of them."""
    with torch.no_grad():
        start, times = [leaf.detach() for leaf in y], t.detach()
        rate = _raising(velocity)(times[0], start)
        size = _first_size(_raising(velocity), start, rate, times, controller, first_size)
    if not (torch.compiler.is_compiling() and torch_private.rewritten_later()):
        marking.warn_if_uncompiled()
        return _adapt_now(tableau, _raising(velocity), y, t, controller, size)
    with torch.no_grad():
        checked, problems = _noting(velocity)
        states = [*start, *rate] if tableau.fsal else start
        t_i, dt, *entered = operators.enter(times, size[None], states, _encoded(policy))
        first = entered[len(y) :] if tableau.fsal else None
        nexts, last, errors = attempt(tableau, checked, t_i, dt, entered[: len(y)], first)
        results = [*nexts, *last] if tableau.fsal else nexts
        intervals, positions, fractions, count, status, reached = operators.leave_search(
            states, results, errors, times, controller.numbers(), max(problems)
        )
        count = operators.found(count, status, reached)
    with torch_private.capturing_scalars():
        steps = int(count.item())
    torch._check(steps >= 1)
    torch._check(steps <= controller.max_steps)
    intervals, positions, fractions = (found.narrow(0, 0, steps) for found in (intervals, positions, fractions))
    starts, sizes = adaptive.place(t, intervals, positions, fractions)
    on_grid = _captured_once(tableau, velocity, y, starts, sizes, steps + 1, 1, policy)
    if t.shape[0] == 2:
        return [torch.stack([value, values[-1]]) for value, values in zip(y, on_grid, strict=True)]
    ends = torch.searchsorted(intervals, torch.arange(t.shape[0] - 1, device=t.device), right=True)
    return [torch.cat([value[None], values[ends]]) for value, values in zip(y, on_grid, strict=True)]


def _adapt_now(
    tableau: ButcherTableau,
    velocity: Velocity,
    y: State,
    t: torch.Tensor,
    controller: adaptive.Controller,
    size: torch.Tensor,
) -> list[torch.Tensor]:
    """Uncompiled: step by step."""
    search, found, first = adaptive.begin(t.detach(), size, controller.max_steps), [y], None
    while int(search.status) == adaptive.RUNNING:
        trial = adaptive.propose(t, search)
        nexts, last, errors = attempt(tableau, velocity, trial.t, trial.dt, y, first)
        with torch.no_grad():
            norm = adaptive.error_norm(errors, y, nexts, controller)
            counts, search = adaptive.judge(t, search, trial, norm, controller)
        if counts:
            y, first = nexts, last if tableau.fsal else None
            if trial.ends_interval:
                found.append(y)
    (reached, _) = adaptive.place(t.detach(), search.interval.clamp(max=t.shape[0] - 2), search.position, search.size)
    operators.found(search.count, search.status, reached)
    return [torch.stack(values) for values in zip(*found, strict=True)]


def _first_size(
    velocity: Velocity,
    y: State,
    rate: State,
    t: torch.Tensor,
    controller: adaptive.Controller,
    given: float | None,
) -> torch.Tensor:
    if given is not None:
        return torch.full((), given, dtype=t.dtype, device=t.device)
    trial = adaptive.trial_size(y, rate, controller)
    step = trial * torch.sign(t[1] - t[0]).to(trial.dtype)
    second = velocity(t[0] + step.to(t.dtype), combine(y, step, [1.0], [rate]))
    return adaptive.first_step(y, rate, second, trial, controller).to(t.dtype)


def _controller(
    given: dict[str, Any], tableau: ButcherTableau, rtol: float, atol: float
) -> tuple[adaptive.Controller, float | None]:
    """The controller, and the size of the first step if it is given."""
    rest = {name: value for name, value in given.items() if name != "first_step"}
    unknown = [name for name in given if name not in ADAPTIVE_OPTIONS]
    if unknown:
        raise OptionError(
            f"options={given}",
            required=f"options of {', '.join(ADAPTIVE_OPTIONS)}, or for fixed steps one of {', '.join(FIXED_OPTIONS)}",
            fix=f"leave {unknown[0]!r} out",
        )
    for name, value in {"rtol": rtol, "atol": atol}.items():
        if not (isinstance(value, (int, float)) and 0 <= value < float("inf")) or rtol == atol == 0:
            raise OptionError(
                f"{name}={value!r}",
                required="tolerances that are finite numbers of at least 0, not both 0",
                fix="write rtol=1e-3, atol=1e-6, or leave both out",
            )
    limits = {"first_step": 0.0, "max_steps": 0, "safety": 0.0, "ifactor": 1.0, "dfactor": 0.0}
    for name, value in given.items():
        number = isinstance(value, int) if name == "max_steps" else isinstance(value, (int, float))
        if not number or not limits[name] < value < float("inf") or (name in ("safety", "dfactor") and value >= 1):
            raise OptionError(
                f"options={{{name!r}: {value!r}}}",
                required="positive numbers: max_steps an int, ifactor above 1, safety and dfactor below",
                fix=f"leave {name!r} out",
            )
    assert tableau.order_error is not None, "adaptive methods only"
    order = min(tableau.order, tableau.order_error) + 1
    return adaptive.Controller(order, rtol, atol, **{"max_steps": MAX_STEPS, **rest}), given.get("first_step")


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
        return [torch.stack([start, values[-1]]) for start, values in zip(y, on_grid, strict=True)]
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


def _fixed_options(given: dict[str, Any]) -> tuple[float | None, int]:
    """The step size, and the number of steps between two times."""
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
