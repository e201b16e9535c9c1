"""A compiled adaptive odeint evaluates each step once: the search keeps it, and the loop behind it reads it."""

import gc

import pytest
import torch

import rampde_fx
from rampde_fx import PrecisionPolicy, errors
from rampde_fx.runtime import kept_steps
from rampde_fx.solvers.tableau import METHODS, ButcherTableau
from tests.comparison import gradients, relative_errors
from tests.models import Solved, Velocity
from tests.test_odeint import compiled
from tests.test_statistics import T2, T9, numbers, oscillation

HEUN_EULER = ButcherTableau(a=[[], [1]], b=[0.5, 0.5], c=[0, 1], order=2, b_error=[1, 0], order_error=1)
ONCE, TWICE = "evaluated once", "in the search and in this loop: "


def notes(model, *args):
    return " ".join(rampde_fx.explain(model, *args).loops[1].notes)


@pytest.mark.parametrize(
    ("method", "t", "options"),
    [
        ("bosh3", T2, {"first_step": 3.0}),
        ("tsit5", T9, {}),
        ("dopri5", T9, {"first_step": 3.0}),
        ("dopri5", T2.flip(0), {}),
        (HEUN_EULER, T9, {"first_step": 1e-3}),
        ("dopri8", T9, {"first_step": 1e-3}),
    ],
    ids=str,
)
def test_statistics_are_those_of_an_uncompiled_solve(method, t, options):
    """A method whose last stage is not the next one's first evaluates it anew after a rejection, and at the end."""
    model = Solved(oscillation, method=method, rtol=1e-4, atol=1e-4, options={**options, "stats": True})
    y0 = torch.ones(2, dtype=torch.float64, requires_grad=True)
    (wanted, uncompiled), (got, found) = (run(y0, t) for run in (model, compiled(model, torch.float64, "eager")))
    torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-12)
    counted, expected = numbers(found), numbers(uncompiled)
    assert counted[:2] == expected[:2]
    tableau = METHODS[method] if isinstance(method, str) else method
    if tableau.fsal:
        assert counted == expected
    else:
        assert expected[2] <= counted[2] <= expected[2] + expected[1] + 1


@pytest.mark.parametrize(
    ("policy", "why"),
    [
        ({}, ONCE),
        ({"checkpoint": 1}, ONCE),
        ({"storage": torch.bfloat16}, ONCE),
        ({"checkpoint": 3}, TWICE + "its states are stored in segments"),
        ({"checkpoint": "none"}, TWICE + 'checkpoint="none" stores'),
        ({"accumulation": "compensated"}, TWICE + "its sums are compensated"),
    ],
    ids=str,
)
@pytest.mark.parametrize("t", [T2, T9], ids=["ends", "between"])
def test_what_is_stored_says_whether_steps_are_evaluated_again(policy, why, t):
    model = Solved(Velocity().double(), method="dopri5", rtol=1e-4, atol=1e-4)
    y = torch.randn(3, 5, dtype=torch.float64)
    run, wanted = compiled(model, torch.float64, "aot_eager", **policy), gradients(model, model, y, t)
    stored = torch.finfo(policy.get("storage", torch.float64)).eps
    assert max(relative_errors(gradients(run, model, y, t), wanted)) < 100 * stored
    assert why in notes(model, y.requires_grad_(), t)


def test_a_solve_inside_of_a_checkpoint_is_evaluated_again():
    model = Solved(Velocity(), method="bosh3", rtol=1e-4, atol=1e-4, policy=PrecisionPolicy(torch.float32))

    def checkpointed(y, t):
        return torch.utils.checkpoint.checkpoint(model, y, t, use_reentrant=False)

    y, t = torch.randn(3, 5, requires_grad=True), torch.tensor([0.0, 0.5, 1.0])
    run = torch.compile(checkpointed, backend="rampde_fx", options={"compiler": "aot_eager"})
    found = [torch.autograd.grad(f(y, t).sum(), (y, *model.parameters())) for f in (run, model)]
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
    assert TWICE + "it is computed again by a checkpoint" in notes(checkpointed, y, t)


def test_two_solves_of_one_graph_keep_apart():
    """Of the same state and times, with other velocities; and a third of the first one's."""

    @rampde_fx.mixed_precision(dtype=torch.float64)
    def flow(y, t):
        first = rampde_fx.odeint(oscillation, y, t, method="bosh3")
        second = rampde_fx.odeint(lambda t, y: -y * y, y, t, method="bosh3")
        return first[-1], second[-1], rampde_fx.odeint(oscillation, first[-1], t, method="bosh3")[-1]

    run = torch.compile(flow, backend="rampde_fx", options={"compiler": "aot_eager"}, fullgraph=True)
    y = torch.tensor([1.0, 0.5], dtype=torch.float64, requires_grad=True)
    t, found = torch.tensor([0.0, 1.0], dtype=torch.float64), []
    for solve in (run, run, flow):
        values = solve(y, t)
        found.append([*values, *torch.autograd.grad(sum(value.sum() for value in values), (y,), retain_graph=True)])
    torch.testing.assert_close(found[0], found[2], rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)
    assert not kept_steps._runs


@pytest.mark.parametrize("t", [T2, T9], ids=["ends", "between"])
def test_a_backward_runs_twice_through_what_was_kept(t):
    model = Solved(Velocity(), method="dopri5", rtol=1e-3, atol=1e-3)
    y = torch.randn(3, 5, requires_grad=True)
    loss = compiled(model, torch.float16)(y, t.float()).square().sum()
    assert not kept_steps._runs  # the forward took it
    first, second = (torch.autograd.grad(loss, (y, *model.parameters()), retain_graph=True) for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_nothing_is_kept_of_a_solve_that_fails():
    run = compiled(Solved(lambda t, y: y * y, method="bosh3", rtol=1e-4, atol=1e-4))
    for _ in range(3):
        with pytest.raises(errors.StepSizeError, match="t = 1"):
            run(torch.ones(1, requires_grad=True), torch.tensor([0.0, 2.0]))
        gc.collect()
    assert len(kept_steps._runs) <= 1  # the last one, until another begins
    run(torch.ones(1, requires_grad=True), torch.tensor([0.0, 0.5]))
    assert not kept_steps._runs


def test_states_that_underflow_are_counted_in_the_search():
    rampde_fx.state_counts(reset=True)
    model = Solved(lambda t, y: -y * torch.cos(y), method="bosh3", rtol=1e-2, atol=1e-9)
    run = compiled(model, torch.float16)
    y = torch.tensor([1.0, 1e-6, 0.0], requires_grad=True)
    with pytest.warns(UserWarning, match=r"below 2\^-17"):
        run(y, torch.tensor([0.0, 1.0])).sum().backward()
        (count,) = rampde_fx.state_counts().values()
    assert count.underflowed > 0 and count.entries == 2 * count.underflowed


def test_the_first_call_is_verified():
    model = rampde_fx.mixed_precision(Solved(oscillation, options={"stats": True}), dtype=torch.float32)
    run = torch.compile(model, backend="rampde_fx", options={"compiler": "aot_eager", "verify": True})
    solution, found = run(torch.ones(2, requires_grad=True), torch.tensor([0.0, 0.5, 1.0]))
    assert numbers(found) == numbers(model(torch.ones(2), torch.tensor([0.0, 0.5, 1.0]))[1])
    assert solution.shape == (3, 2)


def test_what_was_kept_is_read_once():
    token = kept_steps.begin_keeping(torch.zeros(2), -1)
    assert kept_steps.keep(token, [torch.ones(3)], torch.tensor(True)) == 0
    kept_steps.keep(token, [torch.zeros(3)], torch.tensor(False))
    (found,) = kept_steps.kept(token, [torch.full((3,), 2.0)], torch.zeros(2))
    assert found.tolist() == [[1.0] * 3, [2.0] * 3]
    with pytest.raises(errors.RewriteError, match="a second time"):
        kept_steps.kept(token, [torch.ones(3)], torch.zeros(2))
