"""A density flow, trained in float32 and in the low dtype that suits this machine, side by side.

It takes about two minutes on two cores, most of them for the check and the two compilations. It writes one
page, demo.html: a table, the two densities with their difference, and the losses. The flow and the data are those of
density.py, at a size where products rule; on a processor without arithmetic in a low dtype, where bfloat16 is imitated
and slow, at a small one.
"""

import argparse
import base64
import json
import math
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path

import density
import density_data
import density_plots
import torch
from common import markdown, positive, progress
from matplotlib.figure import Figure
from torch import Tensor

import rampde_fx
from rampde_fx.__main__ import environment

KIB = 2**10
HELD_OUT = 4096
NOISE = 0.05  # times are told apart that differ by more, relatively
DISTURBED = 1.5  # times float32: no dtype takes as long that the processor multiplies in
# Width and batch where the device has arithmetic in a low dtype, and where it has none.
LARGE, SMALL = (256, 512), (64, 256)
COLUMNS = (
    ("velocity in", "the dtype in which the velocity is evaluated; solution and gradients stay in float32"),
    ("an iteration (ms)", "forward, backward and optimizer step: the median, both dtypes in turns"),
    ("compiling (s)", "the first iteration: capture, rewrite and compilation"),
    ("kept for the backward (KiB)", "what the loop stores between forward and backward"),
    ("held-out loss (nats)", "mean negative log-density of points that were not trained on; lower is better"),
    ("gradient error", "worst relative error of a gradient in a check against float64, before training"),
)
STYLE = """
:root { color-scheme: light dark; } body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto;
padding: 1.5rem; } table { border-collapse: collapse; } .wide { overflow-x: auto; } td, th { padding: 0.3rem 0.8rem;
border-bottom: 1px solid #8888; text-align: right; } th:first-child, td:first-child { text-align: left; }
img { max-width: 100%; background: #fff; } dt { font-weight: 600; } pre { overflow-x: auto; }
"""


@dataclass(frozen=True)
class Row:
    """What one dtype gave.

    Attributes:
        dtype: Of the velocity.
        iteration: Median seconds of an iteration.
        first: Seconds of the first one, which compiles.
        stored: Bytes that the loop stores for the backward.
        loss: Held-out, in nats.
        error: Worst relative error of a gradient against float64.
    """

    dtype: str
    iteration: float
    first: float
    stored: int
    loss: float
    error: float

    def cells(self) -> list[str]:
        """As COLUMNS name them."""
        numbers = (f"{1e3 * self.iteration:.0f}", f"{self.first:.0f}", f"{self.stored / KIB:.0f}")
        return [self.dtype, *numbers, f"{self.loss:.3f}", f"{self.error:.1e}"]


def chosen_dtype(device: str) -> torch.dtype:
    """What rampde_fx chooses for a device: float32 on a processor without arithmetic in a low dtype."""
    return rampde_fx.PrecisionPolicy().chosen_for(torch.device(device).type).dtype


class Demo:
    """The flow, its data, and what all dtypes share: the first parameters and the batches.

    Attributes:
        low: The low dtype for this machine: what rampde_fx chooses, or bfloat16 where that is float32.
        has_arithmetic: Whether the machine has arithmetic in it.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        chosen = chosen_dtype(options.device)
        self.has_arithmetic = chosen is not torch.float32
        self.low = chosen if self.has_arithmetic else torch.bfloat16
        width, batch = LARGE if self.has_arithmetic else SMALL
        options.width, options.batch = options.width or width, options.batch or batch
        self.data = density_data.load("8gaussians")
        self.t = torch.linspace(0, 1, options.steps + 1, device=options.device)
        self.held_out = self.data.sample(HELD_OUT, torch.Generator().manual_seed(1)).to(options.device)

    def flow(self) -> density.Flow:
        """The flow with its first parameters, the same for all dtypes."""
        torch.manual_seed(0)
        return density.Flow(self.data.dim, self.options.width).to(self.options.device)

    def loss(self, flow: object, points: Tensor) -> Tensor:
        """Mean negative log-density, 0-d."""
        return -density.log_density(flow, points, self.t).mean()

    def checked(self, dtypes: Sequence[torch.dtype]) -> list[rampde_fx.CheckRow]:
        """A batch, checked against float64 with the first parameters, moved off zero."""
        flow = self.flow()
        torch.nn.init.normal_(flow.last.weight, std=0.1)
        batch = torch.nn.functional.pad(self.held_out[: self.options.batch], (0, 1))
        policies = [rampde_fx.PrecisionPolicy(velocity=dtype) for dtype in dtypes]
        rows = rampde_fx.check(flow, batch, self.t, policies=policies, compiler="aot_eager").rows
        return [next(row for row in rows if row.policy == policy) for policy in policies]

    def learned(self, flow: density.Flow) -> Tensor:
        """What a flow has learned, on the grid of density_plots, on the CPU."""
        grid = density_plots.grid().to(self.options.device)
        with torch.no_grad():
            return torch.cat([density.log_density(flow, chunk, self.t) for chunk in grid.split(4096)]).exp().cpu()


class Training:
    """The training in one dtype, an iteration at a time: all dtypes are timed in turns.

    Args:
        demo: What is trained.
        dtype: Of the velocity.

    Attributes:
        name: Of the dtype.
        flow: The module.
        model: The same, compiled.
        losses: Of the iterations so far, in nats.
        seconds: How long each took.
    """

    def __init__(self, demo: Demo, dtype: torch.dtype) -> None:
        self._demo, self.name = demo, str(dtype).removeprefix("torch.")
        self.flow = rampde_fx.mixed_precision(demo.flow(), dtype=dtype)
        options = {"compiler": demo.options.compiler}
        self.model = torch.compile(self.flow, backend="rampde_fx", options=options, fullgraph=True)
        self._optimizer = torch.optim.Adam(self.flow.parameters(), lr=1e-2)
        self._generator = torch.Generator().manual_seed(0)
        self.losses: list[float] = []
        self.seconds: list[float] = []

    def iterate(self) -> None:
        """One iteration."""
        begin = time.perf_counter()
        points = self._demo.data.sample(self._demo.options.batch, self._generator).to(self._demo.options.device)
        loss = self._demo.loss(self.model, points)
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()
        self.losses.append(loss.item())
        self.seconds.append(time.perf_counter() - begin)

    def row(self, checked: rampde_fx.CheckRow) -> Row:
        """The numbers, at the end."""
        held_out = density.held_out_loss(self.model, self._demo.held_out, self._demo.t, self._demo.options.batch)
        typical = statistics.median(self.seconds[1:] or self.seconds)
        return Row(self.name, typical, self.seconds[0], checked.stored_bytes, held_out, checked.error)


def train(trainings: Sequence[Training], iterations: int, expected: dict[str, float]) -> None:
    """Compiles each, then trains all in turns.

    Args:
        trainings: One for each dtype.
        iterations: Of each.
        expected: By dtype, the seconds that compiling took the last time.
    """
    for training in trainings:
        known = f" ({expected[training.name]:.0f} s the last time)" if training.name in expected else ""
        print(f"{training.name}: compiling{known} ...", flush=True)
        training.iterate()
        print(f"{training.name}: compiled in {training.seconds[0]:.0f} s", flush=True)
    bar = progress(iterations, " and ".join(training.name for training in trainings), done=1)
    for _ in range(iterations - 1):
        for training in trainings:
            training.iterate()
        bar.update()
        losses = {training.name: f"{training.losses[-1]:.3f}" for training in trainings}
        bar.set_postfix(losses, refresh=False)
    bar.close()


def draw_densities(names: Sequence[str], densities: Sequence[Tensor], path: Path) -> None:
    """Draws two densities on density_plots' grid and their difference, each with its scale."""
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    side, extent = density_plots.GRID_POINTS, density_plots.EXTENT
    difference = densities[1] - densities[0]
    largest = densities[0].max().item()
    bound = max(difference.abs().max().item(), 1e-12)
    panels = [(name, values, {"vmin": 0, "vmax": largest}) for name, values in zip(names, densities, strict=True)]
    panels.append((f"{names[1]} minus {names[0]}", difference, {"vmin": -bound, "vmax": bound, "cmap": "RdBu"}))
    for axes, (title, values, scale) in zip(figure.subplots(1, 3), panels, strict=True):
        image = axes.imshow(
            values.view(side, side).numpy(), origin="lower", extent=(-extent, extent, -extent, extent), **scale
        )
        axes.set_title(title)
        figure.colorbar(image, ax=axes, shrink=0.8)
    figure.savefig(path, dpi=110)


def draw_losses(losses: dict[str, list[float]], path: Path) -> None:
    """Draws the training losses, one line for each dtype."""
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    for (name, values), style in zip(losses.items(), ("-", "--"), strict=True):
        axes.plot(range(1, len(values) + 1), values, style, label=name)
    axes.set(xlabel="iteration", ylabel="training loss (nats)")
    axes.grid(alpha=0.2)
    axes.legend()
    figure.savefig(path, dpi=110)


def verdict(rows: Sequence[Row], *, has_arithmetic: bool) -> str:
    """One sentence from the rows' own numbers, and one on a processor without arithmetic in the low dtype."""
    wide, low = rows
    time_ratio, memory = low.iteration / wide.iteration, low.stored / wide.stored
    if abs(math.log(time_ratio)) < NOISE:
        speed = "takes about as long as"
    elif time_ratio < 1:
        speed = f"is {1 / time_ratio:.1f} times as fast as"
    else:
        speed = f"takes {time_ratio:.1f} times as long as"
    doubt = " Other work may have disturbed it: run it again." if has_arithmetic and time_ratio > DISTURBED else ""
    imitated = "" if has_arithmetic else f" This processor has no arithmetic in {low.dtype}: it is imitated."
    return (
        f"Here {low.dtype} {speed} float32 and keeps {memory:.2f} of its memory between forward and backward; the "
        f"held-out losses differ by {abs(low.loss - wide.loss):.3f} nats.{imitated}{doubt}"
    )


def page(options: argparse.Namespace, rows: Sequence[Row], found: str, pictures: Sequence[tuple[str, Path]]) -> str:
    """The page, with the verdict and the pictures inside."""
    head = "".join(f"<th>{escape(name)}</th>" for name, _ in COLUMNS)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row.cells())}</tr>" for row in rows)
    told = "".join(f"<dt>{escape(name)}</dt><dd>{escape(meaning)}</dd>" for name, meaning in COLUMNS)
    shown = "".join(
        f'<h2>{escape(title)}</h2><img alt="{escape(title)}" src="data:image/png;base64,'
        f'{base64.b64encode(path.read_bytes()).decode()}">'
        for title, path in pictures
    )
    machine = escape(environment())
    size = f"{options.steps} RK4 steps, width {options.width}, batch {options.batch}, {options.iterations} iterations"
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>rampde_fx: a demonstration</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head><body>'
        f"<h1>One flow, float32 and {rows[1].dtype}</h1><p>{escape(found)}</p>"
        f'<p>A continuous normalizing flow: {size}.</p><div class="wide"><table><tr>{head}</tr>{body}</table></div>'
        f"<dl>{told}</dl>{shown}<h2>This machine</h2><pre>{machine}</pre>"
        "<h2>On your own model</h2><pre>print(rampde_fx.check(model, *inputs, time=True))</pre></body></html>\n"
    )


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for option, default in (("--iterations", 100), ("--steps", 8)):
        parser.add_argument(option, metavar="N", type=positive, default=default, help="default %(default)s")
    for option, large, small in zip(("--width", "--batch"), LARGE, SMALL, strict=True):
        told = f"default {large}, or {small} where the device has no arithmetic in a low dtype"
        parser.add_argument(option, metavar="N", type=positive, help=told)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default %(default)s")
    parser.add_argument("--compiler", choices=["inductor", "aot_eager"], default="inductor")
    parser.add_argument("--out", metavar="DIR", type=Path, default=Path("examples/out/demo"))
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the demonstration and returns its exit status."""
    options = parse_arguments(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    before = options.out / "rows.json"
    known = {row["dtype"]: row["first"] for row in json.loads(before.read_text())} if before.exists() else {}
    demo = Demo(options)
    dtypes = [torch.float32, demo.low]
    print("checking gradients against float64 ...", flush=True)
    checked = demo.checked(dtypes)
    trainings = [Training(demo, dtype) for dtype in dtypes]
    train(trainings, options.iterations, known)
    rows = [training.row(row) for training, row in zip(trainings, checked, strict=True)]
    losses = {training.name: training.losses for training in trainings}
    densities = [demo.learned(training.flow) for training in trainings]
    before.write_text(json.dumps([asdict(row) for row in rows]))
    pictures = [("What both have learned", options.out / "densities.png"), ("Training", options.out / "losses.png")]
    draw_densities(list(losses), densities, pictures[0][1])
    draw_losses(losses, pictures[1][1])
    found = verdict(rows, has_arithmetic=demo.has_arithmetic)
    (options.out / "demo.html").write_text(page(options, rows, found, pictures), encoding="utf-8")
    print(f"\n{markdown([name for name, _ in COLUMNS], [row.cells() for row in rows])}\n")
    print("\n".join(f"{name}: {meaning}" for name, meaning in COLUMNS))
    print(f"\n{found}\nThe page: {options.out / 'demo.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
