"""Generate the adjoint of a step: its exact transpose, which recomputes the step.

Before:  step(y, dt, w):  k = velocity_0(y, w);  y_next = y + dt * k
After:   adjoint(a, total_w, y, dt, w):  k, residuals = velocity_0_forward(y, w);  b = dt * a
         dy, dw = velocity_0_pullback(residuals, b);  return a + dy, total_w + dw

For a step y_next = Phi(y, w) it maps the cotangent a of y_next to (dPhi/dy)^T a, and adds (dPhi/dw)^T a to what later
steps gave. Every node is transposed by torch's own derivative of that one operation; every velocity evaluation is one
VJP, with a pullback submodule that takes and returns the accumulation dtype.

Requires: a Loop behind count_underflow. One of which no gradient is wanted is left as it is.
Ensures:  the adjoint's carries come first: cotangents of carried states, then the totals of the invariants; results
          only for what a gradient is wanted of; no state, time or gradient node below the accumulation dtype outside
          of the velocity submodules.
Raises:   UnsupportedVelocityError for an operation without a derivative.
Source:   arXiv 2510.23498, the discrete adjoint; Griewank and Walther, Evaluating Derivatives, 2008, chapter 3.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from rampde_fx.errors import UnsupportedVelocityError
from rampde_fx.ir import graphs, tracing
from rampde_fx.ir.ends import Adjoint, AdjointInput, Cotangent, Evaluation, Gradient, Operand, Total, remaining
from rampde_fx.ir.loops import CountedLoop, DifferentiatedLoop, Loop
from rampde_fx.ir.lowering import mark_coefficients
from rampde_fx.torch_private import fake_tensors

aten = torch.ops.aten
Output = tuple[fx.Node, int]  # a node of the step, and which of its outputs


@dataclass(frozen=True)
class SplitVelocity:
    """A velocity split in two: forward(inputs) -> outputs, residuals; pullback(residuals, cotangents) -> gradients.

    Attributes:
        forward: Name of the submodule that evaluates the velocity and returns its residuals too.
        pullback: Name of the submodule that maps residuals and cotangents to gradients.
        outputs: Number of outputs of the velocity.
        residuals: For every residual the input that it is, or None where the forward computes it.
        cotangents: Indices of the outputs whose cotangents the pullback takes.
        gradients: Indices of the inputs whose gradients it returns.
    """

    forward: str
    pullback: str
    outputs: int
    residuals: tuple[int | None, ...]
    cotangents: tuple[int, ...]
    gradients: tuple[int, ...]


def generate_adjoint(loop: CountedLoop) -> DifferentiatedLoop:
    """Add the adjoint of the step, if a backward can be asked for."""
    if not loop.differentiated:
        return loop.then(DifferentiatedLoop)
    active = find_active(loop)
    needs_grad = tuple(n in active for n in graphs.placeholders(loop.step))
    return loop.then(DifferentiatedLoop, needs_grad=needs_grad, adjoint=_Transposition(loop, active).run())


def find_active(loop: Loop) -> set[fx.Node]:
    """The differentiable nodes that follow from what a gradient is wanted of; a carry does if its next value does."""
    nodes = graphs.placeholders(loop.step)
    sources = {node for node, needed in zip(nodes, loop.needs_grad, strict=True) if needed}
    while True:
        reached = graphs.depends_on(loop.step.graph, sources, by_gradient=True)
        nexts = zip(nodes[: loop.carries], graphs.results(loop.step), strict=False)
        more = {carry for carry, after in nexts if after in reached and graphs.is_differentiable(carry)}
        if more <= sources:
            return {node for node in reached if graphs.is_differentiable(node) or _has_several_outputs(node)}
        sources |= more


def _has_several_outputs(node: fx.Node) -> bool:
    return isinstance(graphs.value(node), (tuple, list))


class _Transposition:
    """One sweep forward over the step, one in reverse."""

    def __init__(self, loop: Loop, active: set[fx.Node]) -> None:
        self.loop, self.active = loop, active
        self.adjoint = fx.GraphModule(torch.nn.Module(), fx.Graph())
        self.graph = self.adjoint.graph
        self.env: dict[fx.Node, fx.Node] = {}
        self.residuals: dict[fx.Node, list[fx.Node]] = {}
        self.cotangents: dict[Output, fx.Node | None] = {}
        self.incoming: dict[int, fx.Node | None] = {}
        self.splits: dict[tuple[str, tuple[int, ...], tuple[int, ...]], SplitVelocity] = {}
        self.used: dict[fx.Node, SplitVelocity] = {}
        self.evaluations: dict[fx.Node, Evaluation] = {}
        self.vjps: dict[str | None, fx.GraphModule] = {}  # of operations, which occur more than once

    def run(self) -> Adjoint:
        """The adjoint."""
        nodes = graphs.placeholders(self.loop.step)
        inputs = self._placeholders(nodes)
        for node in graphs.body(self.loop.step):
            self._copy_forward(node)
        for node in reversed(graphs.body(self.loop.step)):
            if node in self.active and node.target is not operator.getitem:
                self._transpose(node)
        totals = {entry.operand: node for node, entry in inputs if isinstance(entry, Total)}
        gradients = self._gradients(nodes, totals)
        self.graph.output(tuple(gradients.values()))
        graphs.refresh(self.adjoint, [graphs.value(node) for node, _ in inputs])
        kept = [pair for pair in inputs if pair[0].users or isinstance(pair[1], Cotangent)]
        for node, entry in inputs:
            if (node, entry) not in kept:
                self.graph.erase_node(node)
        self.adjoint.recompile()
        first, carries = self.loop.first_invariant, self.loop.carries
        return Adjoint(
            module=self.adjoint,
            inputs=tuple(entry for _, entry in kept),
            results=tuple(map(Gradient, gradients)),
            carries=sum(i < carries or i >= first for i in gradients),
            evaluations=remaining(list(self.evaluations.values()), self.adjoint),
        )

    def _placeholders(self, nodes: list[fx.Node]) -> list[tuple[fx.Node, AdjointInput]]:
        """Cotangents of carries, totals of invariants, cotangents of outputs, operands of the step."""
        results, carries, first = graphs.results(self.loop.step), self.loop.carries, self.loop.first_invariant
        made: list[tuple[fx.Node, AdjointInput]] = []
        for i in range(carries):
            if nodes[i] in self.active:
                made.append((self._placeholder(f"adjoint_{nodes[i].name}", nodes[i]), Cotangent(i)))
        for i in range(first, len(nodes)):
            if nodes[i] in self.active:
                made.append((self._placeholder(f"total_{nodes[i].name}", nodes[i]), Total(i)))
        for j in range(carries, len(results)):
            if results[j] in self.active:
                made.append((self._placeholder(f"cotangent_{j - carries}", results[j]), Cotangent(j)))
        for i, node in enumerate(nodes):
            self.env[node] = self._placeholder(node.name, node)
            made.append((self.env[node], Operand(i)))
        for cotangent, entry in made:
            if isinstance(entry, Cotangent) and results[entry.result] in self.active:
                self._add(self._output(results[entry.result]), cotangent)
        return made

    def _placeholder(self, name: str, like: fx.Node) -> fx.Node:
        node = graphs.placeholder(self.graph, name)
        node.meta["val"] = fake_tensors.detached(graphs.value(like))
        return node

    def _output(self, node: fx.Node) -> Output:
        """A getitem is an output of the node that it reads."""
        return (node.args[0], node.args[1]) if node.target is operator.getitem else (node, 0)

    def _add(self, output: Output, cotangent: fx.Node) -> None:
        """Add to a cotangent. What comes in for a carry waits: added last, it is rounded once, beside the sum of the
        increments' gradients, which are smaller by dt."""
        carries = graphs.placeholders(self.loop.step)[: self.loop.carries]
        if output[0] in carries and cotangent.op == "placeholder":
            i = carries.index(output[0])
            self.incoming[i] = self._sum(cotangent.name, self.incoming.get(i), cotangent)
        else:
            self.cotangents[output] = self._sum(f"grad_{output[0].name}", self.cotangents.get(output), cotangent)

    def _sum(self, name: str, before: fx.Node | None, cotangent: fx.Node | None) -> fx.Node | None:
        if before is None or cotangent is None:
            return cotangent if before is None else before
        return graphs.call(self.graph, name, aten.add.Tensor, before, cotangent)

    def _copy_forward(self, node: fx.Node) -> None:
        if node.op != "call_module":
            self.env[node] = self.graph.node_copy(node, self.env.__getitem__)
            if node.op == "get_attr":
                setattr(self.adjoint, str(node.target), getattr(self.loop.step, str(node.target)))
            return
        wanted = tuple(i for i, arg in enumerate(node.args) if arg in self.active)
        outputs = tuple(sorted(user.args[1] for user in node.users if user in self.active))
        args = tuple(self.env[arg] for arg in node.args)
        split = self._split(str(node.target), wanted, outputs)
        call = self.graph.call_module(split.forward, args)
        self.evaluations[node] = Evaluation(node.name, call.name, None)
        self.env[node] = call
        computed, prefix = itertools.count(split.outputs), f"residual_{len(self.evaluations)}"
        names = [entry.name for entry in graphs.placeholders(self.adjoint.get_submodule(split.pullback))]
        self.residuals[node] = [
            args[i] if i is not None else graphs.item(self.graph, f"{prefix}_{name}", call, next(computed))
            for i, name in zip(split.residuals, names, strict=False)
        ]
        self.used[node] = split

    def _split(self, name: str, wanted: tuple[int, ...], outputs: tuple[int, ...]) -> SplitVelocity:
        key = (name, wanted, outputs)
        if key not in self.splits:
            same = sum(known[0] == name for known in self.splits)
            prefix = f"{name}_{same}" if same else name
            velocity = self.loop.step.get_submodule(name)
            self.splits[key], forward, backward = split_pullback(velocity, wanted, outputs, prefix)
            self.adjoint.add_submodule(f"{prefix}_forward", forward)
            self.adjoint.add_submodule(f"{prefix}_pullback", backward)
        return self.splits[key]

    def _transpose(self, node: fx.Node) -> None:
        given = {index: ct for (owner, index), ct in self.cotangents.items() if owner is node}
        if not given:
            return
        transpose = self._call_pullback if node.op == "call_module" else self._inline_vjp
        gradients = transpose(node, given)
        for operand, gradient in gradients:
            self._add(self._output(operand), gradient)

    def _call_pullback(self, node: fx.Node, given: dict[int, fx.Node]) -> list[tuple[fx.Node, fx.Node]]:
        split = self.used[node]
        values = {user.args[1]: self.env[user] for user in node.users}
        cotangents = [
            given[i] if i in given else self.graph.call_function(aten.zeros_like.default, (values[i],))
            for i in split.cotangents
        ]
        call = self.graph.call_module(split.pullback, (*self.residuals[node], *cotangents))
        self.evaluations[node] = replace(self.evaluations[node], pullback=call.name, cotangents=len(cotangents))
        return [
            (node.args[i], graphs.item(self.graph, f"grad_{node.args[i].name}", call, j))
            for j, i in enumerate(split.gradients)
        ]

    def _inline_vjp(self, node: fx.Node, given: dict[int, fx.Node]) -> list[tuple[fx.Node, fx.Node]]:
        operands = node.all_input_nodes
        wanted = [i for i, operand in enumerate(operands) if operand in self.active]
        values = [graphs.value(p) for p in operands]
        key = _key(node, values, wanted, list(given))
        if key is None or key not in self.vjps:
            self.vjps[key] = _trace_vjp(_operation_of(node), values, wanted, given, node)
        vjp = self.vjps[key]
        env = dict(zip(graphs.placeholders(vjp), [*(self.env[p] for p in operands), *given.values()], strict=True))
        gradients = self.graph.graph_copy(vjp.graph, env)
        return [(operands[i], g) for i, g in zip(wanted, gradients, strict=True) if g is not None]

    def _gradients(self, nodes: list[fx.Node], totals: dict[int, fx.Node]) -> dict[int, fx.Node]:
        """Results by placeholder of the step: adjoints of the carries, totals of the invariants, per-step gradients.

        An active carry's is zero where nothing reads it; an invariant's is added to its total.
        """
        found: dict[int, fx.Node] = {}
        per_step = range(self.loop.carries, self.loop.first_invariant)
        for i in (*range(self.loop.carries), *totals, *per_step):
            gradient = self.cotangents.get((nodes[i], 0)) if nodes[i] in self.active else None
            gradient = self._sum(f"adjoint_{nodes[i].name}_next", self.incoming.get(i), gradient)
            if gradient is None and nodes[i] in self.active and i < self.loop.carries:
                gradient = self.graph.call_function(aten.zeros_like.default, (self.env[nodes[i]],))
            if gradient is not None and i in totals:
                gradient = graphs.call(self.graph, f"{totals[i].name}_next", aten.add.Tensor, totals[i], gradient)
            if gradient is not None:
                found[i] = gradient
        return found


def _operation_of(node: fx.Node) -> Callable[..., Any]:
    """The node as a function of its distinct operands."""

    def operation(*values: Any) -> Any:
        env = dict(zip(node.all_input_nodes, values, strict=True))
        args, kwargs = fx.map_arg((node.args, node.kwargs), env.__getitem__)
        return node.target(*args, **kwargs)

    return operation


def _key(node: fx.Node, values: list[Any], wanted: list[int], outputs: list[int]) -> str | None:
    """What an operation's derivative is decided by; None where the layout of an operand is not told by numbers."""
    layouts = []
    for value in values:
        if not isinstance(value, torch.Tensor) or value.layout is not torch.strided:
            return None
        sizes = (*value.shape, *value.stride())
        if any(isinstance(size, torch.SymInt) for size in sizes):
            return None
        flags = value.requires_grad, value.is_conj(), value.is_neg()
        layouts.append((*sizes, value.dtype, value.device, *flags))
    places = list(map(node.all_input_nodes.index, graphs.operands(node)))
    return f"{graphs.operation(node)} {places} {layouts} {wanted} {outputs}"


def _differentiate(
    function: Callable[..., Any], values: list[Any], wanted: list[int] | tuple[int, ...], given: dict[int, torch.Tensor]
) -> tuple[Any, list[Any]]:
    """The function's outputs, and the gradients of the wanted operands for the given cotangents of outputs."""
    leaves = [v.detach().requires_grad_() if i in wanted else v for i, v in enumerate(values)]
    outputs = function(*leaves)
    flat = list(outputs) if isinstance(outputs, (tuple, list)) else [outputs]
    reached = {i: cotangent for i, cotangent in given.items() if flat[i].requires_grad}
    if not reached:
        return flat, [None] * len(wanted)
    gradients = torch.autograd.grad(
        [flat[i] for i in reached], [leaves[i] for i in wanted], list(reached.values()), allow_unused=True
    )
    return flat, list(gradients)


def _trace_vjp(
    function: Callable[..., Any], values: list[Any], wanted: list[int], given: dict[int, fx.Node], node: fx.Node
) -> fx.GraphModule:
    outputs = list(given)

    def vjp(*args: Any) -> list[Any]:
        cotangents = dict(zip(outputs, args[len(values) :], strict=True))
        return _differentiate(function, list(args[: len(values)]), wanted, cotangents)[1]

    value = graphs.value(node)
    like = list(value) if isinstance(value, (tuple, list)) else [value]
    cotangents = [fake_tensors.detached(like[i]) for i in outputs]
    return _traced(vjp, [*values, *cotangents], f"the operation {node.target}", node)


def _traced(derivative: Callable[..., Any], values: list[Any], of: str, node: fx.Node) -> fx.GraphModule:
    """The trace of a derivative of what stands at the node."""

    def unchecked(*args: Any) -> Any:
        with tracing.LinalgChecks():  # the step has NaN where they fail
            return derivative(*args)

    try:
        return tracing.trace(unchecked, values, functionalize=True)
    except (RuntimeError, NotImplementedError) as error:
        writes = "auto_functionalized" in str(error)  # torch's name for an operator with mutates_args
        reason = "it calls an operator that writes to its arguments" if writes else str(error)
        fix = "have the operator return its result, with mutates_args=()" if writes else "write the operation by others"
        raise UnsupportedVelocityError(
            f"{of} has no derivative that can be traced: {reason}",
            required="a step that torch can differentiate",
            fix=f"detach what needs no gradient, or {fix}",
            where=graphs.user_line(node),
        ) from error


def split_pullback(
    velocity: fx.GraphModule, wanted: tuple[int, ...], outputs: tuple[int, ...], prefix: str
) -> tuple[SplitVelocity, fx.GraphModule, fx.GraphModule]:
    """Differentiate a velocity, and split the joint graph into a forward with residuals and a pullback."""
    inputs = graphs.placeholders(velocity)
    values = [graphs.value(node) for node in inputs]
    results = graphs.results(velocity)
    tangents = [fake_tensors.detached(graphs.value(results[i])) for i in outputs]
    present: list[int] = []  # of the wanted inputs those that have a gradient: filled in while joint is traced

    def joint(*args: Any) -> list[Any]:
        given = dict(zip(outputs, args[len(values) :], strict=True))
        flat, gradients = _differentiate(fx.Interpreter(velocity).run, list(args[: len(values)]), wanted, given)
        present[:] = [i for i, gradient in zip(wanted, gradients, strict=True) if gradient is not None]
        return [*flat, *(gradient for gradient in gradients if gradient is not None)]

    nodes = graphs.body(velocity)[::-1]
    last = next(filter(graphs.user_line, nodes), nodes[0])  # that has a line of the user's
    traced = _traced(joint, [*values, *tangents], "a velocity evaluation", last)
    names = [node.name for node in inputs] + [f"cotangent_{i}" for i in range(len(outputs))]
    traced = graphs.named(traced, names)
    nodes, found = graphs.placeholders(traced), graphs.results(traced)
    primals, cotangents = nodes[: len(values)], nodes[len(values) :]
    backward = graphs.depends_on(traced.graph, cotangents)
    mark_coefficients(traced, [node for node in graphs.body(traced) if node not in backward])
    ahead = [node for node in graphs.body(traced) if node not in backward]
    gradients = found[len(results) :]
    residuals = [n for n in [*primals, *ahead] if any(u in backward for u in n.users) or n in gradients]
    computed = [node for node in residuals if node not in primals]
    forward = graphs.extract(traced, ahead, primals, [*found[: len(results)], *computed])
    behind = [node for node in graphs.body(traced) if node in backward]
    pullback = graphs.extract(traced, behind, [*residuals, *cotangents], gradients)
    plan = SplitVelocity(
        forward=f"{prefix}_forward",
        pullback=f"{prefix}_pullback",
        outputs=len(results),
        residuals=tuple(primals.index(n) if n in primals else None for n in residuals),
        cotangents=outputs,
        gradients=tuple(present),
    )
    return plan, graphs.refresh(forward), graphs.refresh(pullback)
