"""What a model holds, and a run of it that leaves this as it is."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from inspect import getclosurevars, isfunction, ismethod
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree


@contextlib.contextmanager
def untouched(function: Callable[..., Any]) -> Iterator[None]:
    """Put the attributes of the modules that a function reads back: what they are, not what is in a list or a dict."""
    saved = [(module, dict(module.__dict__), _registers(module)) for module in modules_of(function)]
    try:
        yield
    finally:
        for module, attributes, registers in saved:
            module.__dict__.clear()
            module.__dict__.update(attributes)
            for now, before in zip(_registers(module, own=True), registers, strict=True):
                now.clear()
                now.update(before)


def _registers(module: nn.Module, *, own: bool = False) -> list[dict[str, Any]]:
    found = [module._parameters, module._buffers, module._modules]
    return found if own else [dict(register) for register in found]


def held_by(function: Callable[..., Any]) -> dict[str, Any]:
    """What a model reads beside its arguments, by name: itself, or what a function's closure and globals hold."""
    owner = getattr(function, "__self__", None) if ismethod(function) else function
    if isinstance(owner, nn.Module):
        return {"": owner}
    plain = getattr(function, "__wrapped__", function)
    if not isfunction(plain):
        return {}
    names = getclosurevars(plain)
    held = {**names.globals, **names.nonlocals}
    return {
        name + pytree.keystr(path): leaf
        for name, value in held.items()
        for path, leaf in pytree.tree_flatten_with_path(value)[0]
        if isinstance(leaf, (nn.Module, torch.Tensor))
    }


def modules_of(function: Callable[..., Any]) -> dict[nn.Module, str]:
    """The modules that a model reads, with those inside, and their names."""
    found: dict[nn.Module, str] = {}
    for name, held in held_by(function).items():
        if isinstance(held, nn.Module):
            for inner, module in held.named_modules(prefix=name):
                found.setdefault(module, inner)
    return found
