"""Tables of real numbers: the digits and breast_cancer of scikit-learn, and BSDS300 from a file.

Every table is split by one permutation into training, validation and held-out rows, and standardised by the training
rows. Values that repeat, grey levels or zeros of a measurement, would have an infinite density: they get noise.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

# One split for every --seed, so that losses of different seeds are comparable.
HELD_OUT_SEED = 20251023
DIGITS_HELD_OUT = 297
# Of the standardised columns of breast_cancer, which repeat values.
CANCER_NOISE = 0.05
NAMES = ("digits", "breast_cancer", "bsds300")

# Adds fresh noise to rows of a table.
Jitter = Callable[[Tensor, torch.Generator], Tensor]


def shuffled_digits(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Scikit-learn's 8x8 digits: grey levels, whole numbers in 0..16, (1797, 64), and labels (1797,)."""
    from sklearn.datasets import load_digits

    found = load_digits()
    order = torch.randperm(len(found.data), generator=generator)
    return torch.from_numpy(found.data).float()[order], torch.from_numpy(found.target)[order]


def dequantise(levels: Tensor, generator: torch.Generator) -> Tensor:
    """Turns a grey level d in 0..16 into (d + u) / 17 with u uniform on [0, 1)."""
    return (levels + torch.rand(levels.shape, generator=generator)) / 17


class Table:
    """Rows of a table, standardised column by column.

    Args:
        name: One of ``NAMES``.
        train: Training rows, (count, dim).
        validation: Rows to choose parameters by, (count, dim).
        held_out: Rows that nothing is chosen by, (count, dim).
        jitter: The noise of the rows.
        generator: Draws the noise of the validation and held-out rows.

    Attributes:
        name: As given.
        dim: Number of columns.
        train: Training rows without noise, in the table's unit.
        validation: Standardised, (count, dim).
        held_out: Standardised, (count, dim).
        mean: Of the columns of the training rows, (dim,).
        scale: Their standard deviation, (dim,).
    """

    def __init__(
        self, name: str, train: Tensor, validation: Tensor, held_out: Tensor, jitter: Jitter, generator: torch.Generator
    ) -> None:
        self.name, self.dim, self.train, self._jitter = name, train.shape[1], train, jitter
        noisy = jitter(train, generator)
        self.mean, self.scale = noisy.mean(dim=0), noisy.std(dim=0)
        self.validation, self.held_out = self.points(validation, generator), self.points(held_out, generator)

    def standardise(self, rows: Tensor) -> Tensor:
        """Shifts and scales rows (count, dim) so that the training rows have mean 0 and standard deviation 1."""
        return (rows - self.mean) / self.scale

    def points(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        """Standardised points of rows (count, dim), with fresh noise."""
        return self.standardise(self._jitter(rows, generator))

    def restore(self, points: Tensor) -> Tensor:
        """The rows (count, dim) in the table's unit, from standardised points."""
        return self.mean + points * self.scale

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Draws (count, dim) standardised training points, with replacement and with fresh noise."""
        chosen = torch.randint(len(self.train), (count,), generator=generator)
        return self.points(self.train[chosen], generator)

    def own_unit(self) -> float:
        """What turns a negative log-density in nats of a standardised point into that of the row in its own unit."""
        return self.scale.log().sum().item()


def digits() -> Table:
    """The digits with uniform dequantisation noise: 1200 training, 300 validation, 297 held-out images of 64 pixels."""
    generator = torch.Generator().manual_seed(HELD_OUT_SEED)
    levels, _ = shuffled_digits(generator)
    held_out, validation, train = levels.split([DIGITS_HELD_OUT, 300, 1200])
    return Table("digits", train, validation, held_out, dequantise, generator)


def breast_cancer() -> Table:
    """Measurements of 569 cell nuclei, 30 columns: 369 training, 100 validation, 100 held-out rows.

    All columns are positive or zero and most have a long tail: x becomes log(1 + x / m) with m the training median.
    Normal noise of 0.05 standard deviations hides the ties.
    """
    from sklearn.datasets import load_breast_cancer

    generator = torch.Generator().manual_seed(HELD_OUT_SEED)
    rows = torch.from_numpy(load_breast_cancer().data).float()
    held_out, validation, train = rows[torch.randperm(len(rows), generator=generator)].split([100, 100, 369])
    median = train.median(dim=0).values
    train, validation, held_out = (torch.log1p(part / median) for part in (train, validation, held_out))
    noise = CANCER_NOISE * train.std(dim=0)

    def jitter(part: Tensor, generator: torch.Generator) -> Tensor:
        return part + noise * torch.randn(part.shape, generator=generator)

    return Table("breast_cancer", train, validation, held_out, jitter, generator)


def bsds300(path: Path) -> Table:
    """Patches of natural images, 63 columns, with the split of the file: groups train, validation and test.

    The file is that of Papamakarios et al., Masked Autoregressive Flow, 2017, arXiv 1705.07057. Its columns are
    continuous: no noise is added. Of the validation and test rows, 10,000 of each are drawn.

    Raises:
        SystemExit: if h5py is not installed, or the file is not there.
    """
    try:
        import h5py
    except ImportError:
        raise SystemExit("--data bsds300 reads HDF5: pip install h5py") from None
    if not path.exists():
        raise SystemExit(f"--file: there is no {path}; BSDS300.hdf5 is part of doi 10.5281/zenodo.1161203")
    generator = torch.Generator().manual_seed(HELD_OUT_SEED)
    with h5py.File(path) as file:
        train, *others = (torch.from_numpy(file[key][:]).float() for key in ("train", "validation", "test"))
    validation, held_out = (rows[torch.randperm(len(rows), generator=generator)[:10_000]] for rows in others)
    return Table("bsds300", train, validation, held_out, lambda rows, _: rows, generator)


def load(name: str, path: Path | None = None) -> Table:
    """Returns the table called ``name``, one of ``NAMES``; ``path`` is the file of bsds300."""
    if name == "bsds300":
        if path is None:
            raise SystemExit("--data bsds300 needs --file PATH, that of BSDS300.hdf5")
        return bsds300(path)
    return {"digits": digits, "breast_cancer": breast_cancer}[name]()


def fitted_normal(table: Table, count: int = 20_000) -> torch.distributions.MultivariateNormal:
    """The normal distribution, in fp64, with mean and covariance of ``count`` training points with their noise."""
    points = table.sample(count, torch.Generator().manual_seed(HELD_OUT_SEED)).double()
    return torch.distributions.MultivariateNormal(points.mean(dim=0), torch.cov(points.T))
