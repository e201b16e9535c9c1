"""What a search keeps of its steps for the loop behind it, so that this evaluates nothing again.

How many steps count is known when the search ends, and a while loop carries tensors of fixed shapes alone. So each step
that is tried hands its values to the host, which holds them until the loop asks for those of the steps that count.
Nothing waits for a device: what counts is read when the search is over.
"""

from __future__ import annotations

import threading
from itertools import count
from typing import NamedTuple

import torch

from rampde_fx.errors import RewriteError
from rampde_fx.runtime.operators import library
from rampde_fx.torch_private import kernels

# A token, a number on the host, for one run of a search; the search's own number keeps those of two apart.
library.define("begin_keeping(Tensor t, int search) -> Tensor")
# A zero, once the values of a step that was tried are kept, and whether it counts.
library.define("keep(Tensor token, Tensor[] values, Tensor counts) -> Tensor")
# The values of the steps that count, stacked; behind them the last ones, up to the length of like.
library.define("kept(Tensor token, Tensor[] last, Tensor like) -> Tensor[]")
# How often a search and the loop behind it evaluate the velocity: the latter too, unless the rewrite lets it read what
# the search kept. The search is named by one of its results.
library.define("evaluations(Tensor search, Tensor searched, Tensor again) -> Tensor")


class _Run(NamedTuple):
    """One run of a search.

    Attributes:
        token: Expires when nobody can ask for the values any more, as behind an error.
        rows: The values of each step that was tried.
        counts: Whether each of them counts, 0-d.
    """

    token: kernels.StorageWeakRef
    rows: list[list[torch.Tensor | None]]
    counts: list[torch.Tensor]


_lock = threading.Lock()
_runs: dict[int, _Run] = {}
_numbers = count()


def _begin_keeping(t: torch.Tensor, search: int) -> torch.Tensor:
    token = torch.tensor(next(_numbers))
    with _lock:
        for number in [number for number, run in _runs.items() if run.token.expired()]:
            del _runs[number]
        _runs[int(token)] = _Run(kernels.StorageWeakRef(token.untyped_storage()), [], [])
    return token


def _keep(token: torch.Tensor, values: list[torch.Tensor], counts: torch.Tensor) -> torch.Tensor:
    run = _runs[int(token)]
    run.rows.append([value.clone() for value in values])
    run.counts.append(counts.clone())
    return torch.zeros((), dtype=torch.int64, device=counts.device)


def _kept(token: torch.Tensor, last: list[torch.Tensor], like: torch.Tensor) -> list[torch.Tensor]:
    with _lock:
        run = _runs.pop(int(token), None)
    if run is None:
        raise RewriteError(
            "what a search kept of its steps is asked for a second time",
            required="one forward for each search",
            fix='report this as a bug, with the model; until then compile under PrecisionPolicy(checkpoint="none")',
        )
    flags = torch.stack(run.counts).tolist() if run.counts else []
    rows = [row for row, counts in zip(run.rows, flags, strict=True) if counts]
    further = like.shape[0] - len(rows)
    stacks = []
    for i, value in enumerate(last):
        stacks.append(torch.stack([*(row[i] for row in rows), *[value] * further]))
        for row in run.rows:
            row[i] = None  # one kind of value after the other is held twice
    return stacks


def _evaluations(search: torch.Tensor, searched: torch.Tensor, again: torch.Tensor) -> torch.Tensor:
    return searched + again


library.impl("evaluations", _evaluations, "CompositeImplicitAutograd")
for _name, _function in (("begin_keeping", _begin_keeping), ("keep", _keep), ("kept", _kept)):
    library.impl(_name, _function, "CompositeExplicitAutograd")
    library.impl(_name, kernels.below_autograd(getattr(torch.ops.rampde_fx, _name)), "Autograd")
for _name, _fake in {
    "begin_keeping": lambda t, search: torch.empty((), dtype=torch.int64),
    "keep": lambda token, values, counts: torch.empty((), dtype=torch.int64, device=counts.device),
    "kept": lambda token, last, like: [value.new_empty((like.shape[0], *value.shape)) for value in last],
}.items():
    torch.library.register_fake(f"rampde_fx::{_name}", _fake, lib=library)
begin_keeping, keep, kept = (getattr(torch.ops.rampde_fx, name) for name in ("begin_keeping", "keep", "kept"))
evaluations = torch.ops.rampde_fx.evaluations
