"""Emit the loop: one node with a forward and a backward inside, each a scan over the step or its adjoint.

Before:  y_T = loop(y_0, t, dt, w)
After:   y_T = autograd_function_apply(forward, backward, y_0, t, dt, w)
         forward:   y_T, stored = scan(step, y_0, (t, dt), (w,));  return y_T, (stored, dt, w)
         backward:  repeat: a_0, dw = scan(adjoint, (a_T, 0), N - 1 ... 0, (stored, dt, w)) at a lower target,
                    until the gradients are finite or the attempts are used up

Weight casts and whatever else depends on invariants alone leave the scans' bodies: they run once per call. Gradients
of invariants are accumulated in the invariants' dtype. Where no gradient is wanted only the forward's scan is emitted,
and nothing is stored. The overflow flag is read once per attempt, on the host; an incoming cotangent that is not
finite passes through and is not tried again.

Where the policy asks for segments of K steps, both scans are nested: rampde_fx/segments.py.

Requires: a Loop whose adjoint, if any, has its storage dtypes.
Ensures:  results in the user's dtypes; what is saved is what the step stores, and operands of the loop.
Source:   arXiv 2510.23498.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from rampde_fx import graphs, torch_private
from rampde_fx.loop import VANISHED, WATCHED, Loop
from rampde_fx.policy import AdjointScaling
from rampde_fx.recurrence import Body, at, emit_preamble, iterate, repeat
from rampde_fx.scales import are_finite
from rampde_fx.segments import Recomputation, Segments
from rampde_fx.torch_private import autograd_function_apply

RETRY = 2.0**-8  # by which the target falls after an overflow


def emit_loop(graph_module: fx.GraphModule, call: fx.Node, loop: Loop) -> None:
    """Replace the call of a LoopNode by the rewritten loop."""
    name, operands = str(call.target), emit_preamble(graph_module, call, loop)
    used = [user.args[1] for user in call.users if user.users]
    with graph_module.graph.inserting_before(call):
        emitted = _Emission(loop, used)
        graph_module.add_submodule(f"{name}_forward", emitted.forward)
        if emitted.backward is None:
            apply = graph_module.graph.call_module(f"{name}_forward", tuple(operands))
            new = graph_module.graph.call_function(operator.getitem, (apply, 0))
        else:
            graph_module.add_submodule(f"{name}_backward", emitted.backward)
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

    def __init__(self, loop: Loop, used: Sequence[int]) -> None:
        self.loop, self.used = loop, used
        self.inputs = graphs.placeholders(loop.step)[: len(loop.needs_grad)]
        self.outputs, self.stored = loop.step_outputs()
        self.segments, step, recomputed = self._segments(), loop.step, []
        if self.segments is not None:
            self.recomputation = Recomputation(loop)
            step, recomputed = self._without_stored(step), self.recomputation.operands
        self.step = Body(
            step, range(len(self.inputs)), loop.first_invariant(), loop.carries, corrections=loop.corrections
        )
        read = (index for kind, index in loop.adjoint_inputs if kind == "operand")
        self.kept = list(dict.fromkeys([*read, *recomputed]))
        self.saved = len(self.stored) + len(self.kept)
        self.constant_results = self._constant_results()
        operands = [self._operand(i) for i in range(len(self.inputs))]
        self.forward = self._trace(self._run_forward, operands, [node.name for node in self.inputs])
        self.backward = self._trace_backward(operands) if loop.adjoint is not None else None

    def _segments(self) -> Segments | None:
        return Segments(self.loop) if self.loop.stored and self.loop.segment() != 1 else None

    def _without_stored(self, step: fx.GraphModule) -> fx.GraphModule:
        results, first = graphs.results(step), self.loop.carries + len(self.outputs)
        wanted = [*results[:first], *results[first + len(self.stored) :]]
        return graphs.part(step, graphs.placeholders(step), wanted)

    def _trace(self, function: Callable[..., Any], values: list[Any], names: list[str]) -> fx.GraphModule:
        traced = torch_private.trace(function, values, gradients=False)
        return graphs.named(traced, names)

    def _constant_results(self) -> list[int]:
        with_gradient = {index for kind, index in self.loop.adjoint_inputs if kind == "cotangent"}
        return [j for j in range(self.loop.carries + len(self.outputs)) if j not in with_gradient]

    def _operand(self, i: int) -> Any:
        per_step = self.loop.carries <= i < self.loop.first_invariant()
        return self._stacked(self.inputs[i]) if per_step else graphs.value(self.inputs[i])

    def _stacked(self, node: fx.Node, count: int | torch.SymInt | None = None) -> torch.Tensor:
        value, count = graphs.value(node), self.loop.steps if count is None else count
        with torch_private.fake_mode(), torch.no_grad():
            return torch.empty((count, *value.shape), dtype=value.dtype, device=value.device)

    def _result(self, j: int) -> torch.Tensor:
        carried = j < self.loop.carries
        return graphs.value(self.inputs[j]) if carried else self._stacked(self.outputs[j - self.loop.carries])

    def _run_forward(self, *operands: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        carries, first = self.loop.carries, self.loop.first_invariant()
        starts, invariants = self.step.starts(operands[:carries]), self.step.prepare(operands[first:])
        per_step = list(operands[carries:first])
        if self.segments is not None:
            finals, outputs, stored = self.segments.advance(self.step, self.recomputation, starts, per_step, invariants)
        else:
            finals, stacks = self.iterate(self.step, starts, per_step, invariants)
            outputs, stored = stacks[: len(self.outputs)], stacks[len(self.outputs) :]
        results = [*finals[:carries], *outputs]
        self._record_forward(results, per_step, outputs[-1].sum(0) if self.loop.counted else None)
        return tuple(results), (*stored, *(operands[i] for i in self.kept))

    def _record_forward(self, results: list[Any], stacks: list[Any], counts: torch.Tensor | None) -> None:
        """Note the run, by a zero that is added to the smallest result that is read."""
        read = {j: results[j] for j in self.used if graphs.has_derivatives(results[j].dtype)}
        if read and (number := self.number_of_steps(stacks)) is not None:
            j, each, record = _smallest(read), self.loop.evaluations_per_step, torch.ops.rampde_fx.record_forward
            results[j] = results[j] + record(results[j], *number, each, counts, self.loop.name)

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

    def _trace_backward(self, operands: list[Any]) -> fx.GraphModule:
        loop = self.loop
        results = [self._result(j) for j in range(loop.carries + len(self.outputs))]
        names = [f"adjoint_{node.name}" for node in self.inputs[: loop.carries]]
        names += [f"cotangent_{j}" for j in range(len(self.outputs))]
        names += ["kept" if i is None else f"stored_{self.inputs[i].name}" for i in loop.stored]
        names += [self.inputs[i].name for i in self.kept]
        count = loop.steps if self.segments is None else self.segments.count()
        stored = [self._stacked(node, count) for node in self.stored]
        values = [*results, *stored, *(operands[i] for i in self.kept)]
        return self._trace(_Backward(self).run, values, names)


class _Backward:
    """The reverse loop, and its repetition after an overflow."""

    def __init__(self, emission: _Emission) -> None:
        self.emission, self.loop = emission, emission.loop
        self.runs: torch.Tensor | None = None  # how often the reverse loop ran, where that is decided on the way
        self.kinds = self.loop.adjoint_inputs
        # The adjoint reads: its carries, what a step has of its own, and what is the same in all steps.
        self.carried = list(range(self.loop.adjoint_carries))
        varying = [p for p in range(len(self.kinds)) if p not in self.carried]
        self.stepwise = [p for p in varying if self._is_stepwise(*self.kinds[p])]
        self.fixed = [p for p in varying if p not in self.stepwise]
        self.body = Body(
            self.loop.adjoint,
            [*self.carried, *self.stepwise, *self.fixed],
            len(self.carried) + len(self.stepwise),
            len(self.carried),
            corrections=self.loop.adjoint_corrections,
        )

    def _is_stepwise(self, kind: str, index: int) -> bool:
        return kind in ("cotangent", "stored") or (kind == "operand" and index < self.loop.first_invariant())

    def run(self, *args: Any) -> tuple[Any, ...]:
        """One gradient, or None, for each operand of the loop."""
        emission, outputs = self.emission, self.loop.carries + len(self.emission.outputs)
        kinds = [("cotangent", j) for j in range(outputs)]
        kinds += [("stored", p) for p in range(len(emission.stored))] + [("operand", i) for i in emission.kept]
        given = dict(zip(kinds, args, strict=True))
        # Of two stacks that the user joined these are slices, and a scan takes no two of one.
        if not self.loop.unrolled:
            stacks = [self.kinds[p] for p in self.stepwise if self.kinds[p][0] == "cotangent"]
            given.update({kind: given[kind].clone() for kind in stacks[1:]})
        scaling = self.loop.policy.adjoint_scaling if ("target", 0) in self.kinds else None
        fits = self._stored_states_fit([given["stored", p] for p in range(len(emission.stored))])
        gradients = self._once(given) if scaling is None else self._repeat(given, scaling, fits)
        gradients = self._noted(_usable(gradients, fits), given)
        return tuple(gradients.get(i) for i in range(len(emission.inputs)))

    def _noted(self, gradients: dict[int, Any], given: dict[tuple[str, int], Any]) -> dict[int, Any]:
        """The gradients, the smallest of them behind a note of the run."""
        stacks = [given[key] for key in given if key[0] == "operand" and key[1] < self.loop.first_invariant()]
        number = self.emission.number_of_steps(stacks)
        carries = self.loop.plain_needs_grad[: self.loop.carries]
        read = {i: gradient for i, gradient in gradients.items() if i >= len(carries) or carries[i]}
        if not read or number is None:
            return gradients
        i, each, record = _smallest(read), self.loop.evaluations_per_step, torch.ops.rampde_fx.record_backward
        return {**gradients, i: gradients[i] + record(gradients[i], *number, each, self.runs, self.loop.name)}

    def _once(self, given: dict[tuple[str, int], Any]) -> dict[int, Any]:
        gradients = self._sweep(given)
        statistics = gradients.pop(WATCHED, None)
        values = self._recorded(list(gradients.values()), statistics, torch.zeros((), dtype=torch.int64))
        return dict(zip(gradients, values, strict=True))

    def _recorded(self, values: list[Any], statistics: torch.Tensor | None, attempt: torch.Tensor) -> list[Any]:
        """The values, behind a record of a sweep's statistics if there are any; what is not read is not computed."""
        if statistics is None:
            return values
        return list(torch.ops.rampde_fx.record_adjoint(values, statistics, attempt, self.loop.name))

    def _stored_states_fit(self, stored: list[torch.Tensor]) -> torch.Tensor | None:
        """Whether no state overflowed where it was stored, as a 0-d bool; None where the range is the state's own."""
        narrow = [
            value
            for value, i in zip(stored, self.loop.stored, strict=True)
            if i is not None
            and value.dtype is torch.float16
            and graphs.value(self.emission.inputs[i]).dtype is not torch.float16
        ]
        return torch.stack([value.isnan().any() for value in narrow]).any().logical_not() if narrow else None

    def _sweep(self, given: dict[tuple[str, int], Any]) -> dict[int, Any]:
        """The reverse loop: gradients by operand."""
        fixed = self.body.prepare([given[self.kinds[p]] for p in self.fixed])
        stacks = [given[self.kinds[p]] for p in self.stepwise]
        starts = self.body.starts([self._start(*self.kinds[p], given) for p in self.carried])
        if self.emission.segments is not None:
            return self._sweep_segments(self.emission.segments, given, starts, fixed)

        def body(*args: Any) -> list[Any]:
            carries, index, rest = args[: len(starts)], args[len(starts)], args[len(starts) + 1 :]
            slices = [at(stack, index) for stack in rest[: len(stacks)]]
            return self.body(*carries, *slices, *rest[len(stacks) :][: len(fixed)])

        like = stacks[0] if stacks else starts[0]
        reverse = torch.arange(self.loop.steps - 1, -1, -1, device=like.device)
        finals, collected = self.emission.iterate(body, starts, [reverse], [*stacks, *fixed])
        return self._by_operand(finals, [stack.flip(0) for stack in collected])

    def _sweep_segments(
        self, segments: Segments, given: dict[tuple[str, int], Any], starts: list[Any], fixed: list[Any]
    ) -> dict[int, Any]:
        """The reverse loop, one segment after the other recomputed."""
        recomputation, first = self.emission.recomputation, self.loop.first_invariant()
        operands = {i: given["operand", i] for i in recomputation.operands}
        kinds = [self.kinds[p] for p in self.stepwise]
        finals, collected, fits = segments.sweep(
            self.body,
            starts,
            own=([given[kind] for kind in kinds if kind[0] != "stored"], fixed),
            recomputed=[index if kind == "stored" else None for kind, index in kinds],
            recomputation=recomputation,
            stored=[given["stored", p] for p in range(len(self.emission.stored))],
            operands=(
                [value for i, value in operands.items() if i < first],
                recomputation.body.prepare([value for i, value in operands.items() if i >= first]),
            ),
            fit=self._stored_states_fit,
        )
        return _usable(self._by_operand(finals, collected), fits)

    def _by_operand(self, finals: list[Any], collected: list[Any]) -> dict[int, Any]:
        return dict(zip(self.loop.adjoint_results, [*finals[: len(self.carried)], *collected], strict=True))

    def _start(self, kind: str, index: int, given: dict[tuple[str, int], Any]) -> torch.Tensor:
        return given[kind, index] if kind == "cotangent" else self._zeros(index, given)

    def _zeros(self, i: int, given: dict[tuple[str, int], Any]) -> torch.Tensor:
        """A gradient of operand i to begin with, made from what the backward has: sizes may be symbolic."""
        like = given.get(("cotangent", i) if i < self.loop.carries else ("operand", i))
        if like is not None:
            return torch.zeros_like(like, memory_format=torch.contiguous_format)
        value = graphs.value(self.emission.inputs[i])
        steps = [self.loop.steps] if i < self.loop.first_invariant() else []
        return torch.zeros([*steps, *value.shape], dtype=value.dtype, device=value.device)

    def _repeat(
        self, given: dict[tuple[str, int], Any], scaling: AdjointScaling, fits: torch.Tensor | None
    ) -> dict[int, Any]:
        """Sweep at a falling target until the gradients are finite."""
        keys, tensors = list(given), list(given.values())
        incoming = [given[kind] for kind in self.kinds if kind[0] == "cotangent"]
        usable = _finite(incoming)
        usable = usable if fits is None else usable & fits
        order = [i for i in self.loop.adjoint_results if i not in (VANISHED, WATCHED)]
        target = torch.full((), self.loop.target, dtype=torch.float32, device=incoming[0].device)
        empty = [self._zeros(i, given) for i in order]
        # The attempt and the flag live on the host: reading the flag is the one synchronisation of the backward.
        start = [torch.zeros((), dtype=torch.int64), torch.ones((), dtype=torch.bool), target, *empty]

        def again(attempt: torch.Tensor, overflow: torch.Tensor, *_: Any) -> torch.Tensor:
            return overflow & (attempt < scaling.max_attempts)

        def sweep(attempt: torch.Tensor, overflow: torch.Tensor, target: torch.Tensor, *rest: Any) -> tuple[Any, ...]:
            before, operands = rest[: len(order)], rest[len(order) : len(order) + len(keys)]
            usable = rest[len(order) + len(keys)]
            gradients = self._sweep({**dict(zip(keys, operands, strict=True)), ("target", 0): target.clone()})
            # A choice between two tensors has the strides of the first: those of what is carried, though Inductor
            # may lay the cotangents of a convolution's output out anew.
            found = [torch.where(target < 0, old, gradients[i]) for old, i in zip(before, order, strict=True)]
            vanished = gradients[VANISHED].sum() if VANISHED in gradients else torch.zeros_like(target)
            told = [usable & ~_finite(found), vanished, _zeros_among(found)]
            outcome = torch.stack([number.to(torch.float32) for number in told]).to("cpu")
            overflow = torch.ops.rampde_fx.record_sweep(outcome, attempt, scaling.max_attempts, self.loop.name)
            (overflow,) = self._recorded([overflow], gradients.get(WATCHED), attempt)
            return attempt + 1, overflow, target * RETRY, *found

        results = repeat(again, sweep, start, [*tensors, usable])
        self.runs = results[0]
        return dict(zip(order, results[3:], strict=True))


def _smallest(values: dict[int, torch.Tensor]) -> int:
    """The key of the value of the fewest entries; one whose size is known at run time only comes last."""

    def entries(key: int) -> float:
        number = values[key].numel()
        return math.inf if torch_private.is_data_dependent(number) else torch_private.size_hint(number)

    return min(values, key=entries)


def _usable(gradients: dict[int, Any], fits: torch.Tensor | None) -> dict[int, Any]:
    """The gradients, or NaN where a stored state overflowed: a velocity may saturate at inf, and hide it from them."""
    if fits is None:
        return gradients
    counted = (VANISHED, WATCHED)
    return {i: g if i in counted else torch.where(fits, g, torch.nan) for i, g in gradients.items()}


def _zeros_among(tensors: list[torch.Tensor]) -> torch.Tensor:
    """How many tensors have no entry but zeros, as a 0-d tensor; empty ones left out."""
    return torch.stack([(tensor == 0).all() & (tensor.numel() > 0) for tensor in tensors]).sum()


def _finite(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Whether all entries of all tensors are finite, as a 0-d bool tensor."""
    return torch.stack([are_finite(tensor).all() for tensor in tensors]).all()
