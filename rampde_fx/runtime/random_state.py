"""Random number generators, left as they are found."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Callable, Iterator

import torch


@contextlib.contextmanager
def kept_random_state(seed: int | None = None) -> Iterator[Callable[[], bool]]:
    """Leave the generators of torch, numpy and Python as they are, and tell whether torch's were drawn from meanwhile.

    Args:
        seed: What to seed torch's with meanwhile; None to go on as they are.
    """
    with torch.random.fork_rng(), contextlib.ExitStack() as stack:
        stack.callback(random.setstate, random.getstate())
        if (of_numpy := sys.modules.get("numpy.random")) is not None:
            stack.callback(of_numpy.set_state, of_numpy.get_state())
        if seed is not None:
            torch.manual_seed(seed)
        before = _random_states()
        yield lambda: any(not torch.equal(a, b) for a, b in zip(before, _random_states(), strict=True))


def _random_states() -> list[torch.Tensor]:
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [])]
