"""What the examples share: methods, dtypes, the command line's types, progress, tables and pictures."""

import argparse
import csv
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

import rampde_fx

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

Velocity = Callable[[Tensor, Tensor], Tensor]


def euler(velocity: Velocity, t: Tensor, dt: Tensor, y: Tensor) -> Tensor:
    """One step of the explicit Euler method."""
    return y + dt * velocity(t, y)


def midpoint(velocity: Velocity, t: Tensor, dt: Tensor, y: Tensor) -> Tensor:
    """One step of the explicit midpoint rule."""
    k1 = velocity(t, y)
    return y + dt * velocity(t + dt / 2, y + dt / 2 * k1)


def rk4(velocity: Velocity, t: Tensor, dt: Tensor, y: Tensor) -> Tensor:
    """One step of the classical Runge-Kutta method."""
    k1 = velocity(t, y)
    k2 = velocity(t + dt / 2, y + dt / 2 * k1)
    k3 = velocity(t + dt / 2, y + dt / 2 * k2)
    k4 = velocity(t + dt, y + dt * k3)
    return y + dt / 6 * (k1 + 2 * k2 + 2 * k3 + k4)


METHODS = {"Euler": euler, "midpoint": midpoint, "RK4": rk4}


def unit_roundoff(dtype: torch.dtype) -> float:
    """u, the largest relative error of rounding to the nearest: 2^-11 in float16, 2^-8 in bfloat16."""
    return torch.finfo(dtype).eps / 2


def relative_error(value: Tensor, exact: Tensor) -> float:
    """The distance to exact in the 2-norm, divided by the norm of exact."""
    return ((value.double() - exact.double()).norm() / exact.double().norm()).item()


def compiled(model: nn.Module, policy: rampde_fx.PrecisionPolicy, compiler: str) -> Callable[..., Tensor]:
    """The model, marked with the policy and compiled by the rampde_fx backend."""
    torch.compiler.reset()  # else the graphs of all earlier models count against Dynamo's limit of recompilations
    marked = rampde_fx.mixed_precision(model, policy=policy)
    return torch.compile(marked, backend="rampde_fx", options={"compiler": compiler}, fullgraph=True)


def positive(text: str) -> int:
    """A command line's number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value


class Lines:
    """A stream that writes whatever it is given as a line of stderr."""

    def write(self, text: str) -> None:
        """One line, if there is anything to see."""
        if text.strip():
            print(text.strip(), file=sys.stderr, flush=True)

    def flush(self) -> None:
        """Nothing: each line is there when it is written."""


def progress(total: int, title: str, unit: str = "it", done: int = 0) -> tqdm:
    """A progress bar; where stderr is no terminal, a line in ten seconds."""
    shown = {"total": total, "desc": title, "unit": unit, "initial": done}
    return tqdm(**shown) if sys.stderr.isatty() else tqdm(**shown, file=Lines(), mininterval=10, ncols=100)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]], texts: int = 1) -> str:
    """A Markdown table with aligned columns: the first ``texts`` to the left, the numbers to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        padded = zip(cells, widths, range(len(cells)), strict=True)
        return "| " + " | ".join(cell.ljust(w) if i < texts else cell.rjust(w) for cell, w, i in padded) + " |"

    rule = "|" + "|".join("-" * (w + 1) + ("-" if i < texts else ":") for i, w in enumerate(widths)) + "|"
    return "\n".join([line(header), rule, *map(line, rows)])


def write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Writes a table."""
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


def save(figure: Figure, path: Path) -> None:
    """Writes a picture, and says so."""
    figure.savefig(path, dpi=120)
    print(f"picture {path}")
