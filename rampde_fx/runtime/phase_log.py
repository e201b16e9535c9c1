"""What a compilation is at, one line for each loop and phase, at INFO: TORCH_LOGS=rampde_fx prints them."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence

log = logging.getLogger(__name__)


def now() -> float:
    """A time, in seconds."""
    return time.perf_counter()


def tell(loop: str, what: str) -> None:
    """Tell something of a loop, which is named by its file and line."""
    log.info("loop at %s: %s", loop, what)


def tell_done(loop: str, what: str, begun: float) -> None:
    """Tell that a phase is over, and how long it took."""
    tell(loop, f"{what} in {now() - begun:.2f} s")


@contextlib.contextmanager
def lowering(loops: Sequence[str], is_backward: bool) -> Iterator[Callable[[str], None]]:
    """Tell when Inductor begins with a forward or a backward, and when it is done; takes what it has made."""
    begun, direction, made = now(), "backward" if is_backward else "forward", list[str]()
    for loop in loops:
        tell(loop, f"{direction}: Inductor writes kernels and compiles them")
    yield made.append
    for loop in loops:
        tell_done(loop, f"{direction}: {', '.join([*made, 'compiled'])}", begun)


@contextlib.contextmanager
def compiling(loops: Sequence[str], compiler: str) -> Iterator[None]:
    """Tell when the compilation of a graph begins, and when it is done, for each of its loops."""
    begun = now()
    for loop in loops:
        tell(loop, f"compiling by {compiler}")
    yield
    for loop in loops:
        tell_done(loop, "done", begun)
