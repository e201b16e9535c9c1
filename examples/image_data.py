"""Image data sets of the examples: scikit-learn's 8x8 digits, and STL-10 from its own binary files."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy
import torch
from tabular_data import DIGITS_HELD_OUT, HELD_OUT_SEED, shuffled_digits
from torch import Tensor
from torch.nn.functional import interpolate, pad

DIGITS_LEVELS = 16
STL10_SIDE = 96
STL10_CLASSES = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")


@dataclass
class Images:
    """Labelled images, in bytes.

    Attributes:
        train: (count, channels, side, side), uint8.
        train_labels: (count,), int64, from 0.
        held_out: As train.
        held_out_labels: As train_labels.
        classes: The names of the labels.
        shift: Largest random shift of a training image, in pixels.
        flip: Whether training images are reflected left to right at random.
        mean: Of each channel over the training images, (channels, 1, 1).
        deviation: The standard deviation, as mean.
    """

    train: Tensor
    train_labels: Tensor
    held_out: Tensor
    held_out_labels: Tensor
    classes: tuple[str, ...]
    shift: int
    flip: bool
    mean: Tensor = field(init=False)
    deviation: Tensor = field(init=False)

    def __post_init__(self) -> None:
        channels = [c.float() for c in self.train.transpose(0, 1)]
        self.mean = torch.stack([c.mean() for c in channels])[:, None, None]
        self.deviation = torch.stack([c.std() for c in channels])[:, None, None]

    def sample(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draws training images with replacement, shifted by edge pixels and reflected; (count, ...) and (count,)."""
        chosen = torch.randint(len(self.train), (count,), generator=generator)
        side = self.train.shape[-1]
        padded = pad(self.train[chosen].float(), (self.shift,) * 4, mode="replicate")
        corner = torch.randint(2 * self.shift + 1, (2, count, 1), generator=generator)
        row, column = corner + torch.arange(side)  # (count, side) each
        mirrored = torch.randint(2, (count, 1), generator=generator).bool() & self.flip
        column = torch.where(mirrored, column.flip(1), column)
        image, channel = torch.arange(count), torch.arange(padded.shape[1])
        images = padded[
            image[:, None, None, None], channel[:, None, None], row[:, None, :, None], column[:, None, None]
        ]
        return self.normalise(images), self.train_labels[chosen]

    def normalise(self, images: Tensor) -> Tensor:
        """Images on the CPU to mean 0 and variance 1, over the training images and channel by channel."""
        return (images.float() - self.mean) / self.deviation


def resized(images: Tensor, side: int) -> Tensor:
    """Images (count, channels, height, width) in bytes, resized to a square by bilinear interpolation."""
    if images.shape[-2:] == (side, side):
        return images
    small = [interpolate(c.float(), (side, side), mode="bilinear", antialias=True) for c in images.split(500)]
    return torch.cat([c.round().clamp(0, 255).byte() for c in small])


def digits(side: int = 8) -> Images:
    """The digits as images of one channel, which they fill from edge to edge: they are not shifted."""
    levels, labels = shuffled_digits(torch.Generator().manual_seed(HELD_OUT_SEED))
    images = resized((levels * (255 / DIGITS_LEVELS)).round().byte().view(-1, 1, 8, 8), side)
    n = DIGITS_HELD_OUT
    return Images(images[n:], labels[n:], images[:n], labels[:n], tuple("0123456789"), shift=0, flip=False)


def read_stl10(root: Path, part: str) -> tuple[Tensor, Tensor]:
    """Reads a part of STL-10, "train" or "test".

    PART_X.bin holds the images, three bytes a pixel: one channel after the other, each column by column. PART_y.bin
    holds one byte for each label, 1 to 10. Source: https://cs.stanford.edu/~acoates/stl10/

    Returns:
        Images (count, 3, 96, 96), uint8, and labels (count,), int64, from 0.

    Raises:
        SystemExit: if a file is missing or does not have this form.
    """
    arrays = []
    for path in (root / f"{part}_X.bin", root / f"{part}_y.bin"):
        if not path.is_file():
            raise SystemExit(
                f"--data stl10: there is no {path}; unpack stl10_binary.tar.gz and give its folder as --root"
            )
        arrays.append(torch.from_numpy(numpy.fromfile(path, dtype=numpy.uint8)))
    pixels, labels = arrays
    size = 3 * STL10_SIDE**2
    if len(pixels) != size * len(labels) or not len(labels):
        raise SystemExit(
            f"--data stl10: {part}_X.bin has {len(pixels):,} bytes and {part}_y.bin {len(labels):,}; "
            f"{size:,} bytes to each label are required"
        )
    if not 1 <= labels.min() <= labels.max() <= len(STL10_CLASSES):
        raise SystemExit(f"--data stl10: {part}_y.bin holds {labels.min()} to {labels.max()}; labels are 1 to 10")
    return pixels.view(-1, 3, STL10_SIDE, STL10_SIDE).transpose(2, 3).contiguous(), labels.long() - 1


def stl10(root: Path, side: int = STL10_SIDE) -> Images:
    """STL-10: 5,000 training images and 8,000 held-out ones; the unlabelled ones are not read."""
    (train, train_labels), (test, test_labels) = (read_stl10(root, part) for part in ("train", "test"))
    train, test = resized(train, side), resized(test, side)
    return Images(train, train_labels, test, test_labels, STL10_CLASSES, shift=side // 8, flip=True)
