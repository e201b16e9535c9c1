"""What the forward stores and the backward recomputes: the kinds of checkpoint schedules."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rampde_fx import graphs
from rampde_fx.errors import UnsupportedLoopError
from rampde_fx.torch_private import shapes


@dataclass(frozen=True)
class EveryStep:
    """Each step's state is stored; one step is recomputed at a time."""


@dataclass(frozen=True)
class Activations:
    """What the derivatives of the velocity read is stored for each step; nothing is recomputed."""


@dataclass(frozen=True)
class Segments:
    """Every K-th state is stored; the states between two of them are recomputed."""

    length: int


@dataclass(frozen=True)
class SqrtSegments:
    """Segments of ceil(sqrt(N)) of N steps."""


Schedule = EveryStep | Activations | Segments | SqrtSegments


def schedule_of(checkpoint: str | int) -> Schedule:
    """The schedule that PrecisionPolicy.checkpoint names."""
    if isinstance(checkpoint, int):
        return Segments(checkpoint)
    named: dict[str, Schedule] = {"step": EveryStep(), "none": Activations(), "sqrt": SqrtSegments()}
    return named[checkpoint]


def segment_length(schedule: Schedule, steps: int | torch.SymInt, where: str) -> int | torch.SymInt:
    """The number of steps from one stored state to the next.

    Args:
        schedule: The schedule.
        steps: The number of steps of the loop.
        where: The user's line of the loop, for the error.

    Raises:
        UnsupportedLoopError: for SqrtSegments of a number of steps that is known on the device only.
    """
    match schedule:
        case EveryStep() | Activations():
            return 1
        case Segments(length):
            return min(length, steps) if isinstance(steps, int) else length
        case SqrtSegments():
            if shapes.is_data_dependent(steps):
                raise UnsupportedLoopError(
                    'checkpoint="sqrt" with a number of steps that is computed from the times',
                    required="a number of steps that the shape of the times tells",
                    fix='use an int instead of "sqrt", or options={"num_steps": n} instead of a step size',
                    where=where,
                )
            return graphs.ceil_sqrt(steps)
