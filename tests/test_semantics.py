"""What Python around and inside the loop means: gradients that stop, tensors with two names, states under any update.

Each case was once a wrong number, a loss of precision in silence, or a crash.
"""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import rampde_fx
from rampde_fx import errors
from rampde_fx.ir.tracing import MAX_CONSTANT
from tests.comparison import compiled, gradients, relative_errors
from tests.models import Flow, Velocity

steps = rampde_fx.steps


def detached_state(f, y, t):
    for t_i, dt in steps(t):
        y = y.detach() + dt * f(t_i, y)
    return y


def detached_argument(f, y, t):
    for t_i, dt in steps(t):
        y = y + dt * f(t_i, y.detach())
    return y


def straight_through(f, y, t):
    for t_i, dt in steps(t):
        k = f(t_i, y)
        y = y + dt * (k + (torch.sign(k) - k).detach())
    return y


def part_without_gradients(f, y, t):
    for t_i, dt in steps(t):
        with torch.no_grad():
            size = f(t_i, y).abs().mean()
        y = y + dt * f(t_i, y) / (1 + size)
    return y


def written_through_a_view(f, y, t):
    u = torch.cat([y, y], 1)
    v = u[:, :5]
    for t_i, dt in steps(t):
        v += dt * f(t_i, v)
    return u


def indexed_after_a_write_through_a_view(f, y, t):
    c = torch.linspace(0, 1, 40).reshape(8, 5).clone()
    for i, (t_i, dt) in enumerate(steps(t)):
        row = c[2]
        row.mul_(0.5)
        y = y + dt * f(t_i, y) + 0.3 * c[i + 1]
    return y


def first_iteration_without_a_velocity(f, y, t):
    for i, (t_i, dt) in enumerate(steps(t)):
        if i == 0:
            y = y * 0.5
            continue
        y = y + dt * f(t_i, y)
    return y


def fixed_step(f, y, t):
    for _ in steps(t):
        y = y + 0.1 * f(torch.zeros(()), y)
    return y


def grid_read_inside(f, y, t):
    for i, (t_i, dt) in enumerate(steps(t)):
        y = y + dt * (f(t[-1] - t_i, y) * t[i] + t.sum() * 0.1)
    return y


def split_and_joined(f, y, t):
    u = torch.cat([y, 2 * y], 1)
    for t_i, dt in steps(t):
        a, b = u.split(5, 1)
        a = a + dt * f(t_i, b)
        b = b - dt * f(t_i, a)
        u = torch.cat([a, b], 1)
    return u


def transposed(f, y, t):
    for t_i, dt in steps(t):
        k = f(t_i, y.reshape(4, 2, 5).transpose(0, 1).reshape(8, 5))
        y = y + dt * k.reshape(2, 4, 5).permute(1, 0, 2).reshape(8, 5)
    return y


def tableau_made_inside(f, y, t):
    for t_i, dt in steps(t):
        k = [f(t_i, y)]
        for c in (0.5, 0.5, 1.0):
            k.append(f(t_i + c * dt, y + c * dt * k[-1]))
        y = y + dt * torch.tensordot(torch.tensor([1 / 6, 1 / 3, 1 / 3, 1 / 6]), torch.stack(k), 1)
    return y


def collected_then_updated(f, y, t):
    collected = []
    for t_i, dt in steps(t):
        y = y + dt * f(t_i, y)
        collected.append(y)
    collected[0] += 1
    return collected


def written_into_a_buffer(f, y, t):
    trajectory = torch.zeros(t.shape[0], *y.shape)
    trajectory[0] = y
    for i, (t_i, dt) in enumerate(steps(t)):
        y = y + dt * f(t_i, y)
        trajectory[i + 1] = y
    return trajectory


def growing_history(f, y, t):
    history = [y]
    for t_i, dt in steps(t):
        y = y + dt * f(t_i, torch.stack(history).mean(0))
        history.append(y)
    return y


def masked(f, y, t):
    mask = torch.zeros(y.shape[0], 5, dtype=torch.bool)
    mask[:, 0] = True
    for t_i, dt in steps(t):
        y = y + dt * torch.softmax(f(t_i, y).masked_fill(mask, -1e9), 1)
    return y


def attention_without_dropout(f, y, t):
    for t_i, dt in steps(t):
        q = f(t_i, y)[:, None, :, None]
        y = y + dt * nn.functional.scaled_dot_product_attention(q, q, q)[:, 0, :, 0]
    return y


def counter(f, y, t):
    n = torch.zeros((), dtype=torch.int64)
    for t_i, dt in steps(t):
        y = y + dt * f(t_i, y) * (1 + n)
        n = n + 1
    return y


def checkpointed_velocity(f, y, t):
    for t_i, dt in steps(t):
        y = y + dt * checkpoint(f, t_i, y, use_reentrant=False)
    return y


def checkpointed_loop(f, y, t):
    def flow(y):
        for t_i, dt in steps(t):
            y = y + dt * f(t_i, y)
        return y

    return checkpoint(flow, y, use_reentrant=False)


def checkpointed_twice(f, y, t):
    for _ in range(2):
        y = checkpointed_loop(f, torch.relu(y), t)
    return y


def checkpointed_in_a_checkpoint(f, y, t):
    return checkpoint(lambda y: torch.sin(checkpointed_loop(f, y, t)), y, use_reentrant=False)


def rectified(f, y, t):
    for t_i, dt in steps(t):
        y = torch.relu(y + dt * f(t_i, y))
    return y


def clamped(f, y, t):
    for t_i, dt in steps(t):
        y = (y + dt * f(t_i, y)).clamp(-5000, 5000)
    return y


def flipped(f, y, t):
    for t_i, dt in steps(t):
        y = (y + dt * f(t_i, y)).flip(1)
    return y


def propagated(f, y, t):
    rotation = torch.linalg.matrix_exp(torch.triu(torch.ones(5, 5), 1) - torch.tril(torch.ones(5, 5), -1))
    for t_i, dt in steps(t):
        y = y @ rotation + dt * f(t_i, y)
    return y


def in_place_with_unequal_iterations(f, y, t):
    y, collected = y.clone(), []
    first = y
    for i, (t_i, dt) in enumerate(steps(t)):
        k = f(t_i, y)
        y += dt * (torch.sin(k) if i % 2 else k)
        collected.append(y)
    return torch.stack(collected), first * 2


def added_by_index(f, y, t):
    index = torch.arange(5)
    for t_i, dt in steps(t):
        y = torch.index_add(y, 1, index, dt * f(t_i, y))
    return y


STATES = [rectified, clamped, flipped, propagated, added_by_index]
CASES = [
    detached_state, detached_argument, straight_through, part_without_gradients, written_through_a_view,
    indexed_after_a_write_through_a_view, first_iteration_without_a_velocity, fixed_step, grid_read_inside,
    split_and_joined, transposed, tableau_made_inside, collected_then_updated, written_into_a_buffer, growing_history,
    masked, attention_without_dropout, counter, checkpointed_velocity, in_place_with_unequal_iterations,
    checkpointed_loop, checkpointed_twice, checkpointed_in_a_checkpoint, *STATES,
]  # fmt: skip


class Case(Flow):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, y, t):
        return self.function(self.velocity, y, t)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("function", CASES, ids=lambda function: function.__name__)
def test_agrees_with_eager(function):
    """With an fp32 policy to rounding, gradients included; with fp16 every evaluation is low."""
    model = Case(function)
    reference = copy.deepcopy(model)
    y, t = torch.randn(8, 5), torch.linspace(0, 1, 4)
    errors = relative_errors(
        gradients(compiled(model, torch.float32), model, y, t), gradients(reference, reference, y, t)
    )
    assert max(errors) < 1e-6, errors
    report = rampde_fx.explain(rampde_fx.mixed_precision(reference, dtype=torch.float16), y, t)
    assert sum(loop.evaluations for loop in report.loops) > 0
    for loop in report.loops:
        products = [
            n for n in loop.step.graph.nodes if n.target in (torch.ops.aten.addmm.default, torch.ops.aten.bmm.default)
        ]
        assert not products, "a matrix product of the velocity stayed wide"


@pytest.mark.parametrize("function", STATES, ids=lambda function: function.__name__)
def test_small_increments_of_a_large_state_are_kept(function):
    """y = 1000, increments far below its rounding in fp16: y(T) - y(0) must still be right."""
    model = Case(function)
    y, t = torch.full((8, 5), 1000.0), torch.linspace(0, 1, 33)
    wanted, got = model(y, t), compiled(model, torch.float16)(y, t)
    unforced = Case(function)
    nn.init.zeros_(unforced.velocity.linear[-1].weight)
    nn.init.zeros_(unforced.velocity.linear[-1].bias)
    change = wanted - unforced(y, t)
    assert ((got - wanted).norm() / change.norm()).item() < 2e-2


def leave_gradients_off(f, y, t):
    for t_i, dt in steps(t):
        y = y + dt * f(t_i, y)
        torch.set_grad_enabled(False)
    torch.set_grad_enabled(True)
    return y


def read_by_a_view(f, y, t):
    u = y.clone()
    w = u.view(8, 5)
    for t_i, dt in steps(t):
        u.add_(dt * f(t_i, w))
    return u


def collected_views(f, y, t):
    y, collected = y.clone(), []
    for t_i, dt in steps(t):
        y.add_(dt * f(t_i, y))
        collected.append(y[:, 0])
    return torch.stack(collected)


def changed_grid(f, y, t):
    t = t.clone()
    for t_i, dt in steps(t):
        y = y + dt * f(t_i, y)
        t.mul_(1.1)
    return y


def autocast_inside(f, y, t):
    for t_i, dt in steps(t):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            k = f(t_i, y)
        y = y + dt * k
    return y


def loop_in_a_branch(f, y, t):
    def flow(y):
        for t_i, dt in steps(t):
            y = y + dt * f(t_i, y)
        return y

    return torch.cond(y.sum() > 0, flow, torch.clone, (y,))


def loop_checkpointed_inside_a_loop(f, y, t):
    for _, dt in steps(t):
        y = y + dt * checkpointed_loop(f, y, t)
    return y


def large_constant(f, y, t):
    for t_i, dt in steps(t):
        y = y + dt * f(t_i, y) + torch.tensor([[0.1] * 5] * 16)[: y.shape[0]]
    return y


class Own(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, g):
        return 7 * g


def own_derivative(f, y, t):
    for t_i, dt in steps(t):
        y = y + dt * Own.apply(f(t_i, y))
    return y


@pytest.mark.parametrize(
    ("function", "kind"),
    [
        (leave_gradients_off, errors.UnsupportedLoopError),
        (read_by_a_view, errors.MutationError),
        (collected_views, errors.MutationError),
        (changed_grid, errors.MutationError),
        (autocast_inside, errors.UnsupportedLoopError),
        (loop_in_a_branch, errors.UnsupportedLoopError),
        (loop_checkpointed_inside_a_loop, errors.UnsupportedLoopError),
        (large_constant, errors.UnsupportedLoopError),
        (own_derivative, errors.UnsupportedLoopError),
    ],
    ids=lambda value: value.__name__,
)
def test_is_refused(function, kind):
    assert MAX_CONSTANT < 16 * 5
    with pytest.raises(kind, match="fix:"):
        compiled(Case(function), torch.float16)(torch.randn(8, 5), torch.linspace(0, 1, 4))


def test_a_state_that_overflows_where_it_is_stored_is_loud():
    """fp16 stores 7e4 as inf, and a saturating velocity would hide it."""

    class Saturating(Flow):
        def forward(self, y, t):
            for _, dt in steps(t):
                y = y + dt * torch.tanh(self.velocity.linear[1](torch.tanh(y * 1e-5)))
            return y

    model = Saturating(dim=7)
    y, t = torch.randn(8, 7), torch.linspace(0, 1, 4)
    assert all(g.isfinite().all() for g in gradients(compiled(model, torch.float16), model, y, t))
    y[0] = 7e4
    assert not any(g.isfinite().any() for g in gradients(compiled(model, torch.float16), model, y, t)[5:])
    torch._dynamo.reset()
    wide = compiled(Saturating(dim=7), torch.bfloat16)
    assert wide(y, t).isfinite().all()


def test_a_graph_break_in_the_loop_is_said():
    velocity = Velocity()

    @rampde_fx.mixed_precision(dtype=torch.float16)
    def flow(y, t):
        for t_i, dt in steps(t):
            y = y + dt * velocity(t_i, y)
            torch._dynamo.graph_break()
        return y

    function = torch.compile(flow, backend="rampde_fx", options={"compiler": "aot_eager"})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function(torch.randn(8, 5), torch.linspace(0, 1, 4))
    assert any(
        "graph break" in str(warning.message) and "mixed precision" in str(warning.message) for warning in caught
    )


class TimeFirst(nn.Module):
    """Times as first operands: torch rounds a 0-d first operand to the dtype of the other one."""

    def forward(self, y, t):
        for t_i, dt in rampde_fx.steps(t):
            k = t_i * torch.sin(y) + (t_i - torch.sin(y)) * 1.0 + t_i / torch.exp2(y)
            y = y + dt * k
        return y


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_time_is_not_rounded_as_a_first_operand(dtype):
    grid = torch.linspace(0, 1, 4)
    step = rampde_fx.explain(rampde_fx.mixed_precision(TimeFirst(), dtype=dtype), torch.randn(3, 5), grid).loops[0].step
    seen = 0
    for node in step.velocity_0.graph.nodes:
        operands = [n for n in node.all_input_nodes if n.meta["val"].is_floating_point()]
        if len(operands) > 1:
            seen += 1
            dtypes = {n.meta["val"].dtype for n in operands}
            assert node.args[0].meta["val"].ndim > 0 or dtypes == {torch.float32}, node
    assert seen >= 4


def test_an_instance_that_is_marked_again_takes_the_new_policy():
    model = TimeFirst()
    for dtype in (torch.float16, torch.bfloat16):
        marked = rampde_fx.mixed_precision(model, dtype=dtype)
        (loop,) = rampde_fx.explain(marked, torch.randn(3, 5), torch.linspace(0, 1, 4)).loops
        assert marked is model and loop.policy.velocity is dtype


def test_what_the_loop_read_is_updated_in_place_after_it():
    """The backward reads exp(c) of before."""

    def solve(y, c, t):
        for _, dt in rampde_fx.steps(t):
            y = y + dt * torch.sin(y) * torch.exp(c)
        c.mul_(3.0)
        return y

    found = []
    for function in (solve, compiled(solve, torch.float32)):
        y, c = (torch.linspace(0.1, 1, 4).requires_grad_() for _ in range(2))
        function(y, c.clone(), torch.linspace(0, 1, 5)).square().sum().backward()
        found.append([y.grad, c.grad])
    assert max(relative_errors(found[1], found[0])) < 1e-6
