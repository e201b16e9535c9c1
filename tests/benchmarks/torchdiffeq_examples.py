"""torchdiffeq's examples, with rampde_fx.torchdiffeq in its place: what lines change, and the losses beside its own.

git clone https://github.com/rtqichen/torchdiffeq && git -C torchdiffeq checkout a88aac5  # version 0.2.5
python -m tests.benchmarks.torchdiffeq_examples torchdiffeq/examples

The examples are the user's copy, and none of them stands here. Each runs as it is, if torchdiffeq is installed; with
other import lines; and compiled for the backend, each solve as one graph: without low precision, and with a velocity in
float16 and bfloat16, with tolerances that these can reach. Each runs with one seed in a process and a folder of its
own, and stops after some iterations. What is told of an iteration is the number whose backward is called. odenet_mnist
trains on scikit-learn's digits, which a module gives it in torchvision's place.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import json
import os
import re
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch

SEED = 0
IMPORT = re.compile(r"^( *)from torchdiffeq import", re.MULTILINE)
LAST_IMPORT = re.compile(r"(.*^ *from rampde_fx\.torchdiffeq import[^\n]*\n)", re.MULTILINE | re.DOTALL)
COUNTER = re.compile(r"^ *self\.nfe \+= 1\n", re.MULTILINE)
COMPILED = """
import rampde_fx
solve = odeint

@rampde_fx.mixed_precision(dtype=torch.{dtype})
def odeint(func, y0, t, **arguments):
    return solve(func, y0, t, **{arguments})

odeint = torch.compile(odeint, backend="rampde_fx", options={{"compiler": "aot_eager"}}, fullgraph=True)
"""
HOW = {
    "torchdiffeq": "torchdiffeq",
    "uncompiled": "rampde_fx.torchdiffeq",
    "float32": "compiled, float32",
    "float16": "compiled, float16",
    "bfloat16": "compiled, bfloat16",
}
# Two unit roundoffs of the dtype, and a hundredth of that.
TOLERANCES = {"float16": "rtol=1e-3, atol=1e-5", "bfloat16": "rtol=8e-3, atol=8e-5"}


class Example(NamedTuple):
    """How one of them is run.

    Attributes:
        iterations: After so many it is stopped; None where it ends by itself.
        arguments: Of its command line.
        adjoint: Those that ask for odeint_adjoint.
    """

    iterations: int | None
    arguments: tuple[str, ...] = ()
    adjoint: tuple[str, ...] = ("--adjoint",)


EXAMPLES = {
    "ode_demo": Example(20),
    "latent_ode": Example(6, adjoint=("--adjoint", "True")),
    "odenet_mnist": Example(10, ("--data_aug", "False", "--test_batch_size", "60"), adjoint=("--adjoint", "True")),
    "cnf": Example(4),
    "bouncing_ball": Example(None, ("3",)),
}


class Stop(BaseException):
    """Enough iterations."""


def patched(source: str, how: str) -> str:
    """The source with the lines that a user changes."""
    if how == "torchdiffeq":
        return source
    source = IMPORT.sub(r"\1from rampde_fx.torchdiffeq import", source)
    if how == "uncompiled":
        return source
    arguments = f"dict(arguments, {TOLERANCES[how]})" if how in TOLERANCES else "arguments"
    compiled = COMPILED.format(dtype=how, arguments=arguments)
    return COUNTER.sub("", LAST_IMPORT.sub(lambda found: found[1] + compiled, source, count=1))


def changed_lines(before: str, after: str) -> tuple[int, int]:
    """How many lines are taken out, and how many put in; empty ones are not counted."""
    marks = [line[0] for line in difflib.ndiff(before.splitlines(), after.splitlines()) if line[1:].strip()]
    return marks.count("-"), marks.count("+")


class Digits(torch.utils.data.Dataset[tuple[torch.Tensor, int]]):
    """Scikit-learn's digits, of the size of MNIST's, by the arguments of torchvision's MNIST."""

    HELD_OUT = 360

    def __init__(self, root: str, *, train: bool, download: bool, transform: Any) -> None:
        from sklearn.datasets import load_digits

        images, labels = load_digits(return_X_y=True)
        chosen = slice(self.HELD_OUT, None) if train else slice(self.HELD_OUT)
        levels = torch.tensor(images[chosen], dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
        self.images = torch.nn.functional.interpolate(levels, (28, 28), mode="bilinear")
        self.labels = [int(label) for label in labels[chosen]]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, place: int) -> tuple[torch.Tensor, int]:
        return self.images[place], self.labels[place]


def stand_in() -> None:
    """Have a module in torchvision's place, with what odenet_mnist asks of it."""
    torchvision, datasets, transforms = (
        ModuleType(name) for name in ("torchvision", "torchvision.datasets", "torchvision.transforms")
    )
    vars(datasets)["MNIST"] = Digits
    vars(transforms).update(Compose=list, ToTensor=lambda: None)
    vars(torchvision).update(datasets=datasets, transforms=transforms)
    for module in (torchvision, datasets, transforms):
        sys.modules[module.__name__] = module


def told_losses(most: int | None) -> list[float]:
    """A list of the numbers whose backward is called; after most of them the program is stopped."""
    told: list[float] = []
    backward: Callable[..., None] = torch.Tensor.backward

    def telling(self: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        backward(self, *args, **kwargs)
        told.append(self.item())
        if len(told) == most:
            raise Stop

    torch.Tensor.backward = telling  # type: ignore[method-assign,assignment]
    return told


def run(path: Path, arguments: list[str], most: int | None) -> list[float]:
    """Run a program of this process, and say its losses."""
    import numpy

    stand_in()
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    numpy.random.seed(SEED)
    sys.argv = [str(path), *arguments]
    told = told_losses(most)
    with contextlib.suppress(Stop):
        runpy.run_path(str(path), run_name="__main__")
    return told


def measured(folder: Path, name: str, how: str, *, adjoint: bool) -> tuple[list[float], str, tuple[int, int]]:
    """The losses of an example, what it has ended with instead, and the lines that were changed."""
    example = EXAMPLES[name]
    source = (folder / f"{name}.py").read_text()
    changed = patched(source, how)
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / f"{name}.py"
        path.write_text(changed)
        arguments = [*example.arguments, *(example.adjoint if adjoint else ())]
        command = [sys.executable, "-m", __spec__.name, "--run", str(path), str(example.iterations or 0), *arguments]
        paths = os.pathsep.join(map(os.path.abspath, filter(None, sys.path)))
        environment = {**os.environ, "MPLBACKEND": "agg", "PYTHONPATH": paths}
        ended = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, check=False)
    if ended.returncode:
        return [], reason(ended.stderr), changed_lines(source, changed)
    return json.loads(ended.stdout.splitlines()[-1]), "", changed_lines(source, changed)


def reason(text: str) -> str:
    """The last error that a program tells, in its first line."""
    errors = re.findall(r"^(?:\S+\.)?(\w*(?:Error|Unsupported)): (.*)$", text, re.MULTILINE)
    return f"{errors[-1][0]}: {errors[-1][1]}"[:150] if errors else text.strip()[-150:]


def row(name: str, how: str, solver: str, found: tuple[list[float], str, tuple[int, int]]) -> str:
    """One row of the table."""
    losses, error, (removed, added) = found
    shown = sorted({0, (len(losses) - 1) // 2, len(losses) - 1}) if losses else []
    numbers = ", ".join(f"{losses[place]:.6g} ({place + 1})" for place in shown)
    return f"| {name} | {solver} | {HOW[how]} | -{removed} +{added} | {numbers or error.replace('|', '/')} |"


def main() -> None:
    """Print the table, as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the folder examples of torchdiffeq's repository")
    parser.add_argument("--only", nargs="+", choices=EXAMPLES, default=list(EXAMPLES), help="some of them")
    parser.add_argument("--how", nargs="+", choices=HOW, default=list(HOW), help="in some ways")
    options = parser.parse_args()
    print("| example | solver | with | lines | losses (iteration) |\n|---|---|---|--:|---|")
    for name in options.only:
        for solver in ("odeint", "odeint_adjoint"):
            for how in options.how:
                found = measured(options.folder.resolve(), name, how, adjoint=solver == "odeint_adjoint")
                print(row(name, how, solver, found), flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--run"]:
        file, most, *rest = sys.argv[2:]
        losses = run(Path(file), rest, int(most) or None)
        print(f"\n{json.dumps(losses)}")
    else:
        main()
