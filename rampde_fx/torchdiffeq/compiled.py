"""What is captured for the rampde_fx backend: the solvers of rampde_fx.odeint under torchdiffeq's names.

Their steps are rewritten in mixed precision, and have a generated backward. Tolerances and norm mean the same; the next
size of a step follows from the rule of rampde_fx.odeint. What the backend cannot rewrite is refused by its name.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NoReturn

import torch

from rampde_fx.errors import OptionError, UncompiledError
from rampde_fx.runtime import operators
from rampde_fx.runtime.step_control import Controller, Norm, scalar
from rampde_fx.solvers.adaptive_steps import MAX_STEPS, adaptive_steps, controller_of
from rampde_fx.solvers.event_steps import until_event
from rampde_fx.solvers.fixed_steps import (
    captured_collecting,
    of_one_size,
    passed_steps,
    per_time,
    steps_along,
    steps_between,
)
from rampde_fx.solvers.runge_kutta import NodeTime, State, evaluations_of, interpolate, stage_time
from rampde_fx.solvers.search import Asked
from rampde_fx.solvers.statistics import SolveStatistics, statistics
from rampde_fx.torch_private.refusals import refuse
from rampde_fx.torchdiffeq.adaptive import STOPS, largest_mean, ratios_of, stops_of
from rampde_fx.torchdiffeq.compared import is_compared, note_other
from rampde_fx.torchdiffeq.grids import INTERPOLATIONS
from rampde_fx.torchdiffeq.options import kind_of, tableau_of
from rampde_fx.torchdiffeq.problem import Tolerance
from rampde_fx.torchdiffeq.sign_changes import MOST_STEPS as MOST_STEPS_TO_EVENT
from rampde_fx.torchdiffeq.sign_changes import combined
from rampde_fx.torchdiffeq.uncompiled import Call, size_of_event_steps

# What a search notes of its steps takes memory for as many as may count.
MOST_STEPS = 2**16
NUMBERS = ("first_step", "safety", "ifactor", "dfactor")
BOUNDS = ("min_step", "max_step")


def solution_later(call: Call) -> tuple[list[torch.Tensor], SolveStatistics]:
    """The states at the times, captured: a tensor for each of the state's; and the statistics.

    Raises:
        UncompiledError: naming what is not rewritten.
    """
    _check_rewritten(call)
    return _adaptive(call) if kind_of(call.method) == "adaptive" else _fixed(call)


def follows_capture(call: Call) -> bool:
    """Whether an uncompiled solve is to take, and can, the steps of the captured one, with which it is compared."""
    if not is_compared() or kind_of(call.method) != "adaptive":
        return False
    *_, asked = _control(call, call.problem.t.shape[0] - 1)
    if asked == Asked():
        return True
    note_other("an adaptive solve with norm, step_t, jump_t or tolerances of entries")
    return False


def event_later(call: Call, event_fn: Any) -> tuple[torch.Tensor, list[torch.Tensor], SolveStatistics]:
    """What event_now gives, captured: the time of the event, the states at the first time and then, the statistics.

    Raises:
        UncompiledError: naming what is not rewritten.
        OptionError: of fixed steps, if they have no size.
    """
    _check_rewritten(call)
    problem = call.problem

    def given_event(t: torch.Tensor, y: State) -> torch.Tensor:
        return event_fn(t, problem.structured(y))

    event = combined(given_event, problem.t[0], problem.y)
    dtype = torch.promote_types(call.options.get("dtype", torch.float64), problem.dtype)
    t, linear = _checked(problem.t.to(dtype)), False
    if kind_of(call.method) == "adaptive":
        controller, first_size, asked = _control(call, 1)
    else:
        first_size, linear = size_of_event_steps(call), _interpolation(call) == "linear"
        controller = Controller(1, MOST_STEPS_TO_EVENT, math.nan, math.nan, min_step=first_size, max_step=first_size)
        asked = Asked(_no_error, jumps=bool(call.options.get("perturb")))
    time, state, counted = until_event(
        tableau_of(call.method),
        problem.checked,
        problem.y,
        t,
        controller,
        first_size,
        asked._replace(event=event),
        _closest(call.atol, t.device),
        linear=linear,
    )
    both = zip(problem.y, state, strict=True)
    return time.to(problem.t.dtype), [torch.stack(ends) for ends in both], counted


def _no_error(
    errors: Sequence[torch.Tensor], before: Sequence[torch.Tensor], after: Sequence[torch.Tensor]
) -> torch.Tensor:
    """The norm of the error of steps of a fixed size, which all count."""
    return torch.zeros((), device=after[0].device)


def _closest(tolerances: list[Tolerance], device: torch.device) -> torch.Tensor:
    """The least of the absolute tolerances, to which the time of an event is found."""
    each = [v.to(torch.float64).amin() if isinstance(v, torch.Tensor) else scalar(v, device) for v in tolerances]
    return torch.stack(each).amin()


def _check_rewritten(call: Call) -> None:
    if kind_of(call.method) in ("adams", "scipy"):
        refuse_compiled(f'method="{call.method}"', 'take "rk4" or "dopri5"')
    for name in call.callbacks:
        refuse_compiled(f"func.{name}", 'take the callback off func, and count by options={"stats": True}')


def refuse_compiled(found: str, fix: str) -> NoReturn:
    """Refuse what is done uncompiled alone; without fullgraph=True the call then runs uncompiled."""
    refuse(
        UncompiledError,
        f"{found} is not rewritten",
        required="what the rampde_fx backend rewrites",
        fix=f"{fix}, or call odeint outside of what is compiled",
    )


def _adaptive(call: Call) -> tuple[list[torch.Tensor], SolveStatistics]:
    problem = call.problem
    dtype = torch.promote_types(call.options.get("dtype", torch.float64), problem.dtype)
    t = _checked(problem.t.to(dtype))
    controller, first_size, asked = _control(call, t.shape[0] - 1)
    states, _, counted = adaptive_steps(
        tableau_of(call.method),
        problem.checked,
        problem.y,
        t,
        controller,
        first_size,
        None,
        raises=True,
        asked=asked,
    )
    return states, counted


def _control(call: Call, intervals: int) -> tuple[Controller, Any, Asked]:
    """What chooses the steps: the controller, the size of the first step, what is asked besides.

    Numbers that are tensors are inputs of the graph, of which Dynamo knows no values.
    """
    given = {name: call.options[name] for name in NUMBERS if name in call.options}
    tensors = {name: value.reshape(()) for name, value in given.items() if isinstance(value, torch.Tensor)}
    most = call.options.get("max_num_steps")
    numbers = {name: value for name, value in given.items() if name not in tensors}
    # A pair of order 2 takes many steps at torchdiffeq's tolerances.
    usual = MOST_STEPS if tableau_of(call.method).order <= 2 else MAX_STEPS
    numbers["max_steps"] = usual if most is None else min(int(most) * intervals, MOST_STEPS)
    rtol, atol = _of_tensors(call.rtol, call.atol)
    norm = _norm(call)
    # A norm of the step's own reads the tolerances itself.
    told = (rtol, atol) if norm is None else (math.nan, math.nan)
    controller, first_size = controller_of(numbers, tableau_of(call.method), *told)
    first_size = tensors.pop("first_step", first_size)
    bounds = {name: _scalar(call.options[name]) for name in BOUNDS if name in call.options}
    device = call.problem.t.device
    stops = [stops_of(name, call.options[name], device) for name in STOPS if name in call.options]
    asked = Asked(norm, torch.cat(stops) if stops else None, jumps="jump_t" in call.options)
    return controller._replace(**tensors, **bounds), first_size, asked


def _norm(call: Call) -> Norm | None:
    """The norm of an error, where it is not that of the controller: the user's, or with tolerances of entries."""
    given, device = call.options.get("norm"), call.problem.t.device
    rtol, atol = ([_as_tensor(value, device) for value in values] for values in (call.rtol, call.atol))
    if given is None and all(value.numel() == 1 for value in (*rtol, *atol)):
        return None

    def norm(errors: Sequence[torch.Tensor], before: Sequence[torch.Tensor], after: Sequence[torch.Tensor]) -> Any:
        heights = [torch.maximum(a.abs(), b.abs()) for a, b in zip(before, after, strict=True)]
        ratios = ratios_of(errors, heights, rtol, atol)
        found = largest_mean(ratios) if given is None else given(call.problem.structured(ratios))
        return abs(_as_tensor(found, device))

    return norm


def _of_tensors(rtol: list[Tolerance], atol: list[Tolerance]) -> tuple[Any, Any]:
    """One pair of tolerances where it is the same for all tensors of the state, otherwise lists of them."""
    if all(a is rtol[0] for a in rtol) and all(b is atol[0] for b in atol):
        return _scalar(rtol[0]), _scalar(atol[0])
    return [_scalar(value) for value in rtol], [_scalar(value) for value in atol]


def _as_tensor(value: Tolerance, device: torch.device) -> torch.Tensor:
    return value if isinstance(value, torch.Tensor) else scalar(value, device)


def _scalar(value: Tolerance) -> Tolerance:
    """A tolerance, or an option, as a number or a 0-d tensor, if it is one."""
    return value.reshape(()) if isinstance(value, torch.Tensor) and value.numel() == 1 else value


def _fixed(call: Call) -> tuple[list[torch.Tensor], SolveStatistics]:
    problem, tableau, interp = call.problem, tableau_of(call.method), _interpolation(call)
    t, size, constructor = problem.t, call.options.get("step_size"), call.options.get("grid_constructor")
    perturbed = bool(call.options.get("perturb"))
    t = t.to(torch.float64) if perturbed else t  # so that it tells a time from those beside it
    times = Asked(jumps=perturbed).node_time(t, problem.dtype)
    node_time = stage_time if times is None else times
    if size is None and constructor is None:
        states = steps_between(tableau, problem.checked, problem.y, _checked(t), 1, None, node_time)
        return states, _counted(call, t.shape[0] - 1)
    if constructor is not None:
        grid = constructor(problem.func, problem.structured(problem.y), t).to(t)
        t = _checked(t + torch.where((grid[0] == t[0]) & (grid[-1] == t[-1]), 0.0, math.nan))
        grid = _checked(grid)
        t = torch.cat([grid[:1], t[1:]])  # there y0 is the solution, whatever t[0]
        starts, sizes, count, end = grid[:-1], grid[1:] - grid[:-1], grid.shape[0] - 1, grid[-1:]
    else:
        t = _checked(t)
        (starts, sizes, count), end = of_one_size(t, size), None
    if interp == "linear":
        states = steps_along(tableau, problem.checked, problem.y, t, starts, sizes, count, None, end, node_time)
        return states, _counted(call, count)
    states = _by_cubics(call, t, (starts, sizes, t[-1:] if end is None else end), count, times)
    return states, _counted(call, count, further=1)


def _interpolation(call: Call) -> str:
    interp = call.options.get("interp", "linear")
    if interp not in INTERPOLATIONS:
        refuse(
            OptionError,
            f'options={{"interp": {interp!r}}}',
            required=f"one of {', '.join(INTERPOLATIONS)}",
            fix='write {"interp": "cubic"}',
        )
    return str(interp)


def _counted(call: Call, steps: int, further: int = 0) -> SolveStatistics:
    """The statistics of fixed steps, of which some more are of size 0."""
    evaluations = (steps + further) * evaluations_of(tableau_of(call.method))
    return statistics(call.problem.t.device, steps, 0, evaluations)


def _by_cubics(
    call: Call,
    t: torch.Tensor,
    steps: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    count: int,
    times: NodeTime | None,
) -> list[torch.Tensor]:
    """The states at every t, by Hermite's cubic; one step more, of size 0, has the velocity at the end.

    Steps are given by their starts, their sizes and the end of the last one.
    """
    tableau, problem, (starts, sizes, end) = tableau_of(call.method), call.problem, steps
    with_last = torch.cat([starts, end]), torch.cat([sizes, torch.zeros_like(end)])
    method = f"{tableau.label}, fixed steps of order {tableau.order}, between them an interpolant of order 3"
    found = captured_collecting(
        tableau, problem.checked, problem.y, *with_last, count + 1, None, method, node_time=times
    )
    grid, last = passed_steps(t, starts, end)
    size = grid[last] - grid[last - 1]
    share = (t - grid[last - 1]) / size

    def at(leaf: int) -> torch.Tensor:
        values, rates = found.states[leaf], found.rates[leaf]
        part, length = (per_time(x.to(problem.dtype), values) for x in (share, size))
        end_rate = found.end_rates[leaf][last - 1] if found.end_rates else rates[last]
        return interpolate(None, part, length, (values[last - 1], values[last]), (rates[last - 1], end_rate), None)

    return [at(leaf) for leaf in range(len(problem.y))]


def _checked(t: torch.Tensor) -> torch.Tensor:
    return t + operators.monotone(t.detach())
