"""How a compiled graph is called: with forward-mode derivatives, batches of gradients, by compiled autograd."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from rampde_fx.torch_private.names import Names

_torch = Names(
    {
        "torch._C": "_current_graph_task_id",
        "torch._C._functorch": "get_interpreter_stack get_unwrapped is_batchedtensor is_functorch_wrapped_tensor"
        " is_legacy_batchedtensor TransformType",
        "torch._dynamo.compiled_autograd": "_disable in_compiled_autograd_region",
        "torch.autograd": "_profiler_enabled",
        "torch.autograd.forward_ad": "_current_level",
        "torch.utils._python_dispatch": "is_traceable_wrapper_subclass",
    }
)
PLAIN = (torch.Tensor, torch.nn.Parameter)


def in_dual_level() -> bool:
    """Whether forward-mode differentiation is on."""
    return bool(_torch._current_level >= 0)


def has_forward_derivative(args: Sequence[Any]) -> bool:
    """Whether an argument has a tangent of forward-mode differentiation."""
    if not in_dual_level():
        return False
    tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
    return any(torch.autograd.forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)


def takes_second_derivatives() -> bool:
    """Whether transforms of torch.func are nested that each differentiate."""
    kinds = [level.key() for level in _torch.get_interpreter_stack() or ()]
    return sum(kind in (_torch.TransformType.Grad, _torch.TransformType.Jvp) for kind in kinds) > 1


def is_batched(value: Any) -> bool:
    """Whether it is a tensor of a torch.func transform, or a batch of gradients of torch.autograd.grad."""
    if not isinstance(value, torch.Tensor):
        return False
    return _torch.is_functorch_wrapped_tensor(value) or _torch.is_legacy_batchedtensor(value)


def wraps_others(value: torch.Tensor) -> bool:
    """Whether it holds other tensors, and no values of its own, as a distributed one does."""
    return type(value) not in PLAIN and bool(_torch.is_traceable_wrapper_subclass(value))


def hooks_of(tensor: torch.Tensor) -> dict[str, dict[int, Any]]:
    """The hooks on its gradient, and those behind its sum; no key where it never had any."""
    found = {name: getattr(tensor, name, None) for name in ("_backward_hooks", "_post_accumulate_grad_hooks")}
    return {name: hooks for name, hooks in found.items() if hooks is not None}


def is_mapped(value: torch.Tensor) -> bool:
    """Whether it has a value for each entry of a batch of torch.func.vmap."""
    while _torch.is_functorch_wrapped_tensor(value):
        if _torch.is_batchedtensor(value):
            return True
        value = _torch.get_unwrapped(value)
    return False


def is_compiled_autograd() -> bool:
    """Whether a graph of compiled autograd runs."""
    return "torch._dynamo.compiled_autograd" in sys.modules and _torch.in_compiled_autograd_region


def backward_under_way() -> int:
    """The number of the backward pass that runs, -1 where none does."""
    return int(_torch._current_graph_task_id())


def scope(name: str) -> contextlib.AbstractContextManager[Any]:
    """A range of this name in the profile that is being recorded; nothing where none is."""
    return torch.profiler.record_function(name) if profiled() else contextlib.nullcontext()


def profiled() -> bool:
    """Whether a profile is being recorded."""
    return bool(_torch._profiler_enabled())


def ranged(function: Callable[[Any], Any], name: str) -> Callable[[Any], Any]:
    """The function of one argument, with a range of this name in a profile."""
    profiles = _torch._profiler_enabled  # looked up once: it is asked in every step

    def run(argument: Any) -> Any:
        if not profiles():
            return function(argument)
        with torch.profiler.record_function(name):
            return function(argument)

    return run


def no_compiled_autograd() -> contextlib.AbstractContextManager[None]:
    """Differentiate as torch does by itself: what compiled autograd would capture is no tensor while it does."""
    return _torch._disable()
