"""Scale the adjoint by powers of two round every velocity VJP, one for each output of the velocity.

Before:  dy, dw = velocity_0_pullback(saved, b, c)
After:   s_b, s_c, s, r_b, r_c, vanished = adjoint_scale(target, b, c)         with s = min(s_b, s_c), r_b = s / s_b
         dy_s, dw_s = velocity_0_pullback(saved, r_b, r_c, b * s_b, c * s_c);  dy = dy_s / s;  dw = dw_s / s_c

The scale of a cotangent is the power of two that brings its largest entry into [target, 2 target) when it is cast down,
so that scaling and unscaling round nothing; no state is kept from step to step or from call to call. A cotangent that
is not finite is not scaled.

Every node of a pullback is linear in the cotangents, so that each carries the scale of what it is made of. Where
several meet, in a sum, the terms are brought to the smallest of their scales; what follows from one cotangent alone is
never rounded beside a larger one. Each result is divided by its own scale.

Where the policy leaves the target open it is 1, or less for a sum over many entries that a pullback forms in float16
(the weight gradient of a convolution): 2^14 / n for n entries, so that n products of the largest cotangent with an
activation below 2 fit.

Requires: a Loop with an adjoint whose sums are as wide as they are to be, and a policy that scales.
Ensures:  the adjoint takes the target as its last placeholder; a scaled cotangent is a product of cotangent and scale
          that is marked as scaled; one more result, VANISHED, counts the entries of cotangents that become zero in
          float16 though they are scaled.
Raises:   UnsupportedVelocityError for a collective operation.
Error:    a gradient has an error of O(u), beside 2^-25 / target times the largest cotangent that it follows from.
Source:   arXiv 2510.23498, dynamic adjoint scaling; scales that are propagated are ours.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, replace

import torch
from torch import fx

from rampde_fx import graphs, operator_table, torch_private
from rampde_fx.errors import UnsupportedVelocityError
from rampde_fx.loop import VANISHED, Loop
from rampde_fx.scales import power_of_two_scale, vanishing_entries

aten = torch.ops.aten
COLLECTIVES = ("c10d", "_c10d_functional", "_c10d_functional_autograd", "_dtensor")
LARGEST_SUM = 2.0**14  # of terms below 2, in float16
Origins = frozenset[int]  # cotangents, by number, that a value follows from


@dataclass(frozen=True)
class Propagation:
    """A pullback in which scales are propagated.

    Attributes:
        module: Maps (residuals, ratios, cotangents) to gradients, each with the smallest scale of its origins.
        ratios: For each ratio that it takes, the origins of a term and those of the sum that it is brought to.
        gradients: The origins of each gradient.
    """

    module: fx.GraphModule
    ratios: tuple[tuple[Origins, Origins], ...]
    gradients: tuple[Origins, ...]


def scale_adjoint(loop: Loop) -> Loop:
    """Scale every pullback of the adjoint, if the policy says so."""
    scaling = loop.policy.adjoint_scaling
    if loop.adjoint is None or scaling is None:
        return loop
    _check_collectives(loop)
    adjoint = graphs.copied(loop.adjoint)
    calls = [node for node in adjoint.graph.nodes if node.op == "call_module" and node.meta.get("cotangents")]
    if not calls:
        return loop
    with adjoint.graph.inserting_after(graphs.placeholders(adjoint)[-1]):
        target = adjoint.graph.placeholder("target")
    device = graphs.value(graphs.placeholders(adjoint)[0]).device
    with torch_private.fake_mode():
        target.meta["val"] = torch.empty((), dtype=torch.float32, device=device)
    scaled = _Scaling(adjoint, target)
    for call in calls:
        scaled.scale(call)
    return replace(
        loop,
        adjoint=graphs.refresh(scaled.finished()),
        adjoint_inputs=(*loop.adjoint_inputs, ("target", 0)),
        adjoint_results=(*loop.adjoint_results, *([VANISHED] if scaled.vanished else [])),
        target=find_target(adjoint) if scaling.target is None else scaling.target,
    )


def _check_collectives(loop: Loop) -> None:
    """Refuse what several processes compute together: each would scale by numbers of its own, and repeat alone."""
    for node in graphs.body(loop.plain):
        if getattr(node.target, "namespace", "") in COLLECTIVES:
            raise UnsupportedVelocityError(
                f"a step of the loop calls the collective operation {operator_table.name_of(node.target)}, and its "
                "adjoint is scaled, by each process alone",
                required="a step that each process computes by itself, or an adjoint that is not scaled",
                fix='use dtype=torch.bfloat16, or PrecisionPolicy(scaling="none")',
                where=graphs.user_line(node),
            )


def find_target(adjoint: fx.GraphModule) -> float:
    """The target for pullbacks with sums in float16: a power of two, at most 1."""
    modules = (module for module in adjoint.children() if isinstance(module, fx.GraphModule))
    longest = max((_narrow_sum(node) for module in modules for node in module.graph.nodes), default=1)
    return min(1.0, LARGEST_SUM / 2.0 ** math.ceil(math.log2(max(longest, 1))))


def _narrow_sum(node: fx.Node) -> int:
    """How many entries a weight gradient of a convolution sums up in float16."""
    if operator_table.name_of(node.target) != "convolution_backward" or not node.args[-1][1]:
        return 0
    cotangent = graphs.value(node.args[0])
    if cotangent.dtype is not torch.float16:
        return 0
    sizes = [torch_private.size_hint(size) for size in cotangent.shape]
    return math.prod(sizes) // max(sizes[1], 1)


def propagated(pullback: fx.GraphModule, count: int) -> Propagation:
    """Let the nodes of a pullback carry the scales of its cotangents, the last few of its placeholders."""
    module = graphs.copied(pullback)
    nodes = graphs.placeholders(module)
    first = len(nodes) - count
    origins: dict[fx.Node, Origins] = {node: frozenset([i]) for i, node in enumerate(nodes[first:])}
    ratios: dict[tuple[Origins, Origins], fx.Node] = {}
    for node in graphs.body(module):
        read = [operand for operand in node.all_input_nodes if operand in origins]
        if not read or operator_table.name_of(node.target) in operator_table.SHAPED_LIKE:
            continue
        origins[node] = frozenset().union(*(origins[operand] for operand in read))
        for operand in read:
            if origins[operand] != origins[node]:
                ratio = _ratio(module, nodes[first], (origins[operand], origins[node]), ratios)
                node.replace_input_with(operand, _times(module.graph, node, operand, ratio))
    gradients = tuple(origins.get(result, frozenset()) for result in graphs.results(module))
    return Propagation(graphs.refresh(module), tuple(ratios), gradients)


def _ratio(
    module: fx.GraphModule,
    first_cotangent: fx.Node,
    key: tuple[Origins, Origins],
    known: dict[tuple[Origins, Origins], fx.Node],
) -> fx.Node:
    """The placeholder of the factor that brings a term to the scale of a sum."""
    if key not in known:
        with module.graph.inserting_before(first_cotangent):
            known[key] = module.graph.placeholder(f"ratio_{len(known)}")
        with torch_private.fake_mode():
            device = graphs.value(first_cotangent).device
            known[key].meta["val"] = torch.empty((), dtype=torch.float32, device=device)
    return known[key]


def _times(graph: fx.Graph, reader: fx.Node, term: fx.Node, ratio: fx.Node) -> fx.Node:
    """A term times a ratio, for a reader: in float32, for the ratio may be below float16's range."""
    dtype = graphs.value(term).dtype
    with graph.inserting_before(reader):
        if dtype.itemsize > 2:
            return graph.call_function(aten.mul.Tensor, (term, ratio))
        wide = graph.call_function(aten._to_copy.default, (term,), {"dtype": torch.float32})
        product = graph.call_function(aten.mul.Tensor, (wide, ratio))
        return graph.call_function(aten._to_copy.default, (product,), {"dtype": dtype})


class _Scaling:
    """The adjoint while its pullbacks are scaled, one call after the other."""

    def __init__(self, adjoint: fx.GraphModule, target: fx.Node) -> None:
        self.adjoint, self.graph, self.target = adjoint, adjoint.graph, target
        self.pullbacks: dict[str, Propagation] = {}
        self.scales: dict[str, str] = {}
        self.vanished: list[fx.Node] = []

    def scale(self, call: fx.Node) -> None:
        """Scale the cotangents of a call, and divide its gradients."""
        count, name = call.meta["cotangents"], str(call.target)
        cotangents = list(call.args[len(call.args) - count :])
        measured = [i for i, node in enumerate(cotangents) if graphs.value(node).numel() != 0]
        if not measured:
            return
        if name not in self.pullbacks:
            self.pullbacks[name] = propagated(self.adjoint.get_submodule(name), count)
            self.adjoint.add_submodule(name, self.pullbacks[name].module)
        plan = self.pullbacks[name]
        wanted = list(dict.fromkeys([frozenset([i]) for i in range(count)] + [g for g in plan.gradients if g]))
        with self.graph.inserting_before(call):
            found = self._found(cotangents, measured, wanted, plan.ratios)
            scale_of = dict(zip(wanted, found, strict=False))
            scaled = [self._scaled(node, scale_of[frozenset([i])]) for i, node in enumerate(cotangents)]
        call.args = (*call.args[: len(call.args) - count], *found[len(wanted) : -1], *scaled)
        self.vanished.append(found[-1])
        for gradient in list(call.users):
            self._unscale(gradient, scale_of.get(plan.gradients[gradient.args[1]]))

    def _found(
        self,
        cotangents: list[fx.Node],
        measured: list[int],
        wanted: list[Origins],
        ratios: tuple[tuple[Origins, Origins], ...],
    ) -> list[fx.Node]:
        """The scales of the wanted origins, the ratios, and how many entries vanish."""
        operands = [self.target, *(cotangents[i] for i in measured)]
        name = self._module([graphs.value(node) for node in operands], measured, wanted, ratios)
        made = self.graph.call_module(name, tuple(operands))
        return [self.graph.call_function(operator.getitem, (made, i)) for i in range(len(wanted) + len(ratios) + 1)]

    def _module(
        self,
        values: list[torch.Tensor],
        measured: list[int],
        wanted: list[Origins],
        ratios: tuple[tuple[Origins, Origins], ...],
    ) -> str:
        """The name of the submodule that finds them for cotangents of these shapes."""
        key = str([[(v.shape, v.dtype) for v in values], measured, wanted, ratios])
        if key in self.scales:
            return self.scales[key]

        def find(target: torch.Tensor, *cotangents: torch.Tensor) -> list[torch.Tensor]:
            own = {i: power_of_two_scale(target, value) for i, value in zip(measured, cotangents, strict=True)}

            def least(origins: Origins) -> torch.Tensor:
                scales = [own[i] for i in sorted(origins) if i in own] or [torch.ones_like(target)]
                return scales[0] if len(scales) == 1 else torch.stack(scales).amin()

            lost = [vanishing_entries(value * own[i]) for i, value in zip(measured, cotangents, strict=True)]
            shares = [least(whole) / least(term) for term, whole in ratios]
            return [*map(least, wanted), *shares, sum(lost[1:], lost[0])]

        self.scales[key] = f"adjoint_scale_{len(self.scales)}"
        names = ["target", *(f"cotangent_{i}" for i in measured)]
        module = graphs.refresh(graphs.named(torch_private.trace(find, values), names))
        self.adjoint.add_submodule(self.scales[key], module)
        return self.scales[key]

    def _scaled(self, cotangent: fx.Node, scale: fx.Node) -> fx.Node:
        scaled = self.graph.call_function(aten.mul.Tensor, (cotangent, scale))
        scaled.meta |= {"val": graphs.value(cotangent), "scaled": True}
        return scaled

    def _unscale(self, gradient: fx.Node, scale: fx.Node | None) -> None:
        if scale is None:  # it follows from no cotangent
            return
        with self.graph.inserting_after(gradient):
            unscaled = self.graph.call_function(aten.div.Tensor, (gradient, scale))
            unscaled.meta["val"] = graphs.value(gradient)
        gradient.replace_all_uses_with(unscaled, delete_user_cb=lambda user: user is not unscaled)

    def finished(self) -> fx.GraphModule:
        """The adjoint, with the number of entries that vanished as its last result."""
        output = self.graph.output_node()
        if not self.vanished:
            return self.adjoint
        total, *more = self.vanished
        with self.graph.inserting_before(output):
            for count in more:
                total = self.graph.call_function(aten.add.Tensor, (total, count))
        output.args = ((*output.args[0], total),)
        return self.adjoint
