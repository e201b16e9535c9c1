"""Scale the adjoint by a power of two round every velocity VJP.

Before:  dy, dw = velocity_0_pullback(saved, b)
After:   s = adjoint_scale(target, b);  dy_s, dw_s = velocity_0_pullback(saved, b * s);  dy = dy_s / s;  dw = dw_s / s

s is the power of two that brings the largest cotangent into [target, 2 target) when it is cast down, so that scaling
and unscaling round nothing; no state is kept from step to step or from call to call. A cotangent that is not finite is
not scaled.

Where the policy leaves the target open it is 1, or less for a sum over many entries that a pullback forms in float16
(the weight gradient of a convolution): 2^14 / n for n entries, so that n products of the largest cotangent with an
activation below 2 fit.

Requires: a Loop with an adjoint, and a policy that scales.
Ensures:  the adjoint takes the target as its last placeholder; a scaled cotangent is a product of cotangent and scale
          that is marked as scaled.
Source:   arXiv 2510.23498, dynamic adjoint scaling.
"""

from __future__ import annotations

import math
import operator
from dataclasses import replace

import torch
from torch import fx

from rampde_fx import graphs, torch_private
from rampde_fx.loop import Loop
from rampde_fx.scales import power_of_two_scale

aten = torch.ops.aten
LARGEST_SUM = 2.0**14  # of terms below 2, in float16


def scale_adjoint(loop: Loop) -> Loop:
    """Scale every pullback of the adjoint, if the policy says so."""
    scaling = loop.policy.adjoint_scaling
    if loop.adjoint is None or scaling is None:
        return loop
    adjoint = graphs.copied(loop.adjoint)
    calls = [node for node in adjoint.graph.nodes if node.op == "call_module" and node.meta.get("cotangents")]
    if not calls:
        return loop
    with adjoint.graph.inserting_after(graphs.placeholders(adjoint)[-1]):
        target = adjoint.graph.placeholder("target")
    device = graphs.value(graphs.placeholders(adjoint)[0]).device
    with torch_private.fake_mode():
        target.meta["val"] = torch.empty((), dtype=torch.float32, device=device)
    known: dict[str, str] = {}
    for call in calls:
        _scale_call(adjoint, call, target, known)
    return replace(
        loop,
        adjoint=graphs.refresh(adjoint),
        adjoint_inputs=(*loop.adjoint_inputs, ("target", 0)),
        target=find_target(adjoint) if scaling.target is None else scaling.target,
    )


def find_target(adjoint: fx.GraphModule) -> float:
    """The target for pullbacks with sums in float16: a power of two, at most 1."""
    modules = (module for module in adjoint.children() if isinstance(module, fx.GraphModule))
    longest = max((_narrow_sum(node) for module in modules for node in module.graph.nodes), default=1)
    return min(1.0, LARGEST_SUM / 2.0 ** math.ceil(math.log2(max(longest, 1))))


def _narrow_sum(node: fx.Node) -> int:
    """How many entries a weight gradient of a convolution sums up in float16."""
    if graphs.operator_name(node.target) != "convolution_backward" or not node.args[-1][1]:
        return 0
    cotangent = graphs.value(node.args[0])
    if cotangent.dtype is not torch.float16:
        return 0
    sizes = [torch_private.size_hint(size) for size in cotangent.shape]
    return math.prod(sizes) // max(sizes[1], 1)


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
            node.meta |= {"val": graphs.value(cotangent), "scaled": True}
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
        traced = torch_private.trace(lambda *args: [power_of_two_scale(*args)], values)
        known[key] = f"adjoint_scale_{len(known)}"
        names = ["target", *(f"cotangent_{i}" for i in range(len(cotangents)))]
        adjoint.add_submodule(known[key], graphs.refresh(graphs.named(traced, names)))
    return known[key]
