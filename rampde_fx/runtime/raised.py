"""Errors that operators of ours raise inside of compiled code, which has a text of its own for them where it is C++."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from rampde_fx.errors import RampdeError


class _Last(threading.local):
    error: RampdeError | None = None


_last = _Last()


def noted(error: RampdeError) -> RampdeError:
    """The error, which as_raised then knows of."""
    _last.error = error
    return error


@contextlib.contextmanager
def as_raised() -> Iterator[None]:
    """Raises what an operator of ours raised inside, where code in C++ made another error of it."""
    _last.error = None
    try:
        yield
    except RuntimeError as error:
        ours, _last.error = _last.error, None
        if ours is None or ours is error:
            raise
        raise ours from None
