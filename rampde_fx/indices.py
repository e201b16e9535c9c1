"""Indices with 0-d integer tensors in them, read without their numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8)


def scalar_places(source: torch.Tensor, entries: Sequence[Any]) -> dict[int, int]:
    """For each 0-d integer tensor in an index, by its position there, the dimension that it indexes."""
    used = [_dimensions(entry) for entry in entries]
    dimension, places = 0, {}
    for position, (entry, count) in enumerate(zip(entries, used, strict=True)):
        if isinstance(entry, torch.Tensor) and entry.ndim == 0 and entry.dtype in _INTEGERS:
            places[position] = dimension
        dimension += source.ndim - sum(used) if entry is Ellipsis else count
    return places


def _dimensions(entry: Any) -> int:
    """How many dimensions an entry of an index takes."""
    if entry is None or entry is Ellipsis or isinstance(entry, bool):
        return 0
    mask = isinstance(entry, torch.Tensor) and entry.dtype in (torch.bool, torch.uint8)
    return entry.ndim if mask else 1


def read_at(source: torch.Tensor, entries: Sequence[Any], places: dict[int, int]) -> torch.Tensor:
    """What an index with 0-d integer tensors reads, by a tensor index, which does not ask for their numbers."""
    indices: list[Any] = [None] * (1 + max(places.values()))
    for position, dimension in places.items():
        indices[dimension] = entries[position].long()
    rest = tuple(entry for position, entry in enumerate(entries) if position not in places)
    return torch.ops.aten.index.Tensor(source, indices)[rest]
