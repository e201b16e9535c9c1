"""How the time to compile a training step grows with the number of steps.

python -m tests.benchmarks.compile_time [--loop odeint] [--policy float16] [--compiler inductor] [--steps 8 1024]

Every row is a process of its own with empty caches, and a second one that finds what the first one left there.
Dynamo's capture is apart from what follows it: the rewrite, AOTAutograd and the compiler, of forward and backward.
Running what was compiled does not count. Nodes are those of the captured graph, and of the rewritten one with all its
submodules. --loop network is no loop: torch.compile alone, of one evaluation of the velocity, for comparison.
"""

from __future__ import annotations

import argparse
import functools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch._dynamo import lookup_backend

import rampde_fx
from rampde_fx import PrecisionPolicy
from rampde_fx.backend import rampde_fx as backend
from tests.models import RK4, Velocity


class Odeint(nn.Module):
    """The same by odeint."""

    def __init__(self, **sizes: int) -> None:
        super().__init__()
        self.velocity = Velocity(**sizes)

    def forward(self, y: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return rampde_fx.odeint(self.velocity, y, t, method="rk4")[-1]


class Network(Odeint):
    """One evaluation."""

    def forward(self, y: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.velocity(t[0], y)


LOOPS = {"steps": RK4, "odeint": Odeint, "network": Network}


def measure(loop: str, steps: int, policy: PrecisionPolicy, compiler: str) -> tuple[float, ...]:
    """Seconds in Dynamo, seconds in rewrite and compiler, and nodes before and after, of the first training step."""
    spent = called = 0.0
    nodes: list[int] = []
    of_torch = loop == "network"
    compile_by = lookup_backend(compiler) if of_torch else functools.partial(backend, options={"compiler": compiler})

    @functools.wraps(backend)
    def timed(graph_module: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        nonlocal spent
        nodes.append(_nodes(graph_module))
        start = time.perf_counter()
        compiled = compile_by(graph_module, inputs)
        spent += time.perf_counter() - start
        nodes.append(_nodes(graph_module))

        def call(*args: Any) -> Any:
            nonlocal called
            called = time.perf_counter()
            return compiled(*args)

        return call

    model = LOOPS[loop](dim=16, width=64, layers=3)
    model = model if of_torch else rampde_fx.mixed_precision(model, policy=policy)
    function = torch.compile(model, backend=timed, fullgraph=True)
    y, t = torch.randn(64, 16), torch.linspace(0, 1, steps + 1)
    start = time.perf_counter()
    out = function(y, t)
    captured = called - start - spent
    backward = [_backward_seconds(out), _backward_seconds(function(y, t))]  # the first one compiles
    return captured, spent + max(backward[0] - backward[1], 0.0), *nodes


def _nodes(graph_module: torch.fx.GraphModule) -> int:
    return sum(len(part.graph.nodes) for part in graph_module.modules() if isinstance(part, torch.fx.GraphModule))


def _backward_seconds(out: torch.Tensor) -> float:
    start = time.perf_counter()
    out.square().mean().backward()
    return time.perf_counter() - start


def in_a_process(options: argparse.Namespace, steps: int, cache: str) -> tuple[float, ...]:
    """The same, in a process that keeps its caches in a folder."""
    command = [sys.executable, "-m", "tests.benchmarks.compile_time", "--one", "--steps", str(steps)]
    command += ["--loop", options.loop, "--policy", str(options.policy), "--compiler", options.compiler]
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache, "TMPDIR": cache}  # compiled headers are there
    output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    return tuple(map(float, output.split()))


def main() -> None:
    """Print one row per number of steps, as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loop", default="steps", choices=list(LOOPS), help="for t, dt in steps(...); odeint; none")
    parser.add_argument("--policy", default="float16", type=PrecisionPolicy.parse, help='such as "bfloat16, loop=scan"')
    parser.add_argument("--compiler", default="inductor", choices=["inductor", "aot_eager"])
    parser.add_argument("--steps", type=int, nargs="+", default=[8, 128])
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(*measure(options.loop, options.steps[0], options.policy, options.compiler))
        return
    titles = (
        "steps|nodes captured|nodes rewritten|capture (s)|rewrite and compile (s)|sum, to the first row|both cached (s)"
    )
    print(f"| {titles.replace('|', ' | ')} |\n{'|--:' * (titles.count('|') + 1)}|")
    first = 0.0
    for steps in options.steps:
        with tempfile.TemporaryDirectory() as cache:
            cold, warm = (in_a_process(options, steps, cache) for _ in range(2))
        seconds = sum(cold[:2])
        first = first or seconds
        counts = (f"{cold[2]:.0f}", f"{cold[3]:.0f}")
        row = (*counts, f"{cold[0]:.1f}", f"{cold[1]:.1f}", f"{seconds / first:.2f}", f"{sum(warm[:2]):.1f}")
        print(f"| {steps:,} | {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
