"""tanh on a CPU, in float32: a quotient of polynomials, where torch calls a function that takes as long as a product.

Before:  h: f32[B, H] = aten.tanh(x)
After:   h: f32[B, H] = clamp(y P(y^2) / Q(y^2), -1, 1)        with y = clamp(x, -9.01, 9.01)

A layer of 64 units spends more time in tanh than in its product. The quotient is of relative accuracy everywhere, at
zero too, to six units in the last place (torch's own is at one; that of Inductor's use_decompose_tanh is absolute, and
leaves small arguments few digits). It does not exceed 1, so that 1 - tanh^2 has no wrong sign. float64 keeps torch's.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import fx

from rampde_fx.ir import graphs

aten = torch.ops.aten

# tanh(y) / y = P(y^2) / Q(y^2), the least relative error on [-LARGEST, LARGEST]: 2.1e-8 (fitted by
# tests/benchmarks/tanh.py); tanh(LARGEST) rounds to 1.
NUMERATOR = (1.0, 1.338037103e-01, 3.494810779e-03, 2.059627150e-05, 1.333684452e-08)
DENOMINATOR = (1.0, 4.671368599e-01, 2.587402612e-02, 3.284362901e-04, 7.769281183e-07)
LARGEST = 9.01
_CONVERT = torch.ops.prims.convert_element_type.default
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class ReplaceTanh:
    """A pass over what Inductor lowers: writes tanh out, in place."""

    def __call__(self, graph: fx.Graph) -> None:
        for node in graph.find_nodes(op="call_function", target=aten.tanh.default):
            value = graphs.value(node.args[0])
            if value.device.type == "cpu" and value.dtype in _DTYPES:
                with graph.inserting_before(node), value.fake_mode:
                    node.replace_all_uses_with(_written_out(graph, node.args[0]))
                graph.erase_node(node)

    def uuid(self) -> str:
        """What the result depends on, for Inductor's caches."""
        return repr((self, NUMERATOR, DENOMINATOR, LARGEST))


def _written_out(graph: fx.Graph, x: fx.Node) -> fx.Node:
    """Nodes that compute tanh(x) in float32, in the dtype of x."""

    call = partial(graphs.valued, graph)

    def polynomial(z: fx.Node, coefficients: tuple[float, ...]) -> fx.Node:
        found = call(aten.mul.Tensor, z, coefficients[-1])
        for coefficient in coefficients[-2:0:-1]:
            found = call(aten.mul.Tensor, call(aten.add.Tensor, found, coefficient), z)
        return call(aten.add.Tensor, found, coefficients[0])

    def within(value: fx.Node, bound: float) -> fx.Node:
        return call(aten.clamp_max.default, call(aten.clamp_min.default, value, -bound), bound)

    dtype = graphs.value(x).dtype
    wide = x if dtype is torch.float32 else call(_CONVERT, x, torch.float32)
    y = within(wide, LARGEST)
    z = call(aten.mul.Tensor, y, y)
    above = call(aten.mul.Tensor, y, polynomial(z, NUMERATOR))
    tanh = within(call(aten.div.Tensor, above, polynomial(z, DENOMINATOR)), 1.0)
    return tanh if dtype is torch.float32 else call(_CONVERT, tanh, dtype)
