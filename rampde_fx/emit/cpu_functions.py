"""tanh on a CPU, in float32: a quotient of polynomials, where torch calls a function that takes as long as a product.

Before:  h: f32[B, H] = aten.tanh(x)
After:   h: f32[B, H] = rampde_fx.quotient_tanh(x)
             which is clamp(y P(y^2) / Q(y^2), -1, 1), with y = clamp(x, -9.01, 9.01)

A layer of 64 units spends more time in tanh than in its product. The quotient is of relative accuracy everywhere, at
zero too, to six units in the last place (torch's own is at one; that of Inductor's use_decompose_tanh is absolute, and
leaves small arguments few digits). It does not exceed 1, so that 1 - tanh^2 has no wrong sign. float64 keeps torch's.
Inductor, which rounds each product and each sum by itself, is told to sum the polynomials by fused multiply-adds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from rampde_fx.emit import compared, cpu_products
from rampde_fx.ir import graphs, operator_table
from rampde_fx.runtime import operators
from rampde_fx.torch_private import lowerings

aten = torch.ops.aten

# tanh(y) / y = P(y^2) / Q(y^2), the least relative error on [-LARGEST, LARGEST]: 2.1e-8 (fitted by
# tests/benchmarks/tanh.py); tanh(LARGEST) rounds to 1.
NUMERATOR = (1.0, 1.338037103e-01, 3.494810779e-03, 2.059627150e-05, 1.333684452e-08)
DENOMINATOR = (1.0, 4.671368599e-01, 2.587402612e-02, 3.284362901e-04, 7.769281183e-07)
LARGEST = 9.01
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


operators.library.define("quotient_tanh(Tensor x) -> Tensor", tags=(torch.Tag.pointwise,))
operators.library.impl("quotient_tanh", torch.tanh, "CompositeExplicitAutograd")  # of what is folded
QUOTIENT = torch.ops.rampde_fx.quotient_tanh.default


@dataclass(frozen=True)
class ReplaceTanh:
    """A pass over what Inductor lowers: writes tanh out, in place."""

    def __call__(self, graph: fx.Graph) -> None:
        for node in graph.find_nodes(op="call_function", target=aten.tanh.default):
            value = graphs.value(node.args[0])
            if value.device.type == "cpu" and value.dtype in _DTYPES:
                node.target = QUOTIENT

    def uuid(self) -> str:
        """What the result depends on, for Inductor's caches."""
        return repr((self, NUMERATOR, DENOMINATOR, LARGEST))


def replace_tanh() -> ReplaceTanh:
    """The pass for the CPU of this machine."""
    lowerings.lower_quotient(QUOTIENT, NUMERATOR, DENOMINATOR, LARGEST, _passes_on)
    return ReplaceTanh()


def _passes_on(target: Any) -> bool:
    rounds = target in (compared.ROUNDED, cpu_products.WIDENED)
    return rounds or operator_table.is_cast(target) or operator_table.is_view(target)
