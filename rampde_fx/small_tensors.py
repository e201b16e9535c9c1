"""Tensors of few entries, that may be statistics: which they are, and how a value of one is copied and written back."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import nn

SMALL, TINY = 2**16, 2**10  # entries of a tensor that may be a statistic, and of one that costs nothing
MOST_SMALL, MOST_OF_SMALL = 256, 2**18  # of these, and entries in all


def small(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The plain tensors of few entries, on which no graph hangs.

    So that copies cost little, of many the tiny ones that are found first, then the smallest.
    """
    plain = [tensor for tensor in tensors if is_plain(tensor) and not tensor.requires_grad]
    found, entries = list[torch.Tensor](), 0
    for tensor in sorted(plain, key=lambda tensor: max(tensor.numel(), TINY))[:MOST_SMALL]:
        entries += tensor.numel()
        if tensor.numel() <= SMALL and entries <= MOST_OF_SMALL:
            found.append(tensor)
    return found


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor is of torch's own class, and its entries can be copied, compared and written."""
    return type(tensor) in (torch.Tensor, nn.Parameter) and has_comparable_entries(tensor)


def has_comparable_entries(tensor: torch.Tensor) -> bool:
    """Whether entries of a tensor can be copied, compared and written, whatever its class adds to that."""
    if tensor.layout is not torch.strided or tensor.is_nested or tensor.is_meta or tensor.is_quantized:
        return False
    return has_equality(tensor.dtype)


@cache
def has_equality(dtype: torch.dtype) -> bool:
    """Whether torch copies, joins and compares entries of a dtype: not those of bits, for one."""
    try:
        value = torch.empty(2, dtype=dtype, device="cpu")
        torch.ne(value.clone(), value), torch.equal(torch.cat([value]), value)
    except (RuntimeError, TypeError):
        return False
    return True


def own_entries(tensor: torch.Tensor) -> torch.Tensor:
    """A view without the dimensions along which entries share memory: nothing can be written to these."""
    if tensor.layout is not torch.strided or 0 not in tensor.stride():
        return tensor
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return tensor[tuple(slice(0, 1) if stride == 0 else slice(None) for _, stride in sizes)]


def value_of(tensor: torch.Tensor) -> torch.Tensor:
    """A copy, whose entries share memory as the tensor's do."""
    own = own_entries(tensor.detach())
    return own.clone() if own.shape == tensor.shape else own.clone().expand(tensor.shape)


def write(tensor: torch.Tensor, value: torch.Tensor) -> None:
    """Give a tensor the value that it had; no change is counted, which autograd would take for an error."""
    with torch.inference_mode(tensor.is_inference()):
        own, given = own_entries(tensor.data), own_entries(value)
        if tensor.shape == value.shape and all(n in (1, m) for m, n in zip(own.shape, given.shape, strict=True)):
            own.copy_(given)
        else:
            tensor.data = value_of(value)
