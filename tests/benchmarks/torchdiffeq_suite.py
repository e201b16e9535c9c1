"""torchdiffeq's own tests, with rampde_fx.torchdiffeq in its place: what passes, and why something does not.

git clone https://github.com/rtqichen/torchdiffeq && git -C torchdiffeq checkout a88aac5  # version 0.2.5
python -m tests.benchmarks.torchdiffeq_suite torchdiffeq/tests

The tests are the user's copy; none of them stands here. A row is a test of theirs, and counts its subtests. --theirs
runs them on the installed torchdiffeq instead, for the numbers that can be reached. --compiled compiles each solve by
itself, which takes seconds; --only names some of the tests, and --every runs every n-th subtest of each alone, the
first one of each n from the --begin-th on:

python -m tests.benchmarks.torchdiffeq_suite torchdiffeq/tests --compiled --only api_tests gradient_tests.TestGradient
python -m tests.benchmarks.torchdiffeq_suite torchdiffeq/tests --compiled --every 6
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import unittest
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch

import rampde_fx.torchdiffeq

FILES = "*_tests.py"
WIDTH = 110  # of a reason


class Tally(unittest.TestResult):
    """Counts subtests, and tests without any, with what they failed for."""

    def __init__(self) -> None:
        super().__init__()
        self.passed: Counter[str] = Counter()
        self.failed: dict[str, Counter[str]] = defaultdict(Counter)

    def addSubTest(self, test: Any, subtest: Any, err: Any) -> None:
        """One subtest has ended."""
        self._count(test, err)

    def addSuccess(self, test: Any) -> None:
        """A test has ended; one of subtests is counted by them."""
        if test.id() not in self.passed and test.id() not in self.failed:
            self._count(test, None)

    def addFailure(self, test: Any, err: Any) -> None:
        """A test has failed outside of subtests."""
        self._count(test, err)

    addError = addFailure

    def _count(self, test: Any, err: Any) -> None:
        if err is None:
            self.passed[test.id()] += 1
        else:
            self.failed[test.id()][reason(err[1])] += 1


def reason(error: BaseException) -> str:
    """The kind of an error, and the beginning of what it says."""
    text = " ".join(str(error).split()).replace("|", "/")
    return f"{type(error).__name__}: {text if len(text) <= WIDTH else text[:WIDTH] + ' ...'}"


class Sample:
    """Every n-th subtest of each test: a solver that is called in another one skips it.

    Args:
        every: n; 1 for all of them.
        begin: The number of the first one that runs.
    """

    def __init__(self, every: int, begin: int) -> None:
        self.every, self.begin, self.runs = every, begin, True
        self.numbers: Counter[str] = Counter()

    @contextlib.contextmanager
    def subtest(self, test: unittest.TestCase, begins: Callable[..., Any], **parameters: Any) -> Iterator[None]:
        """A subtest of a test, which begins by a function of unittest's."""
        self.runs = self.numbers[test.id()] % self.every == self.begin
        self.numbers[test.id()] += 1
        with begins(test, **parameters):
            yield
        self.runs = True

    def of(self, solve: Callable[..., Any]) -> Callable[..., Any]:
        """A solver that is called in the subtests of the sample alone."""

        def call(*arguments: Any, **named: Any) -> Any:
            if not self.runs:
                raise unittest.SkipTest("not in the sample")
            return solve(*arguments, **named)

        return call


def compiled(solve: Callable[..., Any]) -> Callable[..., Any]:
    """A solver whose every call is compiled for the rampde_fx backend as one graph, without low precision."""

    made: list[Any] = []  # of the last call: gradcheck asks for one function many times

    def call(func: Any, y0: Any, t: torch.Tensor, **arguments: Any) -> Any:
        given = (func, *arguments, *arguments.values())
        if made and len(given) == len(made[0]) and all(a is b for a, b in zip(given, made[0], strict=True)):
            return made[1](y0, t)
        leaves = y0 if isinstance(y0, tuple) else (y0,)
        widths = {torch.finfo(leaf.dtype).bits for leaf in leaves}
        dtype = torch.float64 if widths == {64} else torch.float32

        @rampde_fx.mixed_precision(dtype=dtype)
        def model(y0: Any, t: torch.Tensor) -> Any:
            return solve(func, y0, t, **arguments)

        torch._dynamo.reset()
        options = {"compiler": "aot_eager"}
        made[:] = [given, torch.compile(model, backend="rampde_fx", options=options, fullgraph=True)]
        return made[1](y0, t)

    return call


def module_of(solvers: ModuleType, change: Callable[[Callable[..., Any]], Callable[..., Any]]) -> ModuleType:
    """A module in torchdiffeq's place, whose solvers are changed ones."""
    module = ModuleType("torchdiffeq")
    module.__dict__.update(vars(solvers))
    for name in ("odeint", "odeint_adjoint"):
        setattr(module, name, change(getattr(solvers, name)))
    return module


def run(
    folder: Path, module: ModuleType, files: str = FILES, only: Sequence[str] = (), sample: Sample | None = None
) -> Tally:
    """Run the tests of a folder on a module, or some of them by their names, or a sample of their subtests."""
    sys.modules["torchdiffeq"] = module if sample is None else module_of(module, sample.of)
    sys.path.insert(0, str(folder))
    tally, begins = Tally(), unittest.TestCase.subTest
    subtest = begins if sample is None else lambda test, **given: sample.subtest(test, begins, **given)
    with warnings.catch_warnings(), mock.patch.object(unittest.TestCase, "subTest", subtest):
        warnings.simplefilter("ignore")
        names = only or [file.stem for file in sorted(folder.glob(files))]
        suite = unittest.TestSuite(map(unittest.defaultTestLoader.loadTestsFromName, names))
        suite.run(tally)
    return tally


def table(tally: Tally) -> list[str]:
    """One row for each test, and their sum."""
    rows = ["| test | passed | not | why |", "|---|--:|--:|---|"]
    for name in sorted({*tally.passed, *tally.failed}):
        why = "; ".join(f"{count} {text}" for text, count in tally.failed[name].items())
        rows.append(f"| `{name}` | {tally.passed[name]} | {tally.failed[name].total()} | {why} |")
    lost = sum(counts.total() for counts in tally.failed.values())
    return [*rows, f"| all | {tally.passed.total()} | {lost} | |"]


def main() -> None:
    """Print the table, as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the folder tests of torchdiffeq's repository")
    parser.add_argument("--files", default=FILES, help="those of a name alone, default %(default)s")
    parser.add_argument("--theirs", action="store_true", help="run them on torchdiffeq")
    parser.add_argument("--compiled", action="store_true", help="compile each solve")
    parser.add_argument("--only", nargs="+", default=(), metavar="NAME", help="run these tests, in unittest's names")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="run every N-th subtest of each test alone")
    parser.add_argument("--begin", type=int, default=0, metavar="K", help="begin with the K-th of them, default 0")
    options = parser.parse_args()
    if not list(options.folder.glob(options.files)):
        parser.error(f"{options.folder} has no {options.files}")
    module: ModuleType = rampde_fx.torchdiffeq
    if options.compiled:
        module = module_of(module, compiled)
    if options.theirs:
        import torchdiffeq as module
    torch.set_num_threads(1)
    sample = Sample(options.every, options.begin) if options.every > 1 else None
    print("\n".join(table(run(options.folder.resolve(), module, options.files, options.only, sample))))


if __name__ == "__main__":
    main()
