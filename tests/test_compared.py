"""What is compared is rounded: Inductor would compare it with what it was rounded to."""

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
        (lambda x, w: ((torch.tanh(x) < 1) & (x > 0)).sum(), []),
        (lambda x, w: (torch.tanh(x) < 1).long().t().sum(0), []),
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
        "what is counted stays",
        "what is cast and counted stays",
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


def across_a_product(x):
    return torch.where(x - x @ torch.eye(12).to(x) >= 0, x, 0.1 * x)


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
