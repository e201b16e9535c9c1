"""What the forward stores and the backward recomputes: the kinds of checkpoint schedules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, assert_never


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


Checkpoint = Literal["step", "sqrt", "none"]
Schedule = EveryStep | Activations | Segments | SqrtSegments


def schedule_of(checkpoint: Checkpoint | int) -> Schedule:
    """The schedule that PrecisionPolicy.checkpoint names."""
    match checkpoint:
        case int():
            return Segments(checkpoint)
        case "step":
            return EveryStep()
        case "none":
            return Activations()
        case "sqrt":
            return SqrtSegments()
        case _:
            assert_never(checkpoint)
