"""What cannot be rewritten raises a typed error that names the user's line; what is irrelevant comes out unchanged."""

import copy
import pickle
import re
import traceback
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import rampde_fx
from rampde_fx import errors
from tests import models
from tests.comparison import compiled
from tests.models import Euler, Flow, Midpoint, Velocity

Y, T = torch.ones(4, 5), torch.linspace(0, 1, 4)


def refused(model, kind, *, line, y=Y, t=T, fix=""):
    """The error that compiled and explained models raise; the message names the line."""
    with pytest.raises(kind) as raised:
        compiled(model, torch.float16)(y, t)
    message = str(raised.value)
    assert "test_refusals.py" in message and line in message, message
    assert "required:" in message and fix in message.partition("fix:")[2]
    assert "fix:" in message
    with pytest.raises(kind):
        rampde_fx.explain(model, y, t)


class Widening(Flow):
    def forward(self, y, t):
        for t_i, dt in rampde_fx.steps(t):
            y = (y + dt * self.velocity(t_i, y.float())).double()
        return y


class Halving(Flow):
    def forward(self, y, t):
        for t_i, dt in rampde_fx.steps(t):
            y = (y + dt * self.velocity(t_i, y)).half()
        return y


def test_the_advice_on_casts_of_the_users():
    refused(Halving(), errors.StateChangeError, line="y = (y + dt", fix="leave half() and casts out")
    refused(Widening(), errors.StateChangeError, line="y = (y + dt", fix="to its final shape and dtype")


class Growing(Flow):
    def forward(self, y, t):
        y = y[:1]
        for _, dt in rampde_fx.steps(t):
            y = y + dt * torch.tanh(y) + torch.zeros(4, 5)
        return y


class BroadcastAtFirst(Flow):
    """The velocity tells the sizes apart: a run of one step, and one of the others."""

    def forward(self, y, t):
        y = y[:1]
        for t_i, dt in rampde_fx.steps(t):
            y = y + dt * self.velocity(t_i, y) + torch.zeros(4, 5)
        return y


class Half(Flow):
    def forward(self, y, t):
        y = y.half()
        for t_i, dt in rampde_fx.steps(t):
            y = (y + dt * self.velocity(t_i, y.float())).relu().half()
        return y


class HalfVelocityCarried(Flow):
    """A two-step method whose velocity of the step before is fp16: not a state."""

    def forward(self, y, t):
        before = self.velocity(t[0], y).half()
        for t_i, dt in rampde_fx.steps(t):
            k = self.velocity(t_i, y).half()
            y = y + dt * (1.5 * k.float() - 0.5 * before.float())
            before = k
        return y


class CollectedInPlace(Flow):
    def forward(self, y, t):
        states, y = [], y.clone()
        for t_i, dt in rampde_fx.steps(t):
            y += dt * self.velocity(t_i, y)
            states.append(y)
        return torch.stack(states)


class Break(Flow):
    def forward(self, y, t):
        for i, (t_i, dt) in enumerate(rampde_fx.steps(t)):
            y = y + dt * self.velocity(t_i, y)
            if i == 1:
                break
        return y


class Nested(Flow):
    def forward(self, y, t):
        for _, dt in rampde_fx.steps(t):
            for t_i, h in rampde_fx.steps(t):
                y = y + dt * h * self.velocity(t_i, y)
        return y


def test_state_that_changes_dtype():
    refused(Widening(), errors.StateChangeError, line=".double()")


def test_state_that_changes_shape():
    refused(Growing(), errors.StateChangeError, line="+ torch.zeros(4, 5)")


def test_state_whose_first_step_alone_changes_its_shape_is_fine():
    model = BroadcastAtFirst()
    assert torch.allclose(compiled(model, torch.float32)(Y, T), model(Y, T), rtol=1e-6)
    assert [
        loop.steps for loop in rampde_fx.explain(rampde_fx.mixed_precision(model, dtype=torch.float16), Y, T).loops
    ] == [1, 2]


@pytest.mark.parametrize("points", [2, 4])
def test_state_in_half_precision(points):
    t = torch.linspace(0, 1, points)
    refused(Half(), errors.StateChangeError, line=".relu().half()", t=t)


def test_carried_velocity_in_half_precision_is_fine():
    model = HalfVelocityCarried()
    assert torch.allclose(compiled(model, torch.float32)(Y, T), model(Y, T), rtol=1e-5)


def test_in_place_updated_states_collected_without_clone():
    refused(CollectedInPlace(), errors.MutationError, line="y += dt * self.velocity(t_i, y)")


def test_loop_left_early():
    refused(Break(), errors.UnsupportedLoopError, line="in enumerate(rampde_fx.steps(t))")


def test_nested_loops():
    refused(Nested(), errors.UnsupportedLoopError, line="in rampde_fx.steps(t)")


def over_one_grid(y, t):
    for _, dt in rampde_fx.steps(t):
        for _, h in rampde_fx.steps(t):
            y = y - dt * h * torch.tanh(y)
    return y


def left_by_a_return(y, t):
    for _, dt in rampde_fx.steps(t):
        y = y - dt * torch.tanh(y)
        if y.shape[0] > 1:
            return y
    return y


@pytest.mark.parametrize(
    ("function", "found", "fix"),
    [
        (over_one_grid, "a nested loop", "leave the inner one unmarked"),
        (left_by_a_return, "by a break or a return", ""),
    ],
)
def test_what_ends_a_loop_before_its_end_is_told(function, found, fix):
    with pytest.raises(errors.UnsupportedLoopError, match=found) as caught:
        compiled(function, torch.float32)(Y, T)
    assert fix in str(caught.value)


class Counts(nn.Module):
    def __init__(self, start):
        super().__init__()
        self.layer = nn.Linear(5, 5)
        self.register_buffer("count", start)

    def forward(self, y, t):
        for _, dt in rampde_fx.steps(t):
            self.count.add_(1)
            y = y + dt * torch.tanh(self.layer(y)) / self.count.to(y)
        return y


@pytest.mark.parametrize("start", [torch.zeros(()), torch.zeros(1).double(), torch.zeros((), dtype=torch.int64)])
def test_a_count_in_place(start):
    model = Counts(start)
    plain = copy.deepcopy(model)
    torch.testing.assert_close(compiled(model, torch.float32)(Y, T), plain(Y, T))
    assert model.count == plain.count == len(T) - 1


@pytest.mark.skipif(torch.__version__ >= (2, 14), reason="torch.compile keeps what is written to such a number")
def test_a_count_that_torch_compile_would_lose():
    refused(Counts(torch.zeros((), dtype=torch.float64)), errors.MutationError, line="self.count.add_(1)")


def integrated(velocity, y, t, method):
    return rampde_fx.odeint(velocity, y, t, method=method)[-1]


def round_an_odeint(y, t, method):
    for t_i, dt in rampde_fx.steps(t):
        y = integrated(lambda s, y: -y, y, torch.stack([t_i, t_i + dt]), method)
    return y


def in_an_odeint(y, t, method):
    return integrated(lambda s, y: integrated(lambda r, z: -z, y, t, method), y, t, method)


@pytest.mark.parametrize("method", ["rk4", "bosh3"])
@pytest.mark.parametrize(
    ("nested", "fix"), [(round_an_odeint, "range(t.shape[0] - 1): y = odeint"), (in_an_odeint, "is not marked")]
)
def test_an_odeint_inside_of_another_loop(nested, fix, method):
    function = compiled(lambda y, t: nested(y, t, method), torch.float32)
    with pytest.raises(errors.UnsupportedLoopError, match="an odeint begins before") as caught:
        function(Y, T)
    assert fix in caught.value.fix
    assert "test_refusals.py" in caught.value.where


@pytest.mark.parametrize("method", ["rk4", "bosh3"])
def test_the_unmarked_loop_round_an_odeint_that_is_advised(method):
    def advised(y, t):
        for i in range(t.shape[0] - 1):
            y = integrated(lambda s, y: -y, y, t[i : i + 2], method)
        return y

    assert torch.allclose(compiled(advised, torch.float32)(Y, T), advised(Y, T), rtol=1e-5)


def test_the_unmarked_loop_in_a_velocity_that_is_advised():
    def advised(y, t):
        def velocity(s, y):
            for i in range(len(t) - 1):
                y = y - (t[i + 1] - t[i]) * y
            return y

        return integrated(velocity, y, t, "rk4")

    assert torch.allclose(compiled(advised, torch.float32)(Y, T), advised(Y, T), rtol=1e-5)


def test_nested_loops_of_which_one_is_checkpointed():
    class Checkpointed(Flow):
        def inner(self, y, t):
            for _, dt in rampde_fx.steps(t):
                y = y + dt * torch.tanh(y)
            return y

        def forward(self, y, t):
            for _, dt in rampde_fx.steps(t):
                y = y + dt * checkpoint(self.inner, y, t, use_reentrant=False)
            return y

    refused(Checkpointed(), errors.UnsupportedLoopError, line="in rampde_fx.steps(t)", y=Y.clone().requires_grad_())


def test_loop_without_a_policy():
    with pytest.raises(errors.UnsupportedLoopError, match="mixed_precision"):
        torch.compile(Euler(), backend="rampde_fx", options={"compiler": "aot_eager"})(Y, T)


def test_loop_inside_a_functional_transform():
    velocity = Velocity()

    @rampde_fx.mixed_precision(dtype=torch.float16)
    def divergence(y, t):
        def flow(y):
            for t_i, dt in rampde_fx.steps(t):
                y = y + dt * velocity(t_i, y)
            return y

        return torch.func.vjp(flow, y)[1](torch.ones_like(y))[0]

    with pytest.raises(errors.UnsupportedLoopError, match=r"torch\.func"):
        torch.compile(divergence, backend="rampde_fx", options={"compiler": "aot_eager"})(Y, T)


def test_gradients_turned_off_inside_a_transform_under_no_grad():
    """The surrounding mode and the transform's are then hard to tell apart; detach() says the same."""

    class Partial(Flow):
        def forward(self, y, t):
            def potential(z):
                with torch.no_grad():
                    weight = torch.sin(z)
                return (weight * z.square()).sum()

            for _, dt in rampde_fx.steps(t):
                y = y - dt * torch.func.grad(potential)(y)
            return y

    with torch.no_grad():
        refused(Partial(), errors.UnsupportedLoopError, line="weight = torch.sin(z)")


class InAutocast(Flow):
    def forward(self, y, t):
        for _, dt in rampde_fx.steps(t):
            with torch.autocast("cpu", torch.bfloat16):
                k = torch.tanh(y)
            y = y + dt * k
        return y


def test_autocast_in_a_step():
    """What enters it has no line; what is inside of it has one."""
    refused(InAutocast(), errors.UnsupportedLoopError, line="k = torch.tanh(y)", fix="leave it out")


@pytest.mark.parametrize("form", [Euler, Midpoint])
def test_second_derivative(form):
    function = compiled(form(), torch.float16)
    y = Y.clone().requires_grad_()
    loss = function(y, T).square().sum()
    with pytest.raises(errors.SecondDerivativeError, match="create_graph"):
        torch.autograd.grad(loss, y, create_graph=True)
    (first,) = torch.autograd.grad(function(y, T).square().sum(), y)
    assert first.isfinite().all()


@pytest.mark.parametrize("t", [torch.tensor([1.0]), torch.zeros(2, 2), torch.arange(3), [0.0, 1.0]])
def test_time_grid(t):
    with pytest.raises(errors.TimeGridError, match="floating 1-D tensor"):
        next(rampde_fx.steps(t))


def with_grad(y, t):
    for _, dt in rampde_fx.steps(t):
        rate = torch.tanh(y)
        y = y + dt * torch.autograd.grad(rate, y, rate, create_graph=True)[0]
    return y


def with_grad_behind_a_break(y, t):
    start = y
    for _, dt in rampde_fx.steps(t):
        y = y + dt * torch.tanh(y)
        if y.dim() == 2:
            break
    return torch.autograd.grad(y.sum(), start)[0]


def with_backward(y, t):
    for _, dt in rampde_fx.steps(t):
        rate = torch.tanh(y)
        rate.sum().backward(retain_graph=True)
        y = y + dt * rate
    return y


@pytest.mark.parametrize("trace_autograd_ops", [False, True])
@pytest.mark.parametrize(
    ("function", "name"),
    [
        (with_grad, "torch.autograd.grad"),
        (with_grad_behind_a_break, "torch.autograd.grad"),
        (with_backward, "Tensor.backward"),
    ],
)
def test_gradients_in_a_step(function, name, trace_autograd_ops):
    """Not as Dynamo refuses them, with the advice to set an option that does not help."""
    marked = rampde_fx.mixed_precision(function, dtype=torch.float16)
    model = torch.compile(marked, backend="rampde_fx", options={"compiler": "eager"}, fullgraph=True)
    y = Y.clone().requires_grad_()
    message = rf"(?s){re.escape(name)} is called in a step, or behind a loop that was left .*\n  at: .*vjp"
    with (
        torch._dynamo.config.patch(trace_autograd_ops=trace_autograd_ops),
        pytest.raises(errors.UnsupportedLoopError, match=message),
    ):
        model(y, T)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_autograd_grad_in_a_step_of_another_backend(backend):
    compiled(Euler(), torch.float32)(Y, T)  # what Dynamo is taught is there
    y = Y.clone().requires_grad_()
    with torch._dynamo.config.patch(trace_autograd_ops=True), pytest.warns(errors.FullPrecisionWarning):
        marked = rampde_fx.mixed_precision(with_grad, dtype=torch.float16)
        function = torch.compile(marked, backend=backend, fullgraph=True)
        torch.testing.assert_close(function(y, T), with_grad(y, T))


@pytest.mark.parametrize(
    "arguments",
    [
        {"rtol": torch.tensor(1e-3), "method": "rk4"},
        {"rtol": torch.ones(3)},
        {"method": torch.ones(())},
        {"policy": torch.ones(())},
        {"options": torch.ones(())},
        {"options": {"step_size": torch.tensor(0.1)}, "method": "rk4"},
        {"options": {"num_steps": torch.tensor(2)}, "method": "rk4"},
    ],
    ids=str,
)
def test_wrong_arguments_that_are_tensors_under_fullgraph(arguments):
    def solve(y, t):
        return rampde_fx.odeint(lambda t, y: -y, y, t, **arguments)[-1]

    with pytest.raises((errors.OptionError, errors.MethodError, errors.PolicyError)) as caught:
        solve(Y, T)
    marked = rampde_fx.mixed_precision(solve, dtype=torch.float16)
    with pytest.raises(type(caught.value), match="tensor of shape"):
        torch.compile(marked, backend="rampde_fx", options={"compiler": "eager"}, fullgraph=True)(Y, T)


def test_what_ends_a_capture_is_like_any_other_error_of_its_type():
    with pytest.raises(errors.TimeGridError) as caught:
        compiled(Euler(), torch.float32)(Y, T[:1])
    again = pickle.loads(pickle.dumps(caught.value))
    assert type(again) is errors.TimeGridError and str(again) == str(caught.value)
    assert again.where.startswith(str(Path(models.__file__))) and again.fix == caught.value.fix
    frames = traceback.extract_tb(caught.value.__traceback__)
    assert not [frame for frame in frames if frame.filename.endswith(("symbolic_convert.py", "functions.py"))]


def test_time_grid_under_fullgraph():
    with pytest.raises(errors.TimeGridError, match=r"steps.t. was given(.|\n)*floating 1-D tensor"):
        compiled(Euler(), torch.float32)(Y, T[:1])


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"velocity": torch.int32}, "velocity"),
        ({"storage": "half"}, "storage"),
        ({"scaling": "static"}, "scaling"),
        ({"loop": "while"}, "loop"),
    ],
)
def test_policy(settings, field):
    with pytest.raises(errors.PolicyError, match=field):
        rampde_fx.PrecisionPolicy(**settings)


@pytest.mark.parametrize("settings", [{"target": 3.0}, {"target": -1.0}, {"max_attempts": 0}, {"max_attempts": True}])
def test_scaling(settings):
    with pytest.raises(errors.PolicyError, match=next(iter(settings))):
        rampde_fx.AdjointScaling(**settings)


def test_target_of_mixed_precision():
    with pytest.raises(errors.PolicyError, match="Module class"):
        rampde_fx.mixed_precision(3, dtype=torch.float16)
    with pytest.raises(errors.PolicyError, match="either"):
        rampde_fx.mixed_precision(Euler(), dtype=torch.bfloat16, policy=rampde_fx.PrecisionPolicy(torch.float16))


def test_options():
    function = torch.compile(
        rampde_fx.mixed_precision(Euler(), dtype=torch.float16), backend="rampde_fx", options={"compiler": "gcc"}
    )
    with pytest.raises(errors.PolicyError, match="gcc"):
        function(Y, T)


def test_graph_without_a_loop_is_left_alone():
    layer = nn.Linear(5, 3)
    function = torch.compile(layer, backend="rampde_fx", options={"compiler": "aot_eager"}, fullgraph=True)
    assert torch.equal(function(Y), layer(Y))
    report = rampde_fx.explain(layer, Y)
    assert report.loops == () and "nothing is rewritten" in str(report)


def test_error_reads_well_and_pickles():
    import pickle

    error = errors.PolicyError("found this", required="that", fix="do so", where="here.py:1")
    assert str(error) == "found this.\n  at: here.py:1\n  required: that.\n  fix: do so."
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


# Mistakes at the front door


def field(t, y):
    return -y


def in_the_order_of_scipy(y, t):
    return -y


def listed(y, t):
    for t_i, dt in list(rampde_fx.steps(t)):
        y = y + dt * field(t_i, y)
    return y


def backwards(y, t):
    for t_i, dt in reversed(list(rampde_fx.steps(t))):
        y = y - dt * field(t_i, y)
    return y


def any_order(a, b):
    return -a * torch.ones(())


GRID = torch.linspace(0, 1, 5)
MISTAKES = {
    "a dtype by position": (
        lambda: rampde_fx.mixed_precision(torch.float16),
        errors.PolicyError,
        "mixed_precision(torch.float16) was given its setting in place of what it marks.\n"
        "  required: a setting by its name.\n"
        "  fix: write @rampde_fx.mixed_precision(dtype=torch.float16).",
    ),
    "a dtype by its name": (
        lambda: rampde_fx.mixed_precision("bfloat16"),
        errors.PolicyError,
        "mixed_precision('bfloat16') was given its setting in place of what it marks.\n"
        "  required: a setting by its name.\n"
        "  fix: write @rampde_fx.mixed_precision(dtype=torch.bfloat16).",
    ),
    "func and y0": (
        lambda: rampde_fx.odeint(Y, field, GRID),
        errors.StateError,
        "y0 is a function, which can be called.\n"
        "  required: a function of t and y that returns dy/dt, the initial state, the times.\n"
        "  fix: write odeint(func, y0, t), in this order.",
    ),
    "y0 and t": (
        lambda: rampde_fx.odeint(field, GRID, Y),
        errors.TimeGridError,
        "t is a float32 tensor of shape (4, 5), and y0 could be the times.\n"
        "  required: a function of t and y that returns dy/dt, the initial state, the times.\n"
        "  fix: write odeint(func, y0, t), in this order.",
    ),
    "func(y, t)": (
        lambda: rampde_fx.odeint(in_the_order_of_scipy, Y, GRID),
        errors.StateError,
        "func takes (y, t), and is called as func(t, y).\n"
        "  required: the time first, as in torchdiffeq and in scipy's solve_ivp.\n"
        "  fix: write odeint(lambda t, y: func(y, t), y0, t), or let func take (t, y).",
    ),
    "func(y, t) by other names": (
        lambda: rampde_fx.odeint(any_order, Y, GRID),
        errors.StateError,
        "func returns a float32 tensor of shape () as the derivative of a float32 tensor of shape (4, 5); is it "
        "func(y, t)? It is called as func(t, y).\n"
        "  required: a derivative of the structure, shapes and dtypes of y0.\n"
        "  fix: keep y0 in float32 or float64, and return one derivative for each tensor of it, nested as it is, of "
        "its shape and dtype.",
    ),
    "an array": (
        lambda: rampde_fx.odeint(field, Y.numpy(), GRID),
        errors.StateError,
        "y0 holds a ndarray.\n"
        "  required: a floating or complex tensor, or a nested tuple, list or dict of such.\n"
        "  fix: convert integers and float8 by .float(), arrays by torch.from_numpy.",
    ),
    "tolerances of fixed steps": (
        lambda: rampde_fx.odeint(field, Y, GRID, method="rk4", rtol=1e-3),
        errors.OptionError,
        "rtol=0.001 and atol=None beside fixed steps of rk4.\n"
        "  required: tolerances for adaptive steps alone.\n"
        '  fix: leave both out, or write method="dopri5" without num_steps for steps that adapt to them.',
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_told_with_the_whole_text(name):
    call, kind, text = MISTAKES[name]
    with pytest.raises(kind) as caught:
        call()
    assert str(caught.value) == text


def skipping(y, t):
    for i, (_, dt) in enumerate(rampde_fx.steps(t)):
        if i == 1:
            continue
        y = y + dt * torch.tanh(y)
    return y


@pytest.mark.parametrize("function", [listed, backwards, skipping])
def test_steps_in_which_nothing_is_computed(function):
    with pytest.raises(errors.StateChangeError, match="read without computing with them, as list") as caught:
        compiled(function, torch.float16)(Y, GRID)
    assert "rampde_fx.steps(t)" in caught.value.where and "iterate over steps(t) itself" in caught.value.fix


@pytest.mark.parametrize("is_module", [True, False])
def test_marked_after_it_is_compiled(is_module):
    model = Euler()
    made = torch.compile(model if is_module else model.forward, backend="rampde_fx", options={"compiler": "aot_eager"})
    y, t = torch.randn(8, 5), torch.linspace(0, 1, 5)
    wanted = compiled(copy.deepcopy(model), torch.bfloat16)(y, t)
    torch._dynamo.reset()
    assert torch.equal(rampde_fx.mixed_precision(made, dtype=torch.bfloat16)(y, t), wanted)


def test_the_package_as_the_backend():
    model = Euler()
    y, t = torch.randn(8, 5), torch.linspace(0, 1, 9)
    wanted = compiled(model, torch.bfloat16)(y, t)
    torch._dynamo.reset()
    made = torch.compile(model, backend=rampde_fx, options={"compiler": "aot_eager"}, fullgraph=True)
    assert torch.equal(made(y, t), wanted)


def of_two_dtypes(velocity):
    """A loop whose velocity reads the state and a weight of another dtype."""

    def solve(y, w, t):
        for _, dt in rampde_fx.steps(t):
            y = y + dt * velocity(y, w).to(y.dtype)
        return y

    return rampde_fx.mixed_precision(solve, dtype=torch.float16)


MIXED = {  # which fake tensors take
    "product": lambda y, w: torch.tanh(y @ w),
    "layer": lambda y, w: nn.functional.linear(y, w, w[0]),
    "vector": lambda y, w: (w @ y[0])[None],
    "fused": lambda y, w: torch.addmm(y, y, w),
    "norm": lambda y, w: nn.functional.layer_norm(y, (5,), w[0]),
}
PROMOTED = {
    "sum": lambda y, w: y + w[0],
    "cat": lambda y, w: torch.cat([y, w])[:4],
    "where": lambda y, w: torch.where(y > 0, y, w[0]),
    "cast": lambda y, w: y.to(w.dtype) @ w,
}


@pytest.mark.parametrize("state, weight", [("float64", "float32"), ("float32", "float16"), ("float32", "float64")])
@pytest.mark.parametrize("name", [*MIXED, *PROMOTED])
def test_what_eager_code_refuses_of_two_dtypes_is_refused(name, state, weight):
    """Casts of the rewrite would hide it: the model would train compiled alone."""
    solve = of_two_dtypes({**MIXED, **PROMOTED}[name])
    y, w = torch.ones(4, 5, dtype=getattr(torch, state)), torch.eye(5, dtype=getattr(torch, weight))
    t = torch.linspace(0, 1, 4, dtype=y.dtype)
    run = torch.compile(solve, backend="rampde_fx", options={"compiler": "aot_eager"}, fullgraph=True)
    if name in PROMOTED:
        torch.testing.assert_close(run(y, w, t), solve(y, w, t), rtol=1e-2, atol=1e-2)
        return
    with pytest.raises((RuntimeError, TypeError)):
        solve(y, w, t)
    with pytest.raises(errors.UnsupportedLoopError, match=r"of float\d+ and float\d+ tensors") as raised:
        run(y, w, t)
    assert "test_refusals.py" in str(raised.value) and "y.to(torch.float32)" in str(raised.value)


def test_under_autocast_what_it_does_not_cast_is_refused():
    """It casts float32 and half precision to its own dtype, and leaves float64."""
    solve = of_two_dtypes(MIXED["product"])
    run = torch.compile(solve, backend="rampde_fx", options={"compiler": "aot_eager"}, fullgraph=True)
    y, t = torch.ones(4, 5), torch.linspace(0, 1, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.isfinite(run(y, torch.eye(5, dtype=torch.float16), t)).all()
        with pytest.raises(RuntimeError):
            solve(y, torch.eye(5, dtype=torch.float64), t)
        with pytest.raises(errors.UnsupportedLoopError, match="of float32 and float64 tensors"):
            run(y, torch.eye(5, dtype=torch.float64), t)


@torch.library.custom_op("rampde_fx_tests::doubled_into", mutates_args=("out",))
def doubled_into(x: torch.Tensor, out: torch.Tensor) -> None:
    out.copy_(x * 2)


class CallsWhatWrites(Flow):
    """torch's own text speaks of a rule for auto_functionalized_v2."""

    def forward(self, y, t):
        for t_i, dt in rampde_fx.steps(t):
            out = torch.empty_like(y)
            doubled_into(y.detach(), out)
            y = y + dt * self.velocity(t_i, out)
        return y


def test_an_operator_that_writes_to_its_arguments():
    message = r"it calls an operator that writes to its arguments(?s:.*)at: .*(?s:.*)fix: .*with mutates_args=\(\)"
    with pytest.raises(errors.UnsupportedVelocityError, match=message):
        compiled(CallsWhatWrites(), torch.float16)(Y.clone().requires_grad_(), T)
