"""Python floats that change between calls: tensors of the loops that read them, or compiled in anew."""

import re
import warnings

import pytest
import torch
from expecttest import TestCase
from torch import nn

import rampde_fx
from rampde_fx import errors
from rampde_fx.backend import rewrite
from rampde_fx.ir import graphs
from rampde_fx.passes.lift_floats import lift_floats
from rampde_fx.torch_private import fake_tensors
from tests.comparison import compiled, gradients, relative_errors
from tests.golden import printed, without_captured_inputs

RATES = (0.5, 0.7, 0.3, 0.9, 0.45)


def of_fixed_steps(self, y, t):
    return rampde_fx.odeint(lambda t, y: self.rate * torch.tanh(self.linear(y)) + self.rate * t, y, t, method="rk4")


def of_a_step_size(self, y, t):
    return rampde_fx.odeint(
        lambda t, y: torch.tanh(self.linear(y)), y, t, method="rk4", options={"step_size": self.rate / 5}
    )


def of_tolerances(self, y, t):
    tolerances = {"rtol": self.rate * 1e-6, "atol": self.rate * 1e-6}
    return rampde_fx.odeint(lambda t, y: self.rate * torch.tanh(self.linear(y)), y, t, method="dopri5", **tolerances)


def of_a_controller(self, y, t):
    options = {"first_step": self.rate / 5, "safety": self.rate, "ifactor": 4 + self.rate, "dfactor": self.rate / 3}
    tolerances = {"rtol": 1e-5, "atol": 1e-5}
    return rampde_fx.odeint(
        lambda t, y: torch.tanh(self.linear(y)), y, t, method="tsit5", **tolerances, options=options
    )


def of_steps(self, y, t):
    for t_i, dt in rampde_fx.steps(t):
        y = y + dt * (self.rate * torch.tanh(self.linear(y)) - self.rate**2 * t_i)
    return y


def of_the_index(self, y, t):
    for i, (_, dt) in enumerate(rampde_fx.steps(t)):
        y = y + dt * torch.tanh(self.linear(y)) * (self.rate * (i + 1))
    return y


def of_an_update_in_place(self, y, t):
    for _, dt in rampde_fx.steps(t):
        y = y + dt * torch.sigmoid(self.linear(y)) ** self.rate
        y *= self.rate
    return y


def of_other_names(self, y, t):
    for _, dt in rampde_fx.steps(t):
        y = torch.subtract(y, dt * torch.tanh(self.linear(y)), alpha=2 * self.rate)
        y.multiply_(self.rate)
    return y


def of_alpha(self, y, t):
    for _, dt in rampde_fx.steps(t):
        y = torch.add(y, dt * torch.tanh(self.linear(y)), alpha=2 * self.rate)
    return y


def of_a_condition(self, y, t):
    for _, dt in rampde_fx.steps(t):
        y = y + dt * torch.where(y > self.rate, self.linear(y), 1 / self.rate)
    return y


def of_a_checkpointed_part(self, y, t):
    return torch.utils.checkpoint.checkpoint(lambda y, t: of_steps(self, y, t), y, t, use_reentrant=False)


def of_a_slope(self, y, t):
    return rampde_fx.odeint(lambda t, y: nn.functional.leaky_relu(self.linear(y), self.rate), y, t, method="rk4")


def of_a_bound(self, y, t):
    for _, dt in rampde_fx.steps(t):
        y = y + dt * torch.clamp(self.linear(y), max=self.rate)
    return y


def of_a_branch(self, y, t):
    factor = 2.0 if self.rate > 0.6 else self.rate
    for _, dt in rampde_fx.steps(t):
        y = y + dt * factor * torch.tanh(self.linear(y))
    return y


LIFTED = [
    of_fixed_steps,
    of_a_step_size,
    of_tolerances,
    of_a_controller,
    of_steps,
    of_the_index,
    of_an_update_in_place,
    of_other_names,
    of_alpha,
    of_a_condition,
    of_a_checkpointed_part,
]
COMPILED_IN = [of_a_slope, of_a_bound, of_a_branch]


class Rated(nn.Module):
    def __init__(self, form):
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.form, self.rate = nn.Linear(4, 4), form, RATES[0]

    def forward(self, y, t):
        return self.form(self, y, t)


@pytest.fixture
def rewritten(monkeypatch):
    """One entry for each graph that was rewritten to the end."""
    done = []

    def counted(graph_module):
        loops = rewrite(graph_module)
        done.append(loops)
        return loops

    monkeypatch.setattr(rampde_fx.backend, "rewrite", counted)
    return done


def check(form, rewritten, dtype=torch.float32, bound=2e-6, **options):
    """Values and gradients of five calls with as many values, against float64; how many graphs were rewritten."""
    model, wide = Rated(form), Rated(form).double()
    run = compiled(model, dtype, **options)
    y, t = torch.linspace(-1, 1, 8).reshape(2, 4), torch.linspace(0, 1, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing may run uncompiled
        for rate in RATES:
            model.rate = wide.rate = rate
            wanted = [x.float() for x in gradients(wide, wide, y.double(), t.double())]
            rounding = relative_errors(gradients(model, model, y, t), wanted)  # of t it is large: terms cancel
            found = relative_errors(gradients(run, model, y, t), wanted)
            assert all(off < max(bound, 2 * of_float32) for off, of_float32 in zip(found, rounding, strict=True))
    return len(rewritten)


@pytest.mark.parametrize("form", LIFTED)
def test_two_compilations_serve_all_values(form, rewritten):
    """The first one has the number as it is: Dynamo takes it for a constant until it changes."""
    assert check(form, rewritten) == 2


@pytest.mark.parametrize("form", COMPILED_IN)
def test_what_takes_numbers_alone_is_compiled_anew(form, rewritten):
    assert 2 < check(form, rewritten) <= len(RATES)


@pytest.mark.parametrize("form", [of_fixed_steps, of_steps, of_alpha])
def test_in_half_precision(form, rewritten):
    """A number keeps its digits beside low values: a dozen roundings to float16, here and there."""
    assert check(form, rewritten, torch.float16, bound=12 * 2.0**-11) == 2


def test_another_most_number_of_steps():
    class Bounded(nn.Module):
        def forward(self, y, t):
            return rampde_fx.odeint(
                lambda t, y: -y, y, t, method="bosh3", rtol=1e-3, atol=1e-6, options={"max_steps": self.most}
            )

    model = Bounded()
    run = compiled(model, torch.float32)
    y, t = torch.ones(3), torch.linspace(0, 1, 3)
    for model.most in (50, 100, 4096):
        torch.testing.assert_close(run(y, t), model(y, t))
    model.most = 2
    with pytest.raises(errors.StepSizeError, match="with 2 steps"):
        run(y, t)


def growth(self, y, t):
    for t_i, dt in rampde_fx.steps(t):
        y = y + dt * (self.rate * y - self.rate**2 * t_i)
    return y


def captured_with_a_float(function):
    """What the function returns for the graph of the second call, in which the rate is symbolic."""
    found = []

    def backend(graph_module, _):
        with fake_tensors.fake_mode_of(graph_module):
            found.append(function(graphs.copied(graph_module)))
        return graph_module.forward

    model = rampde_fx.mixed_precision(Rated(growth), dtype=torch.float32)
    run = torch.compile(model, backend=backend, fullgraph=True)
    for model.rate in RATES[:2]:
        run(torch.zeros(2, 4), torch.linspace(0, 1, 3))
    return found[-1]


def lifted(graph_module):
    lift_floats(graph_module)
    graph_module.graph.lint()
    graph_module.recompile()
    return graph_module


def shown(graph_module):
    """The graph without its inputs, its policy, and the names of its symbols, which count up."""
    text = re.sub(r'"Sym\([^"]*"', '"Sym"', without_captured_inputs(printed(graph_module)))
    return re.sub(r"'{.*}'", "policy", text)


class TestLiftFloats(TestCase):
    maxDiff = None

    def test_the_graph_before(self):
        self.assertExpectedInline(
            captured_with_a_float(shown),
            """\
class GraphModule(torch.nn.Module):
        step = rampde_fx.step(l_args_2_, 0, 'float32')
        t_i: "f32[]" = step[0]
        dt: "f32[]" = step[1]
        item: "Sym" = l_args_0_rate.item()
        mul: "f32[2, 4]" = item * l_args_1_
        pow_1: "Sym" = item ** 2
        mul_1: "f32[]" = pow_1 * t_i
        sub: "f32[2, 4]" = mul - mul_1
        mul_2: "f32[2, 4]" = dt * sub
        y: "f32[2, 4]" = l_args_1_ + mul_2
        step_1 = rampde_fx.step(l_args_2_, 1, 'float32')
        t_i_1: "f32[]" = step_1[0]
        dt_1: "f32[]" = step_1[1]
        mul_3: "f32[2, 4]" = item * y
        mul_4: "f32[]" = pow_1 * t_i_1
        sub_1: "f32[2, 4]" = mul_3 - mul_4
        mul_5: "f32[2, 4]" = dt_1 * sub_1
        y_1: "f32[2, 4]" = y + mul_5
        end: "f32[]" = rampde_fx.end(l_args_2_)
        return (y_1,)
""",
        )

    def test_the_graph_after(self):
        text = captured_with_a_float(lambda graph_module: shown(lifted(graph_module)))
        self.assertExpectedInline(
            text,
            """\
class GraphModule(torch.nn.Module):
        item: "Sym" = l_args_0_rate.item()
        zeros: "f64[]" = torch.zeros((), dtype = torch.float64)
        add: "f64[]" = torch.add(zeros, item)
        to: "f32[]" = add.to(device(type='cpu'), torch.float32)
        pow_1: "Sym" = item ** 2
        zeros_1: "f64[]" = torch.zeros((), dtype = torch.float64)
        add_1: "f64[]" = torch.add(zeros_1, pow_1)
        to_1: "f32[]" = add_1.to(device(type='cpu'), torch.float32)
        step = rampde_fx.step(l_args_2_, 0, 'float32')
        t_i: "f32[]" = step[0]
        dt: "f32[]" = step[1]
        mul: "f32[2, 4]" = to * l_args_1_
        mul_1: "f32[]" = to_1 * t_i
        sub: "f32[2, 4]" = mul - mul_1
        mul_2: "f32[2, 4]" = dt * sub
        y: "f32[2, 4]" = l_args_1_ + mul_2
        step_1 = rampde_fx.step(l_args_2_, 1, 'float32')
        t_i_1: "f32[]" = step_1[0]
        dt_1: "f32[]" = step_1[1]
        mul_3: "f32[2, 4]" = to * y
        mul_4: "f32[]" = to_1 * t_i_1
        sub_1: "f32[2, 4]" = mul_3 - mul_4
        mul_5: "f32[2, 4]" = dt_1 * sub_1
        y_1: "f32[2, 4]" = y + mul_5
        end: "f32[]" = rampde_fx.end(l_args_2_)
        return (y_1,)
""",
        )

    def test_a_second_application_changes_nothing(self):
        texts = captured_with_a_float(lambda g: (printed(lifted(g)), printed(lifted(g))))
        self.assertEqual(*texts)


def test_a_number_that_a_step_reads_from_a_tensor_is_left(rewritten):
    """It changes from step to step: neither a tensor from outside nor a constant."""
    torch._dynamo.reset()

    @rampde_fx.mixed_precision(dtype=torch.float32)
    def flow(y, t):
        for _, dt in rampde_fx.steps(t):
            y = y - dt * y.mean().item() * y
        return y

    run = torch.compile(flow, backend="rampde_fx", options={"compiler": "eager"}, fullgraph=True)
    with torch._dynamo.config.patch(capture_scalar_outputs=True), pytest.raises(errors.RampdeError):
        run(torch.ones(3), torch.linspace(0, 1, 4))
    assert not rewritten
