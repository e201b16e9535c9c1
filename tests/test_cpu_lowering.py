"""What Inductor is given for a CPU: tanh written out, biases beside products, casts before views; errors in C++."""

import math

import pytest
import torch
from torch import nn
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.utils import run_and_get_code
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import rampde_fx
from rampde_fx.emit import cpu_functions
from rampde_fx.emit.cpu_biases import SplitBiases
from rampde_fx.emit.cpu_casts import MoveCasts
from rampde_fx.emit.cpu_functions import ReplaceTanh, replace_tanh
from rampde_fx.emit.inductor_passes import inductor_passes
from rampde_fx.errors import StepSizeError, TimeGridError
from rampde_fx.torch_private import inductor, kernels
from tests.benchmarks.tanh import fit
from tests.comparison import compiled
from tests.models import Flow

aten = torch.ops.aten
LAST_PLACE = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def lowered(function, *args, by):
    graph = make_fx(function, tracing_mode="fake")(*args)
    by(graph.graph)
    graph.graph.lint()
    graph.recompile()
    return graph


def targets(graph):
    return [node.target for node in graph.graph.nodes if node.op == "call_function"]


def arguments(dtype):
    """Of both signs, from the smallest normal numbers of float16 to beyond what float16 holds."""
    sizes = torch.logspace(-4.2, 4.5, 40_001, dtype=torch.float64)
    return torch.cat([sizes, -sizes]).to(dtype)


class ReplacingTanh(CustomGraphPass):
    def __call__(self, graph):
        replace_tanh()(graph)

    def uuid(self):
        return None


def written(function, *args):
    """What Inductor makes of a function of tanh, and its code."""
    torch._dynamo.reset()
    found, (code,) = run_and_get_code(
        torch.compile(function, options={"post_grad_custom_pre_pass": ReplacingTanh()}), *args
    )
    return found, code


@pytest.mark.inductor
@pytest.mark.parametrize("dtype", LAST_PLACE, ids=str)
def test_tanh_is_accurate_everywhere(dtype):
    x = arguments(dtype)
    got, code = written(torch.tanh, x)
    assert "tanh()" not in code and "std::tanh" not in code
    assert got.dtype is dtype
    wanted = torch.tanh(x.double())
    places = 12 if dtype is torch.float32 else 1.01  # of half a unit
    assert ((got.double() - wanted).abs() <= places * LAST_PLACE[dtype] * wanted.abs()).all()


@pytest.mark.inductor
def test_tanh_of_what_is_special():
    """NaN, zeros of both signs, what is subnormal; in vectors and alone. Never beyond one: 1 - tanh^2 is a derivative,
    and of densities a logarithm is taken of it.
    """
    special = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 1e-38, -1e-40, 9.0, 20.0, 3e38])
    x = torch.cat([special, torch.linspace(3, 12, 200_001), special])
    (got, alone), code = written(lambda x, entry: (torch.tanh(x), torch.tanh(entry)), x, torch.tensor(-0.3))
    assert "fmadd(" in code and "std::fma(" in code
    torch.testing.assert_close(alone, torch.tanh(torch.tensor(-0.3)), rtol=12 * LAST_PLACE[torch.float32], atol=0)
    wanted, known = torch.tanh(x.double()), ~x.isnan()
    wrong = (got.double() - wanted).abs() > 12 * LAST_PLACE[torch.float32] * wanted.abs() + 1e-45
    assert not wrong[known].any() and torch.equal(got.isnan(), ~known)
    assert torch.equal(got[known].signbit(), x[known].signbit())
    assert got[known].max() == 1 and (got[x > 9.02] == 1).all()


@pytest.mark.inductor
@pytest.mark.parametrize("passed_on", [lambda h: h, torch.Tensor.float, torch.Tensor.t], ids=["itself", "cast", "view"])
def test_tanh_in_low_precision_is_computed_once(passed_on):
    def several(x):
        h = passed_on(torch.tanh(x))
        return h.sum(0), h.sum(1), h * 2

    x = torch.randn(64, 64).bfloat16()
    found, code = written(several, x)
    assert code.count("9.01)") == 2  # both bounds, once
    torch.testing.assert_close(found, several(x), rtol=2e-2, atol=0.2)


def test_the_coefficients_are_those_of_the_fit():
    found, numerator, denominator = fit()
    assert found < 2.2e-8
    for ours, fitted in ((cpu_functions.NUMERATOR, numerator), (cpu_functions.DENOMINATOR, denominator)):
        assert all(math.isclose(a, b, rel_tol=1e-5) for a, b in zip(ours, fitted, strict=True))


@pytest.mark.parametrize(("dtype", "device"), [("float64", "cpu"), ("float32", "meta"), ("complex64", "cpu")])
def test_other_tanh_stays(dtype, device):
    with FakeTensorMode():
        x = torch.empty(3, dtype=getattr(torch, dtype), device=device)
    assert targets(lowered(torch.tanh, x, by=ReplaceTanh())) == [aten.tanh.default]


@pytest.mark.inductor
@pytest.mark.parametrize("wide", [torch.float32, torch.float64], ids=str)
def test_overflows_are_marked_where_inductor_leaves_the_rounding_out(wide):
    """As eagerly, where each is rounded: in one kernel, in vectors and alone; the user's infinities stay."""
    inductor_passes()
    narrow, mark = torch.ops.rampde_fx.narrow, torch.ops.rampde_fx.mark_overflow

    def marked(x, offset, entry):
        low, added = narrow(x, dtype=torch.float16), narrow(offset, dtype=torch.float16)
        total = mark(low + added, [low, added])
        doubled = mark(total + total, [])
        return low, total, total.float(), torch.clamp(doubled, max=1.0).float(), narrow(entry, dtype=torch.float16)

    sizes = torch.tensor([0.0, 1.0, 3e4, 6e4, 65504.0, 65520.0, 1e5, 3e38, math.inf, math.nan], dtype=wide)
    x = torch.cat([sizes, -sizes]).repeat(5)
    for offset, edge in ((torch.tensor(5e3), 65520.0), (torch.tensor(-math.inf), -65520.0), (x.flip(0), 65519.99)):
        args = x, offset.to(wide), torch.tensor(edge, dtype=wide)
        found, code = written(marked, *args)
        assert code.count('extern "C"') == 1 and "ops.rampde_fx" not in code
        for got, wanted in zip(found, marked(*args), strict=True):
            assert got.dtype is wanted.dtype
            torch.testing.assert_close(got, wanted, rtol=2.0**-10, atol=0, equal_nan=True)


def low(x):
    return torch.ops.rampde_fx.narrow(x, dtype=torch.float16)


CAST = torch.ops.rampde_fx.narrow.default
STRIDED = {
    "whole": torch.randn(2, 3, 4),
    "part": torch.randn(2, 3, 9)[..., :4],
    "turned": torch.randn(3, 4, 2).permute(2, 0, 1),
    "expanded": torch.randn(2, 1, 4).expand(2, 3, 4),
}


@pytest.mark.parametrize("x", STRIDED.values(), ids=STRIDED)
@pytest.mark.parametrize("turned", [False, True])
def test_the_cast_of_a_factor_stands_in_front_of_a_view(x, turned):
    """Whether or not something else reads the view."""
    w = torch.randn(4, 5).half()

    def product(x, w):
        seen = x.sin().reshape(6, 4)
        return w.permute(1, 0) @ low(seen).permute(1, 0) if turned else low(seen) @ w

    graph = lowered(product, x, w, by=MoveCasts())
    found = targets(graph)
    if aten.view.default in found:
        assert found.index(aten.view.default) == found.index(CAST) + 1
    else:  # a copy, of which Inductor makes a view of a clone
        assert x is STRIDED["turned"] and aten._unsafe_view.default in found
    assert torch.equal(graph(x, w), product(x, w))

    def read_twice(x, w):
        seen = x.sin().reshape(2, 3, 2, 2).reshape(-1, 4)
        return low(seen) @ w, seen.cos()

    def cast_again(x, w):
        factor = low(x.sin().reshape(6, 4))
        return factor @ w, torch.ops.prims.convert_element_type(factor, torch.float32).permute(1, 0) @ x.new_ones(6, 2)

    for function in (read_twice, cast_again):
        for got, wanted in zip(lowered(function, x, w, by=MoveCasts())(x, w), function(x, w), strict=True):
            assert torch.equal(got, wanted)
    found = targets(lowered(cast_again, x, w, by=MoveCasts()))
    again = found.index(torch.ops.prims.convert_element_type.default)
    assert found[again + 1] is aten.view.default or x is STRIDED["turned"]


STAYING = {
    "another view": lambda x, w: low(x.sin()[0]) @ w,
    "what a product makes": lambda x, w: low((x @ x.mT).reshape(-1, 3)) @ w[:3],
    "what entries are computed of": lambda x, w: low(x.sin().reshape(6, 4)).cos(),
    "what a convolution reads": lambda x, w: torch.conv1d(low(x.sin().reshape(3, 2, 4)), w[None, :2, :3]),
}


@pytest.mark.parametrize("function", STAYING.values(), ids=STAYING)
def test_any_other_cast_stays(function):
    operands = torch.randn(2, 3, 4), torch.randn(4, 5).half()
    before = targets(lowered(function, *operands, by=lambda graph: None))
    assert CAST in before and targets(lowered(function, *operands, by=MoveCasts())) == before


def test_a_cast_on_another_device_stays():
    with FakeTensorMode():
        x, w = torch.empty(2, 3, 4, device="meta"), torch.empty(4, 5, dtype=torch.float16, device="meta")
    found = targets(lowered(lambda x, w: low(x.sin().reshape(6, 4)) @ w, x, w, by=MoveCasts()))
    assert found == [aten.sin.default, aten.view.default, CAST, aten.mm.default]


@pytest.mark.inductor
def test_a_product_of_rows_is_written_without_places_of_entries(monkeypatch):
    """By vectors, where each entry would be found by two divisions; a product that is widened has such a view, too."""
    monkeypatch.setattr(kernels, "cpu_multiplies", lambda dtype: False)

    class Rows(Flow):
        def forward(self, y, t):
            for _, dt in rampde_fx.steps(t):
                y = y + dt * (torch.sin(y[:, None] * self.rows).reshape(-1, 5) @ self.weight).reshape(-1, 8, 5).mean(1)
            return y

    model = Rows()
    model.rows, model.weight = nn.Parameter(torch.randn(8, 5)), nn.Parameter(torch.randn(5, 5) / 2)
    y, t = torch.randn(64, 5), torch.linspace(0, 1, 4)
    found, (code,) = run_and_get_code(compiled(model, torch.float16, "inductor"), y, t)
    assert "div_floor_integer" not in code
    torch.testing.assert_close(found, model(y, t), rtol=2e-2, atol=2e-3)


BIAS, X, W = torch.randn(7), torch.randn(3, 5), torch.randn(5, 7)


def test_a_bias_that_elementwise_operations_read_is_taken_out():
    graph = lowered(lambda b, x, w: torch.sin(torch.addmm(b, x, w)), BIAS, X, W, by=SplitBiases())
    assert targets(graph) == [aten.mm.default, aten.add.Tensor, aten.sin.default]
    torch.testing.assert_close(graph(BIAS, X, W), torch.sin(torch.addmm(BIAS, X, W)))


def scaled(b, x, w):
    return torch.sin(torch.addmm(b, x, w, beta=0.5))


@pytest.mark.parametrize(
    ("function", "dtype"),
    [
        (torch.addmm, torch.float32),
        (lambda b, x, w: torch.addmm(b, x, w).sum(0), torch.float32),
        (lambda b, x, w: torch.sin(torch.addmm(b, x, w)), torch.bfloat16),
        (scaled, torch.float32),
    ],
    ids=["an output", "a sum", "low", "scaled"],
)
def test_other_biases_stay(function, dtype):
    graph = lowered(function, *(x.to(dtype) for x in (BIAS, X, W)), by=SplitBiases())
    assert aten.addmm.default in targets(graph) and aten.mm.default not in targets(graph)


@pytest.mark.inductor
@pytest.mark.slow
def test_inductor_compiles_tanh_as_it_is_written_out():
    """In the dtypes of velocities, with what is special; a plain cast stands beside it."""

    @rampde_fx.mixed_precision(dtype=torch.bfloat16)
    def step(y, t):
        for _, dt in rampde_fx.steps(t):
            y = y + dt * torch.tanh(y)
        return y

    y = torch.tensor([0.0, 1e-3, -2.0, math.inf, -math.inf, math.nan, 50.0], requires_grad=True)
    t = torch.tensor([0.0, 0.5])
    got = torch.compile(step, backend="rampde_fx", fullgraph=True)(y, t)
    torch.testing.assert_close(got, step(y, t), rtol=4e-3, atol=0, equal_nan=True)
    slope = torch.autograd.grad(got[:3].sum(), y)[0][:3]
    torch.testing.assert_close(slope, 1 + 0.5 * (1 - torch.tanh(y.detach()[:3]) ** 2), rtol=4e-3, atol=0)


@pytest.mark.inductor
@pytest.mark.slow
@pytest.mark.skipif(not inductor.cpp_wrapper_calls_loops(), reason="this torch does not write loops in C++")
def test_errors_of_ours_keep_their_types_in_cpp():
    velocity = torch.nn.Linear(3, 3)

    @rampde_fx.mixed_precision(dtype=torch.float32)
    def solve(y, t):
        options = {"max_steps": 3}
        return rampde_fx.odeint(lambda _, y: 50 * velocity(y), y, t, method="bosh3", rtol=1e-6, options=options)

    compiled = torch.compile(solve, backend="rampde_fx", options={"cpp_wrapper": True}, fullgraph=True)
    y = torch.randn(4, 3)
    with pytest.raises(StepSizeError, match="with 3 steps"):
        compiled(y, torch.tensor([0.0, 0.5, 1.0]))
    with pytest.raises(TimeGridError, match=r"t = \[0, 2, 1\] is not strictly monotone"):
        compiled(y, torch.tensor([0.0, 2.0, 1.0]))


@pytest.mark.parametrize(
    "threads, asked, taken", [(1, 512, 8192), (2, 512, 4096), (32, 512, 512), (2, 64, 64), (2, 9000, 9000)]
)
def test_threads_share_a_kernel_from_some_size_on_unless_inductor_is_asked_for_another(
    threads, asked, taken, monkeypatch
):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert inductor.shared_by_thread(asked) == taken
