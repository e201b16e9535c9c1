"""A loop, rolled up into one step: one type for each phase, which holds what the passes so far have found.

A pass takes a loop of one phase and gives one of the next, so that a type checker refuses passes in another order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, Generic, TypeVar, assert_never

import torch
from torch import fx, nn

from rampde_fx.errors import UnsupportedLoopError
from rampde_fx.ir import graphs
from rampde_fx.ir.ends import Adjoint, Inputs, Results, Slot, StateSlot
from rampde_fx.policy import PrecisionPolicy
from rampde_fx.runtime.step_control import Controller
from rampde_fx.schedules import Activations, EveryKthState, EveryStep, MemoryBudget, SqrtSegments
from rampde_fx.torch_private import shapes

T = TypeVar("T")


@dataclass(frozen=True)
class Fallback:
    """Something of a velocity that stayed in float32, or in the state's dtype, and why."""

    operation: str
    reason: str
    count: int


@dataclass(frozen=True, kw_only=True)
class Loop:
    """N equal steps of one loop, as roll_loop makes it.

    The step maps (carries, per-step inputs, invariants, corrections) to (next carries, per-step outputs, stored
    values, next corrections). Its adjoint runs over the steps from the last to the first. Passes take a Loop and return
    another; the graph that holds it is touched by roll_loop, emit_loop and emit_search alone.

    Attributes:
        policy: How to rewrite it.
        steps: N, the number of steps: symbolic where t's length is, or where the number is computed from the times.
        where: The user's source line of the loop.
        number: 1 for the first loop of its line in a graph, 2 for the second, and so on.
        marked: The number of the marked loop in the graph of which it is a run, from 0.
        step: The step as a functional ATen graph with true metadata.
        plain: The step as it was captured, before any pass.
        carries: Number of carried states, the first placeholders and the first results of the step.
        per_step: Number of per-step inputs, the placeholders after the carries.
        plain_needs_grad: For each placeholder of the plain step, whether its gradient is wanted.
        needs_grad: For each placeholder of the step, whether its gradient is wanted; corrections left out. It differs
            from the former once hoist_invariants has replaced invariants.
        differentiated: Whether a backward can be asked for.
        monitored: Whether a monitor was open where it was captured.
        autocast: Whether torch.autocast may be on where it, or its backward, stands.
        controller: What chooses the sizes of adaptive steps, in the loop that searches for them: its one step is tried
            again and again, and its per-step outputs are estimates of its error. None for other loops.
        evaluations: How often odeint evaluates the velocity in a step; None of a loop over steps(t).
        named: Of an odeint which of the step's results is each of the next states, and each value that is collected, in
            the order in which the solver names them; -1 where the loop does not give it.
        estimates: Of a search how many of its per-step outputs its controller reads: the errors, then the decisions
            (the user's own norm of them, an event). What the loop behind it collects comes next.
        method: Which method an odeint is of, and what its steps are; empty of a loop over steps(t).
        captured: Of a loop over steps(t), how many iterations were captured, or why all of them.
        budget: How many bytes of activations it may keep, where its policy leaves that to a budget of memory.
        keeps: Of how many evaluations it keeps the activations, where that was chosen before, in other dtypes.
        notes: Sentences for the report.
    """

    policy: PrecisionPolicy
    steps: int | torch.SymInt
    where: str
    step: fx.GraphModule
    plain: fx.GraphModule
    carries: int
    per_step: int
    plain_needs_grad: tuple[bool, ...]
    needs_grad: tuple[bool, ...]
    differentiated: bool
    number: int = 1
    marked: int = 0
    monitored: bool = False
    autocast: bool = False
    controller: Controller | None = None
    evaluations: int | None = None
    named: tuple[int, ...] = ()
    estimates: int = 0
    method: str = ""
    captured: str = ""
    budget: int | None = None
    keeps: int | None = None
    notes: tuple[str, ...] = ()

    def then(self, phase: type[Phase], **found: Any) -> Phase:
        """The loop in another phase, with what a pass found for its fields."""
        return phase(**{field.name: getattr(self, field.name) for field in fields(self)} | found)

    @property
    def name(self) -> str:
        """The file and line of its head, numbered from the second loop of that line on."""
        line = self.where.partition(", in ")[0] or "an unknown line"
        return line if self.number == 1 else f"{line} ({self.number})"

    def parts(self) -> dict[str, fx.GraphModule]:
        """The graphs of the loop by name: its step and, as far as there are any, what stands beside it."""
        return {"step": self.step}

    @property
    def first_invariant(self) -> int:
        """Index of the first invariant among the step's placeholders: what is before it differs from step to step."""
        return self.carries + self.per_step

    def divided(self, values: Sequence[T]) -> Inputs[T]:
        """Values in the order of the step's placeholders, with or without corrections, by what they are."""
        first, last = self.first_invariant, len(self.needs_grad)
        return Inputs(values[: self.carries], values[self.carries : first], values[first:last], values[last:])

    def inputs(self) -> Inputs[fx.Node]:
        """The step's placeholders."""
        return self.divided(graphs.placeholders(self.step))

    def results(self) -> Results[Any]:
        """What the step returns."""
        found, (stored, corrections) = graphs.results(self.step), self.tail()
        last = len(found) - corrections
        first = last - stored
        return Results(found[: self.carries], found[self.carries : first], found[first:last], found[last:])

    def tail(self) -> tuple[int, int]:
        """How many of the step's last results are stored values, and corrections behind these."""
        return 0, 0

    def segment(self) -> int | torch.SymInt:
        """K, the number of steps from one stored state to the next: from 1 to N."""
        match self.policy.schedule:
            case EveryStep() | Activations() | MemoryBudget():
                return 1
            case EveryKthState(length):
                return min(length, self.steps) if isinstance(self.steps, int) else length
            case SqrtSegments():
                if shapes.is_data_dependent(self.steps):
                    raise UnsupportedLoopError(
                        'checkpoint="sqrt" with a number of steps that is computed from the times',
                        required="a number of steps that the shape of the times tells",
                        fix='use an int instead of "sqrt", or rampde_fx.odeint with options={"num_steps": n}',
                        where=self.where,
                    )
                return graphs.ceil_sqrt(self.steps)
            case _:
                assert_never(self.policy.schedule)

    @property
    def unrolled(self) -> bool:
        """Whether it is emitted step by step rather than as a scan."""
        if self.policy.loop == "unroll" and shapes.is_data_dependent(self.steps):
            raise UnsupportedLoopError(
                'loop="unroll" with a number of steps that is computed from the times',
                required="a number of steps that the shape of the times tells",
                fix='leave loop out, or use rampde_fx.odeint with options={"num_steps": n}',
                where=self.where,
            )
        return self.policy.unrolls(self.steps)


Phase = TypeVar("Phase", bound=Loop)


@dataclass(frozen=True, kw_only=True)
class HoistedLoop(Loop):
    """Behind hoist_invariants.

    Attributes:
        preamble: What depends on invariants alone: maps the captured invariants to those of the step, or None.
    """

    preamble: fx.GraphModule | None = None

    def parts(self) -> dict[str, fx.GraphModule]:
        """The graphs of the loop by name."""
        before = {} if self.preamble is None else {"preamble": self.preamble}
        return before | super().parts()


class WidenedLoop(HoistedLoop):
    """Behind widen_parameters: gradients of all inputs are as wide as the accumulation dtype."""


class PartitionedLoop(WidenedLoop):
    """Behind partition_velocity: every node of the step has a role."""


@dataclass(frozen=True, kw_only=True)
class LoweredLoop(PartitionedLoop):
    """Behind lower_velocity.

    Attributes:
        evaluation_names: The velocity submodule that each evaluation of a step calls, in order; equal ones share one.
        low_operations: How many operations of the step's evaluations are in the velocity dtype.
        fallbacks: What stayed in float32, or in the state's dtype.
    """

    evaluation_names: tuple[str, ...] = ()
    low_operations: int = 0
    fallbacks: tuple[Fallback, ...] = ()

    @property
    def stays_wide(self) -> bool:
        """Whether nothing is evaluated in the half precision that its policy asks for."""
        return self.policy.dtype.itemsize < 4 and self.low_operations == 0

    @property
    def evaluations_per_step(self) -> int:
        """How often a step evaluates the velocity; of a loop over steps(t), the number of calls of its submodules."""
        return len(self.evaluation_names) if self.evaluations is None else self.evaluations


@dataclass(frozen=True, kw_only=True)
class CountedLoop(LoweredLoop):
    """Behind count_underflow.

    Attributes:
        counted: Whether the last per-step output counts the entries that underflow in float16, where states enter a
            velocity or are stored.
    """

    counted: bool = False


@dataclass(frozen=True, kw_only=True)
class DifferentiatedLoop(CountedLoop):
    """Behind generate_adjoint.

    Attributes:
        adjoint: The transpose of the step; None without a backward.
    """

    adjoint: Adjoint | None = None

    def parts(self) -> dict[str, fx.GraphModule]:
        """The graphs of the loop by name."""
        return super().parts() | ({} if self.adjoint is None else {"adjoint": self.adjoint.module})


class SummedLoop(DifferentiatedLoop):
    """Behind widen_gradients: the sums of the pullbacks are in float32."""


@dataclass(frozen=True, kw_only=True)
class ScaledLoop(SummedLoop):
    """Behind scale_adjoint.

    Attributes:
        target: The target of the adjoint scaling.
    """

    target: float = 1.0


class WatchedLoop(ScaledLoop):
    """Behind watch_adjoint: the adjoint returns what a monitor records, if one is open."""


@dataclass(frozen=True, kw_only=True)
class KeptLoop(WatchedLoop):
    """Behind keep_activations.

    Attributes:
        slots: What the step stores for the backward, in the order in which it returns it.
        kept: Of how many evaluations, the last ones, the activations are kept.
    """

    slots: tuple[Slot, ...] = ()
    kept: int = 0

    def tail(self) -> tuple[int, int]:
        """How many of the step's last results are stored values, and corrections behind these."""
        return sum(slot.parts for slot in self.slots), 0

    def parts(self) -> dict[str, fx.GraphModule]:
        """The graphs of the loop by name."""
        names, states = graphs.placeholders(self.step), [s for s in self.slots if isinstance(s, StateSlot)]
        loads = {f"load of {names[s.carry].name if s.carry < len(names) else s.carry}": s.load for s in states}
        return super().parts() | loads


class StoredLoop(KeptLoop):
    """Behind store_states: the adjoint reads the step's carries from slots alone."""


@dataclass(frozen=True, kw_only=True)
class CompensatedLoop(StoredLoop):
    """Behind compensate_sums, the last phase.

    Attributes:
        corrections: The carries of the step whose sums are compensated, one correction each.
    """

    corrections: tuple[int, ...] = ()

    def tail(self) -> tuple[int, int]:
        """How many of the step's last results are stored values, and corrections behind these."""
        return super().tail()[0], len(self.corrections)


First = TypeVar("First", bound=Loop)
Last = TypeVar("Last", bound=Loop)
Next = TypeVar("Next", bound=Loop)


class Pipeline(Generic[First, Last]):
    """Passes, each of which takes a loop of the phase that the one before it gives."""

    def __init__(self, *passes: Callable[[Any], Loop]) -> None:
        self.passes = passes

    @classmethod
    def of(cls, step_pass: Callable[[First], Last]) -> Pipeline[First, Last]:
        """A pipeline of one pass."""
        return Pipeline(step_pass)

    def then(self, step_pass: Callable[[Last], Next]) -> Pipeline[First, Next]:
        """The pipeline with another pass at its end."""
        return Pipeline(*self.passes, step_pass)

    def __iter__(self) -> Iterator[Callable[[Any], Loop]]:
        return iter(self.passes)


class LoopNode(nn.Module):
    """Stands for a rolled loop in the captured graph until emit_loop or emit_search replaces it; never called."""

    def __init__(self, loop: Loop) -> None:
        super().__init__()
        self.loop = loop
