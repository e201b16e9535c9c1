"""Buffers that a velocity changes as it is evaluated: BatchNorm's statistics, the vectors of a spectral norm.

Where the backward evaluates it once more, they have the values of the forward, and afterwards those that they had.
Integers of the user's own modules keep the ones they have: a flag says that something was made at the first evaluation,
and is not made anew.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch.nn.parameter import is_lazy

from rampde_fx.reach import reached
from rampde_fx.torchdiffeq.fingerprints import version_of


class Place(NamedTuple):
    """Of a buffer.

    Attributes:
        owner: The buffers of its module.
        name: Its name there.
        of_torch: Whether torch has written the module.
    """

    owner: dict[str, Any]
    name: str
    of_torch: bool


class Buffer(NamedTuple):
    """A buffer before an evaluation.

    Attributes:
        place: Where it stands.
        tensor: Itself, None if there was none.
        version: Its count of changes in place.
        value: A copy.
    """

    place: Place
    tensor: torch.Tensor | None
    version: int
    value: torch.Tensor | None

    @staticmethod
    def at(place: Place) -> Buffer:
        """The one that stands there."""
        owner, name, _ = place
        tensor = owner.get(name)
        if tensor is None:
            return Buffer(place, None, 0, None)
        return Buffer(place, tensor, version_of(tensor), tensor.detach().clone())

    def is_changed(self) -> bool:
        """Whether it is another one, or counts a change in place."""
        owner, name, _ = self.place
        tensor = owner.get(name)
        return tensor is not self.tensor or (tensor is not None and version_of(tensor) != self.version)

    def is_changed_uncounted(self) -> bool:
        """Whether its values are others: BatchNorm's kernels count no change in place."""
        tensor = self.tensor
        if tensor is None or tensor.layout is not torch.strided or not tensor.dtype.is_floating_point or tensor.is_meta:
            return False
        return tensor.dtype.itemsize > 1 and not torch.equal(tensor, self.value)

    @contextmanager
    def back(self) -> Iterator[None]:
        """With its value then; at the end it has the one that it has now."""
        owner, name, of_torch = self.place
        now, tensor = owner.get(name), self.tensor
        current = None if tensor is None else tensor.detach().clone()
        try:
            owner[name] = tensor
            if tensor is not None and (tensor.dtype.is_floating_point or of_torch) and not _is_expanded(tensor):
                tensor.data.copy_(self.value)  # .data: no count of changes, which autograd would take for an error
            yield
        finally:
            if tensor is not None and not _is_expanded(tensor):
                tensor.data.copy_(current)
            owner[name] = now


class Buffers:
    """Those of the modules that a function reaches.

    Args:
        func: The user's velocity.
    """

    def __init__(self, func: Any) -> None:
        modules = reached(func).modules
        self.places = [
            Place(module._buffers, name, type(module).__module__.startswith("torch."))
            for module in modules
            if isinstance(module._buffers, dict)  # TorchScript has another thing there
            for name, buffer in module._buffers.items()
            if not is_lazy(buffer)
        ]
        self.unchanged: list[Buffer] | None = None  # so far, as they were at first
        self.changed: list[Buffer] = []  # the others, as they were at first
        self.is_first = True

    def before(self) -> list[Buffer]:
        """What has changed so far, as it is before the evaluation that follows."""
        if self.unchanged is None:
            self.unchanged = [Buffer.at(place) for place in self.places]
        return [Buffer.at(buffer.place) for buffer in self.changed]

    def note_changes(self) -> None:
        """Note what the evaluation behind before() was the first to change.

        Values are compared behind the first one, and where something of the same module has changed: BatchNorm counts
        its batches.
        """
        assert self.unchanged is not None, "before() was called"
        beside = {id(buffer.place[0]) for buffer in (*self.changed, *filter(Buffer.is_changed, self.unchanged))}
        rest = list[Buffer]()
        for buffer in self.unchanged:
            looks_closer = self.is_first or id(buffer.place[0]) in beside
            is_changed = buffer.is_changed() or (looks_closer and buffer.is_changed_uncounted())
            (self.changed if is_changed else rest).append(buffer)
        self.unchanged, self.is_first = rest, False

    @contextmanager
    def brought_back(self, before: list[Buffer]) -> Iterator[None]:
        """With the values of an evaluation: these, and of what changed later alone those at first."""
        later = self.changed[len(before) :]
        with ExitStack() as stack:
            for buffer in (*before, *later):
                stack.enter_context(buffer.back())
            yield


def _is_expanded(tensor: torch.Tensor) -> bool:
    """Whether entries share memory: nothing can be written to it."""
    return tensor.layout is torch.strided and any(
        s == 0 < n - 1 for s, n in zip(tensor.stride(), tensor.shape, strict=True)
    )
