"""What a reverse loop found: whether it may be used."""

from __future__ import annotations

import math
from typing import Any, TypeVar

import torch

from rampde_fx.ir.ends import AdjointResult, Gradient
from rampde_fx.runtime.scales import are_finite
from rampde_fx.torch_private import shapes

Key = TypeVar("Key")
Found = dict[AdjointResult, Any]  # stacks of all steps, where a step has a value of its own


def smallest(values: dict[Key, torch.Tensor]) -> Key:
    """The key of the value of the fewest entries; one whose size is known at run time only comes last."""

    def entries(key: Key) -> float:
        number = values[key].numel()
        return math.inf if shapes.is_data_dependent(number) else shapes.size_hint(number)

    return min(values, key=entries)


def usable(found: Found, fits: torch.Tensor | None) -> Found:
    """The gradients, or NaN where a stored state overflowed: a velocity may saturate at inf, and hide it from them."""
    if fits is None:
        return found
    return {e: torch.where(fits, value, torch.nan) if isinstance(e, Gradient) else value for e, value in found.items()}


def zeros_among(tensors: list[torch.Tensor]) -> torch.Tensor:
    """How many tensors have no entry but zeros, as a 0-d tensor; empty ones left out."""
    return torch.stack([_is_zero(tensor) for tensor in tensors]).sum()


def _is_zero(tensor: torch.Tensor) -> torch.Tensor:
    zero, entries = tensor == 0, tensor.numel()
    if isinstance(entries, torch.SymInt):  # of several sizes, of which a trace of a loop knows no product
        return zero.all() & zero.any()
    return zero.all() & (entries > 0)


def finite(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Whether all entries of all tensors are finite, as a 0-d bool tensor."""
    return torch.stack([are_finite(tensor).all() for tensor in tensors]).all()
