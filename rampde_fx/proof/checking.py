"""check(): is the rewrite of this model right, and what does each policy cost in accuracy, memory and time?

First the structure. The user's own code runs uncompiled in float64, on copies of all tensors; the captured graph is
rewritten in float64; both must agree to rounding. Then the numerics: the same errors for each policy, in its dtypes.
"""

from __future__ import annotations

import contextlib
import copy
import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, get_args

import torch
from torch import fx
from torch.utils import _pytree as pytree

from rampde_fx.backend import COMPILERS, rewrite
from rampde_fx.errors import CheckError, PolicyError, RampdeError, RewriteMismatchError
from rampde_fx.ir import graphs
from rampde_fx.ir.captured import STEP, repeats
from rampde_fx.policy import PrecisionPolicy
from rampde_fx.proof.check_graphs import Seeded, always, compile_alone, policies_of
from rampde_fx.proof.check_table import CheckResult, CheckRow, label
from rampde_fx.proof.check_timing import TrainingSteps, timed
from rampde_fx.proof.checked_call import Call, Captured, mean_square, note_on_gradients, tensor_attributes
from rampde_fx.proof.progress import Progress
from rampde_fx.report import explain
from rampde_fx.report.loop_report import LoopReport
from rampde_fx.runtime import counts, random_state
from rampde_fx.runtime.monitoring import monitor
from rampde_fx.schedules import Checkpoint
from rampde_fx.solvers.statistics import SolveStatistics
from rampde_fx.torch_private import capturing
from rampde_fx.torchdiffeq.compared import comparing
from rampde_fx.validation import verification
from rampde_fx.validation.comparison import (
    Mismatch,
    Named,
    Outcome,
    check_dtypes,
    check_float32,
    errors_of,
    first_beyond_float32,
    first_mismatch,
)
from rampde_fx.validation.untouched import untouched
from rampde_fx.validation.widening import AsWritten, Twins, default_dtype

POLICIES = tuple(
    PrecisionPolicy(dtype, checkpoint=checkpoint)
    for checkpoint in get_args(Checkpoint)
    for dtype in (torch.float16, torch.bfloat16)
)
# Up to how many steps the structure is checked step by step as well as as a scan.
MOST_UNROLLED = 8
SEED = 0

Loss = Callable[[Any], torch.Tensor]


def check(
    model: Callable[..., Any],
    *args: Any,
    loss: Loss | None = None,
    policies: Sequence[PrecisionPolicy] | None = None,
    steps: int | None = None,
    compiler: str = "aot_eager",
    time: bool = False,
    progress: bool | None = None,
    **kwargs: Any,
) -> CheckResult:
    """Check the rewrite of a model against its own code in float64, and measure what each policy costs.

    Nothing of the model is changed: parameters, gradients, buffers, modes, random number generators.

    Args:
        model: A Module or a function with marked loops or odeint, marked by mixed_precision or not, compiled or not.
            It has to be captured as one graph.
        *args: Its arguments, of the size to train with. Under torch.no_grad values alone are compared.
        loss: Takes the model's outputs and gives a 0-d loss, whose gradients are compared; where None, the mean square
            of every floating or complex output, summed.
        policies: What to measure, instead of the model's own policy; where None, float16 and bfloat16 with each
            checkpoint mode, and the model's own.
        steps: Take the first steps alone, which bounds memory and time: the first steps + 1 points of the one argument
            that the loops' times come from.
        compiler: What compiles the graphs that are measured: "inductor", "aot_eager" or "eager".
        time: Whether to measure the time of a training step, in turns with eager and compiled float32.
        progress: Whether to print on stderr what it is at, a line per policy; where None, if stderr is a terminal.
        **kwargs: Keyword arguments of the model.

    Returns:
        A CheckResult: print it, or ask for best(error=...).

    Raises:
        RewriteMismatchError: if the rewrite is wrong, naming the tensor and the loop.
        CheckError: if the model cannot be compared, saying why.
        RampdeError: as the backend would, if every policy is refused.
    """
    wanted = _policies(policies, compiler)
    function = capturing.uncompiled(model)
    with untouched(function), random_state.kept_random_state(SEED), counts.apart():
        call = Call(function, args, kwargs)
        if steps is not None:
            call = call.shortened(Captured(call).times(), steps)
        own, told = policies is None, Progress(progress)
        told.tell("capturing the model")
        return _Check(call, wanted, told, with_own=own, loss=loss or mean_square, compiler=compiler, time=time).result()


def _policies(policies: Sequence[PrecisionPolicy] | None, compiler: str) -> list[PrecisionPolicy]:
    chosen = list(POLICIES if policies is None else policies)
    if not chosen or not all(isinstance(policy, PrecisionPolicy) for policy in chosen):
        raise PolicyError(
            f"check(policies={policies!r})",
            required="at least one PrecisionPolicy",
            fix="write policies=[rampde_fx.PrecisionPolicy(torch.float16)], or leave it out",
        )
    if compiler not in COMPILERS:
        raise PolicyError(f"check(compiler={compiler!r})", required=f"one of {COMPILERS}", fix="leave it out")
    return chosen


@dataclass
class _Prepared:
    """A policy, compiled or refused."""

    policy: PrecisionPolicy
    reports: list[LoopReport] = field(default_factory=list)
    watched: Callable[..., Any] | None = None  # records what monitors see
    alone: Callable[..., Any] | None = None
    refusal: RampdeError | None = None

    @property
    def chosen(self) -> PrecisionPolicy:
        """The policy with the dtype that the first loop took, where it leaves that to the device."""
        return replace(self.policy, velocity=self.reports[0].policy.dtype) if self.reports else self.policy


class _Check:
    """The comparison of one call: prepared while the graph is captured, made afterwards."""

    def __init__(
        self,
        call: Call,
        policies: list[PrecisionPolicy],
        progress: Progress,
        *,
        with_own: bool,
        loss: Loss,
        compiler: str,
        time: bool,
    ) -> None:
        self.loss, self.compiler, self.time, self.progress = loss, compiler, time, progress
        self.policies, self.with_own = policies, with_own
        self.twins: list[verification.Twin] = []
        self.prepared: list[_Prepared] = []
        self.notes: list[str] = []
        self.draws = False
        self.others: list[str] = []  # solves that take other steps uncompiled
        self._take(Captured(call, self._prepare))

    def _take(self, captured: Captured) -> None:
        """Run what was captured from now on."""
        self.captured = captured
        known = {id(x) for x in captured.inputs}
        others = [(x, name) for x, name in captured.call.tensors().values() if id(x) not in known]
        self.tensors = [*captured.inputs, *(x for x, _ in others)]
        self.names = [*captured.names, *(name for _, name in others)]

    # --- while torch can compile

    def _prepare(self, graph_module: fx.GraphModule, example_inputs: Sequence[Any]) -> None:
        if self.with_own:
            by_label = {label(policy): policy for policy in [*policies_of(graph_module), *self.policies]}
            self.policies = list(by_label.values())
        wide = any(isinstance(x, torch.Tensor) and x.dtype is torch.float64 for x in example_inputs)
        baseline = PrecisionPolicy(torch.float64 if wide else torch.float32)
        self.baseline = baseline
        for policy in self.progress.each("compiling", dict.fromkeys([baseline, *self.policies]), label):
            self.prepared.append(self._compiled(graph_module, example_inputs, policy))
        accepted = [prepared for prepared in self.prepared if prepared.refusal is None]
        if all(prepared.refusal for prepared in self.prepared if prepared.policy in self.policies):
            raise next(p.refusal for p in self.prepared if p.refusal is not None and p.policy in self.policies)
        for policy, keeps in dict.fromkeys(self._structures(accepted)):
            self.twins.append(verification.Twin(graph_module, rewrite, always(policy), keeps))

    def _structures(self, accepted: list[_Prepared]) -> Iterator[tuple[PrecisionPolicy, tuple[int, ...]]]:
        """The policies in float64 whose structure is checked, with what each loop keeps of its evaluations."""
        for prepared in accepted:
            yield verification.in_float64(prepared.chosen), tuple(loop.kept for loop in prepared.reports)
        kept = (0,) * len(accepted[0].reports)
        first = verification.in_float64(accepted[0].chosen)
        if any(loop.emitted == "unroll" for loop in accepted[0].reports):
            yield replace(first, loop="scan"), kept
        if all(loop.steps is not None and loop.steps <= MOST_UNROLLED for loop in accepted[0].reports):
            yield replace(first, loop="unroll"), kept
        else:
            self.notes.append(f'loop="unroll" was not checked: of more than {MOST_UNROLLED} steps it takes long')

    def _compiled(
        self, graph_module: fx.GraphModule, example_inputs: Sequence[Any], policy: PrecisionPolicy
    ) -> _Prepared:
        found = _Prepared(policy)
        try:
            for monitored in (True, False) if self.time else (True,):
                twin = graphs.copied(graph_module)
                verification.change_policies(twin, always(policy), monitored=monitored)
                reports = explain.rewritten(twin)
                compiled = compile_alone(self.compiler, twin, example_inputs)
                if monitored:
                    found.watched, found.reports = compiled, reports
                else:
                    found.alone = compiled
        except RampdeError as error:
            found.refusal = error
        return found

    # --- afterwards

    def result(self) -> CheckResult:
        """Compare the structure, then measure."""
        self.progress.tell("comparing with the model's own code in float64")
        wanted, rounded = self._references()
        self.notes += note_on_gradients(wanted.gradients, self.loss) + self.captured.note_on_arrays()
        structures = [
            *(self._check_structure(t, wanted, rounded) for t in self.twins),
            *self._check_capture(wanted, rounded),
        ]
        rows = [CheckRow("as it is written, eager", None, *errors_of(wanted, rounded))]
        for prepared in self.progress.each("measuring", self.prepared, lambda prepared: label(prepared.policy)):
            rows.append(self._row(prepared, wanted, rounded))
            gc.collect()  # the graphs of a policy hold its copies of all tensors
        if self.time:
            self.progress.tell("timing, all policies in turns")
            alone = {label(p.policy): p.alone for p in self.prepared if p.alone is not None}
            rows = timed(rows, TrainingSteps(self.captured, self.tensors, self.loss), alone, self.compiler)
        loops = tuple(dict.fromkeys(loop.where for twin in self.twins for loop in twin.loops))
        rows = [replace(row, untrained=self.captured.untrained_times()) for row in rows]
        return CheckResult(tuple(rows), loops, tuple(structures), tuple(self.notes))

    def _references(self) -> tuple[Outcome, Outcome]:
        """The model's own code in float64, and in its own dtypes."""
        twin = self.twins[0]
        rounded = self._eager(widen=False)
        if self.draws:
            return self._random_references(twin)
        captured, narrow = self._captured_references(twin, rolled=False)
        try:
            wanted = self._eager(widen=True)
        except (RuntimeError, TypeError, ValueError) as error:
            mismatch: Mismatch | None = Mismatch("", f"{type(error).__name__}: {str(error).splitlines()[0]}")
            wanted = captured
        else:
            mismatch = first_mismatch(wanted, captured, rounded)
        if mismatch is None:
            return wanted, rounded
        if self.others:
            self.notes.append(
                f"{self.others[0]} takes other steps uncompiled ({mismatch.found}): the reference is the captured "
                "graph in float64, and was not compared with the model's own code"
            )
            return captured, narrow
        # Either the capture is wrong, or this code means something else in float64. In its own dtypes it shows.
        if (wrong := first_beyond_float32(rounded, narrow)) is not None:
            raise RewriteMismatchError(wrong.tensor, wrong.found, twin.loops[0].where)
        self.notes.append(
            f"the model's own code does not mean the same in float64 ({mismatch.found}): the reference is its captured "
            "graph in float64, which agrees with the code in the code's own dtypes to their rounding"
        )
        return captured, rounded

    def _random_references(self, twin: verification.Twin) -> tuple[Outcome, Outcome]:
        """The captured graph with the random numbers of the rewrite."""
        if self._draws_outside(twin):
            raise CheckError(
                "the model draws random numbers outside of its loops, and those of float64 are others",
                required="random numbers inside of the loops alone, or none",
                fix="draw before the call and pass the tensors as arguments, or check model.eval()",
            )
        self.notes.append(
            "the loops draw random numbers: both sides have those of the rewrite, and the draws themselves, and the "
            "steps' capture, were not compared with the model's own code"
        )
        return self._captured_references(twin, rolled=True)

    def _captured_references(self, twin: verification.Twin, *, rolled: bool) -> tuple[Outcome, Outcome]:
        wide, narrow = (
            self._ran(twin.as_written(widen=widen, rolled=rolled).run, widen=widen) for widen in (True, False)
        )
        return wide, narrow

    def _draws_outside(self, twin: verification.Twin) -> bool:
        graph = twin.as_written(widen=True, rolled=True)
        with torch.no_grad():
            self._ran(Seeded(graph.module).run, widen=True)
        return self.draws

    def _eager(self, *, widen: bool) -> Outcome:
        """What the model's own code leaves, on copies of all tensors."""
        function = self.captured.call.function
        called, leaves = verification.inputs_like(self.tensors, widen=widen)
        mode = Twins(self._pairs(called), widen=widen)
        with self._settings(widen), random_state.kept_random_state(SEED) as drew, untouched(function):
            before = tensor_attributes(function)
            with mode, comparing() as self.others:
                tree = pytree.tree_map(mode.of, self.captured.call(mode.of))
                gradients = self._gradients(self.loss(tree), leaves)
            after = tensor_attributes(function)
            self.draws = drew()
        rebound = {name: mode.of(value) for name, value in after.items() if before.get(name) is not value}
        return self._outcome(tree, gradients, called, rebound)

    def _ran(self, function: Callable[..., Any], *, widen: bool) -> Outcome:
        """What a graph leaves, on copies of all tensors."""
        called, leaves = verification.inputs_like(self.tensors, widen=widen)
        count = len(self.captured.inputs)
        with self._settings(widen), random_state.kept_random_state(SEED) as drew:
            tree, rebound = self.captured.outputs(function(*called[:count]), called)
            self.draws = drew()
            with Twins(self._pairs(called), widen=widen):  # a loss may read parameters, too
                value = self.loss(tree)
            gradients = self._gradients(value, leaves)
        return self._outcome(tree, gradients, called, rebound)

    def _pairs(self, called: Sequence[Any]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return [(x, y) for x, y in zip(self.tensors, called, strict=True) if isinstance(x, torch.Tensor)]

    @staticmethod
    def _settings(widen: bool) -> contextlib.AbstractContextManager[None]:
        return default_dtype(torch.float64 if widen else torch.get_default_dtype())

    def _gradients(self, value: torch.Tensor, leaves: Sequence[torch.Tensor | None]) -> Named:
        by = {name: leaf for name, leaf in zip(self.names, leaves, strict=True) if leaf is not None}
        if not (by and torch.is_grad_enabled() and value.requires_grad):
            return dict.fromkeys(by)
        # Not autograd.grad, which leaves a Twins mode: what a backward computes again is the user's code, too.
        torch.autograd.backward(value, inputs=list(by.values()))
        return {name: leaf.grad for name, leaf in by.items()}

    def _outcome(self, tree: Any, gradients: Named, called: Sequence[Any], rebound: dict[str, Any]) -> Outcome:
        # Statistics tell how a solution was found: a run that finds it in another way has others.
        paths = pytree.tree_flatten_with_path(tree, is_leaf=lambda value: isinstance(value, SolveStatistics))[0]
        values = {f"output{pytree.keystr(p)}": x.detach() for p, x in paths if isinstance(x, torch.Tensor)}
        left = {n: x for n, x in zip(self.names, called, strict=True) if n not in self.captured.arrays} | rebound
        return Outcome(values, gradients, {n: x.detach() for n, x in left.items() if isinstance(x, torch.Tensor)})

    def _check_structure(self, twin: verification.Twin, wanted: Outcome, rounded: Outcome) -> str:
        """Raise what differs in float64; the policy whose structure was checked."""

        def compare(rewritten: fx.GraphModule) -> Mismatch | None:
            return first_mismatch(wanted, self._ran(AsWritten(rewritten).run, widen=True), rounded)

        if (mismatch := compare(twin.rewritten)) is not None:
            raise twin.mismatch_error(mismatch, compare)
        return label(twin.loops[0].policy)

    def _check_capture(self, wanted: Outcome, rounded: Outcome) -> list[str]:
        """Raise what differs where the model's loops are captured once, as the backend has them."""
        if self.draws or not any(node.target in STEP for node in graphs.all_nodes(self.captured.graph)):
            return []
        again, twins = copy.copy(self), list[verification.Twin]()

        def prepare(graph_module: fx.GraphModule, _: Sequence[Any]) -> AsWritten | None:
            if not repeats(graph_module):
                return None
            twins.append(verification.Twin(graph_module, rewrite, always(self.baseline)))
            return twins[0].as_written(widen=False, rolled=True)

        with contextlib.suppress(RampdeError):  # then the backend captures the model as it is above
            again._take(Captured(self.captured.call, prepare, once=True))
        if again.captured is self.captured or not twins:
            return []
        got = again._ran(twins[0].as_written(widen=True, rolled=True).run, widen=True)
        if (mismatch := first_mismatch(wanted, got, rounded)) is not None:
            raise RewriteMismatchError(mismatch.tensor, mismatch.found, twins[0].loops[0].where)
        return ["captured once"]

    def _row(self, prepared: _Prepared, wanted: Outcome, rounded: Outcome) -> CheckRow:
        if prepared.watched is None or prepared.refusal is not None:
            return CheckRow(label(prepared.policy), prepared.policy, {}, {}, refusal=str(prepared.refusal))
        with counts.apart() as (counted, _), monitor() as watched:
            got = self._ran(prepared.watched, widen=False)
        where = prepared.reports[0].where
        check_dtypes(got, rounded, where)
        if prepared.policy == self.baseline:
            check_float32(got, wanted, rounded, where)
        records = watched.records
        return CheckRow(
            label(prepared.policy),
            prepared.policy,
            *errors_of(wanted, got),
            stored_bytes=sum(loop.stored_bytes for loop in prepared.reports),
            repeated=sum(count.repeated for count in counted.values()),
            overflowed=sum(count.overflowed for count in counted.values()),
            underflows=sum(int(record.underflows.sum()) for record in records),
            overflows=sum(int(record.overflows.sum()) for record in records),
        )
