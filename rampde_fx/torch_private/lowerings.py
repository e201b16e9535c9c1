"""Lowerings of operators of ours: what Inductor writes for them, with which it fuses what is beside them."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from rampde_fx.torch_private.names import Names

_torch = Names(
    {
        "torch._inductor.ir": "ExternKernel Pointwise Reduction",
        "torch._inductor.lowering": "expand fallback_handler permute register_lowering",
        "torch._inductor.virtualized": "V ops",
    }
)


@functools.cache
def lower_widened(widened: Any) -> None:
    """Have Inductor fuse a cast of x to float32 that is of what memory holds: rounded."""
    _torch.register_lowering(widened, type_promotion_kind=None)(lambda x: _rounded(x, torch.float32))


@functools.cache
def lower_rounded(rounded: Any) -> None:
    """Have Inductor fuse the rounding of x to its dtype."""

    def lower(x: Any) -> Any:
        if x.get_device().type == "cpu" and not _rounds_on_cpu():
            return _torch.fallback_handler(rounded, add_to_fallback_set=False)(x)
        return _rounded(x, x.get_dtype())

    _torch.register_lowering(rounded, type_promotion_kind=None)(lower)


def _rounds_on_cpu() -> bool:
    """Whether Inductor's C++ has a rounding that it may not leave out; that of torch 2.11 has none."""
    return torch.__version__ >= (2, 13)


def _rounded(x: Any, result: torch.dtype) -> Any:
    """x, rounded to its dtype, in another one.

    Of a number in lower precision Inductor has the one in float32 that was rounded. use_compute_types=False, by which
    it emulates casts where that is asked for, asks for the rounded one.
    """
    load, low = x.make_loader(), x.get_dtype()

    def entry(index: Any) -> Any:
        low_entry = _torch.ops.to_dtype(load(index), low, use_compute_types=False)
        wide = _torch.ops.to_dtype(low_entry, torch.float32)
        return wide if result is torch.float32 else _torch.ops.to_dtype(wide, result)

    return _torch.Pointwise.create(device=x.get_device(), dtype=result, inner_fn=entry, ranges=list(x.get_size()))


@functools.cache
def lower_overflows(narrow: Any, mark_overflow: Any, least_infinite: Callable[[torch.dtype], float]) -> None:
    """Have Inductor fuse the marks of overflows: NaN for what is finite, and an infinity in memory.

    They are told by magnitude: Inductor has numbers of lower precision in float32, and leaves their rounding out.

    Args:
        narrow: An operator of (x, *, dtype): x in a dtype of less range.
        mark_overflow: An operator of (x, operands): x, marked where it overflows and no operand is infinite.
        least_infinite: The least number that a dtype rounds to infinity.
    """

    def reaches(value: Any, dtype: torch.dtype, bound: float) -> Any:
        return _torch.ops.ge(_torch.ops.abs(value), _torch.ops.constant(bound, _computed(dtype)))

    def within(value: Any, dtype: torch.dtype, bound: float) -> Any:
        return _torch.ops.lt(_torch.ops.abs(value), _torch.ops.constant(bound, _computed(dtype)))

    def marked(value: Any, dtype: torch.dtype, overflows: Any) -> Any:
        return _torch.ops.where(overflows, _torch.ops.constant(math.nan, _computed(dtype)), value)

    def lower_narrow(x: Any, *, dtype: torch.dtype) -> Any:
        load, wide = x.make_loader(), x.get_dtype()

        def entry(index: Any) -> Any:
            value = load(index)
            finite = within(value, wide, math.inf)
            overflows = _torch.ops.logical_and(reaches(value, wide, least_infinite(dtype)), finite)
            return _torch.ops.to_dtype(marked(value, wide, overflows), dtype)

        return _torch.Pointwise.create(device=x.get_device(), dtype=dtype, inner_fn=entry, ranges=list(x.get_size()))

    def lower_mark(x: Any, operands: Sequence[Any]) -> Any:
        load, dtype, size = x.make_loader(), x.get_dtype(), list(x.get_size())
        others = [(_torch.expand(operand, size).make_loader(), operand.get_dtype()) for operand in operands]

        def entry(index: Any) -> Any:
            value = load(index)
            overflows = reaches(value, dtype, least_infinite(dtype))
            for load_operand, own in others:
                finite = within(load_operand(index), own, least_infinite(own))
                overflows = _torch.ops.logical_and(overflows, finite)
            return marked(value, dtype, overflows)

        return _torch.Pointwise.create(device=x.get_device(), dtype=dtype, inner_fn=entry, ranges=size)

    plain = {"type_promotion_kind": None}
    _torch.register_lowering(narrow, **plain)(lower_narrow)
    _torch.register_lowering(mark_overflow, **plain)(lower_mark)


def _computed(dtype: torch.dtype) -> torch.dtype:
    """In what Inductor computes with numbers of a dtype."""
    return torch.float32 if dtype.itemsize < 4 else dtype


@functools.cache
def lower_quotient(
    function: Any,
    numerator: Sequence[float],
    denominator: Sequence[float],
    largest: float,
    passes_on: Callable[[Any], bool],
) -> None:
    """Have Inductor write out a function of x as y P(y^2) / Q(y^2), by fused multiply-adds, where y is x, clamped.

    Args:
        function: An operator of x with results from -1 to 1, computed in float32, and rounded once to the dtype of x.
        numerator: The coefficients of P, that of the constant first.
        denominator: Those of Q.
        largest: To which, and its negative, y is clamped.
        passes_on: Whether an operator's result is its operand's, in another dtype or shape.
    """

    def constant(value: float) -> Any:
        return _torch.ops.constant(value, torch.float32)

    def within(value: Any, bound: float) -> Any:
        return _torch.ops.minimum(_torch.ops.maximum(value, constant(-bound)), constant(bound))

    def polynomial(z: Any, coefficients: Sequence[float]) -> Any:
        terms = map(constant, reversed(coefficients))
        return functools.reduce(lambda found, term: _torch.ops.fma(found, z, term), terms)

    def lower(x: Any) -> Any:
        load, dtype = x.make_loader(), x.get_dtype()

        def entry(index: Any) -> Any:
            y = within(load(index), largest)  # in float32, whatever the dtype
            z = _torch.ops.mul(y, y)
            above = _torch.ops.mul(y, polynomial(z, numerator))
            return within(_torch.ops.truediv(above, polynomial(z, denominator)), 1.0)

        found = _torch.Pointwise.create(device=x.get_device(), dtype=dtype, inner_fn=entry, ranges=list(x.get_size()))
        if _readers(_torch.V.graph.current_node, passes_on) > 1:
            found.realize()  # Inductor would compute it anew for each
        return found

    _torch.register_lowering(function, type_promotion_kind=None)(lower)


def _readers(node: fx.Node, passes_on: Callable[[Any], bool]) -> int:
    return sum(_readers(user, passes_on) if passes_on(user.target) else 1 for user in node.users)


@functools.cache
def lower_narrow_products(product: Any, narrow: int) -> None:
    """Have Inductor write out products of matrices of which one has few rows or columns, as loops of its own.

    A product of few summands is an expression for each entry, any other one a sum for each. The result is written along
    what lies beside each other in the factors.
    """
    by_rows, by_columns = [1, 0], [0, 1]

    def lower(left: Any, right: Any, sums_rows: bool) -> Any:
        left, right = (_torch.ExternKernel.realize_input(factor) for factor in (left, right))
        (rows, inner), columns = left.get_size(), right.get_size()[1]
        turned = int(columns) <= narrow < min(int(rows), int(inner)) and not sums_rows
        if not turned:  # a copy may have any layout until it is asked for one
            right = _torch.ExternKernel.require_stride_order(right, by_columns if sums_rows else by_rows)
        load_left, load_right = left.make_loader(), right.make_loader()

        def term(i: Any, j: Any, k: Any) -> Any:
            return _torch.ops.mul(load_left([i, k]), load_right([k, j]))

        device, dtype = left.get_device(), left.get_dtype()
        if int(inner) <= narrow:

            def entry(index: Any) -> Any:
                i, j = index
                found = term(i, j, 0)
                for k in range(1, int(inner)):
                    found = _torch.ops.fma(load_left([i, k]), load_right([k, j]), found)
                return found

            return _torch.Pointwise.create(device=device, dtype=dtype, inner_fn=entry, ranges=[rows, columns])
        found = _torch.Reduction.create(
            device=device,
            dst_dtype=dtype,
            src_dtype=dtype,
            inner_fn=lambda index, summed: term(index[turned], index[not turned], summed[0]),
            ranges=[columns, rows] if turned else [rows, columns],
            reduction_ranges=[inner],
            reduction_type="sum",
        )
        found.realize()
        return _torch.permute(found, [1, 0]) if turned else found

    _torch.register_lowering(product, type_promotion_kind=None)(lower)
