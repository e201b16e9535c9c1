"""check() and options={"verify": True}: they pass what is right, and name what is wrong.

A fault is planted into a pass, and the error must name the tensor that is wrong and the line of the loop. What is right
must pass, whatever the model looks like, and leave nothing behind.
"""

import contextlib
import copy
from dataclasses import replace
from types import SimpleNamespace
from typing import get_args

import numpy
import pytest
import torch
from torch import nn

import rampde_fx
from rampde_fx import backend, check, errors, torchdiffeq
from rampde_fx.ir import graphs
from rampde_fx.ir.ends import Total
from rampde_fx.policy import PrecisionPolicy
from rampde_fx.proof import check_timing
from rampde_fx.schedules import Checkpoint
from rampde_fx.torch_private import repetition
from rampde_fx.torchdiffeq import compared
from tests import test_semantics
from tests.models import (
    FORMS,
    Euler,
    Flow,
    LogDensity,
    MutatedArgument,
    Solved,
    Symplectic,
    Trajectory,
    TwoLoops,
    Velocity,
)
from tests.test_faults import replace_pass

aten = torch.ops.aten
FP16 = [PrecisionPolicy(torch.float16)]


def verified(model, compiler="eager", **policy):
    marked = rampde_fx.mixed_precision(model, policy=PrecisionPolicy(**{"velocity": torch.float16, **policy}))
    return torch.compile(marked, backend="rampde_fx", options={"compiler": compiler, "verify": True}, fullgraph=True)


def leaves(dim=5, steps=3):
    return torch.randn(8, dim, requires_grad=True), torch.linspace(0, 1, steps + 1, requires_grad=True)


class TwoStates(Flow):
    """Two states of one shape, each read by the other's velocity."""

    def forward(self, y, t):
        z = torch.cos(y)
        for t_i, dt in rampde_fx.steps(t):
            y, z = y + dt * torch.sin(z * y), z + dt * self.velocity(t_i, y * z)
        return y, z


class ReadAndUpdated(Flow):
    """The context is updated after the loop that reads it."""

    def forward(self, y, t):
        context = torch.ones(5)
        for _, dt in rampde_fx.steps(t):
            y = y + dt * torch.sin(y) * torch.exp(context)
        context.mul_(3.0)
        return y * context


# --- faults


def first_total_is_lost(patch):
    """The adjoint forgets what one step adds to the gradient of a parameter."""
    generate = backend.generate_adjoint

    def broken(loop):
        loop = generate(loop)
        adjoint = replace(loop.adjoint, module=graphs.copied(loop.adjoint.module))
        totals = {node for entry, node in adjoint.nodes().items() if isinstance(entry, Total)}
        sums = [n for n in adjoint.module.graph.nodes if n.target is aten.add.Tensor]
        total = next(n for n in sums if totals.intersection(n.args))
        total.replace_all_uses_with(next(operand for operand in total.args if operand in totals))
        graphs.refresh(adjoint.module)
        return replace(loop, adjoint=adjoint)

    replace_pass(patch, generate, broken)


def increment_is_subtracted(patch):
    partition = backend.partition_velocity

    def broken(loop):
        step = graphs.copied(loop.step)
        next(n for n in reversed(step.graph.nodes) if n.target is aten.add.Tensor).target = aten.sub.Tensor
        return partition(replace(loop, step=graphs.refresh(step)))

    replace_pass(patch, partition, broken)


def stored_states_are_swapped(patch):
    store = backend.store_states

    def broken(loop):
        loop = store(loop)
        step = graphs.copied(loop.step)
        output = step.graph.output_node()
        results = list(output.args[0])
        results[-2:] = reversed(results[-2:])
        output.args = (tuple(results),)
        return replace(loop, step=graphs.refresh(step))

    replace_pass(patch, store, broken)


def update_in_place_is_lost(patch):
    roll = backend.roll_loop
    patch.setattr(
        backend, "roll_loop", lambda g, marked, run, captured, name: roll(g, marked, run, lost(captured), name)
    )


def lost(captured):
    return replace(captured, written={})


def update_in_place_comes_early(patch):
    roll = backend.roll_loop

    def broken(graph_module, marked, run, captured, name):
        loop = roll(graph_module, marked, run, captured, name)
        (update,) = [node for node in graph_module.graph.nodes if node.target == "mul_"]
        update.args[0].append(update)
        return loop

    patch.setattr(backend, "roll_loop", broken)


def accumulated_in_float16(patch):
    """A cast down that no policy asked for, in the step."""
    lower = backend.lower_velocity

    def broken(loop):
        loop = lower(loop)
        step = graphs.copied(loop.step)
        output = step.graph.output_node()
        first, *rest = output.args[0]
        with step.graph.inserting_before(output):
            low = step.graph.call_function(aten._to_copy.default, (first,), {"dtype": torch.float16})
            wide = step.graph.call_function(aten._to_copy.default, (low,), {"dtype": graphs.value(first).dtype})
        output.args = ((wide, *rest),)
        return replace(loop, step=graphs.refresh(step))

    replace_pass(patch, lower, broken)


FAULTS = {
    "a gradient contribution is dropped": (first_total_is_lost, Euler, "the gradient of velocity.linear"),
    "a sign is wrong": (increment_is_subtracted, Euler, "output"),
    "stored slots are swapped": (stored_states_are_swapped, TwoStates, "the gradient of"),
    "an update in place is lost": (update_in_place_is_lost, MutatedArgument, "what the model leaves in y"),
    "an update in place is moved before the loop": (update_in_place_comes_early, ReadAndUpdated, "output"),
    "a state is accumulated in low precision": (accumulated_in_float16, Euler, "output"),
}


@pytest.mark.parametrize(("plant", "model", "tensor"), FAULTS.values(), ids=FAULTS)
def test_verify_names_a_fault(plant, model, tensor, monkeypatch):
    plant(monkeypatch)
    y, t = leaves()
    with pytest.raises(errors.RewriteMismatchError, match=r"rampde_fx\.steps") as caught:
        verified(model())(y.clone(), t)
    assert caught.value.tensor.startswith(tensor) and "in forward" in caught.value.where


@pytest.mark.slow
@pytest.mark.parametrize(("plant", "model", "tensor"), FAULTS.values(), ids=FAULTS)
def test_check_names_a_fault(plant, model, tensor, monkeypatch):
    plant(monkeypatch)
    y, t = leaves()
    with pytest.raises(errors.RewriteMismatchError, match=r"rampde_fx\.steps") as caught:
        check(model(), y.detach(), t.detach(), policies=FP16, compiler="eager")
    assert caught.value.tensor.startswith(tensor) and "in forward" in caught.value.where


def test_of_two_loops_the_wrong_one_is_named(monkeypatch):
    y, t = leaves()
    lines = [
        loop.where for loop in rampde_fx.explain(rampde_fx.mixed_precision(TwoLoops(), dtype=torch.float16), y, t).loops
    ]
    partition = backend.partition_velocity

    def broken(loop):
        if loop.where != lines[1]:
            return partition(loop)
        step = graphs.copied(loop.step)
        next(n for n in reversed(step.graph.nodes) if n.target is aten.add.Tensor).target = aten.sub.Tensor
        return partition(replace(loop, step=graphs.refresh(step)))

    replace_pass(monkeypatch, partition, broken)
    with pytest.raises(errors.RewriteMismatchError) as caught:
        verified(TwoLoops())(y, t)
    assert caught.value.where == lines[1] != lines[0]


def test_a_mismatch_is_raised_at_every_call(monkeypatch):
    increment_is_subtracted(monkeypatch)
    function = verified(Euler())
    for _ in range(2):
        with pytest.raises(errors.RewriteMismatchError):
            function(*leaves())


def test_the_error_pickles():
    import pickle

    error = pickle.loads(pickle.dumps(errors.RewriteMismatchError("output", "its error is 1", "file:1")))
    assert (error.tensor, error.where) == ("output", "file:1") and "output of the rewritten graph" in str(error)


# --- what is right passes


class Normalized(Flow):
    """BatchNorm in training in the velocity, a counter, outputs in a dict, one of them a number."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(5)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, y, t):
        for t_i, dt in rampde_fx.steps(t):
            y = y + dt * self.norm(self.velocity(t_i, y))
        self.calls.add_(1)
        return {"final": y, "parts": (y.sum(), 3)}


class Replaced(Flow):
    """A buffer that is replaced by another tensor, a Python counter, a shared module, a state without a reader."""

    def __init__(self):
        super().__init__()
        self.again = self.velocity
        self.register_buffer("average", torch.zeros(5))
        self.evaluations = 0

    def forward(self, y, t):
        unread = torch.zeros(8)
        for t_i, dt in rampde_fx.steps(t):
            unread = unread + dt * y.detach().sum(1)
            y = y + dt * self.velocity(t_i, y) + dt * 0.1 * self.again(t_i, y)
        self.average = 0.9 * self.average + 0.1 * y.detach().mean(0)
        self.evaluations += 1
        return y, unread


class Labelled(Flow):
    """Integer inputs and an integer output."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(3, 5)

    def forward(self, y, t, *, labels):
        shift = self.embedding(labels)
        for t_i, dt in rampde_fx.steps(t):
            y = y + dt * self.velocity(t_i, y + shift)
        return y, y.argmax(1)


class Complex(Flow):
    """A complex output."""

    def forward(self, y, t):
        for t_i, dt in rampde_fx.steps(t):
            y = y + dt * self.velocity(t_i, y)
        return torch.fft.rfft(y)


class Written32(Flow):
    """Code that names float32."""

    def forward(self, y, t):
        y, shift = y.float(), torch.zeros(5, dtype=torch.float32)
        for t_i, dt in rampde_fx.steps(t):
            y = y + dt * (self.velocity(t_i.float(), y.to(torch.float32)) + shift)
        return y


class Dropped(Flow):
    """Random numbers in the loop."""

    def forward(self, y, t):
        for t_i, dt in rampde_fx.steps(t):
            y = y + dt * torch.dropout(self.velocity(t_i, y), 0.5, True) + 0.01 * dt * torch.randn_like(y)
        return y


class ReturnsItsArgument(Flow):
    def forward(self, y, t):
        for t_i, dt in rampde_fx.steps(t):
            y += dt * self.velocity(t_i, y)
        return y


RIGHT = [Normalized, Replaced, Complex, Written32, Dropped, ReturnsItsArgument, Symplectic]


def kept(model):
    return copy.deepcopy(model.state_dict()), {k: v for k, v in vars(model).items() if isinstance(v, (int, bool))}


def assert_kept(model, before):
    state, flags = kept(model)
    assert all(torch.equal(state[name], value) for name, value in before[0].items())
    assert flags == before[1] and all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("model", [LogDensity, Trajectory, TwoStates, *RIGHT], ids=lambda model: model.__name__)
def test_verify_passes_what_is_right(model):
    y, t = leaves()
    torch.manual_seed(3)
    verified(model())(y.clone(), t)
    drawn = torch.rand(1)
    torch._dynamo.reset()
    torch.manual_seed(3)
    plain = rampde_fx.mixed_precision(model(), dtype=torch.float16)
    torch.compile(plain, backend="rampde_fx", options={"compiler": "eager"}, fullgraph=True)(y.clone(), t)
    assert torch.equal(torch.rand(1), drawn), "verification moved the random number generator"


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_verify_passes_every_form(form):
    verified(form())(*leaves(form().dim, steps=4))


@pytest.mark.slow
@pytest.mark.parametrize("function", test_semantics.CASES, ids=lambda function: function.__name__)
def test_verify_passes_every_spelling(function):
    y, t = torch.randn(8, 5), torch.linspace(0, 1, 4)
    verified(test_semantics.Case(function), compiler="aot_eager")(y, t)


@pytest.mark.parametrize(
    "policy",
    [
        {"checkpoint": "sqrt"},
        {"checkpoint": "none"},
        {"accumulation": "compensated", "loop": "unroll"},
        {"storage": torch.float8_e4m3fn, "checkpoint": 2},
    ],
    ids=str,
)
def test_verify_passes_every_policy(policy):
    verified(Euler(), **policy)(*leaves(steps=4))


@pytest.mark.parametrize(
    "solver",
    [{"options": {"num_steps": 2}}, {"options": {"step_size": 0.3}}, {"method": "bosh3", "rtol": 1e-2, "atol": 1e-3}],
    ids=str,
)
def test_verify_passes_odeint(solver):
    verified(Solved(**solver))(*leaves())


def test_a_verified_model_computes_the_same_and_updates_its_buffers_once():
    y, t = leaves()
    found = []
    for verify in (True, False):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        torch.manual_seed(0)
        model = rampde_fx.mixed_precision(Normalized(), dtype=torch.float16)
        options = {"compiler": "aot_eager", "verify": verify}
        function = torch.compile(model, backend="rampde_fx", options=options, fullgraph=True)
        for _ in range(2):
            final = function(y, t)["final"]
        gradients = torch.autograd.grad(final.sum(), [y, t, *model.parameters()], materialize_grads=True)
        found.append([final.detach(), *gradients, *model.state_dict().values()])
        assert model.calls == 2
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_verify_counts_no_backward_pass():
    rampde_fx.backward_counts(reset=True)
    function = verified(Euler())
    result = function(*leaves())
    assert not rampde_fx.backward_counts()
    result.sum().backward()
    assert sum(count.passes for count in rampde_fx.backward_counts(reset=True).values()) == 1


class Statistics:
    """No Module: attributes, a list and a dict of the user's own."""

    def __init__(self):
        self.mean, self.calls, self.log, self.named = torch.zeros(3), 0, [], {}


class Recording(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.statistics = torch.nn.Linear(3, 3), Statistics()

    def forward(self, y, t):
        y = y - self.statistics.mean
        for _, dt in rampde_fx.steps(t):
            y = y + dt * torch.tanh(self.layer(y))
        self.statistics.mean = 0.9 * self.statistics.mean + 0.1 * y.detach().mean(0)
        self.statistics.calls += 1
        self.statistics.log.append(1)
        self.statistics.named["last"] = y.detach()
        return y


def test_what_objects_hold_is_put_back():
    """Else the next run reads another mean than the first, and the model is float64 afterwards."""
    model = Recording()
    check(model, *leaves(dim=3), policies=[rampde_fx.PrecisionPolicy(torch.float16)])
    found = model.statistics
    assert torch.equal(found.mean, torch.zeros(3)) and found.mean.dtype is torch.float32
    assert (found.calls, found.log, found.named) == (0, [], {})


class OfNumpy(Euler):
    def __init__(self):
        super().__init__()
        self.count = numpy.zeros(2)

    def forward(self, y, t):
        self.count[0] += 1
        return super().forward(y, t)


def test_arrays_of_numpy_are_left_out_and_put_back():
    model = OfNumpy()
    result = check(model, *leaves(), policies=[rampde_fx.PrecisionPolicy(torch.float16)])
    assert "what the model writes into arrays of numpy was not compared: count" in result.notes
    assert model.count.tolist() == [0, 0]


@pytest.mark.parametrize("loss", [lambda y: y.detach().mean(), lambda y: torch.tensor(1.0)])
def test_a_loss_without_gradients_is_refused(loss):
    policies = [rampde_fx.PrecisionPolicy(torch.float16)]
    with pytest.raises(errors.CheckError, match=r"has no gradient(.|\n)*fix: leave detach\(\)"):
        check(Euler(), *leaves(), policies=policies, loss=loss)
    with torch.no_grad():
        assert check(Euler(), *leaves(), policies=policies, loss=loss).rows[-1].value_errors


def test_gradients_that_are_all_zero_are_told():
    result = check(Euler(), *leaves(), policies=[rampde_fx.PrecisionPolicy(torch.float16)], loss=lambda y: 0 * y.sum())
    assert any("all gradients are zero" in note for note in result.notes)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=lambda mode: mode.__name__)
def test_without_gradients_values_are_verified(mode, monkeypatch):
    y, t = leaves()
    with mode():
        verified(Euler())(y, t)
        torch._dynamo.reset()
        increment_is_subtracted(monkeypatch)
        with pytest.raises(errors.RewriteMismatchError, match="output"):
            verified(Euler())(y, t)


def test_inputs_that_share_memory_and_have_strides():
    @rampde_fx.mixed_precision(dtype=torch.float16)
    def flow(y, shift, t):
        for _, dt in rampde_fx.steps(t):
            y = y + dt * torch.tanh(y @ y.T @ shift)
        return y

    data = torch.randn(5, 16)
    options = {"compiler": "eager", "verify": True}
    torch.compile(flow, backend="rampde_fx", options=options, fullgraph=True)(
        data.T[::2], data[:, 3:11].T, torch.linspace(0, 1, 4)
    )


def test_verify_is_a_bool():
    function = torch.compile(
        rampde_fx.mixed_precision(Euler(), dtype=torch.float16), backend="rampde_fx", options={"verify": "yes"}
    )
    with pytest.raises(errors.PolicyError, match="verify"):
        function(*leaves())


# --- check


@pytest.mark.parametrize("model", [Normalized, Replaced, Written32], ids=lambda model: model.__name__)
def test_check_passes_what_is_right_and_changes_nothing(model):
    model, (y, t) = model(), leaves()
    before, state = kept(model), torch.get_rng_state()
    result = check(model, y, t, policies=FP16, compiler="eager")
    assert_kept(model, before)
    assert torch.equal(torch.get_rng_state(), state) and y.grad is None
    assert [row.name for row in result.rows] == ["as it is written, eager", "float32", "float16"]
    assert result.rows[1].error < 1e-3 and not result.notes


@pytest.mark.slow
@pytest.mark.parametrize("model", [*RIGHT[::3], TwoStates, MutatedArgument], ids=lambda model: model.__name__)
def test_check_passes_more_of_what_is_right(model):
    model = model()
    before = kept(model)
    y, t = leaves()
    result = check(model, y.detach(), t.detach(), policies=FP16)
    assert_kept(model, before)
    assert len(result.rows) == 3 and bool(result.notes) == isinstance(model, Dropped)


def test_the_errors_are_those_of_the_dtypes():
    y, t = leaves()
    low = [PrecisionPolicy(dtype) for dtype in (torch.float16, torch.bfloat16)]
    result = check(Euler(), y, t, policies=low, compiler="eager")
    eager, wide, half, brain = result.rows
    assert set(half.gradient_errors) == {"y", "t", *(name for name, _ in Euler().named_parameters())}
    assert eager.error < 1e-5 and wide.error < 1e-5 < half.error < 40 * 2**-11 < 40 * 2**-8
    assert half.error < brain.error < 40 * 2**-8
    assert half.stored_bytes == brain.stored_bytes == wide.stored_bytes // 2 == 3 * 8 * 5 * 2
    assert half.repeated == half.overflowed == half.overflows == 0
    assert result.best(error=40 * 2**-11) == half.policy
    assert result.best(error=1e-5) == wide.policy
    with pytest.raises(errors.CheckError, match="the closest is float16"):
        result.best(error=40 * 2**-11, memory=100)
    text = str(result)
    assert "agrees with the model to rounding" in text and all(row.name in text for row in result.rows)
    assert "<table>" in result._repr_html_() and "bfloat16" in result._repr_html_()
    for words in ("stored: bytes", "repeated: backward passes", "vanished, overflowed: entries"):
        assert words in str(result) and words in result._repr_html_()


def test_what_vanishes_and_what_overflows_is_counted():
    def scaled(y, t):
        for _, dt in rampde_fx.steps(t):
            y = y + dt * torch.sin(y)
        return y

    policies = [PrecisionPolicy(torch.float16, scaling="none"), PrecisionPolicy(torch.float16)]
    y, t = leaves()
    result = check(scaled, y, t, loss=lambda y: 1e-9 * y.sum(), policies=policies, compiler="eager")
    unscaled, dynamic = result.rows[2:]
    assert unscaled.underflows == 3 * 8 * 5 and unscaled.error > 0.1
    assert dynamic.underflows == 0 and dynamic.gradient_errors["y"] < 5 * 2**-11


def test_the_first_steps_alone():
    y, t = leaves(steps=12)
    result = check(Euler(), y, t, policies=FP16, steps=2, compiler="eager")
    assert result.rows[-1].stored_bytes == 2 * 8 * 5 * 2
    for model, wrong, match in ((Euler(), 13, "from 1 to 12"), (Derived(), 2, "which argument holds the times")):
        with pytest.raises(errors.CheckError, match=match):
            check(model, y, t, policies=FP16, steps=wrong, compiler="eager")


class Derived(Flow):
    """Times that no argument gives."""

    def forward(self, y, t):
        for t_i, dt in rampde_fx.steps(torch.linspace(0, 1, 3)):
            y = y + dt * self.velocity(t_i, y)
        return y * t[0]


def test_a_function_that_finds_its_module_in_a_closure():
    net = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.BatchNorm1d(5))
    before = kept(net)

    def flow(y, t, *, scale):
        for _, dt in rampde_fx.steps(t):
            y = y + dt * net(y) * scale["factor"][0]
        return y

    y, t = leaves()
    result = check(flow, y, t, scale={"factor": [torch.ones(5)]}, policies=FP16, compiler="eager")
    assert_kept(net, before)
    assert {"y", "t", "scale['factor'][0]"} < set(result.rows[-1].gradient_errors)


def test_without_gradients_values_are_checked():
    y, t = leaves()
    with torch.no_grad():
        result = check(Euler(), y, t, policies=FP16, compiler="eager")
    assert result.rows[-1].value_error > 0 and set(result.rows[-1].gradient_errors.values()) == {0.0}


def test_the_models_own_policy_is_measured_too():
    own = PrecisionPolicy(torch.bfloat16, storage=torch.float32)
    y, t = leaves()
    with torch.no_grad():  # the gradients of so many policies would take long
        result = check(rampde_fx.mixed_precision(Euler(), policy=own), y, t, compiler="eager")
    assert "bfloat16, storage=float32" in [row.name for row in result.rows]
    assert len(result.rows) == 3 + 2 * len(get_args(Checkpoint))  # eager, float32 and its own, and two dtypes by each


def test_a_refused_policy_is_a_row_and_if_all_are_it_is_an_error():
    class Clamped(Flow):
        def forward(self, y, t):
            for t_i, dt in rampde_fx.steps(t):
                y = (y + dt * self.velocity(t_i, y)).clamp(-9, 9)
            return y

    compensated = PrecisionPolicy(torch.float16, accumulation="compensated")
    y, t = leaves()
    result = check(Clamped(), y, t, policies=[*FP16, compensated], compiler="eager")
    assert "cannot be accumulated with compensation" in result.rows[-1].refusal and "was refused" in str(result)
    assert result.best(error=1.0) in (*FP16, PrecisionPolicy(torch.float32))
    with pytest.raises(errors.UnsupportedLoopError, match="compensation"):
        check(Clamped(), y, t, policies=[compensated], compiler="eager")


def test_what_cannot_be_checked_is_said():
    def plain(y, t):
        return y * t.sum()

    def broken(y, t):
        torch._dynamo.graph_break()
        return Euler()(y, t)

    def drawn_before(y, t):
        y = torch.dropout(y, 0.5, True)
        for _, dt in rampde_fx.steps(t):
            y = y + dt * torch.dropout(y, 0.5, True)
        return y

    y, t = leaves()
    for function, match in ((plain, "no loop"), (broken, "one graph"), (drawn_before, "outside of its loops")):
        with pytest.raises(errors.CheckError, match=match):
            check(function, y, t, policies=FP16, compiler="eager")
    with pytest.raises(errors.PolicyError, match="policies"):
        check(Euler(), y, t, policies=[])
    with pytest.raises(errors.PolicyError, match="compiler"):
        check(Euler(), y, t, compiler="gcc")


def test_times_are_measured_in_turns():
    y, t = leaves()
    model = Normalized()
    before = kept(model)
    result = check(model, y, t, policies=FP16, time=True, loss=lambda out: out["final"].square().sum())
    assert_kept(model, before)
    assert [row.name for row in result.rows][:2] == ["as it is written, eager", "as it is written, aot_eager"]
    assert all(row.milliseconds > 0 for row in result.rows) and result.rows[0].of_eager == 1
    assert "of compiled" in str(result)


def test_a_velocity_with_derivatives_of_derivatives_inside():
    w = torch.randn(3, 3)

    def energy(x):
        return torch.tanh(x @ w).square().sum()

    def flow(y, t):
        for _, dt in rampde_fx.steps(t):
            curved = torch.func.jvp(torch.func.grad(energy), (y,), (torch.ones_like(y),))[1]
            y = y + dt * curved
        return y

    table = rampde_fx.check(
        flow, torch.randn(4, 3), torch.linspace(0, 1, 3), policies=[PrecisionPolicy(torch.bfloat16)]
    )
    assert 0 < table.rows[-1].error < 0.1


def read_its_counter(y, t):
    for i, (_, dt) in enumerate(rampde_fx.steps(t)):
        y = y + dt * torch.sin(y) * (1 if i < 5 else 2)
    return y


def test_a_loop_that_was_wrongly_captured_once_is_found(monkeypatch):
    """Here the comparison of iterations sees nodes alone, and not the counter that the loop reads."""
    bfloat16 = [PrecisionPolicy(torch.bfloat16)]
    inputs = torch.randn(3, 5), torch.linspace(0, 1, 13)
    assert "captured once" not in rampde_fx.check(read_its_counter, *inputs, policies=bfloat16).structures
    assert "captured once" in rampde_fx.check(Euler(), *inputs, policies=bfloat16).structures

    class Blind(repetition.Picture):
        def __init__(self, *state):
            super().__init__(*state)
            self.word, self.numbers = [], []

    monkeypatch.setattr(repetition, "Picture", Blind)
    with pytest.raises(errors.RewriteMismatchError, match="output"):
        rampde_fx.check(read_its_counter, *inputs, policies=bfloat16)


def test_progress_has_a_line_for_each_policy(capsys, monkeypatch):
    """On stderr, and of itself only at a terminal: nothing is in the way of what a program prints."""
    policies = [PrecisionPolicy(torch.float16), PrecisionPolicy(torch.bfloat16)]
    inputs = torch.randn(3, 5), torch.linspace(0, 1, 4)
    rampde_fx.check(Euler(), *inputs, policies=policies, progress=True)
    out, told = capsys.readouterr()
    lines = told.splitlines()
    assert out == "" and lines[0] == "check: capturing the model"
    for what in ("compiling", "measuring"):
        found = [line for line in lines if line.startswith(f"check: {what}")]
        assert found == [
            f"check: {what} {i} of 3: {name}" for i, name in enumerate(("float32", "float16", "bfloat16"), start=1)
        ]
    rampde_fx.check(Euler(), *inputs, policies=policies[:1])
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    rampde_fx.check(Euler(), *inputs, policies=policies[:1])
    assert "measuring 2 of 2: float16" in capsys.readouterr().err


class AsTorchdiffeq(Flow):
    """An adaptive solve that is far from the solution, so that its steps show."""

    def __init__(self, **options):
        super().__init__(dim=3)
        self.options = options

    def forward(self, y, t):
        def velocity(t, y):
            return 3 * self.velocity(t, y * torch.cos(3 * t))

        return torchdiffeq.odeint(velocity, y, t, rtol=1e-3, atol=1e-4, **self.options)


def test_an_adaptive_solve_takes_the_captured_steps_uncompiled():
    """torchdiffeq's rule for the size of a step is another one: where it shows, it is no fault of the rewrite."""
    inputs, model = (torch.randn(8, 3), torch.linspace(0, 2, 3)), AsTorchdiffeq()
    result = rampde_fx.check(model, *inputs, policies=[PrecisionPolicy(torch.bfloat16)])
    assert not any("steps uncompiled" in note for note in result.notes)
    with compared.comparing() as others:
        as_captured = model(*inputs)
    assert not others and not torch.equal(as_captured, model(*inputs))


def test_what_takes_other_steps_uncompiled_is_told():
    """The user's norm is asked of captured steps by one rule, of uncompiled ones by another."""
    model = AsTorchdiffeq(options={"norm": lambda error: error.abs().max()})
    inputs = torch.randn(8, 3), torch.linspace(0, 2, 3)
    result = rampde_fx.check(model, *inputs, policies=[PrecisionPolicy(torch.bfloat16)])
    assert any("takes other steps uncompiled" in note for note in result.notes)


def test_that_a_step_leaves_no_trace_is_not_timed(monkeypatch):
    now = [0.0]

    @contextlib.contextmanager
    def slow(function):
        now[0] += 100
        yield
        now[0] += 100

    def run():
        now[0] += 1
        return torch.ones(())

    monkeypatch.setattr(check_timing, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(check_timing, "untouched", slow)
    call = SimpleNamespace(function=run)
    steps = check_timing.TrainingSteps(SimpleNamespace(call=call), [], lambda outputs: outputs)
    assert check_timing.medians({"model": steps.of_model(run)}) == {"model": 1.0}


class Recomputing(nn.Module):
    def __init__(self):
        super().__init__()
        self.velocity = Velocity()

    def forward(self, y, t):
        return torchdiffeq.odeint_adjoint(self.velocity, y, t, method="rk4")[-1]


def test_code_that_recomputes_in_its_backward_is_the_reference_in_float64_too():
    """Its backward calls the velocity: on the copies in float64, as its forward does."""
    inputs = torch.randn(6, 5), torch.linspace(0, 1, 4)
    result = rampde_fx.check(Recomputing(), *inputs, policies=[PrecisionPolicy(torch.float16)], compiler="aot_eager")
    assert "in float64 the rewrite agrees with the model to rounding" in str(result) and "note" not in str(result)


def solved_adaptively(y, t):
    return rampde_fx.odeint(lambda t, y: torch.sin(y) * t, y, t, method="dopri5", rtol=1e-2, atol=1e-2)[-1]


def collected(y, t):
    return rampde_fx.torchdiffeq.odeint(lambda t, y: torch.sin(y), y, t, method="rk4", options={"step_size": 0.25})[-1]


@pytest.mark.parametrize("model", [Euler(), solved_adaptively, collected], ids=["steps", "adaptive", "step_size"])
def test_the_gradient_of_times_that_require_none_counts_for_no_error(model):
    """A state of one dimension looks like times, and is none."""
    state = torch.linspace(0.5, 1.5, 5) if model is solved_adaptively else torch.randn(8, 5)
    t = torch.linspace(0, 1, 4)
    result = check(model, state, t, policies=FP16, compiler="eager")
    for row in result.rows:
        assert row.untrained == {"t"} and "t" in row.gradient_errors and row.worst_gradient != "t"
        assert row.gradient_error == max(error for name, error in row.gradient_errors.items() if name != "t")
    assert "note: the gradient of t is not among 'gradients'" in str(result)
    trained = check(model, state, t.requires_grad_(), policies=FP16, compiler="eager")
    assert all(not row.untrained for row in trained.rows) and "the gradient of t" not in str(trained)
    assert trained.rows[-1].gradient_error >= trained.rows[-1].gradient_errors["t"]


def test_the_times_of_every_loop_count_for_no_error():
    model, later = Euler(), torch.linspace(1, 2, 4)

    def twice(y, t, later):
        return model(model(y, t), later)

    result = check(twice, torch.randn(8, 5), torch.linspace(0, 1, 4), later, policies=FP16, compiler="eager")
    assert result.rows[0].untrained == {"t", "later"}
