"""What makes an evaluation reproducible: operators that are deterministic, memory that is written before it is read."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from rampde_fx.ir.operator_table import properties
from rampde_fx.torch_private.fake_tensors import TorchDispatchMode


def sums_in_order(device: torch.device) -> bool:
    """Whether all operators of a device are deterministic where that is asked for, up to rounding in float32."""
    return device.type == "cpu"


class FilledMemory(TorchDispatchMode):
    """Memory that code of the user's asks for is filled with a number; of that inside of operators nothing is known."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        return found.fill_(self.number) if properties(func).unwritten else found


@contextmanager
def written_memory() -> Iterator[None]:
    """Memory is filled before it is handed out."""
    enabled, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    fills = torch.utils.deterministic.fill_uninitialized_memory
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            torch.use_deterministic_algorithms(True, warn_only=True)
            torch.utils.deterministic.fill_uninitialized_memory = True
            yield
        finally:
            torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
            torch.utils.deterministic.fill_uninitialized_memory = fills
