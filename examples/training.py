"""What the training examples share: the training loop, checkpoints and the runs of a comparison.

An example describes what it trains as a Workload, adds its own options to those of training_options.py, and ends in
``run``. Every dtype is trained from the same parameters and on the same batches, which the seed decides.
"""

import argparse
import math
import os
import signal
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import training_results
from common import progress
from torch import Tensor, nn
from training_options import POLICIES, Settings, list_runs
from training_results import History, Metric, Result

import rampde_fx

SAVE_EVERY = 100  # iterations

# A module, compiled or not.
Model = Callable[..., Tensor]


class Workload(ABC):
    """What an example trains.

    Attributes:
        name: First part of the names of all files.
        loss_unit: Unit of the training loss.
        metrics: What ``held_out`` and ``held_out_plain`` return, the most important first.
        check_every: Iterations between evaluations of ``held_out`` during training; 0 for the one at the end alone.
    """

    name: str
    loss_unit: str
    metrics: dict[str, Metric]
    check_every: int = 0

    @abstractmethod
    def module(self) -> nn.Module:
        """A new module with random parameters from torch's generator, which has been seeded."""

    @abstractmethod
    def sample(self, generator: torch.Generator) -> tuple[Tensor, ...]:
        """A training batch on the CPU, random numbers of the loss included, from the generator alone."""

    @abstractmethod
    def loss(self, model: Model, *batch: Tensor) -> Tensor:
        """The training loss, 0-d, of a batch that is on the device."""

    @abstractmethod
    def held_out(self, model: Model) -> dict[str, float]:
        """Held-out metrics of the compiled model, computed as in training.

        With batches of the training's size (see ``chunks``) and strides, and with gradients enabled, the graph of the
        training is used again, so that nothing more is compiled.
        """

    def held_out_plain(self, module: nn.Module) -> dict[str, float]:
        """Held-out metrics of the uncompiled module, which is plain fp32 code for any shape; gradients are off."""
        return {}

    @abstractmethod
    def draw(self, module: nn.Module, seed: int, path: Path) -> None:
        """Draws a picture of what the uncompiled module has learned; gradients are off."""

    def notes(self) -> list[str]:
        """Lines to print below the table, such as what another method reaches."""
        return []

    def optimizer(self, module: nn.Module, lr: float) -> torch.optim.Optimizer:
        """The optimizer; the training loop sets its learning rate."""
        return torch.optim.Adam(module.parameters(), lr=lr)


def chunks(count: int, batch: int, device: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Divides count points into batches of one size, the last one filled up with points from the start.

    Yields:
        The points' indices and whether they count, both (batch,).
    """
    for start in range(0, count, batch):
        index = torch.arange(start, start + batch, device=device)
        yield index % count, index < count


@dataclass
class State:
    """All that the next iteration depends on; its number is the length of the losses."""

    module: nn.Module
    optimizer: torch.optim.Optimizer
    generator: torch.Generator
    history: History

    @staticmethod
    def fresh(workload: Workload, settings: Settings, module: nn.Module) -> "State":
        """The state before the first iteration."""
        # The generator is on the CPU whatever the device, so that all runs of one seed see the same batches.
        generator = torch.Generator().manual_seed(settings.seed)
        return State(module, workload.optimizer(module, settings.lr), generator, History())

    def restore(self, checkpoint: dict) -> None:
        """Takes over what ``save`` has written."""
        self.module.load_state_dict(checkpoint["module"])
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        self.generator.set_state(checkpoint["generator"].cpu())
        self.history = History(**checkpoint["history"])

    def save(self, path: Path, settings: Settings, result: Result | None = None) -> None:
        """Writes a checkpoint, with the result of a run that is finished."""
        checkpoint = {
            "options": settings.options(),
            "module": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "history": asdict(self.history),
            "result": result and {name: value for name, value in vars(result).items() if name != "history"},
        }
        partial = path.with_suffix(".partial")
        torch.save(checkpoint, partial)
        os.replace(partial, path)  # an interrupted write leaves the previous checkpoint whole


def read_checkpoint(path: Path, settings: Settings) -> dict:
    """Reads what ``State.save`` has written.

    Raises:
        SystemExit: if it was written under other settings.
    """
    checkpoint = torch.load(path, map_location=settings.device, weights_only=True)
    written, asked = checkpoint["options"], settings.options()
    differing = [
        f"{name} {written.get(name)} (now {asked[name]})" for name in asked if written.get(name) != asked[name]
    ]
    if differing:
        raise SystemExit(
            f"--resume: {path} was written with {', '.join(differing)}; "
            "give the same settings, or start without --resume"
        )
    return checkpoint


def train(
    workload: Workload, settings: Settings, state: State, model: Model, path: Path, title: str = "", alone: bool = True
) -> bool:
    """Trains a module, and writes checkpoints regularly, at the end and at Ctrl-C.

    Args:
        workload: What is trained.
        settings: The settings of the run.
        state: Where to start; it is brought up to date in place.
        model: The state's module, compiled or not.
        path: The checkpoint to write.
        title: Of the progress bar.
        alone: Whether a loss that is not finite is an error. Otherwise it ends the run and is recorded.

    Returns:
        Whether the run came to its end, which is not so after Ctrl-C.

    Raises:
        SystemExit: if the loss is not finite and the run is alone.
    """
    history = state.history
    interrupted = False

    def finish_iteration(signum: int, frame: object) -> None:
        # The state between two iterations is the one to resume from.
        nonlocal interrupted
        interrupted = True
        signal.signal(signal.SIGINT, previous)
        os.write(2, b"\nfinishing this iteration; Ctrl-C again stops at once\n")

    def save() -> None:
        history.add_counts(rampde_fx.backward_counts(reset=True).values())
        state.save(path, settings)

    rampde_fx.backward_counts(reset=True)
    previous = signal.signal(signal.SIGINT, finish_iteration)
    started = done = len(history.losses)
    bar = progress(settings.iterations, title, done=done)
    bar.set_postfix_str("the first iteration compiles")
    try:
        while done < settings.iterations and history.diverged is None and not interrupted:
            begin = time.perf_counter()
            for group in state.optimizer.param_groups:
                group["lr"] = settings.learning_rate(done)
            batch = [x.to(settings.device) for x in workload.sample(state.generator)]
            # float16 needs no GradScaler: the generated adjoint scales its cotangents itself.
            loss = workload.loss(model, *batch)
            state.optimizer.zero_grad()
            loss.backward()
            value = loss.item()
            if not math.isfinite(value):
                if alone:
                    raise SystemExit(f"the loss is {value} at iteration {done}; a lower --lr may help")
                history.diverged = done
                save()
                break
            state.optimizer.step()
            history.add(value, time.perf_counter() - begin, first=done == started)
            done += 1
            bar.update()
            bar.set_postfix({workload.loss_unit: f"{history.recent(20):.3f}"}, refresh=False)
            if workload.check_every and done % workload.check_every == 0:
                history.checks.append({"iteration": done, **workload.held_out(model)})
            if interrupted or done == settings.iterations or done % SAVE_EVERY == 0:
                save()
    finally:
        bar.close()
        signal.signal(signal.SIGINT, previous)
    return done == settings.iterations or history.diverged is not None


class Runs:
    """The runs of one dtype, which differ in the seed and share one compiled module.

    Args:
        workload: What is trained.
        settings: Those of the first run.
        verify: Whether the first call of each compiled graph is checked in float64.

    Attributes:
        dtype: A key of POLICIES.
        module: The module, whose parameters every run replaces.
        model: The same module, compiled.
    """

    def __init__(self, workload: Workload, settings: Settings, verify: bool = False) -> None:
        self._workload, self._device, self.dtype = workload, settings.device, settings.dtype
        torch.compiler.reset()  # what was compiled for another dtype is of no more use
        module = workload.module().to(settings.device)
        self.module = rampde_fx.mixed_precision(module, policy=POLICIES[settings.dtype])
        self.model = torch.compile(
            self.module,
            backend="rampde_fx",
            options={"compiler": settings.compiler, "verify": verify},
            fullgraph=True,
        )
        self._stored: tuple[int, int] | None = None

    def start(self, settings: Settings) -> State:
        """The state before the first iteration, with the parameters of the seed."""
        torch.manual_seed(settings.seed)
        self.module.load_state_dict(self._workload.module().state_dict())
        return State.fresh(self._workload, settings, self.module)

    def stored(self, state: State) -> tuple[int, int]:
        """Bytes that all loops store for the backward, and those that plain autograd would store."""
        if self._stored is None:
            batch = [x.to(self._device) for x in self._workload.sample(state.generator)]
            loops = rampde_fx.explain(lambda *batch: self._workload.loss(self.module, *batch), *batch).loops
            self._stored = sum(x.stored_bytes for x in loops), sum(x.stored_bytes_autograd for x in loops)
        return self._stored

    def evaluate(self, settings: Settings, state: State, path: Path) -> Result:
        """Measures a run that is finished, and draws its picture."""
        metrics = dict.fromkeys(self._workload.metrics, math.nan)
        if state.history.diverged is None:
            metrics |= self._workload.held_out(self.model)
            with torch.no_grad():
                metrics |= self._workload.held_out_plain(self.module)
                self._workload.draw(self.module, settings.seed, path)
        return Result(settings.dtype, settings.seed, state.history, metrics, *self.stored(state))


def run(workload: Workload, options: argparse.Namespace) -> int:
    """Trains all dtypes and seeds, writes the table and the pictures, and returns the exit status."""
    settings = list_runs(options)
    out, metrics = options.out, workload.metrics
    out.mkdir(parents=True, exist_ok=True)
    paths = [out / f"{workload.name}-{one.dtype}-seed{one.seed}.pt" for one in settings]
    if options.resume and not any(path.exists() for path in paths):
        raise SystemExit(f"--resume: there is no checkpoint {paths[0]}; start without --resume")
    checkpoints = [
        read_checkpoint(path, one) if options.resume and path.exists() else None
        for path, one in zip(paths, settings, strict=True)
    ]

    results: list[Result] = []
    runs: Runs | None = None
    try:
        for number, (one, path, checkpoint) in enumerate(zip(settings, paths, checkpoints, strict=True), 1):
            if checkpoint and checkpoint["result"]:
                results.append(Result(**checkpoint["result"], history=History(**checkpoint["history"])))
                print(f"{path.stem}: finished before")
                continue
            if runs is None or runs.dtype != one.dtype:
                runs = Runs(workload, one, options.verify)
            state = runs.start(one)
            if checkpoint:
                state.restore(checkpoint)
            title = f"{path.stem} ({number} of {len(settings)})"
            if not train(workload, one, state, runs.model, path, title, alone=len(settings) == 1):
                print(f"interrupted after {len(state.history.losses)} iterations of {path.stem}; --resume continues")
                return 130  # as after SIGINT
            result = runs.evaluate(one, state, path.with_suffix(".png"))
            state.save(path, one, result)
            results.append(result)
            training_results.write_curve(metrics, result, path.with_suffix(".csv"))
            print(f"{path.stem}: {training_results.summary(metrics, result)}")
            training_results.write_rows(metrics, results, out / f"{workload.name}-results.csv")
    except KeyboardInterrupt:
        print("stopped; --resume continues from the checkpoints, if there are any", file=sys.stderr)
        return 130
    training_results.write_rows(metrics, results, out / f"{workload.name}-results.csv")
    training_results.draw_losses(metrics, workload.loss_unit, results, out / f"{workload.name}-loss.png")
    text = training_results.table(metrics, results) + "".join(f"\n{note}\n" for note in workload.notes())
    (out / f"{workload.name}-table.md").write_text(text)
    print(f"\n{text}\nwritten to {out}")
    return 0
