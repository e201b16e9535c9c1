"""The times of odeint: finite, and strictly monotone."""

from __future__ import annotations

import math
import operator
from itertools import pairwise

import torch

from rampde_fx.errors import TimeGridError
from rampde_fx.runtime.raised import noted


def zero_if_ordered(t: torch.Tensor) -> torch.Tensor:
    """A zero, NaN where the times, or all of their distance, are not finite and strictly monotone.

    It does not wait for the device.
    """
    sizes = t[1:] - t[:-1]
    ordered = t.isfinite().all() & (t[-1] - t[0]).isfinite() & ((sizes > 0).all() | (sizes < 0).all())
    return torch.where(ordered, torch.zeros_like(t[0]), math.nan)


def monotone(t: torch.Tensor) -> torch.Tensor:
    """The same, and an error where the times are the host's: a list of them is compared faster than a tensor.

    Raises:
        TimeGridError: if times on the CPU, or all of their distance, are not finite and strictly monotone.
    """
    if t.device.type != "cpu":
        return zero_if_ordered(t)
    times = t.tolist()
    if (wrong := _wrong(times, torch.finfo(t.dtype).max)) is not None:
        found, fix = wrong
        shown = [f"{time:g}" for time in times]
        raise noted(
            TimeGridError(
                f"t = [{', '.join(shown if len(shown) <= 6 else [*shown[:5], '...'])}] {found}",
                required="finite times that rise, or fall, from each to the next",
                fix=fix,
            )
        )
    return t.new_zeros(())


def _wrong(times: list[float], largest: float) -> tuple[str, str] | None:
    """What is wrong with the times, and how to mend it."""
    if all(map(math.isnan, times)):
        return "is NaN", "look for NaN in t[0] and t[-1], with which a grid_constructor has to begin and end"
    if not all(map(math.isfinite, times)):
        return "is not finite", "look for NaN and infinities in what t is made of"
    if not any(all(follows(a, b) for a, b in pairwise(times)) for follows in (operator.lt, operator.gt)):
        return "is not strictly monotone", "sort t and drop repeated times: torch.unique(t)"
    if not abs(times[-1] - times[0]) <= largest:
        return "is longer than its dtype can hold", "take a shorter t, or a larger unit of time"
    return None
