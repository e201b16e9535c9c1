"""Hooks on the tensors that autograd saves: none for a trace, and some that torch.func transforms do without."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch

from rampde_fx.torch_private.names import Names

_torch = Names(
    {
        "torch._C._autograd": "_pop_saved_tensors_default_hooks _push_saved_tensors_default_hooks"
        " _top_saved_tensors_default_hooks",
    }
)
_ours: ContextVar[Any] = ContextVar("what packs tensors, but for those of transforms", default=None)
_disabled = torch.autograd.graph.disable_saved_tensors_hooks


class _Users:
    """How many evaluations, of any thread, want transforms to know of their hooks."""

    lock, count = threading.Lock(), 0


@contextlib.contextmanager
def no_saved_tensors_hooks() -> Iterator[None]:
    """The user's hooks on saved tensors are not for the tensors of a trace."""
    taken = []
    while (hooks := _torch._top_saved_tensors_default_hooks(True)) is not None:
        taken.append(hooks)
        _torch._pop_saved_tensors_default_hooks()
    try:
        yield
    finally:
        for pack, unpack in reversed(taken):
            _torch._push_saved_tensors_default_hooks(pack, unpack)


@contextlib.contextmanager
def hooks_outside_of_transforms(pack: Callable[..., Any], unpack: Callable[..., Any]) -> Iterator[None]:
    """torch.autograd.graph.saved_tensors_hooks, but what a torch.func transform saves is saved as without hooks.

    A transform refuses to run under hooks. It asks by a function of torch's, in whose place another stands meanwhile.
    """
    token = _ours.set(pack)
    try:
        with _known_to_transforms(), torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield
    finally:
        _ours.reset(token)


@contextlib.contextmanager
def _known_to_transforms() -> Iterator[None]:
    with _Users.lock:
        _Users.count += 1
        torch.autograd.graph.disable_saved_tensors_hooks = _disabled_but_for_ours
    try:
        yield
    finally:
        with _Users.lock:
            _Users.count -= 1
            if not _Users.count:
                torch.autograd.graph.disable_saved_tensors_hooks = _disabled


@contextlib.contextmanager
def _disabled_but_for_ours(message: str) -> Iterator[None]:
    hooks = _torch._top_saved_tensors_default_hooks(True)
    is_ours = hooks is not None and hooks[0] is _ours.get()
    if is_ours:
        _torch._pop_saved_tensors_default_hooks()
    try:
        with _disabled(message):
            yield
    finally:
        if is_ours:
            _torch._push_saved_tensors_default_hooks(*hooks)
