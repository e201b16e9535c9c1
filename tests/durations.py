"""Which cases are long: `make test` leaves them to `make test-all`, which writes their list."""

import collections
import os
from pathlib import Path

LIST = Path(__file__).parent / "long_cases.txt"
LIMIT = 3.0  # seconds


def long_cases(seconds):
    """Of cases, with their seconds, those above the limit; of each test function the fastest case is none of them."""
    functions = collections.defaultdict(list)
    for case, took in seconds.items():
        functions[case.partition("[")[0]].append((took, case))
    return {case for cases in functions.values() for took, case in sorted(cases)[1:] if took > LIMIT}


class Recorder:
    """A plugin of pytest that renews the list for the cases that run."""

    def __init__(self):
        self.seconds = collections.Counter()

    def pytest_runtest_logreport(self, report):
        self.seconds[report.nodeid] += report.duration

    def pytest_sessionfinish(self):
        others = set(LIST.read_text().splitlines()) - self.seconds.keys()
        written = LIST.with_suffix(f".{os.getpid()}")
        written.write_text("".join(f"{case}\n" for case in sorted(others | long_cases(self.seconds))))
        written.replace(LIST)
