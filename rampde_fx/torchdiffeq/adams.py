"""Adams methods on a grid: multistep methods of an order that grows with the number of velocities that are known.

The weights are those of the polynomial through the known velocities, at the times that the grid really has: where the
grid is uniform they are the classical ones.

Source: E. Hairer, S. P. Norsett, G. Wanner, Solving Ordinary Differential Equations I, 2nd edition, 1993, section
    III.1.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from rampde_fx.errors import OptionError
from rampde_fx.runtime.step_control import scalar
from rampde_fx.solvers.adaptive_steps import refuse_unreadable
from rampde_fx.solvers.runge_kutta import State, combine, increment
from rampde_fx.torch_private import callers
from rampde_fx.torchdiffeq.clock import AFTER, BEFORE, Clock, number
from rampde_fx.torchdiffeq.grids import Scheme, runge_kutta
from rampde_fx.torchdiffeq.options import tableau_of
from rampde_fx.torchdiffeq.problem import Tolerance, warn

MOST = 12  # torchdiffeq's max_order: one more than the velocities that are used
FEWEST = 3  # velocities that a multistep method is begun with; before, steps are those of the 3/8 rule


@lru_cache(maxsize=256)
def weights(nodes: tuple[Fraction, ...]) -> tuple[float, ...]:
    """The integral from 0 to 1 of the polynomial through values at these nodes: its weights of the values.

    >>> weights((Fraction(0), Fraction(-1), Fraction(-2)))  # Adams and Bashforth: 23, -16, 5 twelfths
    (1.9166666666666667, -1.3333333333333333, 0.4166666666666667)
    """
    found = []
    for node in nodes:
        others = [other for other in nodes if other != node]
        polynomial, scale = [Fraction(1)], Fraction(1)  # the product of x - other, by powers of x
        for other in others:
            shifted = [Fraction(0), *polynomial]
            polynomial = [high - other * low for high, low in zip(shifted, [*polynomial, Fraction(0)], strict=True)]
            scale *= node - other
        found.append(float(sum(c / (power + 1) for power, c in enumerate(polynomial)) / scale))
    return tuple(found)


def differentiable(exact: Sequence[float], nodes: torch.Tensor) -> list[torch.Tensor]:
    """These weights as functions of their nodes, for derivatives by the times.

    >>> nodes = torch.tensor([0.0, -1.0], dtype=torch.float64, requires_grad=True)
    >>> torch.autograd.grad(differentiable(weights((Fraction(0), Fraction(-1))), nodes)[0], nodes)[0].tolist()
    [-1.5, 0.5]
    """
    count = len(exact)
    itself = torch.eye(count, dtype=torch.bool, device=nodes.device)
    polynomials = torch.zeros(count, count + 1, dtype=nodes.dtype, device=nodes.device)  # a row each, by powers of x
    polynomials[:, 0] = 1
    for other, is_node in zip(nodes, itself, strict=True):
        longer = polynomials.roll(1, 1) - other * polynomials  # the last coefficient is zero
        polynomials = torch.where(is_node[:, None], polynomials, longer)
    scales = torch.where(itself, 1, nodes[:, None] - nodes).prod(1)
    found = (polynomials / torch.arange(1, count + 2, device=nodes.device)).sum(1) / scales
    return list(found.new_tensor(exact) + (found - found.detach()))


def nodes_of(start: float, end: float, past: Sequence[float], resolution: float) -> tuple[Fraction, ...]:
    """Earlier times in units of a step from 0 to 1, whole numbers where the times resolve no difference."""
    size = end - start
    if all(abs(time - (start - i * size)) <= 4 * resolution for i, time in enumerate(past)):
        return tuple(Fraction(-i) for i in range(len(past)))
    return tuple((Fraction(time) - Fraction(start)) / (Fraction(end) - Fraction(start)) for time in past)


class Formula(NamedTuple):
    """The formula of an Adams method, which knows the earlier velocities by what it is given.

    Attributes:
        clock: The problem.
        tolerances: rtol and atol of each tensor of the state, for the corrector's iteration.
        implicit: Whether a corrector follows the predictor: Moulton's methods, otherwise those of Bashforth.
        iterations: The most that the corrector may take.
        perturb: Whether velocities at the ends of a step are evaluated just inside of it.
    """

    clock: Clock
    tolerances: tuple[list[Tolerance], list[Tolerance]]
    implicit: bool
    iterations: int
    perturb: bool

    def step(self, ends: State, y: State, earlier: State, *known: State) -> tuple[State, State, bool]:
        """One step, from earlier times and the velocities then, the latest first.

        It gives the next state, the velocity at the start, and whether the corrector's iteration has converged.
        """
        start, end = ends
        rate = self.clock.velocity(self.clock.beside(start, AFTER) if self.perturb else start, y)
        times, rates = [start, *earlier], [rate, *known]
        values = [number(time) for time in times]
        latest = max(map(abs, [*values, number(end)]))
        nodes = nodes_of(values[0], number(end), values, torch.finfo(start.dtype).eps * latest)
        dt = end - start
        if self.implicit:
            predicted = increment(y, dt, self._weights(nodes, times, dt), rates)
            corrector = self._weights((Fraction(1), *nodes), times, dt)
            nexts, converged = self._corrected(end, dt, y, predicted, corrector, rates)
            return nexts, rate, converged
        return combine(y, dt, self._weights(nodes, times, dt), rates), rate, True

    def _weights(self, nodes: tuple[Fraction, ...], times: State, dt: torch.Tensor) -> Sequence[Any]:
        """Those of nodes, the last of them of these times: where the times are differentiated, as functions of them."""
        exact = weights(nodes)
        if not (callers.has_forward_derivative([*times, dt]) or any(time.requires_grad for time in [*times, dt])):
            return exact
        positions = (torch.stack(times) - times[0]).double() / dt.double()
        constant = positions.new_tensor([float(node) for node in nodes[: len(nodes) - len(times)]])
        found = differentiable(exact, torch.cat([constant, positions]))
        return [weight.to(self.clock.problem.dtype) for weight in found]  # a state of no dimension would follow float64

    def _corrected(
        self,
        end: torch.Tensor,
        dt: torch.Tensor,
        y: State,
        change: State,
        corrector: Sequence[Any],
        rates: list[State],
    ) -> tuple[State, bool]:
        """The next state by Moulton's formula, by functional iteration from the predicted increment.

        With it, whether the iteration has converged.
        """
        first, *others = corrector
        given = increment(y, dt, others, rates)
        time, converged = self.clock.beside(end, BEFORE) if self.perturb else end, False
        for _ in range(self.iterations):
            before = change
            rate = self.clock.velocity(time, [value + step for value, step in zip(y, change, strict=True)])
            change = combine(given, dt, [first], [rate])
            if converged := self._converged(before, change):
                break
        return [value + step for value, step in zip(y, change, strict=True)], converged

    def _converged(self, before: State, after: State) -> bool:
        """Whether the last iteration changed no entry of the increment by more than the tolerances."""
        refuse_unreadable(after, "the iterations of an Adams method", required="as many iterations for all of a batch")
        return all(
            bool((((b - a).abs()) < _on(atol, a) + _on(rtol, a) * torch.maximum(a.abs(), b.abs())).all())
            for a, b, rtol, atol in zip(before, after, *self.tolerances, strict=True)
        )


class Adams:
    """The scheme of an Adams method; it remembers velocities from step to step.

    Args:
        clock: The problem.
        tolerances: rtol and atol of each tensor of the state.
        implicit: Whether a corrector follows the predictor.
        options: max_iters, the most iterations of the corrector, max_order, and perturb.
    """

    def __init__(
        self,
        clock: Clock,
        tolerances: tuple[list[Tolerance], list[Tolerance]],
        *,
        implicit: bool,
        options: dict[str, Any],
    ) -> None:
        order = options.get("max_order", MOST)
        if not isinstance(order, int) or not 1 < order <= MOST:
            raise OptionError(
                f'options={{"max_order": {order!r}}}',
                required=f"an int from 2 to {MOST}",
                fix="leave max_order out",
            )
        iterations = options.get("max_iters", 4)
        if implicit and (not isinstance(iterations, int) or isinstance(iterations, bool) or iterations < 1):
            raise OptionError(
                f'options={{"max_iters": {iterations!r}}}',
                required="an int of 1 or more: the corrector's iterations",
                fix="leave max_iters out, or take explicit_adams, which has no corrector",
            )
        if order <= FEWEST:
            warn(f"max_order={order} is below {FEWEST + 1}: every step is one of the 3/8 rule, rk4")
        perturb = bool(options.get("perturb"))
        self.formula = Formula(clock, tolerances, implicit, iterations, perturb)
        self.known: deque[tuple[torch.Tensor, State]] = deque(maxlen=int(order) - 1)
        self.first_steps: Scheme = runge_kutta(tableau_of("rk4"), clock, perturb=perturb)

    def __call__(self, start: torch.Tensor, end: torch.Tensor, y: State) -> tuple[State, State]:
        """One step: the next state, and the velocity at the start."""
        most = self.known.maxlen or 0
        if len(self.known) + 1 < FEWEST or most < FEWEST:
            nexts, rate = self.first_steps(start, end, y)
            self.known.appendleft((start, rate))
            return nexts, rate
        earlier = list(self.known)[: most - 1]
        times, rates = [time for time, _ in earlier], [rate for _, rate in earlier]
        nexts, rate, converged = self.formula.clock.step(self.formula.step, [start, end], y, times, *rates)
        self.known.appendleft((start, rate))
        if not converged:
            warn("the corrector of an Adams method did not converge; take smaller steps, or more max_iters")
            self.known.pop()
        return nexts, rate


def _on(tolerance: Tolerance, like: torch.Tensor) -> torch.Tensor:
    value = tolerance if isinstance(tolerance, torch.Tensor) else scalar(tolerance, like.device)
    return value.to(like.device)
