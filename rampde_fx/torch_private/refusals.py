"""Errors raised in code that Dynamo may capture: of their types, with the user's line."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import torch

from rampde_fx.errors import RampdeError, UnsupportedLoopError
from rampde_fx.torch_private import dynamo
from rampde_fx.torch_private.names import Names

_torch = Names(
    {
        "torch._dynamo.exc": "ShortenTraceback",
        "torch._dynamo.variables": "TensorVariable TorchInGraphFunctionVariable",
    }
)


def described(value: Any) -> str:
    """What a value is, for an error."""
    if isinstance(value, torch.Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)}"
    return f"a {type(value).__name__}"


def shown(value: Any) -> str:
    """A value as Python writes it, for an error; of a tensor what it is: in a capture its numbers are not known."""
    if isinstance(value, torch.Tensor):
        return described(value)
    if isinstance(value, dict):
        return "{" + ", ".join([f"{name!r}: {shown(entry)}" for name, entry in value.items()]) + "}"
    return repr(value)


def refuse(kind: type[RampdeError], found: str, *, required: str, fix: str) -> NoReturn:
    """Raise an error in code that Dynamo may capture.

    Without fullgraph=True the code that is captured runs again, uncompiled, and raises it there. Of an exception that
    traced code raises Dynamo would show the text alone, inside of an error of its own.
    """
    if torch.compiler.is_dynamo_compiling():
        _end_capture(kind, found, required, fix)
        raise ValueError(found)  # which ends the graph here
    raise kind(found, required=required, fix=fix)


@dynamo.constant
def _end_capture(kind: type[RampdeError], found: str, required: str, fix: str) -> bool:
    """Raise the error out of a capture under fullgraph=True."""
    if dynamo.captures_whole():
        file, line = dynamo.captured_line()
        where = f"{file}:{line}" if file else ""
        error = _as_it_is(kind)(found, required=required, fix=fix, where=where)
        error.first_useful_frame = sys._getframe()
        raise error
    return True


def _as_it_is(kind: type[RampdeError]) -> Any:
    """A subclass whose errors Dynamo lets through: it wraps others, and adds its frames and its advice to their text.

    An AssertionError it raises again as it is, and takes its own frames out of the traceback of a ShortenTraceback.
    """

    def plain(error: RampdeError) -> RampdeError:
        return kind(error.found, required=error.required, fix=error.fix, where=error.where)

    members = {
        "__str__": lambda error: str(plain(error)),
        "__reduce__": lambda error: plain(error).__reduce__(),
        "__module__": kind.__module__,
    }
    return type(kind.__name__, (kind, AssertionError, _torch.ShortenTraceback), members)


@functools.cache
def refuse_grad_in_loops() -> None:
    """Have Dynamo refuse gradients in a marked loop as below: it would advise an option that does not help.

    Other backends are left alone. Without fullgraph=True a loop over steps runs uncompiled, which is told.
    """
    functions, tensors = _torch.TorchInGraphFunctionVariable, _torch.TensorVariable
    functions.call_function = _refusing(functions.call_function, "torch.autograd.grad", torch.autograd.grad)
    dynamo.put_methods(tensors, backward=_refusing(tensors.method_backward, "Tensor.backward"))


def _refusing(call: Callable[..., Any], name: str, function: Any = None) -> Callable[..., Any]:
    """A method of a variable of Dynamo's, which calls what has this name, that refuses it: of functions this one."""

    @functools.wraps(call)
    def called(self: Any, *args: Any, **kwargs: Any) -> Any:
        in_loop = (function is None or self.value is function) and dynamo.notes_so_far().get("open")
        if in_loop and dynamo.is_of(dynamo.innermost(dynamo.current_capture().compiler_fn), "rampde_fx"):
            _end_capture(
                UnsupportedLoopError,
                f"{name} is called in a step, or behind a loop that was left before its end",
                "derivatives of torch.func in a velocity, and loops that run over all of their steps",
                "write rate, vjp = torch.func.vjp(net, z), and vjp(e)[0] instead of torch.autograd.grad(rate, z, e); "
                "torch.func.vmap(torch.func.jacrev(net))(z) has the whole Jacobian of each point",
            )
        return call(self, *args, **kwargs)

    return called
