"""All contenders on one case: they compile, then they train in turns."""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch

from tests.benchmarks.cases import Case
from tests.benchmarks.contenders import Contender
from tests.benchmarks.worker import Failed, Worker


def run_case(case: Case, contenders: list[Contender], options: argparse.Namespace, progress: Any) -> dict[str, Any]:
    """Results of one case: one dict per contender that ran, and the reasons of those that did not."""
    reasons = {c.name: c.absent(case, options.device, options.longest_unrolled) for c in contenders}
    race = _Race(case, options, progress, {name: reason for name, reason in reasons.items() if reason})
    progress.update(len(race.skipped))
    try:
        for group in _groups([c for c in contenders if not reasons[c.name]], options):
            race.prepare(group)
        race.take_turns()
    finally:
        race.stop()
    return {"name": case.name, "what": case.what(), "results": race.results(), "skipped": race.skipped}


def _groups(contenders: list[Contender], options: argparse.Namespace) -> Iterator[list[Contender]]:
    """A few at a time; on a CPU what does not compile one by one, for their threads would wait for each other."""
    together = [contender for contender in contenders if contender.backend is not None or options.device == "cuda"]
    yield from (together[i : i + options.jobs] for i in range(0, len(together), options.jobs))
    yield from ([contender] for contender in contenders if contender not in together)


class _Race:
    """The contenders on a case while they run."""

    def __init__(self, case: Case, options: argparse.Namespace, progress: Any, skipped: dict[str, str]) -> None:
        self.case, self.options, self.progress, self.skipped = case, options, progress, skipped
        self.workers: dict[str, Worker] = {}
        self.found: dict[str, dict[str, Any]] = {}
        self.gradients: dict[str, torch.Tensor] = {}
        self.turns: dict[str, list[list[float]]] = {}

    def prepare(self, group: list[Contender]) -> None:
        """Let a group of contenders compile at the same time."""
        options = self.options
        for c in group:
            self.workers[c.name] = Worker(self.case, c, options.device, options.threads, options.tf32)
        for contender in group:
            self.progress.set_description(f"{self.case.name}: {contender.name}")
            try:
                found, self.gradients[contender.name] = self.workers[contender.name].prepared()
                self.found[contender.name] = asdict(found)
            except Failed as error:
                self._drop(contender.name, error)
            self.progress.update()

    def take_turns(self) -> None:
        """Let every contender train for a while, round after round."""
        for number, name in itertools.product(range(self.options.rounds), list(self.workers)):
            self.progress.set_description(f"{self.case.name}: round {number + 1} of {self.options.rounds}, {name}")
            try:
                if name in self.workers:
                    self.turns.setdefault(name, []).append(self.workers[name].times(self.options.turn))
            except Failed as error:
                self._drop(name, error)

    def _drop(self, name: str, error: Failed) -> None:
        self.skipped[name] = str(error)
        self.workers.pop(name).stop()

    def stop(self) -> None:
        """End all processes."""
        for worker in self.workers.values():
            worker.stop()

    def results(self) -> dict[str, dict[str, Any]]:
        """What was found of every contender that finished."""
        return {name: self._result(name) for name in self.workers}

    def _result(self, name: str) -> dict[str, Any]:
        times = list(itertools.chain(*self.turns[name]))
        return {
            **self.found[name],
            "steps": len(times),
            "seconds": statistics.median(times),
            "quartiles": statistics.quantiles(times, n=4)[::2] if len(times) > 1 else times * 2,
            "rounds": [statistics.median(turn) for turn in self.turns[name]],
            "gradient_difference": self._difference(name),
        }

    def _difference(self, name: str) -> float | None:
        exact = self.gradients.get("eager float32")
        if exact is None or exact.shape != self.gradients[name].shape:
            return None
        return ((self.gradients[name] - exact).norm() / exact.norm()).item()
