"""The pictures of a monitor: scales, adjoint and losses over training, and along the loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from rampde_fx.errors import MonitorError
from rampde_fx.runtime.adjoint_record import AdjointRecord

LARGEST, SMALLEST, SCALED = "tab:red", "tab:blue", "tab:green"


def draw(loops: dict[str, list[AdjointRecord]], path: str | Path | None) -> Any:
    """A matplotlib Figure with a column for each loop, written to a file if a path is given.

    Args:
        loops: The records of each loop, by its name.
        path: The file, or None.

    Raises:
        MonitorError: if there are no records, or matplotlib is not installed.
    """
    if not loops:
        raise MonitorError(
            "no backward pass was recorded, so that there is nothing to draw",
            required="a backward pass through a rewritten loop while the monitor is open",
            fix="run the forward and the backward of the compiled model inside of the context",
        )
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MonitorError(
            "the plot of a monitor needs matplotlib, which is not installed",
            required="matplotlib",
            fix="pip install matplotlib, or read monitor.records",
        ) from error
    figure = Figure(figsize=(1.5 + 4.5 * len(loops), 11), layout="constrained")
    grid = figure.subplots(4, len(loops), squeeze=False)
    for column, (loop, records) in zip(grid.T, loops.items(), strict=True):
        column[0].set_title(f"loop at {Path(loop).name}", pad=30)
        _draw_scales(column[0], records)
        _draw_adjoint(column[1], records)
        _draw_losses(column[2], records)
        _draw_last(column[3], records[-1])
    if path is not None:
        figure.savefig(path, dpi=120)
    return figure


def _passes(records: list[AdjointRecord]) -> range:
    return range(1, len(records) + 1)


def _draw_scales(axes: Any, records: list[AdjointRecord]) -> None:
    powers = [record.scales.log2() for record in records]
    low, high = [p.min().item() for p in powers], [p.max().item() for p in powers]
    axes.fill_between(_passes(records), low, high, alpha=0.3, color=SCALED, label="all VJPs", step="mid")
    axes.plot(
        _passes(records), [p.median().item() for p in powers], color=SCALED, label="median", drawstyle="steps-mid"
    )
    axes.set(xlabel="backward pass", ylabel="log2 of the scale")
    axes.locator_params(axis="y", integer=True)
    _legend(axes)


def _draw_adjoint(axes: Any, records: list[AdjointRecord]) -> None:
    largest, smallest = [record.largest for record in records], [record.smallest for record in records]
    for values, color, name in ((largest, LARGEST, "largest entry"), (smallest, SMALLEST, "smallest but zero")):
        low, middle, high = (
            _shown(torch.stack([take(value) for value in values])) for take in (torch.min, torch.median, torch.max)
        )
        axes.fill_between(_passes(records), low, high, alpha=0.3, color=color)
        axes.plot(_passes(records), middle, color=color, label=f"{name} (median VJP)")
    axes.set(xlabel="backward pass", ylabel="|cotangent|, not scaled", yscale="log")
    _legend(axes)


def _draw_losses(axes: Any, records: list[AdjointRecord]) -> None:
    underflows = [int(record.underflows.sum()) for record in records]
    overflows = [int(record.overflows.sum()) for record in records]
    axes.plot(_passes(records), underflows, color=SMALLEST, label="entries that became zero", drawstyle="steps-mid")
    axes.plot(_passes(records), overflows, color=LARGEST, label="gradients not finite", drawstyle="steps-mid")
    again = [i for i, record in zip(_passes(records), records, strict=True) if record.runs > 1]
    axes.plot(again, [0] * len(again), "kx", label=f"run again: {len(again)} of {len(records)}")
    axes.set_yscale("symlog", linthresh=1)
    axes.set(xlabel="backward pass", ylabel="entries in all VJPs", ylim=(-0.5, 2 * max(5, *underflows, *overflows)))
    _legend(axes)


def _draw_last(axes: Any, record: AdjointRecord) -> None:
    steps, evaluations = record.scales.shape
    places = (torch.arange(steps * evaluations) / evaluations).tolist()
    for values, color, style, name in (
        (record.largest, LARGEST, "-", "largest entry"),
        (record.smallest, SMALLEST, "-", "smallest entry but zero"),
        (record.largest * record.scales, SCALED, "--", "largest entry, scaled"),
    ):
        axes.plot(places, _shown(values.flatten()), style, color=color, label=name)
    axes.set(xlabel="step of the loop, in the last backward pass", ylabel="|cotangent|", yscale="log")
    _legend(axes)


def _legend(axes: Any) -> None:
    """A legend above the panel, where it hides nothing."""
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, frameon=False, fontsize="small")


def _shown(values: torch.Tensor) -> list[float]:
    """The values as a logarithmic axis takes them: without zeros and what is not finite."""
    return torch.where((values > 0) & values.isfinite(), values.double(), torch.nan).tolist()
