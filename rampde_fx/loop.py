"""The intermediate representation: one marked loop, rolled up into one step."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field

import torch
from torch import fx, nn

from rampde_fx import graphs, operators, torch_private
from rampde_fx.errors import UnsupportedLoopError
from rampde_fx.policy import PrecisionPolicy
from rampde_fx.step_control import Controller

STEP = {torch.ops.rampde_fx.step, torch.ops.rampde_fx.step.default}
END = {torch.ops.rampde_fx.end, torch.ops.rampde_fx.end.default, operators.leave, operators.leave_search}
# In place of a placeholder: results of the adjoint that are no gradients.
WATCHED = -1  # what a monitor records
VANISHED = -2  # how many entries of scaled cotangents became zero


@dataclass(frozen=True)
class MarkedLoop:
    """A marked loop in a captured graph, before it is rolled up.

    Attributes:
        policy: The policy that the markers carry.
        markers: The step markers, one per iteration; or the one enter marker of a loop that was captured once.
        end: The end marker, or leave.
        iterations: The nodes between two markers, one list per iteration, in graph order.
        differentiated: Whether gradients are on where the loop stands.
        monitored: Whether a monitor was open where it was captured.
    """

    policy: PrecisionPolicy
    markers: list[fx.Node]
    end: fx.Node
    iterations: list[list[fx.Node]]
    differentiated: bool
    monitored: bool

    @property
    def once(self) -> bool:
        """Whether the one iteration stands for all, its states named by enter and leave."""
        return self.markers[0].target is operators.enter

    @property
    def searches(self) -> bool:
        """Whether the one iteration is tried by a search for adaptive steps."""
        return self.end.target is operators.leave_search

    def holder(self) -> fx.GraphModule:
        """The module in whose graph the loop stands: the captured one, or a checkpointed body inside it."""
        return self.end.graph.owning_module


@dataclass(frozen=True)
class Source:
    """Where an input of an iteration comes from.

    Attributes:
        kind: "carry" (from an earlier iteration; in the first ones from outside), "time" (t_i or dt_i), "per_step"
            (from outside, another value in every iteration), "invariant" (from outside, always the same), or of random
            numbers "index" (of the step) and "seed" (of the loop).
        values: The outside nodes: those that stand in for the earlier iterations of a carry, one per iteration of a
            per-step input, the one invariant; none for the rest.
        key: The value of the earlier iteration that a carry reads, which time, or the device of an index or seed.
    """

    kind: str
    values: tuple[fx.Node, ...]
    key: int | str = ""

    def is_latest_carry(self) -> bool:
        """Whether it is a carry from the iteration just before."""
        return self.kind == "carry" and len(self.values) == 1


@dataclass(frozen=True)
class Run:
    """Consecutive equal iterations of a marked loop.

    A key names a value of an iteration: the position of its node, or "t" and "dt".

    Attributes:
        iterations: The nodes of each iteration, aligned position by position.
        sources: For every position, the source of each node argument, in order; an int or str is a key of the same
            iteration.
        outputs: For every key that is read outside of the run, by which iterations' values.
        entered: Times and carries in the order in which a loop that was captured once names them. Its one iteration
            stands for all, and its outputs are those whose every value is read.
    """

    iterations: list[list[fx.Node]]
    sources: list[list[Source | int | str]]
    outputs: dict[int | str, list[int]]
    entered: tuple[Source, ...] = ()

    @property
    def once(self) -> bool:
        """Whether the one iteration stands for all."""
        return bool(self.entered)

    def stacked(self) -> list[int | str]:
        """Keys of the outputs that are not final carries alone."""
        last = len(self.iterations) - 1
        finals = {s.key for row in self.sources for s in row if isinstance(s, Source) and s.is_latest_carry()}
        return [key for key, ks in self.outputs.items() if self.once or ks != [last] or key not in finals]


@dataclass(frozen=True)
class CapturedStep:
    """One iteration of a run as functional ATen.

    Attributes:
        inputs: The source of every placeholder of the step; carries first.
        step: Maps the inputs to the next carries, then to the outputs; before find_states to further values.
        outputs: Keys of the values that are read outside of the run, apart from final carries.
        after: For every placeholder the node that holds its value after the step (before find_states).
        written: The outside tensors that carries were updated in, by the index of the carry.
    """

    inputs: list[Source]
    step: fx.GraphModule
    outputs: list[int | str]
    after: list[fx.Node]
    written: dict[int, fx.Node] = field(default_factory=dict)

    def carries(self) -> int:
        """Number of carried states."""
        return sum(source.kind == "carry" for source in self.inputs)


def is_marker(node: fx.Node) -> bool:
    """Whether a captured node marks the start of an iteration."""
    return node.target in STEP or node.target is operators.enter


def begins_loop(node: fx.Node) -> bool:
    """Whether a captured node marks the start of a loop's first iteration."""
    return is_marker(node) and (node.target is operators.enter or node.args[1] == 0)


def ends_loop(node: fx.Node) -> bool:
    """Whether a captured node marks the end of a loop."""
    return node.target in END


def reads_end(user: fx.Node) -> bool:
    """Whether a reader of a trajectory reads its last entry alone."""
    index = user.args[1] if user.target is operator.getitem else None
    return index == -1 or (isinstance(index, tuple) and len(index) > 1 and index[0] == -1)


@dataclass(frozen=True)
class Fallback:
    """Something that stayed in the accumulation dtype inside the loop, and why."""

    operation: str
    reason: str
    count: int


@dataclass(frozen=True)
class Loop:
    """N equal steps of one loop.

    The step maps (carries, per-step inputs, invariants, corrections) to (next carries, per-step outputs, stored
    values, next corrections). Its adjoint maps (carries, per-step inputs, invariants, corrections) to (next carries,
    per-step outputs, next corrections), in the reverse order of the steps. Passes take a Loop and return another; the
    graph that holds it is touched by roll_loop and emit_loop alone.

    Attributes:
        policy: How to rewrite it.
        steps: N, the number of steps.
        where: The user's source line of the loop.
        number: 1 for the first loop of its line in a graph, 2 for the second, and so on.
        step: The step as a functional ATen graph with true metadata.
        plain: The step as it was captured, before any pass.
        carries: Number of carried states, the first placeholders and the first results of the step.
        per_step: Number of per-step inputs, the placeholders after the carries.
        plain_needs_grad: For each placeholder of the plain step, whether its gradient is wanted.
        needs_grad: For each placeholder of the step, whether its gradient is wanted.
        preamble: What depends on invariants alone: maps the captured invariants to those of the step, or None.
        differentiated: Whether a backward can be asked for.
        monitored: Whether a monitor was open where it was captured.
        controller: That of a search for adaptive steps: the loop is one step that is tried until it has found them,
            with an estimate of its error for each output. None otherwise.
        adjoint: The transpose of the step, or None before generate_adjoint or without a backward. Its placeholders
            and results are named by adjoint_inputs and adjoint_results.
        adjoint_inputs: One (kind, index) per placeholder of the adjoint, corrections left out. Kinds: "cotangent" of
            a result of the step, "total" of an operand's gradient so far, "operand" (a placeholder of the step),
            "stored" (a stored value), "target" of the scaling.
        adjoint_results: The placeholder of the step whose gradient each result of the adjoint is, WATCHED or VANISHED.
        adjoint_carries: Number of the adjoint's carries: cotangents of carried states and totals of invariants.
        target: The target of the adjoint scaling.
        stored: The carry behind each value that the step returns for the backward, None for one of a velocity.
        load: Maps the stored values to the carries behind them, each once, in their own dtype.
        corrections: The carries of the step whose sums are compensated, one correction each.
        adjoint_corrections: The carries of the adjoint whose sums are compensated.
        counted: Whether the last per-step output counts the entries that underflow where states enter a velocity.
        stages: Names of the velocity submodules in the order of their evaluation.
        evaluations: How often odeint evaluates the velocity in a step; None of a loop over steps(t).
        low_operations: How many operations of the step's evaluations are in the velocity dtype.
        fallbacks: What stayed in the accumulation dtype.
        notes: Sentences for the report.
    """

    policy: PrecisionPolicy
    steps: int
    where: str
    step: fx.GraphModule
    plain: fx.GraphModule
    carries: int
    per_step: int
    plain_needs_grad: tuple[bool, ...]
    needs_grad: tuple[bool, ...]
    differentiated: bool
    number: int = 1
    monitored: bool = False
    controller: Controller | None = None
    preamble: fx.GraphModule | None = None
    adjoint: fx.GraphModule | None = None
    adjoint_inputs: tuple[tuple[str, int], ...] = ()
    adjoint_results: tuple[int, ...] = ()
    adjoint_carries: int = 0
    target: float = 1.0
    stored: tuple[int | None, ...] = ()
    load: fx.GraphModule | None = None
    corrections: tuple[int, ...] = ()
    adjoint_corrections: tuple[int, ...] = ()
    counted: bool = False
    stages: tuple[str, ...] = ()
    evaluations: int | None = None
    low_operations: int = 0
    fallbacks: tuple[Fallback, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The file and line of its head, numbered from the second loop of that line on."""
        line = self.where.partition(", in ")[0] or "an unknown line"
        return line if self.number == 1 else f"{line} ({self.number})"

    @property
    def stays_wide(self) -> bool:
        """Whether nothing of a lowered loop is evaluated in the half precision that its policy asks for."""
        return self.policy.velocity.itemsize < 4 and self.low_operations == 0

    @property
    def evaluations_per_step(self) -> int:
        """How often a step evaluates the velocity; of a loop over steps(t) its parts that are no sums of states."""
        return len(self.stages) if self.evaluations is None else self.evaluations

    def first_invariant(self) -> int:
        """Index of the first invariant among the step's placeholders."""
        return self.carries + self.per_step

    def segment(self) -> int | torch.SymInt:
        """K, the number of steps from one stored state to the next."""
        wanted, steps = self.policy.checkpoint, self.steps
        if wanted in ("step", "none"):
            return 1
        if isinstance(wanted, int):
            return min(wanted, steps) if isinstance(steps, int) else wanted
        if torch_private.is_data_dependent(steps):
            raise UnsupportedLoopError(
                'checkpoint="sqrt" with a number of steps that is computed from the times',
                required="a number of steps that the shape of the times tells",
                fix='use an int instead of "sqrt", or options={"num_steps": n} instead of a step size',
                where=self.where,
            )
        return torch_private.ceil_sqrt(steps)

    @property
    def unrolled(self) -> bool:
        """Whether it is emitted step by step rather than as a scan."""
        if self.policy.loop == "unroll" and torch_private.is_data_dependent(self.steps):
            raise UnsupportedLoopError(
                'loop="unroll" with a number of steps that is computed from the times',
                required="a number of steps that the shape of the times tells",
                fix='leave loop out, or use options={"num_steps": n} instead of a step size or adaptive steps',
                where=self.where,
            )
        return self.policy.unrolls(self.steps)

    def step_outputs(self) -> tuple[list[fx.Node], list[fx.Node]]:
        """What the step returns beside its carries and corrections: per-step outputs, and stored values."""
        results = graphs.results(self.step)[self.carries :]
        first_stored = len(results) - len(self.corrections) - len(self.stored)
        return results[:first_stored], results[first_stored : first_stored + len(self.stored)]


class LoopNode(nn.Module):
    """Stands for a rolled loop in the captured graph until emit_loop replaces it; never called."""

    def __init__(self, loop: Loop) -> None:
        super().__init__()
        self.loop = loop
