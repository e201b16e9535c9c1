"""Where an input of an iteration comes from."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from torch import fx

# Names a value of an iteration: the position of its node, or "t" and "dt". A negative number is the own name of a carry
# that find_states makes of what is no such value: of a write into a tensor, or of an input that stays as it is.
Key = int | str
Time = Literal["t", "dt"]


@dataclass(frozen=True)
class CarrySource:
    """From an earlier iteration; in the first ones from outside.

    Attributes:
        values: The outside nodes that stand in for the earlier iterations.
        key: The value of the earlier iteration that it is; None where find_states found the carry.
    """

    values: tuple[fx.Node, ...]
    key: Key | None

    @property
    def lag(self) -> int:
        """How many iterations before it is from."""
        return len(self.values)

    @property
    def is_latest(self) -> bool:
        """Whether it is from the iteration just before."""
        return self.lag == 1

    def younger(self) -> CarrySource:
        """What a carry that lags by d > 1 steps becomes in the next step: the one that lags by d - 1."""
        return replace(self, values=self.values[1:])


@dataclass(frozen=True)
class TimeSource:
    """A time t_i, or a step size dt_i."""

    key: Time
    values: ClassVar[tuple[fx.Node, ...]] = ()


@dataclass(frozen=True)
class PerStepSource:
    """From outside, another value in every iteration: one node each."""

    values: tuple[fx.Node, ...]


@dataclass(frozen=True)
class InvariantSource:
    """From outside, always the same value."""

    value: fx.Node

    @property
    def values(self) -> tuple[fx.Node, ...]:
        """The one value."""
        return (self.value,)


@dataclass(frozen=True)
class IndexSource:
    """The number of the step, on a device, for its random numbers."""

    device: str
    values: ClassVar[tuple[fx.Node, ...]] = ()


@dataclass(frozen=True)
class SeedSource:
    """The seed of the loop's random numbers, on a device."""

    device: str
    values: ClassVar[tuple[fx.Node, ...]] = ()


Source = CarrySource | TimeSource | PerStepSource | InvariantSource | IndexSource | SeedSource
# The order in which a step takes its inputs: carries, what each step has of its own (PER_STEP of roll_loop), what all
# share. Behind roll_loop the groups are told apart by their sizes alone: the classes of a group stay together.
ORDER = (CarrySource, TimeSource, PerStepSource, IndexSource, InvariantSource, SeedSource)


def carries_among(sources: list[Source]) -> list[CarrySource]:
    """The carries, in order."""
    return [source for source in sources if isinstance(source, CarrySource)]
