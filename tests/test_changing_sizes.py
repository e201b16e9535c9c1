"""Batch sizes that change from call to call: what a velocity computes of the sizes of its own values."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional

import rampde_fx
from tests.comparison import compiled, relative_errors

VELOCITIES = {
    "batch norm": lambda net, h: torch.tanh(net.norm(torch.sin(h))),
    "standard deviation": lambda net, h: torch.tanh(h / h.std(0, keepdim=True)),
    "number of entries": lambda net, h: torch.tanh(h) * h.norm() / h.numel() ** 0.5,
    "of a longer tensor": lambda net, h: torch.tanh(torch.cat([h, torch.sin(h), h[:1]]).std(0)) * h,
    "length": lambda net, h: torch.tanh(h * len(h) ** -0.5),
    "logarithm": lambda net, h: torch.tanh(h) * math.log(h.shape[0] + 1),
    "attention": lambda net, h: torch.softmax(h @ h.T / math.sqrt(len(h)), -1) @ h,
    "scale": lambda net, h: functional.scaled_dot_product_attention(*3 * [h[None]], scale=1 / len(h))[0],
    "slope": lambda net, h: functional.leaky_relu(h, 1 / len(h)),
}

# Of an even number of columns, which changes; torch's own kernels in C++ take numbers alone.
RESAMPLED = {
    "nearest": lambda h: functional.interpolate(functional.avg_pool1d(h[:, None], 2), size=h.shape[1])[:, 0],
    "linear": lambda h: functional.interpolate(
        functional.avg_pool1d(h[:, None], 2), size=h.shape[1], mode="linear", align_corners=True
    )[:, 0],
    "bilinear": lambda h: functional.interpolate(
        h[:, None, None, ::2].expand(-1, -1, 4, -1), size=(8, h.shape[1]), mode="bilinear"
    )[:, 0, 0],
    "pooled": lambda h: functional.adaptive_avg_pool1d(h[:, None], h.shape[1] // 2).repeat_interleave(2, -1)[:, 0],
}

# Of even numbers of rows alone: a sum then says that two sizes which are written differently are one.
OF_EVEN_SIZES = {
    "every other row twice": lambda net, h: torch.tanh(h[::2]).repeat_interleave(2, 0),
    "pairs of rows": lambda net, h: torch.stack([torch.tanh(h[::2]), torch.sin(h[1::2])], 1).reshape(h.shape),
    "halves": lambda net, h: torch.cat([torch.tanh(h[len(h) // 2 :]), torch.sin(h[: len(h) // 2])]),
}


class Block(nn.Module):
    def __init__(self, velocity, solves):
        super().__init__()
        self.layer, self.norm, self.velocity, self.solves = nn.Linear(3, 3), nn.BatchNorm1d(3), velocity, solves

    def rate(self, t, y):
        return self.velocity(self, self.layer(y))

    def forward(self, y, t):
        if self.solves:
            return rampde_fx.odeint(self.rate, y, t, method="euler")[-1]
        for t_i, dt in rampde_fx.steps(t):
            y = y + dt * self.rate(t_i, y)
        return y


@pytest.mark.parametrize(
    "velocity, solves",
    [*((name, False) for name in VELOCITIES | OF_EVEN_SIZES), ("batch norm", True), ("slope", True)],
)
def test_numbers_of_sizes(velocity, solves):
    torch.manual_seed(0)
    model = Block((VELOCITIES | OF_EVEN_SIZES)[velocity], solves)
    exact = copy.deepcopy(model).double()
    function = compiled(model, torch.float16)
    for batch in (4, 6, 10 if velocity in OF_EVEN_SIZES else 9):
        y, t, weights = torch.randn(batch, 3), torch.linspace(0, 1, 5), torch.tensor([1.0, -1.0, 2.0])
        found = {}
        for run, owner, dtype in ((function, model, torch.float32), (exact, exact, torch.float64)):
            owner.zero_grad()
            (run(y.to(dtype), t.to(dtype)) * weights.to(dtype)).square().sum().backward()
            found[dtype] = [p.grad.float() for p in owner.layer.parameters()]
        buffers = [[b.float() for b in owner.buffers()] for owner in (model, exact)]
        assert max(relative_errors(found[torch.float32], found[torch.float64])) < 1e-2
        assert max(relative_errors(*buffers)) < 2e-3


TAKEN = {
    "every other row": lambda y: y[::2],
    "a half": lambda y: y[: len(y) // 2],
    "a chunk": lambda y: y.chunk(2)[0],
    "all but one": lambda y: y[1:],
    "twice": lambda y: torch.cat([y, y]),
    "rows of pairs": lambda y: y.reshape(-1, 2, 3).flatten(0, 1),
}


@pytest.mark.parametrize(
    "taken, velocity", [*((name, "batch norm") for name in TAKEN), ("every other row", "logarithm")]
)
def test_a_state_whose_size_is_computed_from_the_batchs(taken, velocity):
    """No symbol of a size is one of the step's own: each is a quotient, a sum, or a multiple."""
    torch.manual_seed(0)
    block = Block(VELOCITIES[velocity], solves=False)
    exact = copy.deepcopy(block).double()

    def flow(y, t):
        return block(TAKEN[taken](y), t)

    function, plain = compiled(flow, torch.float16), compiled(block, torch.float16)
    for batch in (8, 6, 10):
        y, t, found = torch.randn(batch, 3), torch.linspace(0, 1, 5), []
        for run, given in ((function, y), (plain, TAKEN[taken](y))):
            block.zero_grad()
            value = run(given, t)
            value.square().sum().backward()
            found.append([value.detach(), *(p.grad.clone() for p in block.layer.parameters())])
        assert max(relative_errors(*found)) < 1e-6
        assert max(relative_errors([value.detach()], [exact(TAKEN[taken](y.double()), t.double()).float()])) < 2e-3


@pytest.mark.parametrize("how", RESAMPLED)
def test_a_state_is_resampled_to_a_size_that_changes(how):
    def flow(y, t):
        for _, dt in rampde_fx.steps(t):
            y = y + dt * torch.tanh(RESAMPLED[how](y))
        return y

    function = compiled(flow, torch.float32)
    for columns in (8, 12):
        y, t, found = torch.randn(4, columns), torch.linspace(0, 1, 5), []
        for run in (function, flow):
            start = y.clone().requires_grad_()
            value = run(start, t)
            value.square().sum().backward()
            found.append([value.detach(), start.grad])
        assert max(relative_errors(*found)) < 1e-6
