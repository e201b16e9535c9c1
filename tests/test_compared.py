"""What decides is rounded: Inductor would compare a number with what it was rounded to."""

import copy

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import rampde_fx
from rampde_fx.emit.compared import ROUNDED, RoundCompared
from tests.comparison import compiled, gradients, relative_errors

aten = torch.ops.aten
X, W = torch.randn(4, 5).bfloat16(), torch.randn(5, 5).bfloat16()


def rounded(function, *args):
    """The operators whose results are rounded where a function is lowered; it computes the same."""
    graph = make_fx(function, tracing_mode="fake")(*args)
    RoundCompared()(graph.graph)
    graph.graph.lint()
    graph.recompile()
    torch.testing.assert_close(graph(*args), function(*args), rtol=0, atol=0)
    nodes = graph.graph.find_nodes(op="call_function", target=ROUNDED)
    assert all(list(node.args[0].users) == [node] for node in nodes)  # nothing reads the other one
    return [node.args[0].target for node in nodes]


@pytest.mark.parametrize(
    ("function", "found"),
    [
        (lambda x, w: torch.tanh(x) == torch.sin(x), [aten.tanh.default, aten.sin.default]),
        (lambda x, w: torch.tanh(x).float() < x.sum(), [aten.tanh.default, aten.sum.default]),
        (lambda x, w: (x + 1).amax(-1), [aten.add.Tensor]),
        (lambda x, w: (x + 1).t().max(0)[1], [aten.add.Tensor]),
        (
            lambda x, w: x - (x - x.amax()) == 0 * x,
            [aten.amax.default, aten.sub.Tensor, aten.sub.Tensor, aten.mul.Tensor],
        ),
        (lambda x, w: (torch.tanh(x) @ w + x).argmax(), [aten.add.Tensor]),
        (lambda x, w: torch.where(torch.tanh(x) < 1, x, 0), [aten.tanh.default]),
        (lambda x, w: (torch.tanh(x) < 1).logical_not(), [aten.tanh.default]),
        (lambda x, w: ((torch.tanh(x) < 1) & (x > 0)).float().t() * x.t(), [aten.tanh.default]),
        (lambda x, w: torch.sin(x) - torch.sin(x) @ w > 0, [aten.sin.default, aten.sub.Tensor]),
        (lambda x, w: ((torch.tanh(x) < 1) & (x > 0)).sum(), [aten.tanh.default]),
        (lambda x, w: torch.where((torch.tanh(x) < 1).any(), x, 0), [aten.tanh.default]),
        (lambda x, w: (torch.tanh(x) < 1).to(x) @ w, [aten.tanh.default]),
        (lambda x, w: torch.tanh(x).bool(), [aten.tanh.default]),
        (lambda x, w: torch.tanh(x).logical_and(x), [aten.tanh.default]),
        (lambda x, w: torch.tanh(x).all(0), [aten.tanh.default]),
        (lambda x, w: torch.tanh(x).long(), [aten.tanh.default]),
        (lambda x, w: torch.bucketize(torch.tanh(x), w[0]), [aten.tanh.default]),
        (lambda x, w: torch.where(x * w[:4] <= 1, (1 - w[:4] * x).sqrt(), 0), [aten.mul.Tensor]),
        (lambda x, w: torch.floor(8 * torch.tanh(x)), [aten.tanh.default, aten.mul.Tensor]),
        (lambda x, w: torch.tanh(x).sign() * x, [aten.tanh.default]),
        (lambda x, w: torch.sin(x) % 0.5, [aten.sin.default]),
        (lambda x, w: torch.div(torch.sin(x), w[0, 0], rounding_mode="floor"), [aten.sin.default]),
        (lambda x, w: torch.tanh(x).new_ones(3, dtype=torch.bool), []),
        (lambda x, w: x.amax(-1), []),
        (lambda x, w: x == x.t().t(), []),
        (lambda x, w: torch.tanh(x.float()).amax(), []),
        (lambda x, w: (torch.tanh(x) @ w).amax(), []),
    ],
    ids=[
        "both operands",
        "casts",
        "reductions",
        "views",
        "what it follows from",
        "not beyond products",
        "a number",
        "an output",
        "a mask of masks",
        "across a product",
        "what is counted",
        "what is decided for all",
        "a mask in a product",
        "a truth value",
        "truth values",
        "truth values of all",
        "an integer",
        "a place among numbers",
        "a product by another name",
        "steps",
        "a sign",
        "a remainder",
        "a rounded quotient",
        "a shape stays",
        "inputs stay",
        "views stay",
        "float32 stays",
        "products stay",
    ],
)
def test_what_is_rounded(function, found):
    assert rounded(function, X, W) == found


class Masked(nn.Module):
    """A velocity in which numbers are compared with others that they are equal to."""

    def __init__(self, of):
        super().__init__()
        self.of, self.layer = of, nn.Linear(12, 12)

    def forward(self, y, t):
        for _, dt in rampde_fx.steps(t):
            y = y + dt * self.of(torch.tanh(y) + self.layer(y))
        return y


def softmax(x):
    """As it is written by hand."""
    e = torch.exp(x - x.amax(-1, keepdim=True))
    return e / e.sum(-1, keepdim=True) + torch.tanh(x)


def all_but_largest(x):
    return torch.where(x < x.detach().amax(-1, keepdim=True), 0.1 * x, x)


def largest(x):
    return torch.tanh(x) + (x == x.amax(-1, keepdim=True)) * 0.5


def to_largest(x):
    return torch.where(x - x.max() == 0 * x, x, 0.3 * x)


def guarded(x):
    """Of a logarithm, by a mask that is kept for the backward beside what it guards."""
    c = torch.tanh(2 * x + 3)
    below = c.abs() < 1
    kept = torch.where(below, c, 0)
    a = kept @ torch.eye(12).roll(1, 0).to(x)
    return 0.03 * torch.where(below, torch.log(1 - kept) * a, a)


def guarded_as_one(x):
    """By what holds of any entry of a row."""
    c = torch.sigmoid(3 * x + 4)
    reaches = (c >= 1).any(-1, keepdim=True)
    kept = torch.where(reaches, 0, c)
    a = kept @ torch.eye(12).roll(1, 0).to(x)
    return 0.03 * torch.where(reaches, a, torch.log(1 - kept) * a)


def guarded_by_another_name(x):
    c, w = torch.tanh(2 * x + 3), torch.linspace(0.9, 1.1, 12).to(x)
    return torch.where(c * w <= 1, torch.sqrt(1 - w * c), 0)


def true(x):
    return x * (1 - torch.sigmoid(3 * x + 4)).bool()


def picked(x):
    return (torch.tanh(2 * x + 3) == 1).to(x) @ torch.eye(12).roll(1, 0).to(x)


def placed(x):
    return x * (torch.bucketize(torch.sigmoid(3 * x + 4), torch.tensor([0.5, 1.0]).to(x), right=True) == 2)


def across_a_product(x):
    return torch.where(x - x @ torch.eye(12).to(x) >= 0, x, 0.1 * x)


def stepped(x):
    return torch.floor(64 * (torch.tanh(x) + torch.sin(x))) / 64 + torch.sign(torch.sin(x) - torch.tanh(x)) * x


@pytest.mark.inductor
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("of", "checkpoint"),
    [
        (softmax, "step"),
        (all_but_largest, "step"),
        (largest, "none"),
        (to_largest, "step"),
        (guarded, "none"),
        (across_a_product, "step"),
        (guarded_as_one, "none"),
        (guarded_by_another_name, "none"),
        (true, "step"),
        (picked, "none"),
        (placed, "step"),
        (stepped, "step"),
    ],
)
def test_gradients_through_comparisons(of, checkpoint, dtype):
    torch.manual_seed(0)
    model, y, t = Masked(of), torch.randn(16, 12), torch.linspace(0, 1, 4)
    plain = copy.deepcopy(model)
    got = gradients(compiled(model, dtype, "inductor", checkpoint=checkpoint), model, y, t)
    torch._dynamo.reset()
    wanted = gradients(compiled(plain, dtype, checkpoint=checkpoint), plain, y, t)
    assert max(relative_errors(got, wanted)) < 8 * torch.finfo(dtype).eps


@pytest.mark.inductor
@pytest.mark.slow
@pytest.mark.parametrize(
    ("of", "dtype", "overflows"),
    [
        (lambda y: torch.tanh(y * 300 * 300), torch.float16, True),
        (lambda y: torch.where(y * 300 * 300 > 1, 1, y), torch.float16, True),
        (lambda y: torch.where(torch.tanh(2 * y + 3) < 1, y, -y), torch.bfloat16, False),
    ],
    ids=["saturates", "is compared", "decides"],
)
def test_a_packaged_program_overflows_and_decides_as_the_model_does(of, dtype, overflows, tmp_path):
    @rampde_fx.mixed_precision(dtype=dtype)
    def solve(y, t):
        for _, dt in rampde_fx.steps(t):
            y = y + dt * of(y)
        return y

    torch.manual_seed(0)
    y, t = torch.randn(16, 12), torch.linspace(0, 1, 4)
    function = torch.compile(solve, backend="rampde_fx", fullgraph=True, options={"compiler": "aot_eager"})
    program = rampde_fx.export(solve, y, t)
    torch.export.save(program, tmp_path / "exported.pt2")
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "program.pt2"))
    loaded = torch.export.load(tmp_path / "exported.pt2").module()
    with torch.no_grad():
        wanted = function(y, t)
        assert wanted.isnan().any() == overflows
        for served in (loaded, torch._inductor.aoti_load_package(package)):
            torch.testing.assert_close(served(y, t), wanted, rtol=0, atol=8 * torch.finfo(dtype).eps, equal_nan=True)
