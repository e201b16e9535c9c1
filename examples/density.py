"""A continuous normalizing flow, trained in mixed precision by the rampde_fx backend.

A point z at data time 0 is carried to base time 1 by dz/dt = v(t, z), together with the divergence of v along its
path, by RK4. With a standard normal base the density is

    log p(z(0)) = log N(z(1); 0, I) + integral of tr(dv/dz) dt from 0 to 1,

and the flow is trained to maximise it. Integrated from 1 to 0, the same flow turns normal points into samples.
Source: Grathwohl et al., FFJORD, 2019, arXiv 1810.01367; here the divergence is exact.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import density_data
import density_plots
import torch
import training
import training_options
from common import positive
from torch import Tensor, nn
from torch.nn.functional import linear, pad
from training import Model
from training_results import Metric

import rampde_fx


class Flow(nn.Module):
    """The flow of an MLP velocity with two hidden tanh layers, v = W3 tanh(W2 tanh(W1 z + b1(t)) + b2(t)) + b3.

    Args:
        dim: Dimension of z.
        width: Width of both hidden layers.
    """

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.first = nn.Linear(dim, width)
        self.second = nn.Linear(width, width)
        self.last = nn.Linear(width, dim)
        # The time enters as a shift of the biases of the hidden layers.
        self.first_shift = nn.Parameter(torch.randn(width))
        self.second_shift = nn.Parameter(torch.randn(width))
        # v = 0: training starts at the identity.
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def velocity(self, t: Tensor, y: Tensor) -> Tensor:
        """The right-hand side: velocity and divergence.

        Args:
            t: Time, 0-d.
            y: State, (batch, dim + 1): z and the divergence accumulated so far, on which nothing depends.

        Returns:
            (batch, dim + 1): dz/dt and tr(dv/dz).
        """
        z = y[:, :-1]
        h1 = torch.tanh(linear(z, self.first.weight, self.first.bias + t * self.first_shift))
        h2 = torch.tanh(linear(h1, self.second.weight, self.second.bias + t * self.second_shift))
        # tr(W3 D2 W2 D1 W1) = d2^T (W2 * (W1 W3)^T) d1 with d = 1 - h^2 the diagonals of D: one matmul, no VJP.
        middle = self.second.weight * (self.first.weight @ self.last.weight).T
        trace = (linear(1 - h1 * h1, middle) * (1 - h2 * h2)).sum(dim=1, keepdim=True)
        return torch.cat([self.last(h2), trace], dim=1)

    def forward(self, y: Tensor, t: Tensor) -> Tensor:
        """Integrates y (batch, dim + 1) over the time grid t (steps + 1,), forward or backward in time, by RK4."""
        for t_i, dt in rampde_fx.steps(t):
            k1 = self.velocity(t_i, y)
            k2 = self.velocity(t_i + dt / 2, y + dt / 2 * k1)
            k3 = self.velocity(t_i + dt / 2, y + dt / 2 * k2)
            k4 = self.velocity(t_i + dt, y + dt * k3)
            y = y + dt / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        return y


def log_density(model: Model, points: Tensor, t: Tensor) -> Tensor:
    """Log-density in nats, (batch,), at points (batch, dim), with t (steps + 1,) from data time to base time."""
    y = model(pad(points, (0, 1)), t)
    z, divergence = y[:, :-1], y[:, -1]
    return divergence - 0.5 * (z * z).sum(dim=1) - 0.5 * z.shape[1] * math.log(2 * math.pi)


def held_out_loss(model: Model, points: Tensor, t: Tensor, batch: int) -> float:
    """Mean negative log-density of points (count, dim), in nats.

    The chunks have the size of the training batches, so that nothing more is compiled.
    """
    total = 0.0
    for index, counts in training.chunks(len(points), batch, points.device):
        total -= log_density(model, points[index], t).detach()[counts].sum().item()
    return total / len(points)


@torch.no_grad()
def draw(flow: Flow, base: Tensor, t: Tensor) -> Tensor:
    """Carries base points (count, dim) back along t (steps + 1,) to samples (count, dim)."""
    return flow(pad(base, (0, 1)), t.flip(0))[:, :-1]


class Density(training.Workload):
    """The flow on one of the data sets.

    Args:
        options: data, steps, width, batch and device of the command line.
    """

    loss_unit = "nats"

    def __init__(self, options: argparse.Namespace) -> None:
        self.name = options.data
        self.metrics = {
            "loss": Metric("held-out loss", "nats"),
            # Where this is much larger, the flow profits from the discretisation error; more steps or a lower
            # learning rate mend that.
            "loss_fine": Metric("in fp32, 4 x the steps", "nats"),
        }
        self.data = density_data.load(options.data)
        self._held_out = self.data.held_out.to(options.device)
        self._width, self._batch, self._steps, self._device = (
            options.width,
            options.batch,
            options.steps,
            options.device,
        )
        self._t = self._time_grid()

    def module(self) -> Flow:
        return Flow(self.data.dim, self._width)

    def sample(self, generator: torch.Generator) -> tuple[Tensor]:
        return (self.data.sample(self._batch, generator),)

    def loss(self, model: Model, points: Tensor) -> Tensor:
        return -log_density(model, points, self._t).mean()

    def held_out(self, model: Model) -> dict[str, float]:
        return {"loss": held_out_loss(model, self._held_out, self._t, self._batch)}

    def held_out_plain(self, module: nn.Module) -> dict[str, float]:
        return {"loss_fine": held_out_loss(module, self._held_out, self._time_grid(4), self._batch)}

    def draw(self, module: nn.Module, seed: int, path: Path) -> None:
        planar = isinstance(self.data, density_data.Planar)
        count = density_plots.PLANAR_POINTS if planar else density_plots.DIGITS_SHOWN
        generator = torch.Generator().manual_seed(seed + 1)
        real = self.data.sample(count, generator)
        samples = draw(module, torch.randn(count, self.data.dim, generator=generator).to(self._device), self._t).cpu()
        if planar:
            grid = density_plots.grid().to(self._device)
            log_p = torch.cat([log_density(module, chunk, self._t) for chunk in grid.split(8192)])
            density_plots.planar(real, samples, log_p.exp().cpu(), path)
        else:
            density_plots.digits(self.data.to_images(real), self.data.to_images(samples), path)

    def _time_grid(self, refinement: int = 1) -> Tensor:
        """From data time 0 to base time 1, (refinement * steps + 1,)."""
        return torch.linspace(0, 1, refinement * self._steps + 1, device=self._device)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = training_options.parser(
        "Train a continuous normalizing flow in mixed precision: RK4, exact divergence, Adam. The defaults suit "
        "8gaussians and digits; 2spirals and checkerboard need about --iterations 1500 --lr 0.005.",
        out="examples/out/density",
        iterations=250,
        batch=256,
        lr=2e-2,
    )
    parser.add_argument("--data", choices=density_data.NAMES, default="8gaussians", help="default %(default)s")
    for option, default, what in (("--steps", 8, "RK4 steps"), ("--width", 64, "width of both hidden layers")):
        parser.add_argument(option, metavar="N", type=positive, default=default, help=f"{what}, default %(default)s")
    return training_options.parse(parser, arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the example and returns its exit status."""
    options = parse_arguments(arguments)
    return training.run(Density(options), options)


if __name__ == "__main__":
    sys.exit(main())
