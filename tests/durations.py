"""Which cases are long: `make test` leaves them to `make test-all`, which writes their list."""

import collections
import os
import time
from pathlib import Path

import torch

LIST = Path(__file__).parent / "long_cases.txt"
# Seconds of a machine that compiles in 1.3 seconds: of a case, and of the fastest case of a function.
LIMIT, MOST = 1.5, 25.0


def slowness():
    """How many times as long this machine takes to compile: counting, say, is no measure of that."""

    def function(x):
        for _ in range(100):
            x = torch.tanh(x) + x
        return x

    for _ in range(2):  # the first one warms up
        torch.compiler.reset()
        start = time.perf_counter()
        torch.compile(function, backend="aot_eager")(torch.ones(2, requires_grad=True))
    return (time.perf_counter() - start) / 1.3


def long_cases(seconds):
    """Of cases, with their seconds, those above the limit; the fastest case of a function has one of its own."""
    functions = collections.defaultdict(list)
    for case, took in seconds.items():
        functions[case.partition("[")[0]].append((took, case))
    ranked = [(i, *case) for cases in functions.values() for i, case in enumerate(sorted(cases))]
    return {case for i, took, case in ranked if took > (LIMIT if i else MOST)}


class Recorder:
    """A plugin of pytest that renews the list for the cases that run."""

    def __init__(self):
        self.seconds, self.skipped = collections.Counter(), set()

    def pytest_runtest_logreport(self, report):
        self.seconds[report.nodeid] += report.duration
        if report.skipped:  # the fastest case is one that runs
            self.skipped.add(report.nodeid)

    def pytest_sessionfinish(self):
        unit = slowness()
        renew({case: took / unit for case, took in self.seconds.items() if case not in self.skipped})


def renew(seconds):
    """Write the list anew for these cases, with their seconds."""
    others = set(LIST.read_text().splitlines()) - seconds.keys()
    written = LIST.with_suffix(f".{os.getpid()}")
    written.write_text("".join(f"{case}\n" for case in sorted(others | long_cases(seconds))))
    written.replace(LIST)
