"""The time of training steps, taken in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

# How often each step is timed, behind one turn that is not counted.
REPETITIONS = 7


def medians(steps: dict[str, Callable[[], None]]) -> dict[str, float]:
    """The median time of each step in seconds, the steps taken in turns; the first turn is not counted."""
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(REPETITIONS + 1):
        for name, step in steps.items():
            _wait_for_devices()
            begin = time.perf_counter()
            step()
            _wait_for_devices()
            taken[name].append(time.perf_counter() - begin)
    return {name: statistics.median(seconds[1:]) for name, seconds in taken.items()}


def _wait_for_devices() -> None:
    """Wait for what was launched on a GPU."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
