"""Uncompiled solves that are compared with captured ones: adaptive steps are to be those of the capture."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import torch

_others: ContextVar[list[str] | None] = ContextVar("solves whose steps are others", default=None)


@contextlib.contextmanager
def comparing() -> Iterator[list[str]]:
    """Uncompiled adaptive solves take steps by the rule of captured ones; the list tells which could not."""
    others: list[str] = []
    token = _others.set(others)
    try:
        yield others
    finally:
        _others.reset(token)


def is_compared() -> bool:
    """Whether an uncompiled solve is compared with a captured one."""
    return _noted() is not None


def note_other(what: str) -> None:
    """Note that a solve takes other steps than the captured one, if they are compared."""
    if (others := _noted()) is not None:
        others.append(what)


def _noted() -> list[str] | None:
    return None if torch.compiler.is_dynamo_compiling() else _others.get()
