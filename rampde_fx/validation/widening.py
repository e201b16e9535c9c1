"""A captured graph as the user wrote it, in float64: what a rewrite is compared with.

Everything here runs eagerly, and knows nothing of the passes but a rolled loop's plain step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import fx
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from rampde_fx.ir import graphs
from rampde_fx.ir.loops import Loop, LoopNode
from rampde_fx.runtime import kept_steps, operators, step_control
from rampde_fx.torch_private import fake_tensors, higher_order

WIDE = {
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.float32: torch.float64,
    torch.complex32: torch.complex128,
    torch.complex64: torch.complex128,
}
CASTS = {"float": "double", "half": "double", "bfloat16": "double", "cfloat": "cdouble", "chalf": "cdouble"}
# Mean the very tensors that they are given, of which a cast would be another.
BY_IDENTITY = {torch.autograd.grad, torch.Tensor.requires_grad_, torch.Tensor.backward}
# Run the graph that they are given.
TRANSPARENT = {higher_order.tag_activation_checkpoint, torch.ops.higher_order.wrap}


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for a narrower floating dtype, complex128 for a complex one, any other as it is."""
    return WIDE.get(dtype, dtype)


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """What torch makes of Python's numbers meanwhile."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def widened(graph_module: fx.GraphModule) -> fx.GraphModule:
    """A copy of a captured graph that computes in float64, with the metadata of such a graph."""
    twin = graphs.copied(graph_module)
    values = _FakeValues()
    with fake_tensors.fake_mode_of(graph_module):
        for module in [inner for inner in twin.modules() if isinstance(inner, fx.GraphModule)]:
            for node in module.graph.nodes:
                _widen_node(module, node, values)
            module.recompile()
    return twin


def _widen_node(module: fx.GraphModule, node: fx.Node, values: _FakeValues) -> None:
    if "example_value" in node.meta:
        node.meta["example_value"] = pytree.tree_map_only(torch.Tensor, values.widened, node.meta["example_value"])
    if node.op == "get_attr" and isinstance(constant := getattr(module, str(node.target), None), torch.Tensor):
        setattr(module, str(node.target), constant.detach().to(wide_dtype(constant.dtype)))
    if node.op == "call_method":
        node.target = CASTS.get(str(node.target), node.target)
    if graphs.function_name(node) == "_enter_autocast":  # device, dtype, enabled, cached
        node.args = (*node.args[:2], False, *node.args[3:])
    else:
        node.args, node.kwargs = fx.node.map_aggregate((node.args, node.kwargs), _wide_argument)


def _wide_argument(value: Any) -> Any:
    return wide_dtype(value) if isinstance(value, torch.dtype) else value


class _FakeValues:
    """Fake tensors in float64 that share memory as the given ones do."""

    def __init__(self) -> None:
        self._memory: dict[int | None, torch.Tensor] = {}

    def widened(self, value: torch.Tensor) -> torch.Tensor:
        """A fake tensor of the same shape, strides and need of a gradient."""
        dtype = wide_dtype(value.dtype)
        if dtype is value.dtype:
            return value
        with fake_tensors.fake_mode(), torch.no_grad():
            if fake_tensors.is_wrapped(value):  # inside of a torch.func transform, where nothing has a memory
                return torch.empty_strided(value.shape, value.stride(), dtype=dtype, device=value.device)
            key = fake_tensors.storage_of(value)
            if key not in self._memory:
                real = value.dtype.itemsize // (2 if dtype.is_complex else 1)
                size = value.untyped_storage().nbytes() // real
                self._memory[key] = torch.empty(size, dtype=torch.float64, device=value.device)
            memory = self._memory[key].view(dtype)
            twin = memory.as_strided(value.shape, value.stride(), value.storage_offset()).detach()
        return twin.requires_grad_(value.requires_grad)


def copies(values: Sequence[Any], *, widen: bool) -> list[Any]:
    """Copies of the tensors, without history, that share memory as these do; whatever else is returned as it is.

    Args:
        values: Tensors and other values.
        widen: Whether the copies are in float64.
    """
    groups: dict[Any, list[torch.Tensor]] = {}
    for value in values:
        if _is_strided(value):
            groups.setdefault((fake_tensors.storage_of(value), value.dtype), []).append(value)
    found = {id(value): copy for group in groups.values() for value, copy in _copied_together(group, widen)}
    return [found.get(id(value), _copied(value, widen)) for value in values]


def _is_strided(value: Any) -> bool:
    plain = type(value) in (torch.Tensor, torch.nn.Parameter) and value.layout is torch.strided
    return plain and not (value.is_conj() or value.is_neg())


def _copied(value: Any, widen: bool) -> Any:
    if not isinstance(value, torch.Tensor) or _is_strided(value):
        return value
    return value.detach().clone().to(wide_dtype(value.dtype) if widen else value.dtype)


def _copied_together(group: list[torch.Tensor], widen: bool) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Each tensor of one memory with its copy, all of which show one copy of the part that they show."""
    first = min(value.storage_offset() for value in group)
    last = max(value.storage_offset() + _extent(value) for value in group)
    dtype = wide_dtype(group[0].dtype) if widen else group[0].dtype
    with torch.no_grad():
        part = group[0].detach().as_strided((last - first,), (1,), first).to(dtype, copy=True)
        for value in group:
            yield value, part.as_strided(value.shape, value.stride(), value.storage_offset() - first).detach()


def _extent(value: torch.Tensor) -> int:
    if value.numel() == 0:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))


class Twins(TorchFunctionMode):
    """Lets code compute with other tensors than those it names, in float64 if asked for.

    So the user's own code runs, uncompiled, on copies of his parameters, buffers and arguments, of which nothing is
    changed; also where a function finds them in its closure.

    Args:
        twins: Pairs of a tensor and what stands in for it.
        widen: Whether dtypes that the code names, and tensors without a twin, become float64.
    """

    def __init__(self, twins: Sequence[tuple[torch.Tensor, torch.Tensor]], *, widen: bool) -> None:
        super().__init__()
        self._known = list(twins)  # keeps the tensors, by whose identity they are known
        self._twins = {id(tensor): twin for tensor, twin in twins}
        self._widen = widen

    def of(self, value: Any) -> Any:
        """What stands in for a value."""
        if isinstance(value, torch.dtype):
            return wide_dtype(value) if self._widen else value
        if not isinstance(value, torch.Tensor):
            return value
        twin = self._twins.get(id(value), value)
        return twin.to(wide_dtype(twin.dtype)) if self._widen and twin.dtype in WIDE else twin

    def _known_twin(self, value: Any) -> Any:
        return self._twins.get(id(value), value) if isinstance(value, torch.Tensor) else value

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        stand_in = self._known_twin if func in BY_IDENTITY else self.of
        args, kwargs = pytree.tree_map(stand_in, (tuple(args), kwargs or {}))
        cast = CASTS.get(getattr(func, "__name__", "")) if self._widen else None
        return getattr(args[0], cast)() if cast and isinstance(args[0], torch.Tensor) else func(*args, **kwargs)


class AsWritten(fx.Interpreter):
    """Runs a captured graph step by step, as plain torch operations: a loop that was captured once, too."""

    def run(self, *args: Any) -> Any:
        """What the graph returns."""
        self.args_iter, self.env = iter(args), {}
        nodes, after = list(self.graph.nodes), 0
        for position, node in enumerate(nodes):
            if position < after:
                continue
            if node.target is operators.enter:
                end = next(i for i in range(position, len(nodes)) if nodes[i].target in RUNNERS)
                self.env[nodes[end]] = RUNNERS[nodes[end].target](self, nodes[position : end + 1])
                after = end + 1
            else:
                self.env[node] = self.run_node(node)
        return self.env[nodes[-1]]

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target in TRANSPARENT:
            return AsWritten(args[0]).run(*args[1:])
        if target is kept_steps.evaluations:  # how often is no value of the model: a rewrite evaluates less
            return torch.zeros_like(args[1])
        return super().call_function(target, args, kwargs)

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        module = self.fetch_attr(target)
        return run_plainly(module.loop, args) if isinstance(module, LoopNode) else super().call_module(target, args, {})

    def _values(self, arguments: Any) -> Any:
        return fx.map_arg(arguments, lambda node: self.env[node])

    def _step(self, loop: list[fx.Node], t: torch.Tensor, dt: torch.Tensor, states: list[Any]) -> Any:
        """What the loop's end names, after one step."""
        enter, *body, end = loop
        seconds = [i for i, node in enumerate(body) if node.target is operators.again]
        self.env[enter] = [t, dt, *states]
        for node in body[: seconds[0]] if seconds else body:
            self.env[node] = self.run_node(node)
        return self._values(end.args)

    def run_steps(self, loop: list[fx.Node]) -> list[torch.Tensor]:
        """The trajectories that leave gives, and what it collects of each step."""
        starts, sizes, states, _ = self._values(loop[0].args)
        kept, collected = [states], []
        for i in range(starts.shape[0]):
            _, states, found, _, _, every, *_ = self._step(loop, starts[i], sizes[i], states)
            collected.append(found)
            if (i + 1) % every == 0:
                kept.append(states)
        return [torch.stack(values) for rows in (kept, collected) for values in zip(*rows, strict=True)]

    def run_search(self, loop: list[fx.Node]) -> list[torch.Tensor]:
        """What leave_search gives."""
        t, first, states, _ = self._values(loop[0].args)
        numbers, order, max_steps, _, _, own_norm, until_event = self._values(loop[-1].args[5:12])
        controller = step_control.Controller(
            order, max_steps, 0.0, 0.0, own_norm=own_norm, until_event=until_event
        ).with_numbers(numbers[1:])
        search = step_control.begin(t, first[0], controller.max_steps)
        while int(search.status) == step_control.RUNNING:
            trial = step_control.propose(t, search, controller)
            _, nexts, collected, errors, *_ = self._step(loop, trial.t, trial.dt, states)
            told = collected[: errors + controller.decisions]
            counts, search = step_control.judged(t, search, trial, told, (states, nexts), controller)
            states = nexts if counts else states
        found = [search.intervals, search.positions, search.fractions, search.count, search.tried, search.status]
        return [*found, step_control.reached(t, search)]


RUNNERS: dict[Any, Callable[[AsWritten, list[fx.Node]], list[torch.Tensor]]] = {
    operators.leave: AsWritten.run_steps,
    operators.leave_search: AsWritten.run_search,
}


def run_plainly(loop: Loop, operands: Sequence[Any]) -> tuple[Any, ...]:
    """What the call of a rolled loop stands for: its captured step, once for each step."""
    first = loop.first_invariant
    carries, stacks, invariants = operands[: loop.carries], operands[loop.carries : first], operands[first:]
    outputs: list[Any] = []
    for i in range(stacks[0].shape[0] if stacks else int(loop.steps)):
        results = loop.plain(*carries, *(stack[i] for stack in stacks), *invariants)
        carries = results[: loop.carries]
        outputs.append(results[loop.carries :])
    return (*carries, *(torch.stack(values) for values in zip(*outputs, strict=True)))
