"""Products in float16 on a CPU without float16 arithmetic are products in float32 of the same factors."""

import pytest
import torch
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import rampde_fx
from rampde_fx.emit import cpu_products
from rampde_fx.torch_private import inductor, kernels
from tests.models import Euler

aten = torch.ops.aten


def draw(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).half()


A, B, C = draw(3, 5), draw(5, 7), draw(7)
X, W = draw(2, 3, 6, 6), draw(4, 3, 3, 3)
CONVOLUTION = ([1, 1], [1, 1], [1, 1], False, [0, 0], 1)
CALLS = {
    aten.mm.default: (A, B),
    aten.addmm.default: (C, A, B),
    aten.bmm.default: (A[None], B[None]),
    aten.baddbmm.default: (C[None, None], A[None], B[None]),
    aten.convolution.default: (X, W, draw(4), *CONVOLUTION),
    aten.convolution_backward.default: (draw(2, 4, 6, 6), X, W, [4], *CONVOLUTION, [True, True, True]),
}


@pytest.fixture(autouse=True)
def cpu_without_float16(monkeypatch):
    monkeypatch.setattr(kernels, "cpu_multiplies", lambda dtype: dtype is not torch.float16)


def lowered(product, args):
    graph = make_fx(product, tracing_mode="fake")(*args)
    cpu_products.replace_products()(graph.graph)
    graph.recompile()
    return graph


def operators_of(graph):
    return [str(node.target) for node in graph.graph.nodes if node.op == "call_function" and "getitem" not in node.name]


def test_every_product_has_a_case():
    assert set(CALLS) == set(cpu_products.PRODUCTS)


@pytest.mark.parametrize("product", CALLS, ids=str)
def test_sums_in_float32_and_rounds_once(product):
    args = CALLS[product]
    graph = lowered(product, args)
    assert operators_of(graph) == [str(product).replace("aten.", "rampde_fx.")]
    got, exact = graph(*args), product(*(x.double() if isinstance(x, torch.Tensor) else x for x in args))
    for result, wanted in zip(*((r if isinstance(r, tuple) else (r,)) for r in (got, exact)), strict=True):
        assert result.dtype is torch.float16 and result.shape == wanted.shape
        assert (result - wanted).abs().max() <= 1.01 * 2.0**-11 * wanted.abs().max()
    twin = getattr(torch.ops.rampde_fx, product.overloadpacket.__name__)
    torch.library.opcheck(twin, args, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(("dtype", "device"), [("float32", "cpu"), ("bfloat16", "cpu"), ("float16", "meta")])
def test_other_products_stay(dtype, device):
    with FakeTensorMode():
        args = [torch.empty(shape, dtype=getattr(torch, dtype), device=device) for shape in ((3, 5), (5, 7))]
    assert operators_of(lowered(aten.mm.default, args)) == ["aten.mm.default"]


def test_a_cpu_with_float16_arithmetic_keeps_them(monkeypatch):
    monkeypatch.setattr(kernels, "cpu_multiplies", lambda dtype: True)
    assert operators_of(lowered(aten.mm.default, (A, B))) == ["aten.mm.default"]


class Recorded(CustomGraphPass):
    """A pass of the user's."""

    def __init__(self, uuid):
        self.seen, self.key = [], uuid

    def __call__(self, graph):
        self.seen.append([str(node.target) for node in graph.nodes])

    def uuid(self):
        return self.key


def test_inductor_lowers_with_them_behind_a_pass_of_the_users(monkeypatch):
    given = {}

    def compiler(graph_module, inputs, *, config_patches, inner_compile):
        given.update(config_patches)
        return graph_module

    monkeypatch.setattr(inductor, "lookup_backend", lambda name: compiler)
    users = Recorded("of the user's")
    for options in ({}, {"post_grad_custom_pre_pass": users}):
        torch._dynamo.reset()
        model = torch.compile(
            rampde_fx.mixed_precision(Euler(), dtype=torch.float16), backend="rampde_fx", options=options
        )
        model(torch.randn(3, 5), torch.linspace(0, 1, 4))
    lowering = given["post_grad_custom_pre_pass"]
    graph = make_fx(aten.mm.default, tracing_mode="fake")(A, B)
    lowering(graph.graph)
    assert operators_of(graph) == ["rampde_fx.mm.default"] and "aten.mm.default" in users.seen[0]
    assert "of the user's" in lowering.uuid()
    monkeypatch.setattr(kernels, "cpu_multiplies", lambda dtype: True)
    assert cpu_products.replace_products().uuid() not in lowering.uuid()
    users.key = None
    assert lowering.uuid() is None
