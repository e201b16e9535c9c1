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
        (lambda x, w: torch.where(x > 0.5, torch.tanh(x), x), []),
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
        "not with a number",
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


@pytest.mark.inductor
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("of", [softmax, all_but_largest, largest, to_largest])
def test_gradients_through_comparisons(of, dtype):
    torch.manual_seed(0)
    model, y, t = Masked(of), torch.randn(16, 12), torch.linspace(0, 1, 4)
    plain = copy.deepcopy(model)
    got = gradients(compiled(model, dtype, "inductor"), model, y, t)
    errors = relative_errors(got, gradients(plain, plain, y, t))
    assert max(errors) < 16 * torch.finfo(dtype).eps
