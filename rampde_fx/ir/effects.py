"""What a captured node does beside returning a value: whether it writes to its operands, or draws random numbers.

Found by making the call, on fake values of its operands' kinds, and not by its name.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_leaves

from rampde_fx.ir import graphs
from rampde_fx.torch_private import fake_tensors

OF_TORCH = ("torch", "_operator", "builtins", "math", "einops")


@dataclass(frozen=True)
class Effects:
    """The effects of a captured node.

    Attributes:
        writes: Which of its distinct operands (all_input_nodes) the node writes to.
        draws: Whether it draws random numbers.
        unknown: Whether it cannot be called by itself, as the levels of a torch.func transform cannot.
    """

    writes: tuple[int, ...] = ()
    draws: bool = False
    unknown: bool = False


class Observer:
    """Observes nodes; those that do the same to operands of the same kinds are called once."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, str], Effects] = {}

    def effects(self, node: fx.Node) -> Effects:
        """The effects of a node. One that cannot be called by itself is taken to write to all that it reads."""
        key = graphs.operation(node), _kinds(node)
        if key not in self._known:
            self._known[key] = _observed(node)
        return self._known[key]

    def has_effects(self, node: fx.Node) -> bool:
        """Whether a node does anything but return a value."""
        return self.effects(node) != Effects()

    def written(self, node: fx.Node) -> set[int]:
        """The storages that a node writes to."""
        operands = node.all_input_nodes
        storages = (fake_tensors.storage_of(graphs.value(operands[i])) for i in self.effects(node).writes)
        return {storage for storage in storages if storage is not None}

    def written_among(self, nodes: Iterable[fx.Node]) -> set[int]:
        """The storages that some nodes write to."""
        return {storage for node in nodes for storage in self.written(node)}


def _observed(node: fx.Node) -> Effects:
    operands = node.all_input_nodes
    if node.op not in ("call_function", "call_method", "call_module") or not any(
        isinstance(graphs.value(n), torch.Tensor) for n in (node, *operands)
    ):
        return Effects()  # a mode, a number
    try:
        values = [stand_in(operand) for operand in operands]
        written, draws = _observe(lambda: call(node, dict(zip(operands, values, strict=True))))
    except Exception:
        return Effects(writes=tuple(range(len(operands))), draws=True, unknown=True)
    return Effects(tuple(i for i, value in enumerate(values) if fake_tensors.storage_of(value) in written), draws)


class _Writes(fake_tensors.TorchDispatchMode):
    """Notes what the operators that run under it write to, and whether any draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.written: set[int | None] = set()
        self.draws = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        names = [argument.name for argument in func._schema.arguments]
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        for argument in func._schema.arguments:
            if argument.alias_info is not None and argument.alias_info.is_write:
                self.written.update(map(fake_tensors.storage_of, tree_leaves(given.get(argument.name))))
        self.draws |= torch.Tag.nondeterministic_seeded in func.tags
        return func(*args, **kwargs)


def _observe(call: Callable[[], Any]) -> tuple[set[int | None], bool]:
    """Make a call on fake values: the storages that it writes to, and whether it draws random numbers."""
    observer = _Writes()
    with contextlib.ExitStack() as stack:
        modes = (torch.inference_mode(False), fake_tensors.fake_mode(), fake_tensors.fresh_symbols_ignored())
        for context in (*modes, torch.no_grad(), fake_tensors.no_autocast(), observer):
            stack.enter_context(context)
        call()
    return observer.written, observer.draws


def stand_in(node: fx.Node) -> Any:
    """A value like that of a node: a fake tensor of its own, what a get_attr names, or the number itself."""
    value = graphs.value(node)
    if node.op == "get_attr" and not isinstance(value, torch.Tensor):
        return node.graph.owning_module.get_submodule(str(node.target))
    return fake_tensors.detached(value)


def call(node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    """Do what a node does, to other values; of a higher-order operation what its body does."""
    args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        return fx.Interpreter(args[0]).run(*args[1:])
    assert callable(node.target), f"{node.op} {node.target} is not a call"
    return node.target(*args, **kwargs)


def _kinds(node: fx.Node) -> str:
    values = [graphs.value(operand) for operand in node.all_input_nodes]
    positions = [node.all_input_nodes.index(operand) for operand in graphs.operands(node)]
    kinds = [(v.shape, v.dtype, v.device) if isinstance(v, torch.Tensor) else v for v in values]
    return f"{positions} {kinds}"


def with_bodies(nodes: Iterable[fx.Node]) -> Iterator[fx.Node]:
    """The nodes, and those in the bodies of higher-order operations among them, each before what holds it."""
    for node in nodes:
        body = getattr(node.graph.owning_module, str(node.target), None) if node.op == "get_attr" else None
        if isinstance(body, fx.GraphModule):
            yield from with_bodies(body.graph.nodes)
        yield node


def own_backward(node: fx.Node) -> str:
    """Of a function that Dynamo was told to admit, the name of the custom autograd.Function behind it; else empty."""
    if node.op != "call_function" or not _is_admitted(node.target):
        return ""
    with fake_tensors.fake_mode(), torch.enable_grad():
        return _own_derivative(call(node, {n: _varying(stand_in(n)) for n in node.all_input_nodes}))


def _own_derivative(results: Any) -> str:
    """The name of an autograd.Function, in Python or C++, among what autograd recorded of results; empty if none."""
    open_nodes = [leaf.grad_fn for leaf in tree_leaves(results) if isinstance(leaf, torch.Tensor)]
    seen = set(open_nodes)
    while open_nodes:
        node = open_nodes.pop()
        if node is None:
            continue
        if isinstance(node, torch.autograd.function.BackwardCFunction) or "CppNode" in node.name():
            return node.name().removesuffix("Backward")
        parents = {parent for parent, _ in node.next_functions} - seen
        seen |= parents
        open_nodes += parents
    return ""


def _is_admitted(target: Any) -> bool:
    """Whether a function is neither torch's nor Python's own."""
    if isinstance(target, torch._ops.OpOverload | torch._ops.OpOverloadPacket | torch._ops.HigherOrderOperator):
        return False
    owner = getattr(target, "__self__", None)
    if isinstance(owner, type) and issubclass(owner, torch.autograd.Function):
        return True
    return (getattr(target, "__module__", None) or "builtins").partition(".")[0] not in OF_TORCH


def _varying(value: Any) -> Any:
    return (
        fake_tensors.differentiable(value)
        if isinstance(value, torch.Tensor) and graphs.has_derivatives(value.dtype)
        else value
    )


def shares_memory(node: fx.Node) -> bool:
    """Whether a node returns memory of an operand's: a view, or what it wrote to."""
    return bool(_storages([node]) & _storages(node.all_input_nodes))


def _storages(nodes: Iterable[fx.Node]) -> set[int]:
    leaves = tree_leaves([graphs.value(node) for node in nodes])
    return {storage for storage in map(fake_tensors.storage_of, leaves) if storage is not None}


def detaches(node: fx.Node) -> bool:
    """Whether a node gives its operand without its gradient, in the same memory."""
    name = graphs.function_name(node)
    return name in ("detach", "_get_data_attr") or (name == "getattr" and node.args[1] == "data")


def gradient_modes(nodes: Iterable[fx.Node], *, outer: bool) -> list[bool]:
    """For every node of a step, whether it computes with gradients; outer says whether the loop does.

    What a transform turns on inside of a loop under no_grad is the transform's own.
    """
    modes: list[bool] = []
    before: dict[fx.Node, bool] = {}
    gradients = outer
    for node in nodes:
        if node.target is torch._C._set_grad_enabled:
            gradients = bool(node.args[0])
        elif graphs.function_name(node) == "_enter_inference_mode":
            before[node], gradients = gradients, not node.args[0]
        elif graphs.function_name(node) == "_exit_inference_mode":
            gradients = before[node.all_input_nodes[0]]
        modes.append(outer and gradients)
    return modes
