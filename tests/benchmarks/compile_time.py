"""How the time to compile a training step grows with the number of steps.

python -m tests.benchmarks.compile_time [--dtype float16] [--compiler inductor] [--steps 8 128]

Every row is a process of its own with an empty cache. Dynamo's capture of the Python loop is apart from what follows
it: the rewrite, AOTAutograd and the compiler, of forward and backward.
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

import rampde_fx
from rampde_fx.backend import rampde_fx as backend
from tests.models import RK4


def measure(steps: int, dtype: str, compiler: str) -> tuple[float, float]:
    """Seconds in Dynamo, and seconds in rewrite and compiler, of the first training step."""
    spent = 0.0

    def timed(graph_module: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        nonlocal spent
        start = time.perf_counter()
        compiled = backend(graph_module, inputs, options={"compiler": compiler})
        spent += time.perf_counter() - start
        return compiled

    model = rampde_fx.mixed_precision(RK4(dim=16, width=64, layers=3), dtype=getattr(torch, dtype))
    y, t = torch.randn(64, 16), torch.linspace(0, 1, steps + 1)
    start = time.perf_counter()
    loss = torch.compile(model, backend=timed, fullgraph=True)(y, t).square().mean()
    forward = time.perf_counter() - start
    loss.backward()
    return forward - spent, spent


def main() -> None:
    """Print one row per number of steps, and the ratio to the first row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="float16", choices=["float16", "bfloat16", "float32"])
    parser.add_argument("--compiler", default="inductor", choices=["inductor", "aot_eager"])
    parser.add_argument("--steps", type=int, nargs="+", default=[8, 128])
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(*measure(options.steps[0], options.dtype, options.compiler))
        return
    print(f"{'steps':>6} {'Dynamo (s)':>11} {'rewrite and compile (s)':>24} {'ratio':>6}")
    first = 0.0
    for steps in options.steps:
        with tempfile.TemporaryDirectory() as cache:
            command = [sys.executable, "-m", "tests.benchmarks.compile_time", "--one", "--steps", str(steps)]
            command += ["--dtype", options.dtype, "--compiler", options.compiler]
            output = subprocess.run(
                command,
                env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache},
                check=True,
                capture_output=True,
                text=True,
            ).stdout
        dynamo, compiled = map(float, output.split())
        first = first or compiled
        print(f"{steps:6d} {dynamo:11.1f} {compiled:24.1f} {compiled / first:6.2f}", flush=True)


if __name__ == "__main__":
    main()
