"""Buffers that a velocity changes as it is evaluated: BatchNorm's statistics, the vectors of a spectral norm.

Where the backward evaluates it once more, they have the values of the forward, and afterwards those that they had. So
do small tensors that are changed in place and are no buffers, wherever func reaches them. What is bound to another
tensor is bound back.

A flag says that something was made at an evaluation. There it keeps the value that it has, and so does what was made:
that is not made anew. If the result is another one, it is made anew all the same, and if that is another, too, all that
the evaluation alone has changed is kept: the flag may be a number of Python's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from enum import Enum
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from rampde_fx.errors import RecomputationError
from rampde_fx.reach import MOST_ENTRIES, UNSET, Slot, attributes_of, reached, slot_in
from rampde_fx.small_tensors import SMALL, has_comparable_entries, own_entries, small, value_of, write
from rampde_fx.torch_private import callers
from rampde_fx.torchdiffeq.fingerprints import version_of

MOST_KEPT = 2**22  # entries of a buffer of which a copy is made
OUTSIDE = -1  # the number of what is no evaluation that is computed once more


class Keep(Enum):
    """What is kept of what an evaluation has made, in the order in which it is tried."""

    FLAGGED = "flags, and what changed with one and never since"
    NOTHING = "but attributes that it has made"
    ALL = "what it alone has changed"


class Place(NamedTuple):
    """Of a buffer, or of a tensor that is none.

    Attributes:
        owner: The buffers of its module.
        name: Its name there.
        of_torch: Whether torch has written what makes it.
    """

    owner: dict[str, Any]
    name: str
    of_torch: bool

    def held(self) -> Any:
        """What stands there: UNSET if nothing does, None for what has no shape yet."""
        found = self.owner.get(self.name, UNSET)
        return None if isinstance(found, torch.Tensor) and is_lazy(found) else found


class Buffer(NamedTuple):
    """A buffer before an evaluation.

    Attributes:
        place: Where it stands.
        tensor: Itself, or None or UNSET.
        version: Its count of changes in place.
        value: A copy.
    """

    place: Place
    tensor: Any
    version: int
    value: torch.Tensor | None

    @staticmethod
    def at(place: Place) -> Buffer:
        """The one that stands there."""
        tensor = place.held()
        if not isinstance(tensor, torch.Tensor) or tensor.is_nested:
            return Buffer(place, tensor, 0, None)
        is_kept = own_entries(tensor).numel() <= MOST_KEPT
        return Buffer(place, tensor, version_of(tensor), value_of(tensor) if is_kept else None)

    def is_changed(self) -> bool:
        """Whether it is another one, has another shape, or counts a change in place."""
        tensor = self.place.held()
        if tensor is not self.tensor or not isinstance(tensor, torch.Tensor) or tensor.is_nested:
            return tensor is not self.tensor
        if self.value is not None:
            return version_of(tensor) != self.version or tensor.shape != self.value.shape
        if version_of(tensor) != self.version:
            raise too_large(tensor)
        return False

    def is_comparable(self) -> bool:
        """Whether its values may have changed though nobody counts it: BatchNorm's kernels count no change."""
        if self.value is None or not has_comparable_entries(self.tensor) or callers.wraps_others(self.tensor):
            return False
        return self.place.of_torch or own_entries(self.value).numel() <= SMALL

    def may_be_flag(self) -> bool:
        """Whether it is of the user's own, and is not there, whole, or one number."""
        if self.value is None or self.place.of_torch:
            return not self.place.of_torch
        return self.is_comparable() and (_is_whole(self.value) or self.value.numel() == 1)

    @contextmanager
    def back(self, *, is_kept: bool) -> Iterator[None]:
        """With its value then, unless it is kept; at the end it has the one that it has now."""
        owner, name = self.place.owner, self.place.name
        now, tensor = owner.get(name, UNSET), self.tensor
        kept = now if is_kept else tensor
        is_copied = isinstance(kept, torch.Tensor) and not (is_lazy(kept) or kept.is_nested)
        current = value_of(kept) if is_copied else None
        try:
            if not is_kept:
                _bind(owner, name, tensor if self.value is None or _is_writable(tensor) else self.value.clone())
                if self.value is not None and _is_writable(tensor):
                    write(tensor, self.value)
            yield
        finally:
            _bind(owner, name, now)
            if current is not None and _is_writable(kept):
                write(kept, current)


@dataclass
class Changed:
    """A buffer that was changed.

    Attributes:
        first: As it was at first.
        birth: The number of the evaluation that changed it first.
        is_made: Whether it is an attribute that this evaluation has made.
        changes: How many evaluations have changed it.
    """

    first: Buffer
    birth: int
    is_made: bool = False
    changes: int = 1

    def is_flag(self) -> bool:
        """Whether it says that something was made: it changed once, from nothing, a floating one from 0 to 1."""
        if self.changes != 1 or not self.first.may_be_flag():
            return False
        value, now = self.first.value, self.first.place.held()
        if value is None or _is_whole(value):
            return True
        return isinstance(now, torch.Tensor) and now.numel() == 1 and float(value) == 0 and float(now) == 1


class Before(NamedTuple):
    """What an evaluation finds.

    Attributes:
        number: Of the evaluation.
        buffers: Those that have changed so far.
        flags: Which modules train, and which leaves require gradients.
    """

    number: int
    buffers: list[Buffer]
    flags: tuple[list[bool], list[bool]]


class Buffers:
    """Those of the modules that a function reaches, and small tensors beside them.

    Args:
        func: The user's velocity.
        is_called_back: Whether code of the user's runs between evaluations.
    """

    def __init__(self, func: Any, *, is_called_back: bool) -> None:
        self.is_called_back = is_called_back
        self.found = found = reached(func)
        self.leaves = [
            *found.parameters(),
            *(tensor for tensor, _ in found.tensors if tensor.requires_grad and tensor.is_leaf),
        ]
        self.registers = [
            (module._buffers, type(module))
            for module, _ in found.modules
            if isinstance(module._buffers, dict)  # TorchScript has another thing there
        ]
        self.names = [set(register) for register, _ in self.registers]
        self.owners = [attributes_of(owner) for owner, _ in (*found.modules, *found.objects)]
        values = (value for owner in self.owners for value in owner.values() if isinstance(value, torch.Tensor))
        self.tensors = {id(tensor) for tensor in (*(tensor for tensor, _ in found.tensors), *values)}
        self.bound: list[Slot] | None = None  # what is bound to tensors
        self.unchanged: list[Buffer] | None = None  # so far, as they were at first
        self.changed: list[Changed] = []  # the others
        self.count = 0  # of evaluations
        # A frozen module of TorchScript has no mode.
        self.trained = [m for m, _ in found.modules if isinstance(getattr(m, "training", None), bool)]
        self.flags: tuple[list[bool], list[bool]] = ([], [])

    def before(self) -> Before:
        """What has changed so far, as it is before the evaluation that follows."""
        if self.unchanged is None:
            places = [Place(r, name, _is_of_torch(kind, name)) for r, kind in self.registers for name in r]
            places += map(_apart, self.found.statistics())
            self.unchanged = [Buffer.at(place) for place in places]
        else:  # a callback, or an evaluation that is not recorded: the first size of an adaptive step is found by one
            self._note_first_changes(OUTSIDE, [], by_values=self.is_called_back or self.count <= 1)
        return Before(self.count, [Buffer.at(changed.first.place) for changed in self.changed], self._flags())

    def _flags(self) -> tuple[list[bool], list[bool]]:
        """Those of now; the ones before, where they are the same."""
        flags = [module.training for module in self.trained], [leaf.requires_grad for leaf in self.leaves]
        if flags != self.flags:
            self.flags = flags
        return self.flags

    def _set_flags(self, flags: tuple[list[bool], list[bool]]) -> None:
        """Have modules train, and leaves require gradients, as then."""
        modes, needs = flags
        for module, mode in zip(self.trained, modes, strict=True):
            if module.training != mode:
                module.training = mode
        for leaf, is_needed in zip(self.leaves, needs, strict=True):
            if leaf.requires_grad != is_needed:
                leaf.requires_grad_(is_needed)

    def note_changes(self, before: Before) -> None:
        """Note what the evaluation behind before() has changed, for the first time or again."""
        assert self.unchanged is not None, "before() was called"
        births = {changed.birth for changed in self.changed if changed.is_flag()}
        known = list(zip(self.changed, before.buffers, strict=True))
        closer = [b for c, b in known if (c.birth in births or b.may_be_flag()) and b.is_comparable()]
        uncounted = self._note_first_changes(before.number, closer)
        for changed, buffer in known:
            changed.changes += buffer.is_changed() or id(buffer) in uncounted
        self.changed += self._made(before.number)
        self.count = before.number + 1

    def _note_first_changes(self, number: int, others: list[Buffer], *, by_values: bool = True) -> set[int]:
        """Note what was changed for the first time; which have other values that nobody counted, the others too."""
        unchanged = self.unchanged or []
        # Of frozen parameters there may be many, and those that change do so from the first evaluations on.
        asked = [b for b in unchanged if by_values and (number <= 1 or not isinstance(b.tensor, nn.Parameter))]
        compared = [buffer for buffer in asked if buffer.is_comparable()]
        uncounted = _changed_uncounted([*others, *compared])
        rest = list[Buffer]()
        for buffer in unchanged:
            if buffer.is_changed() or id(buffer) in uncounted:
                self.changed.append(Changed(buffer, number))
            else:
                rest.append(buffer)
        self.unchanged = rest
        return uncounted

    def _made(self, number: int) -> Iterator[Changed]:
        """Buffers that are new, and at the first evaluation attributes that are."""
        for (register, kind), names in zip(self.registers, self.names, strict=True):
            for name in register.keys() - names:
                yield Changed(Buffer(Place(register, name, _is_of_torch(kind, name)), UNSET, 0, None), number)
            names.update(register)
        if number == 0:
            for owner in self.owners:
                values = [value for value in owner.values() if isinstance(value, torch.Tensor)]
                for value in small([value for value in values if id(value) not in self.tensors]):
                    yield Changed(Buffer.at(_apart(value)), number, is_made=True)

    def ways(self, before: Before) -> list[Keep]:
        """Those in which what an evaluation has made may be kept."""
        found: dict[tuple[bool, ...], Keep] = {}
        for keep in Keep:
            found.setdefault(tuple(self._keeps(before, keep)), keep)
        return list(found.values())

    def _keeps(self, before: Before, keep: Keep) -> list[bool]:
        """Whether each of those that changed keeps its value."""
        own = [c for c in self.changed if c.birth == before.number]
        has_flag = any(c.is_flag() for c in own)
        keeps_once = keep is Keep.ALL or (keep is Keep.FLAGGED and has_flag)
        return [c.birth == before.number and (c.is_made or (keeps_once and c.changes == 1)) for c in self.changed]

    @contextmanager
    def brought_back(self, before: Before, keep: Keep) -> Iterator[None]:
        """With the values of an evaluation, of what changed later those at first; what it made may be kept."""
        then = [*before.buffers, *(changed.first for changed in self.changed[len(before.buffers) :])]
        if self.bound is None:
            self.bound = list(self._bound())
        with ExitStack() as stack:
            stack.callback(_put_back, self.bound, [slot.read() for slot in self.bound])
            stack.callback(self._set_flags, self._flags())
            self._set_flags(before.flags)
            for buffer, is_kept in zip(then, self._keeps(before, keep), strict=True):
                stack.enter_context(buffer.back(is_kept=is_kept))
            yield

    def _bound(self) -> Iterator[Slot]:
        """What is bound to a tensor: attributes, variables, entries of lists and dicts."""
        yield from (slot for slot in self.found.slots if isinstance(slot.read(), torch.Tensor))
        short = [held for held in self.found.containers if len(held) <= MOST_ENTRIES]
        parameters = [m._parameters for m, _ in self.found.modules if isinstance(m._parameters, dict)]
        for held in (*self.owners, *parameters, *(held for held in short if type(held) is dict)):
            yield from (slot_in(held, key) for key, value in held.items() if isinstance(value, torch.Tensor))
        for held in short:
            if type(held) is list:
                yield from (_entry(held, i) for i, value in enumerate(held) if isinstance(value, torch.Tensor))


def _put_back(slots: list[Slot], values: list[Any]) -> None:
    for slot, value in zip(slots, values, strict=True):
        slot.put_back(value)


def _apart(tensor: torch.Tensor) -> Place:
    """The place of a tensor that is followed wherever it stands."""
    return Place({"": tensor}, "", of_torch=False)


def _entry(held: list[Any], i: int) -> Slot:
    def bind(value: Any) -> None:
        if i < len(held):
            held[i] = value

    return Slot(lambda: held[i] if i < len(held) else UNSET, bind)


def _bind(owner: dict[str, Any], name: str, value: Any) -> None:
    if value is UNSET:
        owner.pop(name, None)
    else:
        owner[name] = value


def _is_writable(tensor: torch.Tensor) -> bool:
    return tensor.layout is torch.strided


def _changed_uncounted(buffers: Sequence[Buffer]) -> set[int]:
    """Those that have other values, by identity; those of one dtype and device are compared at once."""
    found = set[int]()
    alike: dict[tuple[Any, ...], list[tuple[Buffer, torch.Tensor, torch.Tensor]]] = {}
    for buffer in buffers:
        if buffer.value is None or buffer.tensor.shape != buffer.value.shape:
            continue
        own, value = own_entries(buffer.tensor.detach()), own_entries(buffer.value)
        if own.shape == value.shape:
            alike.setdefault((own.dtype, own.device), []).append((buffer, own, value))
        else:
            found.add(id(buffer))
    for group in alike.values():
        now = torch.cat([own.reshape(-1) for _, own, _ in group])
        before = torch.cat([value.reshape(-1) for _, _, value in group])
        if not torch.equal(now, before):
            found |= {id(buffer) for buffer, own, value in group if not torch.equal(own, value)}
    return found


def _is_of_torch(kind: type, name: str) -> bool:
    """Whether torch has written what makes a buffer: the class of the module, or one that it inherits from."""
    ancestors = [owner for owner in kind.__mro__ if owner.__module__.startswith("torch.") and owner is not nn.Module]
    if kind in ancestors:
        return True
    makers = [vars(owner).get("__init__") for owner in ancestors]
    return any(isinstance(made, FunctionType) and name in made.__code__.co_consts for made in makers)


def _is_whole(tensor: torch.Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex())


def too_large(tensor: torch.Tensor) -> RecomputationError:
    """The error of a buffer of which no copy was made."""
    return RecomputationError(
        f"a buffer of shape {tuple(tensor.shape)} was changed in place by the solve: the backward would change it once "
        "more",
        required=f"buffers of at most {MOST_KEPT:,} entries, or ones that stay as they are",
        fix="change it after loss.backward(), or use odeint",
    )
