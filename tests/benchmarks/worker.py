"""One contender on one case, in a process of its own that takes turns with the others."""

from __future__ import annotations

import os
import tempfile
import time
import traceback
import warnings
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import torch

import rampde_fx
from tests.benchmarks import measure
from tests.benchmarks.cases import Case
from tests.benchmarks.contenders import ALL, Contender

AT_MOST = 3600.0  # seconds until a first step counts as failed


@dataclass(frozen=True)
class Prepared:
    """What is known of a contender before its steps are timed.

    Attributes:
        first_step: Seconds of the first training step, which compiles, with empty caches.
        saved_bytes: Left by the forward for the backward.
        peak_bytes: Of a training step, above what the model and the data take.
        synchronisations: Of a training step; None on a CPU.
        loss: Of the first step.
        repeated: Backward passes that were repeated after an overflow.
    """

    first_step: float
    saved_bytes: int
    peak_bytes: int
    synchronisations: int | None
    loss: float
    repeated: int


class Failed(Exception):
    """A contender that could not run."""


class Worker:
    """A process that has compiled a contender and trains when it is told to."""

    def __init__(self, case: Case, contender: Contender, device: str, threads: int, tf32: bool) -> None:
        context = get_context("spawn")
        self._connection, theirs = context.Pipe()
        arguments = (theirs, case, contender.name, device, threads, tf32)
        self._process = context.Process(target=_serve, args=arguments, daemon=True)
        self._process.start()
        theirs.close()

    def prepared(self) -> tuple[Prepared, torch.Tensor]:
        """Waits until it is ready; what it found, and its first gradient, flat.

        Raises:
            Failed: with the reason.
        """
        found, gradient = self._answer()
        return Prepared(**found), torch.frombuffer(bytearray(gradient), dtype=torch.float32)

    def times(self, seconds: float) -> list[float]:
        """Seconds of each of the training steps of a turn, which takes about so many seconds."""
        self._connection.send(seconds)
        found: list[float] = self._answer()
        return found

    def stop(self) -> None:
        """End the process."""
        self._connection.close()  # it ends where it waits for what to do
        self._process.join(10)
        if self._process.is_alive():
            self._process.terminate()
            self._process.join()

    def _answer(self) -> Any:
        if not self._connection.poll(AT_MOST):
            raise Failed("it took too long")
        try:
            kind, value = self._connection.recv()
        except EOFError as error:
            raise Failed("its process died") from error
        if kind == "failed":
            raise Failed(value)
        return value


def _serve(connection: Connection, case: Case, contender: str, device: str, threads: int, tf32: bool) -> None:
    with tempfile.TemporaryDirectory(prefix="rampde_fx_benchmark_") as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        torch.set_num_threads(threads)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
        warnings.filterwarnings("ignore")
        try:
            _train(connection, case, contender, torch.device(device))
        except (EOFError, BrokenPipeError):
            return
        except Exception as error:
            reason = "out of memory" if isinstance(error, torch.cuda.OutOfMemoryError) else f"{type(error).__name__}"
            connection.send(("failed", f"{reason}: {str(error).strip().splitlines()[0][:200] if str(error) else ''}"))
            if os.environ.get("RAMPDE_FX_BENCHMARK_TRACEBACK"):
                traceback.print_exc()


def _train(connection: Connection, case: Case, name: str, device: torch.device) -> None:
    (contender,) = [c for c in ALL if c.name == name]
    loss, model = contender.prepare(case, device)
    values: list[torch.Tensor] = []

    def step() -> None:
        values.append(measure.training_step(loss, model))

    first = measure.timed(step, device)
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).float().cpu()
    step()
    found = Prepared(
        first_step=first,
        saved_bytes=measure.saved_bytes(loss, model),
        peak_bytes=measure.peak_bytes(step, device),
        synchronisations=measure.host_synchronisations(step, device),
        loss=values[0].item(),
        repeated=sum(count.repeated for count in rampde_fx.backward_counts().values()),
    )
    connection.send(("prepared", (asdict(found), gradient.numpy().tobytes())))
    while True:
        seconds = connection.recv()
        end, times = time.perf_counter() + seconds, []
        while not times or time.perf_counter() < end:
            times.append(measure.timed(step, device))
        values.clear()
        connection.send(("times", times))
