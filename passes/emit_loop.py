"""Emit the loop: one node with a forward and a backward inside, each a scan over the step or its adjoint.

Before:  y_T = loop(y_0, t, dt, w)
After:   y_T = autograd_function_apply(forward, backward, y_0, t, dt, w)
         forward:   y_T, stored = scan(step, y_0, (t, dt), (w,));  return y_T, (stored, dt, w)
         backward:  repeat: a_0, dw = scan(adjoint, (a_T, 0), N - 1 ... 0, (stored, dt, w)) at a lower target,
                    until the gradients are finite or the attempts are used up

Weight casts and what else depends on invariants alone leave the scans' bodies: they run once per call, and once more
in the backward. Gradients of invariants are accumulated in their dtype. Where no gradient is wanted only the forward's
scan is emitted, and nothing is stored. The overflow flag is read once per attempt, on the host; an incoming cotangent
that is not finite passes through and is not tried again.

Where the policy asks for segments of K steps, both scans are nested: rampde_fx/emit/segments.py.

Requires: a Loop whose adjoint, if any, has its storage dtypes.
Ensures:  results in the user's dtypes; what is saved is what the step stores, and operands of the loop; autocast is off
          inside.
Source:   arXiv 2510.23498.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, assert_never

import torch
from torch import fx

from rampde_fx.emit.autocast import without_autocast
from rampde_fx.emit.gradients import Found, finite, smallest, usable, zeros_among
from rampde_fx.emit.kept_steps import KeptSteps
from rampde_fx.emit.lasting import emit_call, lasts, make_again
from rampde_fx.emit.recurrence import Body, at, emit_preamble, iterate, repeat_while
from rampde_fx.emit.segments import Recomputation, Segments
from rampde_fx.ir import graphs, tracing
from rampde_fx.ir.ends import (
    Adjoint,
    AdjointInput,
    Cotangent,
    Gradient,
    Inputs,
    Operand,
    Results,
    Saved,
    StateSlot,
    Statistics,
    Target,
    Total,
    Vanished,
    places,
)
from rampde_fx.ir.loops import CompensatedLoop
from rampde_fx.policy import AdjointScaling
from rampde_fx.torch_private import fake_tensors
from rampde_fx.torch_private.higher_order import autograd_function_apply

RETRY = 2.0**-8  # by which the target falls after an overflow


def emit_loop(
    graph_module: fx.GraphModule, call: fx.Node, loop: CompensatedLoop, kept: KeptSteps | None = None
) -> None:
    """Replace the call of a LoopNode by the rewritten loop, which reads its steps where a search has kept them."""
    name, operands = str(call.target), emit_preamble(graph_module, call, loop)
    used = [user.args[1] for user in call.users if user.users]
    with graph_module.graph.inserting_before(call):
        further = [] if kept is None else kept.given(graph_module, call)
        operands += further
        emitted = _Emission(loop, used, kept, [graphs.value(node) for node in further])
        graph_module.add_submodule(f"{name}_forward", emitted.forward)
        if emitted.backward is None:
            apply = emit_call(graph_module, f"{name}_forward", operands, loop)
            new = graph_module.graph.call_function(operator.getitem, (apply, 0))
        else:
            graph_module.add_submodule(f"{name}_backward", emitted.backward)
            invariants = range(loop.first_invariant, len(operands) - len(further))
            emitted.make_again([i for i in invariants if lasts(operands[i])])
            bodies = [graph_module.graph.get_attr(f"{name}_{part}") for part in ("forward", "backward")]
            settings = {
                "non_differentiable_idx": emitted.constant_results,
                "saved_for_backward_idx": list(range(emitted.saved)),
            }
            new = graph_module.graph.call_function(autograd_function_apply, (*bodies, *operands), settings)
    call.replace_all_uses_with(new)
    graph_module.graph.erase_node(call)


class _Emission:
    """The forward and the backward of one loop as GraphModules."""

    def __init__(
        self, loop: CompensatedLoop, used: Sequence[int], kept_steps: KeptSteps | None, further: list[torch.Tensor]
    ) -> None:
        self.loop, self.used, self.kept_steps, self.further = loop, used, kept_steps, len(further)
        self.inputs = graphs.placeholders(loop.step)[: len(loop.needs_grad)]
        results = loop.results()
        self.outputs, self.stored = results.outputs, results.stored
        self.slots = [loop.slots[place.slot] for place in places(loop.slots)]  # of each stored value
        in_segments, recomputed = loop.slots and loop.segment() != 1, list[int]()
        self.segments = Segments(loop) if in_segments else None
        if self.segments is not None:
            self.recomputation = Recomputation(loop)
            results, recomputed = results._replace(stored=[]), self.recomputation.operands
        self.step = Body(loop.step, loop.inputs(), results, loop.corrections)
        inputs = loop.adjoint.inputs if loop.adjoint is not None else ()
        read = (entry.operand for entry in inputs if isinstance(entry, Operand))
        self.reread = list(dict.fromkeys([*read, *recomputed]))  # operands of the loop that the backward reads
        self.saved = len(self.stored) + len(self.reread)
        with_gradient = {entry.result for entry in inputs if isinstance(entry, Cotangent)}
        count = loop.carries + len(self.outputs)
        self.constant_results = [j for j in range(count) if j not in with_gradient]
        operands = [self._operand(i) for i in range(len(self.inputs))]
        names = [*(node.name for node in self.inputs), *(f"kept_{i}" for i in range(self.further))]
        self.forward = self._trace(self._run_forward, [*operands, *further], names)
        self.backward = None if loop.adjoint is None else self._trace_backward(loop.adjoint, operands)

    def make_again(self, lasting: Sequence[int]) -> None:
        """Have the backward make again what follows from invariants alone that live on, operands of the loop."""
        inputs = graphs.placeholders(self.forward)
        make_again(self.forward, [inputs[i] for i in lasting])
        reread = zip(reversed(self.reread), reversed(graphs.placeholders(self.backward)), strict=False)
        make_again(self.backward, [node for i, node in reread if i in lasting])

    def _trace(self, function: Callable[..., Any], values: list[Any], names: list[str]) -> fx.GraphModule:
        traced = graphs.named(tracing.trace(function, values, gradients=False), names)
        return without_autocast(traced, self.loop)

    def is_per_step(self, i: int) -> bool:
        """Whether an operand of the loop is a stack, of a value for each step."""
        return self.loop.carries <= i < self.loop.first_invariant

    def _operand(self, i: int) -> Any:
        per_step = self.is_per_step(i)
        return self._stacked(self.inputs[i]) if per_step else graphs.value(self.inputs[i])

    def _stacked(self, node: fx.Node, count: int | torch.SymInt | None = None) -> torch.Tensor:
        value, count = graphs.value(node), self.loop.steps if count is None else count
        with fake_tensors.fake_mode(), torch.no_grad():
            return torch.empty((count, *value.shape), dtype=value.dtype, device=value.device)

    def _result(self, j: int) -> torch.Tensor:
        carried = j < self.loop.carries
        return graphs.value(self.inputs[j]) if carried else self._stacked(self.outputs[j - self.loop.carries])

    def _run_forward(self, *operands: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        operands, further = operands[: len(self.inputs)], operands[len(self.inputs) :]
        given = self.loop.divided(operands)
        per_step = list(given.per_step)
        if self.kept_steps is not None:
            finals, outputs, stored = self.kept_steps.read(further, per_step[0])
            # The note reads what was kept, which the forward has to take: a backward could not a second time.
            results = self._results(finals, outputs, [*stored, *outputs, *per_step])
            return results, (*stored, *(operands[i] for i in self.reread))
        starts, invariants = self.step.starts(given.carries), self.step.prepare(given.invariants)
        if self.segments is not None:
            finals, outputs, stored = self.segments.advance(self.step, self.recomputation, starts, per_step, invariants)
        else:
            finals, stacks = self.iterate(self.step, starts, per_step, invariants)
            outputs, stored = stacks[: len(self.outputs)], stacks[len(self.outputs) :]
        return self._results(finals, outputs, per_step), (*stored, *(operands[i] for i in self.reread))

    def _results(self, finals: list[Any], outputs: list[Any], stacks: list[Any]) -> tuple[Any, ...]:
        """The results, the smallest of those that are read behind a note of the run: a zero that is added."""
        results, counts = [*finals[: self.loop.carries], *outputs], outputs[-1].sum(0) if self.loop.counted else None
        read = {j: results[j] for j in self.used if graphs.has_derivatives(results[j].dtype)}
        if read and (number := self.number_of_steps(stacks)) is not None:
            j, each, record = smallest(read), self.loop.evaluations_per_step, torch.ops.rampde_fx.record_forward
            each = 0 if self.kept_steps is not None else each
            results[j] = results[j] + record(results[j], *number, each, counts, self.loop.name)
        return tuple(results)

    def number_of_steps(self, stacks: list[Any]) -> tuple[torch.Tensor | None, int] | None:
        """N as a stack of this length, or as a number; None where neither is there."""
        if isinstance(self.loop.steps, int):
            return None, self.loop.steps
        return (stacks[0], 0) if stacks else None

    def iterate(
        self, body: Callable[..., list[Any]], starts: list[Any], per_step: list[Any], invariants: list[Any]
    ) -> tuple[list[Any], list[Any]]:
        """All steps of a body(*carries, *slices, *invariants), as the policy says."""
        return iterate(body, starts, per_step, invariants, steps=self.loop.steps, unrolled=self.loop.unrolled)

    def _trace_backward(self, adjoint: Adjoint, operands: list[Any]) -> fx.GraphModule:
        loop = self.loop
        results = [self._result(j) for j in range(loop.carries + len(self.outputs))]
        names = [f"adjoint_{node.name}" for node in self.inputs[: loop.carries]]
        names += [f"cotangent_{j}" for j in range(len(self.outputs))]
        names += [f"stored_{self.inputs[s.carry].name}" if isinstance(s, StateSlot) else "kept" for s in self.slots]
        names += [self.inputs[i].name for i in self.reread]
        count = loop.steps if self.segments is None else self.segments.count()
        stored = [self._stacked(node, count) for node in self.stored]
        values = [*results, *stored, *(operands[i] for i in self.reread)]
        return self._trace(_Backward(self, adjoint).run, values, names)


Given = dict[AdjointInput, Any]  # stacks of all steps, where a step has a value of its own


class _Backward:
    """The reverse loop, and its repetition after an overflow."""

    def __init__(self, emission: _Emission, adjoint: Adjoint) -> None:
        self.emission, self.loop, self.adjoint = emission, emission.loop, adjoint
        self.runs: torch.Tensor | None = None  # how often the reverse loop ran, where that is decided on the way
        # The adjoint reads: its carries, what a step has of its own, and what is the same in all steps.
        varying = adjoint.inputs[adjoint.carries :]
        self.inputs: Inputs[AdjointInput] = Inputs(
            adjoint.inputs[: adjoint.carries],
            [entry for entry in varying if self._is_stepwise(entry)],
            [entry for entry in varying if not self._is_stepwise(entry)],
            [],
        )
        self.gradients = [entry for entry in adjoint.results if isinstance(entry, Gradient)]
        self.body = self._body()

    def _body(self) -> Body:
        nodes, given = self.adjoint.nodes(), graphs.results(self.adjoint.module)
        corrections = graphs.placeholders(self.adjoint.module)[len(nodes) :]
        last = len(self.adjoint.results)
        carries, per_step, invariants = ([nodes[entry] for entry in group] for group in self.inputs[:3])
        return Body(
            self.adjoint.module,
            Inputs(carries, per_step, invariants, corrections),
            Results(given[: self.adjoint.carries], given[self.adjoint.carries : last], [], given[last:]),
            self.adjoint.corrections,
        )

    def _is_stepwise(self, entry: AdjointInput) -> bool:
        match entry:
            case Cotangent() | Saved():
                return True
            case Operand(i):
                return i < self.loop.first_invariant
            case Total() | Target():
                return False
            case _:
                assert_never(entry)

    def run(self, *args: Any) -> tuple[Any, ...]:
        """One gradient, or None, for each operand of the loop."""
        emission = self.emission
        entries: list[AdjointInput] = [Cotangent(j) for j in range(self.loop.carries + len(emission.outputs))]
        entries += [*places(self.loop.slots), *map(Operand, emission.reread)]
        given: Given = dict(zip(entries, args, strict=True))
        scaling = self.loop.policy.adjoint_scaling if Target() in self.adjoint.inputs else None
        # Cotangents may share memory (slices of a cat, one tensor for a sum). Neither a scan nor the while loop of the
        # repetition takes two views of one tensor: all but the first are cloned.
        cotangents = [entry for entry in self.adjoint.inputs if isinstance(entry, Cotangent)]
        if scaling is None:
            cotangents = [] if self.loop.unrolled else [e for e in cotangents if e in self.inputs.per_step]
        given.update({entry: given[entry].clone() for entry in cotangents[1:]})
        fits = self._stored_states_fit([given[place] for place in places(self.loop.slots)])
        gradients = self._once(given) if scaling is None else self._retry(given, scaling, fits)
        gradients = self._noted(usable(gradients, fits), given)
        return (*(gradients.get(Gradient(i)) for i in range(len(emission.inputs))), *[None] * emission.further)

    def _noted(self, gradients: Found, given: Given) -> Found:
        """The gradients, the smallest of them behind a note of the run."""
        first = self.loop.first_invariant
        stacks = [given[entry] for entry in given if isinstance(entry, Operand) and entry.operand < first]
        number = self.emission.number_of_steps(stacks)
        carries = self.loop.plain_needs_grad[: self.loop.carries]
        read = {
            entry: gradients[entry]
            for entry in self.gradients
            if entry.operand >= len(carries) or carries[entry.operand]
        }
        if not read or number is None:
            return gradients
        entry, each, record = smallest(read), self.loop.evaluations_per_step, torch.ops.rampde_fx.record_backward
        noted = gradients[entry] + record(gradients[entry], *number, each, self.runs, self.loop.name)
        return {**gradients, entry: noted}

    def _once(self, given: Given) -> Found:
        found = self._sweep(given)
        statistics = found.pop(Statistics(), None)
        values = self._recorded(list(found.values()), statistics, torch.zeros((), dtype=torch.int64))
        return dict(zip(found, values, strict=True))

    def _recorded(self, values: list[Any], statistics: torch.Tensor | None, attempt: torch.Tensor) -> list[Any]:
        """The values, behind a record of a sweep's statistics if there are any; what is not read is not computed."""
        if statistics is None:
            return values
        return list(torch.ops.rampde_fx.record_adjoint(values, statistics, attempt, self.loop.name))

    def _stored_states_fit(self, stored: list[torch.Tensor]) -> torch.Tensor | None:
        """Whether no state overflowed where it was stored, as a 0-d bool; None where the range is the state's own."""
        narrow = [
            value
            for value, slot in zip(stored, self.emission.slots, strict=True)
            if isinstance(slot, StateSlot)
            and value.dtype is torch.float16
            and graphs.value(self.emission.inputs[slot.carry]).dtype is not torch.float16
        ]
        return torch.stack([value.ne(value).any() for value in narrow]).any().logical_not() if narrow else None

    def _sweep(self, given: Given) -> Found:
        """The reverse loop: what the adjoint gives."""
        fixed = self.body.prepare([given[entry] for entry in self.inputs.invariants])
        stacks = [given[entry] for entry in self.inputs.per_step]
        starts = self.body.starts([self._start(entry, given) for entry in self.inputs.carries])
        if self.emission.segments is not None:
            return self._sweep_segments(self.emission.segments, given, starts, fixed)

        def body(*args: Any) -> list[Any]:
            carries, index, rest = args[: len(starts)], args[len(starts)], args[len(starts) + 1 :]
            slices = [at(stack, index) for stack in rest[: len(stacks)]]
            return self.body(*carries, *slices, *rest[len(stacks) :][: len(fixed)])

        like = stacks[0] if stacks else starts[0]
        reverse = torch.arange(self.loop.steps - 1, -1, -1, device=like.device)
        finals, collected = self.emission.iterate(body, starts, [reverse], [*stacks, *fixed])
        return self._by_result(finals, [stack.flip(0) for stack in collected])

    def _sweep_segments(self, segments: Segments, given: Given, starts: list[Any], fixed: list[Any]) -> Found:
        """The reverse loop, one segment after the other recomputed."""
        recomputation, first = self.emission.recomputation, self.loop.first_invariant
        operands = {i: given[Operand(i)] for i in recomputation.operands}
        stored, entries = places(self.loop.slots), self.inputs.per_step
        finals, collected, fits = segments.sweep(
            self.body,
            starts,
            own=([given[entry] for entry in entries if not isinstance(entry, Saved)], fixed),
            recomputed=[stored.index(entry) if isinstance(entry, Saved) else None for entry in entries],
            recomputation=recomputation,
            stored=[given[place] for place in stored],
            operands=(
                [value for i, value in operands.items() if i < first],
                recomputation.body.prepare([value for i, value in operands.items() if i >= first]),
            ),
            fit=self._stored_states_fit,
        )
        return usable(self._by_result(finals, collected), fits)

    def _by_result(self, finals: list[Any], collected: list[Any]) -> Found:
        return dict(zip(self.adjoint.results, [*finals[: self.adjoint.carries], *collected], strict=True))

    def _start(self, entry: AdjointInput, given: Given) -> torch.Tensor:
        if isinstance(entry, Total):
            return self._zeros(entry.operand, given)
        return given[entry]

    def _zeros(self, i: int, given: Given) -> torch.Tensor:
        """A gradient of operand i to begin with. Only for symbolic sizes the operand is read: it would be saved."""
        value = graphs.value(self.emission.inputs[i])
        steps = [self.loop.steps] if self.emission.is_per_step(i) else []
        like = given.get(Cotangent(i) if i < self.loop.carries else Operand(i))
        if like is not None and not all(isinstance(size, int) for size in [*steps, *value.shape]):
            return torch.zeros_like(like, memory_format=torch.contiguous_format)
        return torch.zeros([*steps, *value.shape], dtype=value.dtype, device=value.device)

    def _retry(self, given: Given, scaling: AdjointScaling, fits: torch.Tensor | None) -> Found:
        """Sweep at a falling target until the gradients are finite."""
        entries, tensors, order = list(given), list(given.values()), self.gradients
        incoming = [given[entry] for entry in self.adjoint.inputs if isinstance(entry, Cotangent)]
        usable = finite(incoming)
        usable = usable if fits is None else usable & fits
        target = torch.full((), self.loop.target, dtype=torch.float32, device=incoming[0].device)
        empty = [self._zeros(entry.operand, given) for entry in order]
        # The attempt and the flag live on the host: reading the flag is the one synchronisation of the backward.
        start = [torch.zeros((), dtype=torch.int64), torch.ones((), dtype=torch.bool), target, *empty]

        def again(attempt: torch.Tensor, overflow: torch.Tensor, *_: Any) -> torch.Tensor:
            return overflow & (attempt < scaling.max_attempts)

        def sweep(attempt: torch.Tensor, overflow: torch.Tensor, target: torch.Tensor, *rest: Any) -> tuple[Any, ...]:
            before, operands = rest[: len(order)], rest[len(order) : len(order) + len(entries)]
            usable = rest[len(order) + len(entries)]
            result = self._sweep({**dict(zip(entries, operands, strict=True)), Target(): target.clone()})
            # No target is below 0, and the result is always chosen. But a choice between two tensors has the strides of
            # the first: those of what is carried, though Inductor may lay a convolution's cotangents out anew.
            found = [torch.where(target < 0, old, result[entry]) for old, entry in zip(before, order, strict=True)]
            vanished = result[Vanished()].sum() if Vanished() in result else torch.zeros_like(target)
            told = [usable & ~finite(found), vanished, zeros_among(found)]
            outcome = torch.stack([number.to(torch.float32) for number in told]).to("cpu")
            overflow = torch.ops.rampde_fx.record_sweep(outcome, attempt, scaling.max_attempts, self.loop.name)
            (overflow,) = self._recorded([overflow], result.get(Statistics()), attempt)
            return attempt + 1, overflow, target * RETRY, *found

        results = repeat_while(again, sweep, start, [*tensors, usable])
        self.runs = results[0]
        return dict(zip(order, results[3:], strict=True))
