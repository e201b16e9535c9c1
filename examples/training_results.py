"""What a training example has measured: histories, the rows of a table, and the picture of the losses."""

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from common import markdown, save, write_csv
from matplotlib.figure import Figure
from torch import Tensor

import rampde_fx

MIB = 2**20
STYLES = {
    "float32": ("C2", "-"),
    "bfloat16": ("C1", "--"),
    "float16": ("C0", "-."),
    "float16-unscaled": ("C3", ":"),
}


@dataclass(frozen=True)
class Metric:
    """How a held-out metric is called and printed.

    Attributes:
        label: Its name in tables.
        unit: "nats", "%", ...
        digits: Behind the decimal point.
    """

    label: str
    unit: str
    digits: int = 4

    @property
    def heading(self) -> str:
        """Name and unit, if there is one."""
        return f"{self.label} ({self.unit})" if self.unit else self.label


@dataclass
class History:
    """What a run has recorded.

    Attributes:
        losses: Training loss of each iteration.
        seconds: Duration of each iteration but the first after a start or a resume.
        first_seconds: Duration of the longest of those first iterations; the first run of a dtype compiles there.
        checks: Held-out metrics during training, each with its "iteration".
        passes: Backward passes through scaled loops.
        repeated: Those that overflowed and were repeated.
        diverged: The iteration at which the loss was not finite.
    """

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    first_seconds: float = 0.0
    checks: list[dict[str, float]] = field(default_factory=list)
    passes: int = 0
    repeated: int = 0
    diverged: int | None = None

    def add(self, loss: float, seconds: float, first: bool) -> None:
        """Records an iteration."""
        self.losses.append(loss)
        if first:
            self.first_seconds = max(self.first_seconds, seconds)
        else:
            self.seconds.append(seconds)

    def add_counts(self, counts: Iterable[rampde_fx.BackwardCount]) -> None:
        """Adds the backward passes of all loops."""
        for count in counts:
            self.passes += count.passes
            self.repeated += count.repeated

    def recent(self, window: int) -> float:
        """Mean loss of the last iterations; nan before the first one."""
        return statistics.fmean(self.losses[-window:] or [math.nan])


@dataclass
class Result:
    """A finished run.

    Attributes:
        dtype: Of the velocity, and "-unscaled" without adjoint scaling.
        seed: Of parameters and batches.
        history: What training has recorded.
        metrics: Held-out metrics, nan where the run has diverged.
        stored: Bytes that the integration loops store for the backward.
        stored_autograd: Bytes that plain autograd would store.
    """

    dtype: str
    seed: int
    history: History
    metrics: dict[str, float]
    stored: int
    stored_autograd: int


def summary(metrics: dict[str, Metric], result: Result) -> str:
    """One line."""
    if result.history.diverged is not None:
        return f"diverged at iteration {result.history.diverged}"
    return ", ".join(f"{m.label} {result.metrics[name]:.{m.digits}f} {m.unit}".rstrip() for name, m in metrics.items())


def write_curve(metrics: dict[str, Metric], result: Result, path: Path) -> None:
    """Writes the training loss of every iteration from 1 on, and the held-out metrics where they were measured."""
    checks = {check["iteration"]: check for check in result.history.checks}
    names = [name for name in metrics if any(name in check for check in checks.values())]
    rows = [
        [number, loss, *(checks.get(number, {}).get(name, "") for name in names)]
        for number, loss in enumerate(result.history.losses, 1)
    ]
    write_csv(path, ["iteration", "training_loss", *names], rows)


def write_rows(metrics: dict[str, Metric], results: list[Result], path: Path) -> None:
    """Writes one row for each run."""
    header = ["dtype", "seed", *metrics, "diverged_at", "training_loss_last_50", "first_iteration_s", "iteration_ms"]
    header += ["stored_bytes", "stored_bytes_autograd", "backward_passes", "backward_passes_repeated"]
    rows = []
    for r in results:
        h = r.history
        rows.append([r.dtype, r.seed, *(r.metrics[name] for name in metrics), "" if h.diverged is None else h.diverged])
        rows[-1] += [h.recent(50), h.first_seconds, median_ms([r]), r.stored, r.stored_autograd, h.passes, h.repeated]
    write_csv(path, header, rows)


def median_ms(results: list[Result]) -> float:
    """Median duration of an iteration in all runs, the first ones left out; nan where there is no other."""
    return 1e3 * statistics.median([s for r in results for s in r.history.seconds] or [math.nan])


def by_dtype(results: list[Result]) -> dict[str, list[Result]]:
    """The runs of each dtype, in the order of the results."""
    return {dtype: [r for r in results if r.dtype == dtype] for dtype in dict.fromkeys(r.dtype for r in results)}


def metric_cell(name: str, metric: Metric, runs: list[Result]) -> str:
    """Mean and standard deviation over the seeds, or how many runs have diverged."""
    diverged = [r.history.diverged for r in runs if r.history.diverged is not None]
    if diverged:
        return f"diverged at iteration {diverged[0]}" if len(runs) == 1 else f"{len(diverged)} of {len(runs)} diverged"
    values = [r.metrics[name] for r in runs]
    mean = f"{statistics.fmean(values):.{metric.digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{metric.digits}f}"


def table(metrics: dict[str, Metric], results: list[Result]) -> str:
    """A Markdown table with a row for each dtype, and the relative differences from float32 below it.

    The compile time is the longest first iteration of a dtype: the runs of further seeds use what the first one has
    compiled.
    """
    header = ["dtype", *(metric.heading for metric in metrics.values()), "iteration, median (ms)"]
    header += ["first iteration, compiles (s)", "stored (MiB)", "by plain autograd (MiB)", "backward passes repeated"]
    rows = []
    for dtype, runs in by_dtype(results).items():
        passes, repeated = sum(r.history.passes for r in runs), sum(r.history.repeated for r in runs)
        rows.append([dtype, *(metric_cell(name, metric, runs) for name, metric in metrics.items())])
        rows[-1] += [f"{median_ms(runs):.1f}", f"{max(r.history.first_seconds for r in runs):.1f}"]
        rows[-1] += [f"{runs[0].stored / MIB:.3f}", f"{runs[0].stored_autograd / MIB:.3f}"]
        rows[-1] += [f"{repeated:,} of {passes:,}" if passes else "not scaled"]
    return "\n".join([markdown(header, rows), *differences(metrics, results)]) + "\n"


def differences(metrics: dict[str, Metric], results: list[Result]) -> list[str]:
    """The relative difference of the first metric's mean from that of float32, for every other dtype."""
    name, metric = next(iter(metrics.items()))
    means = {dtype: statistics.fmean(r.metrics[name] for r in runs) for dtype, runs in by_dtype(results).items()}
    reference = means.pop("float32", math.nan)
    found = {dtype: abs(mean - reference) / abs(reference) for dtype, mean in means.items() if reference}
    text = ", ".join(f"{dtype} {value:.1e}" for dtype, value in found.items() if math.isfinite(value))
    return ["", f"Relative difference from float32, {metric.label}: {text}."] if text else []


def moving_mean(values: list[float], window: int) -> Tensor:
    """The means over up to ``window`` values that end at each one."""
    total = torch.tensor([0.0, *values], dtype=torch.float64).cumsum(0)
    end = torch.arange(1, len(values) + 1)
    start = (end - window).clamp(min=0)
    return (total[end] - total[start]) / (end - start)


Curve = tuple[Tensor, Tensor]  # iterations and values


def draw_losses(
    metrics: dict[str, Metric], loss_unit: str, results: list[Result], path: Path, window: int = 20
) -> None:
    """Draws the training losses, and the held-out metrics measured during training, of all dtypes.

    A line is the mean over the seeds, the band goes from the smallest to the largest; a cross marks where a run
    diverged. The losses are moving means over up to ``window`` iterations. The axis is logarithmic over two decades.
    """

    def losses(result: Result) -> Curve:
        return torch.arange(1, len(result.history.losses) + 1), moving_mean(result.history.losses, window)

    def checks(result: Result, name: str) -> Curve:
        points = [(c["iteration"], c[name]) for c in result.history.checks]
        return torch.tensor([x for x, _ in points]), torch.tensor([y for _, y in points])

    panels = {f"training loss ({loss_unit}), mean of {window}": losses}
    for name, metric in metrics.items():
        if any(name in check for r in results for check in r.history.checks):
            panels[metric.heading] = lambda result, name=name: checks(result, name)
    figure = Figure(figsize=(7 if len(panels) == 1 else 5.2 * len(panels), 4.2), layout="constrained")
    for axes, (label, curve) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for dtype, runs in by_dtype(results).items():
            draw_band(axes, [curve(r) for r in runs], [r.history.diverged is not None for r in runs], dtype)
        whole = [curve(r)[1] for r in results if r.history.diverged is None]
        if whole:
            low, high = min(y.min().item() for y in whole), max(y.max().item() for y in whole)
            logarithmic = low > 0 and high > 100 * low
            if logarithmic:
                axes.set_yscale("log")
            if len(whole) < len(results):  # what has diverged does not decide the range
                margin = 0.05 * (high - low)
                axes.set_ylim((low / 1.2, 1.2 * high) if logarithmic else (low - margin, high + margin))
        axes.set(xlabel="iteration", ylabel=label)
        axes.grid(alpha=0.2)
    axes.legend()
    save(figure, path)


def draw_band(axes: object, curves: list[Curve], diverged: list[bool], dtype: str) -> None:
    """Draws one dtype; where some runs have ended the mean is that of the others."""
    color, style = STYLES[dtype]
    longest = max((x for x, _ in curves), key=len)
    values = torch.full((len(curves), len(longest)), math.nan, dtype=torch.float64)
    for row, (x, y) in zip(values, curves, strict=True):
        row[: len(x)] = y
    missing = values.isnan()
    axes.plot(longest, values.nanmean(dim=0), style, color=color, label=dtype, linewidth=1.4)
    if len(curves) > 1:
        low = values.masked_fill(missing, math.inf).amin(dim=0)
        high = values.masked_fill(missing, -math.inf).amax(dim=0)
        axes.fill_between(longest, low, high, color=color, alpha=0.15, linewidth=0)
    for (x, y), ended in zip(curves, diverged, strict=True):
        if ended and len(x):
            axes.plot(x[-1], y[-1], "x", color=color, markersize=8)
