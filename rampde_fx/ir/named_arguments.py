"""Arguments of operators that are treated by their names, wherever they stand."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

MASKS = {"attn_mask", "attn_bias"}  # added to an attention's scores
STATISTICS = "logsumexp"  # in float32 whatever the dtype: an attention's, for its backward
TOLD = "input_dtype"  # the dtype of the operands, for which a derivative of softmax asks


def names_of(target: Any) -> list[str]:
    """What an operator calls its arguments."""
    return [argument.name for argument in target._schema.arguments] if isinstance(target, torch._ops.OpOverload) else []


def within(dtype: torch.dtype, mask: Any) -> Any:
    """An attention's mask with the lowest finite number of a dtype in place of those below, which weigh nothing either.

    -1e9, or the lowest number of float32, is as usual for them as -inf.
    """
    if not (isinstance(mask, torch.Tensor) and mask.is_floating_point()):
        return mask
    if torch.finfo(mask.dtype).max == torch.finfo(dtype).max:
        return mask
    return torch.where(mask == -torch.inf, mask, mask.clamp_min(torch.finfo(dtype).min))


def is_mask(node: fx.Node, user: fx.Node) -> bool:
    """Whether all that an operation reads of a node is a mask."""
    names = [*names_of(user.target), *[""] * len(user.args)]
    read = {name for name, operand in [*zip(names, user.args, strict=False), *user.kwargs.items()] if operand is node}
    return bool(read) and read <= MASKS
