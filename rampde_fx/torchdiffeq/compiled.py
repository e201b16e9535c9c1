"""What is captured for the rampde_fx backend: the solvers of rampde_fx.odeint under torchdiffeq's names.

Their steps are rewritten in mixed precision, and have a generated backward. Tolerances and norm mean the same; the next
size of a step follows from the rule of rampde_fx.odeint. What the backend cannot rewrite is refused by its name.
"""

from __future__ import annotations

import math
from typing import Any, NoReturn

import torch

from rampde_fx.errors import OptionError, UncompiledError, refuse
from rampde_fx.runtime import operators
from rampde_fx.solvers.adaptive_steps import MAX_STEPS, adaptive_steps, controller_of
from rampde_fx.solvers.fixed_steps import (
    captured_collecting,
    of_one_size,
    passed_steps,
    per_time,
    steps_along,
    steps_between,
)
from rampde_fx.solvers.runge_kutta import evaluations_of, interpolate
from rampde_fx.solvers.statistics import SolveStatistics, statistics
from rampde_fx.torchdiffeq.grids import INTERPOLATIONS
from rampde_fx.torchdiffeq.options import kind_of, tableau_of
from rampde_fx.torchdiffeq.problem import Tolerance
from rampde_fx.torchdiffeq.uncompiled import Call

# What a search notes of its steps takes memory for as many as may count.
MOST_STEPS = 2**16
NUMBERS = ("first_step", "safety", "ifactor", "dfactor")
NOT_REWRITTEN = {"adaptive": ("norm", "step_t", "jump_t", "min_step", "max_step"), "fixed": ("perturb",)}


def solution_later(call: Call) -> tuple[list[torch.Tensor], SolveStatistics]:
    """The states at the times, captured: a tensor for each of the state's; and the statistics.

    Raises:
        UncompiledError: naming what is not rewritten.
    """
    kind = kind_of(call.method)
    if kind in ("adams", "scipy"):
        refuse_compiled(f'method="{call.method}"', 'take "rk4" or "dopri5"')
    for name in NOT_REWRITTEN[kind]:
        if call.options.get(name) is not None and call.options[name] is not False:
            refuse_compiled(f'options={{"{name}": ...}} of {call.method}', f"leave {name} out")
    for name in call.callbacks:
        refuse_compiled(f"func.{name}", "take the callback off func")
    return _adaptive(call) if kind == "adaptive" else _fixed(call)


def refuse_compiled(found: str, fix: str) -> NoReturn:
    """Refuse what is done uncompiled alone; without fullgraph=True the call then runs uncompiled."""
    refuse(
        UncompiledError,
        f"{found} is not rewritten",
        required="what the rampde_fx backend rewrites",
        fix=f"{fix}, or call odeint outside of what is compiled",
    )


def _adaptive(call: Call) -> tuple[list[torch.Tensor], SolveStatistics]:
    problem, tableau = call.problem, tableau_of(call.method)
    dtype = torch.promote_types(call.options.get("dtype", torch.float64), problem.dtype)
    t = _checked(problem.t.to(dtype))
    given = {name: call.options[name] for name in NUMBERS if call.options.get(name) is not None}
    most = call.options.get("max_num_steps")
    given["max_steps"] = MAX_STEPS if most is None else min(int(most) * (t.shape[0] - 1), MOST_STEPS)
    controller, first_size = controller_of(given, tableau, *_of_tensors(call.rtol, call.atol))
    states, _, counted = adaptive_steps(
        tableau, problem.checked, problem.y, t, controller, first_size, None, raises=True
    )
    return states, counted


def _of_tensors(rtol: list[Tolerance], atol: list[Tolerance]) -> tuple[Any, Any]:
    """One pair of tolerances where it is the same for all tensors of the state, otherwise lists of them."""
    for value in (*rtol, *atol):
        if isinstance(value, torch.Tensor) and value.numel() != 1:
            refuse_compiled("a tolerance for each entry of a tensor", "give one number for the tensor")
    if all(a is rtol[0] for a in rtol) and all(b is atol[0] for b in atol):
        return _scalar(rtol[0]), _scalar(atol[0])
    return [_scalar(value) for value in rtol], [_scalar(value) for value in atol]


def _scalar(value: Tolerance) -> Tolerance:
    return value.reshape(()) if isinstance(value, torch.Tensor) else value


def _fixed(call: Call) -> tuple[list[torch.Tensor], SolveStatistics]:
    problem, tableau = call.problem, tableau_of(call.method)
    interp = call.options.get("interp", "linear")
    if interp not in INTERPOLATIONS:
        refuse(
            OptionError,
            f'options={{"interp": {interp!r}}}',
            required=f"one of {', '.join(INTERPOLATIONS)}",
            fix='write {"interp": "cubic"}',
        )
    t, size, constructor = problem.t, call.options.get("step_size"), call.options.get("grid_constructor")
    if size is None and constructor is None:
        return steps_between(tableau, problem.checked, problem.y, _checked(t), 1, None), _counted(call, t.shape[0] - 1)
    if constructor is not None:
        grid = constructor(problem.func, problem.structured(problem.y), t).to(t)
        t = _checked(t + torch.where((grid[0] == t[0]) & (grid[-1] == t[-1]), 0.0, math.nan))
        grid = _checked(grid)
        starts, sizes, count, end = grid[:-1], grid[1:] - grid[:-1], grid.shape[0] - 1, grid[-1:]
    else:
        t = _checked(t)
        (starts, sizes, count), end = of_one_size(t, size), None
    if interp == "linear":
        states = steps_along(tableau, problem.checked, problem.y, t, starts, sizes, count, None, end)
        return states, _counted(call, count)
    states = _by_cubics(call, t, (starts, sizes, t[-1:] if end is None else end), count)
    return states, _counted(call, count, further=1)


def _counted(call: Call, steps: int, further: int = 0) -> SolveStatistics:
    """The statistics of fixed steps, of which some more are of size 0."""
    evaluations = (steps + further) * evaluations_of(tableau_of(call.method))
    return statistics(call.problem.t.device, steps, 0, evaluations)


def _by_cubics(
    call: Call, t: torch.Tensor, steps: tuple[torch.Tensor, torch.Tensor, torch.Tensor], count: int
) -> list[torch.Tensor]:
    """The states at every t, by Hermite's cubic; one step more, of size 0, has the velocity at the end.

    Steps are given by their starts, their sizes and the end of the last one.
    """
    tableau, problem, (starts, sizes, end) = tableau_of(call.method), call.problem, steps
    with_last = torch.cat([starts, end]), torch.cat([sizes, torch.zeros_like(end)])
    method = f"{tableau.label}, fixed steps of order {tableau.order}, between them an interpolant of order 3"
    states, rates, _ = captured_collecting(tableau, problem.checked, problem.y, *with_last, count + 1, None, method)
    grid, last = passed_steps(t, starts, end)
    size = grid[last] - grid[last - 1]
    share = (t - grid[last - 1]) / size

    def at(values: torch.Tensor, rates: torch.Tensor) -> torch.Tensor:
        part, length = (per_time(x.to(problem.dtype), values) for x in (share, size))
        ends, slopes = (values[last - 1], values[last]), (rates[last - 1], rates[last])
        return interpolate(None, part, length, ends, slopes, None)

    return [at(values, rate) for values, rate in zip(states, rates, strict=True)]


def _checked(t: torch.Tensor) -> torch.Tensor:
    return t + operators.monotone(t.detach())
