"""Trace one iteration of a run to a step of functional ATen.

Before:  nodes of iteration 0 in the captured graph: iadd(y, mul(dt, k)), ...
After:   step(y, t, dt, w): ...;  mul = aten.mul(dt, k);  add = aten.add(y, mul);  return add

The step is traced with make_fx under functionalisation, so that an affine update is a handful of ATen operations
however it was spelled, in-place updates included, and a velocity that uses torch.func is plain ATen. What the user
detaches, or computes under no_grad, passes through stop_gradient. Where linear algebra fails, and eager code raises an
error, the result is NaN. Under autocast what a layer before the loop made in half precision enters in float32.

Requires: a Run.
Ensures:  the step takes carries, times, per-step inputs and invariants in this order, and returns the next carries,
          the values that are read outside of the run, those that nothing reads, and every tensor as the step leaves it;
          CapturedStep.after says which of these each input became.
Raises:   UnsupportedLoopError for what cannot be traced, and for operands whose dtypes differ where eager code refuses
          them, which a trace does not; MutationError for a write that autograd does not see, to
          what a gradient flows through.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx
from torch.overrides import TorchFunctionMode

from rampde_fx.errors import MutationError, RampdeError, UnsupportedLoopError
from rampde_fx.ir import graphs, operator_table, tracing
from rampde_fx.ir.captured import CapturedStep, MarkedLoop, Run
from rampde_fx.ir.effects import Observer, call, detaches, gradient_modes, shares_memory
from rampde_fx.ir.lowering import HALF
from rampde_fx.ir.sources import ORDER, CarrySource, Key, Source, TimeSource, carries_among
from rampde_fx.policy_text import word_of
from rampde_fx.torch_private import fake_tensors, shapes

DETACHING = {torch.detach, torch.Tensor.detach, torch.Tensor.data.__get__}


def capture_step(graph_module: fx.GraphModule, marked: MarkedLoop, run: Run) -> CapturedStep:
    """The first iteration of a run of the marked loop as functional ATen."""
    if marked.with_gradients:
        _check_writes(run)
    inputs, step, outputs = _torch_step(graph_module, marked, run)
    written = _written(marked) if marked.autocast else set()
    values = [_fake(source, marked, written) for source in inputs]
    for node, source, value in zip(graphs.placeholders(step), inputs, values, strict=True):
        node.meta["example_value"] = graphs.value(source.values[0]) if source.values else value
    functional, after = _functional(_Captured(step, with_gradients=marked.with_gradients), values)
    _check_dtypes(functional, autocast=marked.autocast)
    return CapturedStep(inputs, functional, outputs, after, unread=len(run.unread))


def _torch_step(
    graph_module: fx.GraphModule, marked: MarkedLoop, run: Run
) -> tuple[list[Source], fx.GraphModule, list[Any]]:
    """One iteration: its inputs, carries first; the module; the keys of the results behind the next carries."""
    inputs = _ordered_inputs(run)
    graph = fx.Graph()
    names = graphs.distinct(_name(source, marked, run) for source in inputs)
    place: dict[Any, fx.Node] = {s: graphs.placeholder(graph, name) for s, name in zip(inputs, names, strict=True)}
    place.update({source.key: place[source] for source in inputs if isinstance(source, TimeSource)})
    for position, (node, row) in enumerate(zip(run.iterations[0], run.sources, strict=True)):
        operands = iter(row)
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda _, operands=operands: place[next(operands)])
        place[position] = graph.create_node(node.op, node.target, args, kwargs, node.name)
        place[position].meta = dict(node.meta)
    outputs = run.stacked()
    # What lags by d > 1 steps becomes what lags by d - 1: so a multistep method's values grow older.
    nexts = [place[source.key if source.is_latest else source.younger()] for source in carries_among(inputs)]
    graph.output((*nexts, *(place[key] for key in (*outputs, *run.unread))))
    return inputs, fx.GraphModule(graph_module, graph), outputs


def _ordered_inputs(run: Run) -> list[Source]:
    """The distinct inputs of an iteration: carries, times, per-step inputs, invariants."""
    found: dict[Source, None] = dict.fromkeys(run.entered)
    keys: dict[Key | None, None] = {}
    for source in (s for row in run.sources for s in row):
        if isinstance(source, (int, str)):
            keys[source] = None
        elif isinstance(source, CarrySource):
            found.update({replace(source, values=source.values[lag:]): None for lag in range(len(source.values))})
        else:
            found[source] = None
    keys |= dict.fromkeys([*(source.key for source in carries_among(list(found))), *run.outputs])
    found.update({TimeSource("t" if key == "t" else "dt"): None for key in keys if key in ("t", "dt")})
    return sorted(found, key=lambda source: ORDER.index(type(source)))


def _name(source: Source, marked: MarkedLoop, run: Run) -> str:
    if isinstance(source, TimeSource):
        return source.key
    if isinstance(source, CarrySource) and source in run.entered and source.values[0].op != "placeholder":
        return _name_in_odeint(run.entered.index(source) - 2, marked)  # the times come first
    return graphs.user_name(source.values[0])


def _name_in_odeint(i: int, marked: MarkedLoop) -> str:
    """What the user calls a state of odeint that is computed before: its node has a name out of the solver."""
    left = marked.left()
    count = len(left.collected if marked.searches else left.states)
    if i >= count:
        return "rate"
    return "y0" if count == 1 else f"y0_{i}"


def _written(marked: MarkedLoop) -> set[int]:
    """The storages that the loop writes to."""
    return Observer().written_among(node for nodes in marked.iterations for node in nodes)


def _fake(source: Source, marked: MarkedLoop, written: set[int]) -> Any:
    if isinstance(source, TimeSource):
        return fake_tensors.detached(graphs.value(marked.markers[0].args[0])[0])
    values = [graphs.value(node) for node in source.values]
    needs_grad = not isinstance(source, CarrySource) and any(getattr(value, "requires_grad", False) for value in values)
    fake = fake_tensors.differentiable(values[0]) if needs_grad else fake_tensors.detached(values[0])
    widens = marked.autocast and getattr(fake, "dtype", None) in HALF
    return fake.float() if widens and written.isdisjoint(map(fake_tensors.storage_of, values)) else fake


def _functional(captured: _Captured, values: list[Any]) -> tuple[fx.GraphModule, list[fx.Node]]:
    """The step as functional ATen, and for every placeholder the node that holds its value after the step."""
    step = captured.module

    def results_and_inputs(*args: Any) -> tuple[Any, ...]:
        results = captured.run(*args)
        return *results, *(arg for arg in args if isinstance(arg, torch.Tensor))

    names = [node.name for node in graphs.placeholders(step)]
    try:
        traced = graphs.named(tracing.trace(results_and_inputs, values, functionalize=True), names)
    except (RuntimeError, TypeError, NotImplementedError, AttributeError) as error:
        if isinstance(error, RampdeError):
            raise
        raise UnsupportedLoopError(
            f"a step cannot be traced to functional ATen: {error}",
            required="a step of functional torch operations on dense tensors",
            fix="move the operation out of the loop, or write it by others",
            where=graphs.user_line(step.graph.output_node().all_input_nodes[0]),
        ) from error
    results = graphs.results(traced)
    count = len(graphs.results(step))
    tensors = iter(results[count:])
    inputs = graphs.placeholders(traced)
    after = [
        next(tensors) if isinstance(value, torch.Tensor) else node for node, value in zip(inputs, values, strict=True)
    ]
    return traced, after


def _check_dtypes(step: fx.GraphModule, *, autocast: bool) -> None:
    """Refuse operands of several dtypes where eager code does: fake tensors take them, and casts would hide them.

    Autocast would cast them before, but for those in float64.
    """
    for node in graphs.body(step):
        arrays = [graphs.value(n) for n in node.all_input_nodes if isinstance(graphs.value(n), torch.Tensor)]
        dtypes = {x.dtype for x in arrays if x.ndim and graphs.has_derivatives(x.dtype)}
        cast = autocast and torch.float64 not in dtypes
        if len(dtypes) < 2 or cast or operator_table.is_elementwise(node.target):
            continue
        refusal = _refusal(node, None)
        if refusal is not None and _refusal(node, functools.reduce(torch.promote_types, dtypes)) is None:
            names = " and ".join(sorted(map(word_of, dtypes)))
            raise UnsupportedLoopError(
                f"a step computes {operator_table.name_of(node.target)} of {names} tensors, which eager code refuses, "
                f"too: {refusal}",
                required="operands of one dtype",
                fix="make the state and the parameters float32: y.to(torch.float32), net.to(torch.float32)",
                where=graphs.user_line(node),
            )


def _refusal(node: fx.Node, dtype: torch.dtype | None) -> Exception | None:
    """What eager code says of a node's call, on zeros in the dtype, or in their own; None if it computes it."""

    def real(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return shapes.size_hint(value) if isinstance(value, torch.SymInt) else value
        own = dtype if dtype is not None and graphs.has_derivatives(value.dtype) else value.dtype
        return torch.zeros((), dtype=own).expand([shapes.size_hint(size) for size in value.shape])

    try:
        with fake_tensors.real_tensors(), torch.no_grad():
            call(node, {operand: real(graphs.value(operand)) for operand in node.all_input_nodes})
    except (RuntimeError, NotImplementedError, IndexError, TypeError) as error:
        return error
    return None


def _check_writes(run: Run) -> None:
    """Refuse writes past autograd to what a gradient flows through: it flows as if nothing had been written."""
    observer = Observer()
    modes = gradient_modes(run.iterations[0], outer=True)
    for position, gradients in enumerate(modes):
        column = [nodes[position] for nodes in run.iterations]
        effects = observer.effects(column[0])
        for operand in (column[0].all_input_nodes[i] for i in effects.writes if not effects.unknown):
            if gradients and not _is_detached(operand):
                continue
            slot = column[0].all_input_nodes.index(operand)
            if any(_has_gradient(node.all_input_nodes[slot]) for node in column):
                raise MutationError(
                    f"a step writes to '{graphs.user_name(_shown(operand))}' under no_grad, or through detach() or"
                    " data, and a gradient flows through it",
                    required="writes that autograd sees, or to what needs no gradient",
                    fix="add the change without a gradient instead: y = y + (y.clamp(-1, 1) - y).detach()",
                    where=graphs.user_line(column[0]),
                )


def _is_detached(node: fx.Node) -> bool:
    """Whether a node shows the memory of another one without its gradient."""
    return detaches(node) or (_shown(node) is not node and _is_detached(node.all_input_nodes[0]))


def _shown(node: fx.Node) -> fx.Node:
    """The node whose memory a chain of views shows."""
    while node.all_input_nodes and shares_memory(node):
        node = node.all_input_nodes[0]
    return node


def _has_gradient(node: fx.Node) -> bool:
    """Whether a gradient flows through the memory that a node shows, by whatever name."""
    storage = fake_tensors.storage_of(graphs.value(node))
    return any(
        graphs.value(other).requires_grad
        for other in node.graph.nodes
        if isinstance(graphs.value(other), torch.Tensor) and fake_tensors.storage_of(graphs.value(other)) == storage
    )


class _Captured(fx.Interpreter):
    """Runs a captured step; what it detaches, or computes under no_grad, gets a gradient of zero by stop_gradient.

    Tensors that the step writes to are not wrapped: views of them, and detached names, must go on sharing memory. Where
    such a name without gradient is read, what is read gets a gradient of zero.

    In a loop that is under no_grad itself the mode says nothing: there is no gradient but those of torch.func
    transforms in the velocity, which turn it on.
    """

    def __init__(self, step: fx.GraphModule, *, with_gradients: bool) -> None:
        super().__init__(step)
        self.with_gradients = with_gradients
        self.observer = Observer()
        known = [node for node in graphs.body(step) if not self.observer.effects(node).unknown]
        self.written = self.observer.written_among(known)
        self.without_gradient: set[fx.Node] = set()  # names of what is written

    def run_node(self, n: fx.Node) -> Any:
        if n.op not in ("call_function", "call_method"):
            with self._read_without_gradient(n, []):
                return super().run_node(n)
        with tracing.LinalgChecks() as checks:
            result = self._called(n)
        for info in checks.infos:
            result = torch.utils._pytree.tree_map_only(torch.Tensor, lambda x, info=info: _solved(x, info), result)
        return result

    def _called(self, n: fx.Node) -> Any:
        effects = self.observer.effects(n)
        written = [] if effects.unknown else [n.all_input_nodes[i] for i in effects.writes]
        if graphs.function_name(n) == "detach_":
            written, result = n.all_input_nodes, self.env[n.all_input_nodes[0]]
        elif "out" in n.kwargs and not self.with_gradients:
            with torch.no_grad():  # the caller's, which the graph does not show: with gradients on there is no out=
                result = super().run_node(n)
        elif shares_memory(n) and fake_tensors.storage_of(graphs.value(n)) in self.written:
            result = super().run_node(n)
            shown = self.without_gradient.intersection(n.all_input_nodes)
            if shown or detaches(n) or self._computes_without_gradients():
                self.without_gradient.add(n)
        else:
            with _Stops(self._computes_without_gradients), self._read_without_gradient(n, written):
                result = super().run_node(n)
            result = _stopped(result) if detaches(n) else result
        if self._computes_without_gradients() or graphs.function_name(n) == "detach_":
            for operand in written:
                self.env[operand].copy_(_stopped(self.env[operand]))
        return result

    @contextlib.contextmanager
    def _read_without_gradient(self, n: fx.Node, written: Sequence[fx.Node]) -> Iterator[None]:
        """While a node runs, what it reads by names without gradient, and does not write to, has none."""
        names = [node for node in n.all_input_nodes if node in self.without_gradient and node not in written]
        if n.op == "output":  # what is another name of a whole input is that input, updated
            names = [node for node in names if not self._is_input(node)]
        kept = {node: self.env[node] for node in names}
        self.env.update({node: _stopped(value) for node, value in kept.items()})
        try:
            yield
        finally:
            self.env.update(kept)

    def _is_input(self, node: fx.Node) -> bool:
        """Whether a node shows all of an input, as it shows itself."""
        shown = graphs.value(node)
        same = [
            value
            for value in map(graphs.value, graphs.placeholders(node.graph.owning_module))
            if isinstance(value, torch.Tensor) and fake_tensors.storage_of(value) == fake_tensors.storage_of(shown)
        ]
        return any(value.shape == shown.shape and value.stride() == shown.stride() for value in same)

    def _computes_without_gradients(self) -> bool:
        return self.with_gradients and not torch.is_grad_enabled()

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if isinstance(target, torch._ops.HigherOrderOperator):  # find_loops lets those in that run their body
            return _Captured(args[0], with_gradients=self.with_gradients).run(*args[1:])
        if getattr(target, "__name__", "") == "_enter_inference_mode":  # no_grad, of tensors that are traced
            before = torch.is_grad_enabled()
            torch._C._set_grad_enabled(not args[0])
            return before
        if getattr(target, "__name__", "") == "_exit_inference_mode":
            return torch._C._set_grad_enabled(args[0])
        return super().call_function(target, args, kwargs)


def _solved(result: torch.Tensor, info: torch.Tensor) -> torch.Tensor:
    """What linear algebra gave, NaN where its code says that it failed: eager code raises an error there."""
    if not graphs.has_derivatives(result.dtype):
        return result
    matrix_by_matrix = result.shape[: info.ndim] == info.shape
    solved = (
        (info == 0).reshape(*info.shape, *[1] * (result.ndim - info.ndim)) if matrix_by_matrix else (info == 0).all()
    )
    return torch.where(solved, result, torch.nan)


class _Stops(TorchFunctionMode):
    """Ends the gradient of what is detached, or computed without gradients, in whichever function of the user's."""

    def __init__(self, without_gradients: Callable[[], bool]) -> None:
        super().__init__()
        self.without_gradients = without_gradients

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return _stopped(result) if func in DETACHING or self.without_gradients() else result


def _stopped(result: Any) -> Any:
    stop = torch.ops.rampde_fx.stop_gradient
    return torch.utils._pytree.tree_map_only(
        torch.Tensor, lambda x: stop(x) if graphs.has_derivatives(x.dtype) else x, result
    )
