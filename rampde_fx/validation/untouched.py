"""A run of a model that leaves what it holds as it is."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from rampde_fx.reach import reached


@contextlib.contextmanager
def untouched(function: Callable[..., Any]) -> Iterator[None]:
    """Put back what a function reads: attributes of modules and objects, and what is in lists, dicts and sets."""
    found = reached(function)
    modules = [(module, _registers(module)) for module in found.modules]
    holders = [vars(owner) for owner in (*found.modules, *(held for held, _ in found.objects))]
    saved = [(held, held.copy()) for held in (*holders, *found.containers)]
    try:
        yield
    finally:
        for held, before in saved:
            held.clear()
            held.extend(before) if isinstance(held, list) else held.update(before)
        for module, registers in modules:
            for now, before in zip(_registers(module, own=True), registers, strict=True):
                now.clear()
                now.update(before)


def _registers(module: nn.Module, *, own: bool = False) -> list[dict[str, Any]]:
    registers = (module._parameters, module._buffers, module._modules)
    found = [register for register in registers if isinstance(register, dict)]  # TorchScript has another thing there
    return found if own else [dict(register) for register in found]
