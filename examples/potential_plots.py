"""Pictures of the potential-flow example."""

from pathlib import Path

import density_plots
import torch
from matplotlib.figure import Figure
from torch import Tensor

DIGITS_SHOWN = density_plots.DIGITS_SHOWN
ROWS_SHOWN = 400


def digits(real: Tensor, samples: Tensor, path: Path) -> None:
    """Draws held-out digits and samples of the flow, both (DIGITS_SHOWN, 8, 8) with grey levels in [0, 1]."""
    density_plots.digits(real, samples, path, title="held-out data")


def projection(train: Tensor, held_out: Tensor, samples: Tensor, path: Path) -> None:
    """Draws held-out rows and samples of the flow, both (count, dim).

    The axes are the leading principal components of training rows (many, dim).
    """
    direction = torch.linalg.svd(train - train.mean(dim=0), full_matrices=False).Vh
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    for axes, (i, j) in zip(figure.subplots(1, 2), ((0, 1), (2, 3)), strict=True):
        for name, rows, marker, color in (
            ("held-out data", held_out, "o", "C7"),
            ("samples of the flow", samples, "x", "C0"),
        ):
            points = (rows - train.mean(dim=0)) @ direction.T
            axes.scatter(points[:, i], points[:, j], s=14, marker=marker, color=color, linewidths=0.8, label=name)
        axes.set(xlabel=f"principal component {i + 1}", ylabel=f"principal component {j + 1}")
        axes.grid(alpha=0.2)
    axes.legend()
    figure.savefig(path, dpi=120)
