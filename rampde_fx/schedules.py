"""What the forward stores and the backward recomputes: the kinds of checkpoint schedules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, assert_never

from rampde_fx.errors import PolicyError
from rampde_fx.policy_text import text_of
from rampde_fx.torch_private import dynamo
from rampde_fx.torch_private.refusals import refuse

SHARE = 0.5  # of the memory that is free, where a budget says nothing


@dataclass(frozen=True)
class EveryStep:
    """Each step's state is stored; one step is recomputed at a time."""


@dataclass(frozen=True)
class Activations:
    """What the derivatives of the velocity read is stored for each step; nothing is recomputed."""


@dataclass(frozen=True)
class MemoryBudget:
    """How much memory checkpoint="auto" spends: what fits is kept for the backward, the rest is recomputed.

    Kept is what the derivatives of a step's last velocity evaluations read, of all steps: of as many evaluations as
    take no more bytes. The states of the steps are stored besides, as by default; only where all evaluations are kept
    they need not be. Chosen when a loop is compiled, from its sizes; loops of one graph share the memory, the first
    one first.

    Args:
        max_bytes: Bytes, on the device of the loop; at least 0. The choice is then the same in every run.
        share: Above 0 and at most 1: of the memory that is free on that device while the graph is compiled. Where both
            are None, 0.5: parameters, gradients and the optimizer need some.

    Raises:
        PolicyError: if both are given, or one of them is no such number.
    """

    max_bytes: int | None = None
    share: float | None = None

    def __post_init__(self) -> None:
        if problem := _wrong_budget(self.max_bytes, self.share):
            refuse(PolicyError, problem[0], required=problem[1], fix=problem[2])

    def __str__(self) -> str:
        return text_of(self)

    @property
    def share_in_force(self) -> float:
        """The share of the free memory, of a budget that is not in bytes."""
        return SHARE if self.share is None else self.share


@dynamo.constant
def _wrong_budget(max_bytes: Any, share: Any) -> tuple[str, ...]:
    """What is wrong with the fields of a MemoryBudget: found, required, fix; empty where nothing is."""
    if max_bytes is not None and (type(max_bytes) is not int or max_bytes < 0):
        return f"MemoryBudget(max_bytes={max_bytes!r})", "a number of bytes, an int of at least 0", "write 2**30"
    if share is not None and not (type(share) in (int, float) and 0 < share <= 1):
        fix = "write max_bytes= for a number of bytes" if type(share) is int else "use the default, 0.5"
        return f"MemoryBudget(share={share!r})", "a share of the free memory, above 0 and at most 1", fix
    if max_bytes is not None and share is not None:
        return (
            f"MemoryBudget(max_bytes={max_bytes}, share={share})",
            "a number of bytes or a share of what is free, not both",
            "leave share out",
        )
    return ()


@dataclass(frozen=True)
class EveryKthState:
    """Every K-th state is stored; the states between two of them are recomputed."""

    length: int


@dataclass(frozen=True)
class SqrtSegments:
    """Segments of ceil(sqrt(N)) of N steps."""


Checkpoint = Literal["step", "sqrt", "none", "auto"]
Schedule = EveryStep | Activations | MemoryBudget | EveryKthState | SqrtSegments


def schedule_of(checkpoint: Checkpoint | int | MemoryBudget) -> Schedule:
    """The schedule that PrecisionPolicy.checkpoint names."""
    match checkpoint:
        case int():
            return EveryKthState(checkpoint)
        case MemoryBudget():
            return checkpoint
        case "step":
            return EveryStep()
        case "none":
            return Activations()
        case "sqrt":
            return SqrtSegments()
        case "auto":
            return MemoryBudget()
        case _:
            assert_never(checkpoint)
