"""Collective operations in a step: refused where the adjoint is scaled, right where it is not."""

import pytest
import torch
import torch.distributed
from torch.distributed._functional_collectives import all_reduce

import rampde_fx
from rampde_fx.errors import UnsupportedVelocityError
from tests.comparison import compiled
from tests.processes import run_in_processes


def coupled(y, w, t):
    """Every process reads the mean of all."""
    for _, dt in rampde_fx.steps(t):
        h = torch.tanh(y @ w)
        y = y + dt * (h * all_reduce(h.mean(0), "sum", torch.distributed.group.WORLD))
    return y


def gradient(function, rank, dtype):
    w = torch.eye(4, dtype=dtype).add(0.1).requires_grad_()
    y = torch.linspace(0, 9, 64, dtype=dtype).sin().view(16, 4) / (1 + 3 * rank)
    return torch.autograd.grad(function(y, w, torch.linspace(0, 1, 4, dtype=dtype)).square().sum(), w)[0]


def work(rank, folder, count):
    wanted = gradient(coupled, rank, torch.float64)
    with pytest.raises(UnsupportedVelocityError, match="all_reduce") as caught:
        gradient(compiled(coupled, torch.float16), rank, torch.float32)
    assert "test_collectives.py" in caught.value.where and "bfloat16" in caught.value.fix
    errors = [
        (gradient(compiled(coupled, dtype, **policy), rank, torch.float32) - wanted).norm() / wanted.norm()
        for dtype, policy in ((torch.bfloat16, {}), (torch.float16, {"scaling": "none"}), (torch.float32, {}))
    ]
    assert errors[0] <= 2e-2 and errors[1] <= 2e-3 and errors[2] <= 1e-5, errors


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")
def test_two_processes(tmp_path):
    run_in_processes(work, tmp_path, 2)
