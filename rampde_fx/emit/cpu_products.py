"""Products in low precision that a CPU takes faster in float32: of the same low factors.

Before:  c: f16[B, H] = aten.mm(a, b)
After:   x: f32[B, D] = rampde_fx.widened(a);    y: f32[D, H] = rampde_fx.widened(b)
         p: f32[B, H] = aten.mm(x, y);           c: f16[B, H] = prims.convert_element_type(p, f16)

A CPU without arithmetic for float16 multiplies its matrices entry by entry, 10 to 30 times slower than float32. On one
that has arithmetic a product begins with 14 us, in which float32 multiplies 128 x 64 x 64 numbers; with twice as many
both take as long on one thread, with four times as many on two (measured by tests/benchmarks/products.py). Besides,
loops of float32 products run in C++. Sums in float32 of products of low factors are what a GPU computes, too.

Derivatives of some products are slow on every CPU (the operator table says which): of a convolution in float16, 237 ms
instead of 2.6 in float32, forward and backward of 32 channels on 64 images of 8 x 8; and of an attention in float16 and
in bfloat16, 14 ms instead of 2, of 16 x 4 heads of 64 x 32. Large heads of bfloat16 are faster on matrix units: 28 ms
instead of 38, of 4 x 4 heads of 512 x 64.

A CPU with matrix units (AMX) is faster in bfloat16 from the smallest products on, if these are asked of oneDNN's
kernels one by one (low_products.py): 128 x 64 x 64 in 4 us, instead of 10 in float32 and 28 by torch.mm in bfloat16.
There products of two matrices stay as they are, but narrow ones, which are sums; and but those beside convolutions and
attentions, whose loops run in Python, where a call takes longer than a small product.

Inductor fuses the casts with what stands before and behind. The factors are rounded: behind torch's own cast Inductor
would leave that out. (In torch 2.11 it does all the same: nothing is less exact for it.) A result is rounded where it
is stored, as that of any operation in a kernel of Inductor's. The rewritten graph is the same on every device; Inductor
puts these in while it lowers it.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from rampde_fx.emit.cpu_casts import is_merged
from rampde_fx.emit.cpu_narrow import NARROW
from rampde_fx.ir import graphs, operator_table
from rampde_fx.ir.lowering import HALF, is_half
from rampde_fx.runtime import operators
from rampde_fx.torch_private import kernels, low_products, lowerings

PRODUCTS = tuple(packet.default for packet in operator_table.packets(lambda row: row.wide_on_cpu))
FEW = 2**21  # multiplications, with which both take as long
LARGE = 2**24  # multiplications of a head, from which on matrix units take the derivative of an attention faster

operators.library.define("widened(Tensor x) -> Tensor", tags=(torch.Tag.pointwise,))
operators.library.impl("widened", torch.Tensor.float, "CompositeExplicitAutograd")
WIDENED, CAST = torch.ops.rampde_fx.widened.default, torch.ops.prims.convert_element_type.default


@dataclass(frozen=True)
class ReplaceProducts:
    """A pass over what Inductor lowers: replaces products, in place.

    Attributes:
        dtypes: The dtypes that the CPU has no arithmetic for.
        few: Products of matrices, and attentions, of no more multiplications are replaced in every low dtype.
        kept: The dtypes of matrix units. Products of two matrices in them stay, if they are wider than narrow and there
            are no others; so do derivatives of attentions to heads of more than large multiplications.
    """

    dtypes: tuple[torch.dtype, ...]
    kept: tuple[torch.dtype, ...] = ()
    few: int = FEW
    narrow: int = NARROW
    large: int = LARGE

    def __call__(self, graph: fx.Graph) -> None:
        wide: dict[fx.Node, fx.Node] = {}
        products = [node for node in graph.nodes if node.target in PRODUCTS]
        in_python = any(operator_table.properties(node.target).product != "matrices" for node in products)
        for node in products:
            if self._is_replaced(node, in_python):
                _replace(graph, node, wide)

    def _is_replaced(self, product: fx.Node, in_python: bool) -> bool:
        factors = [graphs.value(factor) for factor in product.all_input_nodes]
        factors = [value for value in factors if isinstance(value, torch.Tensor)]
        low = list(filter(is_half, factors))  # an attention also takes sums in float32
        known = all(value.dtype in (*HALF, torch.float32) and value.device.type == "cpu" for value in factors)
        slow = {*self.dtypes, *operator_table.properties(product.target).slow_on_cpu}
        is_slow = all(value.dtype in slow for value in low)
        return (
            bool(known and low) and (is_slow or self._is_small(product)) and not self._is_kept(product, low, in_python)
        )

    def _is_small(self, product: fx.Node) -> bool:
        sizes = _sizes(product)
        return _are_known(sizes) and math.prod(sizes) <= self.few

    def _is_kept(self, product: fx.Node, low: list[torch.Tensor], in_python: bool) -> bool:
        """Matrix units take it faster as it is."""
        sizes = _sizes(product)
        if not _are_known(sizes) or not all(value.dtype in self.kept for value in low):
            return False
        row = operator_table.properties(product.target)
        if row.product == "matrices":
            return not in_python and len(sizes) == 3 and min(sizes) > self.narrow
        return torch.bfloat16 in row.slow_on_cpu and math.prod(sizes[2:]) > self.large

    def uuid(self) -> str:
        """What the result depends on, for Inductor's caches."""
        return repr(self)


def replace_products() -> ReplaceProducts:
    """The pass for the CPU of this machine."""
    lowerings.lower_widened(WIDENED)
    has = {torch.float16: kernels.cpu_multiplies(torch.float16), torch.bfloat16: kernels.cpu_has_bfloat16()}
    kept = (torch.bfloat16,) if low_products.multiplies() and kernels.cpu_has_tiles() else ()
    return ReplaceProducts(tuple(dtype for dtype in HALF if not has[dtype]), kept)


def _are_known(sizes: list[Any]) -> bool:
    return bool(sizes) and all(isinstance(size, int) for size in sizes)


def _sizes(product: fx.Node) -> list[Any]:
    """Of which the product is how many numbers a product multiplies; none of a convolution.

    Of an attention those from the third on are of one head.
    """
    row = operator_table.properties(product.target)
    if row.product == "matrices":
        second = graphs.value(product.args[2 if row.first_is_summand else 1])
        return [*graphs.value(product).shape, second.shape[-2]]
    query, key = (operator_table.argument(product.target, name, product.args, {}) for name in ("query", "key"))
    return [] if query is None else [*graphs.value(query).shape, 2 * graphs.value(key).shape[-2]]


def _replace(graph: fx.Graph, product: fx.Node, wide: dict[fx.Node, fx.Node]) -> None:
    """One product; wide has the factors that are widened already."""
    with graph.inserting_before(product):
        for factor in product.all_input_nodes:
            _widen(graph, factor, wide)
        args, kwargs = fx.map_arg((product.args, product.kwargs), wide.__getitem__)
        found = graphs.valued(graph, product.target, *args, **kwargs)
        if isinstance(graphs.value(product), torch.Tensor):
            results = {product: graphs.valued(graph, CAST, found, graphs.value(product).dtype)}
        else:
            results = {low: _low_item(graph, found, low) for low in product.users}
    for low, result in results.items():
        low.replace_all_uses_with(result)
        graph.erase_node(low)
    if product not in results:
        graph.erase_node(product)


def _widen(graph: fx.Graph, factor: fx.Node, wide: dict[fx.Node, fx.Node]) -> None:
    """Have a factor in float32; a view from what it views, which may be a factor as well."""
    if factor in wide:
        return
    if not is_half(graphs.value(factor)):
        wide[factor] = factor  # a size, or float32
    elif factor.target is torch.ops.aten.permute.default or is_merged(factor):
        _widen(graph, factor.args[0], wide)
        wide[factor] = graphs.valued(graph, factor.target, wide[factor.args[0]], *factor.args[1:])
    else:
        wide[factor] = graphs.valued(graph, WIDENED, factor)


def _low_item(graph: fx.Graph, found: fx.Node, low: fx.Node) -> fx.Node:
    """What stands for one of several results, taken by low; an absent one is None."""
    item = graphs.valued(graph, operator.getitem, found, low.args[1])
    value = graphs.value(low)
    return graphs.valued(graph, CAST, item, value.dtype) if is_half(value) else item
