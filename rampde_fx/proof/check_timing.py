"""The time of training steps, taken in turns."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from rampde_fx.proof.check_table import CheckRow
from rampde_fx.proof.checked_call import Captured
from rampde_fx.torch_private import capturing
from rampde_fx.validation.untouched import untouched
from rampde_fx.validation.widening import copies

# How often each step is timed, behind one turn that is not counted.
REPETITIONS = 7


def timed(
    rows: list[CheckRow], steps: TrainingSteps, graphs: Mapping[str, Callable[..., Any]], compiler: str
) -> list[CheckRow]:
    """The rows with the median time of a training step, every model in turn.

    Args:
        rows: A row of the model as it is written, in eager, then one of each policy.
        steps: How a training step is made of a model.
        graphs: The compiled graph of each policy, by the name of its row.
        compiler: What compiles the model as it is written, for a row of its own.
    """
    eager, compiled = "as it is written, eager", f"as it is written, {compiler}"
    call = steps.captured.call
    every: dict[str, Step] = {eager: steps.of_model(call)}
    with steps.kept_tensors():
        plain, forget = capturing.compiled_by_torch(call, compiler)
        every[compiled] = steps.of_model(plain)
        every |= {name: steps.of_graph(graph) for name, graph in graphs.items()}
        try:
            seconds = medians(every)
        finally:
            forget()
    return [
        replace(
            row,
            milliseconds=1e3 * seconds[row.name],
            of_eager=seconds[row.name] / seconds[eager],
            of_compiled=seconds[row.name] / seconds[compiled],
        )
        if row.name in seconds
        else row
        for row in (rows[0], CheckRow(compiled, None, {}, {}), *rows[1:])
    ]


@dataclass(frozen=True)
class TrainingSteps:
    """Training steps of one call, which leave what is the user's as it was.

    Attributes:
        captured: The call, and the graph that was captured of it.
        tensors: The graph's inputs, then the other tensors of the call.
        loss: Maps the model's outputs to a 0-d tensor.
    """

    captured: Captured
    tensors: Sequence[Any]
    loss: Callable[[Any], torch.Tensor]

    def of_model(self, function: Callable[[], Any]) -> Step:
        """A step of the model itself; that it leaves no trace is not timed."""

        def step(clock: Clock) -> None:
            with untouched(self.captured.call.function), clock:
                self._differentiate(self.loss(function()))

        return step

    def of_graph(self, function: Callable[..., Any]) -> Step:
        """A step of a compiled graph."""
        count = len(self.captured.inputs)

        def step(clock: Clock) -> None:
            with clock:
                tree, _ = self.captured.outputs(function(*self.tensors[:count]), self.tensors)
                self._differentiate(self.loss(tree))

        return step

    def _differentiate(self, value: torch.Tensor) -> None:
        """A backward pass that leaves the gradients of the user's parameters alone."""
        by = [x for x in self.tensors if isinstance(x, torch.Tensor) and x.requires_grad]
        if by and value.requires_grad:
            torch.autograd.grad(value, by, allow_unused=True)

    @contextlib.contextmanager
    def kept_tensors(self) -> Iterator[None]:
        """Put back the values of what timed steps update in place."""
        tensors = [x for x in self.tensors if isinstance(x, torch.Tensor)]
        saved = [(x, x._version, y) for x, y in zip(tensors, copies(tensors, widen=False), strict=True)]
        try:
            yield
        finally:
            with torch.no_grad():
                for tensor, version, value in saved:
                    if tensor._version != version:
                        tensor.copy_(value)


class Clock:
    """Times what is inside of it, and what that launches on a GPU.

    Attributes:
        seconds: The time of the last run.
    """

    seconds = 0.0

    def __enter__(self) -> None:
        _wait_for_devices()
        self.begin = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        _wait_for_devices()
        self.seconds = time.perf_counter() - self.begin


Step = Callable[[Clock], None]


def medians(steps: dict[str, Step]) -> dict[str, float]:
    """The median time of each step in seconds, the steps taken in turns; the first turn is not counted."""
    taken: dict[str, list[float]] = {name: [] for name in steps}
    clock = Clock()
    for _ in range(REPETITIONS + 1):
        for name, step in steps.items():
            step(clock)
            taken[name].append(clock.seconds)
    return {name: statistics.median(seconds[1:]) for name, seconds in taken.items()}


def _wait_for_devices() -> None:
    """Wait for what was launched on a GPU."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
