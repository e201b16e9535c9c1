"""What is told about one loop, as data and as text."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property

from torch import fx

from rampde_fx.ir import pass_log
from rampde_fx.ir.loops import Fallback, Loop
from rampde_fx.policy import PrecisionPolicy
from rampde_fx.policy_text import word_of
from rampde_fx.schedules import Activations, MemoryBudget

SEARCH = "search"  # how a loop is emitted that looks for adaptive steps
OF_SEARCH = "none of its own: that of the loop over the steps that it finds, which is told next"


@dataclass(frozen=True)
class PassReport:
    """A loop after one pass. Passes change no graph in place, so that the graphs are printed only when asked for.

    Attributes:
        name: The name of the pass.
        loop: The loop that it returned.
    """

    name: str
    loop: Loop = field(repr=False)

    @cached_property
    def code(self) -> str:
        """The step, the adjoint, and what stands beside them, as readable code."""
        return pass_log.code(self.loop)


@dataclass(frozen=True)
class LoopReport:
    """One loop as it was rewritten.

    Attributes:
        where: The user's source line of the loop.
        steps: N, the number of steps; None where it is known at run time only.
        policy: The policy in force.
        target: Target of the adjoint scaling, None without scaling or without an adjoint.
        emitted: "scan" or "unroll", or "search" of a loop that looks for adaptive steps.
        method: Of an odeint its method, whether its steps are fixed, adaptive, or those that a search found, and the
            order of what is between them; empty for a loop over steps(t).
        tolerances: Of a search what its steps are chosen by, at the capture: rtol and atol, the order of the error that
            is estimated, the most steps; empty for another loop.
        carries: The carried states as "name: dtype[shape]".
        evaluations: Velocity evaluations per step.
        segment: K, where every K-th step stores something for the backward.
        kept: Of how many of a step's evaluations, the last ones, the activations are stored.
        kept_bytes: Bytes of these that checkpoint="auto" keeps, over all steps; 0 with another.
        budget: How many bytes it might keep, less what earlier loops of the graph keep; None with another.
        stored: What such a step stores, as "name: dtype[shape]".
        stored_bytes: Bytes that the forward stores for the backward, over all steps, or for one where N is unknown.
        stored_bytes_fp32: The same states in the dtype of the state, as an fp32 policy stores them.
        stored_bytes_autograd: Bytes that plain autograd saves for the backward of the same loop, parameters and
            contexts left out.
        step_flops: Floating-point operations of the products in one step, as torch.utils.flop_counter counts them:
            matrix products, convolutions and attention, nothing else.
        adjoint_flops: Those of one step's adjoint, with the velocities that it evaluates again; 0 without an adjoint.
        fallbacks: What stayed in float32, or in the state's dtype, and why.
        captured: How many of the iterations were captured, or what made it necessary to capture all of them; empty for
            an odeint and for loops of three steps and less.
        notes: What else to know, such as iterations that differ.
        step: The rewritten step: (carries, per-step inputs, invariants) to (next carries, per-step outputs).
        adjoint: The generated adjoint of the step, or None where no gradient is wanted.
        passes: The loop after each pass, from roll_loop on.
    """

    where: str
    steps: int | None
    policy: PrecisionPolicy
    target: float | None
    emitted: str
    method: str
    tolerances: str
    carries: tuple[str, ...]
    evaluations: int
    segment: int
    kept: int
    kept_bytes: int
    budget: int | None
    stored: tuple[str, ...]
    stored_bytes: int
    stored_bytes_fp32: int
    stored_bytes_autograd: int
    step_flops: int
    adjoint_flops: int
    fallbacks: tuple[Fallback, ...]
    captured: str
    notes: tuple[str, ...]
    step: fx.GraphModule
    adjoint: fx.GraphModule | None
    passes: tuple[PassReport, ...] = field(repr=False)

    def summary(self) -> str:
        """The loop in one sentence or two."""
        low, reasons = word_of(self.policy.dtype), Counter[str]()
        for fallback in self.fallbacks:
            reasons[fallback.reason] += fallback.count
        count = f"{self.evaluations} evaluation{'s' if self.evaluations != 1 else ''} of the velocity in {low}"
        found = [f"Each step makes {count}."]
        if self.stored_bytes:
            found.append(
                f"{'All steps store' if self.steps else 'It stores'} {self.stored_bytes:,} bytes for the backward "
                f"instead of {self.stored_bytes_autograd:,}."
            )
        if reasons:
            told = "; ".join(f"{count} ({reason})" for reason, count in reasons.most_common(3))
            found.append(f"Operations that stay wide: {told}{'; and others' if len(reasons) > 3 else ''}.")
        return " ".join(found)

    def rows(self) -> list[tuple[str, str]]:
        """What there is to say about the loop as a whole: (label, text)."""
        return [
            ("steps", f"{self.steps or 'known at run time'}, emitted as {self.emitted}"),
            *([("method", self.method)] if self.method else []),
            *([("captured", self.captured)] if self.captured else []),
            *([("adapts to", self.tolerances)] if self.tolerances else []),
            ("carries", ", ".join(self.carries)),
            ("velocity", f"{self.evaluations} evaluations per step in {word_of(self.policy.dtype)}"),
            *(self._rows_of_backward() if self.emitted != SEARCH else [("backward", OF_SEARCH)]),
            ("products per step", f"{self.step_flops:,} FLOP, and {self.adjoint_flops:,} in the adjoint"),
        ]

    def _rows_of_backward(self) -> list[tuple[str, str]]:
        return [
            ("adjoint scaling", "none" if self.target is None else f"dynamic, target {self.target:g}"),
            ("accumulation", self.policy.accumulation),
            ("checkpointing", self._checkpointing()),
            ("stored per step" if self.segment == 1 else "stored per segment", ", ".join(self.stored) or "nothing"),
            (
                "stored in all" if self.steps else "stored in one step",
                f"{self.stored_bytes:,} bytes ({self.stored_bytes_fp32:,} in the dtype of the state;"
                f" plain autograd: {self.stored_bytes_autograd:,})",
            ),
        ]

    def __str__(self) -> str:
        lines = [
            f"{'search of steps' if self.emitted == SEARCH else 'loop'} at {self.where or 'an unknown line'}",
            *(f"  {label:19s} {text}" for label, text in self.rows()),
            "  stayed wide",
            *(f"    {f.count:3d} x {f.operation:24s} {f.reason}" for f in self.fallbacks),
            *(f"  note: {note}" for note in self.notes),
        ]
        return "\n".join(lines)

    def _checkpointing(self) -> str:
        if isinstance(self.policy.schedule, Activations):
            return "none: the velocity's activations are stored"
        if isinstance(self.policy.schedule, MemoryBudget) and self.kept:
            return "auto: the activations that fit are stored, the rest of a step is recomputed from its state"
        if self.segment == 1:
            return "each step is recomputed from its state"
        return f"segments of {self.segment} steps are recomputed from their first state"
