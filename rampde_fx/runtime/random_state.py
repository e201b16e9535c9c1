"""Random number generators, left as they are found."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch


@contextlib.contextmanager
def kept_random_state(seed: int | None = None) -> Iterator[Callable[[], bool]]:
    """Leave torch's random number generators as they are, and tell whether numbers were drawn meanwhile.

    Args:
        seed: What to seed them with meanwhile; None to go on as they are.
    """
    with torch.random.fork_rng():
        if seed is not None:
            torch.manual_seed(seed)
        before = _random_states()
        yield lambda: any(not torch.equal(a, b) for a, b in zip(before, _random_states(), strict=True))


def _random_states() -> list[torch.Tensor]:
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [])]
