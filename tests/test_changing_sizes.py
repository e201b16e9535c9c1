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
