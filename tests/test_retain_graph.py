"""Two backward passes through one call of a compiled model, as retain_graph=True allows them."""

import pytest
import torch

from tests.comparison import compiled, gradients, relative_errors
from tests.models import RK4, Solved, Velocity


def of(**arguments):
    return lambda: Solved(Velocity(), **arguments)


DOPRI5 = {"method": "dopri5", "rtol": 1e-4, "atol": 1e-4}
LOOPS = {
    "steps": (RK4, {}),
    "segments": (RK4, {"checkpoint": 2}),
    "kept activations": (RK4, {"checkpoint": "none"}),
    "unrolled": (RK4, {"loop": "unroll"}),
    "fixed": (of(), {}),
    "a step size": (of(options={"step_size": 0.3}), {}),
    "adaptive": (of(**DOPRI5), {}),
    "adaptive, segments": (of(**DOPRI5), {"checkpoint": 3}),
    "adaptive, kept activations": (of(**DOPRI5), {"checkpoint": "none"}),
    "adaptive, ends of steps": (of(**{**DOPRI5, "method": "dopri8"}), {}),
}


def twice(run, model, y, t):
    """Gradients of two losses, the second pass adding to the first one's."""
    y = y.clone().requires_grad_()
    model.zero_grad()
    output = run(y, t)
    output.square().mean().backward(retain_graph=True)
    once = [x.grad.clone() for x in (y, *model.parameters()) if x.grad is not None]
    output[..., 0].sum().backward()
    return [*once, *(x.grad for x in (y, *model.parameters()) if x.grad is not None)]


@pytest.mark.parametrize("case", LOOPS)
def test_two_losses_of_one_call(case):
    torch.manual_seed(0)
    make, policy = LOOPS[case]
    model = make().double()
    y, t = torch.randn(3, 5, dtype=torch.float64), torch.linspace(0, 1, 6, dtype=torch.float64)
    run = compiled(model, torch.float64, **policy)
    wanted = twice(model, model, y, t)
    assert len(wanted) > 4
    for _ in range(2):  # the second call finds the backward compiled
        assert max(relative_errors(twice(run, model, y, t), wanted)) < 1e-12
    # And a call whose graph is not retained goes on to be right.
    assert max(relative_errors(gradients(run, model, y, t), gradients(model, model, y, t))) < 1e-10


def test_outside_of_rewritten_loops_the_setting_is_the_users():
    """The stand-in lasts as long as a compilation."""
    setting = torch._functorch.config.donated_buffer
    collect = torch._functorch._aot_autograd.graph_compile.collect_bw_donated_buffer_idxs
    model = Solved(Velocity())
    compiled(model, torch.float32)(torch.randn(3, 5, requires_grad=True), torch.linspace(0, 1, 3)).sum().backward()
    assert torch._functorch.config.donated_buffer == setting
    assert torch._functorch._aot_autograd.graph_compile.collect_bw_donated_buffer_idxs is collect
