"""Which part of a step is state: products in which the next state is linear stay wide, and all others are low."""

import pytest
import torch
from torch.nn import functional as F

import rampde_fx
from tests.comparison import compiled

A = torch.randn(4, 4, generator=torch.Generator().manual_seed(0)) * 0.5
R = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(1)))[0]


def rate(y):
    return torch.tanh(y @ A.to(y)) @ A.to(y)


def looped(step):
    def flow(y, t):
        n = len(t) - 1
        for _, dt in rampde_fx.steps(t):
            y = step(y, dt, n)
        return y

    return flow


# Ways to write y + h f(y), or a linear propagator beside it, in which products of the state's could round it.
SPELLINGS = {
    "addmm with alpha": lambda y, dt, n: torch.addmm(y, torch.tanh(y @ A.to(y)), A.to(y), alpha=1 / n),
    "addmm with beta": lambda y, dt, n: torch.addmm(2 * y, torch.tanh(y @ A.to(y)), A.to(y), beta=0.5, alpha=1 / n),
    "baddbmm": lambda y, dt, n: torch.baddbmm(y[None], torch.tanh(y @ A.to(y))[None] * dt, A.to(y)[None])[0],
    "addbmm": lambda y, dt, n: torch.addbmm(y, torch.tanh(y @ A.to(y))[None] * dt, A.to(y)[None]),
    "einsum of a stack": lambda y, dt, n: torch.einsum(
        "sbd,s->bd", torch.stack([y, rate(y)]), torch.stack([torch.ones_like(dt), dt])
    ),
    "matmul of a concatenation": lambda y, dt, n: (
        torch.cat([y, rate(y)], 1) @ torch.cat([torch.eye(4).to(y), dt * torch.eye(4).to(y)], 0)
    ),
    "a rotation": lambda y, dt, n: (y + dt * rate(y)) @ R.to(y),
    "a rotation in parts": lambda y, dt, n: y @ R.to(y) + dt * rate(y),
    "half of two": lambda y, dt, n: 0.5 * (y @ R.to(y)) + 0.5 * (y @ R.to(y)) + dt * rate(y),
    "an exponential": lambda y, dt, n: y @ torch.matrix_exp(dt * (A - A.T).to(y)) + dt * rate(y),
    "an implicit step": lambda y, dt, n: (
        torch.linalg.solve(torch.eye(4).to(y) - dt * (A - A.T).to(y), (y + dt * rate(y)).T).T
    ),
    "a convolution": lambda y, dt, n: (
        torch.conv1d(y[:, None], torch.tensor([[[0.0, 1.0, 0.0]]]).to(y), padding=1)[:, 0] + dt * rate(y)
    ),
    "an interpolation": lambda y, dt, n: (
        F.interpolate(y[None, None, None], size=(1, 3, 4))[0, 0, 0] @ R.to(y) + dt * rate(y)
    ),
    "an index": lambda y, dt, n: (y.repeat(2, 1)[: y.shape[0]] @ R.to(y)).flip(1) + dt * rate(y),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_the_state_is_summed_wide_however_the_update_is_spelled(name):
    """The error of 256 steps in bfloat16 is that of one evaluation, not of the sums."""
    flow, y, t = looped(SPELLINGS[name]), torch.linspace(1, 3, 12).view(3, 4), torch.linspace(0, 1, 257)
    wanted = flow(y.double(), t.double())
    got = compiled(flow, torch.bfloat16)(y, t)
    assert (got - wanted).norm() <= 4 * torch.finfo(torch.bfloat16).eps * wanted.norm()


GATES = {
    "a decay": lambda y, dt, n: y * (1 - dt * torch.sigmoid(y @ A.to(y))),
    "a gated cell": lambda y, dt, n: (
        (1 - torch.sigmoid(y @ A.to(y)) * dt) * y + dt * torch.sigmoid(y @ A.to(y)) * torch.tanh(y @ R.to(y))
    ),
    "a quotient": lambda y, dt, n: y / (1 + dt * torch.sigmoid(y @ A.to(y))),
    "a relu beside a share": lambda y, dt, n: torch.relu(y + dt * rate(y)) + 0.1 * (y + dt * rate(y)),
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", GATES)
def test_what_multiplies_a_state_is_wide(name, dtype):
    """What a step changes is small beside the state: it has the error of an evaluation, not of the state."""
    y, t = torch.linspace(1, 3, 12).view(3, 4), torch.linspace(0, 1e-3, 5)
    flow = looped(GATES[name])
    wanted = flow(y.double(), t.double()) - looped(lambda y, dt, n: GATES[name](y, 0 * dt, n))(y.double(), t.double())
    got = compiled(flow, dtype)(y, t) - looped(lambda y, dt, n: GATES[name](y, 0 * dt, n))(y, t)
    assert (got - wanted).norm() <= 4 * torch.finfo(dtype).eps * wanted.norm() + 1e-6


def products(step, *more):
    """For every product of one step whether it is low, in order."""
    marked = rampde_fx.mixed_precision(looped(step), dtype=torch.bfloat16)
    (loop,) = rampde_fx.explain(marked, torch.ones(3, 4), torch.linspace(0, 1, 5), *more).loops
    kept = "state: the next state is linear in this product"
    return loop, sum(f.count for f in loop.fallbacks if f.reason == kept)


@pytest.mark.parametrize(
    ("step", "wide"),
    [
        (lambda y, dt, n: y + dt * (y @ A), 0),  # a linear velocity is an increment
        (lambda y, dt, n: y + y @ (dt * A), 0),
        (lambda y, dt, n: y + 0.1 * (y @ A), 0),
        (lambda y, dt, n: y @ R + dt * (y @ A), 1),
        (lambda y, dt, n: y + y @ A, 1),
        (lambda y, dt, n: dt * (y @ A), 1),
        (lambda y, dt, n: torch.relu(y + dt * (y @ A)), 0),
    ],
)
def test_products_that_stay_wide_are_listed(step, wide):
    _, kept = products(step)
    assert kept == wide


def test_a_recurrent_cell_is_low_and_the_report_says_that_its_state_is_rounded():
    loop, kept = products(lambda y, dt, n: torch.tanh(y @ A + 0.1))
    assert kept == 0 and loop.evaluations == 1
    assert loop.notes == (
        "the state 'y' follows from itself through a product and a nonlinearity alone: each step rounds it",
    )


def test_a_multistep_velocity_is_low_though_it_is_linear():
    def adams(y, t):
        k = y @ A
        for _, dt in rampde_fx.steps(t):
            y = y + dt * k
            k = y @ A
        return y

    marked = rampde_fx.mixed_precision(adams, dtype=torch.bfloat16)
    (loop,) = rampde_fx.explain(marked, torch.ones(3, 4), torch.linspace(0, 1, 5)).loops
    assert loop.evaluations == 1 and loop.notes == ()


@pytest.mark.parametrize("product", [torch.dot, torch.vdot])
def test_a_sum_of_velocities_with_weights_of_time_is_wide(product):
    _, kept = products(lambda y, dt, n: y + product(torch.stack([dt] * 4), torch.tanh(y @ A)[0]))
    assert kept == 1


def test_what_a_derivative_scales_an_increment_by_is_wide():
    """A mean's derivative divides by div.Scalar, an overload that autograd alone calls."""

    def step(y, dt, n):
        (increment,) = torch.func.vjp(lambda z: z.mean(0), y)[1]((dt * torch.tanh(y @ A))[0])
        return y + increment

    loop, _ = products(step)
    assert "div" in [f.operation for f in loop.fallbacks if f.reason.startswith("state")]


def test_a_trajectory_of_detached_states_is_not_rounded():
    def flow(y, t):
        kept = []
        for _, dt in rampde_fx.steps(t):
            y = y + dt * rate(y)
            kept.append(y.detach())
        return y, torch.stack(kept)

    final, kept = compiled(flow, torch.bfloat16)(torch.linspace(1, 3, 12).view(3, 4), torch.linspace(0, 1, 5))
    assert torch.equal(kept[-1], final)


# What a step may give of its state beside the next one.
TOLD = {
    "abs": torch.abs,
    "clamp": lambda y: y.clamp(-1, 1),
    "cumsum": lambda y: y.cumsum(1),
    "flip": lambda y: y.flip(1),
    "index": lambda y: y[:, torch.tensor([2, 0])],
    "index_select": lambda y: y.index_select(1, torch.tensor([2, 0])),
    "masked_fill": lambda y: y.masked_fill(y > 0, 0.0),
    "mean": lambda y: y.mean(1),
    "norm": lambda y: y.norm(dim=1),
    "pad": lambda y: F.pad(y, (1, 1)),
    "repeat": lambda y: y.repeat(1, 2),
    "roll": lambda y: y.roll(1, 1),
    "sin": torch.sin,
    "softmax": lambda y: y.softmax(1),
    "sort": lambda y: y.sort(1)[0],
    "topk": lambda y: y.topk(2)[0],
    "tril": torch.tril,
    "where": lambda y: torch.where(y > 0, y, -y),
}


@pytest.mark.parametrize("name", TOLD)
def test_what_a_step_tells_of_its_state_is_not_rounded(name):
    tell = TOLD[name]

    def flow(y, t):
        told = []
        for _, dt in rampde_fx.steps(t):
            y = y + dt * rate(y)
            told.append(tell(y))
        return y, torch.stack(told)

    y, told = compiled(flow, torch.bfloat16, "eager")(torch.linspace(1, 3, 12).view(3, 4), torch.linspace(0, 1, 4))
    torch.testing.assert_close(told[-1], tell(y), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("name", ["centred", "abs", "sin", "squares"])
def test_what_a_step_tells_is_not_rounded_where_its_velocity_evaluates_the_same(name, first):
    told_of = {"centred": lambda y: y - y.mean(0), "squares": lambda y: y * y, **TOLD}[name]

    def flow(y, t):
        told = []
        for _, dt in rampde_fx.steps(t):
            if first:
                told.append(told_of(y))
            y = y + dt * torch.tanh(told_of(y) @ R)
            if not first:
                told.append(told_of(y))
        return y, torch.stack(told)

    y = 100 + torch.linspace(1, 3, 12).view(3, 4)
    end, told = compiled(flow, torch.bfloat16, "eager")(y, torch.linspace(0, 1, 4))
    state = y if first else end
    torch.testing.assert_close(told[0 if first else -1], told_of(state), rtol=1e-5, atol=1e-5)


def test_what_a_step_tells_behind_a_product_is_low():
    """A head that is evaluated for each state."""

    def flow(y, t):
        told = []
        for _, dt in rampde_fx.steps(t):
            y = y + dt * rate(y)
            told.append(torch.sin(y @ R))
        return y, torch.stack(told)

    y, told = compiled(flow, torch.bfloat16, "eager")(torch.linspace(1, 3, 12).view(3, 4), torch.linspace(0, 1, 4))
    error = (told[-1] - torch.sin(y @ R)).abs().max()
    assert 1e-5 < error < 2 * y.abs().max() * 2**-8
