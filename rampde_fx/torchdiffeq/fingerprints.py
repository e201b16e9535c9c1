"""Whether a step that is computed once more is the one that was computed first, by a few numbers of its results.

Bits may differ though nothing has changed, where sums are taken in any order, as on GPUs. So what differs by more than
rounding, and by no more than rounding in the coarsest dtype that was met, is computed another time: only where that
differs again, the function itself is not reproducible.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.utils import _pytree as pytree

from rampde_fx.torch_private import callers

NOISE = 4  # roundings of a result's own dtype, of which nobody asks where they come from
ROUNDINGS = 64  # more of these, and
COARSE_ROUNDINGS = 8  # of the coarsest dtype that was met, are another result


class Fingerprint(NamedTuple):
    """Of each tensor of a result, in float64.

    Attributes:
        numbers: A row each: the projection on a fixed direction, and the norm, of what is finite; the projection of
            what is not, as ones.
        units: The unit roundoff of its dtype, float64 (rows, 1).
    """

    numbers: torch.Tensor
    units: torch.Tensor

    def equals(self, other: Fingerprint) -> bool:
        """Whether the results are the same."""
        return torch.equal(self.numbers, other.numbers)

    def is_near(self, other: Fingerprint) -> bool:
        """Whether they differ by rounding alone."""
        return not bool(self._beyond(other, NOISE * self.units).any())

    def is_another(self, other: Fingerprint, unit: float) -> bool:
        """Whether they differ by more than rounding in the coarsest dtype that was met, which has this unit."""
        return bool(self._beyond(other, ROUNDINGS * self.units + COARSE_ROUNDINGS * unit).any())

    def difference(self, other: Fingerprint) -> float:
        """By which share of their size they differ, the furthest."""
        return float(((self.numbers - other.numbers).abs() / self._sizes()).nan_to_num(1.0, 0.0, 0.0).amax())

    def _sizes(self) -> torch.Tensor:
        sizes = self.numbers[:, 1:2]
        return torch.where(sizes.isfinite(), sizes, 0.0)

    def _beyond(self, other: Fingerprint, shares: torch.Tensor) -> torch.Tensor:
        differences = torch.where(self.numbers == other.numbers, 0.0, (self.numbers - other.numbers).abs())
        bounds = (shares * self._sizes()).repeat(1, 3)
        bounds[:, 2] = 0.0  # whether an entry is finite
        return ~(differences <= bounds)


class Fingerprints:
    """What makes them; it keeps the directions."""

    def __init__(self) -> None:
        self.directions: dict[tuple[int, torch.device], torch.Tensor] = {}

    @torch.no_grad()
    def of(self, found: Any) -> Fingerprint | None:
        """That of a result; None of tensors that wrap others, as distributed ones do."""
        groups: dict[tuple[torch.Size, torch.dtype], list[torch.Tensor]] = {}
        for leaf in pytree.tree_leaves(found):
            if isinstance(leaf, torch.Tensor) and (leaf.is_floating_point() or leaf.is_complex()):
                if callers.wraps_others(leaf):
                    return None
                groups.setdefault((leaf.shape, leaf.dtype), []).append(leaf.detach().as_subclass(torch.Tensor))
        numbers = [self._numbers(torch.stack(leaves)) for leaves in groups.values()]
        units = [torch.finfo(dtype).eps for (_, dtype), leaves in groups.items() for _ in leaves]
        rows = torch.cat(numbers)
        return Fingerprint(rows, rows.new_tensor(units)[:, None])

    def _numbers(self, values: torch.Tensor) -> torch.Tensor:
        parts = torch.view_as_real(values.resolve_conj()) if values.is_complex() else values
        flat = parts.reshape(len(values), -1).double()
        finite = flat.nan_to_num(0.0, 0.0, 0.0)
        direction = self._direction(flat.shape[1], flat.device)
        others = (flat != finite).double()
        return torch.stack([finite @ direction, torch.linalg.vector_norm(finite, dim=1), others @ direction], dim=1)

    def _direction(self, length: int, device: torch.device) -> torch.Tensor:
        if (length, device) not in self.directions:
            whole = torch.arange(1, length + 1, dtype=torch.float64, device=device)
            self.directions[length, device] = whole.sin()  # of a whole number it is never 0
        return self.directions[length, device]
