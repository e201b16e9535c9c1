"""evaluation_counts: how often the velocity was evaluated, without a counter in Python."""

import pytest
import torch

import rampde_fx
from rampde_fx import EvaluationCount
from tests.comparison import compiled
from tests.models import RK4, Midpoint
from tests.test_scaling import Steep


@pytest.fixture(autouse=True)
def forgotten():
    rampde_fx.evaluation_counts(reset=True)


def run(function, y, t):
    out = function(y, t)
    out.square().mean().backward()
    return list(rampde_fx.evaluation_counts().values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("policy", [{}, {"checkpoint": 3}, {"loop": "unroll"}], ids=str)
def test_fixed_steps(dtype, policy):
    y, function = torch.randn(3, 5), compiled(RK4(), dtype, **policy)
    assert run(function, y, torch.linspace(0, 1, 8)) == [EvaluationCount(forward=28, backward=28)]
    with torch.no_grad():
        compiled(Midpoint(), dtype, **policy)(y, torch.linspace(0, 1, 8))
    assert EvaluationCount(forward=14) in rampde_fx.evaluation_counts().values()


def test_a_pass_that_is_repeated_counts_its_repetitions():
    y, t = (1e-3 * (1 + torch.rand(16, 4))).requires_grad_(), torch.linspace(0, 1e-6, 6)
    (count,) = run(compiled(Steep(), torch.float16), y, t)
    assert count == EvaluationCount(forward=5, backward=10)


def test_adaptive_steps():
    evaluations = [0]

    def velocity(t, y):
        if not torch.compiler.is_compiling():
            evaluations[0] += 1
        return -y * (1 + torch.sin(5 * t))

    def flow(y, t):
        return rampde_fx.odeint(velocity, y, t, method="dopri5", rtol=1e-5, atol=1e-7)[-1]

    y, t = torch.ones(3, requires_grad=True), torch.linspace(0, 2, 2)
    flow(y, t)
    (uncompiled,) = evaluations
    loop, search = run(compiled(flow, torch.float32), y, t)
    assert search.forward == 6 * (search.accepted + search.rejected) and search.accepted > 3
    assert uncompiled == 2 + search.forward  # two more choose the size of the first step
    assert loop == EvaluationCount(forward=0, backward=6 * search.accepted)  # it reads what the search has kept


def test_the_last_run_counts_whatever_its_number_of_steps():
    function, y = compiled(RK4(), torch.bfloat16), torch.randn(3, 5)
    for steps in (4, 9, 4):
        (count,) = {c for c in run(function, y, torch.linspace(0, 1, steps + 1)) if c.forward == 4 * steps}
        assert count == EvaluationCount(forward=4 * steps, backward=4 * steps)
