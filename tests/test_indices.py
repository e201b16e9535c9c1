"""Entries that are read by a 0-d integer tensor: an interpolated control, a table, without a loop too."""

import pytest
import torch

import rampde_fx
from tests.comparison import relative_errors

TIMES, W = torch.linspace(0, 1, 11), torch.eye(3) - 0.3
OURS = {"backend": "rampde_fx", "options": {"compiler": "aot_eager"}}


def left_of(t):
    return torch.searchsorted(TIMES.to(t), t).clamp(1, 10)


def interpolated(u, t):
    i = left_of(t)
    s = (t - TIMES[i - 1].to(t)) / (TIMES[i] - TIMES[i - 1]).to(t)
    return u[i - 1] * (1 - s) + u[i] * s


def of_a_column(u, t):
    return u.T[..., left_of(t)] + u.T[:, left_of(t).int(), None].sum(1)


def two_at_once(u, t):
    i = left_of(t)
    return u[i, i % 3] + u[:, i % 3][None, i - 11]


def by_steps(control):
    def flow(y, u, t):
        for s, dt in rampde_fx.steps(t):
            y = y + dt * (torch.tanh(y @ W.to(y)) + control(u, s))
        return y

    return flow


def by_odeint(control):
    def flow(y, u, t):
        return rampde_fx.odeint(lambda s, y: torch.tanh(y @ W.to(y)) + control(u, s), y, t, method="midpoint")[-1]

    return flow


def by_step_size(control):
    def flow(y, u, t):
        given = {"method": "rk4", "options": {"step_size": 0.24}}
        return rampde_fx.odeint(lambda s, y: torch.tanh(y @ W.to(y)) + control(u, s), y, t, **given)[-1]

    return flow


def by_adaptive_steps(control):
    def flow(y, u, t):
        given = {"method": "bosh3", "rtol": 1e-2, "atol": 1e-2}
        return rampde_fx.odeint(lambda s, y: torch.tanh(y @ W.to(y)) + control(u, s), y, t[[0, -1]], **given)[-1]

    return flow


def outcome(function, dtype):
    y = torch.linspace(-2, 2, 12, dtype=dtype).view(4, 3)
    u = torch.linspace(-3, 3, 33, dtype=dtype).view(11, 3).sin().requires_grad_()
    t = torch.tensor([0.0, 0.13, 0.28, 0.51, 0.76, 1.0], dtype=dtype)
    result = function(y, u, t)
    return [result.detach(), *torch.autograd.grad(result.square().sum(), u)]


@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.parametrize(
    ("form", "control"),
    [
        (by_steps, interpolated),
        (by_steps, of_a_column),
        (by_steps, two_at_once),
        (by_odeint, interpolated),
        (by_step_size, interpolated),
    ],
)
def test_a_control_by_index(form, control, fullgraph):
    function = torch.compile(rampde_fx.mixed_precision(form(control), dtype=torch.float16), fullgraph=fullgraph, **OURS)
    wanted = [value.float() for value in outcome(form(control), torch.float64)]
    assert 1e-6 < max(relative_errors(outcome(function, torch.float32), wanted)) < 2.5e-3


def test_a_control_by_index_and_adaptive_steps():
    """Float16 and float64 may choose other steps: as far apart as the tolerance."""
    function = torch.compile(rampde_fx.mixed_precision(by_adaptive_steps(interpolated), dtype=torch.float16), **OURS)
    wanted = outcome(by_adaptive_steps(interpolated), torch.float64)[0].float()
    assert relative_errors(outcome(function, torch.float32)[:1], [wanted])[0] < 2e-2


@pytest.mark.parametrize(
    "read", [lambda x, i: x[..., i, :] * 2, lambda x, i: x[i - 1] * 2, lambda x, i: x[:, i].square() + x[i, i]]
)
def test_an_index_without_a_loop_is_as_under_another_backend(read):
    x, i = torch.linspace(-2, 2, 30).view(2, 5, 3), torch.tensor(1)
    assert torch.equal(torch.compile(read, **OURS)(x, i), read(x, i))


def test_an_index_before_and_behind_the_loop():
    def flow(y, u, t):
        i = left_of(t[2])
        y = y + u[i]
        for _, dt in rampde_fx.steps(t):
            y = y + dt * torch.tanh(y @ W.to(y))
        return y * u[..., i, :]

    function = torch.compile(rampde_fx.mixed_precision(flow, dtype=torch.float16), **OURS)
    wanted = [value.float() for value in outcome(flow, torch.float64)]
    assert max(relative_errors(outcome(function, torch.float32), wanted)) < 2.5e-3


def test_slices_and_masks_are_read_as_they_were():
    """Near misses: no entry of these indices is a 0-d integer tensor."""
    rows, mask = torch.tensor([2, 0, 1]), torch.tensor([True, False, True, True])

    def flow(y, u, t):
        for k, (_, dt) in enumerate(rampde_fx.steps(t)):
            y = y + dt * (torch.tanh(y[:, rows]) + torch.where(mask[:, None], u[k], u[1:5, ...]))
        return y

    function = torch.compile(rampde_fx.mixed_precision(flow, dtype=torch.float16), fullgraph=True, **OURS)
    wanted = [value.float() for value in outcome(flow, torch.float64)]
    assert max(relative_errors(outcome(function, torch.float32), wanted)) < 2.5e-3


WRITES = {
    "a number": lambda z, t: put(z, (slice(None), [0, 2]), 0.5),
    "a time": lambda z, t: put(z, [1, 2], t),
    "a mean": lambda z, t: put(z, torch.tensor([0, 3]), z.mean()),
    "a 0-d tensor, out of place": lambda z, t: z.index_put((torch.tensor([1]),), z.new_tensor(2.0)),
    "below float16's range": lambda z, t: torch.softmax(put(z, (slice(None), [0]), -1e9), -1),
    "entries": lambda z, t: put(z, (torch.arange(4), torch.zeros(4, dtype=torch.int64)), 7.0),
    "a row": lambda z, t: put(z, 0, t),
    "filled": lambda z, t: z.index_fill(1, torch.tensor([0]), 0.3),
}


def put(z, places, value):
    z = z.clone()
    z[places] = value
    return z


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("what", WRITES)
def test_a_0d_value_is_written_at_indices_of_a_low_tensor(what, dtype):
    """An index_put has the dtype of neither by itself: eager code refuses two."""

    def flow(y, w, t):
        for t_i, dt in rampde_fx.steps(t):
            y = y + dt * torch.tanh(WRITES[what](y @ w, t_i))
        return y

    torch.manual_seed(0)
    y, w, t = torch.randn(4, 3), torch.randn(3, 3), torch.linspace(0, 1, 5)
    found = []
    for run, own in (
        (torch.compile(rampde_fx.mixed_precision(flow, dtype=dtype), **OURS), y.dtype),
        (flow, torch.float64),
    ):
        leaves = [y.to(own).requires_grad_(), w.to(own).requires_grad_()]
        value = run(*leaves, t.to(own))
        found.append([x.detach().float() for x in (value, *torch.autograd.grad(value.square().sum(), leaves))])
    assert max(relative_errors(*found)) < 4 * torch.finfo(dtype).eps
