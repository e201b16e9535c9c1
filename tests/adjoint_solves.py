"""A velocity that counts, solves of it by each method, and the gradients of a solve beside those of another."""

import torch
from torch import nn

from rampde_fx.torchdiffeq import odeint, odeint_adjoint
from rampde_fx.torchdiffeq.options import ADAMS, ADAPTIVE, FIXED

DOUBLE = torch.float64
METHODS = (*ADAPTIVE, *FIXED, *ADAMS[:2])


def double(*numbers):
    return torch.tensor(numbers, dtype=DOUBLE)


class Net(nn.Module):
    """A velocity with parameters that counts its evaluations and notes their times."""

    def __init__(self, width=8, dtype=DOUBLE):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first, self.last = nn.Linear(2, width).to(dtype), nn.Linear(width, 2).to(dtype)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.rand(parameter.shape, generator=generator) - 0.5)
        self.nfe, self.times = 0, []

    def forward(self, t, y):
        self.nfe += 1
        self.times.append(t.item())
        return self.last(torch.tanh(self.first(y))) * torch.cos(t)


class Normed(Net):
    """Running statistics change in place at each evaluation; in training no value depends on them."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(2).double()

    def forward(self, t, y):
        return super().forward(t, self.norm(y))


def options_of(method):
    """Few steps, of a kind that the method takes."""
    if method in ADAPTIVE:
        return {"rtol": 1e-3, "atol": 1e-4, "method": method}
    options = {"max_iters": 30} if method == "implicit_adams" else {}
    return {"rtol": 1e-9, "atol": 1e-9, "method": method, "options": {"step_size": 0.13, **options}}


def times(end=1.0, points=4):
    return torch.linspace(0, end, points, dtype=DOUBLE)


def gradients(solve, func, y0, t, others=(), **given):
    """Of a loss by the state, the times, the parameters and others."""
    y0 = tuple(leaf.detach().clone().requires_grad_() for leaf in y0) if isinstance(y0, tuple) else y0
    leaves = y0 if isinstance(y0, tuple) else (y0 := y0.detach().clone().requires_grad_(),)
    t = t.detach().clone().requires_grad_()
    found = solve(func, y0, t, **given)
    parts = found if isinstance(found, tuple) else (found,)
    loss = sum((part.abs().square().reshape(len(t), -1).sum(1) * torch.arange(1, len(t) + 1)).sum() for part in parts)
    parameters = list(func.parameters()) if isinstance(func, nn.Module) else []
    return [*parts, *torch.autograd.grad(loss, (*leaves, t, *parameters, *others))]


def adjoint(func, *args, **given):
    more = {} if isinstance(func, nn.Module) else {"adjoint_params": ()}
    return odeint_adjoint(func, *args, **more, **given)


def assert_as_odeint(func, y0, t, others=(), **given):
    """The same steps, and the same gradients but for the order of sums."""
    torch.manual_seed(1)
    wanted = gradients(odeint, func, y0, t, others, **given)
    torch.manual_seed(1)
    found = gradients(adjoint, func, y0, t, others, **given)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12 if a.dtype in (DOUBLE, torch.complex128) else 1e-5, atol=1e-13)
    return wanted
