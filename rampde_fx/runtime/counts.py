"""What was lost in float16, counted: backward passes computed again, entries of cotangents and states that vanished."""

from __future__ import annotations

import contextlib
import re
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

# When a loop is told to lower its target: after this many passes, at this share of repeated ones.
WARN_AFTER, WARN_SHARE = 20, 0.1
# When a loop is told that its states are too small: at this share of entries.
WARN_UNDERFLOW = 0.01


@dataclass(frozen=True)
class BackwardCount:
    """The backward passes of one loop.

    Attributes:
        passes: Backward passes through the loop.
        repeated: Those whose reverse loop ran more than once.
        overflowed: Those that were not finite after the last attempt, and were returned so.
        vanished: Entries of the cotangents, over all steps, evaluations and passes, that became zero in float16 though
            their tensor was scaled: smaller than about 3e-8 of its largest entry.
    """

    passes: int = 0
    repeated: int = 0
    overflowed: int = 0
    vanished: int = 0


@dataclass(frozen=True)
class StateCount:
    """What one loop read or stored in float16, over all steps, evaluations and passes.

    Attributes:
        entries: Entries of states and parameters that were not zero.
        underflowed: Those below 2^-17, of which float16 keeps less than eight binary digits, or nothing.
        subnormal: Tensors whose largest entry is below 2^-14, where float16's digits begin to be lost.
    """

    entries: int = 0
    underflowed: int = 0
    subnormal: int = 0


@dataclass(frozen=True)
class EvaluationCount:
    """What the last run of one loop evaluated.

    Attributes:
        forward: Evaluations of the velocity in the forward pass: steps times evaluations of each; of a search for
            adaptive steps, steps that were tried. None before one.
        backward: VJPs of the velocity in the backward pass that ended last, repetitions included. Each evaluates the
            velocity once more, unless checkpoint="none". None before one. Where output times lie between adaptive
            steps, one step of size 0 is taken besides, for the velocity at the end.
        accepted: Steps that count, of a search; None of another loop.
        rejected: Steps that were tried and do not count, of a search.
    """

    forward: int | None = None
    backward: int | None = None
    accepted: int | None = None
    rejected: int | None = None


_lock = threading.Lock()
# The last of each counts; the others wait for their contexts to end.
_counts: list[dict[str, BackwardCount]] = [{}]
_states: list[dict[str, StateCount]] = [{}]
# Not read yet, by loop: (underflowed, entries, subnormal) on the host, and when an accelerator has written them there.
_arriving: list[tuple[str, torch.Tensor, torch.cuda.Event | None]] = []
_evaluations: dict[str, EvaluationCount] = {}
_searches: dict[str, tuple[torch.Tensor, torch.Tensor, int]] = {}  # not read yet: tried, accepted, evaluations of each
_warned: set[tuple[str, str]] = set()


def backward_counts(*, reset: bool = False) -> dict[str, BackwardCount]:
    """Count the backward passes of every loop with dynamic adjoint scaling, over the life of the process.

    A pass is repeated where a gradient overflowed at the scaling's target; it costs a second run of the reverse loop.
    Gradients that come in as inf or NaN pass through without a repetition. Loops in bfloat16 or float32 are not scaled,
    and have no entry.

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


def state_counts(*, reset: bool = False) -> dict[str, StateCount]:
    """Count the entries of states that a velocity in float16 reads, over the life of the process.

    What an accelerator counted is read at the next backward pass, or here, where the host waits for it.

    Args:
        reset: Whether to begin at zero again.

    Returns:
        A StateCount for each loop, named as in backward_counts.

    >>> sum(count.underflowed for count in state_counts().values())
    0
    """
    _read_arrived(wait=True)
    with _lock:
        found = dict(_states[-1])
        if reset:
            _states[-1].clear()
    return found


def evaluation_counts(*, reset: bool = False) -> dict[str, EvaluationCount]:
    """Count the evaluations of the velocity in the last run of every compiled loop, instead of a counter in Python.

    An adaptive odeint has two loops: the search, which tries steps, and the loop over the steps that it found. What a
    search counted on an accelerator is read here, where the host waits for it, and nowhere else.

    Args:
        reset: Whether to forget the runs.

    Returns:
        An EvaluationCount for each loop, named as in backward_counts.

    >>> evaluation_counts(reset=True)
    {}
    """
    with _lock:
        for loop, (tried, accepted, each) in _searches.items():
            number = int(accepted)
            _evaluations[loop] = EvaluationCount(each * int(tried), None, number, int(tried) - number)
        _searches.clear()
        found = dict(_evaluations)
        if reset:
            _evaluations.clear()
    return found


def record_evaluations(loop: str, **counted: int) -> None:
    """Note the forward or the backward evaluations of a run."""
    with _lock:
        if len(_counts) == 1:
            _evaluations[loop] = replace(_evaluations.get(loop, EvaluationCount()), **counted)


def record_search(loop: str, tried: torch.Tensor, accepted: torch.Tensor, each: int) -> None:
    """Note a search's numbers of steps, 0-d tensors that are not waited for."""
    with _lock:
        if len(_counts) == 1:
            _searches[loop] = tried.clone(), accepted.clone(), each


def record_states(loop: str, counts: torch.Tensor) -> None:
    """Count the states of one forward pass.

    Args:
        loop: The name of the loop.
        counts: How many entries underflowed, how many are not zero, and how many tensors are subnormal: int64 (3,).
            They are not waited for.
    """
    arrived = None
    if counts.device.type != "cuda":
        on_host = counts.to("cpu", copy=True)
    else:
        on_host = torch.empty(counts.shape, dtype=counts.dtype, pin_memory=True).copy_(counts, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record(torch.cuda.current_stream(counts.device))
    with _lock:
        _arriving.append((loop, on_host, arrived))
    _read_arrived()


def _read_arrived(*, wait: bool = False) -> None:
    """Add up what has arrived on the host; all of it, if that is waited for."""
    waiting: list[tuple[str, list[int]]] = []
    with _lock:
        known, _arriving[:] = list(_arriving), []
        for loop, numbers, arrived in known:
            if wait and arrived is not None:
                arrived.synchronize()
            if arrived is None or arrived.query():
                waiting.append((loop, numbers.tolist()))
            else:
                _arriving.append((loop, numbers, arrived))
        for loop, (underflowed, entries, subnormal) in waiting:
            before = _states[-1].get(loop, StateCount())
            _states[-1][loop] = StateCount(
                before.entries + entries, before.underflowed + underflowed, before.subnormal + subnormal
            )
        apart = len(_states) > 1
    for loop, (underflowed, entries, subnormal) in waiting:
        if (subnormal or underflowed > WARN_UNDERFLOW * entries) and not apart:
            warn_once(
                "underflow",
                loop,
                f"of the states and parameters that enter the velocity of the rampde_fx loop at {loop}, or are stored "
                f"for its backward, {_small(underflowed, entries, subnormal)}; scale them, or take bfloat16 for the "
                "velocity and the storage",
            )


def _small(underflowed: int, entries: int, subnormal: int) -> str:
    found = []
    if underflowed:
        found.append(f"{underflowed:,} of {entries:,} entries lie below 2^-17, where float16 keeps few digits or none")
    if subnormal:
        found.append(f"{subnormal:,} tensors lie below 2^-14 as a whole")
    return ", and ".join(found)


@contextlib.contextmanager
def apart() -> Iterator[tuple[dict[str, BackwardCount], dict[str, StateCount]]]:
    """Count what the context runs, in all threads, in dicts of its own: not in backward_counts, nor state_counts."""
    _read_arrived(wait=True)
    own: tuple[dict[str, BackwardCount], dict[str, StateCount]] = ({}, {})
    with _lock:
        _counts.append(own[0])
        _states.append(own[1])
    try:
        yield own
    finally:
        _read_arrived(wait=True)
        with _lock:
            _counts[:] = [counted for counted in _counts if counted is not own[0]]  # equal ones are others
            _states[:] = [counted for counted in _states if counted is not own[1]]


def record(loop: str, attempt: int, *, overflow: bool, last: bool, vanished: int, zeros: int) -> None:
    """Count one run of a reverse loop.

    Args:
        loop: The file and line of the loop's head.
        attempt: 0 for the first run of a backward pass, 1 for its repetition, and so on.
        overflow: Whether a gradient of this run is not finite, though what came in was.
        last: Whether no further run follows an overflow.
        vanished: How many entries of scaled cotangents became zero in this run.
        zeros: How many gradients of this run have no entry but zeros.
    """
    _read_arrived()  # of the forward pass before, for the host has just waited for this run
    final = last or not overflow
    with _lock:
        counted, apart = _counts[-1], len(_counts) > 1
        count = counted.get(loop, BackwardCount())
        count = counted[loop] = BackwardCount(
            passes=count.passes + (attempt == 0),
            repeated=count.repeated + (attempt == 1),
            overflowed=count.overflowed + (overflow and last),
            vanished=count.vanished + (vanished if final else 0),
        )
    if apart:
        return
    if attempt == 1 and count.passes >= WARN_AFTER and count.repeated >= WARN_SHARE * count.passes:
        warn_once(
            "repeated",
            loop,
            f"{count.repeated} of {count.passes} backward passes of the loop at {loop} overflowed and were computed "
            "again; a lower target avoids this: PrecisionPolicy(scaling=AdjointScaling(target=2.0**-8))",
        )
    if final and vanished and zeros:
        warn_once(
            "zero",
            loop,
            f"in a backward pass of the loop at {loop} {zeros} gradients are zero as a whole, and {vanished:,} entries "
            "of cotangents vanished, below 3e-8 of the largest in their tensor. If these gradients should not be zero, "
            "integrate what they belong to as a state of its own, which has a scale of its own, or use "
            "dtype=torch.bfloat16",
        )


def warn_once(kind: str, loop: str, message: str) -> None:
    """Warn of a loop, at its line, once in a process for each kind of warning."""
    with _lock:
        known = (kind, loop) in _warned
        _warned.add((kind, loop))
    if not known:
        warn_at(loop, message)


def warn_at(loop: str, message: str) -> None:
    """Warn at the line of a loop, as its name has it."""
    place = re.fullmatch(r"(.*):(\d+)(?: \(\d+\))?", loop)
    file, line = place.groups() if place else (loop, 0)
    warnings.warn_explicit(message, UserWarning, file, int(line), module="rampde_fx")
