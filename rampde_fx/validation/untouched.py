"""A run of a model that leaves what it holds as it is."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from rampde_fx.reach import OF_ALL_MODULES, attributes_of, base_of, reached
from rampde_fx.small_tensors import is_plain, value_of, write
from rampde_fx.torch_private import callers
from rampde_fx.validation.known_states import putting_back


@contextlib.contextmanager
def untouched(function: Callable[..., Any]) -> Iterator[None]:
    """Put back what a function reads: variables, attributes of modules, objects and classes, entries of containers.

    So are the values of buffers, of small tensors beside them and of small arrays, generators of random numbers, which
    gradients, hooks and attributes tensors have, and whether they require a gradient; not the values of gradients and
    of parameters that are trained, of which there may be too many to copy.
    """
    found = reached(function)
    modules = [module for module, _ in found.modules]
    attributes = [attributes_of(owner) for owner in (*modules, *(owner for owner, _ in found.objects))]
    registers = [held for module in modules for held in _registers(module)]
    # Dicts and sets last: their keys may hash by what is put back before.
    containers = sorted(found.containers, key=lambda held: base_of(held) not in (list, deque))
    buffers = list(_buffers(modules))
    tensors = [*found.parameters(), *buffers, *(tensor for tensor, _ in found.tensors)]
    attributes += [attributes_of(tensor) for tensor in tensors]
    put_back: list[Callable[[], Any]] = [
        *(partial(_write, x, value_of(x)) for x in (*buffers, *found.statistics()) if not x.is_inference()),
        *putting_back(found.others),
        *(partial(_ask, leaf, leaf.requires_grad, leaf.grad) for leaf in tensors if leaf.is_leaf),
        *(partial(slot.put_back, slot.read()) for slot in found.slots),
        *(partial(_refill, held, _entries(held)) for held in (*attributes, *registers, *containers)),
        *(partial(_put_hooks_back, tensor, _hooks(tensor)) for tensor in tensors),
    ]
    try:
        yield
    finally:
        with contextlib.ExitStack() as stack:  # goes on where code of the user's raises, and raises at the end
            for act in reversed(put_back):
                stack.callback(act)


def _registers(module: nn.Module) -> list[Any]:
    """The parameters, buffers, modules and hooks of a module, and which buffers it saves; not what TorchScript has."""
    return [held for name, held in vars(module).items() if name in OF_ALL_MODULES and isinstance(held, dict | set)]


def _buffers(modules: list[nn.Module]) -> Iterator[torch.Tensor]:
    """Those whose values can be written."""
    for module in modules:
        for buffer in module._buffers.values() if isinstance(module._buffers, dict) else ():
            if buffer is not None and is_plain(buffer):
                yield buffer


def _write(buffer: torch.Tensor, value: torch.Tensor) -> None:
    if not torch.equal(buffer, value):
        write(buffer, value)


def _ask(leaf: torch.Tensor, needs_gradient: bool, gradient: torch.Tensor | None) -> None:
    if not leaf.is_leaf:  # it was changed in place; a view cannot leave its graph
        with contextlib.suppress(RuntimeError):
            leaf.detach_()
        if not leaf.is_leaf:
            return
    if leaf.requires_grad != needs_gradient:
        leaf.requires_grad_(needs_gradient)
    if leaf.grad is not gradient:
        leaf.grad = gradient


def _hooks(tensor: torch.Tensor) -> dict[str, dict[int, Any]]:
    return {name: dict(hooks) for name, hooks in callers.hooks_of(tensor).items()}


def _put_hooks_back(tensor: torch.Tensor, before: dict[str, dict[int, Any]]) -> None:
    for name, hooks in callers.hooks_of(tensor).items():
        if hooks != (then := before.get(name, {})):
            hooks.clear()
            hooks.update(then)


def _entries(held: Any) -> list[Any]:
    kind = base_of(held)
    return list(kind.items(held) if issubclass(kind, dict) else kind.__iter__(held))


def _refill(held: Any, entries: list[Any]) -> None:
    kind = base_of(held)
    kind.clear(held)
    (kind.extend if kind in (list, deque) else kind.update)(held, entries)
