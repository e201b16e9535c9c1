"""Operations that every trace spells out by others, so that states and derivatives are found in them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from rampde_fx.ir import operator_table
from rampde_fx.torch_private import fake_tensors

aten = torch.ops.aten


def _lerp(start: torch.Tensor, end: torch.Tensor, weight: Any) -> torch.Tensor:
    """From the nearer end, as aten does; torch's own decomposition also copies strides, which has no derivative."""
    if not isinstance(weight, torch.Tensor):
        near = abs(weight) < 0.5
        return start + weight * (end - start) if near else end + (weight - 1) * (end - start)
    far = weight.abs() >= 0.5
    return torch.where(far, weight - 1, weight) * (end - start) + torch.where(far, end, start)


def _of_parts(scatter: Any) -> Callable[..., Any]:
    """A write to a part of a tensor, of a complex one as pairs of reals: torch does not differentiate it."""

    def written(x: torch.Tensor, source: torch.Tensor, dim: int = 0, *place: Any, **named: Any) -> Any:
        if not x.is_complex():
            return NotImplemented
        whole, part = torch.view_as_real(x.resolve_conj()), torch.view_as_real(source.resolve_conj())
        return torch.view_as_complex(scatter(whole, part, dim % x.ndim, *place, **named).contiguous())

    return written


def _split_with_sizes(x: torch.Tensor, sizes: Sequence[int], dim: int = 0) -> list[torch.Tensor]:
    ends = list(itertools.accumulate(sizes))
    return [aten.slice.Tensor(x, dim, end - size, end) for size, end in zip(sizes, ends, strict=True)]


def _split(x: torch.Tensor, size: int, dim: int = 0) -> list[torch.Tensor]:
    starts = range(0, x.shape[dim], size)
    return [aten.slice.Tensor(x, dim, start, min(start + size, x.shape[dim])) for start in starts]


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
    dims = [d for d in range(x.ndim) if d != 1]
    count = x.numel() // x.shape[1]
    var, mean = torch.var_mean(x, dims, correction=0, keepdim=True)
    rstd = torch.rsqrt(var + eps)
    out = _scaled_and_shifted((x - mean) * rstd, weight, bias)
    mean, var = mean.flatten(), var.flatten()
    new_mean = (1 - momentum) * running_mean + momentum * stop(mean)
    new_var = (1 - momentum) * running_var + momentum * stop(var * (count / (count - 1)))
    return out, mean, rstd.flatten(), new_mean, new_var


def _batch_norm_without_training(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    running_mean: torch.Tensor,
    running_var: torch.Tensor,
    momentum: float,
    eps: float,
) -> tuple[torch.Tensor, ...]:
    normal = (x - _by_channel(running_mean, x)) * _by_channel(torch.rsqrt(running_var + eps), x)
    nothing = x.new_empty(0)
    return _scaled_and_shifted(normal, weight, bias), nothing, nothing


def _scaled_and_shifted(x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None) -> torch.Tensor:
    """What a batch norm does to normal entries, for each channel."""
    x = x if weight is None else x * _by_channel(weight, x)
    return x if bias is None else x + _by_channel(bias, x)


def _by_channel(values: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return values.reshape([1, -1] + [1] * (x.ndim - 2))


DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    # Spellings of the affine update that are more than one operation, and would hide a state inside a velocity.
    **fake_tensors.decompositions_of(operator_table.packets(lambda row: row.traced == "apart")),
    aten.lerp.Scalar: _lerp,
    aten.lerp.Tensor: _lerp,
    # aten.copy, the functional form of a write to a slice, has no derivative of its own.
    aten.copy.default: lambda old, new, non_blocking=False: new.to(old.dtype).expand(old.shape).clone(),
    aten.slice_scatter.default: _of_parts(aten.slice_scatter.default),
    aten.select_scatter.default: _of_parts(aten.select_scatter.default),
    # Operations with a list of views as result: as single views a state keeps its identity through them.
    aten.split_with_sizes.default: _split_with_sizes,
    aten.split.Tensor: _split,
    aten.unsafe_split.Tensor: _split,
    aten.unsafe_split_with_sizes.default: _split_with_sizes,
    aten.unbind.int: lambda x, dim=0: [aten.select.int(x, dim, i) for i in range(x.shape[dim])],
    # As a single operation the running statistics would be part of a velocity, and low.
    aten._native_batch_norm_legit_functional.default: _batch_norm,
    # As products with factors that depend on no state, for which the adjoint's scales make up.
    aten._native_batch_norm_legit_no_training.default: _batch_norm_without_training,
}
