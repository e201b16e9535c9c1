"""Bytes and time of a training step for each choice of what the backward finds stored.

python -m tests.benchmarks.checkpointing [--steps 64] [--batch 256] [--width 128] [--budgets 48 96] [--repetitions 5]

A continuous normalizing flow (gradient_error.Flow: z and the integral of the exact divergence) by RK4 on equidistant
time points. The bytes are those of the distinct tensors that the compiled forward saves, parameters left out, by
torch.autograd.graph.saved_tensors_hooks, in float16 and in float32; the time is the median processor time of a forward
and a backward in float32, after the one that compiles.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.functional import pad
from tqdm import tqdm

import rampde_fx
from rampde_fx import MemoryBudget, PrecisionPolicy
from tests.benchmarks.gradient_error import Flow, eight_gaussians
from tests.benchmarks.measure import saved_bytes

MODES = ("step", "sqrt", 8, "none")
DTYPES = (torch.float16, torch.float32)


class Solved(nn.Module):
    """The flow, captured once whatever the number of steps."""

    def __init__(self, flow: Flow, policy: PrecisionPolicy) -> None:
        super().__init__()
        self.flow, self.policy = flow, policy

    def forward(self, y: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Integrates y (batch, dim + 1) over the time points t, to the last one."""
        end: torch.Tensor = rampde_fx.odeint(self.flow.velocity, y, t, method="rk4", policy=self.policy)[-1]
        return end


def medians(runs: list[Callable[[], torch.Tensor]], repetitions: int) -> list[float]:
    """Median processor times of a forward and a backward, in turns: a busy machine counts less, and for all."""
    found: list[list[float]] = [[] for _ in runs]
    for _ in range(repetitions):
        for times, run in zip(found, runs, strict=True):
            start = time.process_time()
            run().square().mean().backward()
            times.append(time.process_time() - start)
    return list(map(statistics.median, found))


def main() -> None:
    """Print one row per choice, as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for option, default, what in (
        ("--steps", 64, "steps of RK4"),
        ("--batch", 256, "points of the density"),
        ("--width", 128, "width of both hidden layers"),
        ("--repetitions", 5, "training steps of which the median is taken"),
    ):
        parser.add_argument(option, metavar="N", type=int, default=default, help=f"{what}, default %(default)s")
    parser.add_argument("--compiler", default="aot_eager", choices=["inductor", "aot_eager"])
    parser.add_argument(
        "--budgets", metavar="MIB", type=int, nargs="*", default=[], help="for activations, a row each, default none"
    )
    options = parser.parse_args()
    modes = [*MODES, *(MemoryBudget(max_bytes=budget * 2**20) for budget in options.budgets)]
    torch.set_num_threads(1)
    torch._dynamo.config.recompile_limit = len(DTYPES) * len(modes)  # one forward, compiled under each policy
    torch.manual_seed(0)
    y, t = pad(eight_gaussians(options.batch), (0, 1)), torch.linspace(0, 1, options.steps + 1)
    flow = Flow(options.width)
    runs: dict[tuple[torch.dtype, str | int | MemoryBudget], Callable[[], torch.Tensor]] = {}
    for dtype, mode in tqdm(list(itertools.product(DTYPES, modes)), unit="compilation", disable=None):
        model = Solved(flow, PrecisionPolicy(dtype, checkpoint=mode))
        compiled = torch.compile(model, backend="rampde_fx", options={"compiler": options.compiler}, fullgraph=True)
        runs[dtype, mode] = functools.partial(compiled, y, t)
        runs[dtype, mode]().square().mean().backward()
    times = medians([runs[torch.float32, mode] for mode in modes], options.repetitions)
    print(f"{options.steps} steps, batch {options.batch}, width {options.width}, compiler {options.compiler}\n")
    print("| checkpoint | bytes saved, float16 | float32 | training step, float32 (s) |")
    print("|---|--:|--:|--:|")
    for mode, seconds in zip(modes, times, strict=True):
        cells = [f"{saved_bytes(runs[dtype, mode], flow):,}" for dtype in DTYPES]
        print(f"| {mode} | {' | '.join(cells)} | {seconds:.2f} |")


if __name__ == "__main__":
    main()
