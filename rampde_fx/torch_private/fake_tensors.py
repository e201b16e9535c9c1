"""Fake tensors, and tracing with them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import fx

from rampde_fx.torch_private import callers
from rampde_fx.torch_private.names import Names
from rampde_fx.torch_private.saved_hooks import no_saved_tensors_hooks

_torch = Names(
    {
        "torch.amp.autocast_mode": "_enter_autocast _exit_autocast",
        "torch._C": "_DisableAutocast _is_any_autocast_enabled",
        "torch._C._functorch": "get_unwrapped is_functorch_wrapped_tensor",
        "torch._decomp": "get_decompositions",
        "torch._dispatch.python": "enable_python_dispatcher",
        "torch._functorch.compile_utils": "fx_graph_cse",
        "torch._subclasses.fake_tensor": "FakeTensor unset_fake_temporarily",
        "torch._subclasses.functional_tensor": "FunctionalTensorMode dispatch_functionalize",
        "torch.fx._lazy_graph_module": "_use_lazy_graph_module",
        "torch.fx.experimental.proxy_tensor": "make_fx",
        "torch.fx.passes.fake_tensor_prop": "FakeTensorProp",
        "torch.utils._python_dispatch": "TorchDispatchMode _disable_current_modes",
    }
)
enter_autocast: Any = _torch._enter_autocast
exit_autocast: Any = _torch._exit_autocast
DisableAutocast: Any = _torch._DisableAutocast
AUTOCAST = ("cpu", "cuda")  # devices
decompositions_of: Any = _torch.get_decompositions
TorchDispatchMode: Any = _torch.TorchDispatchMode
_mode: ContextVar[Any] = ContextVar("fake mode of the graph that is being rewritten")


@contextlib.contextmanager
def fake_mode_of(graph_module: fx.GraphModule) -> Iterator[None]:
    """Trace under the fake mode of the values in a captured graph (not the compilation's: Dynamo renews that one)."""
    values = (node.meta.get("example_value") for node in graph_module.graph.nodes)
    token = _mode.set(next(value.fake_mode for value in values if isinstance(value, _torch.FakeTensor)))
    try:
        yield
    finally:
        _mode.reset(token)


def fake_mode() -> Any:
    """The fake mode that the rewrite under way traces with."""
    return _mode.get()


def detached(value: Any) -> Any:
    """A fake argument like the value: a dense tensor without history, or the value itself if it is no tensor."""
    if not isinstance(value, torch.Tensor):
        return value
    with fake_mode(), torch.no_grad():
        return torch.empty(value.shape, dtype=value.dtype, device=value.device)


def differentiable(value: torch.Tensor) -> torch.Tensor:
    """A fake argument like the tensor, with history: torch.matmul makes one large product with such a weight.

    With one that has none it may make a product, and in the derivative a weight gradient, for each entry of a batch.
    """
    with fake_mode(), torch.enable_grad():
        return detached(value).requires_grad_().clone()


def fake_number(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A fake 0-d tensor."""
    with fake_mode(), torch.no_grad():
        return torch.empty((), dtype=dtype, device=device)


def graph_of(
    function: Callable[..., Any],
    args: Sequence[Any],
    decompositions: Mapping[Any, Callable[..., Any]],
    *,
    functionalize: bool,
    gradients: bool,
) -> fx.GraphModule:
    """Trace a function of flat arguments to an ATen graph.

    Of the modes around the call none is for a trace: autocast, for the policy alone decides dtypes; hooks on saved
    tensors; compiled autograd; the detection of anomalies, which looks for NaN in values that a trace does not have.
    The graph's code in Python is written when somebody asks for it.
    """
    if functionalize:
        function = _torch.dispatch_functionalize(function, _torch.FunctionalTensorMode())
    with contextlib.ExitStack() as stack:
        modes = (fake_mode(), torch.set_grad_enabled(gradients), fx.traceback.preserve_node_meta())
        others = (no_autocast(), no_saved_tensors_hooks(), callers.no_compiled_autograd())
        stack.enter_context(_torch._use_lazy_graph_module(True))
        for context in (*modes, *others, torch.autograd.set_detect_anomaly(False)):
            stack.enter_context(context)
        stack.enter_context(_taking_symbols(args))
        return _torch.make_fx(function, decomposition_table=dict(decompositions))(*args)


def _taking_symbols(args: Sequence[Any]) -> contextlib.AbstractContextManager[Any]:
    """Where a size is symbolic, take torch's decompositions in Python: those in C++ ask for numbers."""
    sizes = (size for value in args for size in (value.shape if isinstance(value, torch.Tensor) else (value,)))
    symbolic = any(isinstance(size, torch.SymInt) for size in sizes)
    return _torch.enable_python_dispatcher() if symbolic else contextlib.nullcontext()


def propagate(graph_module: fx.GraphModule, args: Sequence[Any]) -> None:
    """Write true metadata into every node of a module."""
    with fake_mode(), torch.no_grad(), _taking_symbols(args):
        _torch.FakeTensorProp(graph_module, fake_mode()).propagate_dont_convert_inputs(*args)


def deduplicated(graph_module: fx.GraphModule) -> fx.GraphModule:
    """The same functional module with equal nodes merged."""
    return fx.GraphModule(graph_module, _torch.fx_graph_cse(graph_module.graph))


def real_tensors() -> contextlib.AbstractContextManager[None]:
    """Compute with real tensors while something is traced."""
    return _torch._disable_current_modes()


def unfaked() -> contextlib.AbstractContextManager[Any]:
    """Read the constants of a graph while it is traced with fake tensors."""
    return _torch.unset_fake_temporarily()


def fresh_symbols_ignored() -> contextlib.AbstractContextManager[Any]:
    """Sizes that a call on fake values reads from tensors are nobody's."""
    shapes = fake_mode().shape_env
    return contextlib.nullcontext() if shapes is None else shapes.ignore_fresh_unbacked_symbols()


@contextlib.contextmanager
def no_autocast() -> Iterator[None]:
    """The user's autocast is not for what is traced."""
    with contextlib.ExitStack() as stack:
        for device in AUTOCAST:
            stack.enter_context(torch.autocast(device, enabled=False))
        yield


def autocast_enabled() -> bool:
    """Whether torch.autocast is on, for any device, where the backend was called."""
    return _torch._is_any_autocast_enabled()


def storage_of(value: Any) -> int | None:
    """The identity of a tensor's storage, fake or not, inside a torch.func transform or not; None for anything else."""
    while isinstance(value, torch.Tensor) and _torch.is_functorch_wrapped_tensor(value):
        value = _torch.get_unwrapped(value)
    return value.untyped_storage()._cdata if isinstance(value, torch.Tensor) else None


def loses_writes(value: torch.Tensor) -> bool:
    """Whether torch.compile loses what is written to an input: before 2.14 to a float64 tensor of shape () on a CPU."""
    kind = (tuple(value.shape), value.dtype, value.device.type)
    return torch.__version__ < (2, 14) and kind == ((), torch.float64, "cpu")


def is_wrapped(value: torch.Tensor) -> bool:
    """Whether a tensor is one of a torch.func transform's."""
    return _torch.is_functorch_wrapped_tensor(value)
