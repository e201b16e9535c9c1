"""All contenders on one case: they compile, then they train in turns."""

from __future__ import annotations

import argparse
import itertools
import statistics
from dataclasses import asdict
from typing import Any

import torch

from tests.benchmarks.cases import Case
from tests.benchmarks.contenders import Contender
from tests.benchmarks.worker import Failed, Worker


def run_case(case: Case, contenders: list[Contender], options: argparse.Namespace, progress: Any) -> dict[str, Any]:
    """Results of one case: one dict per contender that ran, and the reasons of those that did not."""
    skipped, workers, results, gradients = {}, {}, {}, {}
    waiting = []
    for contender in contenders:
        if reason := contender.absent(case, options.device, options.longest_unrolled):
            skipped[contender.name] = reason
            progress.update()
        else:
            waiting.append(contender)
    try:
        for group in (waiting[i : i + options.jobs] for i in range(0, len(waiting), options.jobs)):
            started = {c.name: Worker(case, c, options.device, options.threads, options.tf32) for c in group}
            for name, worker in started.items():
                progress.set_description(f"{case.name}: {name}")
                try:
                    found, gradients[name] = worker.prepared()
                    results[name], workers[name] = asdict(found), worker
                except Failed as error:
                    skipped[name] = str(error)
                    worker.stop()
                progress.update()
        turns: dict[str, list[list[float]]] = {name: [] for name in workers}
        for number in range(options.rounds):
            for name, worker in list(workers.items()):
                progress.set_description(f"{case.name}: round {number + 1} of {options.rounds}, {name}")
                turns[name].append(worker.times(options.turn))
    finally:
        for worker in workers.values():
            worker.stop()
    exact = gradients.get("eager float32")
    for name, result in results.items():
        times = list(itertools.chain(*turns[name]))
        result["steps"] = len(times)
        result["seconds"] = statistics.median(times)
        result["quartiles"] = statistics.quantiles(times, n=4)[::2] if len(times) > 1 else times * 2
        result["rounds"] = [statistics.median(turn) for turn in turns[name]]
        result["gradient_difference"] = _difference(gradients[name], exact)
    return {"name": case.name, "what": case.what(), "results": results, "skipped": skipped}


def _difference(gradient: torch.Tensor, exact: torch.Tensor | None) -> float | None:
    if exact is None or exact.shape != gradient.shape:
        return None
    return ((gradient - exact).norm() / exact.norm()).item()
