"""The times of odeint: finite, and strictly monotone."""

from __future__ import annotations

import math
import operator
from itertools import pairwise

import torch

from rampde_fx.errors import TimeGridError
from rampde_fx.runtime.raised import noted


def zero_if_ordered(t: torch.Tensor) -> torch.Tensor:
    """A zero, NaN where the times are not finite and strictly monotone; without waiting for the device."""
    sizes = t[1:] - t[:-1]
    ordered = t.isfinite().all() & ((sizes > 0).all() | (sizes < 0).all())
    return torch.where(ordered, torch.zeros_like(t[0]), math.nan)


def monotone(t: torch.Tensor) -> torch.Tensor:
    """The same, and an error where the times are the host's: a list of them is compared faster than a tensor.

    Raises:
        TimeGridError: if times on the CPU are not finite and strictly monotone.
    """
    if t.device.type != "cpu":
        return zero_if_ordered(t)
    times = t.tolist()
    finite = all(map(math.isfinite, times))
    if not finite or not any(all(follows(a, b) for a, b in pairwise(times)) for follows in (operator.lt, operator.gt)):
        shown = [f"{time:g}" for time in times]
        raise noted(
            TimeGridError(
                f"t = [{', '.join(shown if len(shown) <= 6 else [*shown[:5], '...'])}] is "
                f"{'not strictly monotone' if finite else 'not finite'}",
                required="finite times that rise, or fall, from each to the next",
                fix="sort t and drop repeated times: torch.unique(t)",
            )
        )
    return t.new_zeros(())
