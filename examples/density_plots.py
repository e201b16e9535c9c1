"""Pictures of the density example."""

from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

EXTENT = 4.5
GRID_POINTS = 120
PLANAR_POINTS = 4000
DIGITS_SHOWN = 64


def grid() -> Tensor:
    """The points at which a planar density is drawn, (GRID_POINTS^2, 2), row by row from the lower left."""
    axis = torch.linspace(-EXTENT, EXTENT, GRID_POINTS)
    return torch.cartesian_prod(axis, axis).flip(1)


def planar(real: Tensor, samples: Tensor, density: Tensor, path: Path) -> None:
    """Draws data (count, 2), samples of the flow (count, 2) and its density on the grid (GRID_POINTS^2,)."""
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for axes, title, points in ((left, "data", real), (middle, "samples of the flow", samples)):
        axes.scatter(points[:, 0], points[:, 1], s=1.5, linewidths=0, alpha=0.6)
        axes.set_title(title)
    extent = (-EXTENT, EXTENT, -EXTENT, EXTENT)
    image = right.imshow(density.view(GRID_POINTS, GRID_POINTS).numpy(), origin="lower", extent=extent)
    right.set_title("learned density")
    figure.colorbar(image, ax=right, shrink=0.8)
    for axes in (left, middle, right):
        axes.set(xlim=extent[:2], ylim=extent[2:], aspect="equal")
    figure.savefig(path, dpi=120)


def digits(real: Tensor, samples: Tensor, path: Path, title: str = "data on the principal components") -> None:
    """Draws data, under its title, and samples of the flow, both (DIGITS_SHOWN, 8, 8), in two square mosaics."""
    figure = Figure(figsize=(10, 5.4), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, name, images in zip(panels, (title, "samples of the flow"), (real, samples), strict=True):
        framed = torch.nn.functional.pad(images, (1, 1, 1, 1))
        side = round(len(images) ** 0.5)
        mosaic = framed.view(side, side, 10, 10).transpose(1, 2).reshape(10 * side, 10 * side)
        axes.imshow(mosaic.numpy(), cmap="gray", vmin=0, vmax=1)
        axes.set_title(name)
        axes.set_axis_off()
    figure.savefig(path, dpi=120, bbox_inches="tight", pad_inches=0.2)
