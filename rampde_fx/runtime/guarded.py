"""Calls of a compiled graph with rewritten loops: what they refuse of those who call it, forward and backward.

The generated backward knows first derivatives of plain tensors. What comes to it in another way is refused by a hook
that runs before it, where torch would fail with a text of its own, or leave a derivative out in silence.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch

from rampde_fx.errors import RampdeError, SecondDerivativeError, TransformError
from rampde_fx.runtime.raised import as_raised
from rampde_fx.torch_private import callers, fake_tensors

FORWARD, BACKWARD = "rampde_fx forward", "rampde_fx backward"  # what ranges of a profile begin with
FIRST = "first derivatives, of one gradient of each output: the generated backward is not differentiable itself"
PLAIN = "plain tensors in rewritten loops, and backward() or torch.autograd.grad"


def guarded(
    compiled: Callable[..., Any], loops: Sequence[str], where: str, *, has_backward: bool
) -> Callable[..., Any]:
    """The compiled graph, which refuses what its loops cannot do, and whose backward has no autocast of its caller's.

    In a profile its forward and its backward are ranges of their own.

    Args:
        compiled: The graph as a backend of torch's compiled it.
        loops: The names of its loops: the file and the line of each.
        where: The user's line of the first loop, or of the first with a derivative.
        has_backward: Whether a loop has a derivative.
    """
    regions: list[contextlib.ExitStack] = []
    forward, backward = (f"{scope}, loop at {', '.join(loops)}" for scope in (FORWARD, BACKWARD))

    @torch.compiler.disable  # compiled autograd then runs it as it is
    def begin(gradients: Sequence[Any]) -> None:
        if (error := _wrong_backward(gradients, where)) is not None:
            raise error
        regions.append(contextlib.ExitStack())
        regions[-1].enter_context(fake_tensors.DisableAutocast())
        regions[-1].enter_context(callers.scope(backward))

    @torch.compiler.disable
    def end(*_: Any) -> None:
        regions.pop().close()

    @torch.compiler.disable
    def run(*args: Any) -> Any:
        if callers.has_forward_derivative(args):
            raise _forward_derivative(where)
        with callers.scope(forward), as_raised():
            outputs = compiled(*args)
        if has_backward:
            for node in {out.grad_fn for out in outputs if isinstance(out, torch.Tensor) and out.grad_fn is not None}:
                node.register_prehook(begin)
                node.register_hook(end)
        return outputs

    return run


def _wrong_backward(gradients: Sequence[Any], where: str) -> RampdeError | None:
    """What a backward asks for that a generated one does not have."""
    if torch.is_grad_enabled():
        return SecondDerivativeError(
            "a backward with create_graph=True runs through a rewritten loop",
            required=FIRST,
            fix="leave create_graph out, or use the uncompiled model for second derivatives",
            where=where,
        )
    if any(map(callers.is_batched, gradients)):
        return TransformError(
            "a backward with is_grads_batched=True, or inside of torch.vmap, runs through a rewritten loop",
            required=FIRST,
            fix="call torch.autograd.grad once for each gradient, with retain_graph=True",
            where=where,
        )
    if callers.is_compiled_autograd():
        return TransformError(
            "a backward under compiled autograd runs through a rewritten loop",
            required="the backward that was compiled with the model: its settings and its repetition after an overflow",
            fix="leave torch._dynamo.config.compiled_autograd off round this model",
            where=where,
        )
    return None


def _forward_derivative(where: str) -> TransformError:
    return TransformError(
        "an input of a rewritten loop has a forward-mode derivative (torch.autograd.forward_ad)",
        required=PLAIN,
        fix="use the uncompiled model for forward-mode derivatives",
        where=where,
    )
