"""Products that a CPU takes in float32: of the same low factors."""

import pytest
import torch
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.utils import run_and_get_code
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.torch_version import TorchVersion

import rampde_fx
from rampde_fx.emit import cpu_products
from rampde_fx.torch_private import inductor, kernels, low_products
from tests.models import Euler

aten = torch.ops.aten


def draw(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).half()


ATTENTION = aten._scaled_dot_product_flash_attention_for_cpu.default
ATTENTION_BACKWARD = aten._scaled_dot_product_flash_attention_for_cpu_backward.default
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
    monkeypatch.setattr(kernels, "cpu_has_bfloat16", lambda: True)
    monkeypatch.setattr(kernels, "cpu_has_tiles", lambda: False)


def lowered(product, args):
    graph = make_fx(product, tracing_mode="fake")(*args)
    cpu_products.replace_products()(graph.graph)
    graph.recompile()
    return graph


def operators_of(graph):
    return [str(node.target) for node in graph.graph.nodes if node.op == "call_function" and "getitem" not in node.name]


def test_every_product_has_a_case():
    assert {*CALLS, ATTENTION, ATTENTION_BACKWARD} == set(cpu_products.PRODUCTS)


@pytest.mark.parametrize("product", CALLS, ids=str)
def test_sums_in_float32_and_rounds_once(product):
    args = CALLS[product]
    graph = lowered(product, args)
    factors = sum(isinstance(arg, torch.Tensor) for arg in args)
    results = product(*args) if isinstance(product(*args), tuple) else (product(*args),)
    rounded = ["prims.convert_element_type.default"] * len(results)
    assert operators_of(graph) == ["rampde_fx.widened.default"] * factors + [str(product)] + rounded
    got = graph(*args)
    exact = product(*(x.double() if isinstance(x, torch.Tensor) else x for x in args))
    for result, wanted in zip(*((r if isinstance(r, tuple) else (r,)) for r in (got, exact)), strict=True):
        assert result.dtype is torch.float16 and result.shape == wanted.shape
        assert (result - wanted).abs().max() <= 1.01 * 2.0**-11 * wanted.abs().max()
    graph.graph.lint()


def attend(length, dtype, mask=None):
    """An attention's gradients, by the two operators."""
    shape = (2, 2, length, 8)
    q, k, v, out_grad = (torch.randn(shape, generator=torch.Generator().manual_seed(i)).to(dtype) for i in range(4))

    def gradients(q, k, v, out_grad, *masks):
        mask = masks[0] if masks else None
        out, sums = ATTENTION(q, k, v, attn_mask=mask)
        return out, *ATTENTION_BACKWARD(out_grad, q, k, v, out, sums, 0.0, False, attn_mask=mask)

    return gradients, (q, k, v, out_grad, *([] if mask is None else [mask]))


@pytest.mark.parametrize("mask", [None, torch.linspace(-1, 1, 36).reshape(6, 6).half()], ids=["plain", "mask"])
def test_an_attention_is_one_in_float32(mask):
    """Its sums of exponentials are float32 already."""
    function, args = attend(6, torch.float16, mask)
    graph = lowered(function, args)
    found = operators_of(graph)
    assert found.count("prims.convert_element_type.default") == 4
    assert found.count("rampde_fx.widened.default") == 5 + (
        mask is not None
    )  # the result is a factor of its derivative
    exact = attend(6, torch.float64, None if mask is None else mask.double())[0](*(x.double() for x in args))
    for result, wanted in zip(graph(*args), exact, strict=True):
        assert result.dtype is torch.float16
        assert (result - wanted).abs().max() <= 8 * 2.0**-11 * wanted.abs().max()
    graph.graph.lint()


def faked(dtype, *shapes, device="cpu"):
    with FakeTensorMode():
        return [torch.empty(shape, dtype=dtype, device=device) for shape in shapes]


def is_wide(product, args):
    return "rampde_fx.widened.default" in operators_of(lowered(product, args))


@pytest.mark.parametrize(("length", "stays"), [(181, False), (182, True)])  # 2 x 2 x length x length x 8 x 2
def test_attentions_of_few_multiplications_are_wide_in_every_dtype(length, stays):
    q, k, v, _ = faked(torch.bfloat16, *[(2, 2, length, 8)] * 4)
    assert is_wide(ATTENTION, (q, k, v)) != stays


@pytest.mark.parametrize(
    ("dtype", "length", "has_tiles", "stays"),
    [
        (torch.bfloat16, 512, True, False),  # 512 x 512 x 32 x 2
        (torch.bfloat16, 513, True, True),
        (torch.bfloat16, 513, False, False),
        (torch.float16, 513, True, False),
    ],
)
def test_derivatives_of_attentions_are_wide_unless_matrix_units_take_large_heads(
    monkeypatch, dtype, length, has_tiles, stays
):
    monkeypatch.setattr(kernels, "cpu_multiplies", lambda dtype: True)
    monkeypatch.setattr(kernels, "cpu_has_tiles", lambda: has_tiles)
    monkeypatch.setattr(low_products, "multiplies", lambda: has_tiles)
    q, k, v, out, out_grad = faked(dtype, *[(2, 2, length, 32)] * 5)
    sums = q[..., 0].float()
    assert is_wide(ATTENTION_BACKWARD, (out_grad, q, k, v, out, sums, 0.0, False)) != stays
    assert not is_wide(ATTENTION, (q, k, v))


def test_a_result_that_is_not_asked_for_stays_none():
    *args, _ = CALLS[aten.convolution_backward.default]
    args = (*args, [True, False, True])
    got = lowered(aten.convolution_backward.default, args)(*args)
    assert [result is None for result in got] == [False, True, False]


def test_a_factor_is_widened_once():
    """Its transpose is that of the other."""

    def twice(a, b):
        return aten.mm(aten.mm(a, b), aten.permute(b, [1, 0]))

    graph = lowered(twice, (A, B))
    assert operators_of(graph).count("rampde_fx.widened.default") == 3
    assert (graph(A, B) - twice(A.double(), B.double())).abs().max() < 1e-2


def test_the_cast_is_what_it_says():
    assert torch.equal(cpu_products.WIDENED(A), A.float())
    torch.library.opcheck(cpu_products.WIDENED, (A,), test_utils=("test_schema", "test_faketensor"))


FEWER, ENOUGH = ((128, 128), (128, 128)), ((128, 128), (128, 129))


@pytest.mark.parametrize(
    ("product", "dtype", "shapes", "device", "stays"),
    [
        (aten.mm.default, torch.float32, FEWER, "cpu", True),
        (aten.mm.default, torch.float16, ENOUGH, "meta", True),
        (aten.mm.default, torch.float16, ENOUGH, "cpu", False),  # there is no arithmetic for it
        (aten.mm.default, torch.bfloat16, FEWER, "meta", True),
        (aten.mm.default, torch.bfloat16, FEWER, "cpu", False),
        (aten.mm.default, torch.bfloat16, ENOUGH, "cpu", True),
        (aten.addmm.default, torch.bfloat16, ((128,), *FEWER), "cpu", False),
        (aten.addmm.default, torch.bfloat16, ((129,), *ENOUGH), "cpu", True),
        (aten.bmm.default, torch.bfloat16, ((8, 64, 64), (8, 64, 64)), "cpu", False),
        (aten.bmm.default, torch.bfloat16, ((9, 64, 64), (9, 64, 64)), "cpu", True),
    ],
)
def test_products_of_few_multiplications_are_wide_in_every_dtype(product, dtype, shapes, device, stays):
    found = operators_of(lowered(product, faked(dtype, *shapes, device=device)))
    assert (found == [str(product)]) == stays
    assert str(product) in found


@pytest.mark.parametrize(
    ("product", "shapes", "stays"),
    [
        (aten.mm.default, ((128, 64), (64, 64)), True),
        (aten.mm.default, ((128, 9), (9, 64)), True),
        (aten.mm.default, ((128, 8), (8, 64)), False),  # which is written out
        (aten.mm.default, ((128, 64), (64, 2)), False),
        (aten.addmm.default, ((64,), (128, 64), (64, 64)), True),
        (aten.bmm.default, ((8, 64, 64), (8, 64, 64)), False),
    ],
)
def test_matrix_units_multiply_small_matrices_too(monkeypatch, product, shapes, stays):
    monkeypatch.setattr(kernels, "cpu_has_tiles", lambda: True)
    monkeypatch.setattr(low_products, "multiplies", lambda: True)
    assert (operators_of(lowered(product, faked(torch.bfloat16, *shapes))) == [str(product)]) == stays
    monkeypatch.setattr(low_products, "multiplies", lambda: False)
    assert operators_of(lowered(product, faked(torch.bfloat16, *shapes))) != [str(product)]


def test_small_products_beside_a_convolution_are_wide(monkeypatch):
    """Such a loop calls them from Python."""
    monkeypatch.setattr(kernels, "cpu_has_tiles", lambda: True)
    monkeypatch.setattr(low_products, "multiplies", lambda: True)

    def both(a, b, x, w):
        return aten.mm(a, b), aten.convolution(x, w, None, *CONVOLUTION)

    args = faked(torch.bfloat16, (128, 64), (64, 64), (2, 3, 6, 6), (4, 3, 3, 3))
    found = operators_of(lowered(both, args))
    assert found.count("rampde_fx.widened.default") == 2 and "aten.convolution.default" in found


@pytest.mark.parametrize(("dtype", "stays"), [(torch.float16, False), (torch.bfloat16, True)])
def test_derivatives_of_convolutions_are_wide_in_float16_on_every_cpu(monkeypatch, dtype, stays):
    monkeypatch.setattr(kernels, "cpu_multiplies", lambda dtype: True)
    for product, is_kept in ((aten.convolution_backward.default, stays), (aten.convolution.default, True)):
        args = [x.to(dtype) if isinstance(x, torch.Tensor) else x for x in CALLS[product]]
        graph = lowered(product, args)
        assert ("rampde_fx.widened.default" not in operators_of(graph)) == is_kept
    args = [x.to(dtype) if isinstance(x, torch.Tensor) else x for x in CALLS[aten.convolution_backward.default]]
    graph = lowered(aten.convolution_backward.default, args)
    wide = [x.double() if isinstance(x, torch.Tensor) else x for x in args]
    for got, exact in zip(graph(*args), aten.convolution_backward.default(*wide), strict=True):
        assert got.dtype is dtype
        torch.testing.assert_close(got.double(), exact, rtol=torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps * 16)


def test_small_convolutions_stay():
    args = [x.bfloat16() if isinstance(x, torch.Tensor) else x for x in CALLS[aten.convolution.default]]
    assert operators_of(lowered(aten.convolution.default, args)) == ["aten.convolution.default"]


def test_products_of_any_size_stay():
    a, b = draw(8, 5).bfloat16(), draw(5, 7).bfloat16()
    graph = make_fx(aten.mm.default, tracing_mode="symbolic")(a, b)
    cpu_products.replace_products()(graph.graph)
    assert "rampde_fx.widened.default" not in operators_of(graph)


def test_a_factor_of_a_size_is_none():
    def scaled(c, a, b, sized):
        return aten.addmm(c, a, b, alpha=sized.shape[0])

    args = [draw(*shape).bfloat16() for shape in ((7,), (8, 5), (5, 7), (4, 2))]
    graph = make_fx(scaled, tracing_mode="symbolic")(*args)
    cpu_products.ReplaceProducts((torch.bfloat16,))(graph.graph)
    graph.recompile()
    assert operators_of(graph).count("rampde_fx.widened.default") == 3
    assert (graph(*args) - scaled(*(x.double() for x in args))).abs().max() < 0.3


def test_a_bias_that_is_a_factor_too_is_not_taken_for_the_second():
    x, a = faked(torch.bfloat16, (1, 200), (200, 200))
    found = operators_of(lowered(lambda x, a: aten.addmm(x, x, a), (x, a)))
    assert "prims.convert_element_type.default" in found
    x, a = faked(torch.bfloat16, (1200, 1200), (1200, 1200))
    assert operators_of(lowered(lambda x, a: aten.addmm(x, x, a), (x, a))) == ["aten.addmm.default"]


def test_a_cpu_with_float16_arithmetic_keeps_large_ones(monkeypatch):
    monkeypatch.setattr(kernels, "cpu_multiplies", lambda dtype: True)
    assert operators_of(lowered(aten.mm.default, faked(torch.float16, *ENOUGH))) == ["aten.mm.default"]
    assert len(operators_of(lowered(aten.mm.default, faked(torch.float16, *FEWER)))) == 4


def test_a_cpu_without_bfloat16_arithmetic_keeps_none(monkeypatch):
    """Also where oneDNN would widen the factors itself."""
    monkeypatch.setattr(kernels, "cpu_has_bfloat16", lambda: False)
    assert len(operators_of(lowered(aten.mm.default, faked(torch.bfloat16, *ENOUGH)))) == 4


class Replacing(CustomGraphPass):
    def __call__(self, graph):
        cpu_products.replace_products()(graph)

    def uuid(self):
        return None


@pytest.mark.inductor
@pytest.mark.skipif(torch.__version__ < TorchVersion("2.13"), reason="Inductor leaves them out there")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_inductor_fuses_the_casts_and_rounds_the_factors(dtype):
    """Products by the unit matrix, which are exact: the roundings are all that is left."""

    def layers(x, unit):
        low = (3 * x).to(dtype)  # a factor that is read as it is, too
        first = aten.mm(low, unit.to(dtype))
        again = aten.mm((3 * first.float()).to(dtype), unit.to(dtype))  # of a cast that is written before
        return first.float() + 1, aten.mm(first * first, unit.to(dtype)).float(), again.float(), low

    x, unit = torch.randn(40, 16, generator=torch.Generator().manual_seed(0)), torch.eye(16)
    options = {"post_grad_custom_pre_pass": Replacing()}
    got, codes = run_and_get_code(torch.compile(layers, options=options), x, unit)
    low = (3 * x).to(dtype)
    first = low.float()
    thrice = (3 * first).to(dtype).float()
    for result, wanted in zip(got, (first + 1, (first * first).to(dtype).float(), thrice, low), strict=True):
        assert torch.equal(result, wanted)
    (code,) = codes
    assert code.count("extern_kernels.mm(") == 3
    assert code.count('extern "C"') == 3  # before, between and behind the products


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
    assert "prims.convert_element_type.default" in operators_of(graph) and "aten.mm.default" in users.seen[0]
    assert "of the user's" in lowering.uuid()
    monkeypatch.setattr(kernels, "cpu_multiplies", lambda dtype: True)
    assert cpu_products.replace_products().uuid() not in lowering.uuid()
    users.key = None
    assert lowering.uuid() is None
