"""Scale the adjoint by powers of two around every velocity VJP, one for each output of the velocity.

Before:  dy, dw = velocity_0_pullback(residuals, b, c)
After:   s_b, s_c, s, r_b, r_c, vanished = adjoint_scale(target, b, c)         with s = min(s_b, s_c), r_b = s / s_b
         dy_s, dw_s = velocity_0_pullback(residuals, r_b, r_c, b * s_b, c * s_c);  dy = dy_s / s;  dw = dw_s / s_c

The scale of a cotangent is the power of two that brings its largest entry into [target, 2 target) when it is cast down,
so that scaling and unscaling round nothing; no state is kept from step to step or from call to call. A cotangent that
is not finite is not scaled.

Every node of a pullback is linear in the cotangents, so that each carries the scale of what it is made of. Where
several meet, in a sum, the terms are brought to the smallest of their scales; what follows from one cotangent alone is
never rounded beside a larger one. Each result is divided by its own scale.

A velocity may multiply by a small factor: a learned gain of 1e-6, a number. Behind it the cotangent is small, too, and
would vanish where it is cast down. Each value has an ideal scale, which makes up for the factors on its way that depend
on no state; where a value is cast down to float16 it is brought to its ideal scale. A large factor takes back what was
made up for small ones, and no more: what it makes too large overflows, and the backward runs again with a lower target.

Where the policy leaves the target open it is 1, or less for a sum over many entries that a pullback forms in float16
(the weight gradient of a convolution): 2^14 / n for n entries, so that n products of the largest cotangent with an
activation below 2 fit.

Requires: a Loop behind widen_gradients. One without an adjoint, or whose policy does not scale, is left as it is.
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

import torch
from torch import fx

from rampde_fx.errors import UnsupportedVelocityError
from rampde_fx.ir import graphs, operator_table, tracing
from rampde_fx.ir.ends import Evaluation, Operand, Target, Vanished, cotangents_of
from rampde_fx.ir.ideal_scales import Factor, Scales, factor_of, independent
from rampde_fx.ir.loops import ScaledLoop, SummedLoop
from rampde_fx.runtime.scales import power_of_two_scale, vanishing_entries
from rampde_fx.torch_private import fake_tensors, shapes

aten = torch.ops.aten
COLLECTIVES = ("c10d", "_c10d_functional", "_c10d_functional_autograd", "_dtensor")
LARGEST_SUM = 2.0**14  # of terms below 2, in float16


@dataclass(frozen=True)
class Propagation:
    """A pullback in which scales are propagated.

    Attributes:
        module: Maps (residuals, ratios, cotangents) to gradients, each multiplied by its scale.
        scales: All scales, which the fields below name by their numbers.
        factors: The tensors among the factors that scales make up for.
        residuals: Which residuals, by number, the factors follow from; behind them cotangents, whose shape they read.
        factor_values: Maps these residuals to the values of the factors.
        ratios: For each ratio that it takes, a scale and the one that it is divided by.
        gradients: The scale of each gradient; None for one that follows from no cotangent.
    """

    module: fx.GraphModule
    scales: Scales
    factors: tuple[Factor, ...]
    residuals: tuple[int, ...]
    factor_values: fx.GraphModule
    ratios: tuple[tuple[int, int], ...]
    gradients: tuple[int | None, ...]


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
    scaled = _Scaling(adjoint, target, independent(adjoint, states))
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


def propagated(pullback: fx.GraphModule, count: int, stateless: Set[int] = frozenset()) -> Propagation:
    """Let the nodes of a pullback carry the scales of its cotangents, the last few of its placeholders.

    Args:
        pullback: Maps (residuals, cotangents) to gradients; it stays as it is.
        count: How many cotangents it has.
        stateless: The placeholders, by number, that depend on no state.
    """
    return _Propagation(pullback, count, stateless).result()


class _Propagation:
    """A pullback while scales are propagated through it; rampde_fx/ir/ideal_scales.py computes with the scales."""

    def __init__(self, pullback: fx.GraphModule, count: int, stateless: Set[int]) -> None:
        self.module = graphs.copied(pullback)
        nodes = graphs.placeholders(self.module)
        first = len(nodes) - count
        self.first_cotangent = nodes[first]
        self.scales = Scales()
        # By what each value is multiplied, and by what it should be where it is cast down.
        self.scale: dict[fx.Node, int] = {node: self.scales.own(i) for i, node in enumerate(nodes[first:])}
        self.ideal = dict(self.scale)
        self.stateless = independent(self.module, [node for i, node in enumerate(nodes) if i not in stateless])
        self.ratios: dict[tuple[int, int], fx.Node] = {}

    def result(self) -> Propagation:
        """The pullback with its ratios."""
        for node in graphs.body(self.module):
            read = [operand for operand in node.all_input_nodes if operand in self.scale]
            if read and not operator_table.properties(node.target).reads_shape:
                self._propagate(node, read)
        gradients = tuple(self.scale.get(result) for result in graphs.results(self.module))
        used = {*sum(self.ratios, ()), *(scale for scale in gradients if scale is not None)}
        factors = self.scales.factors(used)
        node_of = {node.name: node for node in self.stateless}
        values = [node_of[factor.node] for factor in factors]
        added, needed = {*self.ratios.values()}, graphs.ancestors(values)
        inputs = [node for node in graphs.placeholders(self.module) if node not in added]
        residuals = tuple(i for i, node in enumerate(inputs) if node in needed)
        return Propagation(
            module=graphs.refresh(self.module),
            scales=self.scales,
            factors=factors,
            residuals=residuals,
            factor_values=graphs.part(self.module, [inputs[i] for i in residuals], values),
            ratios=tuple(self.ratios),
            gradients=gradients,
        )

    def _propagate(self, node: fx.Node, read: list[fx.Node]) -> None:
        """Note the scales of a node, and bring what it reads to its scale."""
        self.ideal[node] = self.scales.least([self.ideal[operand] for operand in read])
        given = {self.scale[operand] for operand in read}
        self.scale[node] = given.pop() if len(given) == 1 else self.ideal[node]
        if _casts_down(node, read[0]):
            if not self.scales.are_near(self.ideal[node], self.scale[node]):
                self.scale[node] = self.ideal[node]
        elif len(read) == 1 and (factor := factor_of(node, read, self.stateless)) is not None:
            self.ideal[node] = self.scales.behind(self.ideal[node], factor)
        for operand in read:
            if self.scale[operand] != self.scale[node]:
                ratio = self._ratio(self.scale[node], self.scale[operand])
                node.replace_input_with(operand, _times(self.module.graph, node, operand, ratio))

    def _ratio(self, new: int, old: int) -> fx.Node:
        """The placeholder of a ratio of two scales."""
        if (new, old) not in self.ratios:
            with self.module.graph.inserting_before(self.first_cotangent):
                ratio = graphs.placeholder(self.module.graph, f"ratio_{len(self.ratios)}")
            ratio.meta["val"] = fake_tensors.fake_number(torch.float32, graphs.value(self.first_cotangent).device)
            self.ratios[new, old] = ratio
        return self.ratios[new, old]


def _casts_down(node: fx.Node, operand: fx.Node) -> bool:
    """Whether a node makes float16 of a wide operand."""
    is_half = graphs.is_float(node) and graphs.value(node).dtype is torch.float16
    return is_half and graphs.is_float(operand) and graphs.value(operand).dtype.itemsize > 2


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
        self.modules: dict[str, str] = {}  # what finds the scales, for each pullback
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
            self.pullbacks[name] = propagated(self.adjoint.get_submodule(name), count, self._stateless(name, count))
            self.adjoint.add_submodule(name, self.pullbacks[name].module)
        plan = self.pullbacks[name]
        wanted = [*range(count), *dict.fromkeys(g for g in plan.gradients if g is not None and g >= count)]
        with self.graph.inserting_before(call):
            found = self._found(call, cotangents, measured, wanted, plan)
            scale_of = dict(zip(wanted, found, strict=False))
            scaled = [self._scaled(node, scale_of[i]) for i, node in enumerate(cotangents)]
        call.args = (*call.args[: len(call.args) - count], *found[len(wanted) : -1], *scaled)
        self.vanished.append(found[-1])
        self.calls.add(call.name)
        for gradient in list(call.users):
            scale = plan.gradients[gradient.args[1]]
            if scale is not None:  # it follows from a cotangent
                self._unscale(gradient, scale_of[scale])

    def _stateless(self, name: str, count: int) -> set[int]:
        """The placeholders of a pullback, by number, that depend on no state in any of its calls."""
        calls = [node for node in self.graph.nodes if node.op == "call_module" and node.target == name]
        residuals = range(len(graphs.placeholders(self.adjoint.get_submodule(name))) - count)
        return {i for i in residuals if all(call.args[i] in self.stateless for call in calls)}

    def _found(
        self, call: fx.Node, cotangents: list[fx.Node], measured: list[int], wanted: list[int], plan: Propagation
    ) -> list[fx.Node]:
        """The wanted scales and the ratios, and how many entries vanish."""
        operands = [self.target, *(call.args[i] for i in plan.residuals), *(cotangents[i] for i in measured)]
        name = self._module([graphs.value(node) for node in operands], str(call.target), measured, wanted)
        made = self.graph.call_module(name, tuple(operands))
        made.meta["role"] = "scale"
        names = [*(f"scale_{i}" for i in range(len(wanted))), *(f"ratio_{i}" for i in range(len(plan.ratios)))]
        return [graphs.item(self.graph, name, made, i) for i, name in enumerate([*names, "vanished"])]

    def _module(self, values: list[torch.Tensor], pullback: str, measured: list[int], wanted: list[int]) -> str:
        """The name of the submodule that finds them for the residuals and cotangents of a pullback."""
        if pullback in self.modules:
            return self.modules[pullback]
        plan = self.pullbacks[pullback]

        def find(target: torch.Tensor, *operands: torch.Tensor) -> list[torch.Tensor]:
            residuals, cotangents = operands[: len(plan.residuals)], operands[len(plan.residuals) :]
            own = {i: power_of_two_scale(target, value) for i, value in zip(measured, cotangents, strict=True)}
            made_up = {
                factor: factor.made_up(value)
                for factor, value in zip(plan.factors, plan.factor_values(*residuals), strict=True)
            }
            used = dict.fromkeys([*wanted, *sum(plan.ratios, ())])
            scales = plan.scales.values(used, own, made_up, torch.ones_like(target))
            lost = [vanishing_entries(value * own[i]) for i, value in zip(measured, cotangents, strict=True)]
            shares = [scales[new] / scales[old] for new, old in plan.ratios]
            return [*(scales[i] for i in wanted), *shares, sum(lost[1:], lost[0])]

        self.modules[pullback] = f"adjoint_scale_{len(self.modules)}"
        residuals = (f"residual_{i}" for i in plan.residuals)
        names = ["target", *residuals, *(f"cotangent_{i}" for i in measured)]
        module = graphs.refresh(graphs.named(tracing.trace(find, values), names))
        self.adjoint.add_submodule(self.modules[pullback], module)
        return self.modules[pullback]

    def _scaled(self, cotangent: fx.Node, scale: fx.Node) -> fx.Node:
        scaled = graphs.call(self.graph, f"{cotangent.name}_scaled", aten.mul.Tensor, cotangent, scale)
        scaled.meta["val"] = graphs.value(cotangent)
        return scaled

    def _unscale(self, gradient: fx.Node, scale: fx.Node) -> None:
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
