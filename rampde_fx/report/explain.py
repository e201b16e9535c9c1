"""explain(): what the rewrite did to a model, loop by loop."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from inspect import signature
from os import PathLike
from pathlib import Path
from typing import Any, assert_never

import torch
from torch import fx
from torch.utils.flop_counter import flop_registry

from rampde_fx.backend import rewrite
from rampde_fx.errors import RampdeError, raising
from rampde_fx.frontend import unrewritten
from rampde_fx.ir import graphs, pass_log
from rampde_fx.ir.budgets import kept_bytes
from rampde_fx.ir.captured import has_loop, repeats
from rampde_fx.ir.ends import ActivationSlot, Saved, StateSlot, places
from rampde_fx.ir.loops import CompensatedLoop, Loop
from rampde_fx.passes.check_repetition import first_iterations
from rampde_fx.policy_text import word_of
from rampde_fx.report import report_html
from rampde_fx.report.loop_report import SEARCH, LoopReport, PassReport
from rampde_fx.runtime import random_state
from rampde_fx.torch_private import capturing, fake_tensors, repetition
from rampde_fx.validation.untouched import untouched
from rampde_fx.validation.widening import copies

NOTHING = "no loop over rampde_fx.steps(t), no odeint: nothing is rewritten"
FULLGRAPH = "(torch.compile(..., fullgraph=True) says where)"


@dataclass(frozen=True)
class Report:
    """What the rewrite did to a model.

    Attributes:
        loops: One LoopReport per loop, in the order of the program.
        graph_breaks: Why Dynamo left parts of the model in plain Python, in its own words; empty if it left none.
    """

    loops: tuple[LoopReport, ...]
    graph_breaks: tuple[str, ...] = ()

    def to_html(self, path: str | PathLike[str]) -> None:
        """Write the report as one page of HTML that needs nothing else.

        For each loop the page has the numbers of this report, a picture of the rewritten step beside its adjoint, and
        the graphs before and after each pass.

        Args:
            path: The file to write; one that is there is replaced.
        """
        Path(path).write_text(report_html.page(self.loops, self._remarks()), encoding="utf-8")

    def _repr_html_(self) -> str:
        return report_html.brief(self.loops, self._remarks())

    def __str__(self) -> str:
        return "\n\n".join([*map(str, self.loops), *self._remarks()])

    def _remarks(self) -> list[str]:
        """What there is to say beside the loops."""
        broken = [f"graph break: {reason} {FULLGRAPH}" for reason in self.graph_breaks]
        return broken if self.loops else [NOTHING, *broken]


def explain(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Report:
    """Rewrite a model's marked loops without compiling them, and report.

    fn is run once, uncompiled, on copies of the arguments and of what it reads (of an odeint one step, of a loop the
    steps that are captured: a run that only looks does not integrate). Nothing of the model is changed: parameters,
    buffers, attributes, random number generators. Gradient mode counts: under torch.no_grad no adjoint is generated.

    Args:
        fn: A Module or function with marked loops, compiled or not.
        *args: Its arguments, of the shapes to report on.
        **kwargs: Its keyword arguments.

    Returns:
        A Report; print it, or look at report.loops[i].step and .adjoint.

    Raises:
        RampdeError: as the backend would.
    """
    fn = capturing.uncompiled(fn)
    names = list(signature(getattr(fn, "forward", fn)).parameters)
    loops: list[LoopReport] = []

    @repetition.takes_repeats
    def inspect(graph_module: fx.GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
        if not has_loop(graph_module):
            return _on_copies(graph_module)
        graph_module.meta[unrewritten.BACKEND] = "explain"
        try:
            loops.extend(rewritten(_with_names(graphs.copied(graph_module), names)))
        except RampdeError as error:
            if repeats(graph_module):
                repetition.capture_in_full(str(error))
            return raising(error)
        return _on_copies(first_iterations(graph_module))

    with untouched(fn), random_state.kept_random_state(), capturing.GraphBreaks() as breaks:
        capturing.capture(fn, inspect, args, kwargs)
    return Report(tuple(loops), breaks.reasons)


def rewritten(graph_module: fx.GraphModule) -> list[LoopReport]:
    """Rewrite the loops of a captured graph in place, and report on each."""
    passes: dict[int, list[PassReport]] = {}

    def watch(number: int, pass_name: str, loop: Loop) -> None:
        pass_log.tell(number, pass_name, loop)
        passes.setdefault(number, []).append(PassReport(pass_name, loop))

    loops = rewrite(graph_module, watch)
    with fake_tensors.fake_mode_of(graph_module):
        return [_report(tuple(history), loops[number].notes) for number, history in passes.items()]


def _on_copies(graph_module: fx.GraphModule) -> Callable[..., Any]:
    """What runs a captured graph, and leaves what it writes to as it was."""

    def run(*inputs: Any) -> Any:
        stand_ins = copies(inputs, widen=False)
        for i, (given, copy) in enumerate(zip(inputs, stand_ins, strict=True)):
            if isinstance(given, torch.Tensor) and given.requires_grad:
                copy.requires_grad_()
                stand_ins[i] = copy if given.is_leaf else copy.clone()  # a leaf would refuse writes
        return graph_module(*stand_ins)

    return run


def _with_names(graph_module: fx.GraphModule, names: list[str]) -> fx.GraphModule:
    """The captured graph with the user's names instead of those of the function that captured it."""
    for node in graphs.placeholders(graph_module):
        node.name = node.name.replace("l_function_", "l_self_")
    graphs.name_arguments(graph_module, names)
    return graph_module


def _report(passes: tuple[PassReport, ...], notes: tuple[str, ...]) -> LoopReport:
    loop = passes[-1].loop
    assert isinstance(loop, CompensatedLoop), "behind all passes"
    inputs = graphs.placeholders(loop.step)
    stored = list(zip(places(loop.slots), loop.results().stored, strict=True))
    adjoint = loop.adjoint.module if loop.adjoint is not None else None
    known = loop.steps if isinstance(loop.steps, int) and loop.controller is None else None
    steps = known or 1
    times = (steps + loop.segment() - 1) // loop.segment() if known else 1
    return LoopReport(
        where=loop.where,
        steps=known,
        policy=loop.policy,
        target=loop.target if loop.policy.adjoint_scaling and loop.adjoint is not None else None,
        emitted=SEARCH if loop.controller else "unroll" if loop.unrolled else "scan",
        method=loop.method,
        tolerances=_tolerances(loop),
        carries=tuple(_describe(node.name, node, graphs.value(node).dtype) for node in inputs[: loop.carries]),
        evaluations=len(loop.evaluation_names),
        segment=loop.segment(),
        kept=loop.kept,
        kept_bytes=kept_bytes(loop) if loop.budget is not None else 0,
        budget=loop.budget,
        stored=tuple(_describe_stored(loop, stored)),
        stored_bytes=sum(times * graphs.value(node).nbytes for _, node in stored),
        stored_bytes_fp32=times * _bytes_in_the_dtype_of_the_state(loop, stored),
        stored_bytes_autograd=steps * _saved_by_autograd(loop) if loop.differentiated else 0,
        step_flops=_flops(loop.step),
        adjoint_flops=_flops(adjoint) if adjoint is not None else 0,
        fallbacks=loop.fallbacks,
        captured=loop.captured,
        notes=notes,
        step=loop.step,
        adjoint=adjoint,
        passes=passes,
    )


def _tolerances(loop: CompensatedLoop) -> str:
    """What the steps of a search are chosen by; numbers that were tensors, or changed, are known at run time alone."""
    if loop.controller is None:
        return ""
    if loop.controller.own_norm:
        return f"a norm that the step gives; at most {loop.controller.max_steps:,} steps"
    pairs = (("rtol", loop.controller.rtol), ("atol", loop.controller.atol))
    late = [name for name, value in pairs if value is None or math.isnan(value)]
    found = ", ".join(f"{name} {'known at run time' if name in late else format(value, 'g')}" for name, value in pairs)
    order, most = loop.controller.order - 1, loop.controller.max_steps
    return f"{found}; errors of a method of order {order}, at most {most:,} steps"


def _describe(name: str, node: fx.Node, dtype: torch.dtype) -> str:
    return f"{name}: {word_of(dtype)}{list(graphs.value(node).shape)}"


def _bytes_in_the_dtype_of_the_state(loop: CompensatedLoop, stored: list[tuple[Saved, fx.Node]]) -> int:
    inputs, slots = loop.inputs().carries, loop.slots
    kept = [graphs.value(node) for place, node in stored if isinstance(slots[place.slot], ActivationSlot)]
    states = [graphs.value(inputs[slot.carry]) for slot in slots if isinstance(slot, StateSlot)]
    carried = [graphs.value(node) for node in inputs if graphs.is_differentiable(node)]
    own = max(value.dtype.to_real().itemsize for value in carried)
    sizes = [v.numel() * own if v.is_floating_point() else v.nbytes for v in kept]
    return sum(sizes) + sum(state.nbytes for state in states)


def _describe_stored(loop: CompensatedLoop, stored: list[tuple[Saved, fx.Node]]) -> Iterator[str]:
    for place, node in stored:
        slot = loop.slots[place.slot]
        match slot:
            case ActivationSlot():
                evaluation, index = node.args
                made = graphs.results(loop.step.get_submodule(evaluation.target))[index]
                yield _describe(f"{evaluation.name}.{made.name}", node, graphs.value(node).dtype)
            case StateSlot(carry):
                state = loop.inputs().carries[carry]
                is_byte = graphs.value(node).dtype is torch.uint8 and graphs.is_float(state)
                dtype = loop.policy.storage_dtype if is_byte else graphs.value(node).dtype
                yield _describe(f"scale of {state.name}" if place.part else state.name, node, dtype)
            case _:
                assert_never(slot)


def _flops(graph_module: fx.GraphModule) -> int:
    """Floating-point operations of a graph's products."""
    total = 0
    for node in graphs.body(graph_module):
        if node.op == "call_module":
            total += _flops(graph_module.get_submodule(str(node.target)))
        count = flop_registry.get(getattr(node.target, "overloadpacket", None))
        if count is not None:
            args, kwargs = fx.map_arg((node.args, node.kwargs), graphs.value)
            total += count(*args, **kwargs, out_val=graphs.value(node))
    return total


def _saved_by_autograd(loop: Loop) -> int:
    """Bytes that autograd saves for one plain step, measured on fake tensors by its own hooks."""
    nodes = graphs.placeholders(loop.plain)
    values = [fake_tensors.detached(graphs.value(node)) for node in nodes]
    saved: dict[int | None, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved[fake_tensors.storage_of(tensor)] = tensor
        return tensor

    for node, value in zip(nodes, values, strict=True):
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            value.requires_grad_(node in nodes[: loop.carries] or loop.plain_needs_grad[nodes.index(node)])
    with (
        fake_tensors.fake_mode(),
        torch.enable_grad(),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        fx.Interpreter(loop.plain).run(*values)
    outside = set(map(fake_tensors.storage_of, values[loop.carries :]))
    return sum(tensor.untyped_storage().nbytes() for key, tensor in saved.items() if key not in outside)
