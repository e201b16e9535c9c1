"""A run of a model that leaves what it holds as it is."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from rampde_fx.reach import attributes_of, base_of, reached


@contextlib.contextmanager
def untouched(function: Callable[..., Any]) -> Iterator[None]:
    """Put back what a function reads: variables, attributes of modules, objects and classes, entries of containers."""
    found = reached(function)
    modules = [(module, _registers(module)) for module, _ in found.modules]
    owners = [owner for owner, _ in (*found.modules, *found.objects)]
    containers = [(held, _entries(held)) for held in (*map(attributes_of, owners), *found.containers)]
    slots = [(slot, slot.read()) for slot in found.slots]
    try:
        yield
    finally:
        for held, entries in containers:
            kind = base_of(held)
            kind.clear(held)
            (kind.extend if kind in (list, deque) else kind.update)(held, entries)
        for slot, value in slots:
            if slot.read() is not value:
                slot.bind(value)
        for module, registers in modules:
            for now, before in zip(_registers(module, own=True), registers, strict=True):
                now.clear()
                now.update(before)


def _entries(held: Any) -> list[Any]:
    kind = base_of(held)
    return list(kind.items(held) if issubclass(kind, dict) else kind.__iter__(held))


def _registers(module: nn.Module, *, own: bool = False) -> list[dict[str, Any]]:
    registers = (module._parameters, module._buffers, module._modules)
    found = [register for register in registers if isinstance(register, dict)]  # TorchScript has another thing there
    return found if own else [dict(register) for register in found]
