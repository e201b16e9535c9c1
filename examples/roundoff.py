"""The error laws of mixed precision: roundoff in the solution and in the gradients against the number of steps.

Euler, midpoint and RK4 with N steps integrate a small tanh network, in low precision and in float64; the difference is
roundoff alone. With the velocity in a low precision of unit roundoff u_low and the state accumulated in fp32,

    error = O(u_low) + O(N u_32):

each of N evaluations errs by u_low, but counts with the step size 1/N only; rounding the state N times to fp32 costs
at most N u_32, and about sqrt(N) u_32 while the errors are independent. So the error stays at u_low however fine the
grid, where a loop whose state is low itself errs by O(N u_low). With an fp32 velocity the second term is all that is
left, and compensated accumulation (Kahan's summation) removes it.

Eager's gradients of the midpoint rule grow like N u_32: the stages' increments are added to the adjoint one by one, and
those of order dt^2 fall below its last bit and are lost, always in the same direction.
Source: arXiv 2510.23498; Higham, Accuracy and Stability of Numerical Algorithms, 2002, section 4.3.
"""

import argparse
import csv
import functools
import math
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from common import METHODS, compiled, markdown, progress, relative_error, save, unit_roundoff
from matplotlib.figure import Figure
from torch import Tensor, nn

import rampde_fx
from rampde_fx import PrecisionPolicy

END = 2.0  # dt is then a power of two, and exact in every dtype
DIM, WIDTH, BATCH = 4, 8, 16
QUANTITIES = {"solution": "y(T)", "initial": "dL/dy0", "parameters": "dL/dw"}


class Network(nn.Module):
    """y' = tanh(y W1 + b) W2.

    Args:
        method: One of METHODS.
    """

    def __init__(self, method: str) -> None:
        super().__init__()
        self.step = METHODS[method]
        self.inner = nn.Parameter(torch.randn(DIM, WIDTH) / DIM**0.5)
        self.bias = nn.Parameter(torch.randn(WIDTH))
        self.outer = nn.Parameter(torch.randn(WIDTH, DIM) / WIDTH**0.5)

    def velocity(self, t: Tensor, y: Tensor) -> Tensor:
        """The right-hand side; it does not depend on t."""
        return torch.tanh(torch.addmm(self.bias, y, self.inner)) @ self.outer

    def forward(self, y: Tensor, t: Tensor) -> Tensor:
        """Integrates y (batch, dim) over the time points t."""
        for t_i, dt in rampde_fx.steps(t):
            y = self.step(self.velocity, t_i, dt, y)
        return y


@dataclass(frozen=True)
class Problem:
    """A network, initial values and the weights of the loss, all from one seed."""

    method: str
    seed: int

    def network(self) -> Network:
        """The network, the same one for every method."""
        torch.manual_seed(self.seed)
        return Network(self.method)

    def data(self) -> tuple[Tensor, Tensor]:
        """y0 and the cotangent of y(T), both (BATCH, DIM)."""
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randn(BATCH, DIM, generator=generator), torch.randn(BATCH, DIM, generator=generator)

    def solve(
        self, model: Callable[[Tensor, Tensor], Tensor], network: Network, dtype: torch.dtype, steps: int
    ) -> list[Tensor]:
        """y(T), dL/dy0 and dL/dw of L = sum(cotangent y(T)), by a model that is the network or made of it."""
        y0, cotangent = (x.to(dtype) for x in self.data())
        t = torch.linspace(0, END, steps + 1, dtype=torch.promote_types(dtype, torch.float32))  # never low
        y = model(y0.requires_grad_(), t)
        gradients = torch.autograd.grad(y, [y0, *network.parameters()], cotangent)
        return [y.detach(), gradients[0], torch.cat([g.flatten() for g in gradients[1:]])]

    def plain(self, dtype: torch.dtype, steps: int) -> list[Tensor]:
        """The loop as eager torch runs it, with state and parameters in the dtype."""
        network = self.network().to(dtype)
        return self.solve(network, network, dtype, steps)

    def rewritten(self, policy: PrecisionPolicy, compiler: str, steps: int) -> list[Tensor]:
        """The loop as the backend rewrites it."""
        network = self.network()
        return self.solve(compiled(network, policy, compiler), network, torch.float32, steps)


@functools.cache
def reference(problem: Problem, steps: int) -> list[Tensor]:
    """The same scheme in float64."""
    return problem.plain(torch.float64, steps)


@dataclass(frozen=True)
class Arithmetic:
    """One curve: how the loop is run.

    Attributes:
        name: In tables and pictures.
        dtype: Of the velocity.
        policy: How the loop is rewritten; None for eager torch with everything in the dtype.
        color: Of the curve.
        style: Marker and line of the curve.
    """

    name: str
    dtype: torch.dtype
    policy: PrecisionPolicy | None
    color: str
    style: str


DISCRETISATION = Arithmetic("discretisation error", torch.float64, None, "black", ":")


def arithmetics(accumulation: str) -> list[Arithmetic]:
    """All curves but the discretisation error; without the compensated one where accumulation is "plain"."""
    half, brain, single = torch.float16, torch.bfloat16, torch.float32
    found = [
        Arithmetic("float16 velocity", half, PrecisionPolicy(half), "C0", "o-"),
        Arithmetic("float16 state", half, None, "C0", "x--"),
        Arithmetic("bfloat16 velocity", brain, PrecisionPolicy(brain), "C1", "o-"),
        Arithmetic("bfloat16 state", brain, None, "C1", "x--"),
        Arithmetic("float32 velocity", single, PrecisionPolicy(single), "C2", "o-"),
        Arithmetic("float32, eager", single, None, "C2", "x--"),
    ]
    if accumulation == "compensated":
        policy = PrecisionPolicy(single, accumulation=accumulation)
        found.append(Arithmetic("float32 velocity, compensated", single, policy, "C3", "s-"))
    return found


@dataclass(frozen=True)
class Row:
    """One finished run: relative errors in the 2-norm, against float64 with as many steps."""

    method: str
    arithmetic: str
    steps: int
    seed: int
    solution: float
    initial: float
    parameters: float
    seconds: float


HEADER = [field.name for field in fields(Row)]


def run(problem: Problem, arithmetic: Arithmetic, steps: int, compiler: str, finest: int) -> Row:
    """Measures one point of one curve; the discretisation error against RK4 with twice the finest grid's steps."""
    exact = reference(problem, steps)
    begin = time.perf_counter()
    if arithmetic is DISCRETISATION:
        found, exact = exact, reference(Problem("RK4", problem.seed), 2 * finest)
    elif arithmetic.policy is None:
        found = problem.plain(arithmetic.dtype, steps)
    else:
        found = problem.rewritten(arithmetic.policy, compiler, steps)
    seconds = time.perf_counter() - begin
    errors = [relative_error(value, wanted) for value, wanted in zip(found, exact, strict=True)]
    return Row(problem.method, arithmetic.name, steps, problem.seed, *errors, seconds)


def read_rows(path: Path) -> list[Row]:
    """The rows of an earlier run, none where there was none."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [
            Row(r["method"], r["arithmetic"], int(r["steps"]), int(r["seed"]), *(float(r[n]) for n in HEADER[4:]))
            for r in csv.DictReader(file)
        ]


def append_row(path: Path, row: Row) -> None:
    """Adds a row, and the header to an empty file."""
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, HEADER)
        if file.tell() == 0:
            writer.writeheader()
        writer.writerow(asdict(row))


def slope(steps: Iterable[int], errors: Iterable[float]) -> float:
    """The exponent p of a least-squares fit error ~ N^p; nan where fewer than two errors can be used.

    Errors above 0.1 no longer follow a law, and below 1e-12 they are the roundoff of float64 itself.
    """
    points = [(math.log(n), math.log(e)) for n, e in zip(steps, errors, strict=True) if 1e-12 < e < 0.1]
    if len(points) < 2:
        return math.nan
    x, y = torch.tensor(points, dtype=torch.float64).T
    x, y = x - x.mean(), y - y.mean()
    return ((x @ y) / (x @ x)).item()


def curve(rows: list[Row], method: str, arithmetic: Arithmetic) -> list[Row]:
    """The rows of one curve, by the number of steps."""
    found = [row for row in rows if (row.method, row.arithmetic) == (method, arithmetic.name)]
    return sorted(found, key=lambda row: row.steps)


def table(rows: list[Row], methods: list[str], curves: list[Arithmetic]) -> str:
    """For each curve the error at its finest grid and the slope, N >= 16."""
    lines = []
    for method in methods:
        for arithmetic in curves:
            points = [row for row in curve(rows, method, arithmetic) if row.steps >= 16]
            cells = []
            for quantity in QUANTITIES:
                errors = [getattr(row, quantity) for row in points]
                cells += [f"{errors[-1]:.1e}", f"{slope([row.steps for row in points], errors):+.2f}"]
            lines.append([method, arithmetic.name, str(points[-1].steps), *cells])
    header = ["method", "arithmetic", "N", *(h for name in QUANTITIES.values() for h in (name, "slope"))]
    return markdown(header, lines, texts=2)


def draw(rows: list[Row], methods: list[str], curves: list[Arithmetic], path: Path) -> None:
    """Draws all errors against N: a column for each method and a row for each quantity, one row for one method."""
    if len(methods) == 1:
        figure = Figure(figsize=(13, 4.8), layout="constrained")
        panels = figure.subplots(1, len(QUANTITIES), sharey=True, squeeze=False).T
    else:
        figure = Figure(figsize=(4.4 * len(methods), 11), layout="constrained")
        panels = figure.subplots(len(QUANTITIES), len(methods), sharex=True, sharey="row", squeeze=False)
    u = unit_roundoff(torch.float32)
    for line, (quantity, label) in zip(panels, QUANTITIES.items(), strict=True):
        for axes, method in zip(line, methods, strict=True):
            for arithmetic in curves:
                points = curve(rows, method, arithmetic)
                steps = [row.steps for row in points]
                axes.loglog(
                    steps,
                    [getattr(row, quantity) for row in points],
                    arithmetic.style,
                    color=arithmetic.color,
                    markersize=4,
                    linewidth=1.2,
                    label=arithmetic.name,
                )
            n = torch.tensor([min(steps), math.sqrt(min(steps) * max(steps)), max(steps)])
            for values, at, name in (
                (unit_roundoff(torch.bfloat16) * n**0, 2, "u of bfloat16"),
                (unit_roundoff(torch.float16) * n**0, 2, "u of float16"),
                (u * n, 1, "N u of float32"),
                (u * n**0.5, 1, "sqrt(N) u of float32"),
            ):
                axes.plot(n, values, color="gray", linewidth=0.6)
                place = {"xytext": (-2, 3), "textcoords": "offset points", "ha": "right"}
                axes.annotate(name, (n[at], values[at]), fontsize=7, color="gray", **place)
            axes.set_ylim(bottom=1e-8)
            axes.grid(alpha=0.2)
            if quantity == "solution":
                axes.set_title(method)
        line[0].set_ylabel(f"relative error of {label}")
    for axes in panels.flat if len(methods) == 1 else panels[-1]:
        axes.set_xlabel("steps N")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=9)
    save(figure, path)


# The most steps of a rewritten loop, by what Dynamo's capture costs: about 0.03 s a step of Euler, 0.1 s one of RK4.
CAPTURED = {"Euler": 1024, "midpoint": 256, "RK4": 256}
CAPTURED_QUICK = {"Euler": 64, "RK4": 64}


def plan(curves: list[Arithmetic], captured: dict[str, int], finest: int) -> list[tuple[str, Arithmetic, int]]:
    """All runs as (method, arithmetic, steps), from few steps to many: by powers of two in eager, of four compiled."""
    found = []
    for method, most in captured.items():
        for arithmetic in curves:
            limit, factor = (finest, 2) if arithmetic.policy is None else (most, 4)
            steps = 4
            while steps <= limit:
                found.append((method, arithmetic, steps))
                steps *= factor
    return sorted(found, key=lambda job: job[2])


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description="Roundoff of Euler, midpoint and RK4 in mixed precision against the number of steps.",
        epilog="Writes roundoff.csv and roundoff.png to --out, and prints a Markdown table: the error at the finest "
        "grid of each curve, and the exponent of N. Every finished run is in the CSV at once; --resume goes on there.",
    )
    parser.add_argument("--quick", action="store_true", help="Euler and RK4, at most 64 steps compiled")
    parser.add_argument(
        "--methods",
        metavar="METHOD",
        nargs="+",
        choices=METHODS,
        default=list(METHODS),
        help="default all: %(choices)s",
    )
    parser.add_argument(
        "--accumulation",
        choices=["compensated", "plain"],
        default="compensated",
        help="plain leaves the compensated curve out, default %(default)s",
    )
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="of network and data, default %(default)s")
    parser.add_argument(
        "--compiler",
        choices=["inductor", "aot_eager"],
        default="aot_eager",
        help="what compiles the rewritten graph, default %(default)s",
    )
    out = Path("examples/out/roundoff")
    parser.add_argument("--out", metavar="DIR", type=Path, default=out, help="output folder, default %(default)s")
    parser.add_argument("--resume", action="store_true", help="keep the finished runs of the CSV in --out")
    parsed = parser.parse_args(arguments)
    if parsed.quick and set(parsed.methods) == {"midpoint"}:
        parser.error("--quick leaves the midpoint rule out: give another of --methods")
    return parsed


def main(arguments: list[str] | None = None) -> int:
    """Runs the example and returns its exit status."""
    options = parse_arguments(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "roundoff.csv"
    if not options.resume:
        path.unlink(missing_ok=True)
    torch.set_num_threads(1)  # on matrices this small, threads wait for each other

    captured, finest = (CAPTURED_QUICK, 256) if options.quick else (CAPTURED, 4096)
    captured = {method: most for method, most in captured.items() if method in options.methods}
    curves = [DISCRETISATION, *arithmetics(options.accumulation)]
    jobs = plan(curves, captured, finest)
    known = {(row.method, row.arithmetic, row.steps): row for row in read_rows(path) if row.seed == options.seed}
    bar = progress(len(jobs), "", "run")
    try:
        for method, arithmetic, steps in jobs:
            bar.set_description(f"{method}, {arithmetic.name}, {steps} steps")
            if (method, arithmetic.name, steps) not in known:
                row = run(Problem(method, options.seed), arithmetic, steps, options.compiler, finest)
                append_row(path, row)
                known[method, arithmetic.name, steps] = row
            bar.update()
    except KeyboardInterrupt:
        print(f"interrupted after {len(known)} of {len(jobs)} runs; continue with --resume from {path}")
        return 130  # as after SIGINT
    finally:
        bar.close()
    rows = [known[method, arithmetic.name, steps] for method, arithmetic, steps in jobs]
    print(table(rows, list(captured), curves))
    draw(rows, list(captured), curves, options.out / "roundoff.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
