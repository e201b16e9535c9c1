"""OT-Flow: a continuous normalizing flow along the gradient of a potential, in mixed precision by rampde_fx.

A point x at data time 0 is carried to base time 1 by dx/dt = v = -grad Phi(x, t), together with the integrals

    l = integral of tr(dv/dx) = -tr(Hessian of Phi),       the log-determinant,
    L = integral of |grad Phi|^2 / 2,                      the transport cost,
    R = integral of |d_t Phi - |grad Phi|^2 / 2|,          the violation of the Hamilton-Jacobi-Bellman equation,

and training minimises alpha_C C + L + alpha_R R, C the negative log-density with a standard normal base at time 1. The
optimal transport is along the gradient of a potential that satisfies the equation, in straight lines, which few steps
integrate well. Integrated from 1 to 0, the flow turns normal points into samples.
Source: Onken, Wu Fung, Li and Ruthotto, OT-Flow, 2021, arXiv 2006.00104; in mixed precision: arXiv 2510.23498.
"""

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import mmd
import potential_plots
import tabular_data
import torch
import training
import training_options
from common import positive
from torch import Tensor, nn
from torch.nn.functional import linear, softplus
from training_results import Metric

import rampde_fx

# Samples drawn for the maximum mean discrepancy, and training or held-out rows at most for it.
SAMPLES = 1200


def antiderivative_of_tanh(x: Tensor) -> Tensor:
    """sigma(x) = |x| + log(1 + exp(-2 |x|)) = log(2 cosh x)."""
    return x.abs() + softplus(-2 * x.abs())


class Potential(nn.Module):
    """Phi(x, t) = w^T N(s) + |A s|^2 / 2 + b^T s with s = (x, t), N a residual network; a constant would move nothing.

        u_0 = sigma(K_0 s + b_0),   u_i = u_{i-1} + h sigma(K_i u_{i-1} + b_i),   N(s) = u_M,   h = 1 / M.

    K_0, A and b are kept apart as their parts for x and for t: a product with K_0 s is one with x, and t enters as a
    shift. Derivatives are in closed form. With d_i = tanh of the i-th argument, sigma' = tanh and sigma'' = 1 - tanh^2,

        z_{M+1} = w,   z_i = z_{i+1} + h K_i^T (d_i z_{i+1}),   grad = K_0^T (d_0 z_1) + A^T A s + b,

    and the trace of the Hessian in x, with J_i = du_i/dx, is

        sum of (1 - d_0^2) z_1 |rows of K_0x|^2 + h sum_i (1 - d_i^2) z_{i+1} |rows of K_i J_{i-1}|^2 + |A_x|^2.

    Args:
        dim: Dimension of x.
        width: Width of the network.
        layers: M, the residual layers behind the first one.
        rank: Rows of A at most.
    """

    def __init__(self, dim: int, width: int, layers: int = 1, rank: int = 10) -> None:
        super().__init__()
        self.h = 1 / layers
        rank = min(rank, dim)
        self.first = nn.Linear(dim, width)
        self.first_by_time = nn.Parameter(torch.randn(width) / math.sqrt(dim))
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.w = nn.Parameter(torch.ones(width))
        self.a = nn.Parameter(torch.randn(rank, dim) / math.sqrt(rank * dim))
        self.a_by_time = nn.Parameter(torch.zeros(rank))
        self.b = nn.Parameter(torch.zeros(dim))
        self.b_by_time = nn.Parameter(torch.zeros(()))

    def value(self, t: Tensor, x: Tensor) -> Tensor:
        """Phi, (batch,), at x (batch, dim) and t 0-d. The flow itself needs the derivatives alone."""
        u = antiderivative_of_tanh(linear(x, self.first.weight, self.first.bias + t * self.first_by_time))
        for layer in self.layers:
            u = u + self.h * antiderivative_of_tanh(layer(u))
        s = linear(x, self.a, t * self.a_by_time)
        return u @ self.w + 0.5 * s.square().sum(dim=1) + x @ self.b + t * self.b_by_time

    def derivatives(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The derivatives of Phi at x (batch, dim) and t, 0-d.

        Returns:
            The gradient in x, (batch, dim); the derivative in t, (batch,); the trace of the Hessian in x, (batch,).
        """
        argument = linear(x, self.first.weight, self.first.bias + t * self.first_by_time)
        d0 = torch.tanh(argument)
        u = antiderivative_of_tanh(argument)
        jacobian = d0[:, None, :] * self.first.weight.T  # J^T of every point, (batch, dim, width)
        d, rows = [], []
        for layer in self.layers:
            argument = layer(u)
            d.append(torch.tanh(argument))
            # One product for the whole batch: of three dimensions torch may make a batch of products instead.
            product = linear(jacobian.flatten(0, 1), layer.weight).unflatten(0, jacobian.shape[:2])
            rows.append(product.square().sum(dim=1))
            if layer is not self.layers[-1]:
                u = u + self.h * antiderivative_of_tanh(argument)
                jacobian = jacobian + self.h * d[-1][:, None, :] * product
        z, trace = self.w, self.a.square().sum()
        for layer, d_i, rows_i in zip(reversed(self.layers), reversed(d), reversed(rows), strict=True):
            trace = trace + self.h * ((1 - d_i * d_i) * z * rows_i).sum(dim=1)
            z = z + self.h * ((d_i * z) @ layer.weight)
        trace = trace + ((1 - d0 * d0) * z) @ self.first.weight.square().sum(dim=1)
        z0 = d0 * z
        s = linear(x, self.a, t * self.a_by_time)
        gradient = z0 @ self.first.weight + s @ self.a + self.b
        by_time = z0 @ self.first_by_time + s @ self.a_by_time + self.b_by_time
        return gradient, by_time, trace


class PotentialFlow(nn.Module):
    """The flow of -grad Phi.

    Args:
        dim: Dimension of x.
        width: Width of the potential's network.
    """

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.potential = Potential(dim, width)

    def velocity(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """The right-hand sides at time t, 0-d: of x (batch, dim), and of the integrals l, L and R (batch, 3)."""
        gradient, by_time, trace = self.potential.derivatives(t, x)
        cost = 0.5 * gradient.square().sum(dim=1)
        return -gradient, torch.stack([-trace, cost, (by_time - cost).abs()], dim=1)

    def forward(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Integrates x (batch, dim) over the time grid t (steps + 1,), forward or backward in time, by RK4.

        Returns:
            x at the last time, and the integrals l, L and R, (batch, 3).
        """
        integrals = x.new_zeros(x.shape[0], 3)  # nothing depends on them: the backward re-reads x alone
        for t_i, dt in rampde_fx.steps(t):
            k1, q1 = self.velocity(t_i, x)
            k2, q2 = self.velocity(t_i + dt / 2, x + dt / 2 * k1)
            k3, q3 = self.velocity(t_i + dt / 2, x + dt / 2 * k2)
            k4, q4 = self.velocity(t_i + dt, x + dt * k3)
            x = x + dt / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
            integrals = integrals + dt / 6 * (q1 + 2 * q2 + 2 * q3 + q4)
        return x, integrals


# A PotentialFlow, compiled or not.
Integrate = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def terms(integrate: Integrate, points: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """C, L and R at points (batch, dim), each (batch,), with t (steps + 1,) from data time to base time; C in nats."""
    x, integrals = integrate(points, t)
    log_det, cost, residual = integrals.unbind(dim=1)
    return 0.5 * x.square().sum(dim=1) + 0.5 * x.shape[1] * math.log(2 * math.pi) - log_det, cost, residual


def negative_log_likelihood(integrate: Integrate, points: Tensor, t: Tensor, batch: int) -> float:
    """The mean of C over points (count, dim), in nats, by chunks of the size of the training batches."""
    total = 0.0
    for index, counts in training.chunks(len(points), batch, points.device):
        total += terms(integrate, points[index], t)[0].detach()[counts].sum().item()
    return total / len(points)


@torch.no_grad()
def draw(flow: PotentialFlow, base: Tensor, t: Tensor) -> Tensor:
    """Carries base points (count, dim) back along t (steps + 1,) to samples (count, dim)."""
    return flow(base, t.flip(0))[0]


class Transport(training.Workload):
    """The flow on one of the tables.

    Args:
        options: data, file, steps, width, alpha_c, alpha_r, batch, iterations and device of the command line.
    """

    loss_unit = "weighted sum"

    def __init__(self, options: argparse.Namespace) -> None:
        self.name = options.data
        self.check_every = max(1, options.iterations // 10)
        self.metrics = {
            "loss": Metric("held-out loss", "nats"),
            # Where this is much larger, the flow profits from the discretisation error; more steps mend that.
            "loss_fine": Metric("in fp32, 4 x the steps", "nats"),
            "validation": Metric("validation loss", "nats"),
            "mmd": Metric("squared MMD times 1000", "", digits=2),
        }
        self.table = tabular_data.load(options.data, options.file)
        self._options = options
        self._held_out = self.table.held_out.to(options.device)
        self._validation = self.table.validation.to(options.device)
        self._t = self._time_grid()
        self._bandwidths = mmd.bandwidths(self.table.held_out[:SAMPLES])

    def module(self) -> PotentialFlow:
        return PotentialFlow(self.table.dim, self._options.width)

    def sample(self, generator: torch.Generator) -> tuple[Tensor]:
        return (self.table.sample(self._options.batch, generator),)

    def loss(self, model: Integrate, points: Tensor) -> Tensor:
        likelihood, cost, residual = (term.mean() for term in terms(model, points, self._t))
        return self._options.alpha_c * likelihood + cost + self._options.alpha_r * residual

    def held_out(self, model: Integrate) -> dict[str, float]:
        batch = self._options.batch
        return {
            "loss": negative_log_likelihood(model, self._held_out, self._t, batch),
            "validation": negative_log_likelihood(model, self._validation, self._t, batch),
        }

    def held_out_plain(self, module: nn.Module) -> dict[str, float]:
        base = torch.randn(SAMPLES, self.table.dim, generator=torch.Generator().manual_seed(0))
        samples = draw(module, base.to(self._options.device), self._t).cpu()
        fine = negative_log_likelihood(module, self._held_out, self._time_grid(4), self._options.batch)
        return {"loss_fine": fine, "mmd": self._discrepancy(samples)}

    def draw(self, module: nn.Module, seed: int, path: Path) -> None:
        shown = potential_plots.DIGITS_SHOWN if self.name == "digits" else potential_plots.ROWS_SHOWN
        real = self.table.held_out[:shown]
        generator = torch.Generator().manual_seed(seed + 1)
        base = torch.randn(real.shape, generator=generator).to(self._options.device)
        samples = draw(module, base, self._t).cpu()
        if self.name == "digits":
            images = (self.table.restore(x).clamp(0, 1).view(-1, 8, 8) for x in (real, samples))
            potential_plots.digits(*images, path)
        else:
            train = self.table.sample(SAMPLES, generator)
            potential_plots.projection(train, real, samples, path)

    def notes(self) -> list[str]:
        """What to compare the results with."""
        table, generator = self.table, torch.Generator().manual_seed(0)
        normal = tabular_data.fitted_normal(table)
        loss = -normal.log_prob(table.held_out.double()).mean().item()
        base = torch.randn(SAMPLES, table.dim, generator=generator, dtype=torch.float64)
        samples = normal.mean + base @ normal.scale_tril.T
        chosen = torch.randperm(len(table.train), generator=generator)[:SAMPLES]
        train = table.points(table.train[chosen], generator)
        return [
            "Nothing is chosen by the held-out rows; the validation rows, others again, are there to choose by. The "
            "squared MMD measures how far samples of the flow are from held-out rows: smaller is better, and an "
            "estimate of a distance that is zero may lie below zero.",
            f"A normal distribution with mean and covariance of the training rows: held-out loss {loss:.4f} nats, "
            f"squared MMD times 1000 {self._discrepancy(samples):.2f}.",
            f"The training rows themselves: squared MMD times 1000 {self._discrepancy(train):.2f}.",
            f"Losses are those of standardised columns; add {table.own_unit():.4f} nats for the table's unit.",
        ]

    def _discrepancy(self, points: Tensor) -> float:
        """The squared MMD between points (count, dim) and the held-out rows, times 1000."""
        return 1000 * mmd.squared_mmd(points, self.table.held_out[:SAMPLES], self._bandwidths)

    def _time_grid(self, refinement: int = 1) -> Tensor:
        """From data time 0 to base time 1, (refinement * steps + 1,)."""
        return torch.linspace(0, 1, refinement * self._options.steps + 1, device=self._options.device)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = training_options.parser(
        "Train OT-Flow, a continuous normalizing flow along the gradient of a potential, in mixed precision: RK4, "
        "exact trace, Adam. Loss: alpha_C times the negative log-density, plus transport cost, plus alpha_R times the "
        "violation of the Hamilton-Jacobi-Bellman equation. There is no early stopping: see the validation loss.",
        out="examples/out/potential_flow",
        iterations=500,
        batch=64,
        lr=3e-2,
    )
    parser.add_argument("--data", choices=tabular_data.NAMES, default="digits", help="default %(default)s")
    parser.add_argument("--file", metavar="PATH", type=Path, help="BSDS300.hdf5, for --data bsds300")
    for option, number, what in (("--steps", 6, "RK4 steps"), ("--width", 96, "width of the potential's network")):
        parser.add_argument(option, metavar="N", type=positive, default=number, help=f"{what}, default %(default)s")
    for option, weight, what in (
        ("--alpha-c", 100.0, "the negative log-density"),
        ("--alpha-r", 5.0, "the violation of the equation"),
    ):
        parser.add_argument(
            option, metavar="WEIGHT", type=float, default=weight, help=f"weight of {what}, default %(default)s"
        )
    return training_options.parse(parser, arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the example and returns its exit status."""
    options = parse_arguments(arguments)
    return training.run(Transport(options), options)


if __name__ == "__main__":
    sys.exit(main())
