"""What a monitor records of one backward pass through one loop."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class AdjointRecord:
    """One backward pass through one loop of N steps with V velocity VJPs each.

    Tensors are on the CPU, of shape (N, V), in the order of the forward: steps from the first on, evaluations within a
    step as it makes them. They describe the last run of the reverse loop.

    Attributes:
        loop: The file and line of the loop's head, numbered where one graph holds several loops of that line.
        training_step: How many steps optimizers had taken since the monitor was opened.
        runs: How often the reverse loop ran: more than once after an overflow.
        scales: The factor of the cotangent, a power of two, float32; 1 where the policy does not scale.
        largest: The largest magnitude in the cotangent before it was scaled, float32.
        smallest: The smallest magnitude but zero in it, float32; inf where all entries are zero.
        underflows: How many entries of the cotangent became zero in the velocity dtype, scaled as they are; int64.
        overflows: How many entries of the gradients that the VJP returned are not finite, int64.
    """

    loop: str
    training_step: int
    runs: int
    scales: torch.Tensor
    largest: torch.Tensor
    smallest: torch.Tensor
    underflows: torch.Tensor
    overflows: torch.Tensor
