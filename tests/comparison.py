"""Run a model and its compiled rewrite on the same data, and compare."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

import rampde_fx


def compiled(model: Any, dtype: torch.dtype, compiler: str = "aot_eager", **policy: Any) -> Callable[..., Any]:
    """The model, marked and compiled."""
    marked = rampde_fx.mixed_precision(model, policy=rampde_fx.PrecisionPolicy(velocity=dtype, **policy))
    return torch.compile(marked, backend="rampde_fx", options={"compiler": compiler}, fullgraph=True)


def gradients(
    function: Callable[..., Any], model: nn.Module, y: torch.Tensor, t: torch.Tensor, loss_scale: float = 1.0
) -> list[torch.Tensor]:
    """Outputs, and gradients of y, t and the parameters, of a loss that reads all outputs."""
    y, t = y.clone().requires_grad_(), t.clone().requires_grad_()
    model.zero_grad()
    outputs = tree_leaves(function(y, t))
    (sum(output.square().mean() for output in outputs) * loss_scale).backward()
    grads = [p.grad for p in (y, t, *model.parameters())]
    return [*(out.detach() for out in outputs), *(torch.zeros(()) if g is None else g for g in grads)]


def relative_errors(got: list[torch.Tensor], wanted: list[torch.Tensor]) -> list[float]:
    """Relative errors in the Euclidean norm; dtypes and shapes must agree, and NaN with NaN.

    Where one of both is NaN the error is infinite: max() passes over a NaN that is not the first of a list.
    """
    assert [(g.dtype, g.shape) for g in got] == [(w.dtype, w.shape) for w in wanted]
    return [_relative_error(g.double(), w.double()) for g, w in zip(got, wanted, strict=True)]


def _relative_error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    both = got.isnan() & wanted.isnan()
    got, wanted = got.masked_fill(both, 0), wanted.masked_fill(both, 0)
    error = (got - wanted).norm() / (wanted.norm() + torch.finfo(torch.float32).tiny)
    return math.inf if error.isnan() else error.item()
