"""Narrow products on a CPU: written out as sums that Inductor vectorizes, where BLAS is slow.

Before:  p: f32[B, H] = aten.mm(a, b)               with a: f32[B, 4], say
After:   p: f32[B, H] = rampde_fx.narrow_product(a, b)      p[i, j] = a[i, 0] b[0, j] + ... + a[i, 3] b[3, j]

Flows have few dimensions: their first layer multiplies by a matrix of a few columns, their last one by one of a few
rows, and so do their derivatives. BLAS takes 3 to 11 us for 128 x 4 x 64 entries, by their layout, and these sums one
to three. What a sum reads beside each other has to lie beside each other: a weight that does not is copied, once for
all products of a step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import fx

from rampde_fx.ir import graphs
from rampde_fx.runtime import operators
from rampde_fx.torch_private import lowerings

aten = torch.ops.aten
NARROW = 8  # rows, columns or summands, which Inductor writes one by one
FEW = 2**20  # multiplications
LONG = 1024  # summands, of which BLAS has more exact sums: it adds them in blocks
DTYPES = (torch.float32, torch.float64)

operators.library.define("narrow_product(Tensor left, Tensor right, bool sums_rows) -> Tensor")
operators.library.impl("narrow_product", lambda left, right, _: torch.mm(left, right), "CompositeExplicitAutograd")
# sums_rows: whether both factors are read along what is summed
PRODUCT = torch.ops.rampde_fx.narrow_product.default


@dataclass(frozen=True)
class ReplaceNarrowProducts:
    """A pass over what Inductor lowers: replaces products, in place.

    Attributes:
        narrow: A product is replaced that has at most as many rows, columns or summands,
        few: And fewer multiplications,
        long: And at most as many summands.
    """

    narrow: int = NARROW
    few: int = FEW
    long: int = LONG

    def __call__(self, graph: fx.Graph) -> None:
        copies: dict[tuple[fx.Node, bool], fx.Node] = {}
        for node in graph.find_nodes(op="call_function", target=aten.mm.default):
            if self._is_replaced(node):
                _replace(graph, node, self.narrow, copies)

    def _is_replaced(self, product: fx.Node) -> bool:
        value = graphs.value(product)
        sizes = [*value.shape, graphs.value(product.args[0]).shape[1]]
        if value.device.type != "cpu" or value.dtype not in DTYPES or not all(isinstance(n, int) for n in sizes):
            return False
        return 0 < min(sizes) <= self.narrow and math.prod(sizes) < self.few and sizes[-1] <= self.long

    def uuid(self) -> str:
        """What the result depends on, for Inductor's caches."""
        return repr(self)


def replace_narrow_products() -> ReplaceNarrowProducts:
    """The pass for the CPU of this machine."""
    lowerings.lower_narrow_products(PRODUCT, NARROW)
    return ReplaceNarrowProducts()


def _replace(graph: fx.Graph, product: fx.Node, narrow: int, copies: dict[tuple[fx.Node, bool], fx.Node]) -> None:
    left, right = product.args
    rows, inner = graphs.value(left).shape
    sums_rows = inner > narrow and graphs.value(left).stride(1) == 1
    with graph.inserting_before(product):
        if inner <= narrow or (rows <= narrow and not sums_rows):
            right = _copied(graph, right, False, copies)
        elif sums_rows:
            right = _copied(graph, right, True, copies)
        replaced = graphs.valued(graph, PRODUCT, left, right, sums_rows)
    product.replace_all_uses_with(replaced)
    graph.erase_node(product)


def _copied(graph: fx.Graph, factor: fx.Node, by_columns: bool, copies: dict[tuple[fx.Node, bool], fx.Node]) -> fx.Node:
    """A matrix that is stored by columns, or by rows: itself, or a copy, the same one for every product."""
    value = graphs.value(factor)
    if value.stride(0 if by_columns else 1) == 1 or value.shape[0 if by_columns else 1] == 1:
        return factor
    if (factor, by_columns) not in copies:
        source = graphs.valued(graph, aten.permute.default, factor, [1, 0]) if by_columns else factor
        copy = graphs.valued(graph, aten.clone.default, source, memory_format=torch.contiguous_format)
        copies[factor, by_columns] = graphs.valued(graph, aten.permute.default, copy, [1, 0]) if by_columns else copy
    return copies[factor, by_columns]
