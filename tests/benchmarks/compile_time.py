"""How the time to compile a training step grows with the number of steps.

python -m tests.benchmarks.compile_time [--loop odeint] [--dtype float16] [--compiler inductor] [--steps 8 1024]

Every row is a process of its own with an empty cache. Dynamo's capture is apart from what follows it: the rewrite,
AOTAutograd and the compiler, of forward and backward. Running what was compiled does not count.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import rampde_fx
from rampde_fx.backend import rampde_fx as backend
from tests.models import RK4, Velocity


class Odeint(nn.Module):
    """The same by odeint."""

    def __init__(self, **sizes: int) -> None:
        super().__init__()
        self.velocity = Velocity(**sizes)

    def forward(self, y: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return rampde_fx.odeint(self.velocity, y, t, method="rk4")[-1]


LOOPS = {"steps": RK4, "odeint": Odeint}


def measure(loop: str, steps: int, dtype: str, compiler: str) -> tuple[float, float]:
    """Seconds in Dynamo, and seconds in rewrite and compiler, of the first training step."""
    spent = called = 0.0

    def timed(graph_module: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        nonlocal spent
        start = time.perf_counter()
        compiled = backend(graph_module, inputs, options={"compiler": compiler})
        spent += time.perf_counter() - start

        def call(*args: Any) -> Any:
            nonlocal called
            called = time.perf_counter()
            return compiled(*args)

        return call

    model = rampde_fx.mixed_precision(LOOPS[loop](dim=16, width=64, layers=3), dtype=getattr(torch, dtype))
    y, t = torch.randn(64, 16), torch.linspace(0, 1, steps + 1)
    start = time.perf_counter()
    torch.compile(model, backend=timed, fullgraph=True)(y, t)
    return called - start - spent, spent


def main() -> None:
    """Print one row per number of steps, and the ratios to the first row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loop", default="steps", choices=list(LOOPS), help="for t, dt in steps(...), or odeint")
    parser.add_argument("--dtype", default="float16", choices=["float16", "bfloat16", "float32"])
    parser.add_argument("--compiler", default="inductor", choices=["inductor", "aot_eager"])
    parser.add_argument("--steps", type=int, nargs="+", default=[8, 128])
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(*measure(options.loop, options.steps[0], options.dtype, options.compiler))
        return
    print(f"{'steps':>6} {'Dynamo (s)':>11} {'rewrite and compile (s)':>24} {'ratio':>6} {'ratio of sums':>14}")
    first: tuple[float, float] | None = None
    for steps in options.steps:
        with tempfile.TemporaryDirectory() as cache:
            command = [sys.executable, "-m", "tests.benchmarks.compile_time", "--one", "--steps", str(steps)]
            command += ["--loop", options.loop, "--dtype", options.dtype, "--compiler", options.compiler]
            output = subprocess.run(
                command,
                env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache},
                check=True,
                capture_output=True,
                text=True,
            ).stdout
        dynamo, compiled = map(float, output.split())
        first = first or (compiled, dynamo + compiled)
        ratios = f"{compiled / first[0]:6.2f} {(dynamo + compiled) / first[1]:14.2f}"
        print(f"{steps:6d} {dynamo:11.1f} {compiled:24.1f} {ratios}", flush=True)


if __name__ == "__main__":
    main()
