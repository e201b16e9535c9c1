"""Whether a step that is computed once more is the one that was computed first, by a number of each of its tensors.

Of its results, and of what its derivatives are made of: what autograd has saved. A result may hide another value of it,
as a last layer of zeros does.

Bits may differ though nothing has changed, where sums are taken in any order, as on GPUs, and memory may be saved that
nobody has written. So a step with other bits is computed another time, with all memory written before it is handed out:
what differs then, too, is not reproducible.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch.utils import _pytree as pytree

from rampde_fx.small_tensors import SMALL
from rampde_fx.torch_private import callers
from rampde_fx.torch_private.fake_tensors import no_autocast

NOISE = 4  # roundings of a norm, in float32 of all that is lower, of which nobody asks where they come from
ROUNDINGS = 64  # roundings of its own dtype: more of these, and
COARSE_ROUNDINGS = 8  # of the coarsest dtype that was met, are another tensor
LENGTH, SEED = 2**16, 20251023  # of a direction on which tensors are projected
COPIES = 8  # of a tensor, whose memory is handed out next
UNKNOWN, POSITIVE, NEGATIVE = 7.1, 3.7, -5.3  # what stands for NaN and the infinities in a projection
LARGE = 2.0**4  # from here on an entry may mask, beside which no other counts
HUGE = 2.0**60  # beyond it the logarithm stands for a number, whose square may be infinite
Projections = dict[Any, tuple[weakref.ref[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]]


class Fingerprint(NamedTuple):
    """Of the tensors of a result, and of those that are saved.

    Attributes:
        numbers: A projection of each on a random direction, float64, 1-D; then of the logarithms of each that has large
            entries, in which one that masks, of -1e9 say, counts as much as a few small ones; 0 of others.
        tensors: They themselves, as long as they are at hand: their norms are asked for where bits differ.
        are_large: Which have large entries.
    """

    numbers: torch.Tensor
    tensors: Sequence[torch.Tensor]
    are_large: Sequence[bool]

    def is_near(self, numbers: torch.Tensor) -> torch.Tensor:
        """Which tensors differ from those of these numbers by rounding of which nobody asks, if at all."""
        return self._differences(numbers) <= NOISE * self._units(torch.float32) * self._norms()

    def is_another(self, numbers: torch.Tensor, unit: float | None) -> torch.Tensor:
        """Which tensors differ by more than rounding in the coarsest dtype that was met, which has this unit.

        None stands for float32 and what is finer: what is computed in a coarser dtype has no more rounding then.
        """
        own = ROUNDINGS * self._units(torch.float32 if unit is None else None)
        shares = own + COARSE_ROUNDINGS * (unit or 0.0)
        return ~(self._differences(numbers) <= shares * self._norms())

    def difference(self, numbers: torch.Tensor) -> float:
        """By which share of their norm they differ, the furthest."""
        differences = self._differences(numbers)
        return float(torch.where(differences == 0, 0.0, differences / self._norms()).nan_to_num(1.0, 1.0).amax())

    def fills(self) -> list[int]:
        """How many entries of each tensor are NaN, or the largest number: what torch fills memory with; twice."""
        return 2 * [sum(_count_fills(*part) for part in _parts(tensor)) for tensor in self.tensors]

    def rests(self, are_unwritten: Sequence[bool]) -> Iterator[tuple[torch.Tensor, int]]:
        """The floating tensors of which only a part is memory that was filled, and how many entries are not."""
        for tensor, is_unwritten in zip(self.tensors, are_unwritten, strict=False):
            if is_unwritten and not _is_whole(tensor) and tensor.layout is torch.strided:
                rest = tensor.numel() - int(tensor.isnan().sum())
                if rest:
                    yield tensor, rest

    def leave_zeros(self) -> None:
        """Have memory that is handed out next, for tensors of these sizes, be zero rather than what it was."""
        zeros = [torch.zeros_like(tensor) for tensor in self.tensors for _ in range(COPIES)]
        del zeros

    def _differences(self, numbers: torch.Tensor) -> torch.Tensor:
        return (self.numbers - numbers).abs()

    def _norms(self) -> torch.Tensor:
        plain = [_norm(part for part, _ in _parts(tensor)) for tensor in self.tensors]
        large = zip(self.tensors, self.are_large, strict=True)
        logarithms = [_norm(_logarithms(part) for part, _ in _parts(x)) if is_large else 0.0 for x, is_large in large]
        device = self.numbers.device
        return torch.stack([torch.as_tensor(norm, device=device).to(self.numbers) for norm in (*plain, *logarithms)])

    def _units(self, coarsest: torch.dtype | None) -> torch.Tensor:
        units = [0.0 if _is_whole(tensor) else torch.finfo(tensor.dtype).eps for tensor in self.tensors]
        most = torch.finfo(coarsest).eps if coarsest else 1.0
        return self.numbers.new_tensor(2 * [min(unit, most) for unit in units])


class Fingerprints:
    """What makes them; it keeps the directions, and the projections of parameters, which many steps read."""

    def __init__(self) -> None:
        self.directions: dict[tuple[int, torch.device, torch.dtype], torch.Tensor] = {}
        self.pass_of_leaves = -1
        self.leaves = Projections()

    @torch.no_grad()
    @no_autocast()
    def of(self, found: Any, saved: Sequence[torch.Tensor], before: Sequence[bool] = ()) -> Fingerprint | None:
        """That of a result, and of what was saved for its derivative; None of what wraps other tensors.

        Args:
            found: The result.
            saved: The tensors.
            before: Which of all had large entries in the forward; empty in it.
        """
        results = [leaf for leaf in pytree.tree_leaves(found) if isinstance(leaf, torch.Tensor)]
        tensors = [tensor for tensor in (*results, *saved) if not (tensor.is_meta or tensor.is_nested)]
        if any(callers.wraps_others(tensor) for tensor in tensors):
            return None
        at_hand = Projections()
        are_large = before if len(before) == len(tensors) else [_is_large(tensor) for tensor in tensors]
        pairs = [self._of(tensor, is_large, at_hand) for tensor, is_large in zip(tensors, are_large, strict=True)]
        numbers = torch.stack([pair[i].to(results[0].device) for i in (0, 1) for pair in pairs])
        return Fingerprint(numbers, tensors, are_large)

    def _of(self, tensor: torch.Tensor, is_large: bool, at_hand: Projections) -> tuple[torch.Tensor, torch.Tensor]:
        """The projections of one; those that are at hand are known by where they are, for many are saved twice."""
        place, base = place_of(tensor), tensor if tensor._base is None else tensor._base
        if not place:
            return self._projections(tensor, is_large)
        projections = at_hand
        # Large frozen parameters, too; small ones may be statistics, of which nobody counts a change.
        is_frozen = isinstance(base, torch.nn.Parameter) and base.numel() > SMALL
        if is_frozen or (base.is_leaf and base.requires_grad):
            if self.pass_of_leaves != (now := callers.backward_under_way()):
                self.leaves, self.pass_of_leaves = Projections(), now
            projections = self.leaves
        look = (tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.is_conj(), tensor.is_neg())
        key = (place, version_of(tensor), is_large, *look)
        if key not in projections or projections[key][0]() is not base:  # one that is gone has left its place
            projections[key] = weakref.ref(base), self._projections(tensor, is_large)
        return projections[key][1]

    def _projections(self, tensor: torch.Tensor, is_large: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Of its entries, and of their logarithms, each float64, 0-D."""
        parts = [part for part, _ in _parts(tensor)]
        plain = self._sum(map(self._of_part, parts))
        if not is_large:
            return plain, torch.zeros_like(plain)
        return plain, self._sum(self._of_part(_logarithms(part)) for part in parts)

    def _sum(self, numbers: Iterable[torch.Tensor]) -> torch.Tensor:
        first, *others = numbers
        return (torch.stack([first, *others]).sum() if others else first).double()

    def _of_part(self, flat: torch.Tensor) -> torch.Tensor:
        """The projection of entries, of which some may be huge, or not finite."""
        if flat.device.type == "cpu" and abs((number := self._projected(flat)).item()) < HUGE:
            return number
        return self._projected(_with_stand_ins(flat))

    def _projected(self, flat: torch.Tensor, level: int = 0) -> torch.Tensor:
        """On a direction; on a product of directions where one would take as much memory."""
        direction = self._direction(level, flat)
        if len(flat) <= LENGTH:
            return torch.dot(flat, direction[: len(flat)])
        rows, rest = divmod(len(flat), LENGTH)
        last = torch.dot(flat[rows * LENGTH :], direction[:rest])
        of_rows = flat[: rows * LENGTH].view(rows, LENGTH) @ direction
        return self._projected(torch.cat([of_rows, last[None]]), level + 1)

    def _direction(self, level: int, like: torch.Tensor) -> torch.Tensor:
        key = (level, like.device, like.dtype)
        if key not in self.directions:
            self.directions[key] = _whole_direction(level).to(like.device, like.dtype)
        return self.directions[key]


@cache
def _whole_direction(level: int) -> torch.Tensor:
    """A random sign and a size between 1/2 and 3/2 for each entry: a smooth change is seen, and one of few entries.

    Each level has another one: a product of one with itself would not see a matrix that is transposed.
    """
    generator = torch.Generator().manual_seed(SEED + level)
    sizes, signs = torch.rand(2, LENGTH, generator=generator, dtype=torch.float64, device="cpu")
    return (0.5 + sizes).copysign(signs - 0.5)


def version_of(tensor: torch.Tensor) -> int:
    """Its count of changes in place; tensors of inference mode have none."""
    return -1 if tensor.is_inference() else tensor._version


def place_of(tensor: torch.Tensor) -> int:
    """Where its memory is, 0 where it has none of its own."""
    return tensor.data_ptr() if tensor.layout is torch.strided and not callers.wraps_others(tensor) else 0


def memory_of(tensor: torch.Tensor) -> int:
    """Where the memory begins that its views share with it, 0 where it has none of its own."""
    return tensor.untyped_storage().data_ptr() if place_of(tensor) else 0


def is_of_leaf(tensor: torch.Tensor) -> bool:
    """Whether it is a leaf of autograd, or a view of one: no graph hangs on it."""
    return tensor.is_leaf if tensor._base is None else tensor._base.is_leaf


def _is_whole(tensor: torch.Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex())


def _count_fills(flat: torch.Tensor, fill: float) -> int:
    return int((flat.isnan() if math.isnan(fill) else flat == fill).sum())


def _is_large(tensor: torch.Tensor) -> bool:
    """Whether some entries are; another device is not asked."""
    return tensor.device.type != "cpu" or any(map(_has_large, (part for part, _ in _parts(tensor))))


def _has_large(flat: torch.Tensor) -> bool:
    if not len(flat):
        return False
    least, most = flat.aminmax()
    return not max(-least.item(), most.item()) < LARGE  # a NaN is


def _logarithms(flat: torch.Tensor) -> torch.Tensor:
    """Of one more than the size of each entry, with its sign."""
    return flat.abs().log1p_().copysign_(flat)


def _norm(parts: Iterable[torch.Tensor]) -> Any:
    return sum(torch.linalg.vector_norm(_with_stand_ins(part), dtype=torch.float64) for part in parts)


def _with_stand_ins(flat: torch.Tensor) -> torch.Tensor:
    """Numbers whose squares have a sum in float64."""
    finite = flat.nan_to_num(UNKNOWN, POSITIVE, NEGATIVE)
    return torch.where(finite.abs() <= HUGE, finite, finite.abs().log2().copysign(finite))


def _parts(tensor: torch.Tensor) -> Iterator[tuple[torch.Tensor, float]]:
    """Its entries, and where they are in a sparse one, 1-D in a dtype that sums them up; what torch fills each with."""
    plain = tensor.detach()
    if type(plain) is not torch.Tensor and plain.layout is torch.strided:
        plain = plain.as_subclass(torch.Tensor)
    if plain.layout is torch.sparse_coo:
        pieces = [plain._values(), plain._indices()]
    elif plain.layout in (torch.sparse_csr, torch.sparse_bsr):
        pieces = [plain.values(), plain.crow_indices(), plain.col_indices()]
    elif plain.layout in (torch.sparse_csc, torch.sparse_bsc):
        pieces = [plain.values(), plain.ccol_indices(), plain.row_indices()]
    else:
        pieces = [plain if plain.layout is torch.strided else plain.to_dense()]
    for piece in pieces:
        real = torch.view_as_real(piece.resolve_conj()) if piece.is_complex() else piece
        if _is_whole(real):
            fill = math.inf if real.dtype is torch.bool else torch.iinfo(real.dtype).max
            yield real.reshape(-1).to(torch.float64), float(fill)
        else:
            wide = real if real.dtype is torch.float64 else real.to(torch.float32)
            yield wide.reshape(-1), math.nan
