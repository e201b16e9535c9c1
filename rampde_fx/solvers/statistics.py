"""How many steps a solve took, and how often it evaluated the velocity."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from rampde_fx.errors import OptionError
from rampde_fx.solvers.runge_kutta import State, Velocity
from rampde_fx.torch_private.refusals import refuse, shown


class SolveStatistics(NamedTuple):
    """What one call of odeint did, as 0-d int64 tensors on the device of the state; nothing waits for them.

    Attributes:
        accepted: Steps that count; of fixed steps all.
        rejected: Steps that were tried and do not count.
        evaluations: Evaluations of the velocity, each of them, those that choose the first step's size included.
    """

    accepted: torch.Tensor
    rejected: torch.Tensor
    evaluations: torch.Tensor


def statistics(device: torch.device, accepted: Any, rejected: Any, evaluations: Any) -> SolveStatistics:
    """Statistics of numbers, or of tensors that a device has counted."""
    # Sums, for AOTAutograd makes tensors of symbolic numbers in sums.
    none = torch.zeros((), dtype=torch.int64, device=device)
    return SolveStatistics(none + accepted, none + rejected, none + evaluations)


class Counter:
    """A velocity that counts its evaluations."""

    def __init__(self, velocity: Velocity) -> None:
        self.velocity, self.count = velocity, 0

    def __call__(self, t: torch.Tensor, y: State) -> State:
        self.count += 1
        return self.velocity(t, y)


def taken_out(given: dict[str, Any], name: str, asks_for: str) -> bool:
    """Whether an option asks for something more to be returned; takes it out of those that are given.

    Raises:
        OptionError: if it is no bool.
    """
    asked = given.pop(name, False)
    if not isinstance(asked, bool):
        refuse(
            OptionError,
            f"options={{{name!r}: {shown(asked)}}}",
            required=f"True, for {asks_for} beside the solution, or False",
            fix=f"write options={{{name!r}: True}}",
        )
    return asked
