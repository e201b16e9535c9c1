"""Initial value problems with known solutions, on which torchdiffeq tests its solvers, and a cubic spiral."""

from __future__ import annotations

import math

import torch
from torch import nn


class Constant(nn.Module):
    """y' = a + (y - (a t + b))^5, a solution being the line a t + b."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.tensor(0.2)), nn.Parameter(torch.tensor(3.0))

    def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.a + (y - self.solution(t)) ** 5

    def solution(self, t: torch.Tensor) -> torch.Tensor:
        return self.a * t + self.b


class Sine(nn.Module):
    """y' = 2 y / t + t^4 sin 2t - t^2 + 4 t^3."""

    def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return 2 * y / t + t**4 * torch.sin(2 * t) - t**2 + 4 * t**3

    def solution(self, t: torch.Tensor) -> torch.Tensor:
        waves = t**2 * (torch.cos(2 * t) * (0.25 - t**2 / 2) + torch.sin(2 * t) * t / 2)
        return waves + 2 * t**4 - t**3 + (math.pi - 0.25) * t**2


class Linear(nn.Module):
    """y' = A y with y(0) = (1, ..., 1) and A skew, so that y turns and keeps its norm."""

    def __init__(self, dim: int = 10) -> None:
        super().__init__()
        u = 0.1 * torch.randn(dim, dim, generator=torch.Generator().manual_seed(0))
        self.matrix = nn.Parameter(u - u.T)

    def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.matrix @ y

    def solution(self, t: torch.Tensor) -> torch.Tensor:
        return torch.linalg.matrix_exp(t[:, None, None] * self.matrix).sum(dim=2)


class Exp(nn.Module):
    """y' = -exp(-t / 10) / 10."""

    def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return -0.1 * self.solution(t)

    def solution(self, t: torch.Tensor) -> torch.Tensor:
        return torch.exp(-0.1 * t)


class Spiral(nn.Module):
    """y' = y^3 A, turning fast at first, slower as it shrinks."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.tensor([[-0.1, 2.0], [-2.0, -0.1]]))

    def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return y**3 @ self.matrix


PROBLEMS = {"constant": Constant, "sine": Sine, "linear": Linear, "exp": Exp}


def times(backward: bool = False, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """The times at which torchdiffeq's tests ask for the solution."""
    t = torch.linspace(1, 8, 10, dtype=dtype)
    return t.flip(0) if backward else t


def exact(problem: nn.Module, t: torch.Tensor) -> torch.Tensor:
    """The problem's solution at every t, in t's dtype."""
    with torch.no_grad():
        return problem.solution(t)
