"""Training watched from inside: the scale, the size and the losses of the adjoint at every velocity VJP."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from rampde_fx.runtime.adjoint_record import AdjointRecord

TO_RECORD = 'run forward and backward of a model compiled by backend="rampde_fx" inside of monitor()'


class _Open(threading.local):
    """Whether a monitor is open, as the code that Dynamo traces reads it; it guards it, thread by thread."""

    def __init__(self) -> None:
        self.any = False


class Monitor:
    """What monitor() gives: the records of the backward passes so far.

    Attributes:
        records: One AdjointRecord for each backward pass through each loop, in their order.
    """

    def __init__(self) -> None:
        self.records: list[AdjointRecord] = []
        self._training_steps = 0

    def loops(self) -> dict[str, list[AdjointRecord]]:
        """The records of each loop, by its name, in the order of their first backward passes."""
        found: dict[str, list[AdjointRecord]] = {}
        for record in self.records:
            found.setdefault(record.loop, []).append(record)
        return found

    def plot(self, path: str | Path | None = None) -> Any:
        """Draw the scales, the adjoint and what was lost, over training and over the steps of the last backward pass.

        Args:
            path: A file to write, PNG, PDF or SVG by its ending.

        Returns:
            The matplotlib Figure, a column for each loop.

        Raises:
            MonitorError: if nothing was recorded, or matplotlib is not installed.
        """
        from rampde_fx.runtime.monitor_plot import draw

        return draw(self.loops(), path)

    def __str__(self) -> str:
        if not self.records:
            return f"no backward pass was recorded: {TO_RECORD}"
        return "\n".join(
            "\n".join([f"loop at {loop}", *(f"  {name:18}  {value}" for name, value in _summary(records).items())])
            for loop, records in self.loops().items()
        )

    def _repr_html_(self) -> str:
        tables = []
        for loop, records in self.loops().items():
            found = _summary(records).items()
            rows = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in found)
            tables.append(f"<h4>Loop at {escape(loop)}</h4><table>{rows}</table>")
        return "".join(tables) or f"<p>{self}</p>"

    def _add(self, loop: str, run: int, statistics: torch.Tensor) -> None:
        scales, largest, smallest, underflows, overflows = statistics.unbind(-1)
        record = AdjointRecord(
            loop=loop,
            training_step=self._training_steps,
            runs=run + 1,
            scales=scales,
            largest=largest,
            smallest=smallest,
            underflows=underflows.to(torch.int64),
            overflows=overflows.to(torch.int64),
        )
        if run:  # another thread may have recorded another loop since the run before
            self.records[max(i for i, earlier in enumerate(self.records) if earlier.loop == loop)] = record
        else:
            self.records.append(record)

    def _stepped(self, *_: Any) -> None:
        self._training_steps += 1


open_here = _Open()
_lock = threading.Lock()
_monitors: list[Monitor] = []


@contextlib.contextmanager
def monitor() -> Iterator[Monitor]:
    """Record what happens to the adjoint of every rewritten loop, while the context is open.

    A model that runs inside is compiled once more, with the records in its graph: a few reductions for each VJP, and
    one transfer to the host for each backward pass. Outside, nothing of this is in the graph. It holds for forward
    passes of the thread that opens it; the records take 20 bytes for each VJP.

    Yields:
        The Monitor, whose records grow; print() and plot() show them.

    >>> with monitor() as watched:
    ...     pass  # train
    >>> len(watched.records)
    0
    """
    watched, outer = Monitor(), open_here.any
    hook = register_optimizer_step_post_hook(watched._stepped)
    with _lock:
        _monitors.append(watched)
    open_here.any = True
    try:
        yield watched
    finally:
        open_here.any = outer
        with _lock:
            _monitors.remove(watched)
        hook.remove()


def record(loop: str, run: int, statistics: torch.Tensor) -> None:
    """Give every open monitor a run of a reverse loop.

    Args:
        loop: The loop's name.
        run: 0 for the first run of a backward pass, 1 for its repetition, and so on.
        statistics: What watch_adjoint's statistics() returns, (steps, VJPs, 5), in the order of the forward.
    """
    kept = statistics.detach().to("cpu", torch.float32, copy=True)
    with _lock:
        for watched in _monitors:
            watched._add(loop, run, kept)


def _summary(records: list[AdjointRecord]) -> dict[str, str]:
    """What there is to say about a loop: label and text."""
    # Passes of an adaptive solve differ in their numbers of steps.
    scales = torch.cat([record.scales for record in records])
    largest = torch.cat([record.largest for record in records])
    smallest = torch.cat([record.smallest for record in records])
    low, high = scales.min().log2().item(), scales.max().log2().item()
    return {
        "backward passes": f"{len(records)}, in {len({record.training_step for record in records})} training steps",
        "run again": f"{sum(record.runs > 1 for record in records)}",
        "scales": f"2^{low:.0f}" if low == high else f"2^{low:.0f} to 2^{high:.0f}",
        "|adjoint|": f"{smallest.min():.2g} to {largest.max():.2g}",
        "underflows": f"{sum(int(record.underflows.sum()) for record in records):,} entries",
        "overflows": f"{sum(int(record.overflows.sum()) for record in records):,} entries",
    }
