"""torchdiffeq's own tests, with rampde_fx.torchdiffeq in its place: what passes, and why something does not.

git clone https://github.com/rtqichen/torchdiffeq && git -C torchdiffeq checkout a88aac5  # version 0.2.5
python -m tests.benchmarks.torchdiffeq_suite torchdiffeq/tests

The tests are the user's copy; none of them stands here. A row is a test of theirs, and counts its subtests. --theirs
runs them on the installed torchdiffeq instead, for the numbers that can be reached. --compiled compiles each solve by
itself, which takes seconds; --only names some of the tests:

python -m tests.benchmarks.torchdiffeq_suite torchdiffeq/tests --compiled --only api_tests gradient_tests.TestGradient
"""

from __future__ import annotations

import argparse
import sys
import unittest
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

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


def compiled(solve: Callable[..., Any]) -> Callable[..., Any]:
    """A solver whose every call is compiled for the rampde_fx backend as one graph, without low precision."""

    def call(func: Any, y0: Any, t: torch.Tensor, **arguments: Any) -> Any:
        leaves = y0 if isinstance(y0, tuple) else (y0,)
        widths = {torch.finfo(leaf.dtype).bits for leaf in leaves}
        dtype = torch.float64 if widths == {64} else torch.float32

        @rampde_fx.mixed_precision(dtype=dtype)
        def model(y0: Any, t: torch.Tensor) -> Any:
            return solve(func, y0, t, **arguments)

        torch._dynamo.reset()
        options = {"compiler": "aot_eager"}
        return torch.compile(model, backend="rampde_fx", options=options, fullgraph=True)(y0, t)

    return call


def compiled_module() -> ModuleType:
    """rampde_fx.torchdiffeq, whose solvers are compiled."""
    module = ModuleType("torchdiffeq")
    module.__dict__.update(vars(rampde_fx.torchdiffeq))
    for name in ("odeint", "odeint_adjoint"):
        setattr(module, name, compiled(getattr(rampde_fx.torchdiffeq, name)))
    return module


def run(folder: Path, module: ModuleType, files: str = FILES, only: Sequence[str] = ()) -> Tally:
    """Run the tests of a folder on a module, or some of them by their names."""
    sys.modules["torchdiffeq"] = module
    sys.path.insert(0, str(folder))
    tally = Tally()
    with warnings.catch_warnings():
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
    options = parser.parse_args()
    if not list(options.folder.glob(options.files)):
        parser.error(f"{options.folder} has no {options.files}")
    module: ModuleType = compiled_module() if options.compiled else rampde_fx.torchdiffeq
    if options.theirs:
        import torchdiffeq as module
    torch.set_num_threads(1)
    print("\n".join(table(run(options.folder.resolve(), module, options.files, options.only))))


if __name__ == "__main__":
    main()
