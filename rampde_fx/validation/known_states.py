"""Objects of Python's library and of numpy that change in place, and what gives them back the state that they had."""

from __future__ import annotations

import random
import sys
from array import array
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch

from rampde_fx.small_tensors import MOST_OF_SMALL, SMALL


def putting_back(objects: Iterable[Any]) -> Iterator[Callable[[], Any]]:
    """What puts back the state that generators of random numbers, and arrays of few entries, have now."""
    entries = 0
    for value in objects:
        if _is_array(value):
            if len(value) <= SMALL and entries + len(value) <= MOST_OF_SMALL:
                entries += len(value)
                yield partial(_refill, value, value[:])
        elif (act := _of_generator(value) or _of_numpy(value, MOST_OF_SMALL - entries)) is not None:
            entries += getattr(value, "size", 0)
            yield act


def _is_array(value: Any) -> bool:
    return issubclass(type(value), (bytearray, array))


def _refill(held: Any, entries: Any) -> None:
    held[:] = entries


def _rewrite(held: Any, entries: Any) -> None:
    if held.shape == entries.shape and held.flags.writeable and held.tobytes() != entries.tobytes():
        held[...] = entries


def _of_generator(value: Any) -> Callable[[], Any] | None:
    if issubclass(type(value), torch.Generator):
        return partial(value.set_state, value.get_state())
    return partial(value.setstate, value.getstate()) if type(value) is random.Random else None


def _of_numpy(value: Any, most: int) -> Callable[[], Any] | None:
    numpy = sys.modules.get("numpy")
    if numpy is None or not type(value).__module__.startswith("numpy"):
        return None
    if type(value) is numpy.ndarray:
        return partial(_rewrite, value, value.copy()) if value.size <= min(SMALL, most) else None
    if issubclass(type(value), numpy.random.RandomState):
        return partial(value.set_state, value.get_state())
    if issubclass(type(value), numpy.random.Generator):
        return partial(setattr, value.bit_generator, "state", value.bit_generator.state)
    return None
