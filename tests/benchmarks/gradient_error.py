"""Gradient errors and stored bytes of the precision policies, on the flow of a density at initialisation.

python -m tests.benchmarks.gradient_error [--points 32] [--batch 1024] [--width 128] [--compiler eager]

A continuous normalizing flow on 8 gaussians: a three-layer tanh network of (z, t), exact divergence, RK4 on equidistant
time points, the mean negative log-density as loss. Every row is compared with eager float64 from the same parameters,
points and times, in the Euclidean norm over all parameters together, and over the initial state y0. The bytes are what
the loop stores for its backward (rampde_fx.explain on the first steps, times the number of steps). The default of 32
time points takes some minutes on two cores without float16 arithmetic; the paper's problem has 128.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.functional import pad
from tqdm import tqdm

import rampde_fx
from rampde_fx import PrecisionPolicy
from tests.benchmarks.cases import DensityVelocity
from tests.benchmarks.contenders import solve_by_loop

HALF, BRAIN, SINGLE, BYTE = torch.float16, torch.bfloat16, torch.float32, torch.float8_e4m3fn
POLICIES = (
    PrecisionPolicy(SINGLE),
    PrecisionPolicy(HALF),
    PrecisionPolicy(BRAIN),
    PrecisionPolicy(HALF, storage=BYTE),
    PrecisionPolicy(BRAIN, storage=BYTE),
    PrecisionPolicy(HALF, accumulation="compensated"),
    PrecisionPolicy(HALF, storage=SINGLE),
)
REPORTED = 2  # steps that are enough to report on


class Flow(nn.Module):
    """z and the integral of the divergence of its velocity, by RK4."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.velocity = DensityVelocity(width)

    def forward(self, y: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Integrates y (batch, dim + 1) over the time points t."""
        return solve_by_loop(self.velocity, y, t)


def eight_gaussians(count: int) -> torch.Tensor:
    """Points (count, 2) on a circle of radius 2 2^(1/2), as in FFJORD, arXiv 1810.01367."""
    angle = torch.randint(8, (count,)) * math.pi / 4
    return (4 * torch.stack([angle.cos(), angle.sin()], dim=1) + 0.5 * torch.randn(count, 2)) / 2**0.5


def gradients(
    model: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], flow: Flow, y: torch.Tensor, t: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of the loss with respect to all parameters, flat, and to y0, both in float64."""
    y = y.clone().requires_grad_()
    out = model(y, t)
    z, divergence = out[:, :-1], out[:, -1]
    loss = (0.5 * (z * z).sum(dim=1) - divergence).mean()  # less a constant
    of_y, *of_parameters = torch.autograd.grad(loss, [y, *flow.parameters()])
    return torch.cat([g.double().flatten() for g in of_parameters]), of_y.double()


def main() -> None:
    """Print one row per policy, as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for option, default, what in (
        ("--points", 32, "time points"),
        ("--batch", 1024, "points of the density"),
        ("--width", 128, "width of both hidden layers"),
        ("--seed", 0, "of parameters and points"),
    ):
        parser.add_argument(option, metavar="N", type=int, default=default, help=f"{what}, default %(default)s")
    parser.add_argument("--compiler", default="eager", choices=["inductor", "aot_eager", "eager"])
    options = parser.parse_args()
    if options.points <= REPORTED:
        parser.error(f"--points must be more than {REPORTED}")
    torch.set_num_threads(1)  # float16 products of this size are slower with more
    torch.manual_seed(options.seed)
    flow, y = Flow(options.width), pad(eight_gaussians(options.batch), (0, 1))
    t = torch.linspace(0, 1, options.points)

    double = copy.deepcopy(flow).double()
    exact = gradients(double, double, y.double(), t.double())
    rows = {"float32, eager": [*errors(gradients(flow, flow, y, t), exact), "", ""]}
    progress = tqdm(POLICIES, unit="policy", disable=None)
    for policy in progress:
        name = str(policy)
        progress.set_description(name)
        torch.compiler.reset()
        own = rampde_fx.mixed_precision(copy.deepcopy(flow), policy=policy)
        model = torch.compile(own, backend="rampde_fx", options={"compiler": options.compiler}, fullgraph=True)
        (loop,) = rampde_fx.explain(own, y.clone().requires_grad_(), t[: REPORTED + 1]).loops
        rampde_fx.backward_counts(reset=True)
        found = errors(gradients(model, own, y, t), exact)
        repeated = sum(count.repeated for count in rampde_fx.backward_counts().values())
        progress.write(f"{name}: {', '.join(found)}", file=sys.stderr)  # a row is not lost to an interrupt
        rows[name] = [*found, f"{loop.stored_bytes // REPORTED * (options.points - 1):,}", str(repeated)]
        rows["float32, eager"][2] = f"{loop.stored_bytes_autograd // REPORTED * (options.points - 1):,}"
    print(f"{options.points} points, batch {options.batch}, width {options.width}, compiler {options.compiler}\n")
    print("| policy | gradient of the parameters | of y0 | bytes stored | backward passes repeated |")
    print("|---|--:|--:|--:|--:|")
    for name, cells in rows.items():
        print(f"| {name} | {' | '.join(cells)} |")


def errors(found: tuple[torch.Tensor, ...], exact: tuple[torch.Tensor, ...]) -> list[str]:
    """Relative errors in the Euclidean norm."""
    return [f"{((f - e).norm() / e.norm()).item():.1e}" for f, e in zip(found, exact, strict=True)]


if __name__ == "__main__":
    main()
