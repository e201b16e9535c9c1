"""A graph evaluated N times on its own results: as a scan, or one evaluation after the other."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from rampde_fx.emit import lasting
from rampde_fx.emit.autocast import without_autocast
from rampde_fx.emit.flat import flat
from rampde_fx.ir import graphs
from rampde_fx.ir.ends import Inputs, Results
from rampde_fx.ir.loops import HoistedLoop
from rampde_fx.torch_private import higher_order, shapes
from rampde_fx.torch_private.higher_order import scan_op, while_loop_op

aten = torch.ops.aten


class Body:
    """A step or an adjoint as the body of a loop: flat, with what depends on invariants alone split off.

    Args:
        graph_module: The step or the adjoint.
        inputs: What it takes, placeholders of it.
        results: What it is to give, nodes of it.
        corrected: The carries that have a correction, by number.
    """

    def __init__(
        self,
        graph_module: fx.GraphModule,
        inputs: Inputs[fx.Node],
        results: Results[Any],
        corrected: Sequence[int] = (),
    ) -> None:
        self.corrected = corrected
        varying = [*inputs.carries, *inputs.corrections, *inputs.per_step]
        graph_module = graphs.part(
            graph_module,
            [*varying, *inputs.invariants],
            [*results.carries, *results.corrections, *results.outputs, *results.stored],
        )
        whole = flat(graph_module)
        split = graphs.split_invariants(whole, len(varying))
        self.preamble: fx.GraphModule | None = split[0] if split else None
        self.body = split[1] if split else whole

    def prepare(self, invariants: Sequence[Any]) -> list[Any]:
        """What the body reads of the invariants, computed once."""
        return list(invariants) if self.preamble is None else list(fx.Interpreter(self.preamble).run(*invariants))

    def starts(self, carries: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Initial carries with memory of their own, and corrections of zero."""
        own = [owned(carry) for carry in carries]
        return [*own, *(torch.zeros_like(own[i]) for i in self.corrected)]

    def __call__(self, *args: Any) -> list[Any]:
        """Next carries, next corrections, per-step outputs, stored values; none aliases an argument."""
        return list(map(owned, fx.Interpreter(self.body).run(*args)))


def emit_preamble(graph_module: fx.GraphModule, call: fx.Node, loop: HoistedLoop) -> list[Any]:
    """Put the loop's preamble, if it has one, before the call of its LoopNode; the operands of the step.

    It runs once per call, and once more in the backward rather than that its results are stored for it, where it reads
    nothing but parameters and other leaves with a gradient.
    """
    first = loop.first_invariant
    varying, invariants = call.args[:first], call.args[first:]  # those of the preamble
    if loop.preamble is None:
        return [*varying, *invariants]
    name, graph = f"{call.target}_preamble", graph_module.graph
    graph_module.add_submodule(name, without_autocast(loop.preamble, loop))
    with graph.inserting_before(call):
        made = graph.call_module(name, invariants)
        if all(map(lasting.is_trained, made.all_input_nodes)):
            higher_order.recompute_in_backward(made)
        results = [graph.call_function(operator.getitem, (made, i)) for i in range(len(graphs.results(loop.preamble)))]
    return [*varying, *results]


def iterate(
    body: Callable[..., list[Any]],
    starts: list[Any],
    per_step: list[Any],
    invariants: list[Any],
    *,
    steps: int | torch.SymInt,
    unrolled: bool,
) -> tuple[list[Any], list[Any]]:
    """Final carries and stacked outputs of a body(*carries, *slices, *invariants)."""
    if not unrolled:
        return _scan(body, starts, per_step, invariants, steps)
    carries, collected = starts, []
    for k in range(steps):
        results = body(*carries, *(values[k] for values in per_step), *invariants)
        carries = results[: len(starts)]
        collected.append(results[len(starts) :])
    return carries, [torch.stack(values) for values in zip(*collected, strict=True)]


def _scan(
    body: Callable[..., list[Any]],
    starts: list[Any],
    per_step: list[Any],
    invariants: list[Any],
    steps: int | torch.SymInt,
) -> tuple[list[Any], list[Any]]:
    """All evaluations as one scan."""
    given, found, first = [*starts, *per_step, *invariants], Parts(()), len(starts)
    count = [] if per_step else [torch.arange(steps, device=starts[0].device)]  # scan asks for one
    padding: list[torch.Tensor] = []
    parts = Parts(given)

    def step(*args: Any) -> list[Any]:
        results = body(*parts.together([*args[:first], *args[first + len(count) :]]))
        found.of(results)
        # Inductor takes the list of a scan's results for the result where there is one alone.
        padding[:] = [torch.zeros((), dtype=torch.bool, device=starts[0].device)] if len(results) == 1 else []
        return [*apart(results), *padding]

    real = apart(given)
    operands = (real[:first], [*real[first : first + len(per_step)], *count], real[first + len(per_step) :])
    results = scan_op(step, operands[0], operands[1], additional_inputs=(*operands[2], *symbols(real)))
    whole = found.together(list(results[: len(results) - len(padding)]))
    return whole[:first], whole[first:]


def repeat_while(
    condition: Callable[..., torch.Tensor],
    body: Callable[..., Sequence[Any]],
    carried: Sequence[Any],
    fixed: Sequence[Any],
) -> list[Any]:
    """What a while loop carries in the end; condition and body(*carried, *fixed) take both, and body gives the next."""
    given = [*carried, *fixed]
    parts = Parts(given)
    results = while_loop_op(
        lambda *args: condition(*parts.together(args)),
        lambda *args: tuple(apart(body(*parts.together(args)))),
        tuple(apart(carried)),
        (*apart(fixed), *symbols(given)),
    )
    return Parts(carried).together(list(results))


class Parts:
    """Which of some values are complex: a loop takes and gives these as pairs of reals, for Inductor knows no other."""

    def __init__(self, values: Sequence[Any]) -> None:
        self.of(values)

    def of(self, values: Sequence[Any]) -> None:
        """Note which values are complex."""
        self.complex = [isinstance(value, torch.Tensor) and value.is_complex() for value in values]

    def together(self, values: Sequence[Any]) -> list[Any]:
        """The values, complex where they were; further ones as they are."""
        kinds = [*self.complex, *[False] * (len(values) - len(self.complex))]
        return [torch.view_as_complex(v) if is_pair else v for v, is_pair in zip(values, kinds, strict=True)]


def apart(values: Sequence[Any]) -> list[Any]:
    """The values, complex ones as pairs of reals."""

    def real(value: Any) -> Any:
        is_complex = isinstance(value, torch.Tensor) and value.is_complex()
        return torch.view_as_real(value.resolve_conj()) if is_complex else value

    return list(map(real, values))


def at(stack: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """The entry of a stack at an index that is known on the device only."""
    return aten.index.Tensor(stack, [index])


def owned(value: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor that aliases nothing, as scan demands of its results."""
    value = value.resolve_conj() if value.is_complex() else value
    return value.clone(memory_format=torch.contiguous_format)


def symbols(values: list[Any]) -> list[torch.SymInt]:
    """The symbol of every symbolic size: Inductor looks for them among a scan's operands only."""
    sizes = (size for value in values if isinstance(value, torch.Tensor) for size in value.shape)
    found: dict[str, torch.SymInt] = {}
    for size in sizes:
        if isinstance(size, torch.SymInt):
            symbol = shapes.symbol_of(size)
            found.setdefault(str(symbol), symbol)
    return list(found.values())
