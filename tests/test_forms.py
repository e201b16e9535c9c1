"""Every spelling of the update, rewritten, against eager fp32."""

import copy

import pytest
import torch

import rampde_fx
from tests.comparison import compiled, gradients, relative_errors
from tests.models import FORMS, RK4, Euler, Flow, LogDensity, Midpoint, MutatedArgument, Symplectic, Velocity

# Relative errors in the norm, in unit roundoffs: 5 for everything but t, whose gradient is a sum over batch and state
# in which terms of both signs cancel.
BOUNDS = {dtype: (5 * u, 40 * u) for dtype, u in ((torch.float16, 2**-11), (torch.bfloat16, 2**-8))}
BOUNDS[torch.float32] = (1e-6, 1e-6)


def check(model, dtype, y, t, *, outputs, **policy):
    reference = copy.deepcopy(model)
    got = gradients(compiled(model, dtype, **policy), model, y, t)
    errors = relative_errors(got, gradients(reference, reference, y, t))
    time = len(outputs) + 1
    bound, time_bound = BOUNDS[dtype]
    assert max(errors[:time] + errors[time + 1 :]) < bound, errors
    assert errors[time] < time_bound, errors


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_form_agrees_with_eager(form, dtype):
    model = form()
    y, t = torch.randn(16, model.dim), torch.linspace(0, 1, 5)
    outputs = torch.utils._pytree.tree_leaves(model(y, t))
    compiler = "aot_eager" if dtype is torch.float16 else "eager"  # the same graph, one dtype through AOTAutograd
    check(model, dtype, y, t, outputs=outputs, compiler=compiler)


@pytest.mark.parametrize("loop", ["scan", "unroll"])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_short_loops_agree_with_eager_in_both_emissions(steps, loop):
    y, t = torch.randn(16, 5), torch.linspace(0, 1, steps + 1)
    check(RK4(), torch.float16, y, t, outputs=[y], loop=loop)


@pytest.mark.parametrize("form", [Midpoint, RK4], ids=lambda form: form.__name__)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float16, 2e-3), (torch.bfloat16, 1e-2)], ids=str)
def test_32_steps_of_three_layers_reach_the_stated_accuracy_t_included(form, dtype, bound):
    model = form(dim=16, width=64, layers=3)
    reference = copy.deepcopy(model)
    y, t = torch.randn(64, 16), torch.linspace(0, 1, 33)
    got = gradients(compiled(model, dtype), model, y, t)
    assert max(relative_errors(got, gradients(reference, reference, y, t))) < bound


@pytest.mark.parametrize("form", [Euler, RK4], ids=lambda form: form.__name__)
def test_fp64_passes_gradcheck(form):
    model = compiled(form().double(), torch.float64)
    y = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    t = torch.linspace(0, 1, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(model, (y, t))


@pytest.mark.parametrize("t", [torch.linspace(1, 0, 5), torch.linspace(0, 1, 5, dtype=torch.float64)], ids=str)
def test_time_grid_may_run_backward_and_be_wider_than_the_state(t):
    class Autonomous(Flow):
        def forward(self, y, t):
            for t_i, dt in rampde_fx.steps(t):
                y = y + dt * torch.tanh(self.velocity.linear[1](y) + t_i)
            return y

    y = torch.randn(16, 7)
    check(Autonomous(dim=7), torch.float16, y, t, outputs=[y])


def test_a_context_added_in_every_step_is_not_taken_for_the_state():
    force = torch.ones(16, 5)

    class Forced(Flow):
        def forward(self, y, t):
            for t_i, dt in rampde_fx.steps(t):
                y = force * dt + y + dt * self.velocity(t_i, y)
            return y

    y, t = torch.randn(16, 5), torch.linspace(0, 1, 2)
    check(Forced(), torch.float16, y, t, outputs=[y])
    (loop,) = rampde_fx.explain(rampde_fx.mixed_precision(Forced(), dtype=torch.float16), y, t).loops
    assert loop.evaluations == 1 and loop.carries == ("y: float32[16, 5]",)


def test_loss_scaled_by_1e_8_gives_the_same_relative_gradients():
    model = RK4()
    y, t = torch.randn(64, 5), torch.linspace(0, 1, 9)
    function = compiled(model, torch.float16)
    large = gradients(function, model, y, t)
    small = gradients(function, model, y, t, loss_scale=1e-8)
    assert max(relative_errors([1e8 * g for g in small[1:]], large[1:])) < 1e-3
    unscaled = gradients(compiled(copy.deepcopy(model), torch.float16, scaling="none"), model, y, t, loss_scale=1e-8)
    assert all(g.count_nonzero() == 0 for g in unscaled[3:])  # what happens without: underflow


@pytest.mark.parametrize("steps", [1, 4])
def test_argument_updated_in_place_holds_the_final_state(steps):
    model = MutatedArgument()
    y, t = torch.randn(16, 5), torch.linspace(0, 1, steps + 1)
    wanted, got = y.clone(), y.clone()
    result = model(wanted, t)
    assert torch.allclose(compiled(model, torch.float32)(got, t), result, rtol=1e-6)
    assert torch.allclose(got, wanted, rtol=1e-6)
    assert not torch.equal(got, y)


def test_decorates_class_instance_and_function():
    @rampde_fx.mixed_precision(dtype=torch.bfloat16)
    class Decorated(Euler):
        def forward(self, y, t):
            return super().forward(y, t)

    velocity = Velocity()

    @rampde_fx.mixed_precision(dtype=torch.float16)
    def function(y, t):
        for t_i, dt in rampde_fx.steps(t):
            y = y + dt * velocity(t_i, y)
        return y

    instance = Euler()
    keys = list(instance.state_dict())
    marked = rampde_fx.mixed_precision(instance, dtype=torch.float32)
    assert marked is instance and isinstance(marked, Euler) and list(marked.state_dict()) == keys
    y, t = torch.randn(3, 5), torch.linspace(0, 1, 3)
    wanted = {Decorated(): torch.bfloat16, function: torch.float16, copy.deepcopy(marked): torch.float32}
    for target, dtype in wanted.items():
        assert rampde_fx.explain(target, y, t).loops[0].policy.velocity is dtype
        assert torch.equal(target(y, t), target(y, t))


def test_marked_instance_pickles():
    import pickle

    marked = rampde_fx.mixed_precision(Euler(), dtype=torch.bfloat16)
    again = pickle.loads(pickle.dumps(marked))
    y, t = torch.randn(3, 5), torch.linspace(0, 1, 3)
    assert torch.equal(again(y, t), marked(y, t))
    assert rampde_fx.explain(again, y, t).loops[0].policy.velocity is torch.bfloat16


def test_frozen_parameters_get_no_gradient_and_none_is_computed():
    model = Midpoint()
    model.velocity.linear[0].requires_grad_(False)
    y, t = torch.randn(16, 5), torch.linspace(0, 1, 5)
    check(model, torch.float16, y, t, outputs=[y])
    assert model.velocity.linear[0].weight.grad is None
    report = rampde_fx.explain(model, y, t)
    shapes = {
        tuple(node.meta["val"].shape) for node in report.loops[0].adjoint.graph.find_nodes(op="output")[0].args[0]
    }
    # The adjoint, the last layer's weight and bias, and how many entries vanished.
    assert shapes == {(16, 5), (5, 7), (5,), ()}


def test_nothing_is_stored_without_gradients():
    model = Midpoint()
    y, t = torch.randn(16, 5), torch.linspace(0, 1, 5)
    with torch.no_grad():
        report = rampde_fx.explain(rampde_fx.mixed_precision(model, dtype=torch.float16), y, t)
        assert report.loops[0].stored_bytes == 0 and report.loops[0].adjoint is None
        assert torch.allclose(compiled(model, torch.float16)(y, t), model(y, t), rtol=1e-3, atol=1e-4)


class ExactDensity(Flow):
    """The divergence as a trace, in reverse or in forward mode under vmap."""

    jacobian = staticmethod(torch.func.jacrev)

    def forward(self, z, t):
        logp = torch.zeros(z.shape[0])
        for t_i, dt in rampde_fx.steps(t):
            matrix = torch.func.vmap(self.jacobian(lambda x, t_i=t_i: self.velocity(t_i, x[None])[0]))(z)
            logp = logp - dt * matrix.diagonal(dim1=1, dim2=2).sum(1)
            z = z + dt * self.velocity(t_i, z)
        return z, logp


class ForwardDensity(ExactDensity):
    jacobian = staticmethod(torch.func.jacfwd)


DIFFERENTIATING = [LogDensity, Symplectic, ExactDensity, ForwardDensity]


@pytest.mark.parametrize("form", DIFFERENTIATING, ids=lambda form: form.__name__)
@pytest.mark.parametrize("grad", [torch.no_grad, torch.inference_mode], ids=lambda mode: mode.__name__)
def test_a_velocity_that_differentiates_is_evaluated_without_gradients(form, grad):
    """A density is evaluated under no_grad; what torch.func makes in the velocity is no less wanted there."""
    model = form()
    y, t = torch.randn(16, 5), torch.linspace(0, 1, 5)
    with torch.no_grad():  # under inference_mode uncompiled torch 2.11 gives derivatives of torch.func that are 0
        wanted = model(y, t)
    with grad():
        for dtype, bound in ((torch.float32, 1e-6), (torch.float16, BOUNDS[torch.float16][0])):
            torch._dynamo.reset()
            got = compiled(model, dtype)(y, t)
            assert max(relative_errors(list(got), list(wanted))) < bound


def test_states_come_back_in_the_users_dtype_beyond_the_range_of_fp16():
    @rampde_fx.mixed_precision(dtype=torch.float16)
    def grow(y, t):
        states = []
        for _, dt in rampde_fx.steps(t):
            y = y + dt * torch.sin(y)
            states.append(y)
        return torch.stack(states)

    y, t = torch.full((3,), 1e6), torch.linspace(0, 1, 5)
    function = torch.compile(grow, backend="rampde_fx", options={"compiler": "aot_eager"})
    assert function(y, t).dtype is torch.float32
    assert function(y, t).isfinite().all() or not torch.isfinite(torch.sin(y.half())).all()


def test_small_increments_are_not_lost():
    """dt = dy = 1e-4: in an fp16 state ten thousand steps never move; here they sum up to 1."""

    @rampde_fx.mixed_precision(dtype=torch.float16)
    def line(y, t):
        for _, dt in rampde_fx.steps(t):
            y = y + dt * torch.cos(0 * y)
        return y

    function = torch.compile(line, backend="rampde_fx", options={"compiler": "aot_eager"})
    y = torch.ones(4)
    for _ in range(100):
        y = function(y, torch.linspace(0, 0.01, 101))
    assert torch.allclose(y, torch.full((4,), 2.0), rtol=1e-4)
