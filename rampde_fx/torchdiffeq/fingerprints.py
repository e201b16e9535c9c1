"""Whether a step that is computed once more is the one that was computed first, by a few numbers of its tensors.

Of its results, and of what its derivatives are made of: what autograd has saved. A result may hide another value of it,
as a last layer of zeros does.

Bits may differ though nothing has changed, where sums are taken in any order, as on GPUs. So what differs by more than
rounding, and by no more than rounding in the coarsest dtype that was met, is computed another time: only where that
differs again, the function itself is not reproducible.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.utils import _pytree as pytree

from rampde_fx.torch_private import callers

NOISE = 4  # roundings of a tensor's own dtype, of which nobody asks where they come from
ROUNDINGS = 64  # more of these, and
COARSE_ROUNDINGS = 8  # of the coarsest dtype that was met, are another tensor
LENGTH = 2**16  # of the directions on which what is saved is projected
WHOLE = (torch.bool, torch.int16, torch.int32, torch.int64)


Projections = dict[Any, tuple[weakref.ref[torch.Tensor], torch.Tensor]]


class Fingerprint(NamedTuple):
    """Of the tensors of a result, and of those that are saved.

    Attributes:
        numbers: Three of each tensor of the result: the projection on a fixed direction, and the norm, of what is
            finite; the projection of what is not, as ones. Then a projection of each that is saved. float64, 1-D.
        units: The unit roundoff of the dtype of each.
        saved: Those that are saved, as long as they are at hand: their sizes are asked for where bits differ.
    """

    numbers: torch.Tensor
    units: list[float]
    saved: Sequence[torch.Tensor] = ()

    def without_tensors(self) -> Fingerprint:
        """To be kept: sizes are those of another one, which was made from the tensors."""
        return self._replace(saved=())

    def equals(self, other: Fingerprint) -> bool:
        """Whether they are the same."""
        return torch.equal(self.numbers, other.numbers)

    def is_near(self, other: Fingerprint) -> bool:
        """Whether this one, made from tensors that are at hand, differs by rounding alone."""
        return self.equals(other) or not self._is_beyond(other, NOISE, 0.0)

    def is_another(self, other: Fingerprint, unit: float) -> bool:
        """Whether they differ by more than rounding in the coarsest dtype that was met, which has this unit."""
        return self._is_beyond(other, ROUNDINGS, COARSE_ROUNDINGS * unit)

    def difference(self, other: Fingerprint) -> float:
        """By which share of their size they differ, the furthest."""
        return float((self._differences(other) / self._sizes()).nan_to_num(1.0, 0.0, 0.0).amax())

    def _differences(self, other: Fingerprint) -> torch.Tensor:
        return torch.where(self.numbers == other.numbers, 0.0, (self.numbers - other.numbers).abs())

    def _sizes(self) -> torch.Tensor:
        """The norm of the tensor of each number; 0 of an infinite one, and where it is whether entries are finite."""
        results = self.numbers[: len(self.numbers) - len(self.saved)].view(-1, 3)
        sizes = results[:, 1:2].repeat(1, 3)
        sizes[:, 2] = 0.0
        norms = [torch.linalg.vector_norm(_wide(tensor)).to(sizes) for tensor in self.saved]
        found = torch.cat([sizes.flatten(), *(norm[None] for norm in norms)])
        return torch.where(found.isfinite(), found, 0.0)

    def _is_beyond(self, other: Fingerprint, roundings: float, share: float) -> bool:
        shares = roundings * self.numbers.new_tensor(self.units) + share
        return not bool((self._differences(other) <= shares * self._sizes()).all())


class Fingerprints:
    """What makes them; it keeps the directions, and the projections of leaves of autograd, which many steps read."""

    def __init__(self) -> None:
        self.directions: dict[tuple[int, torch.device, torch.dtype], torch.Tensor] = {}
        self.pass_of_leaves = -1
        self.leaves = Projections()

    @torch.no_grad()
    def of(self, found: Any, saved: Sequence[torch.Tensor]) -> Fingerprint | None:
        """That of a result, and of what was saved for its derivative; None of results that wrap other tensors."""
        groups: dict[tuple[torch.Size, torch.dtype], list[torch.Tensor]] = {}
        for leaf in pytree.tree_leaves(found):
            if isinstance(leaf, torch.Tensor) and not _is_whole(leaf):
                if callers.wraps_others(leaf):
                    return None
                groups.setdefault((leaf.shape, leaf.dtype), []).append(leaf.detach().as_subclass(torch.Tensor))
        numbers = [self._of_results(torch.stack(leaves)).flatten() for leaves in groups.values()]
        units = [torch.finfo(dtype).eps for (_, dtype), leaves in groups.items() for _ in range(3 * len(leaves))]
        known = [tensor for tensor in saved if _has_numbers(tensor)]
        projections = Projections()
        numbers += [self._of_saved(tensor, projections).to(numbers[0])[None] for tensor in known]
        units += [0.0 if _is_whole(tensor) else torch.finfo(tensor.dtype).eps for tensor in known]
        return Fingerprint(torch.cat(numbers).nan_to_num(), units, known)

    def _of_results(self, values: torch.Tensor) -> torch.Tensor:
        parts = torch.view_as_real(values.resolve_conj()) if values.is_complex() else values
        flat = parts.reshape(len(values), -1).double()
        finite = flat.nan_to_num(0.0, 0.0, 0.0)
        direction = self._direction(flat.shape[1], flat)
        others = (flat != finite).double()
        return torch.stack([finite @ direction, torch.linalg.vector_norm(finite, dim=1), others @ direction], dim=1)

    def _of_saved(self, tensor: torch.Tensor, others: Projections) -> torch.Tensor:
        """The projection of one; others that are at hand are known by where they are, for many are saved twice."""
        if is_of_leaf(tensor):
            if self.pass_of_leaves != (now := callers.backward_under_way()):
                self.leaves, self.pass_of_leaves = Projections(), now
            others = self.leaves
        key = (place_of(tensor), tensor.shape, tensor.stride(), tensor.dtype, tensor.device, version_of(tensor))
        base = tensor if tensor._base is None else tensor._base
        if key not in others or others[key][0]() is not base:  # of a leaf that is gone another has the place
            others[key] = weakref.ref(base), self._projection(_wide(tensor))
        return others[key][1]

    def _projection(self, flat: torch.Tensor) -> torch.Tensor:
        """On a direction; on a product of directions where one would take as much memory."""
        if len(flat) <= LENGTH:
            return torch.dot(flat, self._direction(len(flat), flat))
        rows, rest = divmod(len(flat), LENGTH)
        last = torch.dot(flat[rows * LENGTH :], self._direction(rest, flat))
        return self._projection(
            torch.cat([flat[: rows * LENGTH].view(rows, LENGTH) @ self._direction(LENGTH, flat), last[None]])
        )

    def _direction(self, length: int, like: torch.Tensor) -> torch.Tensor:
        key = (length, like.device, like.dtype)
        if key not in self.directions:
            whole = torch.arange(1, length + 1, dtype=torch.float64, device=like.device)
            self.directions[key] = whole.sin().to(like.dtype)  # of a whole number it is never 0
        return self.directions[key]


def version_of(tensor: torch.Tensor) -> int:
    """Its count of changes in place; tensors of inference mode have none."""
    return -1 if tensor.is_inference() else tensor._version


def place_of(tensor: torch.Tensor) -> int:
    """Where its memory is, 0 where it has none of its own."""
    return tensor.data_ptr() if tensor.layout is torch.strided and not callers.wraps_others(tensor) else 0


def is_of_leaf(tensor: torch.Tensor) -> bool:
    """Whether it is a leaf of autograd that requires gradients, or a view of one."""
    base = tensor if tensor._base is None else tensor._base
    return base.is_leaf and base.requires_grad


def _has_numbers(tensor: torch.Tensor) -> bool:
    """Whether what it holds is known: not the states of generators, and what kernels leave for their derivatives."""
    is_known = tensor.layout is torch.strided and not tensor.is_meta and not callers.wraps_others(tensor)
    return is_known and (not _is_whole(tensor) or (tensor.ndim > 0 and tensor.dtype in WHOLE))


def _is_whole(tensor: torch.Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex())


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    """Its entries, 1-D, in a dtype that sums them up."""
    plain = tensor.detach().as_subclass(torch.Tensor)
    parts = torch.view_as_real(plain.resolve_conj()) if plain.is_complex() else plain
    if parts.dtype not in (torch.float32, torch.float64):
        parts = parts.to(torch.float64 if _is_whole(plain) else torch.float32)
    return parts.reshape(-1)
