"""What a step and its adjoint take and give: by name, instead of by position."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Generic, NamedTuple, TypeVar

from torch import fx

from rampde_fx.ir import graphs

T = TypeVar("T")


class Inputs(NamedTuple, Generic[T]):
    """What a step, or an adjoint, takes: states, what each step has of its own, what all share, corrections."""

    carries: Sequence[T]
    per_step: Sequence[T]
    invariants: Sequence[T]
    corrections: Sequence[T]


class Results(NamedTuple, Generic[T]):
    """What a step, or an adjoint, gives: the next states, per-step outputs, stored values, the next corrections."""

    carries: Sequence[T]
    outputs: Sequence[T]
    stored: Sequence[T]
    corrections: Sequence[T]


@dataclass(frozen=True)
class Cotangent:
    """Taken by an adjoint: the cotangent of a result of the step, by its number."""

    result: int


@dataclass(frozen=True)
class Total:
    """Taken by an adjoint: the sum of an input's gradients over the later steps."""

    operand: int


@dataclass(frozen=True)
class Operand:
    """Taken by an adjoint: an input of the step."""

    operand: int


@dataclass(frozen=True)
class Saved:
    """Taken by an adjoint: a value of a slot."""

    slot: int
    part: int = 0


@dataclass(frozen=True)
class Target:
    """Taken by an adjoint: the target of its scaling."""


AdjointInput = Cotangent | Total | Operand | Saved | Target


@dataclass(frozen=True)
class Gradient:
    """Given by an adjoint: the gradient of an input of the step."""

    operand: int


@dataclass(frozen=True)
class Statistics:
    """Given by an adjoint: what a monitor records of its VJPs."""


@dataclass(frozen=True)
class Vanished:
    """Given by an adjoint: how many entries of scaled cotangents became zero."""


AdjointResult = Gradient | Statistics | Vanished


@dataclass(frozen=True)
class StateSlot:
    """A state that the step stores for the backward.

    Attributes:
        carry: The carry.
        load: Maps the stored values to the carry, in its own dtype.
    """

    carry: int
    load: fx.GraphModule

    @property
    def parts(self) -> int:
        """How many values are stored: the state, and its scale if it has one."""
        return len(graphs.placeholders(self.load))


@dataclass(frozen=True)
class ActivationSlot:
    """A value of a velocity evaluation that the step stores for the backward.

    Attributes:
        evaluation: The name of the evaluation's call in the step.
    """

    evaluation: str
    parts: int = 1


Slot = StateSlot | ActivationSlot


def places(slots: Sequence[Slot]) -> list[Saved]:
    """The values of the slots, in the order in which a step returns them."""
    return [Saved(i, part) for i, slot in enumerate(slots) for part in range(slot.parts)]


@dataclass(frozen=True)
class Evaluation:
    """One velocity evaluation in an adjoint, by the names of nodes.

    Attributes:
        step_call: The call in the step.
        forward: The call in the adjoint that recomputes it; None where nothing is recomputed.
        pullback: The call in the adjoint that maps residuals and cotangents to gradients; None where none is wanted.
        cotangents: How many of the pullback's last operands are cotangents.
        scaled: Whether each of these was multiplied by its scale.
    """

    step_call: str
    forward: str | None
    pullback: str | None
    cotangents: int = 0
    scaled: bool = False


@dataclass(frozen=True)
class Adjoint:
    """The transpose of a step.

    Attributes:
        module: Maps the inputs, then the corrections, to the results, then the next corrections.
        inputs: What it takes, carries first: cotangents of carried states, then totals of invariants.
        results: What it gives, carries first.
        carries: How many of the inputs and of the results are carries.
        evaluations: The velocity evaluations that it transposes, in the order of the step.
        corrections: The carries whose sums are compensated, one correction each.
    """

    module: fx.GraphModule
    inputs: tuple[AdjointInput, ...]
    results: tuple[AdjointResult, ...]
    carries: int
    evaluations: tuple[Evaluation, ...]
    corrections: tuple[int, ...] = ()

    def nodes(self) -> dict[AdjointInput, fx.Node]:
        """The placeholder of each input."""
        return dict(zip(self.inputs, graphs.placeholders(self.module), strict=False))

    def pullbacks(self) -> list[tuple[Evaluation, fx.Node]]:
        """The evaluations with a pullback, and its call."""
        found = {node.name: node for node in self.module.graph.nodes if node.op == "call_module"}
        return [(e, found[e.pullback]) for e in self.evaluations if e.pullback is not None]


def cotangents_of(evaluation: Evaluation, pullback: fx.Node) -> list[fx.Node]:
    """The operands of a pullback's call that are cotangents."""
    return list(pullback.args[len(pullback.args) - evaluation.cotangents :])


def remaining(evaluations: Sequence[Evaluation], module: fx.GraphModule) -> tuple[Evaluation, ...]:
    """The evaluations as far as their calls are still in the adjoint: what nothing reads has been dropped."""
    names = {node.name for node in module.graph.nodes}

    def kept(name: str | None) -> str | None:
        return name if name in names else None

    found = [replace(e, forward=kept(e.forward), pullback=kept(e.pullback)) for e in evaluations]
    return tuple(e for e in found if e.forward or e.pullback)
