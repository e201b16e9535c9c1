"""explain(): what the rewrite did to a model, loop by loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from inspect import signature
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch.utils.flop_counter import FlopCounterMode

from rampde_fx import graphs, operators, pass_log, report_html, torch_private, unrewritten
from rampde_fx.backend import rewrite
from rampde_fx.errors import RampdeError, raising
from rampde_fx.ir.ends import ActivationSlot, Saved, StateSlot, places
from rampde_fx.ir.loops import CompensatedLoop, Fallback, Loop
from rampde_fx.passes.check_repetition import check_repetition
from rampde_fx.passes.find_loops import has_loop
from rampde_fx.policy import PrecisionPolicy
from rampde_fx.schedules import Activations


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
        carries: The carried states as "name: dtype[shape]".
        evaluations: Velocity evaluations per step.
        segment: K, where every K-th step stores something for the backward.
        stored: What such a step stores, as "name: dtype[shape]".
        stored_bytes: Bytes that the forward stores for the backward, over all steps, or for one where N is unknown.
        stored_bytes_fp32: The same states in the dtype of the state, as an fp32 policy stores them.
        stored_bytes_autograd: Bytes that plain autograd saves for the backward of the same loop, parameters and
            contexts left out.
        step_flops: Floating-point operations of the products in one step, as torch.utils.flop_counter counts them:
            matrix products, convolutions and attention, nothing else.
        adjoint_flops: Those of one step's adjoint, with the velocities that it evaluates again; 0 without an adjoint.
        fallbacks: What stayed in the accumulation dtype, and why.
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
    carries: tuple[str, ...]
    evaluations: int
    segment: int
    stored: tuple[str, ...]
    stored_bytes: int
    stored_bytes_fp32: int
    stored_bytes_autograd: int
    step_flops: int
    adjoint_flops: int
    fallbacks: tuple[Fallback, ...]
    notes: tuple[str, ...]
    step: fx.GraphModule
    adjoint: fx.GraphModule | None
    passes: tuple[PassReport, ...] = field(repr=False)

    def rows(self) -> list[tuple[str, str]]:
        """What there is to say about the loop as a whole: (label, text)."""
        return [
            ("steps", f"{self.steps or 'known at run time'}, emitted as {self.emitted}"),
            ("carries", ", ".join(self.carries)),
            ("velocity", f"{self.evaluations} evaluations per step in {_short(self.policy.velocity)}"),
            ("adjoint scaling", "none" if self.target is None else f"dynamic, target {self.target:g}"),
            ("accumulation", self.policy.accumulation),
            ("checkpointing", self._checkpointing()),
            ("stored per step" if self.segment == 1 else "stored per segment", ", ".join(self.stored) or "nothing"),
            (
                "stored in all" if self.steps else "stored in one step",
                f"{self.stored_bytes:,} bytes ({self.stored_bytes_fp32:,} in the dtype of the state;"
                f" plain autograd: {self.stored_bytes_autograd:,})",
            ),
            ("products per step", f"{self.step_flops:,} FLOP, and {self.adjoint_flops:,} in the adjoint"),
        ]

    def __str__(self) -> str:
        lines = [
            f"loop at {self.where or 'an unknown line'}",
            *(f"  {label:19s} {text}" for label, text in self.rows()),
            "  stayed wide",
            *(f"    {f.count:3d} x {f.operation:24s} {f.reason}" for f in self.fallbacks),
            *(f"  note: {note}" for note in self.notes),
        ]
        return "\n".join(lines)

    def _checkpointing(self) -> str:
        if isinstance(self.policy.schedule, Activations):
            return "none: the velocity's activations are stored"
        if self.segment == 1:
            return "each step is recomputed from its state"
        return f"segments of {self.segment} steps are recomputed from their first state"


@dataclass(frozen=True)
class Report:
    """What the rewrite did to a model: one LoopReport per loop, in the order of the program."""

    loops: tuple[LoopReport, ...]

    def to_html(self, path: str | PathLike[str]) -> None:
        """Write the report as one page of HTML that needs nothing else.

        For each loop the page has the numbers of this report, a picture of the rewritten step beside its adjoint, and
        the graphs before and after each pass.

        Args:
            path: The file to write; one that is there is replaced.
        """
        Path(path).write_text(report_html.page(self), encoding="utf-8")

    def __str__(self) -> str:
        return "\n\n".join(map(str, self.loops)) or "no loop over rampde_fx.steps(t), no odeint: nothing is rewritten"


def explain(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Report:
    """Rewrite a model's marked loops without compiling them, and report.

    fn is run once, uncompiled, on the arguments (of an odeint one step: a run that only looks does not integrate).
    Gradient mode counts: under torch.no_grad no adjoint is generated.

    Args:
        fn: A Module or function with marked loops, compiled or not.
        *args: Its arguments, of the shapes to report on.
        **kwargs: Its keyword arguments.

    Returns:
        A Report; print it, or look at report.loops[i].step and .adjoint.

    Raises:
        RampdeError: as the backend would.
    """
    fn = torch_private.uncompiled(fn)
    names = list(signature(getattr(fn, "forward", fn)).parameters)
    loops: list[LoopReport] = []

    def inspect(graph_module: fx.GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
        if not has_loop(graph_module):
            return graph_module.forward
        graph_module.meta[unrewritten.BACKEND] = "explain"
        try:
            loops.extend(rewritten(_with_names(graphs.copied(graph_module), names)))
        except RampdeError as error:
            return raising(error)
        return _without_odeint(graph_module).forward

    torch_private.capture(fn, inspect, args, kwargs)
    return Report(tuple(loops))


def rewritten(graph_module: fx.GraphModule) -> list[LoopReport]:
    """Rewrite the loops of a captured graph in place, and report on each."""
    passes: dict[int, list[PassReport]] = {}

    def watch(number: int, pass_name: str, loop: Loop) -> None:
        pass_log.tell(number, pass_name, loop)
        passes.setdefault(number, []).append(PassReport(pass_name, loop))

    rewrite(graph_module, watch)
    with torch_private.fake_mode_of(graph_module):
        return [_report(tuple(history)) for history in passes.values()]


def _without_odeint(graph_module: fx.GraphModule) -> fx.GraphModule:
    """A copy of a captured graph that runs, with one step for every odeint."""
    copy = graphs.copied(graph_module)
    check_repetition(copy)
    for module in copy.modules():
        if isinstance(module, fx.GraphModule):
            for node in module.graph.find_nodes(op="call_function", target=operators.enter):
                node.target = operators.first_step
            module.recompile()
    return copy


def _with_names(graph_module: fx.GraphModule, names: list[str]) -> fx.GraphModule:
    """The captured graph with the user's names instead of those of the function that captured it."""
    for node in graphs.placeholders(graph_module):
        node.name = node.name.replace("l_function_", "l_self_")
    graphs.name_arguments(graph_module, names)
    return graph_module


def _report(passes: tuple[PassReport, ...]) -> LoopReport:
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
        emitted="search" if loop.controller else "unroll" if loop.unrolled else "scan",
        carries=tuple(_describe(node.name, node, graphs.value(node).dtype) for node in inputs[: loop.carries]),
        evaluations=len(loop.stages),
        segment=loop.segment(),
        stored=tuple(_describe_stored(loop, stored)),
        stored_bytes=sum(times * graphs.value(node).nbytes for _, node in stored),
        stored_bytes_fp32=times * _bytes_in_the_dtype_of_the_state(loop, stored),
        stored_bytes_autograd=steps * _saved_by_autograd(loop) if loop.differentiated else 0,
        step_flops=_flops(loop.step),
        adjoint_flops=_flops(adjoint) if adjoint is not None else 0,
        fallbacks=loop.fallbacks,
        notes=loop.notes,
        step=loop.step,
        adjoint=adjoint,
        passes=passes,
    )


def _describe(name: str, node: fx.Node, dtype: torch.dtype) -> str:
    return f"{name}: {_short(dtype)}{list(graphs.value(node).shape)}"


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
        match loop.slots[place.slot]:
            case ActivationSlot():
                evaluation, index = node.args
                made = graphs.results(loop.step.get_submodule(evaluation.target))[index]
                yield _describe(f"{evaluation.name}.{made.name}", node, graphs.value(node).dtype)
            case StateSlot(carry):
                state = loop.inputs().carries[carry]
                is_byte = graphs.value(node).dtype is torch.uint8 and graphs.is_float(state)
                dtype = loop.policy.storage_dtype if is_byte else graphs.value(node).dtype
                yield _describe(f"scale of {state.name}" if place.part else state.name, node, dtype)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _flops(graph_module: fx.GraphModule) -> int:
    """Floating-point operations of a graph's products, counted while it runs on its fake values."""
    values = [graphs.value(node) for node in graphs.placeholders(graph_module)]
    with torch_private.fake_mode(), torch.no_grad(), FlopCounterMode(display=False) as counter:
        fx.Interpreter(graph_module).run(*values)
    return int(counter.get_total_flops())


def _saved_by_autograd(loop: Loop) -> int:
    """Bytes that autograd saves for one plain step, measured on fake tensors by its own hooks."""
    nodes = graphs.placeholders(loop.plain)
    values = [torch_private.detached(graphs.value(node)) for node in nodes]
    saved: dict[int | None, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved[torch_private.storage_of(tensor)] = tensor
        return tensor

    for node, value in zip(nodes, values, strict=True):
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            value.requires_grad_(node in nodes[: loop.carries] or loop.plain_needs_grad[nodes.index(node)])
    with (
        torch_private.fake_mode(),
        torch.enable_grad(),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        fx.Interpreter(loop.plain).run(*values)
    outside = set(map(torch_private.storage_of, values[loop.carries :]))
    return sum(tensor.untyped_storage().nbytes() for key, tensor in saved.items() if key not in outside)
