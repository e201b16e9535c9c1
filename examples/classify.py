"""An image classifier of three neural ODEs, trained in mixed precision by the rampde_fx backend.

A convolution leads into three ODE blocks, with a 1x1 convolution and average pooling between them, and a linear layer
behind the mean over all pixels: the shape of the STL-10 network of arXiv 2510.23498. Each block integrates

    dy/dt = -K_i^T sigma(K_i N(y) + b_i),    sigma = relu,

by RK4 from 0 to 1, with convolutions K_i and biases b_i of its own for every step i; N normalises each channel of each
image (instance normalisation). Without N this is the parabolic network of Ruthotto & Haber, arXiv 1804.04272, one of
the stable forms that follow from Haber & Ruthotto, Stable architectures for deep neural networks, arXiv 1705.03341.

Its Jacobian is -K^T D K P, with D = sigma' >= 0 diagonal and P that of N, symmetric and positive semidefinite: it has
the eigenvalues of -P^(1/2) K^T D K P^(1/2), all of them real and none positive. This is why N stands before K here:
with N between K and sigma some eigenvalues are complex, and their real parts can be positive.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import image_data
import torch
import training
import training_options
from common import positive, rk4
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.functional import conv_transpose2d, cross_entropy, instance_norm, relu
from training import Model
from training_results import Metric

import rampde_fx

ROWS, COLUMNS = 6, 10  # of the picture
SIDES = {"digits": 8, "stl10": 96}


class Layer(nn.Module):
    """The velocity of one step, -K^T relu(K N(y) + b).

    Args:
        channels: Of the state.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        """dy/dt (batch, channels, side, side), which does not depend on t within a step."""
        return -conv_transpose2d(relu(self.convolution(instance_norm(y))), self.convolution.weight, padding=1)


class Block(nn.Module):
    """A neural ODE with weights of its own for every step.

    Args:
        channels: Of the state.
        steps: RK4 steps from 0 to 1.
    """

    def __init__(self, channels: int, steps: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(channels) for _ in range(steps))

    def forward(self, y: Tensor, t: Tensor) -> Tensor:
        """Integrates y (batch, channels, side, side) over the time grid t (steps + 1,)."""
        for i, (t_i, dt) in enumerate(rampde_fx.steps(t)):
            y = rk4(self.layers[i], t_i, dt, y)
        return y


class Classifier(nn.Module):
    """Stem, three blocks of width, 2 width and 4 width channels, and a linear head.

    Args:
        inputs: Channels of the images.
        classes: Number of labels.
        width: Channels of the first block.
        steps: RK4 steps in each block.
    """

    def __init__(self, inputs: int, classes: int, width: int, steps: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(inputs, width, 3, padding=1)
        self.blocks = nn.ModuleList(Block(factor * width, steps) for factor in (1, 2, 4))
        self.connections = nn.ModuleList(nn.Conv2d(factor * width, 2 * factor * width, 1) for factor in (1, 2))
        self.norms = nn.ModuleList(nn.InstanceNorm2d(factor * width, affine=True) for factor in (1, 2, 4))
        self.pool = nn.AvgPool2d(2)
        self.head = nn.Linear(4 * width, classes)

    def forward(self, images: Tensor, t: Tensor) -> Tensor:
        """Logits (batch, classes) of images (batch, inputs, side, side), with the time grid t (steps + 1,)."""
        y = self.blocks[0](relu(self.norms[0](self.stem(images))), t)
        for connection, norm, block in zip(self.connections, self.norms[1:], self.blocks[1:], strict=True):
            y = block(relu(norm(self.pool(connection(y)))), t)
        return self.head(y.mean(dim=(2, 3)))


class Classification(training.Workload):
    """The classifier on one of the data sets.

    Args:
        options: data, root, side, width, steps, iterations, batch and device of the command line.
    """

    loss_unit = "nats"

    def __init__(self, options: argparse.Namespace) -> None:
        self.name = options.data
        self.metrics = {
            "accuracy": Metric("held-out accuracy", "%", 2),
            "cross_entropy": Metric("held-out cross-entropy", "nats"),
            "accuracy_fp32": Metric("accuracy, evaluated in fp32", "%", 2),
        }
        self.check_every = max(options.iterations // 10, 1)
        side = options.side or SIDES[options.data]
        self.images = image_data.digits(side) if self.name == "digits" else image_data.stl10(options.root, side)
        self._width, self._steps, self._batch, self._device = (
            options.width,
            options.steps,
            options.batch,
            options.device,
        )
        self._t = torch.linspace(0, 1, options.steps + 1, device=options.device)

    def module(self) -> Classifier:
        return Classifier(self.images.train.shape[1], len(self.images.classes), self._width, self._steps)

    def sample(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return self.images.sample(self._batch, generator)

    def loss(self, model: Model, images: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(model(images, self._t), labels)

    def held_out(self, model: Model) -> dict[str, float]:
        logits, labels = self.held_out_logits(model), self.images.held_out_labels
        return {"accuracy": accuracy(logits, labels), "cross_entropy": cross_entropy(logits, labels).item()}

    def held_out_plain(self, module: nn.Module) -> dict[str, float]:
        return {"accuracy_fp32": accuracy(self.held_out_logits(module), self.images.held_out_labels)}

    def held_out_logits(self, model: Model) -> Tensor:
        """Logits of all held-out images, on the CPU."""
        found = []
        for index, counts in training.chunks(len(self.images.held_out), self._batch, "cpu"):
            images = self.images.normalise(self.images.held_out[index]).to(self._device)
            found.append(model(images, self._t).detach().cpu()[counts])
        return torch.cat(found)

    def draw(self, module: nn.Module, seed: int, path: Path) -> None:
        draw_predictions(self.images, self.held_out_logits(module), path)


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of the images whose largest logit is that of the label, in percent."""
    return 100 * (logits.argmax(dim=1) == labels).double().mean().item()


def draw_predictions(images: image_data.Images, logits: Tensor, path: Path) -> None:
    """Draws held-out images with their predictions, those that are wrong first and in red."""
    predicted, labels = logits.argmax(dim=1), images.held_out_labels
    wrong = predicted != labels
    order = torch.argsort(~wrong, stable=True)[: ROWS * COLUMNS].tolist()
    side = images.held_out.shape[-1]
    width, height = round(1.4 * side), round(1.5 * side)  # of a tile
    canvas = torch.full((ROWS * height, COLUMNS * width, images.held_out.shape[1]), 255, dtype=torch.uint8)
    figure = Figure(figsize=(10, 6.9), layout="constrained")
    axes = figure.subplots()
    for place, i in enumerate(order):
        top, left = place // COLUMNS * height, place % COLUMNS * width + (width - side) // 2
        canvas[top : top + side, left : left + side] = images.held_out[i].permute(1, 2, 0)
        found, truth = images.classes[predicted[i]], images.classes[labels[i]]
        text = f"{found}\nnot {truth}" if wrong[i] else truth
        style = {"ha": "center", "va": "top", "fontsize": 8, "color": "C3" if wrong[i] else "black"}
        axes.text(left + side / 2, top + side, text, **style)
    axes.imshow(canvas.numpy(), cmap="gray", vmin=0, vmax=255)
    axes.set_axis_off()
    axes.set_title(f"{wrong.sum()} of {len(labels):,} held-out images are classified wrongly; these come first")
    figure.savefig(path, dpi=120)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = training_options.parser(
        "Train an image classifier of three convolutional neural ODEs in mixed precision. The defaults suit the "
        "digits; for STL-10 take --width 64 --batch 128 --side 128 and a GPU.",
        out="examples/out/classify",
        iterations=250,
        batch=64,
        lr=1e-2,
    )
    parser.add_argument("--data", choices=SIDES, default="digits", help="default %(default)s")
    parser.add_argument(
        "--root",
        metavar="DIR",
        type=Path,
        default=Path("stl10_binary"),
        help="folder of STL-10's binary files, default %(default)s",
    )
    for option, default, what in (("--width", 8, "channels of the first block"), ("--steps", 4, "RK4 steps per block")):
        parser.add_argument(option, metavar="N", type=positive, default=default, help=f"{what}, default %(default)s")
    parser.add_argument(
        "--side", metavar="N", type=positive, help="pixels to which the images are resized, default none: 8 or 96"
    )
    options = training_options.parse(parser, arguments)
    if options.side and options.side % 4:
        parser.error(f"--side {options.side}: must be a multiple of 4, for it is halved twice")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the example and returns its exit status."""
    options = parse_arguments(arguments)
    return training.run(Classification(options), options)


if __name__ == "__main__":
    sys.exit(main())
