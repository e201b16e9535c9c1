"""The results of the benchmarks as Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Any

from tests.benchmarks.measure import MIB

# Left out of a table where no contender has them: gradients without eager's beside them, and synchronisations on a CPU.
LAST_COLUMNS = {"gradient_difference": "gradient, against eager", "synchronisations": "synchronisations"}


def markdown(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table whose first column is text, the others numbers."""
    head = list(head)
    lines = [head, ["---", *["--:"] * (len(head) - 1)], *map(list, rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def surroundings(report: dict[str, Any]) -> str:
    """Device, versions and settings in a sentence."""
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    settings = ", ".join(f"{name}: {value}" for name, value in report["settings"].items())
    return f"{report['device']}; {versions}; {settings}; {report['date']}."


def ratios(result: dict[str, Any], baseline: dict[str, Any]) -> list[float]:
    """Round by round, how many times the baseline's time a contender takes."""
    return [own / other for own, other in zip(result["rounds"], baseline["rounds"], strict=True)]


def report(found: dict[str, Any]) -> str:
    """All cases, one table each."""
    parts = [surroundings(found), *(_case(case, found["baseline"]) for case in found["cases"])]
    return "\n\n".join(parts) + "\n"


def _case(case: dict[str, Any], baseline: str) -> str:
    base = case["results"].get(baseline)
    told = {what: any(result[what] is not None for result in case["results"].values()) for what in LAST_COLUMNS}
    head = ["contender", "training step (ms)", "quartiles", f"times {baseline}", "range", "first step (s)"]
    head += ["saved for the backward (MiB)", "peak (MiB)", *(LAST_COLUMNS[what] for what in told if told[what])]
    rows = [_row(name, result, base, told) for name, result in case["results"].items()]
    table = markdown(head, rows)
    skipped = "\n".join(f"- {name}: {reason}" for name, reason in case["skipped"].items())
    return f"### {case['name']}: {case['what']}\n\n{table}" + (f"\n\nNot run:\n{skipped}" if skipped else "")


def _row(name: str, result: dict[str, Any], base: dict[str, Any] | None, told: dict[str, bool]) -> list[str]:
    low, high = (f"{1e3 * q:.3g}" for q in result["quartiles"])
    found = ratios(result, base) if base else []
    difference, waits = result["gradient_difference"], result["synchronisations"]
    last = {
        "gradient_difference": "" if difference is None else f"{difference:.1e}",
        "synchronisations": str(waits),
    }
    return [
        name,
        f"{1e3 * result['seconds']:.3g}",
        f"{low} to {high}",
        f"{statistics.median(found):.2f}" if found else "",
        f"{min(found):.2f} to {max(found):.2f}" if found else "",
        f"{result['first_step']:.1f}",
        f"{result['saved_bytes'] / MIB:.3g}",
        f"{result['peak_bytes'] / MIB:.3g}",
        *(last[what] for what in told if told[what]),
    ]
