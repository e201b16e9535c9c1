"""One step of an explicit Runge-Kutta method on a state of several tensors, as plain torch code.

It runs uncompiled as it stands, and it is what odeint lets be captured once for the backend: state and increments in
the dtype of the state, the velocity wherever it is called.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from rampde_fx.solvers.tableau import ButcherTableau

State = list[torch.Tensor]
Velocity = Callable[[torch.Tensor, State], State]
# The time of a stage, from the start and the size of the step and the stage's node.
NodeTime = Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]


def real_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of a number's parts: of a time, beside a state that may be complex."""
    return {torch.complex64: torch.float32, torch.complex128: torch.float64}.get(dtype, dtype)


def stage_time(t: torch.Tensor, dt: torch.Tensor, c: float) -> torch.Tensor:
    """The time of a stage: t + c dt."""
    if c == 0:
        return t
    return t + dt if c == 1 else t + c * dt


def just_inside(grain: torch.Tensor, dtype: torch.dtype) -> NodeTime:
    """Times of stages in the dtype in which the velocity is given them; of those at its ends just inside of the step.

    By the grain they may miss the true ends, whose sums are rounded.
    """

    def node_time(t: torch.Tensor, dt: torch.Tensor, c: float) -> torch.Tensor:
        time = stage_time(t, dt, c)
        if c not in (0, 1):
            return time.to(dtype)
        inwards, number = torch.sign(dt) * (1 - 2 * c), torch.finfo(dtype)
        time = (time + inwards * grain).to(dtype)
        return time + inwards.to(dtype) * (number.eps * time.abs()).clamp(min=number.tiny)

    return node_time


def advance(
    tableau: ButcherTableau,
    velocity: Velocity,
    t: torch.Tensor,
    dt: torch.Tensor,
    y: State,
    node_time: NodeTime = stage_time,
) -> State:
    """The state after one step: y + dt * sum_i b_i k_i with k_i = f(t + c_i dt, y + dt * sum_j a_ij k_j).

    Stages that the result does not need, such as the last one of a method whose last stage is the first one of the
    next step, are not evaluated.

    Args:
        tableau: The method.
        velocity: Maps a time and a state to the state's derivative, tensor by tensor.
        t: Start of the step, 0-d.
        dt: Step size, 0-d, of either sign, in t's dtype.
        y: The state.
        node_time: The times of the stages.

    Returns:
        The next state.

    Source: Hairer, Norsett and Wanner, Solving Ordinary Differential Equations I, 1993, section II.1.
    """
    wanted = needed(tableau, tableau.b)
    return combine(y, dt, tableau.b, stages(tableau, velocity, t, dt, y, wanted, node_time=node_time))


def attempt(
    tableau: ButcherTableau,
    velocity: Velocity,
    t: torch.Tensor,
    dt: torch.Tensor,
    y: State,
    first: State | None,
    node_time: NodeTime = stage_time,
) -> tuple[State, list[State], State]:
    """The state after one step of an adaptive method, the velocities of its stages, and the estimate of the error.

    first is k_1 where it is known: at the start, after a step that did not count, and of a method whose last stage is
    the first one of the next step (FSAL). The estimate is the difference from the embedded method,
    dt * sum_i (b_i - b^_i) k_i.
    """
    assert tableau.b_error is not None, "adaptive methods only"
    difference = [b - other for b, other in zip(tableau.b, tableau.b_error, strict=True)]
    k = stages(tableau, velocity, t, dt, y, needed(tableau, tableau.b, difference), first, node_time)
    return combine(y, dt, tableau.b, k), k, increment(y, dt, difference, k)


def advance_collecting(
    tableau: ButcherTableau,
    velocity: Velocity,
    t: torch.Tensor,
    dt: torch.Tensor,
    y: State,
    node_time: NodeTime | None = None,
) -> tuple[State, State, State, State]:
    """The state after one step, and what interpolate asks for: the velocity at its start and the quartic term.

    With times of the stages the velocity at the end comes last: that at the start of the next step may be another one.
    """
    times = stage_time if node_time is None else node_time
    k = stages(tableau, velocity, t, dt, y, needed(tableau, tableau.b, _quartic(tableau)), node_time=times)
    nexts = combine(y, dt, tableau.b, k)
    last = [] if node_time is None else [rate.clone() for rate in velocity(node_time(t, dt, 1), nexts)]
    return nexts, [rate.clone() for rate in k[0]], quartic_term(tableau, k), last


def evaluations_of(tableau: ButcherTableau) -> int:
    """How often advance evaluates the velocity."""
    return sum(needed(tableau, tableau.b))


def evaluations_collecting(tableau: ButcherTableau, *, at_end: bool = False) -> int:
    """How often advance_collecting does; at the end too where that is asked for."""
    return sum(needed(tableau, tableau.b, _quartic(tableau))) + at_end


def _quartic(tableau: ButcherTableau) -> Sequence[float]:
    return [0.0] * tableau.stages if tableau.interpolant is None else tableau.interpolant[:-1]


def quartic_term(tableau: ButcherTableau, k: list[State]) -> State:
    """sum_i d_i k_i over the stages, without the velocity at the end of the step; empty where there are no weights."""
    used = _used(_quartic(tableau), k)
    return [_sum(used, leaf) for leaf in range(len(k[0]))] if used else []


def interpolate(
    tableau: ButcherTableau | None,
    share: torch.Tensor,
    size: torch.Tensor,
    states: tuple[torch.Tensor, torch.Tensor],
    rates: tuple[torch.Tensor, torch.Tensor],
    quartic: torch.Tensor | None,
) -> torch.Tensor:
    """One tensor of the state within steps, in its own dtype.

    Args:
        tableau: The method, None for Hermite's cubic.
        share: Where in the step, from 0 to 1; of a shape that broadcasts with the states, like size.
        size: The size of the step.
        states: At the start and at the end of the step.
        rates: The velocities there.
        quartic: The quartic term without the velocity at the end, None where the method has none.

    Source: Hairer, Norsett and Wanner, Solving Ordinary Differential Equations I, 1993, section II.6.
    """
    (start, end), (first, last) = states, rates
    rest, change = 1 - share, end - start
    at_start = size * first - change
    at_end = change - size * last - at_start
    if quartic is None or tableau is None or tableau.interpolant is None:
        return start + share * (change + rest * (at_start + share * at_end))
    term = size * (quartic + tableau.interpolant[-1] * last)
    return start + share * (change + rest * (at_start + share * (at_end + rest * term)))


def needed(tableau: ButcherTableau, *weights: Sequence[float]) -> list[bool]:
    """Which stages sums with these weights depend on."""
    found = [any(row[i] != 0 for row in weights) for i in range(tableau.stages)]
    for i in reversed(range(tableau.stages)):
        for j in range(i):
            found[j] = found[j] or (found[i] and tableau.a[i][j] != 0)
    return found


def stages(
    tableau: ButcherTableau,
    velocity: Velocity,
    t: torch.Tensor,
    dt: torch.Tensor,
    y: State,
    wanted: Sequence[bool],
    first: State | None = None,
    node_time: NodeTime = stage_time,
) -> list[State]:
    """The velocities k_i of the wanted stages, empty states for the others; first is k_1 where it is known."""
    k: list[State] = []
    for i in range(tableau.stages):
        if i == 0 and first is not None:
            k.append(first)
        elif not wanted[i]:
            k.append([])
        else:
            k.append(velocity(node_time(t, dt, tableau.c[i]), combine(y, dt, tableau.a[i], k)))
    return k


def combine(y: State, dt: torch.Tensor, weights: Sequence[float], k: list[State]) -> State:
    """y + dt * sum_i w_i k_i."""
    if not any(weights):
        return y
    return [value + change for value, change in zip(y, increment(y, dt, weights, k), strict=True)]


def increment(y: State, dt: torch.Tensor, weights: Sequence[float], k: list[State]) -> State:
    """dt * sum_i w_i k_i, in the dtypes of y."""
    used = _used(weights, k)
    return [dt.to(real_dtype(value.dtype)) * _sum(used, leaf) for leaf, value in enumerate(y)]


def _used(weights: Sequence[float], k: list[State]) -> list[tuple[float, State]]:
    return [(w, rate) for w, rate in zip(weights, k, strict=False) if w != 0]


def _sum(used: list[tuple[float, State]], leaf: int) -> torch.Tensor:
    terms = [rate[leaf] if w == 1 else w * rate[leaf] for w, rate in used]
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total
