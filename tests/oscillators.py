"""Problems for adaptive steps, in float64."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

Problem = tuple[Callable[..., torch.Tensor], torch.Tensor, float]


def problems() -> dict[str, Problem]:
    """Velocity, initial state and end time."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(2, 50), nn.Tanh(), nn.Linear(50, 2)).double()
    rates = torch.tensor([1.0, 10.0, 100.0], dtype=torch.float64)
    states = [torch.tensor(values, dtype=torch.float64) for values in ([2.0, 0.0], [1.0, 1.0], [1.0, 1.0, 1.0])]
    return {
        "van der Pol": (lambda t, y: torch.stack([y[1], 5 * (1 - y[0] ** 2) * y[1] - y[0]]), states[0], 10.0),
        "Lotka-Volterra": (
            lambda t, y: torch.stack([1.5 * y[0] - y[0] * y[1], y[0] * y[1] - 3 * y[1]]),
            states[1],
            10.0,
        ),
        "stiff linear": (lambda t, y: -rates * y, states[2], 2.0),
        "spiral network": (lambda t, y: network(y**3), states[0], 10.0),
    }
