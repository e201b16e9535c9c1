"""Products of bfloat16 in C++, by the kernels of oneDNN that torch calls for its attention: their sums are in float32.

torch.mm asks oneDNN for a product at once, which takes 14 to 30 us however small it is. These kernels take a part of a
product, with the right factor laid out for them, in 4 us for 128 x 64 x 64.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from collections.abc import Callable
from typing import Any

import torch

from rampde_fx.torch_private import cpp_compiler, kernels

_SYMBOLS = (
    "_ZN2at6native7cpublas6brgemmEllllllbPKN3c108BFloat16ES5_Pfb",  # at::native::cpublas::brgemm, of bfloat16
    "_ZN2at6native7cpublas14brgemm_releaseEb",
    "_ZN2at13globalContextEv",
    "_ZNK2at7Context17userEnabledMkldnnEv",
)
_LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")  # by which a user keeps oneDNN from instructions

CALL = "low_product("
FROM_PYTHON = """static void multiply_low(
    char* left, char* right, char* out, int64_t left_by_columns, int64_t right_by_columns, int64_t rows,
    int64_t columns, int64_t inner, int64_t left_lead, int64_t right_lead, int64_t out_lead, char* added, int64_t adds,
    int64_t added_row, int64_t added_column
) {
    low_product(left_by_columns, right_by_columns, rows, columns, inner, reinterpret_cast<const Low*>(left), left_lead,
                reinterpret_cast<const Low*>(right), right_lead, reinterpret_cast<Low*>(out), out_lead,
                adds ? reinterpret_cast<const Low*>(added) : nullptr, added_row, added_column, false);
}"""
# What a library that calls low_product has of it. The kernels' library is another one, which is compiled once.
DECLARED = """
using Low = at::BFloat16;
static const struct LowKernels {
    void (*product)(bool, bool, int64_t, int64_t, int64_t, const Low*, int64_t, const Low*, int64_t, Low*, int64_t,
                    const Low*, int64_t, int64_t, bool);
    void (*keep)(bool);
}* low_kernels;

// While a loop runs, right factors that stay as they are in it are kept as the kernels take them.
struct KeepingFactors {
    KeepingFactors() { low_kernels->keep(true); }
    ~KeepingFactors() { low_kernels->keep(false); }
};

static void low_product(bool left_by_columns, bool right_by_columns, int64_t rows, int64_t columns, int64_t inner,
                        const Low* left, int64_t left_lead, const Low* right, int64_t right_lead, Low* out,
                        int64_t out_lead, const Low* added, int64_t added_row, int64_t added_column, bool stays) {
    if (!rows || !columns) return;
    for (int64_t* lead : {&left_lead, &right_lead, &out_lead}) *lead = std::max<int64_t>(*lead, 1);
    beside_python(rows * columns * inner, [&] {
        low_kernels->product(left_by_columns, right_by_columns, rows, columns, inner, left, left_lead, right,
                             right_lead, out, out_lead, added, added_row, added_column, stays);
    });
}
"""


@functools.cache
def places() -> tuple[int, ...]:
    """Where torch has what low_kernels.py calls: zeros, if it lacks any or the CPU has no arithmetic for bfloat16."""
    nothing = (0,) * len(_SYMBOLS)
    if sys.platform != "linux" or any(map(os.getenv, _LIMITS)):
        return nothing
    if not (torch.backends.mkldnn.is_available() and kernels.cpu_has_bfloat16()):
        return nothing
    try:
        library = cpp_compiler.torch_library()
        found = [ctypes.cast(getattr(library, name), ctypes.c_void_p).value or 0 for name in _SYMBOLS]
    except (OSError, AttributeError):
        return nothing
    return tuple(found) if all(found) else nothing


def multiplies() -> bool:
    """Whether products of bfloat16 are to be had from low_kernels.py."""
    return all(places()) and torch.backends.mkldnn.enabled and cpp_compiler.makes_long_vectors()


class WithLowProducts:
    """The kernels that what Inductor writes calls, with matrices of bfloat16 multiplied by multiply_low instead.

    Args:
        kernels: Inductor's own.
        multiply_low: From FROM_PYTHON.
    """

    def __init__(self, kernels: Any, multiply_low: Callable[..., None]) -> None:
        self._kernels, self._multiply_low = kernels, multiply_low

    def __getattr__(self, name: str) -> Any:
        return getattr(self._kernels, name)

    def mm(self, left: torch.Tensor, right: torch.Tensor, *, out: torch.Tensor) -> None:
        """A product."""
        layouts = _layouts(left, right, out)
        if layouts is None:
            self._kernels.mm(left, right, out=out)
        else:
            self._multiply_low(left, right, out, *layouts, out, 0, 0, 0)

    def addmm(
        self,
        added: torch.Tensor,
        left: torch.Tensor,
        right: torch.Tensor,
        *,
        alpha: float,
        beta: float,
        out: torch.Tensor,
    ) -> None:
        """A product, and what is added."""
        layouts = _layouts(left, right, out) if alpha == beta == 1 and added.dtype == out.dtype else None
        if layouts is None:
            self._kernels.addmm(added, left, right, alpha=alpha, beta=beta, out=out)
        else:
            self._multiply_low(left, right, out, *layouts, added, 1, *added.expand(out.shape).stride())


def _layouts(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> tuple[int, ...] | None:
    """How the matrices of a product lie in memory; None if multiply_low does not read them."""
    if {left.dtype, right.dtype, out.dtype} != {torch.bfloat16} or out.device.type != "cpu" or out.stride(1) != 1:
        return None
    sides = [_side(matrix) for matrix in (left, right)]
    if None in sides:
        return None
    flags, leads = zip(*sides, strict=True)
    return *flags, *out.shape, left.shape[1], *leads, out.stride(0)


def _side(matrix: torch.Tensor) -> tuple[int, int] | None:
    """Whether a factor is stored by columns, and how far apart two of these, or of its rows, are."""
    row, column = matrix.stride()
    by_columns = column != 1
    lead, length = (column, matrix.shape[0]) if by_columns else (row, matrix.shape[1])
    return (int(by_columns), lead) if (row if by_columns else column) == 1 and lead >= length else None
