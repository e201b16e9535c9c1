"""Scale the adjoint by a power of two round every velocity VJP.

Before:  dy, dw = velocity_0_pullback(saved, b)
After:   s = adjoint_scale(target, b);  dy_s, dw_s = velocity_0_pullback(saved, b * s);  dy = dy_s / s;  dw = dw_s / s

s = 2^(log2(target) - floor(log2(max|b|))), found on the device from the exponent bits of max|b|: the largest cotangent
lies in [target, 2 target) when it is cast down. s is a power of two, so that scaling and unscaling round nothing; no
state is kept from step to step or from call to call. A cotangent that is not finite is not scaled.

Requires: a Loop with an adjoint, and a policy that scales.
Ensures:  the adjoint takes the target as its last placeholder.
Source:   arXiv 2510.23498, dynamic adjoint scaling.
"""

from __future__ import annotations

import operator
from dataclasses import replace

import torch
from torch import fx

from rampde_fx import graphs, torch_private
from rampde_fx.loop import Loop

aten = torch.ops.aten
EXPONENT_BITS = 0x7F800000  # of a float32
LEAST, MOST = 2.0**-126, 2.0**120  # the least normal float32; a bound on s that keeps 1 / s normal too


def scale_adjoint(loop: Loop) -> Loop:
    """Scale every pullback of the adjoint, if the policy says so."""
    if loop.adjoint is None or loop.policy.adjoint_scaling is None:
        return loop
    graph = loop.adjoint.graph
    calls = [node for node in graph.nodes if node.op == "call_module" and node.meta.get("cotangents")]
    if not calls:
        return loop
    with graph.inserting_after(graphs.placeholders(loop.adjoint)[-1]):
        target = graph.placeholder("target")
    device = graphs.value(graphs.placeholders(loop.adjoint)[0]).device
    with torch_private.fake_mode():
        target.meta["val"] = torch.empty((), dtype=torch.float32, device=device)
    known: dict[str, str] = {}
    for call in calls:
        _scale_call(loop.adjoint, call, target, known)
    graphs.refresh(loop.adjoint)
    return replace(loop, adjoint_inputs=(*loop.adjoint_inputs, ("target", 0)))


def adjoint_scale(target: torch.Tensor, *cotangents: torch.Tensor) -> torch.Tensor:
    """The scale of one VJP: float32, 0-d, a power of two, for a 0-d target that is one."""
    largest = torch.stack([cotangent.abs().amax().to(torch.float32) for cotangent in cotangents]).amax()
    power = (largest.view(torch.int32) & EXPONENT_BITS).view(torch.float32)
    scale = torch.clamp(target / torch.clamp(power, min=LEAST), max=MOST)
    return torch.where(torch.isfinite(largest), scale, torch.ones_like(scale))


def _scale_call(adjoint: fx.GraphModule, call: fx.Node, target: fx.Node, known: dict[str, str]) -> None:
    graph, count = adjoint.graph, call.meta["cotangents"]
    residuals, cotangents = call.args[:-count], call.args[-count:]
    measured = [node for node in cotangents if graphs.value(node).numel() != 0]
    if not measured:
        return
    name = _scale_module(adjoint, target, measured, known)
    with graph.inserting_before(call):
        (scale,) = [graph.call_function(operator.getitem, (graph.call_module(name, (target, *measured)), 0))]
        scaled = [graph.call_function(aten.mul.Tensor, (cotangent, scale)) for cotangent in cotangents]
        for node, cotangent in zip(scaled, cotangents, strict=True):
            node.meta["val"] = graphs.value(cotangent)
    call.args = (*residuals, *scaled)
    for gradient in list(call.users):
        with graph.inserting_after(gradient):
            unscaled = graph.call_function(aten.div.Tensor, (gradient, scale))
            unscaled.meta["val"] = graphs.value(gradient)
        gradient.replace_all_uses_with(unscaled, delete_user_cb=lambda user, unscaled=unscaled: user is not unscaled)


def _scale_module(adjoint: fx.GraphModule, target: fx.Node, cotangents: list[fx.Node], known: dict[str, str]) -> str:
    """The name of the submodule that finds the scale for cotangents of these shapes."""
    key = str([(graphs.value(node).shape, graphs.value(node).dtype) for node in cotangents])
    if key not in known:
        values = [graphs.value(node) for node in (target, *cotangents)]
        traced = torch_private.trace(lambda *args: [adjoint_scale(*args)], values)
        known[key] = f"adjoint_scale_{len(known)}"
        names = ["target", *(f"cotangent_{i}" for i in range(len(cotangents)))]
        adjoint.add_submodule(known[key], graphs.refresh(graphs.named(traced, names)))
    return known[key]
