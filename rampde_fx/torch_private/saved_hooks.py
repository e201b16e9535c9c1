"""Hooks on the tensors that autograd saves: none for a trace, and some that torch.func transforms do without."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, ClassVar

import torch

from rampde_fx.torch_private.names import Names

_torch = Names(
    {
        "torch._C._autograd": "_pop_saved_tensors_default_hooks _push_saved_tensors_default_hooks"
        " _top_saved_tensors_default_hooks _saved_tensors_hooks_disable _saved_tensors_hooks_enable",
        "torch._C": "_autograd",
    }
)
_ours: ContextVar[tuple[Any, ...]] = ContextVar("what packs tensors, but for those of transforms", default=())


@contextlib.contextmanager
def no_saved_tensors_hooks() -> Iterator[None]:
    """The user's hooks on saved tensors are not for the tensors of a trace."""
    taken = _take_off(lambda pack: True)
    try:
        yield
    finally:
        _put_back(taken)


def _take_off(is_meant: Callable[[Any], bool]) -> list[tuple[Any, Any]]:
    """The hooks on top that are meant, by what packs, the last ones first; they are off."""
    taken = []
    while (hooks := _torch._top_saved_tensors_default_hooks(True)) is not None and is_meant(hooks[0]):
        taken.append(hooks)
        _torch._pop_saved_tensors_default_hooks()
    return taken


def _put_back(taken: list[tuple[Any, Any]]) -> None:
    while taken:
        _torch._push_saved_tensors_default_hooks(*taken.pop())


@contextlib.contextmanager
def hooks_outside_of_transforms(pack: Callable[..., Any], unpack: Callable[..., Any]) -> Iterator[None]:
    """torch.autograd.graph.saved_tensors_hooks, but what a torch.func transform saves is saved as without hooks.

    A transform refuses to run under hooks, by two functions of torch's, in whose place others stand meanwhile. Compiled
    code looks them up when it runs.
    """
    token = _ours.set((*_ours.get(), pack))
    try:
        with _Swap.held(), torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield
    finally:
        _ours.reset(token)


class _Taken(threading.local):
    """The hooks that are taken off while a transform runs in this thread, the last ones first."""

    def __init__(self) -> None:
        self.hooks: list[tuple[Any, Any]] = []


_taken = _Taken()


def _disable(*args: Any, **kwargs: Any) -> None:
    """Ours are taken off first; where others are left this raises."""
    _taken.hooks += _take_off(lambda pack: pack in _ours.get())
    try:
        _Swap.of_torch["_saved_tensors_hooks_disable"](*args, **kwargs)
    except RuntimeError:
        _put_back(_taken.hooks)
        raise


def _enable() -> None:
    _Swap.of_torch["_saved_tensors_hooks_enable"]()
    _put_back(_taken.hooks)


class _Swap:
    """Has torch call ours, while a thread is in an evaluation that wants it."""

    ours: ClassVar = {"_saved_tensors_hooks_disable": _disable, "_saved_tensors_hooks_enable": _enable}
    of_torch: ClassVar[dict[str, Any]] = {}
    lock, count = threading.Lock(), 0

    @classmethod
    @contextlib.contextmanager
    def held(cls) -> Iterator[None]:
        with cls.lock:
            cls.count += 1
            if cls.count == 1:
                cls.of_torch = {name: getattr(_torch, name) for name in cls.ours}
                cls._set(cls.ours)
        try:
            yield
        finally:
            with cls.lock:
                cls.count -= 1
                if not cls.count:
                    cls._set(cls.of_torch)

    @classmethod
    def _set(cls, functions: dict[str, Any]) -> None:
        for name, function in functions.items():
            setattr(_torch._autograd, name, function)
