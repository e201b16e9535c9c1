"""export: the rewritten forward of a model as a program of its own, which runs where rampde_fx is not installed."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from rampde_fx.backend import rewrite
from rampde_fx.emit.compared import RoundCompared
from rampde_fx.errors import ExportError, RampdeError, raising
from rampde_fx.frontend import unrewritten
from rampde_fx.ir import graphs
from rampde_fx.ir.captured import has_loop, repeats
from rampde_fx.passes.check_repetition import first_iterations
from rampde_fx.runtime import operators, ordered_times
from rampde_fx.torch_private import capturing, repetition, shapes

RECORDS = {torch.ops.rampde_fx.record_forward, torch.ops.rampde_fx.record_forward.default}
ALONE = "a forward pass of tensors alone"


def export(
    fn: Callable[..., Any], *args: Any, dynamic_shapes: Any = None, **kwargs: Any
) -> torch.export.ExportedProgram:
    """Export the rewritten forward of a marked model: velocities in low precision, states in fp32, and no gradients.

    The program holds operators of torch alone. torch.export.save writes it, torch.export.load reads it in a process
    without rampde_fx, and torch._inductor.aoti_compile_and_package compiles it ahead of time. odeint gives NaN there
    for times that are not strictly monotone.

    Args:
        fn: A Module or a function that mixed_precision has marked, or that calls one; compiled or not.
        *args: Its arguments, tensors in nested tuples, lists and dicts, and numbers, which become constants.
        dynamic_shapes: Which sizes may change, as torch.export.export takes it.
        **kwargs: Its keyword arguments.

    Returns:
        The program, whose parameters have the names that they have in the model.

    Raises:
        ExportError: if there is no marked loop in it; if a loop has adaptive steps, or a step size, whose number the
            host computes; if a result is made by Python; if a size must not change.
        RampdeError: as the backend would.
    """
    fn = capturing.uncompiled(fn)
    with torch.no_grad():
        given = _with_dynamic_sizes(fn, args, kwargs, dynamic_shapes)
        shipped = _Shipped(fn, _captured(fn, given), given)
        try:
            program = torch.export.export(shipped, args, kwargs, dynamic_shapes=dynamic_shapes, strict=False)
        except capturing.UserError as error:  # of sizes, and of arguments that dynamic_shapes does not fit
            raise _depends_on_size(str(error), shipped.where) from error
    for module in program.graph_module.modules():
        if isinstance(module, fx.GraphModule):
            RoundCompared(spelled_out=True)(module.graph)
            module.recompile()
    _check_operators(program, shipped.where)
    return program


@dataclass
class _Captured:
    """What is known of a captured model.

    Attributes:
        program: The rewritten graph; of what it takes and gives, the graph says the order.
        where: The line of its first loop.
        holds: Whether the sizes of inputs are those for which it was captured, as far as it depends on them.
        inputs: What it took, of the one call.
        outputs: What it gave.
        result: What the model gave.
    """

    program: fx.GraphModule | None = None
    where: str = ""
    holds: Callable[..., bool] = lambda *_: True
    inputs: Sequence[Any] = ()
    outputs: Sequence[Any] = ()
    result: Any = field(default=None)


def _with_dynamic_sizes(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], wanted: Any) -> Any:
    """The arguments, whose dynamic sizes Dynamo is to capture as symbols."""
    if not wanted:
        return args, kwargs
    names = list(inspect.signature(getattr(fn, "forward", fn)).bind(*args, **kwargs).arguments)
    specs = wanted if isinstance(wanted, dict) else dict(zip(names, wanted, strict=False))
    positional = [_marked(value, specs.get(name)) for value, name in zip(args, names, strict=False)]
    return (*positional, *args[len(names) :]), {name: _marked(value, specs.get(name)) for name, value in kwargs.items()}


def _marked(value: Any, spec: Any) -> Any:
    if isinstance(value, torch.Tensor) and spec is not None:
        entries = spec.items() if isinstance(spec, dict) else enumerate(spec)
        return capturing.with_dynamic_sizes(value, [i for i, size in entries if _may_change(size)])
    if isinstance(value, dict) and isinstance(spec, dict):
        return {key: _marked(entry, spec.get(key)) for key, entry in value.items()}
    if isinstance(value, (tuple, list)) and isinstance(spec, (tuple, list)):
        return type(value)(map(_marked, value, spec))
    return value


def _may_change(size: Any) -> bool:
    return size is not None and not isinstance(size, int) and size != torch.export.Dim.STATIC


def _captured(fn: Callable[..., Any], given: tuple[tuple[Any, ...], dict[str, Any]]) -> _Captured:
    captured = _Captured()

    @repetition.takes_repeats
    def inspect_graph(graph_module: fx.GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
        graph_module.meta[unrewritten.BACKEND] = "export"
        try:
            captured.program, captured.where = _rewritten(graphs.copied(graph_module))
        except RampdeError as error:
            if repeats(graph_module):
                repetition.capture_in_full(str(error))
            return raising(error)
        captured.holds = shapes.condition_of([graphs.value(node) for node in graphs.placeholders(graph_module)])
        run = first_iterations(graph_module)

        def once(*inputs: Any) -> Any:
            captured.inputs, captured.outputs = inputs, run(*inputs)
            return captured.outputs

        return once

    captured.result = capturing.capture(fn, inspect_graph, *given, fullgraph=True)
    if captured.program is None:
        raise _no_loop()
    return captured


def _no_loop() -> ExportError:
    return ExportError(
        "there is no marked loop in what is exported",
        required="a model with a loop over rampde_fx.steps(t), or an odeint",
        fix="call torch.export.export for a model without one",
    )


def _rewritten(graph_module: fx.GraphModule) -> tuple[fx.GraphModule, str]:
    """The graph with its loops rewritten, without what counts runs, and the line of its first loop."""
    if not has_loop(graph_module):
        raise _no_loop()
    loops = rewrite(graph_module, counts=False)
    if searches := [loop for loop in loops if loop.controller is not None]:
        raise ExportError(
            "an odeint with adaptive steps is to be exported",
            required="a number of steps that the shapes tell: the host chooses adaptive steps",
            fix='take fixed steps: method="rk4", or options={"num_steps": n} with any method',
            where=searches[0].where,
        )
    for module in graph_module.modules():
        if isinstance(module, fx.GraphModule):
            _without_records(module)
    return graph_module, loops[0].where


def _depends_on_size(told: str, where: str) -> ExportError:
    found, suggested = told.partition("\n")[0].partition("!")[0], told.partition("Suggested fixes:\n")[2]
    ranges = suggested.partition("\n\n")[0].split("\n") if suggested else ["the range in which the model does the same"]
    return ExportError(
        f"the model does something else for other sizes, and dynamic_shapes lets them change: {found.rstrip('.')}",
        required="sizes for which the captured graph is right",
        fix=f"leave this size out of dynamic_shapes, or write {', '.join(map(str.strip, ranges))}",
        where=where,
    )


def _without_records(graph_module: fx.GraphModule) -> None:
    """Take out what counts runs, which adds zeros, and let operators of ours be plain ones."""
    for node in list(graph_module.graph.nodes):
        if node.target is operators.monotone:
            node.target = ordered_times.zero_if_ordered
        node.target = operators.MARKS.get(node.target, node.target)
        for user in list(node.users) if node.target in RECORDS else ():
            user.replace_all_uses_with(next(operand for operand in user.all_input_nodes if operand is not node))
    graph_module.graph.eliminate_dead_code()
    graph_module.recompile()


def _check_operators(program: torch.export.ExportedProgram, where: str) -> None:
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, fx.GraphModule) else ():
            if getattr(node.target, "namespace", "") == operators.library.ns:
                raise ExportError(
                    f"the exported program would call {node.target}, an operator of rampde_fx",
                    required="a number of steps that the shapes tell, and random numbers of torch's own",
                    fix='give odeint options={"num_steps": n} instead of a step size',
                    where=where,
                )


class _Shipped(nn.Module):
    """The rewritten graph with the signature of the model, its parameters under their names."""

    def __init__(self, fn: Callable[..., Any], captured: _Captured, given: Any) -> None:
        super().__init__()
        assert captured.program is not None, "there is a loop"
        self.program, self.holds, self.where = captured.program, captured.holds, captured.where
        leaves = pytree.tree_leaves(given)
        names = _names(fn)
        nodes = graphs.placeholders(captured.program)
        self.places: list[Any] = []
        for value, node in zip(captured.inputs, nodes, strict=True):
            self.places.append(self._place(value, node, nodes, leaves, names))
        results, self.structure = pytree.tree_flatten(captured.result)
        self.results = [_origin(value, captured.outputs, leaves, captured.where) for value in results]
        forward = self._with_signature_of(getattr(fn, "forward", fn))
        self.forward = forward

    def _with_signature_of(self, target: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            return self._run(pytree.tree_leaves((args, kwargs)))

        forward.__signature__ = inspect.signature(target)  # type: ignore[attr-defined]
        return forward

    def _place(
        self, value: Any, node: fx.Node, nodes: list[fx.Node], leaves: list[Any], names: dict[int, str]
    ) -> Callable[[list[Any], list[Any]], Any]:
        """How an input of the graph is read from the model's arguments, and from the inputs before it is known."""
        if not isinstance(value, torch.Tensor):
            return _size(node, nodes, self.where)
        if (i := _index(value, leaves)) is not None:
            return lambda leaves, _: leaves[i].detach()  # a derivative of what is low would not be scaled
        name = names.get(id(value), f"constant_{len(self.places)}")
        _register(self, name, value)
        return lambda *_: _attribute(self, name)

    def _run(self, leaves: list[Any]) -> Any:
        inputs: list[Any] = [None] * len(self.places)
        for late in (False, True):  # sizes are read of tensors
            for i, place in enumerate(self.places):
                if isinstance(place, _Size) is late:
                    inputs[i] = place(leaves, inputs)
        if not self.holds(*inputs):
            raise _depends_on_size("these sizes are others", self.where)
        outputs = self.program(*inputs)
        values = [read(outputs, leaves) for read in self.results]
        return pytree.tree_unflatten(values, self.structure)


@dataclass(frozen=True)
class _Size:
    """A size of one of the graph's inputs."""

    tensor: int
    dimension: int

    def __call__(self, leaves: list[Any], inputs: list[Any]) -> Any:
        return inputs[self.tensor].shape[self.dimension]


def _size(node: fx.Node, nodes: list[fx.Node], where: str) -> _Size:
    symbol = str(graphs.value(node))
    for i, other in enumerate(nodes):
        shape = graphs.value(other).shape if isinstance(graphs.value(other), torch.Tensor) else ()
        for dimension, size in enumerate(shape):
            if str(size) == symbol:
                return _Size(i, dimension)
    raise ExportError(
        f"the number '{graphs.user_name(node)}' is an argument of the exported program",
        required=ALONE,
        fix="leave dynamic_shapes out, so that it is a constant, or pass it as a tensor",
        where=where,
    )


def _names(fn: Any) -> dict[int, str]:
    if not isinstance(fn, nn.Module):
        return {}
    return {id(value): name for name, value in (*fn.named_buffers(), *fn.named_parameters())}


def _index(value: Any, values: Sequence[Any]) -> int | None:
    return next((i for i, other in enumerate(values) if other is value), None)


def _origin(
    value: Any, outputs: Sequence[Any], leaves: list[Any], where: str
) -> Callable[[Sequence[Any], list[Any]], Any]:
    """How a result is read from those of the graph, and from the arguments."""
    if not isinstance(value, torch.Tensor):
        return lambda *_: value
    if (i := _index(value, outputs)) is not None:
        return lambda outputs, _: outputs[i]
    if (j := _index(value, leaves)) is not None:
        return lambda _, leaves: leaves[j]
    raise ExportError(
        "a result of the model is neither computed by its graph nor one of its arguments",
        required=ALONE,
        fix="return what the model computes, and keep nothing of earlier calls",
        where=where,
    )


def _register(module: nn.Module, name: str, value: torch.Tensor) -> None:
    *path, last = name.split(".")
    for part in path:
        if not hasattr(module, part):
            module.add_module(part, nn.Module())
        module = getattr(module, part)
    if isinstance(value, nn.Parameter):
        module.register_parameter(last, nn.Parameter(value.detach(), requires_grad=False))
    else:
        module.register_buffer(last, value.detach())


def _attribute(module: Any, name: str) -> Any:
    for part in name.split("."):
        module = getattr(module, part)
    return module
