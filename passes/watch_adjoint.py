"""Let the adjoint return what a monitor records of every velocity VJP.

Before:  dy, dw = velocity_0_pullback(residuals, b * s);  return ...
After:   dy, dw = velocity_0_pullback(residuals, b * s);  r = adjoint_statistics(s, b, dy, dw);  return ..., r

r holds the scale, the largest and the smallest magnitude of the cotangent, how many of its entries become zero in the
velocity dtype, and how many entries of the gradients are not finite. The entries that vanish are found by their
magnitude, below half of the least subnormal number: a compiler may fuse the cast away, and zeros behind it could not be
counted.

Requires: a Loop behind scale_adjoint, scaled or not. One without an adjoint, or without a monitor, is left as it is.
Ensures:  otherwise the adjoint has one more result, float32 (VJPs, 5), in the order in which the step
          evaluates the velocities, those with an empty batch left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import fx

from rampde_fx.ir import graphs, tracing
from rampde_fx.ir.ends import Evaluation, Statistics, cotangents_of
from rampde_fx.ir.loops import ScaledLoop, WatchedLoop
from rampde_fx.runtime.scales import are_finite

aten = torch.ops.aten


def watch_adjoint(loop: ScaledLoop) -> WatchedLoop:
    """Return the statistics of every VJP, if a monitor is open."""
    if loop.adjoint is None or not loop.monitored:
        return loop.then(WatchedLoop)
    adjoint = replace(loop.adjoint, module=graphs.copied(loop.adjoint.module))
    measured = [(e, call) for e, call in adjoint.pullbacks() if _measured(e, call)]
    if not measured:
        return loop.then(WatchedLoop)
    known: dict[str, str] = {}
    module = adjoint.module
    rows = [_watched(module, evaluation, call, loop.policy.dtype, known) for evaluation, call in measured]
    output = module.graph.output_node()
    with module.graph.inserting_before(output):
        table = module.graph.call_function(aten.stack.default, (rows,))
    output.args = ((*output.args[0], table),)
    watched = replace(adjoint, module=graphs.refresh(module), results=(*adjoint.results, Statistics()))
    return loop.then(WatchedLoop, adjoint=watched)


def _measured(evaluation: Evaluation, call: fx.Node) -> list[fx.Node]:
    """The cotangents of a VJP that have entries."""
    return [node for node in cotangents_of(evaluation, call) if graphs.value(node).numel() != 0]


def _watched(
    adjoint: fx.GraphModule, evaluation: Evaluation, call: fx.Node, low: torch.dtype, known: dict[str, str]
) -> fx.Node:
    """The statistics of one VJP, float32 (5,)."""
    measured = _measured(evaluation, call)
    scales = [node.args[1] for node in measured if evaluation.scaled]
    cotangents = [node.args[0] if evaluation.scaled else node for node in measured]
    gradients = [item for item in call.users if graphs.is_differentiable(item)]
    operands = [*scales, *cotangents, *gradients]
    name = _module(adjoint, operands, (len(scales), len(cotangents)), low, known)
    last = max([call, *gradients], key=list(adjoint.graph.nodes).index)
    with adjoint.graph.inserting_after(last):
        made = adjoint.graph.call_module(name, tuple(operands))
    with adjoint.graph.inserting_after(made):
        return graphs.item(adjoint.graph, "statistics", made, 0)


def _module(
    adjoint: fx.GraphModule,
    operands: Sequence[fx.Node],
    counts: tuple[int, int],
    low: torch.dtype,
    known: dict[str, str],
) -> str:
    """The name of the submodule that describes a VJP of these shapes."""
    values = [graphs.value(node) for node in operands]
    key = str([counts, [(value.shape, value.dtype) for value in values]])
    if key not in known:
        scales, cotangents = counts

        def describe(*args: torch.Tensor) -> list[torch.Tensor]:
            factors = args[:scales] or [torch.ones((), dtype=torch.float32, device=args[0].device)] * cotangents
            return [statistics(factors, args[scales : scales + cotangents], args[scales + cotangents :], low)]

        known[key] = f"adjoint_statistics_{len(known)}"
        names = ["scale"] * scales + ["cotangent"] * cotangents + ["gradient"] * (len(values) - scales - cotangents)
        module = graphs.named(tracing.trace(describe, values), names)
        adjoint.add_submodule(known[key], graphs.refresh(module))
    return known[key]


def statistics(
    scales: Sequence[torch.Tensor],
    cotangents: Sequence[torch.Tensor],
    gradients: Sequence[torch.Tensor],
    low: torch.dtype,
) -> torch.Tensor:
    """Describe one VJP.

    Args:
        scales: The factor of each cotangent, 0-d, float32.
        cotangents: The cotangents before they are scaled, of any shapes, none of them empty.
        gradients: What the VJP returned for the scaled ones.
        low: The dtype to which the scaled cotangents are cast.

    Returns:
        The smallest scale, largest and smallest magnitude but zero of the cotangents (0 and inf where there is none),
        the number of entries that become zero, and of gradients that are not finite: float32, (5,).
    """
    like = cotangents[0]
    sizes = [cotangent.abs() for cotangent in cotangents]
    vanishing = torch.finfo(low).smallest_normal * torch.finfo(low).eps / 2
    lost = [((size != 0) & (size * s <= vanishing)).sum() for size, s in zip(sizes, scales, strict=True)]
    beyond = [(~are_finite(gradient)).sum() for gradient in gradients]
    zero = torch.zeros((), dtype=torch.float32, device=like.device)
    numbers = [
        torch.stack(list(scales)).amin(),
        torch.stack([size.amax().to(torch.float32) for size in sizes]).amax(),
        torch.stack([torch.where(size == 0, torch.inf, size).amin().to(torch.float32) for size in sizes]).amin(),
        sum(lost, zero),
        sum(beyond, zero),
    ]
    return torch.stack([number.to(torch.float32) for number in numbers])
