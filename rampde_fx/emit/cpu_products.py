"""Products in a dtype that the CPU has no arithmetic for: of the same low factors, in float32, rounded once.

Before:  c: f16[B, H] = aten.mm(a, b)
After:   c: f16[B, H] = rampde_fx.mm(a, b)        which is mm(a.to(f32), b.to(f32)).to(f16)

Such a CPU multiplies float16 matrices entry by entry, 10 to 30 times slower than float32. Sums in float32 of products
of float16 factors are what a GPU computes. Each is an operator of its own, and not its three parts: Inductor would fuse
the casts with what stands before and behind, and leave the roundings out. The rewritten graph is the same on every
device; Inductor puts these in while it lowers it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from rampde_fx.ir import graphs, operator_table
from rampde_fx.runtime import operators
from rampde_fx.torch_private import kernels

PRODUCTS = tuple(packet.default for packet in operator_table.packets(lambda row: row.cpu_twin))
LOW_DTYPES = (torch.float16, torch.bfloat16)


def _in_float32(product: Any) -> Callable[..., Any]:
    """A product of low factors in float32: plain Python and no trees, for small products take microseconds."""

    def run(first: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        dtype = first.dtype
        found = product(
            first.float(), *(arg.float() if isinstance(arg, torch.Tensor) else arg for arg in args), **kwargs
        )
        if isinstance(found, torch.Tensor):
            return found.to(dtype)
        return tuple(result if result is None else result.to(dtype) for result in found)

    return run


_TWINS = {}
for _product in PRODUCTS:
    _name = operators.library.define(str(_product._schema).removeprefix("aten::"))
    operators.library.impl(_name, _in_float32(_product), "CPU")
    torch.library.register_fake(f"rampde_fx::{_name}", _product, lib=operators.library)
    _TWINS[_product] = getattr(torch.ops.rampde_fx, _name).default


@dataclass(frozen=True)
class ReplaceProducts:
    """A pass over what Inductor lowers: replaces products, in place.

    Attributes:
        dtypes: The dtypes that the CPU has no arithmetic for.
    """

    dtypes: tuple[torch.dtype, ...]

    def __call__(self, graph: fx.Graph) -> None:
        for node in graph.nodes:
            if node.target in _TWINS and all(map(self._is_replaced, node.all_input_nodes)):
                node.target = _TWINS[node.target]

    def _is_replaced(self, factor: fx.Node) -> bool:
        value = graphs.value(factor)
        return not isinstance(value, torch.Tensor) or (value.device.type == "cpu" and value.dtype in self.dtypes)

    def uuid(self) -> str:
        """What the result depends on, for Inductor's caches."""
        return repr(self)


def replace_products() -> ReplaceProducts:
    """The pass for the CPU of this machine."""
    return ReplaceProducts(tuple(dtype for dtype in LOW_DTYPES if not kernels.cpu_multiplies(dtype)))
