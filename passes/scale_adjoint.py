"""Scale the adjoint by powers of two around every velocity VJP, one for each output of the velocity.

Before:  dy, dw = velocity_0_pullback(saved, b, c)
After:   s_b, s_c, s, r_b, r_c, vanished = adjoint_scale(target, b, c)         with s = min(s_b, s_c), r_b = s / s_b
         dy_s, dw_s = velocity_0_pullback(saved, r_b, r_c, b * s_b, c * s_c);  dy = dy_s / s;  dw = dw_s / s_c

The scale of a cotangent is the power of two that brings its largest entry into [target, 2 target) when it is cast down,
so that scaling and unscaling round nothing; no state is kept from step to step or from call to call. A cotangent that
is not finite is not scaled.

Every node of a pullback is linear in the cotangents, so that each carries the scale of what it is made of. Where
several meet, in a sum, the terms are brought to the smallest of their scales; what follows from one cotangent alone is
never rounded beside a larger one. Each result is divided by its own scale.

A velocity may multiply by a small factor: a learned gain of 1e-6, a number. Behind it the cotangent is small, too, and
would vanish where it is cast down. If the factor depends on no state, the product is multiplied by a power of two, its
gain, that makes up for the factor's largest entry, and carries it from there on. A large number takes back the gains of
small ones before it; another large factor has none: what it makes too large overflows, and the backward is repeated
with a lower target.

Where the policy leaves the target open it is 1, or less for a sum over many entries that a pullback forms in float16
(the weight gradient of a convolution): 2^14 / n for n entries, so that n products of the largest cotangent with an
activation below 2 fit.

Requires: a Loop behind widen_gradients, with an adjoint, and a policy that scales.
Ensures:  the adjoint takes the target as its last placeholder; the cotangents of an evaluation that is marked
          as scaled are products of cotangent and scale; one more result, Vanished, counts the entries of cotangents
          that become zero in float16 though they are scaled.
Raises:   UnsupportedVelocityError for a collective operation.
Error:    a gradient has an error of O(u), beside 2^-25 / target times the largest cotangent that it follows from.
Source:   arXiv 2510.23498, dynamic adjoint scaling; scales that are propagated are ours.
"""

from __future__ import annotations

import math
from collections.abc import Set
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from rampde_fx.errors import UnsupportedVelocityError
from rampde_fx.ir import graphs, operator_table, tracing
from rampde_fx.ir.ends import Evaluation, Operand, Target, Vanished, cotangents_of
from rampde_fx.ir.gains import MOST_GAIN, Gain, Origins, gain_of, net, with_gain
from rampde_fx.ir.loops import ScaledLoop, SummedLoop
from rampde_fx.runtime.scales import power_of_two_scale, vanishing_entries
from rampde_fx.torch_private import fake_tensors, shapes

aten = torch.ops.aten
COLLECTIVES = ("c10d", "_c10d_functional", "_c10d_functional_autograd", "_dtensor")
LARGEST_SUM = 2.0**14  # of terms below 2, in float16
MOST_GAINS = 3  # of a value: with a scale between 2^-50 and 2^50 the product is a normal number in float32
BOUND_WITH_GAINS = 2.0**50


@dataclass(frozen=True)
class Propagation:
    """A pullback in which scales are propagated.

    Attributes:
        module: Maps (residuals, gains, ratios, cotangents) to gradients, each with the smallest scale of its origins.
        gains: The gains that it takes.
        ratios: For each ratio that it takes, the origins of a term and those of the sum that it is brought to.
        gradients: The origins of each gradient.
    """

    module: fx.GraphModule
    gains: tuple[Gain, ...]
    ratios: tuple[tuple[Origins, Origins], ...]
    gradients: tuple[Origins, ...]


def scale_adjoint(loop: SummedLoop) -> ScaledLoop:
    """Scale every pullback of the adjoint, if the policy says so."""
    scaling = loop.policy.adjoint_scaling
    if loop.adjoint is None or scaling is None:
        return loop.then(ScaledLoop)
    _check_collectives(loop)
    own = replace(loop.adjoint, module=graphs.copied(loop.adjoint.module))
    calls, adjoint = own.pullbacks(), own.module
    if not calls:
        return loop.then(ScaledLoop)
    with adjoint.graph.inserting_after(graphs.placeholders(adjoint)[-1]):
        target = graphs.placeholder(adjoint.graph, "target")
    device = graphs.value(graphs.placeholders(adjoint)[0]).device
    with fake_tensors.fake_mode():
        target.meta["val"] = torch.empty((), dtype=torch.float32, device=device)
    states = [n for entry, n in own.nodes().items() if not isinstance(entry, Operand) or entry.operand < loop.carries]
    varying = graphs.depends_on(adjoint.graph, states)
    scaled = _Scaling(adjoint, target, {node for node in adjoint.graph.nodes if node not in varying})
    for evaluation, call in reversed(calls):  # the last one comes first in an adjoint
        scaled.scale(evaluation, call)
    module = graphs.refresh(scaled.finished())
    found = replace(
        own,
        module=module,
        inputs=(*own.inputs, Target()),
        results=(*own.results, *([Vanished()] if scaled.vanished else [])),
        evaluations=tuple(replace(e, scaled=e.pullback in scaled.calls) for e in own.evaluations),
    )
    target_now = find_target(module) if scaling.target is None else scaling.target
    return loop.then(ScaledLoop, adjoint=found, target=target_now)


def _check_collectives(loop: SummedLoop) -> None:
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
    sizes = [shapes.size_hint(size) for size in cotangent.shape]
    return math.prod(sizes) // max(sizes[1], 1)


def propagated(pullback: fx.GraphModule, count: int, factors: Set[int] = frozenset()) -> Propagation:
    """Let the nodes of a pullback carry the scales of its cotangents, the last few of its placeholders.

    Args:
        pullback: Maps (residuals, cotangents) to gradients; it stays as it is.
        count: How many cotangents it has.
        factors: The placeholders, by number, that depend on no state.
    """
    return _Propagation(pullback, count, factors).result()


class _Propagation:
    """A pullback while scales are propagated through it."""

    def __init__(self, pullback: fx.GraphModule, count: int, factors: Set[int]) -> None:
        self.module = graphs.copied(pullback)
        nodes = graphs.placeholders(self.module)
        first = len(nodes) - count
        self.first_cotangent = nodes[first]
        self.factors = {nodes[i]: i for i in factors if graphs.value(nodes[i]).numel() != 0}
        self.origins: dict[fx.Node, Origins] = {node: frozenset([(i, ())]) for i, node in enumerate(nodes[first:])}
        self.gains: dict[Gain, fx.Node] = {}
        self.ratios: dict[tuple[Origins, Origins], fx.Node] = {}
        self.cast_down = _cast_down(self.module)

    def result(self) -> Propagation:
        """The pullback with its gains and ratios."""
        for node in graphs.body(self.module):
            read = [operand for operand in node.all_input_nodes if operand in self.origins]
            if read and not operator_table.properties(node.target).reads_shape:
                self._carry(node, read)
        gradients = tuple(self.origins.get(result, frozenset()) for result in graphs.results(self.module))
        return Propagation(graphs.refresh(self.module), tuple(self.gains), tuple(self.ratios), gradients)

    def _carry(self, node: fx.Node, read: list[fx.Node]) -> None:
        """Note the origins of a node; bring what it reads to their scale, and give it the gain of a factor."""
        self.origins[node] = frozenset().union(*(self.origins[operand] for operand in read))
        for operand in read:
            if self.origins[operand] != self.origins[node]:
                key = (self.origins[operand], self.origins[node])
                if key not in self.ratios:
                    self.ratios[key] = self._placeholder(f"ratio_{len(self.ratios)}", self.first_cotangent)
                node.replace_input_with(operand, _times(self.module.graph, node, operand, self.ratios[key]))
        gain = gain_of(node, read, self.factors) if node in self.cast_down and len(read) == 1 else None
        if gain is not None and gain.factor < 0:
            gain = net(gain, self.origins[node])
        if gain is not None and all(len(with_gain(gains, gain)) <= MOST_GAINS for _, gains in self.origins[node]):
            product = self._amplified(node, gain)
            self.origins[product] = frozenset((i, with_gain(gains, gain)) for i, gains in self.origins[node])

    def _amplified(self, node: fx.Node, gain: Gain) -> fx.Node:
        """A node times a gain, in its place for all that read it."""
        factor: Any = gain.number
        if gain.factor >= 0:
            if gain not in self.gains:
                before = next(iter(self.ratios.values()), self.first_cotangent)
                self.gains[gain] = self._placeholder(f"gain_{len(self.gains)}", before)
            factor = self.gains[gain]
        with self.module.graph.inserting_after(node):
            product = self.module.graph.call_function(aten.mul.Tensor, (node, factor))
        product.meta["val"] = graphs.value(node)
        node.replace_all_uses_with(product, delete_user_cb=lambda user: user is not product)
        return product

    def _placeholder(self, name: str, before: fx.Node) -> fx.Node:
        """A further 0-d placeholder, in front of another one."""
        with self.module.graph.inserting_before(before):
            new = graphs.placeholder(self.module.graph, name)
        new.meta["val"] = fake_tensors.fake_number(torch.float32, graphs.value(self.first_cotangent).device)
        return new


def _cast_down(module: fx.GraphModule) -> set[fx.Node]:
    """The wide values from which one in float16 follows."""
    found: set[fx.Node] = set()
    for node in reversed(module.graph.nodes):
        half = [graphs.is_float(user) and graphs.value(user).dtype is torch.float16 for user in node.users]
        if graphs.is_float(node) and graphs.value(node).dtype.itemsize > 2 and (any(half) or found & set(node.users)):
            found.add(node)
    return found


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

    def __init__(self, adjoint: fx.GraphModule, target: fx.Node, stateless: Set[fx.Node]) -> None:
        self.adjoint, self.graph, self.target = adjoint, adjoint.graph, target
        self.stateless = stateless
        self.pullbacks: dict[str, Propagation] = {}
        self.scales: dict[str, str] = {}
        self.vanished: list[fx.Node] = []
        self.calls: set[str] = set()  # whose cotangents are scaled

    def scale(self, evaluation: Evaluation, call: fx.Node) -> None:
        """Scale the cotangents of a pullback's call, and divide its gradients."""
        count, name = evaluation.cotangents, str(call.target)
        cotangents = cotangents_of(evaluation, call)
        measured = [i for i, node in enumerate(cotangents) if graphs.value(node).numel() != 0]
        if not measured:
            return
        if name not in self.pullbacks:
            self.pullbacks[name] = propagated(self.adjoint.get_submodule(name), count, self._factors(name, count))
            self.adjoint.add_submodule(name, self.pullbacks[name].module)
        plan = self.pullbacks[name]
        alone: list[Origins] = [frozenset([(i, ())]) for i in range(count)]
        wanted = list(dict.fromkeys([*alone, *(origins for origins in plan.gradients if origins)]))
        with self.graph.inserting_before(call):
            found = self._found(call, cotangents, measured, wanted, plan)
            scale_of = dict(zip(wanted, found, strict=False))
            scaled = [self._scaled(node, scale_of[origins]) for node, origins in zip(cotangents, alone, strict=True)]
        call.args = (*call.args[: len(call.args) - count], *found[len(wanted) : -1], *scaled)
        self.vanished.append(found[-1])
        self.calls.add(call.name)
        for gradient in list(call.users):
            self._unscale(gradient, scale_of.get(plan.gradients[gradient.args[1]]))

    def _factors(self, name: str, count: int) -> set[int]:
        """The placeholders of a pullback, by number, that depend on no state in any of its calls."""
        calls = [node for node in self.graph.nodes if node.op == "call_module" and node.target == name]
        residuals = range(len(graphs.placeholders(self.adjoint.get_submodule(name))) - count)
        return {i for i in residuals if all(call.args[i] in self.stateless for call in calls)}

    def _found(
        self, call: fx.Node, cotangents: list[fx.Node], measured: list[int], wanted: list[Origins], plan: Propagation
    ) -> list[fx.Node]:
        """The scales of the wanted origins, the gains and the ratios, and how many entries vanish."""
        factors = sorted({gain.factor for gain in plan.gains})
        operands = [self.target, *(call.args[i] for i in factors), *(cotangents[i] for i in measured)]
        name = self._module([graphs.value(node) for node in operands], factors, measured, wanted, plan)
        made, names = self.graph.call_module(name, tuple(operands)), [f"scale_{i}" for i in range(len(wanted))]
        names += [*(f"gain_{i}" for i in range(len(plan.gains))), *(f"ratio_{i}" for i in range(len(plan.ratios)))]
        return [graphs.item(self.graph, name, made, i) for i, name in enumerate([*names, "vanished"])]

    def _module(
        self,
        values: list[torch.Tensor],
        factors: list[int],
        measured: list[int],
        wanted: list[Origins],
        plan: Propagation,
    ) -> str:
        """The name of the submodule that finds them for factors and cotangents of these shapes."""
        key = str([[(v.shape, v.dtype) for v in values], factors, measured, wanted, plan.gains, plan.ratios])
        if key in self.scales:
            return self.scales[key]
        used = {gain for origins in (*wanted, *sum(plan.ratios, ())) for _, gains in origins for gain in gains}

        def find(target: torch.Tensor, *operands: torch.Tensor) -> list[torch.Tensor]:
            cotangents = operands[len(factors) :]
            own = {i: power_of_two_scale(target, value) for i, value in zip(measured, cotangents, strict=True)}
            if used:
                own = {i: scale.clamp(1 / BOUND_WITH_GAINS, BOUND_WITH_GAINS) for i, scale in own.items()}
            factor_of = dict(zip(factors, operands, strict=False))

            def made_up(gain: Gain) -> Any:
                if gain.factor < 0:
                    return gain.number
                factor = factor_of[gain.factor]
                return power_of_two_scale(1.0, 1 / factor if gain.divides else factor).clamp(1.0, MOST_GAIN)

            value_of = {gain: made_up(gain) for gain in sorted({*used, *plan.gains})}

            def least(origins: Origins) -> torch.Tensor:
                known = [(i, gains) for i, gains in sorted(origins) if i in own]
                scales = [math.prod((value_of[gain] for gain in gains), start=own[i]) for i, gains in known]
                scales = scales or [torch.ones_like(target)]
                return scales[0] if len(scales) == 1 else torch.stack(scales).amin()

            lost = [vanishing_entries(value * own[i]) for i, value in zip(measured, cotangents, strict=True)]
            shares = [least(whole) / least(term) for term, whole in plan.ratios]
            taken = [value_of[gain] for gain in plan.gains]
            return [*map(least, wanted), *taken, *shares, sum(lost[1:], lost[0])]

        self.scales[key] = f"adjoint_scale_{len(self.scales)}"
        names = ["target", *(f"factor_{i}" for i in factors), *(f"cotangent_{i}" for i in measured)]
        module = graphs.refresh(graphs.named(tracing.trace(find, values), names))
        self.adjoint.add_submodule(self.scales[key], module)
        return self.scales[key]

    def _scaled(self, cotangent: fx.Node, scale: fx.Node) -> fx.Node:
        scaled = graphs.call(self.graph, f"{cotangent.name}_scaled", aten.mul.Tensor, cotangent, scale)
        scaled.meta["val"] = graphs.value(cotangent)
        return scaled

    def _unscale(self, gradient: fx.Node, scale: fx.Node | None) -> None:
        if scale is None:  # it follows from no cotangent
            return
        with self.graph.inserting_after(gradient):
            unscaled = graphs.call(self.graph, f"{gradient.name}_unscaled", aten.div.Tensor, gradient, scale)
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
                total = graphs.call(self.graph, "vanished", aten.add.Tensor, total, count)
        output.args = ((*output.args[0], total),)
        return self.adjoint
