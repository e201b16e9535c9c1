"""What check() found, as a table and as an answer: which policy satisfies a bound."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace
from html import escape
from typing import Any

from rampde_fx.errors import CheckError, PolicyError
from rampde_fx.policy import PrecisionPolicy

COLUMNS = ("policy", "values", "gradients", "worst gradient", "stored", "repeated", "vanished", "overflowed")
TIMES = ("ms", "of eager", "of compiled")
LEGEND = (
    "values, gradients: largest relative error of a result and of a gradient; worst gradient: which that is",
    "stored: bytes kept for the backward; repeated: backward passes that overflowed and ran again",
    "vanished, overflowed: entries of the adjoint; -: not measured",
)
TIMES_LEGEND = "ms: a training step, the median; of eager, of compiled: divided by that in float32, as it is written"


def label(policy: PrecisionPolicy) -> str:
    """A policy as text, less what is so without being said: the same for all policies of the same effect."""
    shortest = policy.filled_in()
    for f in fields(policy):
        default: dict[str, Any] = {f.name: f.default}
        shorter = replace(shortest, **default)
        if shorter.filled_in() == policy.filled_in():
            shortest = shorter
    return str(shortest)


@dataclass(frozen=True)
class CheckRow:
    """What one policy costs. Errors are relative to float64, in the Euclidean norm.

    Attributes:
        name: The policy as text.
        policy: The policy; None for the model as it is written.
        value_errors: The error of each output, and of what the model updates in place.
        gradient_errors: The error of the gradient of each parameter and argument.
        stored_bytes: Bytes that the forward stores for the backward.
        repeated: Backward passes through a loop that ran again because a gradient overflowed.
        overflowed: Those that were not finite after the last attempt.
        underflows: Entries of the adjoint that became zero in the velocity's dtype.
        overflows: Entries of gradients of velocities that were not finite.
        milliseconds: Median time of a training step; NaN where it was not measured, as the next two.
        of_eager: The same over that of eager float32.
        of_compiled: The same over that of the model compiled in float32.
        refusal: Why the policy was refused; empty if it was not.
        untrained: The times that require no gradient where check was called: theirs is told, but counts for no error.
    """

    name: str
    policy: PrecisionPolicy | None
    value_errors: dict[str, float] = field(repr=False)
    gradient_errors: dict[str, float] = field(repr=False)
    stored_bytes: int = 0
    repeated: int = 0
    overflowed: int = 0
    underflows: int = 0
    overflows: int = 0
    milliseconds: float = float("nan")
    of_eager: float = float("nan")
    of_compiled: float = float("nan")
    refusal: str = ""
    untrained: frozenset[str] = frozenset()

    @property
    def value_error(self) -> float:
        """The largest error of a value."""
        return max(self.value_errors.values(), default=0.0)

    @property
    def gradient_error(self) -> float:
        """The largest error of a gradient, but those of untrained times."""
        return max(self._trained().values(), default=0.0)

    @property
    def error(self) -> float:
        """The largest error of all."""
        return max(self.value_error, self.gradient_error)

    @property
    def worst_gradient(self) -> str:
        """Whose gradient has the largest error."""
        errors = self._trained()
        return max(errors, key=errors.__getitem__, default="")

    def _trained(self) -> dict[str, float]:
        return {name: error for name, error in self.gradient_errors.items() if name not in self.untrained}

    @property
    def is_timed(self) -> bool:
        """Whether its time was measured."""
        return not math.isnan(self.milliseconds)

    def cells(self) -> list[str]:
        """The row as text, in the order of COLUMNS and TIMES."""
        if self.refusal:
            return [self.name, "refused", *["-"] * (len(COLUMNS) + len(TIMES) - 2)]
        measured = self.policy is not None
        counted = [f"{n:,}" if measured else "-" for n in (self.repeated, self.underflows, self.overflows)]
        has_errors = bool(self.value_errors)
        return [
            self.name,
            f"{self.value_error:.1e}" if has_errors else "-",
            f"{self.gradient_error:.1e}" if self._trained() else "-",
            self.worst_gradient or "-",
            f"{self.stored_bytes:,}" if measured else "-",
            *counted,
            *(f"{x:.3g}" if self.is_timed else "-" for x in (self.milliseconds, self.of_eager, self.of_compiled)),
        ]


@dataclass(frozen=True)
class CheckResult:
    """What check() found: the rewrite is right, and each policy costs what its row says.

    Attributes:
        rows: The model as it is written, then each policy.
        loops: The user's lines of the loops.
        structures: The policies whose rewrite agrees with the model in float64; "captured once" if its loops agree as
            they are captured without options={"verify": True}.
        notes: What was not compared, and why.
    """

    rows: tuple[CheckRow, ...]
    loops: tuple[str, ...]
    structures: tuple[str, ...]
    notes: tuple[str, ...]

    def best(self, error: float, memory: int | None = None) -> PrecisionPolicy:
        """The policy to train with: the fastest one within the bounds, or where no time was measured the leanest.

        Args:
            error: Bound on the relative errors of all values and gradients.
            memory: Bound on the bytes that are stored for the backward, if any.

        Returns:
            The policy.

        Raises:
            CheckError: if none satisfies both, naming the closest one.
        """
        if not error > 0:
            raise PolicyError(f"best(error={error!r})", required="a positive bound", fix="write best(error=1e-2)")
        accepted = [row for row in self.rows if row.policy is not None and not row.refusal]
        within = [row for row in accepted if row.error <= error and (memory is None or row.stored_bytes <= memory)]
        if not within:
            closest = min(accepted, key=lambda row: self._excess(row, error, memory))
            raise CheckError(
                f"no policy has errors of at most {error:g}" + ("" if memory is None else f" in {memory:,} bytes"),
                required=f"bounds that a policy satisfies; the closest is {closest.name}: error {closest.error:.2g}, "
                f"{closest.stored_bytes:,} bytes",
                fix="raise the bounds, or give check() other policies",
            )
        timed = [row for row in within if row.is_timed]
        chosen = (
            min(timed, key=lambda row: row.milliseconds) if timed else min(within, key=lambda row: row.stored_bytes)
        )
        assert chosen.policy is not None, "rows without a policy were left out"
        return chosen.policy

    @staticmethod
    def _excess(row: CheckRow, error: float, memory: int | None) -> float:
        """By how much a row is beyond its worse bound, as a factor."""
        return max(row.error / error, 0.0 if memory is None else row.stored_bytes / max(memory, 1))

    def __str__(self) -> str:
        header, cells = self._table()
        widths = [max(map(len, column)) for column in zip(header, *cells, strict=True)]
        texts = (0, COLUMNS.index("worst gradient"))
        lines = [
            "  ".join(
                c.ljust(w) if i in texts else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
            )
            for row in (header, *cells)
        ]
        return "\n".join([*self._verdict(), *(line.rstrip() for line in lines), *self._remarks()])

    def _repr_html_(self) -> str:
        header, cells = self._table()
        head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
        body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in cells)
        told = "".join(f"<p>{escape(line)}</p>" for line in (*self._verdict(), *self._remarks()))
        return f"{told}<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"

    def _table(self) -> tuple[list[str], list[list[str]]]:
        count = len(COLUMNS) + (len(TIMES) if self._is_timed() else 0)
        return [*COLUMNS, *TIMES][:count], [row.cells()[:count] for row in self.rows]

    def _is_timed(self) -> bool:
        return any(row.is_timed for row in self.rows)

    def _verdict(self) -> list[str]:
        return [
            *(f"loop at {where or 'an unknown line'}" for where in self.loops),
            f"in float64 the rewrite agrees with the model to rounding, under each of {len(self.structures)} settings",
            "relative errors against float64:",
        ]

    def _remarks(self) -> list[str]:
        refused = [f"{row.name} was refused: {row.refusal.splitlines()[0]}" for row in self.rows if row.refusal]
        legend = [*LEGEND, *([TIMES_LEGEND] if self._is_timed() else [])]
        return [*legend, *(f"note: {note}" for note in (*self.notes, *self._on_times(), *refused))]

    def _on_times(self) -> list[str]:
        """What was left out of the errors of gradients."""
        found = {n: max(row.gradient_errors.get(n, 0.0) for row in self.rows) for n in sorted(self.rows[0].untrained)}
        return [
            f"the gradient of {name} is not among 'gradients', for {name} requires none: its error is at most "
            f"{error:.1e}"
            for name, error in found.items()
        ]
