"""How often backward passes were computed again, because a gradient overflowed."""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

# When a loop is told to lower its target: after this many passes, at this share of repeated ones.
WARN_AFTER, WARN_SHARE = 20, 0.1


@dataclass(frozen=True)
class BackwardCount:
    """The backward passes of one loop.

    Attributes:
        passes: Backward passes through the loop.
        repeated: Those whose reverse loop ran more than once.
        overflowed: Those that were not finite after the last attempt, and were returned so.
    """

    passes: int = 0
    repeated: int = 0
    overflowed: int = 0


_lock = threading.Lock()
# The last one counts; the others wait for their contexts to end.
_counts: list[dict[str, BackwardCount]] = [{}]
_warned: set[str] = set()


def backward_counts(*, reset: bool = False) -> dict[str, BackwardCount]:
    """Count the backward passes of every loop with dynamic adjoint scaling, over the life of the process.

    A pass is repeated where a gradient overflowed at the scaling's target; it costs a second run of the reverse loop.
    Gradients that come in as inf or NaN pass through without a repetition.

    Args:
        reset: Whether to begin at zero again.

    Returns:
        A BackwardCount for each loop, by the file and line of its head, numbered where a graph holds several loops of
        that line.

    >>> sum(count.repeated for count in backward_counts().values())
    0
    """
    with _lock:
        found = dict(_counts[0])
        if reset:
            _counts[0].clear()
    return found


@contextlib.contextmanager
def apart() -> Iterator[dict[str, BackwardCount]]:
    """Count the backward passes of the context, in all threads, in a dict of its own and not in backward_counts."""
    own: dict[str, BackwardCount] = {}
    with _lock:
        _counts.append(own)
    try:
        yield own
    finally:
        with _lock:
            _counts[:] = [counted for counted in _counts if counted is not own]  # equal ones are others


def record(loop: str, attempt: int, *, overflow: bool, last: bool) -> None:
    """Count one run of a reverse loop.

    Args:
        loop: The file and line of the loop's head.
        attempt: 0 for the first run of a backward pass, 1 for its repetition, and so on.
        overflow: Whether a gradient of this run is not finite, though what came in was.
        last: Whether no further run follows an overflow.
    """
    with _lock:
        counted, apart = _counts[-1], len(_counts) > 1
        count = counted.get(loop, BackwardCount())
        count = counted[loop] = BackwardCount(
            count.passes + (attempt == 0), count.repeated + (attempt == 1), count.overflowed + (overflow and last)
        )
        often = count.passes >= WARN_AFTER and count.repeated >= WARN_SHARE * count.passes
        warn = attempt == 1 and often and loop not in _warned and not apart
        _warned.update([loop] if warn else [])
    if warn:
        warnings.warn(
            f"{count.repeated} of {count.passes} backward passes of the loop at {loop} overflowed and were computed "
            "twice; a lower target avoids this: PrecisionPolicy(scaling=AdjointScaling(target=2.0**-8))",
            stacklevel=2,
        )
