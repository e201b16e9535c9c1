"""Fixed steps: the states at every output time, by steps whose number or size is given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from rampde_fx.errors import OptionError, velocity_error
from rampde_fx.frontend import marking
from rampde_fx.policy import PrecisionPolicy
from rampde_fx.runtime import operators
from rampde_fx.runtime.step_control import scalar
from rampde_fx.solvers.runge_kutta import NodeTime, State, Velocity, advance, advance_collecting, stage_time
from rampde_fx.solvers.tableau import ButcherTableau
from rampde_fx.torch_private import dynamo
from rampde_fx.torch_private.refusals import refuse, shown

# Gives a derivative, and what is wrong with it, or an empty string.
CheckedVelocity = Callable[[torch.Tensor, State], tuple[State, str]]
FIXED_OPTIONS = ("step_size", "num_steps")


class Collected(NamedTuple):
    """What steps collect, stacked, for each tensor of the state.

    Attributes:
        states: At the start of each step, and at the end of the last one.
        rates: The velocities at the starts.
        quartics: The quartic terms, if the method has any.
        end_rates: The velocities at the ends of the steps, if they are others than at the next starts.
    """

    states: list[torch.Tensor]
    rates: list[torch.Tensor]
    quartics: list[torch.Tensor]
    end_rates: list[torch.Tensor]


def steps_between(
    tableau: ButcherTableau,
    velocity: CheckedVelocity,
    y: State,
    t: torch.Tensor,
    count: int,
    policy: PrecisionPolicy | None,
    node_time: NodeTime = stage_time,
) -> list[torch.Tensor]:
    """The states at every t, by `count` equal steps from each time to the next."""
    starts, sizes = t[:-1], t[1:] - t[:-1]
    if count > 1:
        sizes = sizes / count
        offsets = torch.arange(count, dtype=t.dtype, device=t.device)
        starts = (starts[:, None] + sizes[:, None] * offsets).flatten()
        sizes = sizes[:, None].expand(-1, count).flatten()
    return steps_from(tableau, velocity, y, starts, sizes, t.shape[0], count, policy, node_time)


def steps_from(
    tableau: ButcherTableau,
    velocity: CheckedVelocity,
    y: State,
    starts: torch.Tensor,
    sizes: torch.Tensor,
    outputs: int,
    every: int,
    policy: PrecisionPolicy | None,
    node_time: NodeTime = stage_time,
) -> list[torch.Tensor]:
    """The initial states, and those after every few of the given steps: `outputs` of each."""
    if is_captured():
        method = f"{tableau.label}, fixed steps of order {tableau.order}"
        return captured_once(tableau, velocity, y, starts, sizes, outputs, every, policy, method, node_time=node_time)
    marking.meet_loop(policy)
    found, checked = [y], raising(velocity)
    for i in range(starts.shape[0]):
        y = advance(tableau, checked, starts[i], sizes[i], y, node_time)
        if (i + 1) % every == 0:
            found.append(y)
    return [torch.stack(values) for values in zip(*found, strict=True)]


@dynamo.never_alone
def is_captured() -> bool:
    """Whether Dynamo captures the code for a backend that may rewrite it."""
    return torch.compiler.is_dynamo_compiling() and dynamo.rewritten_later()


@dynamo.never_alone
def is_refused_later() -> bool:
    """Whether what Dynamo captures is refused: inside of a torch.func transform one step stands for none."""
    return is_captured() and (dynamo.is_transformed() or marking.refuses_shards())


def refused_later(y: State, t: torch.Tensor, policy: PrecisionPolicy | None) -> list[torch.Tensor]:
    """A marked loop to be refused with the user's line, and states of the shape of a solution."""
    marking.meet_loop(policy)
    marking.mark_refused(t, marking.policy_in_force(policy))
    # No views of the states: torch takes none of a state that is a view with a tangent of another layout.
    return [value.new_zeros(t.shape[0], *value.shape) + value for value in y]


def captured_once(
    tableau: ButcherTableau,
    velocity: CheckedVelocity,
    y: State,
    starts: torch.Tensor,
    sizes: torch.Tensor,
    outputs: int,
    every: int,
    policy: PrecisionPolicy | None,
    method: str,
    search: torch.Tensor | None = None,
    node_time: NodeTime = stage_time,
) -> list[torch.Tensor]:
    """One step between markers, which stands for all of them; search is a result of what found the steps."""
    marking.meet_loop(policy)
    checked, problems = noting(velocity)
    t, dt, *entered = operators.enter(starts, sizes, y, marking.policy_in_force(policy))
    nexts = advance(tableau, checked, t, dt, entered, node_time)
    evaluations = len(problems)
    operators.again(t)
    advance(tableau, checked, t, dt, nexts, node_time)
    marking.loop_ends(once=True)
    return list(operators.leave(y, nexts, [], search, outputs, every, method, evaluations, max(problems)))


def captured_collecting(
    tableau: ButcherTableau,
    velocity: CheckedVelocity,
    y: State,
    starts: torch.Tensor,
    sizes: torch.Tensor,
    steps: int,
    policy: PrecisionPolicy | None,
    method: str,
    search: torch.Tensor | None = None,
    node_time: NodeTime | None = None,
) -> Collected:
    """The same with every step's state, and what its interpolation asks for."""
    marking.meet_loop(policy)
    outputs = steps + 1  # before the loop, whose step computes no numbers
    checked, problems = noting(velocity)
    t, dt, *entered = operators.enter(starts, sizes, y, marking.policy_in_force(policy))
    nexts, rates, quartics, ends = advance_collecting(tableau, checked, t, dt, entered, node_time)
    evaluations = len(problems)
    operators.again(t)
    advance_collecting(tableau, checked, t, dt, nexts, node_time)
    marking.loop_ends(once=True)
    collected = [*rates, *quartics, *ends]
    found = list(operators.leave(y, nexts, collected, search, outputs, 1, method, evaluations, max(problems)))
    first, behind = 2 * len(y), 2 * len(y) + len(quartics)
    return Collected(found[: len(y)], found[len(y) : first], found[first:behind], found[behind:])


def noting(velocity: CheckedVelocity) -> tuple[Velocity, list[str]]:
    """A velocity that notes what is wrong; an exception would be a graph break in the loop, and lost."""
    problems: list[str] = []

    def checked(t: torch.Tensor, state: State) -> State:
        rates, problem = velocity(t, state)
        problems.append(problem)
        return state if problem else rates

    return checked, problems


def raising(velocity: CheckedVelocity) -> Velocity:
    """A velocity that raises what is wrong, and gives results that are its own.

    The user's function may write its next result where this one is.
    """

    def checked(t: torch.Tensor, state: State) -> State:
        rates, problem = velocity(t, state)
        if problem:
            raise velocity_error(problem)
        return [rate.clone() for rate in rates]

    return checked


def of_one_size(t: torch.Tensor, step_size: Any) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Starts and sizes of the steps of one size from the first time to the last, and how many they are."""
    span, size = (t[-1] - t[0]).detach(), scalar(step_size, t.device)
    with dynamo.capturing_scalars():
        count = int(operators.count_steps(t.detach(), size).item())
    torch._check(count >= 1)
    forward = torch.sign(span)
    index = torch.arange(count, device=t.device)
    # No slices of a grid: Inductor of torch 2.11 knows nothing of a size that is read from a tensor.
    starts, ends = (t[0] + i.to(t.dtype) * (size.to(t.dtype) * forward) for i in (index, index + 1))
    return starts, torch.where(index + 1 == count, t[-1], ends) - starts, count


def steps_along(
    tableau: ButcherTableau,
    velocity: CheckedVelocity,
    y: State,
    t: torch.Tensor,
    starts: torch.Tensor,
    sizes: torch.Tensor,
    count: int,
    policy: PrecisionPolicy | None,
    end: torch.Tensor | None = None,
    node_time: NodeTime = stage_time,
) -> list[torch.Tensor]:
    """The states at every t, interpolated linearly between the given steps, which lead from the first to the last.

    They end at t[-1], or at what is equal and has another derivative.
    """
    on_grid = steps_from(tableau, velocity, y, starts, sizes, count + 1, 1, policy, node_time)
    if t.shape[0] == 2 and end is None:
        return [torch.stack([start, values[-1]]) for start, values in zip(y, on_grid, strict=True)]
    grid, last = passed_steps(t, starts, t[-1:] if end is None else end)
    share = (t - grid[last - 1]) / (grid[last] - grid[last - 1])
    return [_between(values[last - 1], values[last], share) for values in on_grid]


def passed_steps(t: torch.Tensor, starts: torch.Tensor, end: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The ends of all steps, and for each time the index of the end that comes next."""
    grid, forward = torch.cat([starts, end]), torch.sign(t[-1] - t[0]).detach()
    return grid, torch.searchsorted(grid * forward, (t * forward).contiguous()).clamp(min=1)


def _between(left: torch.Tensor, right: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    return left + per_time(share.to(left.dtype), left) * (right - left)


def per_time(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """One value for each time, of a shape that broadcasts over the states at these times."""
    return values.reshape(-1, *[1] * (like.ndim - 1))


def fixed_options(given: dict[str, Any]) -> tuple[float | None, int]:
    """The step size, and the number of steps between two times."""
    unknown = [name for name in given if name not in FIXED_OPTIONS]
    if unknown or len(given) > 1:
        refuse(
            OptionError,
            f"options={shown(given)}",
            required=f"at most one of {', '.join(FIXED_OPTIONS)}",
            fix='write options={"num_steps": n} for n equal steps between two output times',
        )
    step_size, count = given.get("step_size"), given.get("num_steps", 1)
    if step_size is not None and not (is_number(step_size) and 0 < step_size < float("inf")):
        refuse(
            OptionError,
            f'options={{"step_size": {shown(step_size)}}}',
            required="a positive number, in the unit of t",
            fix="give the magnitude; t says whether time runs backward",
        )
    if isinstance(count, bool) or not isinstance(count, (int, torch.SymInt)) or count < 1:
        refuse(
            OptionError,
            f'options={{"num_steps": {shown(count)}}}',
            required="an int of at least 1",
            fix='write options={"num_steps": 4} for four steps between two output times',
        )
    return step_size, count


def is_number(value: Any) -> bool:
    """Whether it is an int or a float; a bool is an int to Python alone."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)
