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

Requires: a Loop whose adjoint, if any, has its storage dtypes.
Ensures:  results in the user's dtypes; what is saved is the stored carries, and operands of the loop.
Source:   arXiv 2510.23498.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from rampde_fx import graphs, torch_private
from rampde_fx.loop import Loop
from rampde_fx.policy import AdjointScaling
from rampde_fx.torch_private import autograd_function_apply, scan_op, while_loop_op

aten = torch.ops.aten
RETRY = 2.0**-8  # by which the target falls after an overflow


def emit_loop(graph_module: fx.GraphModule, call: fx.Node, loop: Loop) -> None:
    """Replace the call of a LoopNode by the rewritten loop."""
    name, operands = str(call.target), list(call.args)
    with graph_module.graph.inserting_before(call):
        if loop.preamble is not None:
            operands = _emit_preamble(graph_module, f"{name}_preamble", operands, loop)
        emitted = _Emission(loop)
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


def _emit_preamble(graph_module: fx.GraphModule, name: str, operands: list[Any], loop: Loop) -> list[Any]:
    varying, invariants = operands[: loop.first_invariant()], operands[loop.first_invariant() :]
    graph_module.add_submodule(name, loop.preamble)
    call = graph_module.graph.call_module(name, tuple(invariants))
    count = len(graphs.results(loop.preamble))
    return [*varying, *(graph_module.graph.call_function(operator.getitem, (call, i)) for i in range(count))]


class _Body:
    """A step or adjoint as the body of a scan: flat, with what depends on invariants alone split off."""

    def __init__(self, graph_module: fx.GraphModule, first_invariant: int) -> None:
        values = [graphs.value(node) for node in graphs.placeholders(graph_module)]
        flat = torch_private.trace(fx.Interpreter(graph_module).run, values, gradients=False)
        for node in flat.graph.nodes:
            if graphs.stops_gradient(node):
                node.replace_all_uses_with(node.args[0])
        flat = graphs.named(torch_private.deduplicated(flat), [n.name for n in graphs.placeholders(graph_module)])
        _fold_casts(flat)
        split = graphs.split_invariants(flat, first_invariant)
        self.preamble: fx.GraphModule | None = split[0] if split else None
        self.body = split[1] if split else flat

    def prepare(self, invariants: Sequence[Any]) -> list[Any]:
        """What the body reads of the invariants, computed once."""
        return list(invariants) if self.preamble is None else list(fx.Interpreter(self.preamble).run(*invariants))

    def __call__(self, *args: Any) -> list[Any]:
        return list(fx.Interpreter(self.body).run(*args))


def _fold_casts(body: fx.GraphModule) -> None:
    """A cast up and back down again is nothing."""
    cast = aten._to_copy.default
    for node in list(body.graph.nodes):
        wide = node.args[0] if node.target is cast and list(node.kwargs) == ["dtype"] else None
        if isinstance(wide, fx.Node) and wide.target is cast and list(wide.kwargs) == ["dtype"]:
            narrow = wide.args[0]
            low, high = graphs.value(narrow).dtype, graphs.value(wide).dtype
            if graphs.value(node).dtype == low and torch.promote_types(low, high) == high:
                node.replace_all_uses_with(narrow)
    body.graph.eliminate_dead_code()
    body.recompile()


class _Emission:
    """The forward and the backward of one loop as GraphModules."""

    def __init__(self, loop: Loop) -> None:
        self.loop = loop
        self.inputs = graphs.placeholders(loop.step)
        self.outputs = graphs.results(loop.step)[loop.carries :]
        self.unrolled = loop.policy.unrolls(loop.steps)
        self.step = _Body(loop.step, loop.first_invariant())
        read = [index for kind, index in loop.adjoint_inputs if kind == "operand"]
        self.kept = [index for index in read if index >= loop.carries]
        self.saved = len(loop.stored) + len(self.kept)
        self.constant_results = self._constant_results()
        operands = [self._operand(i) for i in range(len(self.inputs))]
        self.forward = self._trace(self._run_forward, operands, [node.name for node in self.inputs])
        self.backward = self._trace_backward(operands) if loop.adjoint is not None else None

    def _trace(self, function: Callable[..., Any], values: list[Any], names: list[str]) -> fx.GraphModule:
        traced = torch_private.trace(function, values, gradients=False)
        return graphs.named(traced, names)

    def _constant_results(self) -> list[int]:
        with_gradient = {index for kind, index in self.loop.adjoint_inputs if kind == "cotangent"}
        return [j for j in range(self.loop.carries + len(self.outputs)) if j not in with_gradient]

    def _operand(self, i: int) -> Any:
        value = graphs.value(self.inputs[i])
        per_step = self.loop.carries <= i < self.loop.first_invariant()
        return self._stacked(value, value.dtype) if per_step else value

    def _stacked(self, value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        with torch_private.fake_mode(), torch.no_grad():
            return torch.empty((self.loop.steps, *value.shape), dtype=dtype, device=value.device)

    def _result(self, j: int) -> torch.Tensor:
        carried = j < self.loop.carries
        value = graphs.value(self.inputs[j] if carried else self.outputs[j - self.loop.carries])
        return value if carried else self._stacked(value, value.dtype)

    def _run_forward(self, *operands: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        loop, first = self.loop, self.loop.first_invariant()
        invariants = self.step.prepare(operands[first:])
        widths = list(zip(loop.stored, loop.stored_dtypes, strict=True))

        def body(*args: Any) -> list[Any]:
            results = self.step(*args[: first + len(invariants)])
            stored = [args[i].to(dtype) for i, dtype in widths]
            fresh = [v.clone() if v is args[i] else v for v, (i, _) in zip(stored, widths, strict=True)]
            return [*map(_own, results), *fresh]

        starts = [operand.clone(memory_format=torch.contiguous_format) for operand in operands[: loop.carries]]
        finals, stacks = self._iterate(body, starts, list(operands[loop.carries : first]), invariants)
        outputs, stored = stacks[: len(self.outputs)], stacks[len(self.outputs) :]
        return (*finals, *outputs), (*stored, *(operands[i] for i in self.kept))

    def _iterate(
        self, body: Callable[..., list[Any]], starts: list[Any], per_step: list[Any], invariants: list[Any]
    ) -> tuple[list[Any], list[Any]]:
        """Final carries and stacked outputs of a body(*carries, *slices, *invariants)."""
        if not self.unrolled:
            symbols = _symbols([*starts, *per_step, *invariants])
            count = [] if per_step else [torch.arange(self.loop.steps, device=starts[0].device)]  # scan asks for one
            results = scan_op(
                lambda *args: body(*args[: len(starts)], *args[len(starts) + len(count) :]),
                starts,
                [*per_step, *count],
                additional_inputs=(*invariants, *symbols),
            )
            return list(results[: len(starts)]), list(results[len(starts) :])
        carries, collected = starts, []
        for k in range(self.loop.steps):
            results = body(*carries, *(values[k] for values in per_step), *invariants)
            carries = results[: len(starts)]
            collected.append(results[len(starts) :])
        return carries, [torch.stack(values) for values in zip(*collected, strict=True)]

    def _trace_backward(self, operands: list[Any]) -> fx.GraphModule:
        loop = self.loop
        results = [self._result(j) for j in range(loop.carries + len(self.outputs))]
        stored = [
            self._stacked(graphs.value(self.inputs[i]), dtype)
            for i, dtype in zip(loop.stored, loop.stored_dtypes, strict=True)
        ]
        names = [f"adjoint_{node.name}" for node in self.inputs[: loop.carries]]
        names += [f"cotangent_{j}" for j in range(len(self.outputs))]
        names += [f"stored_{self.inputs[i].name}" for i in loop.stored] + [self.inputs[i].name for i in self.kept]
        values = [*results, *stored, *(operands[i] for i in self.kept)]
        return self._trace(_Backward(self).run, values, names)


class _Backward:
    """The reverse loop, and its repetition after an overflow."""

    def __init__(self, emission: _Emission) -> None:
        self.emission, self.loop = emission, emission.loop
        self.kinds = self.loop.adjoint_inputs
        first = self.loop.first_invariant()
        # The adjoint reads: carried cotangents, what a step has of its own, and what is the same in all steps.
        self.carried = [p for p, (kind, i) in enumerate(self.kinds) if kind == "cotangent" and i < self.loop.carries]
        self.stepwise = [
            p
            for p, (kind, i) in enumerate(self.kinds)
            if p not in self.carried and (kind == "cotangent" or (kind == "operand" and i < first))
        ]
        self.fixed = [p for p in range(len(self.kinds)) if p not in self.carried and p not in self.stepwise]
        order = [*self.carried, *self.stepwise, *self.fixed]
        self.body = _Body(_reordered(self.loop.adjoint, order), len(self.carried) + len(self.stepwise))
        self.summed = [i for i in self.loop.adjoint_results if i >= first]

    def run(self, *args: Any) -> tuple[Any, ...]:
        """One gradient, or None, for each operand of the loop."""
        loop, outputs = self.loop, self.loop.carries + len(self.emission.outputs)
        given: dict[tuple[str, int], Any] = {("cotangent", j): args[j] for j in range(outputs)}
        given.update(
            {("operand", i): v for i, v in zip((*loop.stored, *self.emission.kept), args[outputs:], strict=True)}
        )
        scaling = loop.policy.adjoint_scaling if ("target", 0) in self.kinds else None
        fits = self._stored_states_fit(given)
        gradients = self._sweep(given) if scaling is None else self._repeat(given, scaling, fits)
        if fits is not None:  # a velocity may saturate at inf, and hide the overflow from its gradients
            gradients = {i: torch.where(fits, gradient, torch.nan) for i, gradient in gradients.items()}
        return tuple(gradients.get(i) for i in range(len(self.emission.inputs)))

    def _stored_states_fit(self, given: dict[tuple[str, int], Any]) -> torch.Tensor | None:
        """Whether no state overflowed where it was stored, as a 0-d bool; None where the range is the state's own."""
        narrow = [
            i for i, dtype in zip(self.loop.stored, self.loop.stored_dtypes, strict=True) if dtype is torch.float16
        ]
        return _finite([given["operand", i] for i in narrow]) if narrow else None

    def _sweep(self, given: dict[tuple[str, int], Any]) -> dict[int, Any]:
        """The reverse loop: gradients by operand."""
        fixed = self.body.prepare([given[self.kinds[p]] for p in self.fixed])
        stacks = [given[self.kinds[p]] for p in self.stepwise]
        starts = [given[self.kinds[p]].clone(memory_format=torch.contiguous_format) for p in self.carried]
        sums = [self._zeros(i, given) for i in self.summed]
        n, first = len(self.carried), self.loop.first_invariant()

        def body(*args: Any) -> list[Any]:
            adjoints, totals, index = args[:n], args[n : n + len(sums)], args[n + len(sums)]
            rest = args[n + len(sums) + 1 :]
            slices = [_at(stack, index) for stack in rest[: len(stacks)]]
            gradients = dict(
                zip(
                    self.loop.adjoint_results,
                    self.body(*adjoints, *slices, *rest[len(stacks) :][: len(fixed)]),
                    strict=True,
                )
            )
            grown = [total + gradients.pop(i) for total, i in zip(totals, self.summed, strict=True)]
            carried = [_own(g) for i, g in gradients.items() if i < self.loop.carries]
            return [*carried, *grown, *(_own(g) for i, g in gradients.items() if i >= self.loop.carries)]

        like = stacks[0] if stacks else starts[0]
        reverse = torch.arange(self.loop.steps - 1, -1, -1, device=like.device)
        finals, collected = self.emission._iterate(body, [*starts, *sums], [reverse], [*stacks, *fixed])
        stepwise = [i for i in self.loop.adjoint_results if self.loop.carries <= i < first]
        carries = [i for i in self.loop.adjoint_results if i < self.loop.carries]
        found = dict(zip([*carries, *self.summed], finals, strict=True))
        found.update({i: stack.flip(0) for i, stack in zip(stepwise, collected, strict=True)})
        return found

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
        order = self.loop.adjoint_results
        target = torch.full((), scaling.target, dtype=torch.float32, device=incoming[0].device)
        empty = [self._zeros(i, given) for i in order]
        # The attempt and the flag live on the host: reading the flag is the one synchronisation of the backward.
        start = [torch.zeros((), dtype=torch.int64), torch.ones((), dtype=torch.bool), target, *empty]
        symbols = _symbols(tensors)

        def again(attempt: torch.Tensor, overflow: torch.Tensor, *_: Any) -> torch.Tensor:
            return overflow & (attempt < scaling.max_attempts)

        def sweep(attempt: torch.Tensor, overflow: torch.Tensor, target: torch.Tensor, *rest: Any) -> tuple[Any, ...]:
            operands = dict(zip(keys, rest[len(order) : len(order) + len(keys)], strict=True))
            usable = rest[len(order) + len(keys)]
            gradients = self._sweep({**operands, ("target", 0): target.clone()})
            found = [gradients[i] for i in order]
            overflow = (usable & ~_finite(found)).to("cpu")
            return attempt + 1, overflow, target * RETRY, *found

        results = while_loop_op(again, sweep, tuple(start), (*tensors, usable, *symbols))
        return dict(zip(order, results[3:], strict=True))


def _reordered(adjoint: fx.GraphModule, order: list[int]) -> fx.GraphModule:
    """The adjoint with its placeholders in another order."""
    nodes = graphs.placeholders(adjoint)
    return graphs.extract(adjoint, graphs.body(adjoint), [nodes[p] for p in order], graphs.results(adjoint))


def _own(value: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor that aliases nothing, as scan demands of its results."""
    return value.clone(memory_format=torch.contiguous_format)


def _at(stack: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """The entry of a stack at an index that is known on the device only."""
    return aten.index.Tensor(stack, [index])


def _finite(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Whether all entries of all tensors are finite, as a 0-d bool tensor."""
    return torch.stack([torch.isfinite(tensor).all() for tensor in tensors]).all()


def _symbols(values: list[Any]) -> list[torch.SymInt]:
    """Every symbolic size: Inductor looks for them among a scan's operands only."""
    sizes = (size for value in values if isinstance(value, torch.Tensor) for size in value.shape)
    found: dict[str, torch.SymInt] = {}
    for size in sizes:
        if isinstance(size, torch.SymInt):
            found.setdefault(str(size), size)
    return list(found.values())
