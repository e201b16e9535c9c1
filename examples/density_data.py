"""Data sets of the density example: three planar distributions and the 8x8 digits of scikit-learn."""

import math
from collections.abc import Callable

import torch
from tabular_data import DIGITS_HELD_OUT, HELD_OUT_SEED, dequantise, shuffled_digits
from torch import Tensor

PLANAR_HELD_OUT = 2048
DIGITS_COMPONENTS = 16


def eight_gaussians(count: int, generator: torch.Generator) -> Tensor:
    """Eight round Gaussians of standard deviation 0.5 on a circle of radius 4, all divided by sqrt(2); (count, 2)."""
    angle = torch.randint(8, (count,), generator=generator) * (math.pi / 4)
    centre = 4 * torch.stack([angle.cos(), angle.sin()], dim=1)
    return (centre + 0.5 * torch.randn(count, 2, generator=generator)) / math.sqrt(2)


def two_spirals(count: int, generator: torch.Generator) -> Tensor:
    """Two interleaved spirals of one and a half turns with noise; (count, 2)."""
    angle = 3 * math.pi * torch.rand(count, generator=generator).sqrt()
    arm = torch.stack([-angle.cos() * angle, angle.sin() * angle], dim=1) + 0.5 * torch.rand(
        count, 2, generator=generator
    )
    sign = 2.0 * torch.randint(2, (count, 1), generator=generator) - 1
    return sign * arm / 3 + 0.1 * torch.randn(count, 2, generator=generator)


def checkerboard(count: int, generator: torch.Generator) -> Tensor:
    """Uniform on the eight black squares, of side 2, of a 4 x 4 board on [-4, 4]^2; (count, 2)."""
    column = torch.randint(4, (count,), generator=generator)
    row = 2 * torch.randint(2, (count,), generator=generator) + column % 2
    corner = torch.stack([column, row], dim=1)
    return 2 * (corner + torch.rand(count, 2, generator=generator)) - 4


PLANAR: dict[str, Callable[[int, torch.Generator], Tensor]] = {
    "8gaussians": eight_gaussians,
    "2spirals": two_spirals,
    "checkerboard": checkerboard,
}
NAMES = (*PLANAR, "digits")


class Planar:
    """A distribution in the plane.

    Attributes:
        name: Its key in ``PLANAR``.
        dim: 2.
        held_out: (2048, 2), the same for every seed.
    """

    dim = 2

    def __init__(self, name: str) -> None:
        self.name = name
        self.held_out = self.sample(PLANAR_HELD_OUT, torch.Generator().manual_seed(HELD_OUT_SEED))

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Draws (count, 2) fresh points."""
        return PLANAR[self.name](count, generator)


class Digits:
    """The 8x8 digits, dequantised, standardised and projected on their leading principal components.

    A grey level d in 0..16 becomes (d + u) / 17 with u uniform on [0, 1). The principal components are those of the
    training images, scaled to unit variance, so the density is that of the whitened coordinates.

    Attributes:
        name: "digits".
        dim: Number of principal components.
        held_out: (297, dim), the same for every seed.
    """

    name = "digits"

    def __init__(self, dim: int = DIGITS_COMPONENTS) -> None:
        self.dim = dim
        generator = torch.Generator().manual_seed(HELD_OUT_SEED)
        levels, _ = shuffled_digits(generator)
        self._train = levels[DIGITS_HELD_OUT:]
        pixels = dequantise(self._train, generator)
        self._mean = pixels.mean(dim=0)  # (64,)
        variance, direction = torch.linalg.eigh(torch.cov(pixels.T))  # ascending
        self._scale = variance[-dim:].flip(0).sqrt()  # (dim,)
        self._direction = direction[:, -dim:].flip(1)  # (64, dim)
        self.held_out = self._project(dequantise(levels[:DIGITS_HELD_OUT], generator))

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Draws (count, dim) training points, with replacement and with fresh dequantisation noise."""
        chosen = torch.randint(len(self._train), (count,), generator=generator)
        return self._project(dequantise(self._train[chosen], generator))

    def to_images(self, points: Tensor) -> Tensor:
        """Maps points (count, dim) back to images (count, 8, 8) with grey levels in [0, 1]."""
        pixels = self._mean + (points * self._scale) @ self._direction.T
        return pixels.clamp(0, 1).view(-1, 8, 8)

    def _project(self, pixels: Tensor) -> Tensor:
        return (pixels - self._mean) @ self._direction / self._scale


def load(name: str) -> Planar | Digits:
    """Returns the data set called ``name``, one of ``NAMES``."""
    return Digits() if name == "digits" else Planar(name)
