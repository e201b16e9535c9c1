"""SciPy's solvers, on the host and without gradients."""

from __future__ import annotations

import math
from importlib import import_module
from typing import Any

import torch

from rampde_fx.errors import MethodError, StepSizeError
from rampde_fx.solvers.runge_kutta import State
from rampde_fx.torchdiffeq.clock import Clock
from rampde_fx.torchdiffeq.problem import Tolerance


@torch.no_grad()
def solution_by_scipy(
    clock: Clock, rtol: list[Tolerance], atol: list[Tolerance], options: dict[str, Any]
) -> list[State]:
    """The state at every time, by scipy.integrate.solve_ivp.

    Raises:
        MethodError: if SciPy is not installed.
        StepSizeError: if it does not reach the last time.
    """
    try:
        solve_ivp = import_module("scipy.integrate").solve_ivp
    except ImportError as error:
        raise MethodError(
            'method="scipy_solver" needs SciPy, which is not installed',
            required="SciPy",
            fix="pip install scipy, or take dopri5",
        ) from error
    y = clock.problem.y

    def velocity(t: float, flat: Any) -> Any:
        time = torch.tensor(t, dtype=clock.problem.dtype, device=y[0].device)
        return _flat(clock.velocity(time, _leaves(torch.as_tensor(flat, device="cpu"), y)))

    found = solve_ivp(
        velocity,
        (clock.values[0], clock.values[-1]),
        _flat(y),
        t_eval=clock.values,
        method=options.get("solver", "LSODA"),
        rtol=_of_entries(rtol, y),
        atol=_of_entries(atol, y),
        max_step=options.get("max_step", math.inf),
        **({"min_step": options["min_step"]} if "min_step" in options else {}),
    )
    if not found.success:
        raise StepSizeError(
            f"scipy_solver stops before t = {clock.users(clock.t[-1]):g}: {found.message}",
            required="a problem that it solves to rtol and atol",
            fix="raise rtol and atol, or take another solver",
        )
    return [_leaves(torch.as_tensor(column, device="cpu"), y) for column in found.y.T]


def _flat(state: State) -> Any:
    return torch.cat([leaf.reshape(-1) for leaf in state]).detach().cpu().numpy()


def _leaves(flat: torch.Tensor, like: State) -> State:
    pieces = flat.split([leaf.numel() for leaf in like])
    return [piece.reshape(leaf.shape).to(leaf) for piece, leaf in zip(pieces, like, strict=True)]


def _of_entries(tolerances: list[Tolerance], y: State) -> Any:
    """One number where it is the same for all entries, otherwise one for each."""
    first = tolerances[0]
    if not isinstance(first, torch.Tensor) and all(value is first for value in tolerances):
        return first
    return _flat(
        [
            torch.as_tensor(value, device=leaf.device).expand(leaf.shape)
            for value, leaf in zip(tolerances, y, strict=True)
        ]
    )
