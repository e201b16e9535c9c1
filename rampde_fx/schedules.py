"""What the forward stores and the backward recomputes: the kinds of checkpoint schedules."""

from __future__ import annotations

from dataclasses import dataclass


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
