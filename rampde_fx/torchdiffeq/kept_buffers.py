"""Buffers that a velocity changes as it is evaluated: BatchNorm's statistics, the vectors of a spectral norm.

Where the backward evaluates it once more, they have the values of the forward, and afterwards those that they had. So
do small tensors that are changed in place and are no buffers, wherever func reaches them. Attributes that are bound to
another tensor are bound back.

A flag of the user's own module keeps the value that it has: it says that something was made at the first evaluation,
which is not made anew.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from rampde_fx.reach import attributes_of, reached
from rampde_fx.torchdiffeq.fingerprints import version_of

SMALL = 2**16  # entries of a tensor that is no buffer: it is copied


class Place(NamedTuple):
    """Of a buffer, or of a tensor that is none.

    Attributes:
        owner: The buffers of its module.
        name: Its name there.
        of_torch: Whether torch has written what makes it.
        counts: Whether changes of its value are looked for that nobody counts: BatchNorm's kernels count none.
    """

    owner: dict[str, Any]
    name: str
    of_torch: bool
    counts: bool = False


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
        tensor = place.owner.get(place.name)
        if tensor is None:
            return Buffer(place, None, 0, None)
        return Buffer(place, tensor, version_of(tensor), tensor.detach().clone())

    def is_changed(self) -> bool:
        """Whether it is another one, or counts a change in place."""
        tensor = self.place.owner.get(self.place.name)
        return tensor is not self.tensor or (tensor is not None and version_of(tensor) != self.version)

    def is_comparable(self) -> bool:
        """Whether its values may have changed though nobody counts it."""
        tensor = self.tensor
        if self.place.counts or tensor is None or tensor.layout is not torch.strided or tensor.is_meta:
            return False
        return tensor.dtype.is_floating_point and tensor.dtype.itemsize > 1

    def may_be_flag(self) -> bool:
        """Whether it is of the user's own, and whole, or one number."""
        tensor = self.tensor
        if tensor is None or self.place.of_torch or tensor.layout is not torch.strided or tensor.is_meta:
            return False
        return _is_whole(tensor) or tensor.numel() == 1

    @contextmanager
    def back(self, *, is_flag: bool) -> Iterator[None]:
        """With its value then, unless it is a flag; at the end it has the one that it has now."""
        owner, name = self.place.owner, self.place.name
        now, tensor = owner.get(name), self.tensor
        current = None if tensor is None else tensor.detach().clone()
        try:
            owner[name] = tensor
            if tensor is not None and not is_flag and not _is_expanded(tensor):
                tensor.data.copy_(self.value)  # .data: no count of changes, which autograd would take for an error
            yield
        finally:
            if tensor is not None and not _is_expanded(tensor):
                tensor.data.copy_(current)
            owner[name] = now


class Buffers:
    """Those of the modules that a function reaches, and small tensors beside them.

    Args:
        func: The user's velocity.
    """

    def __init__(self, func: Any) -> None:
        found = reached(func)
        self.parameters = [p for module, _ in found.modules for p in module._parameters.values() if p is not None]
        self.places = [
            Place(module._buffers, name, _is_of_torch(type(module), name))
            for module, _ in found.modules
            if isinstance(module._buffers, dict)  # TorchScript has another thing there
            for name, buffer in module._buffers.items()
            if not is_lazy(buffer)
        ]
        self.places += [
            Place({name: tensor}, name, of_torch=False, counts=True)
            for tensor, name in found.tensors
            if _is_small(tensor)
        ]
        self.owners = [attributes_of(owner) for owner, _ in (*found.modules, *found.objects)]
        self.attributes: list[tuple[dict[str, Any], str]] | None = None  # that are bound to tensors
        self.unchanged: list[Buffer] | None = None  # so far, as they were at first
        self.changed: list[Buffer] = []  # the others, as they were at first
        self.changes: list[int] = []  # how often each of these had another value

    def before(self) -> list[Buffer]:
        """What has changed so far, as it is before the evaluation that follows."""
        if self.unchanged is None:
            self.unchanged = [Buffer.at(place) for place in self.places]
        return [Buffer.at(buffer.place) for buffer in self.changed]

    def note_changes(self, before: list[Buffer]) -> None:
        """Note what the evaluation behind before() has changed, for the first time or again."""
        assert self.unchanged is not None, "before() was called"
        for number, buffer in enumerate(before):
            if buffer.may_be_flag() and _is_another(buffer):
                self.changes[number] += 1
        uncounted = _changed_uncounted([buffer for buffer in self.unchanged if buffer.is_comparable()])
        changed = [buffer for buffer in self.unchanged if buffer.is_changed() or id(buffer) in uncounted]
        if changed:
            numbers = set(map(id, changed))
            self.unchanged = [buffer for buffer in self.unchanged if id(buffer) not in numbers]
            self.changed += changed
            self.changes += [1] * len(changed)

    @contextmanager
    def brought_back(self, before: list[Buffer]) -> Iterator[None]:
        """With the values of an evaluation: these, and of what changed later alone those at first."""
        if self.attributes is None:
            self.attributes = [
                (owner, name)
                for owner in self.owners
                for name, value in owner.items()
                if isinstance(value, torch.Tensor)
            ]
        bound = [(owner, name, owner.get(name)) for owner, name in self.attributes]
        then = (*before, *self.changed[len(before) :])
        with ExitStack() as stack:
            for first, buffer, changes in zip(self.changed, then, self.changes, strict=True):
                stack.enter_context(buffer.back(is_flag=_is_flag(first, changes)))
            yield
        for owner, name, value in bound:
            if owner.get(name) is not value:
                owner[name] = value


def _is_flag(first: Buffer, changes: int) -> bool:
    """Whether what was this at first says that something was made: it changed once, a floating one from 0 to 1."""
    if changes != 1 or not first.may_be_flag():
        return False
    assert first.tensor is not None and first.value is not None
    return _is_whole(first.tensor) or (float(first.value) == 0 and float(first.tensor) == 1)


def _is_another(buffer: Buffer) -> bool:
    """Whether the value is no longer that of before the evaluation."""
    now = buffer.place.owner.get(buffer.place.name)
    return now is not buffer.tensor or not torch.equal(now, buffer.value)


def _changed_uncounted(buffers: Sequence[Buffer]) -> set[int]:
    """Those that have other values, by identity; a device is asked once."""
    if not buffers:
        return set()
    differ = [torch.ne(buffer.tensor, buffer.value).any() for buffer in buffers]
    found = torch.stack([each.to(differ[0].device) for each in differ]).tolist()
    return {id(buffer) for buffer, is_changed in zip(buffers, found, strict=True) if is_changed}


def _is_of_torch(kind: type, name: str) -> bool:
    """Whether torch has written what makes a buffer: the class of the module, or one that it inherits from."""
    ancestors = [owner for owner in kind.__mro__ if owner.__module__.startswith("torch.") and owner is not nn.Module]
    if kind in ancestors:
        return True
    makers = [vars(owner).get("__init__") for owner in ancestors]
    return any(isinstance(made, FunctionType) and name in made.__code__.co_consts for made in makers)


def _is_small(tensor: torch.Tensor) -> bool:
    """Whether it may be a statistic: a plain tensor of few entries, on which no graph hangs."""
    is_plain = type(tensor) is torch.Tensor and tensor.layout is torch.strided and not tensor.is_meta
    return is_plain and not tensor.requires_grad and tensor.numel() <= SMALL


def _is_whole(tensor: torch.Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex())


def _is_expanded(tensor: torch.Tensor) -> bool:
    """Whether entries share memory: nothing can be written to it."""
    return tensor.layout is torch.strided and any(
        s == 0 < n - 1 for s, n in zip(tensor.stride(), tensor.shape, strict=True)
    )
