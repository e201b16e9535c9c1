"""Every private interface of torch that rampde_fx touches, in one place.

Checked on torch 2.11.0, 2.13.0 and 2.15.0.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import inspect
import itertools
import math
import operator
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from types import MappingProxyType
from typing import Any
from unittest import mock

import torch
import torch._functorch.config as functorch_config
import torch._inductor.config as inductor_config
from torch import fx
from torch._decomp import get_decompositions
from torch._dynamo.backends.distributed import DDPOptimizer
from torch._dynamo.backends.registry import lookup_backend
from torch._dynamo.exc import TensorifyScalarRestartAnalysis, Unsupported
from torch._dynamo.symbolic_convert import TensorifyState
from torch._dynamo.variables import (
    ConstantVariable,
    ConstDictVariable,
    LazyVariableTracker,
    ListVariable,
    SymNodeVariable,
)
from torch._dynamo.variables.base import AttributeMutationNew, ValueMutationExisting, ValueMutationNew
from torch._functorch._aot_autograd import graph_compile
from torch._functorch.autograd_function import autograd_function_apply
from torch._functorch.compile_utils import fx_graph_cse
from torch._higher_order_ops.scan import scan_op
from torch._higher_order_ops.utils import validate_subgraph_args_types
from torch._higher_order_ops.while_loop import while_loop_op
from torch._higher_order_ops.wrap import tag_activation_checkpoint
from torch._inductor.codegen.wrapper import PythonWrapperCodegen
from torch._inductor.compile_fx import compile_fx_inner
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._logging import trace_structured
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch._subclasses.functional_tensor import FunctionalTensorMode, dispatch_functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols, statically_known_true
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from torch.utils._sympy.symbol import SymT, symbol_is_type
from torch.utils.checkpoint import CheckpointPolicy, _CachedTorchDispatchMode, _CachingTorchDispatchMode

from rampde_fx.errors import UnsupportedLoopError

__all__ = [
    "TensorifyScalarRestartAnalysis",
    "Unsupported",
    "autograd_function_apply",
    "lookup_backend",
    "scan_op",
    "tag_activation_checkpoint",
    "while_loop_op",
]

aten = torch.ops.aten

# Spellings of the affine update that are more than one operation, and would hide a state inside a velocity.
_UPDATES = get_decompositions([aten.addcmul, aten.addcdiv, aten.rsub])
# aten.copy, the functional form of a write to a slice, has no derivative of its own.
_UPDATES[aten.copy.default] = lambda old, new, non_blocking=False: new.to(old.dtype).expand(old.shape).clone()


def _lerp(start: torch.Tensor, end: torch.Tensor, weight: Any) -> torch.Tensor:
    """From the nearer end, as aten does; torch's own decomposition also copies strides, which has no derivative."""
    if not isinstance(weight, torch.Tensor):
        near = abs(weight) < 0.5
        return start + weight * (end - start) if near else end + (weight - 1) * (end - start)
    far = weight.abs() >= 0.5
    return torch.where(far, weight - 1, weight) * (end - start) + torch.where(far, end, start)


_UPDATES[aten.lerp.Scalar] = _lerp
_UPDATES[aten.lerp.Tensor] = _lerp


def _of_parts(scatter: Any) -> Callable[..., Any]:
    """A write to a part of a tensor, of a complex one as pairs of reals: torch does not differentiate it."""

    def written(x: torch.Tensor, source: torch.Tensor, dim: int = 0, *place: Any, **named: Any) -> Any:
        if not x.is_complex():
            return NotImplemented
        whole, part = torch.view_as_real(x.resolve_conj()), torch.view_as_real(source.resolve_conj())
        return torch.view_as_complex(scatter(whole, part, dim % x.ndim, *place, **named).contiguous())

    return written


_UPDATES[aten.slice_scatter.default] = _of_parts(aten.slice_scatter.default)
_UPDATES[aten.select_scatter.default] = _of_parts(aten.select_scatter.default)


def _split_with_sizes(x: torch.Tensor, sizes: Sequence[int], dim: int = 0) -> list[torch.Tensor]:
    ends = list(itertools.accumulate(sizes))
    return [aten.slice.Tensor(x, dim, end - size, end) for size, end in zip(sizes, ends, strict=True)]


def _split(x: torch.Tensor, size: int, dim: int = 0) -> list[torch.Tensor]:
    starts = range(0, x.shape[dim], size)
    return [aten.slice.Tensor(x, dim, start, min(start + size, x.shape[dim])) for start in starts]


# Operations with a list of views as result: as single views a state keeps its identity through them.
_UPDATES[aten.split_with_sizes.default] = _split_with_sizes
_UPDATES[aten.split.Tensor] = _split
_UPDATES[aten.unsafe_split.Tensor] = _split
_UPDATES[aten.unsafe_split_with_sizes.default] = _split_with_sizes
_UPDATES[aten.unbind.int] = lambda x, dim=0: [aten.select.int(x, dim, i) for i in range(x.shape[dim])]


def _batch_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    running_mean: torch.Tensor,
    running_var: torch.Tensor,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[torch.Tensor, ...]:
    stop = torch.ops.rampde_fx.stop_gradient
    dims, shape = [d for d in range(x.ndim) if d != 1], [1, -1] + [1] * (x.ndim - 2)
    count = x.numel() // x.shape[1]
    var, mean = torch.var_mean(x, dims, correction=0, keepdim=True)
    rstd = torch.rsqrt(var + eps)
    out = (x - mean) * rstd
    out = out if weight is None else out * weight.reshape(shape)
    out = out if bias is None else out + bias.reshape(shape)
    mean, var = mean.flatten(), var.flatten()
    new_mean = (1 - momentum) * running_mean + momentum * stop(mean)
    new_var = (1 - momentum) * running_var + momentum * stop(var * (count / (count - 1)))
    return out, mean, rstd.flatten(), new_mean, new_var


# As a single operation the running statistics would be part of a velocity, and low.
_UPDATES[aten._native_batch_norm_legit_functional.default] = _batch_norm
# What tracing leaves behind and a functional graph does not need.
_IDENTITIES = {aten.detach.default, aten.alias.default, aten.lift_fresh_copy.default, aten.lift_fresh.default}
_STRICT_VIEWS = {aten.view.default, aten._unsafe_view.default}
MAX_CONSTANT = 64
# By its name: in the package, scan is the function.
_scan_module = importlib.import_module("torch._higher_order_ops.scan")
CACHEABLE = {"torch.ops.higher_order.scan": "rampde_fx", "torch.ops.higher_order.while_loop": "rampde_fx"}


_mode: ContextVar[FakeTensorMode] = ContextVar("fake mode of the graph that is being rewritten")


@contextlib.contextmanager
def fake_mode_of(graph_module: fx.GraphModule) -> Iterator[None]:
    """Trace under the fake mode of the values in a captured graph (not the compilation's: Dynamo renews that one)."""
    values = (node.meta.get("example_value") for node in graph_module.graph.nodes)
    token = _mode.set(next(value.fake_mode for value in values if isinstance(value, FakeTensor)))
    try:
        yield
    finally:
        _mode.reset(token)


def fake_mode() -> FakeTensorMode:
    """The fake mode that the rewrite under way traces with."""
    return _mode.get()


def detached(value: Any) -> Any:
    """A fake argument like the value: a dense tensor without history, or the value itself if it is no tensor."""
    if not isinstance(value, torch.Tensor):
        return value
    with fake_mode(), torch.no_grad():
        return torch.empty(value.shape, dtype=value.dtype, device=value.device)


def takes_no_more_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether a tensor takes no more bytes than another one, for all values of their symbolic sizes."""
    return bool(statically_known_true(a.numel() * a.itemsize <= b.numel() * b.itemsize))


def differentiable(value: torch.Tensor) -> torch.Tensor:
    """A fake argument like the tensor, with history: torch.matmul makes one large product with such a weight.

    With one that has none it may make a product, and in the derivative a weight gradient, for each entry of a batch.
    """
    with fake_mode(), torch.enable_grad():
        return detached(value).requires_grad_().clone()


def trace(
    function: Callable[..., Any],
    args: Sequence[Any],
    *,
    functionalize: bool = False,
    gradients: bool = True,
    decompositions: Mapping[Any, Callable[..., Any]] = MappingProxyType({}),
) -> fx.GraphModule:
    """Trace a function of flat arguments to a functional ATen graph with true metadata.

    Gradients are on by default, for under no_grad a velocity's own torch.func.vjp is traced into zeros. Of the modes
    around the call none is for a trace: autocast, for the policy alone decides dtypes; hooks on saved tensors; the
    detection of anomalies, which looks for NaN in values that a trace does not have.
    """
    traced = dispatch_functionalize(function, FunctionalTensorMode()) if functionalize else function
    with contextlib.ExitStack() as stack:
        modes = (fake_mode(), torch.set_grad_enabled(gradients), fx.traceback.preserve_node_meta())
        for context in (*modes, _no_autocast(), _no_saved_tensors_hooks(), torch.autograd.set_detect_anomaly(False)):
            stack.enter_context(context)
        graph_module = make_fx(traced, decomposition_table={**_UPDATES, **decompositions})(*args)
    for node in list(graph_module.graph.nodes):
        if node.target in _IDENTITIES:
            node.replace_all_uses_with(node.args[0])
        if node.target is aten._conj.default and not isinstance(node.args[0], fx.Node):  # of a constant of the user's
            node.replace_all_uses_with(node.args[0].conjugate())
        if node.target in _STRICT_VIEWS:  # a view of the traced strides; passes may bring others
            node.target = aten.reshape.default
        if node.op == "get_attr" and isinstance(constant := getattr(graph_module, node.target, None), torch.Tensor):
            _spell_out(node, constant)
        assert not _writes(node), f"{node.target} writes to a tensor: what reads it would not depend on what is written"
    graph_module.graph.eliminate_dead_code()
    graph_module.recompile()
    return graph_module


def _writes(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _spell_out(node: fx.Node, constant: torch.Tensor) -> None:
    """Make a small constant tensor from numbers; a graph inside of a graph cannot own tensors."""
    if constant.numel() > MAX_CONSTANT:
        raise UnsupportedLoopError(
            f"a step makes a constant tensor of {constant.numel()} entries from Python numbers",
            required=f"constants of at most {MAX_CONSTANT} entries inside the loop",
            fix="make the tensor before the loop",
        )
    with unset_fake_temporarily():
        numbers, like = constant.flatten().tolist(), {"dtype": constant.dtype, "device": constant.device}
    graph = node.graph
    with graph.inserting_before(node):
        entries = [graph.call_function(aten.full.default, ([], number), like) for number in numbers]
        whole = graph.call_function(aten.stack.default, (entries,)) if entries else None
        shaped = graph.call_function(aten.reshape.default, (whole, list(constant.shape)))
    shaped.meta = dict(node.meta)
    node.replace_all_uses_with(shaped)


def real_tensors() -> contextlib.AbstractContextManager[None]:
    """Compute with real tensors while something is traced."""
    return _disable_current_modes()


@contextlib.contextmanager
def _no_autocast() -> Iterator[None]:
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        yield


@contextlib.contextmanager
def _no_saved_tensors_hooks() -> Iterator[None]:
    """The user's hooks on saved tensors are not for the tensors of a trace."""
    autograd, taken = torch._C._autograd, []
    while (hooks := autograd._top_saved_tensors_default_hooks(True)) is not None:
        taken.append(hooks)
        autograd._pop_saved_tensors_default_hooks()
    try:
        yield
    finally:
        for pack, unpack in reversed(taken):
            autograd._push_saved_tensors_default_hooks(pack, unpack)


def autocast_enabled() -> bool:
    """Whether torch.autocast is on, for any device, where the backend was called."""
    return torch._C._is_any_autocast_enabled()


def deduplicated(graph_module: fx.GraphModule) -> fx.GraphModule:
    """The same functional module with equal nodes merged."""
    return fx.GraphModule(graph_module, fx_graph_cse(graph_module.graph))


def propagate(graph_module: fx.GraphModule, args: Sequence[Any]) -> None:
    """Write true metadata into every node of a module."""
    with fake_mode(), torch.no_grad():
        FakeTensorProp(graph_module, fake_mode()).propagate_dont_convert_inputs(*args)


def size_hint(size: Any) -> int:
    """The size, or what a symbolic one was when the graph was captured."""
    return size.node.hint if isinstance(size, torch.SymInt) else int(size)


def number_of(size: int | torch.SymInt) -> int | torch.SymInt:
    """The size, as an int where the guards of a symbolic one leave a single number: tracing knows no proxy for it."""
    known = size.node.maybe_as_int() if isinstance(size, torch.SymInt) else size
    return size if known is None else known


def symbol_of(size: torch.SymInt) -> torch.SymInt:
    """The symbol s of a size a s + b with numbers a and b, computed from the size; any other size as it is."""
    polynomial = size.node.expr.as_poly()
    if polynomial is None or len(polynomial.gens) != 1 or polynomial.degree() != 1:
        return size
    factor, constant = map(int, polynomial.all_coeffs())
    return (size - constant) // factor


def is_data_dependent(number: Any) -> bool:
    """Whether a number is read from a tensor, so that nothing is known of it when the graph is compiled."""
    return isinstance(number, torch.SymInt | torch.SymFloat | torch.SymBool) and not number.node.has_hint()


def capture_again_with(numbers: Iterable[torch.SymFloat]) -> None:
    """Have Dynamo capture the model again, with the present values of its Python floats behind these numbers.

    It guards them then, and compiles anew when one changes. A number that is read from a tensor stays as it is.

    Raises:
        TensorifyScalarRestartAnalysis: which Dynamo catches; unless all of the numbers are read from tensors.
    """
    symbols = {symbol for number in numbers for symbol in number.node._expr.free_symbols}
    floats = {str(symbol) for symbol in symbols if symbol_is_type(symbol, SymT.FLOAT)}
    for name in floats:
        TensorifyState.specialize(name)
    if floats:
        raise TensorifyScalarRestartAnalysis


def fake_number(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A fake 0-d tensor."""
    with fake_mode(), torch.no_grad():
        return torch.empty((), dtype=dtype, device=device)


def hint_of(number: float | torch.SymFloat) -> float | None:
    """The number, or what a symbolic one was when the graph was captured; None of one that is read from a tensor."""
    if not isinstance(number, torch.SymFloat):
        return number
    return None if free_unbacked_symbols(number) else float(number.node.hint)


def ceil_sqrt(size: int | torch.SymInt) -> int | torch.SymInt:
    """The square root of a positive size, rounded up."""
    if isinstance(size, torch.SymInt):
        return torch.sym_int(torch.sym_sqrt(size - 1)) + 1
    return math.isqrt(size - 1) + 1


class LinalgChecks(TorchDispatchMode):
    """Collects what linear algebra would check, and raise, where it is captured: a graph has no place for that.

    Attributes:
        infos: LAPACK's codes, 0 for each matrix that could be solved, factored or decomposed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.infos: list[torch.Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is aten._linalg_check_errors.default:
            self.infos.append(args[0])
            return None
        return func(*args, **(kwargs or {}))


def draws_random_numbers(node: fx.Node) -> bool:
    """Whether a node's result depends on the random number generator: not that of an attention without dropout."""
    if not isinstance(node.target, torch._ops.OpOverload) or torch.Tag.nondeterministic_seeded not in node.target.tags:
        return False
    schema = node.target._schema.arguments
    defaults = {argument.name: argument.default_value for argument in schema}
    given = {**defaults, **{a.name: value for a, value in zip(schema, node.args, strict=False)}, **node.kwargs}
    return bool(given.get("dropout_p", True))


def below_autograd(function: Callable[..., Any]) -> Callable[..., Any]:
    """An autograd kernel that computes without recording anything."""

    def run(*args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return function(*args)

    return run


def never_alone(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which Dynamo captures as part of another one only, and otherwise runs as it is."""
    torch._dynamo.eval_frame.skip_code(function.__code__)
    return function


@never_alone
def compilation_asked() -> Any:
    """Dynamo's callback of the call of torch.compile in which the code that runs was to be compiled, and is not.

    None where nobody asked for it, or it is turned off on purpose. Dynamo itself has none outside of torch.compile, but
    neither in code under fullgraph=True that was compiled before, with a graph break in it; and it has False where it
    has given up on compiling once more.
    """
    if torch._dynamo.config.disable or torch._dynamo.eval_frame._stance.stance not in _COMPILING_STANCES:
        return None
    return torch._C._dynamo.eval_frame.get_eval_frame_callback() or _callback_of_caller()


_COMPILING_STANCES = ("default", "eager_on_recompile", "fail_on_recompile")


@never_alone
def _callback_of_caller() -> Any:
    """Dynamo's callback in the innermost call of torch.compile; None in what the user has disabled."""
    frame: Any = sys._getframe()
    while (frame := frame.f_back) is not None:
        if frame.f_code.co_filename != torch._dynamo.eval_frame.__file__:
            continue
        if frame.f_code.co_qualname.startswith("_TorchDynamoContext.__call__"):
            return getattr(frame.f_locals.get("self"), "callback", None)
        off = frame.f_code.co_qualname.startswith("DisableContext.__call__")
        if off and not is_of(frame.f_locals.get("fn"), "torch"):  # torch turns it off in its own, in checkpoint for one
            return None
    return None


@never_alone
def innermost(backend: Any) -> Any:
    """The user's backend, behind what Dynamo wraps round it."""
    names = ("_torchdynamo_orig_backend", "compiler_fn")
    while (inner := next((getattr(backend, name) for name in names if hasattr(backend, name)), None)) is not None:
        backend = inner
    optimizer = getattr(backend, "__self__", None)
    return innermost(optimizer.backend_compile_fn) if isinstance(optimizer, DDPOptimizer) else backend


def is_of(function: Any, package: str) -> bool:
    """Whether a function is defined in a package."""
    return str(getattr(function, "__module__", "")).startswith(f"{package}.")


@torch.compiler.assume_constant_result
def rewritten_later() -> bool:
    """Whether the code that Dynamo traces is for a backend that may rewrite it: any but torch's own."""
    return not is_of(innermost(_capture().compiler_fn), "torch")


def names_of_arguments() -> list[str]:
    """The parameters of the function around which the captured frame was put to mark it; none without one."""
    tracer = getattr(torch._dynamo.symbolic_convert.tls, "current_tx", None)
    frame = getattr(getattr(tracer, "output", None), "root_tx", None)
    function = getattr(frame, "f_locals", {}).get("function")
    return list(inspect.signature(function).parameters) if callable(function) else []


def _capture() -> Any:
    """Dynamo's capture that is under way."""
    return torch._dynamo.symbolic_convert.InstructionTranslator.current_tx().output


def notes_of_capture(after: Callable[[fx.GraphModule, Any, dict[str, list[Any]]], Any]) -> dict[str, list[Any]]:
    """Notes on the graph that is being captured, which are lost if Dynamo begins anew.

    `after` is given the graph, the backend and the notes when it is compiled; what it returns, if anything, runs
    instead. The graph goes to the backend whole:
    DDPOptimizer, which cuts the graph of a DistributedDataParallel module at its gradient buckets, would cut the loops.
    """
    capture = _capture()
    notes: dict[str, list[Any]] | None = getattr(capture.compiler_fn, "notes", None)
    if notes is not None:
        return notes
    notes, backend = {}, capture.compiler_fn
    optimizer = getattr(backend, "__self__", None)
    if isinstance(optimizer, DDPOptimizer):
        backend = optimizer.backend_compile_fn

    @functools.wraps(backend, updated=())
    def compile_whole(graph_module: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        compiled = backend(graph_module, example_inputs)
        return after(graph_module, backend, notes) or compiled

    compile_whole.notes, compile_whole._torchdynamo_orig_backend = notes, backend  # type: ignore[attr-defined]
    capture.compiler_fn = compile_whole
    return notes


CELL = "cell_contents"  # what Dynamo calls the value of a variable that several functions share


def numbers_kept() -> dict[tuple[Any, str], Any]:
    """The numbers that the capture under way has put into attributes, globals, cells, lists and dicts.

    By the variable and the name of each; of a list or a dict by the variable and what its entries are.
    """
    effects, found = _capture().side_effects, {}
    for owner, attributes in effects.store_attr_mutations.items():
        found.update({(owner, name): _number(value) for name, value in attributes.items()})
    changed = [entries for entries in list(effects.id_to_variable.values()) if _is_changed(entries)]
    for entries in dict.fromkeys([*changed, *_containers_kept()]):
        found.update({(entries, name): _number(value) for name, value in _entries(entries)})
    return {key: number for key, number in found.items() if number is not None}


def _is_changed(entries: Any) -> bool:
    effects = _capture().side_effects
    return isinstance(entries.mutation_type, ValueMutationExisting) and effects.is_modified(entries)


def _containers_kept() -> Iterator[Any]:
    """The lists and dicts that were made in the code that is captured, and put into cells and attributes."""
    for attributes in _capture().side_effects.store_attr_mutations.values():
        for value in attributes.values():
            if isinstance(value, ListVariable | ConstDictVariable) and isinstance(
                value.mutation_type, ValueMutationNew
            ):
                yield value


def _entries(entries: Any) -> list[tuple[str, Any]]:
    if isinstance(entries, ListVariable):
        return [(str(i), value) for i, value in enumerate(entries.items)]
    if isinstance(entries, ConstDictVariable):
        return [(repr(getattr(key.vt, "value", key)), value) for key, value in entries.items.items()]
    return []


def _number(variable: Any) -> Any:
    """The number that a variable of Dynamo's holds, as text if it is symbolic; None if it holds anything else."""
    if isinstance(variable, LazyVariableTracker):
        if not variable.is_realized():  # nobody has read it, nor put another there
            return None
        variable = variable.realize()
    if isinstance(variable, SymNodeVariable):
        return str(variable.sym_num)
    value = variable.as_python_constant() if isinstance(variable, ConstantVariable) else None
    return value if isinstance(value, (int, float, bool)) else None


def name_of(owner: Any, name: str) -> str:
    """How the user writes an attribute, a global or an entry of a list that is a variable of Dynamo's."""
    if name == CELL:
        return str(getattr(owner, "local_name", None) or _local_name(owner) or "a variable around the velocity")
    if not isinstance(owner, ListVariable | ConstDictVariable):
        return name
    return f"{_readable(_source_of(owner)) or _holder_of(owner)}[{name}]"


def _readable(source: str) -> str:
    """Dynamo's name of a value as the user writes it: what mixed_precision has wrapped takes *args."""
    names = names_of_arguments()

    def argument(position: re.Match[str]) -> str:
        return names[int(position[1])] if int(position[1]) < len(names) else position[0]

    return re.sub(r"^[LG]\['(\w+)'\]", r"\1", re.sub(r"^L\['args'\]\[(\d+)\]", argument, source))


def _local_name(variable: Any) -> str | None:
    """The name of a variable in a function that is being captured, or in one that has called it."""
    frame: Any = sys._getframe()  # Dynamo's own: each of its translators knows those that have called it alone
    while frame is not None:
        for name, value in getattr(frame.f_locals.get("self"), "symbolic_locals", {}).items():
            if value is variable:
                return str(name)
        frame = frame.f_back
    return None


def _holder_of(entries: Any) -> str:
    """The variable or attribute that holds a list or dict that was made in the code that is captured."""
    for holder, attributes in _capture().side_effects.store_attr_mutations.items():
        for name, value in attributes.items():
            if value is entries:
                return name_of(holder, name)
    return "a list or dict of the function"


def was_read(owner: Any, name: str) -> bool:
    """Whether the capture under way has read such a number, which it guards then, before it put another there."""
    if isinstance(owner.mutation_type, AttributeMutationNew | ValueMutationNew):  # nobody knew it before
        return False
    guards = [guard.name() if callable(guard.name) else guard.name for guard in _capture().guards]
    wanted = (f"[{name}]",) if isinstance(owner, ListVariable | ConstDictVariable) else (f".{name}", f"['{name}']")
    wanted = (f"{_source_of(owner)}.{name}",) if name == CELL else wanted
    return any(guard.endswith(wanted) for guard in guards) or any(
        key.endswith(wanted) for key in _capture().unspec_variable_map
    )


def _source_of(owner: Any) -> str:
    source = getattr(owner.source, "name", "")
    return str(source() if callable(source) else source)


def is_specialized(owner: Any) -> bool:
    """Whether Dynamo compiles anew for every number that it finds in an attribute of this owner."""
    return isinstance(getattr(owner, "value", None), torch.nn.Module)


def captures_body() -> bool:
    """Whether Dynamo captures the body of a higher-order operation, such as a checkpoint, which may change nothing."""
    return _capture().current_tracer.parent is not None


def captured_line() -> tuple[str, int]:
    """File and line of the user's code that Dynamo is tracing."""
    stack = torch._guards.TracingContext.extract_stack()
    return next(((frame.filename, frame.lineno or 0) for frame in reversed(stack) if is_users(frame.filename)), ("", 0))


def running_line() -> tuple[str, int]:
    """File and line of the user's code that runs."""
    frame: Any = sys._getframe()
    while frame.f_back is not None and not is_users(frame.f_code.co_filename):
        frame = frame.f_back
    return frame.f_code.co_filename, frame.f_lineno


def is_users(file: str) -> bool:
    """Whether code of a file is the user's, and not of torch or of this package."""
    return not file.startswith((_TORCH, _PACKAGE)) and "<" not in file


_TORCH, _PACKAGE = (f"{Path(file).parent}{os.sep}" for file in (torch.__file__, __file__))


@contextlib.contextmanager
def capturing_scalars() -> Iterator[None]:
    """Let Dynamo capture a number that is read from a tensor: here alone, for it then reads indices as numbers too."""
    before = torch.compiler.is_dynamo_compiling() and _allow_scalar_outputs(allowed=True)
    with torch._dynamo.patch_dynamo_config(capture_scalar_outputs=True):
        yield
    if torch.compiler.is_dynamo_compiling():
        _allow_scalar_outputs(allowed=before)


@torch.compiler.assume_constant_result
def _allow_scalar_outputs(*, allowed: bool) -> bool:
    """Say whether the capture that is under way makes sizes of such numbers, and whether it did."""
    mode = _capture().fake_mode
    before, mode.allow_scalar_outputs = mode.allow_scalar_outputs, allowed
    return bool(before)


_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8)


def scalar_places(source: torch.Tensor, entries: Sequence[Any]) -> dict[int, int]:
    """For each 0-d integer tensor in an index, by its position there, the dimension that it indexes."""
    used = [_dimensions(entry) for entry in entries]
    dimension, places = 0, {}
    for position, (entry, count) in enumerate(zip(entries, used, strict=True)):
        if isinstance(entry, torch.Tensor) and entry.ndim == 0 and entry.dtype in _INTEGERS:
            places[position] = dimension
        dimension += source.ndim - sum(used) if entry is Ellipsis else count
    return places


def _dimensions(entry: Any) -> int:
    """How many dimensions an entry of an index takes."""
    if entry is None or entry is Ellipsis or isinstance(entry, bool):
        return 0
    mask = isinstance(entry, torch.Tensor) and entry.dtype in (torch.bool, torch.uint8)
    return entry.ndim if mask else 1


def read_at(source: torch.Tensor, entries: Sequence[Any], places: dict[int, int]) -> torch.Tensor:
    """What an index with 0-d integer tensors reads, by a tensor index, which does not ask for their numbers."""
    indices: list[Any] = [None] * (1 + max(places.values()))
    for position, dimension in places.items():
        indices[dimension] = entries[position].long()
    rest = tuple(entry for position, entry in enumerate(entries) if position not in places)
    return aten.index.Tensor(source, indices)[rest]


_run_node = torch._dynamo.utils.run_node


@functools.wraps(_run_node)
def _read_in_loop(tracer: Any, node: fx.Node, args: Any, kwargs: Any, nnmodule: Any) -> Any:
    """Run a captured node on fake tensors; of an index by 0-d integer tensors torch would ask the unknown numbers."""
    notes: dict[str, list[Any]] = getattr(_capture().compiler_fn, "notes", {})
    if node.target is operator.getitem and notes.get("open") and isinstance(args[0], torch.Tensor):
        entries = args[1] if isinstance(args[1], tuple) else (args[1],)
        if places := scalar_places(args[0], entries):
            return read_at(args[0], entries, places)
    return _run_node(tracer, node, args, kwargs, nnmodule)


torch._dynamo.utils.run_node = _read_in_loop


def with_own_code(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with a code object of its own: Dynamo keeps its compilations, and their limit, by code object."""
    function.__code__ = function.__code__.replace()
    return function


def storage_of(value: Any) -> int | None:
    """The identity of a tensor's storage, fake or not, inside a torch.func transform or not; None for anything else."""
    while isinstance(value, torch.Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(value):
        value = torch._C._functorch.get_unwrapped(value)
    return value.untyped_storage()._cdata if isinstance(value, torch.Tensor) else None


def is_wrapped(value: torch.Tensor) -> bool:
    """Whether a tensor is one of a torch.func transform's."""
    return torch._C._functorch.is_functorch_wrapped_tensor(value)


class _Observer(TorchDispatchMode):
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
                self.written.update(map(storage_of, tree_leaves(given.get(argument.name))))
        self.draws |= torch.Tag.nondeterministic_seeded in func.tags
        return func(*args, **kwargs)


def observe(call: Callable[[], Any]) -> tuple[set[int | None], bool]:
    """Make a call on fake values: the storages that it writes to, and whether it draws random numbers."""
    observer = _Observer()
    with contextlib.ExitStack() as stack:
        modes = (torch.inference_mode(False), fake_mode(), _fresh_symbols_ignored(), torch.no_grad())
        for context in (*modes, _no_autocast(), observer):
            stack.enter_context(context)
        call()
    return observer.written, observer.draws


def own_derivative(results: Any) -> str:
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


def _fresh_symbols_ignored() -> contextlib.AbstractContextManager[Any]:
    """Sizes that a call on fake values reads from tensors are nobody's."""
    shapes = fake_mode().shape_env
    return contextlib.nullcontext() if shapes is None else shapes.ignore_fresh_unbacked_symbols()


def recompute_in_backward(node: fx.Node) -> None:
    """Have the backward compute a node again, instead of that the forward saves it: activation checkpointing's tag."""
    node.meta["recompute"] = CheckpointPolicy.PREFER_RECOMPUTE


def recompute_loops(body: fx.GraphModule) -> None:
    """Have the emitted loops of a checkpointed body recomputed by the backward, and not what they store saved.

    Torch tags the nodes of a checkpointed body, but up to 2.11 not those inside an autograd_function_apply.
    """
    selective = "_checkpoint_context_fn" in body.meta  # the user's own policy decides, node by node
    for apply in body.graph.find_nodes(op="call_function", target=autograd_function_apply):
        for node in body.get_submodule(apply.args[0].target).graph.nodes:
            if node.op == "call_function" and selective:
                node.meta["recompute"] = None
            elif node.op == "call_function":
                recompute_in_backward(node)


@contextlib.contextmanager
def compile_settings() -> Iterator[None]:
    """The settings of torch under which a graph with rewritten loops compiles correctly, and caches.

    Donated buffers: Inductor applies the outer graph's donated indices to the bodies of scan and while_loop, and
    overwrites inputs that a later iteration reads (pytorch/pytorch issue 153679, pull requests 193787 and 193960). No
    buffer is named as one, instead of donated_buffer=False: with that the backward would not know that there is none,
    and would refuse to run with retain_graph=True where the setting is on, as it is outside of this patch.
    Caches: a graph with a custom backward is cached only where that is allowed; one with scan, see compile_graph. What
    is cached holds the backward's graph, and traces it again when it is loaded: a scan inside a while loop then takes
    the tracer's proxies for operands of a wrong type.
    Checkpoints: the modes under which a checkpointed body is traced know what to do with scan, but do not say so.
    """
    with (
        functorch_config.patch(autograd_cache_allow_custom_autograd_functions=True),
        mock.patch.object(graph_compile, "collect_bw_donated_buffer_idxs", lambda *_: []),
        mock.patch.object(_scan_module, "validate_subgraph_args_types", _validate_operands),
        mock.patch.object(_CachingTorchDispatchMode, "supports_higher_order_operators", True),
        mock.patch.object(_CachedTorchDispatchMode, "supports_higher_order_operators", True),
    ):
        yield


def _validate_operands(operands: Sequence[Any]) -> None:
    if not any(isinstance(operand, fx.Proxy) for operand in operands):
        validate_subgraph_args_types(operands)


def compile_graph(
    compiler: str,
    graph_module: fx.GraphModule,
    example_inputs: Sequence[Any],
    options: dict[str, Any],
    mode: str | None,
    lower: Any,
    replayed: bool,
) -> Callable[..., Any]:
    """Compile a graph with rewritten loops by one of torch's backends; Inductor applies lower, which has a uuid.

    Inductor's own CUDA graphs leave loops out, and move what the host counts to the device. If the loops are to be
    replayed, it is these that become CUDA graphs instead, and nothing else.

    Inductor turns a scan into a while loop that reads its index from a tensor; Dynamo allows that to graphs under
    fullgraph=True only. Its cache takes graphs with scan where they are marked as cacheable: in a patch of its own,
    which holds where the backward is compiled as well, at the first backward pass.
    """
    torch._guards.TracingContext.get().fake_mode.allow_scalar_outputs = True
    if compiler != "inductor":
        return lookup_backend(compiler)(graph_module, list(example_inputs))
    name = "post_grad_custom_pre_pass"
    patches = {
        "unsafe_marked_cacheable_functions": {**inductor_config.unsafe_marked_cacheable_functions, **CACHEABLE},
        **_options(options, mode),
        name: _Lowering(lower, options.get(name, getattr(inductor_config, name)), replayed),
    }
    if not replayed:
        return lookup_backend(compiler)(graph_module, list(example_inputs), config_patches=patches)
    patches["triton.cudagraphs"] = False
    return lookup_backend(compiler)(
        graph_module, list(example_inputs), config_patches=patches, inner_compile=_compile_replayed
    )


def compile_plainly(
    compiler: str,
    graph_module: fx.GraphModule,
    example_inputs: Sequence[Any],
    options: dict[str, Any],
    mode: str | None,
) -> Callable[..., Any]:
    """Compile a graph without rewritten loops as torch.compile does by one of torch's backends."""
    backend = lookup_backend(compiler)
    if compiler != "inductor":
        return backend(graph_module, list(example_inputs))
    return backend(graph_module, list(example_inputs), config_patches=_options(options, mode))


def _options(options: dict[str, Any], mode: str | None) -> dict[str, Any]:
    return {**(torch._inductor.list_mode_options(mode) if mode else {}), **options}


def asks_for(setting: str, options: dict[str, Any], mode: str | None) -> bool:
    """Whether a setting of Inductor is on: by an option, a mode of torch.compile, or everywhere."""
    given = _options(options, mode)
    return bool(given[setting] if setting in given else operator.attrgetter(setting)(inductor_config))


def _compile_replayed(*args: Any, **kwargs: Any) -> Any:
    """Inductor's compilation of one graph, the backward's included, in which loops are replayed."""
    token = _replays.set(True)
    try:
        with mock.patch.object(PythonWrapperCodegen, "codegen_while_loop", _write_loop):
            return compile_fx_inner(*args, **kwargs)
    finally:
        _replays.reset(token)


_replays = ContextVar("whether this thread compiles loops that are replayed", default=False)
_write_host_loop = PythonWrapperCodegen.codegen_while_loop


def _write_loop(wrapper: Any, loop: Any, stack_output: bool) -> None:
    """Write a call of cuda_graphs.run_loop for a loop that can be replayed, Inductor's own loop for any other."""
    if stack_output or not _replays.get() or not _launches_alone(loop.cond_subgraph, loop.body_subgraph):
        _write_host_loop(wrapper, loop, stack_output)
        return
    inputs = [
        ", ".join(value.codegen_reference() for value in values)
        for values in (loop.carried_inputs, loop.additional_inputs)
    ]
    for subgraph in (loop.cond_subgraph, loop.body_subgraph):
        wrapper.codegen_subgraph_common(subgraph)
    fresh = {output.indices[0][1] for output in loop.outputs}
    mutated = [i for i in range(len(loop.carried_inputs)) if i not in fresh]
    functions = f"{loop.cond_subgraph.graph.name}, {loop.body_subgraph.graph.name}"
    # Imported in place: the code of a subgraph has no header.
    wrapper.writeline(
        f"{loop.get_name()} = __import__('rampde_fx.cuda_graphs').cuda_graphs.run_loop("
        f"{functions}, [{inputs[0]}], [{inputs[1]}], {mutated})"
    )


def _launches_alone(cond: Any, body: Any) -> bool:
    """Whether a loop only launches work: no value on the device reaches the host, and no operator acts on the host."""
    if not _decided_on_host(cond.graph_module):
        return False
    modules = [module for graph in (cond, body) for module in graph.graph_module.modules()]
    return not any(
        _involves_host(node)
        or (node.target is while_loop_op and not _decided_on_host(getattr(module, str(node.args[0].target))))
        for module in modules
        if isinstance(module, fx.GraphModule)
        for node in module.graph.nodes
    )


def _decided_on_host(cond: fx.GraphModule) -> bool:
    return _devices(cond.graph.output_node().all_input_nodes) == {"cpu"}


def _involves_host(node: fx.Node) -> bool:
    if isinstance(node.target, torch._ops.OpOverload) and not _only_launches(node):
        return True
    if node.op != "call_function" or node.target is operator.getitem:
        return False
    if node.target is torch.ops.higher_order.cond:
        return True
    made, read = _devices([node]), _devices(node.all_input_nodes)
    if made == {"cpu"} or node.target is aten._local_scalar_dense.default:
        return not read <= {"cpu"}
    return node.target in _MOVES and "cpu" in read and "cpu" not in made


# A move from the host's memory waits, and so does an index that lies there.
_MOVES = {
    aten._to_copy.default,
    aten.copy.default,
    aten.copy_.default,
    aten.index.Tensor,
    aten.index_put.default,
    torch.ops.prims.device_put.default,
}


_SIZED = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}


def _only_launches(node: fx.Node) -> bool:
    target: Any = node.target
    name = target._schema.name
    if target.namespace == "rampde_fx":
        return not name.startswith("rampde_fx::record")
    if target is aten.index.Tensor:
        sized = any(source.meta["val"].dtype in (torch.bool, torch.uint8) for source in node.all_input_nodes[1:])
    else:  # a number is read from a tensor: that may be on the host
        sized = bool(_SIZED & set(target.tags)) and target is not aten._local_scalar_dense.default
    solves = "linalg" in name  # most of these ask the device whether they succeeded
    return target.namespace in ("aten", "prims", "inductor") and not sized and not solves


def _devices(nodes: Sequence[fx.Node]) -> set[str]:
    leaves = tree_leaves([node.meta.get("val") for node in nodes])
    return {leaf.device.type for leaf in leaves if isinstance(leaf, torch.Tensor)}


def free_cublas_workspaces() -> None:
    """Have cuBLAS allocate its workspaces anew, as torch does round its own captures."""
    torch._C._cuda_clearCublasWorkspaces()


def copy_all(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
    """Copy tensors, in as few launches as their dtypes allow."""
    if targets:
        torch._foreach_copy_(targets, sources)


class _Lowering(CustomGraphPass):
    """A pass of ours over each graph that Inductor lowers, behind the user's own: None, one or, as of 2.13, several."""

    def __init__(self, ours: Any, users: Any, replayed: bool) -> None:
        self.replayed = replayed  # what is generated from a graph depends on it
        self.passes = [*(users if isinstance(users, Sequence) else filter(None, [users])), ours]

    def __call__(self, graph: fx.Graph) -> None:
        for graph_pass in self.passes:
            graph_pass(graph)

    def uuid(self) -> Any:
        """The key by which Inductor caches what the passes made; None, not at all, if the user's has none."""
        keys = tuple(getattr(graph_pass, "uuid", lambda: None)() for graph_pass in self.passes)
        return None if None in keys else (*keys, self.replayed, _digest_of_package())


def cpp_wrapper_calls_loops() -> bool:
    """Whether code that Inductor writes in C++ can call a loop; that of torch 2.11 fails on its condition."""
    return tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)


@functools.cache
def _digest_of_package() -> str:
    """Changes with the package: what it generates is not to be taken from a cache that another version filled."""
    digest, folder = hashlib.sha256(), Path(__file__).parent
    for file in sorted([*folder.glob("*.py"), *(folder / "passes").glob("*.py")]):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()


def cpu_multiplies(dtype: torch.dtype) -> bool:
    """Whether the CPU has arithmetic for products in float16 or bfloat16."""
    low = {
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
    }
    return torch.backends.mkldnn.is_available() and low[dtype]()


def trace_artifact(name: str, text: Callable[[], str]) -> None:
    """Leave a text in torch's structured trace (TORCH_TRACE, tlparse); it is made only if somebody traces."""
    trace_structured("artifact", metadata_fn=lambda: {"name": name, "encoding": "string"}, payload_fn=text)


def source_name(placeholder: fx.Node) -> str:
    """The user's name of an input of a captured graph, such as velocity.linear.0.weight; a readable one if unknown."""
    source = getattr(placeholder.meta.get("grapharg"), "source", None)
    name = getattr(source, "name", "")
    text = name() if callable(name) else name  # a method up to torch 2.11
    text = re.sub(r"\._(?:modules|parameters|buffers)\['(\w+)'\]", r".\1", text)
    text = re.sub(r"\.__closure__\[\d+\]\.cell_contents", "", text)
    return re.sub(r"^[LG]\['(\w+)'\]", r"\1", text).removeprefix("self.")


def captured_frame() -> tuple[str, dict[str, Any]]:
    """The file of the function that Dynamo captures, and its local and free variables."""
    frame: Any = torch._dynamo.symbolic_convert.InstructionTranslator.current_tx().output.root_tx
    return frame.f_code.co_filename, dict(frame.f_locals)


@contextlib.contextmanager
def kept_random_state(seed: int | None = None) -> Iterator[Callable[[], bool]]:
    """Leave torch's random number generators as they are, and tell whether numbers were drawn meanwhile.

    Args:
        seed: What to seed them with meanwhile; None to go on as they are.
    """
    with torch.random.fork_rng():
        if seed is not None:
            torch.manual_seed(seed)
        before = _random_states()
        yield lambda: any(not torch.equal(a, b) for a, b in zip(before, _random_states(), strict=True))


def _random_states() -> list[torch.Tensor]:
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [])]


def uncompiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """What torch.compile was given, or the function itself."""
    return getattr(function, "_orig_mod", None) or getattr(function, "_torchdynamo_orig_callable", None) or function


def capture(
    function: Callable[..., Any],
    backend: Callable[..., Any],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] = MappingProxyType({}),
    *,
    fullgraph: bool = False,
) -> Any:
    """Run a function once under torch.compile with a backend, and forget the compiled code; what it returns."""

    def run() -> Any:
        return function(*args, **kwargs)

    try:
        return torch.compile(run, backend=backend, dynamic=False, fullgraph=fullgraph)()
    finally:
        torch._dynamo.reset_code(run.__code__)


def compiled_by_torch(function: Callable[[], Any], compiler: str) -> tuple[Callable[[], Any], Callable[[], None]]:
    """A function compiled by a backend of torch's own, and what forgets the compiled code."""

    def run() -> Any:
        return function()

    return torch.compile(run, backend=compiler, dynamic=False), lambda: torch._dynamo.reset_code(run.__code__)


def wait_for_devices() -> None:
    """Wait for what was launched on a GPU."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
