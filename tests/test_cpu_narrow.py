"""Narrow products on a CPU: which ones are written out as sums, and what they give."""

import itertools

import pytest
import torch
from torch import fx
from torch._dynamo.source import ConstantSource
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.utils import run_and_get_code
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from rampde_fx.emit.cpu_narrow import ReplaceNarrowProducts, replace_narrow_products

aten = torch.ops.aten


class Replacing(CustomGraphPass):
    def __call__(self, graph):
        replace_narrow_products()(graph)

    def uuid(self):
        return None


def matrix(rows, columns, by_columns, dtype):
    found = torch.randn(columns if by_columns else rows, rows if by_columns else columns, dtype=dtype)
    return found.T if by_columns else found


@pytest.mark.inductor
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_products_of_every_layout(dtype):
    """One graph of many products: within a few roundings of BLAS, and no call of it."""
    torch.manual_seed(0)
    sizes = [
        (40, 4, 24),
        (40, 24, 3),
        (3, 40, 24),
        (24, 40, 4),
        (1, 24, 24),
        (24, 1, 24),
        (24, 24, 1),
        (5, 5, 5),
        (1, 1, 1),
    ]
    pairs = [
        (matrix(m, k, a_by_columns, dtype), matrix(k, n, b_by_columns, dtype))
        for (m, k, n), a_by_columns, b_by_columns in itertools.product([*sizes, (9, 8, 9), (9, 9, 8)], (0, 1), (0, 1))
    ]

    def multiplied(pairs):
        return [torch.mm(a, b) for a, b in pairs]

    compiled = torch.compile(multiplied, options={"post_grad_custom_post_pass": Replacing()})
    found, (code,) = run_and_get_code(compiled, pairs)
    assert "extern_kernels." not in code
    for got, (a, b) in zip(found, pairs, strict=True):
        torch.testing.assert_close(got, a @ b)


@pytest.mark.inductor
def test_what_is_copied_is_copied_once():
    """A weight stored by columns for sums of few terms: one copy for two products."""

    def layers(x, y, weight):
        turned = weight.T
        return torch.mm(x, turned), torch.mm(y, turned)

    x, y, weight = torch.randn(40, 4), torch.randn(40, 4), torch.randn(24, 4)
    graph = make_fx(layers, tracing_mode="fake")(x, y, weight).graph
    replace_narrow_products()(graph)
    assert len(graph.find_nodes(op="call_function", target=aten.clone.default)) == 1
    assert len(graph.find_nodes(op="call_function", target=torch.ops.rampde_fx.narrow_product.default)) == 2
    compiled = torch.compile(layers, options={"post_grad_custom_post_pass": Replacing()})
    found, (code,) = run_and_get_code(compiled, x, y, weight)
    torch.testing.assert_close(found, layers(x, y, weight))
    assert "tmpbuf" not in code  # what is read beside each other lies beside each other


def replaced(a, b, mode=None):
    traced = make_fx(aten.mm.default, tracing_mode="real" if mode else "fake")(a, b)
    with mode or torch.no_grad():
        ReplaceNarrowProducts()(traced.graph)
    return any("narrow_product" in str(node.target) for node in traced.graph.nodes)


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ((40, 8), (8, 40), True),
        ((40, 9), (9, 40), False),
        ((8, 40), (40, 40), True),
        ((40, 40), (40, 8), True),
        ((40, 0), (0, 40), False),
        ((0, 40), (40, 40), False),
        ((2**10, 8), (8, 2**7 - 1), True),
        ((2**10, 8), (8, 2**7), False),
        ((8, 1024), (1024, 9), True),
        ((8, 1025), (1025, 9), False),
    ],
)
def test_sizes(a, b, expected):
    assert replaced(torch.ones(a), torch.ones(b)) == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64, torch.complex64])
def test_other_dtypes_are_left_alone(dtype):
    assert not replaced(torch.ones(4, 4, dtype=dtype), torch.ones(4, 4, dtype=dtype))


def test_other_devices_and_symbols_are_left_alone():
    with FakeTensorMode() as mode:
        a = torch.ones(4, 4, device="cuda")
    assert not replaced(a, a, mode)
    mode = FakeTensorMode(shape_env=ShapeEnv())
    symbolic = mode.from_tensor(torch.ones(7, 4), source=ConstantSource("x"))
    assert not all(isinstance(n, int) for n in symbolic.shape)
    graph = fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    product = graph.call_function(aten.mm.default, (x, y))
    with mode:
        x.meta["val"], y.meta["val"] = symbolic, torch.ones(4, 4)
        product.meta["val"] = aten.mm.default(symbolic, y.meta["val"])
    graph.output(product)
    ReplaceNarrowProducts()(graph)
    assert product in graph.nodes
