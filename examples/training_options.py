"""The command line of the training examples, and the runs that it asks for."""

import argparse
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from common import positive

import rampde_fx
from rampde_fx import PrecisionPolicy

POLICIES = {
    "float32": PrecisionPolicy(torch.float32),
    "bfloat16": PrecisionPolicy(torch.bfloat16),
    "float16": PrecisionPolicy(torch.float16),
    "float16-unscaled": PrecisionPolicy(torch.float16, scaling="none"),
}
SHARED = ("iterations", "batch", "lr", "device", "compiler")


@dataclass(frozen=True)
class Settings:
    """All that decides a trajectory. A checkpoint is resumed under equal settings only.

    Attributes:
        dtype: A key of POLICIES.
        seed: Of parameters and batches.
        iterations: Of the whole run.
        batch: Batch size.
        lr: Learning rate at the start.
        device: As torch names it.
        compiler: Of the rampde_fx backend.
        own: The options of the example itself, by name.
    """

    dtype: str
    seed: int
    iterations: int
    batch: int
    lr: float
    device: str
    compiler: str
    own: dict[str, str | int | float]

    def options(self) -> dict[str, str | int | float]:
        """All settings by the names of the command line."""
        named = {**asdict(self), **self.own}
        del named["own"]
        return {f"--{name.replace('_', '-')}": value for name, value in named.items()}

    def learning_rate(self, iteration: int) -> float:
        """Cosine decay from lr to zero."""
        return 0.5 * self.lr * (1 + math.cos(math.pi * iteration / self.iterations))


def parser(description: str, out: str, *, iterations: int, batch: int, lr: float) -> argparse.ArgumentParser:
    """The options that every training example has."""

    def device(text: str) -> str:
        try:
            torch.empty(0, device=text)
        except (RuntimeError, AssertionError) as error:  # the latter where torch is built without CUDA
            raise argparse.ArgumentTypeError(f"{text!r} is not usable: {error}".splitlines()[0]) from None
        return text

    found = argparse.ArgumentParser(
        description=description,
        epilog="Writes to --out: a table of all runs (NAME-table.md, NAME-results.csv), their losses (NAME-loss.png), "
        "and for each run NAME-DTYPE-seedN with the endings .pt (checkpoint), .csv (training curve) and .png. "
        "Ctrl-C finishes the iteration and writes the checkpoint; the same command with --resume goes on there.",
    )
    shared = found.add_argument_group("options that all training examples have")
    shared.add_argument(
        "--dtype",
        nargs="+",
        choices=["auto", *POLICIES],
        metavar="DTYPE",
        help="dtypes of the velocity evaluations: %(choices)s; all from the same parameters and batches. "
        "auto, the default, is bfloat16 on a CPU that multiplies in it, float32 on any other CPU, float16 on CUDA; "
        "float16-unscaled shows what happens without adjoint scaling",
    )
    shared.add_argument("--compare", action="store_true", help="all four dtypes")
    shared.add_argument(
        "--seed",
        nargs="+",
        metavar="N",
        type=int,
        default=[0],
        help="of parameters and batches, a run for each; default 0",
    )
    for option, default, what in (
        ("--iterations", iterations, "training iterations"),
        ("--batch", batch, "batch size"),
    ):
        shared.add_argument(option, metavar="N", type=positive, default=default, help=f"{what}, default %(default)s")
    shared.add_argument(
        "--lr", metavar="RATE", type=float, default=lr, help="learning rate, decays by a cosine, default %(default)s"
    )
    shared.add_argument(
        "--device",
        metavar="DEVICE",
        type=device,
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu, cuda, cuda:1, ...; default %(default)s here",
    )
    shared.add_argument(
        "--compiler",
        choices=["inductor", "aot_eager"],
        default="inductor",
        help="what compiles the rewritten graph, default %(default)s; aot_eager starts sooner and runs slower",
    )
    shared.add_argument(
        "--verify",
        action="store_true",
        help="check the first call of each compiled graph in float64 before it is used; takes seconds to minutes",
    )
    shared.add_argument("--out", metavar="DIR", type=Path, default=Path(out), help="output folder, default %(default)s")
    shared.add_argument("--resume", action="store_true", help="continue from the checkpoints in --out")
    return found


def parse(found: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line; dtype and seed become lists without repetitions."""
    options = found.parse_args(arguments)
    if options.compare and options.dtype:
        found.error("--compare stands for all four of --dtype: give one or the other")
    named = options.dtype or (POLICIES if options.compare else ["auto"])
    chosen = str(rampde_fx.PrecisionPolicy().chosen_for(options.device.partition(":")[0]))
    options.dtype = list(dict.fromkeys(chosen if name == "auto" else name for name in named))
    options.seed = list(dict.fromkeys(options.seed))
    return options


def list_runs(options: argparse.Namespace) -> list[Settings]:
    """The settings of every run: all seeds of the first dtype, then of the next one."""
    named = vars(options)
    shared = {name: named[name] for name in SHARED}
    # Where files are does not decide what is trained.
    other = {*SHARED, "dtype", "seed", "compare", "verify", "resume"}
    own = {name: value for name, value in named.items() if name not in other and not isinstance(value, Path)}
    return [Settings(dtype, seed, **shared, own=own) for dtype in options.dtype for seed in options.seed]
