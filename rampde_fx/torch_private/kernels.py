"""Kernels of operators: the dispatcher, and what a device computes."""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from rampde_fx.torch_private.names import Names

_torch = Names(
    {
        "torch": "_foreach_copy_",
        "torch._C": "_AutoDispatchBelowAutograd",
        "torch.cpu": "_is_amx_tile_supported _is_avx512_bf16_supported",
    }
)
_cuda = Names({"torch._C": "_cuda_clearCublasWorkspaces"}, everywhere=False)


__all__ = ["StorageWeakRef"]


def below_autograd(function: Callable[..., Any]) -> Callable[..., Any]:
    """An autograd kernel that computes without recording anything."""
    mode: list[Any] = []  # what makes it, looked up once, and not when this package is imported

    def run(*args: Any) -> Any:
        if not mode:
            mode.append(_torch._AutoDispatchBelowAutograd)
        with mode[0]():
            return function(*args)

    return run


def free_cublas_workspaces() -> None:
    """Have cuBLAS allocate its workspaces anew, as torch does round its own captures."""
    _cuda._cuda_clearCublasWorkspaces()


def copy_all(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
    """Copy tensors, in as few launches as their dtypes allow."""
    if targets:
        _torch._foreach_copy_(targets, sources)


def cpu_multiplies(dtype: torch.dtype) -> bool:
    """Whether the CPU has arithmetic for products in float16 or bfloat16."""
    low = {
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
    }
    return torch.backends.mkldnn.is_available() and low[dtype]()


def cpu_has_bfloat16() -> bool:
    """Whether the CPU multiplies in bfloat16: by AVX512-BF16, AMX, or Arm's instructions.

    cpu_multiplies asks less of an x86 CPU: with AVX512 alone, oneDNN widens the factors.
    """
    if platform.machine() in ("aarch64", "arm64"):
        return cpu_multiplies(torch.bfloat16)
    return _torch._is_avx512_bf16_supported() or _torch._is_amx_tile_supported()


def cpu_has_tiles() -> bool:
    """Whether the CPU has matrix units for bfloat16 (AMX)."""
    return bool(_torch._is_amx_tile_supported())
