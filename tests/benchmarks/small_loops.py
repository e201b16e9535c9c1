"""A training step of small flows beside JAX and diffrax: Kutta's 3/8 rule on a three-layer network, in float32.

python -m venv build/jax && build/jax/bin/pip install jax diffrax
python -m tests.benchmarks.small_loops --jax build/jax/bin/python [--threads 1] [--sizes 16x128 64x128 128x256]

Each contender is a process of its own, which compiles with empty caches; then all train in turns. A row has the median
of the rounds, each a median of steps, and the median of the ratios to JAX's scan with remat, which recomputes each step
as rampde_fx does.
"""

from __future__ import annotations

import argparse
import operator
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

import rampde_fx

DIM, STEPS = 3, 8
PEER = Path(__file__).with_name("jax_peer.py")
BASELINE = "JAX, scan with remat"
THEIRS = (BASELINE, "JAX, scan", "diffrax, recursive checkpoints")
OURS = {"rampde_fx": {}, 'rampde_fx, checkpoint="none"': {"checkpoint": "none"}}
UNROLLED = "torch.compile, unrolled"


class Flow(nn.Module):
    """The same flow as that of jax_peer.py."""

    def __init__(self, width: int, *, unrolled: bool) -> None:
        super().__init__()
        self.unrolled = unrolled
        self.layers = nn.Sequential(
            nn.Linear(DIM + 1, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, DIM)
        )

    def velocity(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """A network of (y, t) with tanh."""
        found: torch.Tensor = self.layers(torch.cat([y, t.expand(y.shape[0], 1)], 1))
        return found

    def forward(self, y: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """The mean square of the end."""
        if not self.unrolled:
            return rampde_fx.odeint(self.velocity, y, t, method="rk4_38")[-1].square().mean()
        for i in range(STEPS):
            h = t[i + 1] - t[i]
            k1 = self.velocity(t[i], y)
            k2 = self.velocity(t[i] + h / 3, y + h * k1 / 3)
            k3 = self.velocity(t[i] + 2 * h / 3, y + h * (k2 - k1 / 3))
            k4 = self.velocity(t[i + 1], y + h * (k1 - k2 + k3))
            y = y + h * (k1 + 3 * (k2 + k3) + k4) / 8
        return y.square().mean()


def train(name: str, width: int, batch: int, threads: int) -> None:
    """One of torch's contenders: as jax_peer.py."""
    torch.set_num_threads(threads)
    model, y, t = Flow(width, unrolled=name == UNROLLED), torch.randn(batch, DIM), torch.linspace(0, 1, STEPS + 1)
    if name == UNROLLED:
        loss = torch.compile(model, fullgraph=True)
    else:
        policy = rampde_fx.PrecisionPolicy(velocity=torch.float32, loop="scan", **OURS[name])
        loss = torch.compile(rampde_fx.mixed_precision(model, policy=policy), backend="rampde_fx", fullgraph=True)

    def step() -> None:
        for parameter in model.parameters():
            parameter.grad = None
        loss(y, t).backward()

    begin = time.perf_counter()
    step()
    print(time.perf_counter() - begin, flush=True)
    for line in sys.stdin:
        # Of each step: the first ones after a pause may take fifty times as long, where a host takes memory back.
        ends = [time.perf_counter()]
        while len(ends) < 4 or ends[-1] - ends[0] < float(line):
            step()
            ends.append(time.perf_counter())
        print(statistics.median(map(operator.sub, ends[1:], ends)) * 1e3, flush=True)


class Contender:
    """A process that trains when told.

    Args:
        name: Of it.
        command: That starts it.
        threads: Of the processor that it may use.
    """

    def __init__(self, name: str, command: list[str], threads: int) -> None:
        self.name, self.found = name, list[float]()
        cores = sorted(os.sched_getaffinity(0))[:threads]
        self.cache = tempfile.TemporaryDirectory()
        self.process = subprocess.Popen(
            ["taskset", "-c", ",".join(map(str, cores)), *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": self.cache.name, "OMP_NUM_THREADS": str(threads)},
        )
        self.first = self.answer()

    def answer(self) -> float:
        """The next number that it prints."""
        assert self.process.stdout is not None
        if not (line := self.process.stdout.readline()):
            raise RuntimeError(f"{self.name} ended")
        return float(line)

    def turn(self, seconds: float) -> None:
        """Have it train."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{seconds}\n")
        self.process.stdin.flush()
        self.found.append(self.answer())

    def end(self) -> None:
        """Stop it."""
        self.process.kill()
        self.process.wait()
        self.cache.cleanup()


def measure(width: int, batch: int, options: argparse.Namespace) -> list[str]:
    """The rows of a size."""
    size = [str(width), str(batch)]
    commands = {name: [options.jax, str(PEER), name, *size, str(STEPS)] for name in THEIRS}
    ours = [sys.executable, "-m", "tests.benchmarks.small_loops", "--threads", str(options.threads), "--worker"]
    commands |= {name: [*ours, name, *size] for name in (*OURS, UNROLLED)}
    contenders = [Contender(name, command, options.threads) for name, command in commands.items()]
    for _ in range(options.rounds):
        for contender in contenders:
            contender.turn(options.turn)
    for contender in contenders:
        contender.end()
    base = contenders[0].found
    return [
        f"| {width} | {batch} | {c.name} | {statistics.median(c.found):.2f} "
        f"| {statistics.median(a / b for a, b in zip(c.found, base, strict=True)):.2f} | {c.first:.1f} |"
        for c in contenders
    ]


def main() -> None:
    """Measure all sizes, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jax", help="a Python that has jax and diffrax")
    parser.add_argument("--threads", type=int, default=1, help="default %(default)s")
    parser.add_argument("--sizes", nargs="+", default=["16x128", "64x128", "128x256"], metavar="WIDTHxBATCH")
    parser.add_argument("--rounds", type=int, default=7, help="default %(default)s")
    parser.add_argument("--turn", type=float, default=0.3, help="seconds, default %(default)s")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        train(options.worker[0], int(options.worker[1]), int(options.worker[2]), options.threads)
        return
    if not options.jax:
        parser.error("--jax: name a Python that has jax and diffrax")
    head = f"times {BASELINE}"
    print(f"| width | batch | contender | training step (ms) | {head} | first step (s) |\n|--:|--:|---|--:|--:|--:|")
    for size in options.sizes:
        print("\n".join(measure(*map(int, size.split("x")), options)), flush=True)


if __name__ == "__main__":
    main()
