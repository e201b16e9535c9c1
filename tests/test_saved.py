"""What a forward leaves for the backward, tensor by tensor: stored values and times, and no copy of what lives on."""

import collections
import math

import pytest
import torch
from torch import nn
from torch.utils import checkpoint

import rampde_fx
from rampde_fx import PrecisionPolicy
from tests.benchmarks.cases import QUICK
from tests.benchmarks.contenders import solve_by_odeint
from tests.benchmarks.measure import saved_tensors

WIDTH, BATCH, STEPS = 24, 5, 40


def compiled(function, text):
    marked = rampde_fx.mixed_precision(function, policy=PrecisionPolicy.parse(text))
    return torch.compile(marked, backend="rampde_fx", options={"compiler": "aot_eager"}, fullgraph=True)


def saved(run, held):
    """How many tensors of which shapes and dtypes are saved."""
    run().backward()
    tensors = saved_tensors(run, held)
    return collections.Counter((tuple(x.shape), str(x.dtype).removeprefix("torch.")) for x in tensors)


class Velocity(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def velocity(self, y):
        return torch.tanh(self.layer(y))

    def solved(self, y, t):
        for _, dt in rampde_fx.steps(t):
            y = y + dt * self.velocity(y)
        return y

    def forward(self, y, t):
        return self.solved(y, t)


class Tied(Velocity):
    """A weight that two loops read, in one of them transposed too."""

    def forward(self, y, t):
        y = self.solved(y, t)
        for _, dt in rampde_fx.steps(t):
            y = y + dt * (torch.sin(self.layer(y)) @ self.layer.weight)
        return y


class Flat(Velocity):
    """Layers are views of one parameter."""

    def __init__(self):
        super().__init__()
        self.theta = nn.Parameter(torch.randn(WIDTH * WIDTH + WIDTH) / WIDTH)

    def forward(self, y, t):
        weight, bias = self.theta[: WIDTH * WIDTH].view(WIDTH, WIDTH), self.theta[WIDTH * WIDTH :]
        for _, dt in rampde_fx.steps(t):
            y = y + dt * torch.tanh(y @ weight + bias)
        return y


class Frozen(Velocity):
    """A weight that is a buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("fixed", torch.randn(WIDTH, WIDTH) / WIDTH)

    def velocity(self, y):
        return self.layer(torch.tanh(y @ self.fixed))


class Normed(Velocity):
    """A weight that is made of two parameters."""

    def __init__(self):
        super().__init__()
        self.layer = nn.utils.parametrizations.weight_norm(self.layer)


class Warmed(Velocity):
    """A loop without gradients reads the weight first."""

    def forward(self, y, t):
        with torch.no_grad():
            y = self.solved(y, t)
        return self.solved(y, t)


class Narrow(Velocity):
    """The parameters are in low precision, and summed up in float32."""

    def __init__(self):
        super().__init__()
        self.layer = self.layer.bfloat16()

    def velocity(self, y):
        return torch.tanh(self.layer(y.bfloat16()).float())


class Adaptive(Velocity):
    """The search for the steps reads the weight first."""

    def forward(self, y, t):
        return rampde_fx.odeint(lambda _, y: self.velocity(y), y, t[[0, -1]], method="dopri5", rtol=1e-2, atol=1e-2)[-1]


MODELS = [Velocity, Tied, Flat, Frozen, Normed, Warmed, Narrow, Adaptive]


@pytest.mark.parametrize(
    ("model", "text"), [*((model, "bfloat16") for model in MODELS), (Tied, "float16, scaling=none")]
)
def test_no_copy_of_a_weight(model, text):
    torch.manual_seed(0)
    model, y, t = model(), torch.randn(BATCH, WIDTH), torch.linspace(0, 1, STEPS + 1)
    run = compiled(model, text)
    kinds = saved(lambda: run(y, t).sum(), [*model.parameters(), *model.buffers(), y, t])
    low = {shape for shape, dtype in kinds if dtype == text.partition(",")[0]}
    assert low and all(shape[1:] == (BATCH, WIDTH) for shape in low), kinds
    assert all(dtype != "float32" or (shape[0] <= STEPS and set(shape[1:]) <= {1}) for shape, dtype in kinds), kinds


def share_of_float32(kinds):
    """The bytes, and those that float32 would save: of low tensors twice as many."""
    sizes = [(number * math.prod(shape), getattr(torch, dtype)) for (shape, dtype), number in kinds.items()]
    low = sum(entries * dtype.itemsize for entries, dtype in sizes)
    return low / (
        low
        + sum(entries * dtype.itemsize for entries, dtype in sizes if dtype.is_floating_point and dtype.itemsize == 2)
    )


@pytest.mark.parametrize(
    ("name", "text"), [("cnf", "bfloat16"), ("cnf", "float16, scaling=none"), ("otflow", "bfloat16")]
)
def test_half_of_the_bytes(name, text):
    """The small network and OT-Flow, with a loss that saves nothing."""
    (case,) = [case for case in QUICK if case.name == name]
    model, x, t = case.build(solve_by_odeint, torch.device("cpu"))
    run = compiled(lambda x, t: solve_by_odeint(model.velocity, x, t), text)
    kinds = saved(lambda: run(x, t).sum(), [*model.parameters(), x, t])
    assert kinds == {((case.steps, *x.shape), text.partition(",")[0]): 1, ((case.steps,), "float32"): 2}
    assert share_of_float32(kinds) <= 0.51


@pytest.mark.parametrize("schedule", ["checkpoint=7", "checkpoint=none", "loop=unroll", "storage=float16"])
def test_half_of_the_bytes_by_every_schedule(schedule):
    steps = 6 if "unroll" in schedule else STEPS
    model, y, t = Tied(), torch.randn(BATCH, WIDTH), torch.linspace(0, 1, steps + 1)
    run = compiled(model, f"bfloat16, {schedule}")
    kinds = saved(lambda: run(y, t).sum(), [*model.parameters(), y, t])
    assert not any(shape == (WIDTH, WIDTH) for shape, _ in kinds)
    assert share_of_float32(kinds) <= 0.51 or "checkpoint=7" in schedule, kinds  # which saves indices of steps


def test_parameters_that_are_arguments():
    model, y, t = Velocity(), torch.randn(BATCH, WIDTH), torch.linspace(0, 1, STEPS + 1)
    given = {name: value.detach().clone().requires_grad_() for name, value in model.named_parameters()}
    run = compiled(lambda given, y, t: torch.func.functional_call(model, given, (y, t)), "bfloat16")
    kinds = saved(lambda: run(given, y, t).sum(), [*given.values(), y, t])
    assert kinds == {((STEPS, BATCH, WIDTH), "bfloat16"): 1, ((STEPS,), "float32"): 1}


def test_weights_that_are_computed_are_saved_once_and_low():
    """They do not live on, so that something of them is saved: the smaller of what the backward can read."""
    net, y, t = nn.Linear(3, WIDTH * WIDTH), torch.randn(BATCH, WIDTH), torch.linspace(0, 1, STEPS + 1)

    def solved(z, y, t):
        weight = net(z).view(WIDTH, WIDTH)
        for _, dt in rampde_fx.steps(t):
            y = y + dt * torch.tanh(y @ weight)
        return y

    z = torch.randn(3)
    run = compiled(solved, "bfloat16")
    kinds = saved(lambda: run(z, y, t).sum(), [*net.parameters(), z, y, t])
    assert kinds[(WIDTH, WIDTH), "bfloat16"] == 1 and not any(
        dtype == "float32" and WIDTH in shape for shape, dtype in kinds
    )


def test_a_checkpointed_loop_saves_no_weight():
    model, y, t = Tied(), torch.randn(BATCH, WIDTH, requires_grad=True), torch.linspace(0, 1, STEPS + 1)
    run = compiled(lambda y, t: checkpoint.checkpoint(model, y, t, use_reentrant=False), "bfloat16")
    kinds = saved(lambda: run(y, t).sum(), [*model.parameters(), y, t])
    assert not kinds


def test_a_weight_that_changes_before_the_backward_is_loud():
    """The backward would make another low copy than the forward's."""
    model, y, t = Velocity(), torch.randn(BATCH, WIDTH), torch.linspace(0, 1, STEPS + 1)
    loss = compiled(model, "bfloat16")(y, t).sum()
    with torch.no_grad():
        model.layer.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("when", ["before", "behind"])
def test_a_buffer_that_the_graph_writes_is_not_made_again(when):
    """The forward read another value of it than it has when the backward runs."""

    class Written(Frozen):
        def forward(self, y, t):
            if when == "before":
                self.fixed.mul_(0.5)
            y = self.solved(y, t)
            if when == "behind":
                self.fixed.mul_(0.5)
            return y

    model, y, t = Written(), torch.randn(BATCH, WIDTH), torch.linspace(0, 1, STEPS + 1)
    begun = model.fixed.clone()
    for text, bound in (("float32", 2.0**-20), ("bfloat16", 2.0**-6)):
        model.zero_grad()
        model.fixed.copy_(begun)
        compiled(model, text)(y, t).sum().backward()
        got = [parameter.grad for parameter in model.parameters()]
        model.zero_grad()
        model.fixed.copy_(begun / 2 if when == "before" else begun)
        model.solved(y, t).sum().backward()
        for value, parameter in zip(got, model.parameters(), strict=True):
            assert (value - parameter.grad).norm() < bound * parameter.grad.norm()


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("bypassed", [False, True], ids=["tracked", "by data"])
def test_a_buffer_may_be_updated_before_the_backward(bypassed, count):
    """Eager code has saved what was made of it, and an average of weights is updated when it suits the user."""

    class Averaged(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.eye(4).add(0.1).double())
            self.register_buffer("average", torch.eye(4).add(0.2).double())

        def forward(self, y, t):
            for _, dt in rampde_fx.steps(t):
                y = y + dt * torch.tanh(y @ self.average.sin() @ self.weight.cos())
            return y

    found = []
    for compiler in (None, "aot_eager"):
        model, y = Averaged(), torch.ones(3, 4).double().requires_grad_()
        options = {"backend": "rampde_fx", "options": {"compiler": compiler}}
        run = torch.compile(rampde_fx.mixed_precision(model, dtype=torch.float64), **options) if compiler else model
        final = run(y, torch.linspace(0, 1, count + 1).double())
        (model.average.data if bypassed else model.average).mul_(3.0)
        final.square().sum().backward()
        found.append([y.grad, model.weight.grad])
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-12)
