"""What of a step is captured: what may leave the loop, where gradients end, which values are states.

Values and gradients of a float32 policy against eager float64; each case was once a wrong number, a crash or a refusal.
"""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import rampde_fx
from rampde_fx import errors
from rampde_fx.ir import captured
from rampde_fx.policy import PrecisionPolicy
from tests.comparison import relative_errors

steps = rampde_fx.steps
BOUND = 2e-5  # 20 operations of float32 one after another, and a sum over 12 entries: 300 unit roundoffs of 2^-24


def data(dtype, count):
    y = torch.linspace(-1.3, 1.1, 12, dtype=dtype).view(3, 4)
    w = torch.linspace(-0.7, 0.8, 16, dtype=dtype).sin().view(4, 4)
    return y, w, torch.linspace(0, 1, count + 1, dtype=dtype).pow(1.2)


def results(function, dtype, count, batch=None):
    """The outputs, and the gradients of y, w and t."""
    y, w, t = data(dtype, count)
    y = y if batch is None else y.repeat(batch, 1)
    inputs = [x.requires_grad_() for x in (y, w, t)]
    outputs = torch.utils._pytree.tree_leaves(function(y * 1.0, w, t))
    loss = sum((out.square() * torch.arange(out.numel()).cos().view(out.shape)).sum() for out in outputs)
    grads = torch.autograd.grad(loss, inputs, allow_unused=True) if loss.requires_grad else [None] * 3
    return [*(out.detach() for out in outputs), *(torch.zeros(()) if g is None else g for g in grads)]


def rewritten(function, dtype=torch.float32, **options):
    marked = rampde_fx.mixed_precision(function, dtype=dtype)
    return torch.compile(marked, backend="rampde_fx", fullgraph=True, options={"compiler": "aot_eager"}, **options)


def agrees(function, count, bound=BOUND, dtype=torch.float32):
    got, wanted = results(rewritten(function, dtype), torch.float32, count), results(function, torch.float64, count)
    compared = len(wanted) - (dtype is torch.float16)  # in the gradient of t, the last, terms of both signs cancel
    assert len(got) == len(wanted)
    for a, b in zip(got[:compared], wanted[:compared], strict=True):
        assert (a.double() - b).norm() <= bound * b.norm(), (a, b)


def runs(function, count):
    """The number of steps of each loop."""
    y, w, t = data(torch.float32, count)
    marked = rampde_fx.mixed_precision(function, dtype=torch.float16)
    return [loop.steps for loop in rampde_fx.explain(marked, y, w.requires_grad_(), t).loops]


def refused(function, kind, match, line, count=3):
    with pytest.raises(kind, match=match) as raised:
        results(rewritten(function), torch.float32, count)
    assert "test_capture.py" in raised.value.where and line in raised.value.where, raised.value.where


def velocity(y, w):
    return torch.tanh(y @ w)


def table(y):
    return torch.linspace(-1, 1, 24, dtype=y.dtype).view(6, 4).sin()


@torch.library.custom_op("rampde_fx_tests::double_", mutates_args=("x",))
def double_(x: torch.Tensor) -> None:
    x.mul_(2)


def row_without_gradient(y, w, t):
    for i, (_, dt) in enumerate(steps(t)):
        with torch.no_grad():
            c = (w * 3)[i]
        y = y + dt * (velocity(y, w) + c * w[i])
    return y


def row_in_inference_mode(y, w, t):
    for i, (_, dt) in enumerate(steps(t)):
        with torch.inference_mode():
            c = w[i] * 2
        y = y + dt * (velocity(y, w) + c)
    return y


def detached_row(y, w, t):
    for i, (_, dt) in enumerate(steps(t)):
        y = y + dt * (velocity(y, w) + w[i].detach() + w.detach()[i] + w.data[i])
    return y


def row_inside_a_transform(y, w, t):
    for i, (_, dt) in enumerate(steps(t)):
        y = y + dt * torch.func.grad(lambda q, i=i: (velocity(q, w) * w[i]).sum())(y)
    return y


def row_that_is_updated(y, w, t):
    for i, (_, dt) in enumerate(steps(t)):
        c = table(y)[i].clone()
        c.mul_(0.5)
        y = y + dt * velocity(y, w) * c
    return y


def checkpointed_step(y, w, t):
    def inner(q):
        return velocity(q, w)

    def outer(q):
        return torch.sin(checkpoint(inner, q, use_reentrant=False)) * checkpoint(inner, 2 * q, use_reentrant=False)

    for _, dt in steps(t):
        y = y + dt * checkpoint(outer, y, use_reentrant=False)
    return y


ONE_LOOP = [
    row_without_gradient, row_in_inference_mode, detached_row, row_inside_a_transform, row_that_is_updated,
    checkpointed_step,
]  # fmt: skip


@pytest.mark.parametrize("function", ONE_LOOP, ids=lambda function: function.__name__)
@pytest.mark.parametrize("count", [1, 3])
def test_what_differs_between_steps_leaves_the_loop_with_its_meaning(function, count):
    agrees(function, count)
    assert runs(function, count) == [count]


def test_a_row_that_is_read_without_a_gradient_gets_none():
    def only_without(y, w, t):
        for i, (_, dt) in enumerate(steps(t)):
            with torch.no_grad():
                c = w[i]
            y = y + dt * torch.tanh(y) * c
        return y

    assert results(rewritten(only_without), torch.float32, 3)[2].count_nonzero() == 0


def test_checkpoints_of_different_bodies_stay_apart():
    def differing(y, w, t):
        for i, (_, dt) in enumerate(steps(t)):
            function = torch.sin if i % 2 else torch.tanh
            y = y + dt * checkpoint(lambda q, function=function: function(q @ w), y, use_reentrant=False)
        return y

    agrees(differing, 3)
    assert runs(differing, 3) == [1, 1, 1]


WRITES = {
    "out": lambda h: torch.cos(h.clone(), out=h),
    "inplace": lambda h: functional.relu(h, inplace=True),
    "foreach": lambda h: torch._foreach_mul_([h], 0.5),
    "custom": double_,
    "copy": lambda h: h.copy_(h.cos()),
    "data": lambda h: h.data.mul_(0.5),
    "detach": lambda h: h.detach().mul_(0.5),
    "item": lambda h: h.__setitem__(slice(1, 3), 0.25),
    "view": lambda h: h.view(-1)[4:].mul_(0.5),
}


@pytest.mark.parametrize("write", WRITES)
def test_rows_of_a_tensor_that_the_steps_overwrite(write):
    def overwritten(y, w, t):
        h = table(y) * 1.0
        for i, (_, dt) in enumerate(steps(t)):
            y = y + dt * velocity(y, w) * h[i].clone()
            WRITES[write](h)
        return y

    agrees(overwritten, 3)


def average_without_gradient(y, w, t):
    mean = torch.zeros(4, dtype=y.dtype)
    for _, dt in steps(t):
        k = velocity(y, w)
        with torch.no_grad():
            mean.mul_(0.5).add_(k.mean(0), alpha=0.5)
        y = y + dt * (k - mean.clone())
    return y, mean


def updated_without_gradient(y, w, t):
    for _, dt in steps(t):
        with torch.no_grad():
            z = y * 2
            z.mul_(w[0])
            z[0].mul_(3.0)
            z[:, 1] = w[1, :3]
            q = torch.zeros_like(y)
            torch.mul(y, w[0], out=q)
        y = y + dt * velocity(y, w) * z + q * dt
    return y


def detached_in_place(y, w, t):
    for _, dt in steps(t):
        z = velocity(y, w)
        z.detach_()
        y = y + dt * z * w[0]
    return y


def read_by_data_alone(y, w, t):
    for _, dt in steps(t):
        y = y + dt * velocity(y, w.data)
    return y


def without_any_gradient(y, w, t):
    y = y.detach()
    for _, dt in steps(t):
        y = y + dt * velocity(y, w).detach()
    return y


@torch._dynamo.allow_in_graph
def rounded(x):
    return x + (torch.round(4 * x) / 4 - x).detach()


def straight_through_in_an_admitted_function(y, w, t):
    for _, dt in steps(t):
        y = y + dt * rounded(velocity(y, w))
    return y


STOPS = [
    average_without_gradient, updated_without_gradient, detached_in_place, read_by_data_alone, without_any_gradient,
    straight_through_in_an_admitted_function,
]  # fmt: skip


@pytest.mark.parametrize("function", STOPS, ids=lambda function: function.__name__)
@pytest.mark.parametrize("count", [1, 3])
def test_gradients_end_where_eager_ends_them(function, count):
    agrees(function, count)


@torch.no_grad()
def clamp_without_gradient(y):
    y.clamp_(-0.5, 0.5)


@pytest.mark.parametrize(
    "clamp",
    [
        lambda y: y.data.clamp_(-0.5, 0.5),
        lambda y: y.detach().clamp_(-0.5, 0.5),
        clamp_without_gradient,
        lambda y: clamp_without_gradient(y[0]),
    ],
    ids=["data", "detach", "no_grad", "view"],
)
def test_writes_past_autograd_to_what_has_a_gradient(clamp):
    def projected(y, w, t):
        for _, dt in steps(t):
            y = y + dt * velocity(y, w)
            clamp(y)
        return y

    refused(projected, errors.MutationError, "and a gradient flows through it", "clamp", count=1)


def test_the_advice_for_such_writes_gives_their_gradient():
    def projected(y, w, t):
        for _, dt in steps(t):
            y = y + dt * velocity(y, w)
            y = y + (y.clamp(-0.5, 0.5) - y).detach()
        return y

    agrees(projected, 3)


class Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return torch.round(8 * x) / 8

    @staticmethod
    def backward(ctx, gradient):
        return gradient


admitted = torch._dynamo.allow_in_graph(lambda x: 2 * Straight.apply(x) + x)


@torch.library.custom_op("rampde_fx_tests::straight", mutates_args=())
def straight(x: torch.Tensor) -> torch.Tensor:
    return torch.round(8 * x) / 8


straight.register_fake(torch.empty_like)
straight.register_autograd(lambda ctx, gradient: gradient)
OWN = {
    "admitted": lambda y, w: admitted(velocity(y, w)),
    "of_parameters": lambda y, w: velocity(y, admitted(w)),
    "traced": lambda y, w: Straight.apply(velocity(y, w)),
    "checkpointed": lambda y, w: checkpoint(lambda q: Straight.apply(velocity(q, w)), y, use_reentrant=False),
}


@pytest.mark.parametrize("own", OWN)
@pytest.mark.parametrize("count", [1, 3])
def test_a_backward_of_the_users_own_is_not_lost(own, count):
    def flow(y, w, t):
        for _, dt in steps(t):
            y = y + dt * OWN[own](y, w)
        return y

    refused(flow, errors.UnsupportedLoopError, "has a backward of its own", "", count)


@pytest.mark.parametrize("count", [1, 3])
def test_an_operator_keeps_its_derivative(count):
    def flow(y, w, t):
        for _, dt in steps(t):
            y = y + dt * straight(velocity(y, straight(w)))
        return y

    agrees(flow, count)


def test_a_function_with_its_own_backward_may_stand_outside_of_the_loop():
    def flow(y, w, t):
        w = admitted(w)
        for _, dt in steps(t):
            y = y + dt * velocity(y, w)
        return Straight.apply(y)

    agrees(flow, 3)


UPDATES = {
    "cat": lambda y, k, w, h: torch.cat([y[:, :2] + h * y[:, 2:], y[:, 2:] - h * k[:, :2]], 1),
    "where": lambda y, k, w, h: torch.where(y > 0.5, y, y + h * k),
    "clamp": lambda y, k, w, h: (y + h * k).clamp(-1, 1),
    "relu": lambda y, k, w, h: torch.relu(y + h * k),
    "addmm": lambda y, k, w, h: torch.addmm(y, k, w, alpha=0.5),
    "reshape": lambda y, k, w, h: (y.reshape(-1) + h * k.reshape(-1)).reshape(3, 4),
    "stack": lambda y, k, w, h: torch.stack([y[:, i] + h * k[:, 3 - i] for i in range(4)], 1),
    "propagator": lambda y, k, w, h: y @ torch.matrix_exp(h * w),
    "exponential": lambda y, k, w, h: y * torch.exp(-h) + h * k,
    "normalised": lambda y, k, w, h: nn.functional.normalize(y + h * k),
    "flip": lambda y, k, w, h: (y + h * k).flip(1),
    "index_add": lambda y, k, w, h: torch.index_add(y, 1, torch.arange(4), h * k),
    "gather": lambda y, k, w, h: y[:, [1, 0, 3, 2]] + h * k,
    "map": lambda y, k, w, h: k,
    "mean": lambda y, k, w, h: y.mean(0, keepdim=True).expand(3, 4) + h * k,
    "transposed_lerp": lambda y, k, w, h: torch.lerp(y, (w.T @ y.T).T, 0.25),
    "addcmul": lambda y, k, w, h: torch.addcmul(y.T, h, k.T, value=0.5).T,
}


@pytest.mark.parametrize("update", UPDATES)
def test_one_step_takes_what_equal_and_unequal_steps_take(update):
    def equal(y, w, t):
        for _, dt in steps(t):
            y = UPDATES[update](y, velocity(y, w), w, dt)
        return y

    def unequal(y, w, t):
        for i, (_, dt) in enumerate(steps(t)):
            y = UPDATES[update](y, velocity(y, w), w, dt)
            y = torch.sin(y) if i == 1 else y
        return y

    agrees(equal, 1)
    agrees(equal, 1, 5 * 2**-11, torch.float16)
    agrees(equal, 2)
    agrees(unequal, 3)


SUMMANDS = {
    "addmm": lambda y, k, h: torch.addmm(y, k, h * torch.eye(4).to(k)),
    "addmv": lambda y, k, h: torch.addmv(y, h * torch.eye(4).to(k), k),
    "addbmm": lambda y, k, h: torch.addbmm(y, k[None], h * torch.eye(4).to(k)[None]),
    "addr": lambda y, k, h: torch.addr(y, k[:, 0], h * k[0]),
}


@pytest.mark.parametrize("update", SUMMANDS)
def test_what_one_step_adds_a_product_to_is_its_state(update):
    """And not what the product is made of, though it has the state's shape, and is read more often."""

    def quadrature(u, y, t):
        for _, dt in steps(t):
            y = SUMMANDS[update](y, torch.tanh(u) * u, dt)
        return y

    y, _, t = data(torch.float32, 1)
    y = y[0] if update == "addmv" else y
    (loop,) = rampde_fx.explain(rampde_fx.mixed_precision(quadrature, dtype=torch.float16), y + 1, y, t).loops
    assert [carry.partition(":")[0] for carry in loop.carries] == ["y"]


def test_two_states_of_one_step_from_the_same_start_are_both_states():
    def symplectic(y, w, t):
        q = p = y
        for _, dt in steps(t):
            q = torch.clamp(q + dt * velocity(p, w), -2, 2)
            p = torch.clamp(p - dt * velocity(q, w), -2, 2)
        return q, p

    agrees(symplectic, 1)
    y, w, t = data(torch.float32, 1)
    (loop,) = rampde_fx.explain(rampde_fx.mixed_precision(symplectic, dtype=torch.float16), y, w, t).loops
    assert len(loop.carries) == 2 and loop.evaluations == 2


def assigned_by_index(y, w, t):
    index = torch.tensor([0, 2])
    for _, dt in steps(t):
        z = y.clone()
        z[index] = velocity(y[index], w)
        y = y + dt * z
    return y


def collected_alone(y, w, t):
    return sum((velocity(y, w * t_i) * dt).sum() for t_i, dt in steps(t))


@pytest.mark.parametrize("function", [assigned_by_index, collected_alone], ids=lambda function: function.__name__)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_steps_that_assign_and_steps_that_only_collect(function, count):
    agrees(function, count)
    y, w, t = data(torch.float32, count)
    assert (
        rampde_fx.explain(rampde_fx.mixed_precision(function, dtype=torch.float16), y, w, t).loops[0].evaluations >= 1
    )


STACKS = {
    "two_lists": lambda a, b: torch.stack(a + b),
    "one_list_twice": lambda a, b: torch.stack(a + a),
    "joined": lambda a, b: torch.cat([torch.stack(b), torch.stack(a)]),
    "written_afterwards": lambda a, b: (a[0].mul_(2), torch.stack(a)),
}


@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("count", [1, 4])
def test_lists_that_the_steps_fill(stack, count):
    def flow(y, w, t):
        a, b = [], []
        for _, dt in steps(t):
            y = y + dt * velocity(y, w)
            a.append(y * 1.0)
            b.append(2 * y)
        return STACKS[stack](a, b)

    agrees(flow, count)


def test_what_is_collected_by_two_names_is_not_updated_in_place():
    def flow(y, w, t):
        rows = []
        for _, dt in steps(t):
            y = y + dt * velocity(y, w)
            rows.append(y[0])
        y.mul_(2)
        return y, torch.stack(rows)

    refused(flow, errors.MutationError, "show the same memory", "")


@pytest.mark.parametrize("dynamic", [None, True])
def test_every_batch_size(dynamic):
    def energy(x, w):
        return torch.func.grad(lambda x: velocity(x.reshape(-1, 2, 2).mT.reshape(x.shape[0], 4), w).sum())(x)

    def flow(y, w, t):
        for _, dt in steps(t):
            y = y + dt * energy(y + dt / 2 * energy(y, w), w) * y.shape[0]
        return y

    function = rewritten(flow, dynamic=dynamic)
    for batch in (1, 2, 3):
        for a, b in zip(
            results(function, torch.float32, 3, batch), results(flow, torch.float64, 3, batch), strict=True
        ):
            assert (a.double() - b).norm() <= BOUND * b.norm()


def test_the_first_call_under_anomaly_detection():
    def flow(y, w, t):
        for _, dt in steps(t):
            y = y + dt * velocity(y, w)
        return y

    with torch.autograd.set_detect_anomaly(True):
        agrees(flow, 3)
        assert torch.is_anomaly_enabled()


class Logging(nn.Module):
    def forward(self, y, t):
        self.log = []
        for _, dt in steps(t):
            y = y + dt * torch.tanh(3 * y)
            self.log.append(2 * float(y.sum()))
            self.last = y.norm().item()
            torch._assert_async(y.isfinite().all(), "y diverged")  # an assert, as Dynamo writes it
        return y


def test_numbers_for_logging_and_assertions():
    y, _, t = data(torch.float32, 3)
    model, reference = rampde_fx.mixed_precision(Logging(), dtype=torch.float32), Logging()
    function = torch.compile(model, backend="rampde_fx", fullgraph=True, options={"compiler": "aot_eager"})
    assert torch.allclose(function(y, t), reference(y, t))
    assert model.log == pytest.approx(reference.log, rel=1e-6) and model.last == pytest.approx(reference.last)
    with pytest.raises(RuntimeError, match="y diverged"):
        function(torch.full_like(y, torch.nan), t)


def test_numbers_that_the_steps_read():
    def normed(y, w, t):
        for _, dt in steps(t):
            y = y + dt * velocity(y, w) / float(y.norm())
        return y

    def masked(y, w, t):
        for _, dt in steps(t):
            y = y + dt * velocity(y, w) * y[y > 0].sum()
        return y

    refused(
        normed, errors.UnsupportedLoopError, r"reads a number from a tensor[\s\S]*item\(\) after", "float(y.norm())"
    )
    refused(masked, errors.UnsupportedLoopError, "depends on the values of a tensor", "y[y > 0].sum()")


@pytest.mark.parametrize("how", ["class", "instance", "function"])
def test_errors_use_the_users_names(how):
    class Model(nn.Module):
        def forward(self, position, t):
            for _, dt in steps(t):
                position = position + dt * torch.tanh(position)
            return position

    def function(position, t):
        return Model.forward(None, position, t)

    if how == "function":
        target = rampde_fx.mixed_precision(function, dtype=torch.float16)
    else:
        target = (
            rampde_fx.mixed_precision(Model, dtype=torch.float16)()
            if how == "class"
            else rampde_fx.mixed_precision(Model(), dtype=torch.float16)
        )
    compiled = torch.compile(target, backend="rampde_fx", fullgraph=True, options={"compiler": "aot_eager"})
    with pytest.raises(errors.StateChangeError, match="the state 'position'") as raised:
        compiled(torch.ones(3).half(), t=torch.linspace(0, 1, 3))
    assert "args" not in str(raised.value)


@pytest.mark.parametrize(("marker", "reader"), [("leave", captured.Leave), ("leave_search", captured.LeaveSearch)])
def test_the_arguments_of_an_end_have_the_names_of_its_operator(marker, reader):
    schema = getattr(torch.ops.rampde_fx, marker).default._schema
    assert [argument.name for argument in schema.arguments] == list(reader._fields)


# States of the last step that nothing reads behind the loop: each result needs the network at y all the same.


def cost_alone(net, y, t):
    cost = y.new_zeros(len(y))
    for _, dt in steps(t):
        k = net(y)
        cost, y = cost + dt * k.square().sum(-1), y + dt * k
    return cost


def cost_in_another_order(net, y, t):
    cost, z = y.new_zeros(len(y)), 2 * y
    for _, dt in steps(t):
        k = net(y)
        cost, y, z = cost + dt * k.square().sum(-1), dt * k + y, z + dt * torch.tanh(z)
    return cost, z


def symplectic(net, y, t):
    x, v = y, 2 * y
    for _, dt in steps(t):
        v = v + dt * net(x)
        x = dt * v + x
    return v


def running_average(net, y, t):
    average, z = y, y
    for i, (_, dt) in enumerate(steps(t)):
        z, y = z + dt * torch.tanh(z), y + dt * net(y)
        average = average + (y - average) / (i + 2)
    return average, z


def not_updated_in_the_end(net, y, t):
    cost, last = y.new_zeros(len(y)), len(t) - 2
    for i, (_, dt) in enumerate(steps(t)):
        k = net(y)
        cost = cost + dt * k.square().sum(-1)
        if i < last:
            y = y + dt * k
    return cost


@pytest.mark.parametrize("accumulation", ["plain", "compensated"])
@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize(
    "function", [cost_alone, cost_in_another_order, symplectic, running_average, not_updated_in_the_end]
)
def test_states_that_nothing_reads_behind_the_last_step(function, count, accumulation):
    if function is not_updated_in_the_end and count == 1:
        pytest.skip("y is no state of a loop that never changes it")
    net = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Tanh(), torch.nn.Linear(8, 5)).double()
    y, t = torch.randn(3, 5, dtype=torch.float64, requires_grad=True), torch.linspace(0, 1, count + 1).double()
    model = Calling(net, function)
    policy = PrecisionPolicy(torch.float16, accumulation=accumulation)
    low = copy.deepcopy(model).float()
    marked = rampde_fx.mixed_precision(low, policy=policy)
    with warnings.catch_warnings():
        warnings.simplefilter("error", rampde_fx.errors.FullPrecisionWarning)
        run = torch.compile(marked, backend="rampde_fx", options={"compiler": "aot_eager"}, fullgraph=True)
        found = outcomes(run, low, y.detach().float().requires_grad_(), t.float())
    wanted = outcomes(model, model, y, t)
    assert 2**-22 < max(relative_errors([x.double() for x in found], wanted)) < 8 * 2**-11
    loops = rampde_fx.explain(marked, y.detach().float(), t.float()).loops
    per_step = 2 * 3 * (5 * 8 + 8 * 5)
    assert [loop.step_flops for loop in loops] == [per_step] * len(loops)


class Calling(torch.nn.Module):
    def __init__(self, net, function):
        super().__init__()
        self.net, self.function = net, function

    def forward(self, y, t):
        return self.function(self.net, y, t)


def outcomes(run, model, y, t):
    """What a model returns, and the gradients of all of it."""
    results = run(y, t)
    results = results if isinstance(results, tuple) else (results,)
    loss = sum(result.square().sum() for result in results)
    return [*(result.detach() for result in results), *torch.autograd.grad(loss, [y, *model.parameters()])]
