"""The neural ODEs of the benchmarks. A model is written once; how it is solved is an argument."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

# solve(velocity, y, t): y at the last time, from y at the first. A ModuleList has a velocity for every step.
Solve = Callable[[nn.Module, torch.Tensor, torch.Tensor], torch.Tensor]


class DensityFlow(nn.Module):
    """A continuous normalizing flow of a three-layer tanh network of (z, t), with its exact log-density.

    The state is (z, l), of shape (batch, 3); l is the integral of the divergence.
    """

    def __init__(self, solve: Solve, width: int) -> None:
        super().__init__()
        self.solve, self.velocity = solve, DensityVelocity(width)

    def forward(self, y: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        y = self.solve(self.velocity, y, t)
        return (0.5 * y[:, :-1].square().sum(dim=1) - y[:, -1]).mean()


class DensityVelocity(nn.Module):
    """dz/dt and its divergence d2^T (W2 * (W1 W3)^T) d1, where d = 1 - h^2 are the derivatives of the tanh layers."""

    def __init__(self, width: int, dim: int = 2) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(dim + 1, width), nn.Linear(width, width), nn.Linear(width, dim)

    def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        z = torch.cat([y[:, :-1], t.expand(y.shape[0], 1)], dim=1)
        h1 = torch.tanh(self.first(z))
        h2 = torch.tanh(self.second(h1))
        middle = self.second.weight * (self.first.weight[:, :-1] @ self.last.weight).T
        trace = (F.linear(1 - h1 * h1, middle) * (1 - h2 * h2)).sum(dim=1, keepdim=True)
        return torch.cat([self.last(h2), trace], dim=1)


class PotentialFlow(nn.Module):
    """OT-Flow (Onken et al., arXiv 2006.00104): the velocity is minus the gradient of a potential.

    The state is (z, l, c, r), of shape (batch, dim + 3): l the log-determinant by the exact trace of the Hessian, c the
    transport cost, r the violation of the Hamilton-Jacobi-Bellman equation.
    """

    def __init__(self, solve: Solve, dim: int, width: int) -> None:
        super().__init__()
        self.solve, self.velocity = solve, PotentialVelocity(dim, width)

    def forward(self, y: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        y = self.solve(self.velocity, y, t)
        z, (log_det, cost, residual) = y[:, :-3], y[:, -3:].unbind(dim=1)
        return (0.5 * z.square().sum(dim=1) - log_det + cost + residual).mean()


class PotentialVelocity(nn.Module):
    """Of Phi(s) = w^T N(s) + s^T A^T A s / 2 + b^T s, s = (z, t), N a residual network with two layers.

    The activation is log(2 cosh x), whose derivative is tanh; h, the step of the second layer, is 1.
    """

    def __init__(self, dim: int, width: int, rank: int = 10) -> None:
        super().__init__()
        self.dim, own = dim, dim + 1
        self.open, self.layer = nn.Linear(own, width), nn.Linear(width, width)
        self.w = nn.Parameter(torch.ones(width) / width)
        self.a = nn.Parameter(torch.randn(min(rank, own), own) / math.sqrt(own))
        self.b = nn.Parameter(torch.zeros(own))

    def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        s = torch.cat([y[:, : self.dim], t.expand(y.shape[0], 1)], dim=1)
        x0 = self.open(s)
        d0 = torch.tanh(x0)
        u0 = x0.abs() + F.softplus(-2 * x0.abs())
        d1 = torch.tanh(self.layer(u0))
        k0, k1 = self.open.weight, self.layer.weight
        z1 = self.w + (d1 * self.w) @ k1
        gradient = (d0 * z1) @ k0 + s @ (self.a.T @ self.a) + self.b
        # The trace over the dimensions of z, layer by layer.
        own = k0[:, : self.dim]
        trace = ((1 - d0 * d0) * z1) @ own.square().sum(dim=1)
        jacobian = F.linear(d0[:, None, :] * own.T, k1)  # by one product: (batch, dim, width)
        trace = trace + ((1 - d1 * d1) * self.w * jacobian.square().sum(dim=1)).sum(dim=1)
        trace = trace + self.a[:, : self.dim].square().sum()
        speed, by_time = gradient[:, : self.dim], gradient[:, self.dim]
        cost = 0.5 * speed.square().sum(dim=1)
        extra = torch.stack([-trace, cost, (by_time - cost).abs()], dim=1)
        return torch.cat([-speed, extra], dim=1)


class ConvolutionalClassifier(nn.Module):
    """A stem, three ODE blocks with weights of their own for each step, and a head; batches of images."""

    def __init__(self, solve: Solve, width: int, steps: int, classes: int = 10) -> None:
        super().__init__()
        self.solve = solve
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.InstanceNorm2d(width, affine=True), nn.ReLU())
        self.blocks = nn.ModuleList(
            nn.ModuleList(ConvolutionalVelocity(width << i) for _ in range(steps)) for i in range(3)
        )
        self.between = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width << i, width << (i + 1), 1), nn.AvgPool2d(2)) for i in range(2)
        )
        self.head = nn.Linear(width << 2, classes)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        y = self.stem(x)
        for block, between in zip(self.blocks, [*self.between, nn.Identity()], strict=True):
            y = between(self.solve(block, y, t))
        logits = self.head(torch.relu(y).mean(dim=(2, 3)))  # the mean of a velocity alone is nearly zero
        return F.cross_entropy(logits, torch.arange(x.shape[0], device=x.device) % logits.shape[1])


class ConvolutionalVelocity(nn.Module):
    """-K^T norm(relu(K y + b)): antisymmetric, hence stable (Ruthotto and Haber, arXiv 1804.04272)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(width, width, 3, padding=1), nn.InstanceNorm2d(width)

    def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return -F.conv_transpose2d(self.norm(torch.relu(self.conv(y))), self.conv.weight, padding=1)


class AttentionFlow(nn.Module):
    """A transformer layer as velocity, on sequences: (batch, length, width)."""

    def __init__(self, solve: Solve, width: int, heads: int) -> None:
        super().__init__()
        self.solve, self.velocity = solve, AttentionVelocity(width, heads)

    def forward(self, y: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.solve(self.velocity, y, t).square().mean()


class AttentionVelocity(nn.Module):
    """Attention plus a two-layer perceptron, each behind a LayerNorm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.after = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        q, k, v = (x.unflatten(2, (self.heads, -1)).transpose(1, 2) for x in self.qkv(self.before(y)).chunk(3, dim=2))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.out(mixed) + self.down(F.gelu(self.up(self.after(y))))


@dataclass(frozen=True)
class Case:
    """A neural ODE of given sizes, with its data.

    Attributes:
        name: Short.
        model: Maps solve and `sizes` to a Module, which maps the data and the time grid to a loss.
        shape: Of the data.
        steps: Of RK4.
        sizes: Further arguments of the model.
        end: The last time; the first is 0.
    """

    name: str
    model: Callable[..., nn.Module]
    shape: tuple[int, ...]
    steps: int
    sizes: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    end: float = 1.0

    def build(self, solve: Solve, device: torch.device) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
        """Model, data and time grid, from one seed."""
        torch.manual_seed(0)
        model, x = self.model(solve, **self.sizes), torch.randn(self.shape)
        if isinstance(model, (DensityFlow, PotentialFlow)):  # what is integrated along begins at zero
            x[:, -1 if isinstance(model, DensityFlow) else -3 :] = 0
        return model.to(device), x.to(device), torch.linspace(0, self.end, self.steps + 1, device=device)

    def what(self) -> str:
        """The sizes in words."""
        sizes = ", ".join(f"{name} {value}" for name, value in self.sizes.items() if name != "steps")
        until = "" if self.end == 1 else f" to t = {self.end:g}"
        return f"{sizes}, data {' x '.join(map(str, self.shape))}, {self.steps} RK4 steps{until}"

    @property
    def per_step(self) -> bool:
        """Whether every step has weights of its own."""
        return "steps" in self.sizes


def _density(name: str, width: int, batch: int, steps: int) -> Case:
    return Case(name, DensityFlow, (batch, 3), steps, {"width": width})


def _potential(name: str, dim: int, width: int, batch: int, steps: int) -> Case:
    return Case(name, PotentialFlow, (batch, dim + 3), steps, {"dim": dim, "width": width})


def _convolutional(name: str, width: int, size: int, batch: int, steps: int = 4) -> Case:
    """Four steps to t = 1 do not resolve it: gradients of two methods would differ by more than their size."""
    sizes = {"width": width, "steps": steps}
    return Case(name, ConvolutionalClassifier, (batch, 3, size, size), steps, sizes, end=1 / 32)


def _attention(name: str, width: int, heads: int, length: int, batch: int, steps: int) -> Case:
    return Case(name, AttentionFlow, (batch, length, width), steps, {"width": width, "heads": heads})


FULL = (
    _density("cnf", width=128, batch=1024, steps=128),
    *(_density(f"cnf-{width}", width=width, batch=512, steps=16) for width in (512, 1024)),
    *(
        _potential(f"otflow-{width}-{batch}", dim=63, width=width, batch=batch, steps=16)
        for width in (512, 1024)
        for batch in (512, 4096)
    ),
    *(_convolutional(f"conv-{width}", width=width, size=128, batch=16) for width in (64, 128)),
    _attention("attention", width=512, heads=8, length=256, batch=8, steps=16),
)
QUICK = (
    _density("cnf", width=64, batch=128, steps=16),
    _potential("otflow", dim=8, width=64, batch=64, steps=8),
    _convolutional("conv", width=8, size=16, batch=4),
    _attention("attention", width=32, heads=4, length=32, batch=4, steps=8),
)
# One flow where operations are small, and where products rule.
README = (
    _density("cnf-64", width=64, batch=128, steps=16),
    _density("cnf-512", width=512, batch=512, steps=16),
)


def resized(case: Case, *, steps: int | None = None, batch: int | None = None, width: int | None = None) -> Case:
    """The case with other sizes."""
    sizes: dict[str, Any] = dict(case.sizes)
    if width is not None:
        sizes["width"] = width
    shape = case.shape if batch is None else (batch, *case.shape[1:])
    return replace(case, steps=case.steps if steps is None else steps, shape=shape, sizes=sizes)
