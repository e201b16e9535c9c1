"""How often adaptive solves evaluate the velocity, beside torchdiffeq's, and how far both end from the solution.

python -m tests.benchmarks.evaluations [--methods dopri5 bosh3] [--outputs 2 101 1001]

Needs torchdiffeq (pip install torchdiffeq). Four problems in float64, from 0 to the end time: van der Pol's oscillator,
Lotka and Volterra's predators, a stiff linear system, and a network of width 50 on the cubes of two states. atol is a
hundredth of rtol. The error is that of the last state, relative to dopri8 at a tolerance of 1e-12.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable

import torch

import rampde_fx
from tests.benchmarks.tables import markdown
from tests.oscillators import Problem, problems

TOLERANCES = (1e-3, 1e-6, 1e-9)


def counted(
    solver: Callable[..., torch.Tensor], problem: Problem, outputs: int, rtol: float, method: str
) -> tuple[int, torch.Tensor]:
    """Evaluations of a solve, and its last state."""
    velocity, y0, end = problem
    count = 0

    def counting(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        nonlocal count
        count += 1
        return velocity(t, y)

    t = torch.linspace(0, end, outputs, dtype=torch.float64)
    last = solver(counting, y0, t, rtol=rtol, atol=rtol / 100, method=method)[-1]
    return count, last


def main() -> None:
    """Print one row for each problem, method, tolerance and number of outputs, as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=["dopri5"], choices=["bosh3", "dopri5"])
    parser.add_argument("--outputs", type=int, nargs="+", default=[2, 101, 1001])
    options = parser.parse_args()
    try:
        import torchdiffeq
    except ImportError:
        sys.exit("this comparison needs torchdiffeq: pip install torchdiffeq")

    rows = []
    for (name, problem), method in itertools.product(problems().items(), options.methods):
        velocity, y0, end = problem
        t = torch.tensor([0.0, end], dtype=torch.float64)
        exact = torchdiffeq.odeint(velocity, y0, t, rtol=1e-12, atol=1e-14, method="dopri8")[-1]
        for rtol, outputs in itertools.product(TOLERANCES, options.outputs):
            solvers = (torchdiffeq.odeint, rampde_fx.odeint)
            found = [counted(solver, problem, outputs, rtol, method) for solver in solvers]
            counts = [count for count, _ in found]
            errors = [f"{((last - exact).norm() / exact.norm()).item():.0e}" for _, last in found]
            row = [name, method, f"{rtol:.0e}", f"{outputs:,}", *(f"{count:,}" for count in counts)]
            rows.append([*row, f"{counts[1] / counts[0]:.2f}", *errors])
    titles = ["problem", "method", "rtol", "outputs", "torchdiffeq", "rampde_fx", "ratio"]
    print(markdown([*titles, "error of torchdiffeq", "error of rampde_fx"], rows))


if __name__ == "__main__":
    with torch.no_grad():
        main()
