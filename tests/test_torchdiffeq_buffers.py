"""Buffers that a velocity changes: a backward that computes the steps once more leaves them as the forward did."""

from functools import partial
from types import ModuleType

import pytest
import torch
from torch import nn

from rampde_fx import errors
from rampde_fx.small_tensors import MOST_OF_SMALL, SMALL
from rampde_fx.torchdiffeq import kept_buffers, odeint, odeint_adjoint
from tests.adjoint_solves import DOUBLE, Net, Normed, adjoint, double, options_of, times


class Lipschitz(Net):
    """A power iteration, one step for each evaluation."""

    def __init__(self):
        super().__init__()
        nn.utils.spectral_norm(self.first)


class Phased(Net):
    """A buffer that is another one after each evaluation."""

    def __init__(self):
        super().__init__()
        self.register_buffer("phase", double(0)[0])

    def forward(self, t, y):
        self.phase = self.phase + 0.1
        return super().forward(t, y) * torch.cos(self.phase)


class Seldom(Net):
    """Buffers that change at some evaluations alone: one that is None at first, one that another is a view of."""

    def __init__(self):
        super().__init__()
        self.register_buffer("late", None)
        self.register_buffer("means", torch.zeros(3, dtype=DOUBLE))
        self.register_buffer("part", self.means[:2])

    def forward(self, t, y):
        rate = super().forward(t, y)
        with torch.no_grad():
            if t.abs() > 0.5:
                self.late = y.mean(0)
                self.means[:2].mul_(0.9).add_(y.mean(0))
        return rate + self.part.clone()


class Later(Net):
    """BatchNorm, whose kernels count no change, and which the first step does not reach."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(2, dtype=DOUBLE)

    def forward(self, t, y):
        rate = super().forward(t, y)
        return self.norm(rate) if t.abs() > 0.5 else rate


class Late(Net):
    """Statistics that only late evaluations change, and of which nobody counts it; no result depends on them."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(2, dtype=DOUBLE))
        self.register_buffer("var", torch.ones(2, dtype=DOUBLE))
        self.register_buffer("average", torch.zeros(2, dtype=DOUBLE))

    def forward(self, t, y):
        rate = super().forward(t, y)
        if t.abs() > 0.5:
            rate = nn.functional.batch_norm(rate, self.mean, self.var, training=True)
            self.average.data.mul_(0.9).add_(0.1 * y.detach().mean(0))
        return rate


class OwnNorm(nn.BatchNorm1d):
    """Of the user's own, of which torch counts the batches, and its statistics depend on the count."""


class Cumulative(Net):
    def __init__(self):
        super().__init__()
        self.norm = OwnNorm(2, momentum=None, dtype=DOUBLE)

    def forward(self, t, y):
        return super().forward(t, self.norm(y))


class Averaged(Net):
    """An average with a count of its own, on which the result depends."""

    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("average", torch.zeros(2, dtype=DOUBLE))

    def forward(self, t, y):
        with torch.no_grad():
            self.count += 1
            self.average.lerp_(y.mean(0), 1 / (1 + self.count.item()))
        return super().forward(t, y) - self.average.clone()


class Plain(Net):
    """Tensors that are no buffers: one that changes in place, one of which the attribute becomes another."""

    def __init__(self):
        super().__init__()
        self.mean, self.last_mean = torch.zeros(2, dtype=DOUBLE), torch.zeros(2, dtype=DOUBLE)

    def buffers(self):
        return [self.mean, self.last_mean]

    def forward(self, t, y):
        self.mean.lerp_(y.detach().mean(0), 0.1)
        self.last_mean = y.detach().mean(0)
        return super().forward(t, y) + self.mean.clone()


class Initialised(Net):
    """What the first evaluation sets: a parameter, and a flag for it."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(2, dtype=DOUBLE))
        self.register_buffer("done", torch.tensor(0))

    def forward(self, t, y):
        if self.done == 0:
            with torch.no_grad():
                self.scale.copy_(1 / (1 + y.std(0)))
                self.done.fill_(1)
        return super().forward(t, y) * self.scale


class Flagged(Initialised):
    """With a flag that is a floating number."""

    def __init__(self):
        super().__init__()
        self.done = torch.tensor(0.0)


class Made(Net):
    """A buffer that the first evaluation makes, and attributes that are changed where nobody counts it."""

    def __init__(self):
        super().__init__()
        self.average = torch.zeros(2, dtype=DOUBLE)
        self.register_buffer("count", torch.tensor(0))
        self.later = None

    def buffers(self):
        return [*super().buffers(), self.average, self.later]

    def forward(self, t, y):
        with torch.no_grad():
            if not hasattr(self, "mean"):
                self.register_buffer("mean", torch.zeros(2, dtype=DOUBLE))
            self.mean.lerp_(y.mean(0), 0.1)
            self.later = y.mean(0) if self.later is None else self.later.lerp_(y.mean(0), 0.1)
        self.average.data.mul_(0.9).add_(y.detach().mean(0))
        self.count.data.add_(1)
        return super().forward(t, y)


class Normalised(Net):
    """ActNorm with all that it makes in buffers, from which the next evaluations read."""

    def __init__(self):
        super().__init__()
        self.register_buffer("done", torch.tensor(0, dtype=torch.uint8))
        self.register_buffer("shift", torch.zeros(2, dtype=DOUBLE))

    def forward(self, t, y):
        if self.done == 0:
            self.shift.copy_(y.detach().mean(0))
            self.done.fill_(1)
        return super().forward(t, y - self.shift)


class OfPython(Normalised):
    """With a flag that is no tensor."""

    def forward(self, t, y):
        if not getattr(self, "is_done", False):
            self.shift.copy_(y.detach().mean(0))
            self.is_done = True
        return Net.forward(self, t, y - self.shift)


class WithAGraph(Net):
    """The first evaluation has another graph than those that follow; an attribute is bound to another tensor."""

    def __init__(self):
        super().__init__()
        self.register_buffer("done", torch.tensor(0))
        self.register_buffer("shift", torch.zeros((), dtype=DOUBLE))
        self.seen = torch.zeros((), dtype=DOUBLE)

    def buffers(self):
        return [*super().buffers(), self.seen]

    def forward(self, t, y):
        if self.done == 0:
            shift = torch.exp(y.mean())
            self.shift.copy_(shift.detach())
            self.done.fill_(1)
        else:
            shift = self.shift.clone()
        self.seen = y.detach().mean()
        return super().forward(t, y) - shift


class Annealed(Net):
    """Buffers that change beside the evaluations: after each step, and first where the first step is not yet."""

    def __init__(self):
        super().__init__()
        self.register_buffer("rate", torch.ones((), dtype=DOUBLE))
        self.register_buffer("count", torch.zeros((), dtype=DOUBLE))

    def callback_step(self, t, y, dt):
        self.rate.mul_(0.9)

    def forward(self, t, y):
        if t > 0:
            self.count += 1
        return super().forward(t, y) * self.rate.clone() / (1 + 0.01 * self.count.clone())


class Odd(Net):
    """Buffers of kinds that torch neither compares nor measures."""

    def __init__(self):
        super().__init__()
        self.register_buffer("packed", torch.zeros(3, dtype=torch.uint8).view(torch.bits8))
        self.register_buffer("ragged", torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]))
        self.register_buffer("jagged", torch.nested.nested_tensor([torch.ones(2)], layout=torch.jagged))
        self.kept = [self.packed, self.ragged, self.jagged]

    def buffers(self):
        return []


class Grown(Net):
    """A buffer that gets its shape from the first evaluation, as observers of quantization do."""

    def __init__(self):
        super().__init__()
        self.register_buffer("largest", torch.empty(0, dtype=DOUBLE))

    def forward(self, t, y):
        if self.largest.numel() == 0:
            self.largest.resize_(2).copy_(y.detach().amax(0))
        self.largest.copy_(torch.maximum(self.largest, y.detach().amax(0)))
        return super().forward(t, y)


class Sparse(Net):
    def __init__(self):
        super().__init__()
        self.register_buffer("matrix", torch.eye(2, dtype=DOUBLE).to_sparse())

    def buffers(self):
        return [self.matrix.to_dense()]

    def forward(self, t, y):
        self.matrix.mul_(0.5)
        return super().forward(t, y)


class Bound(Net):
    """Tensors that are replaced: of a class, in a list, in a dict."""

    mean = torch.zeros(2, dtype=DOUBLE)

    def __init__(self):
        super().__init__()
        type(self).mean = torch.zeros(2, dtype=DOUBLE)
        self.held, self.named = [self.mean], {"mean": self.mean}

    def buffers(self):
        return [self.mean, *self.held, *self.named.values()]

    def forward(self, t, y):
        type(self).mean = self.held[0] = self.named["mean"] = y.detach().mean(0)
        return super().forward(t, y)


KEEPING = [
    Made,
    Normalised,
    OfPython,
    WithAGraph,
    Annealed,
    Odd,
    Grown,
    Sparse,
    Bound,
    Normed,
    Lipschitz,
    Phased,
    Seldom,
    Later,
    Late,
    Cumulative,
    Averaged,
    Plain,
    Initialised,
    Flagged,
]


@pytest.mark.parametrize("kind", KEEPING)
@pytest.mark.parametrize("method", ["dopri5", "rk4", "implicit_adams"])
def test_buffers_that_the_velocity_changes_are_changed_by_the_forward_alone(kind, method):
    found = []
    for solve in (odeint, odeint_adjoint):
        torch.manual_seed(0)
        model = kind()
        y = solve(model, double(0.3, -0.7, 0.2, 0.9).reshape(2, 2), times(), **options_of(method))
        y.square().sum().backward()
        found.append([*(parameter.grad for parameter in model.parameters()), *model.buffers()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


class Trainer:
    """No Module, which holds one."""

    def __init__(self, model):
        self.model = model

    def velocity(self, t, y):
        return self.model(t, y)

    __call__ = velocity


class Listing(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.models = [model]

    def forward(self, t, y):
        return self.models[0](t, y)


def of_global(model):
    globals()["GLOBAL"] = model
    return lambda t, y: 1.0 * GLOBAL(t, y)  # noqa: F821


def of_default(model):
    return lambda t, y, model=model: model(t, y)


def of_dict(model):
    models = {"velocity": model}
    return lambda t, y: 1.0 * models["velocity"](t, y)


def of_trainer(model):
    trainer = Trainer(model)
    return lambda t, y: 1.0 * trainer.velocity(t, y)


def of_module_of_python(model):
    elsewhere = ModuleType("elsewhere")
    elsewhere.model = model
    return lambda t, y: 1.0 * elsewhere.model(t, y)


def of_helper_and_property(model):
    class Solver(nn.Module):
        def forward(self, t, y):
            return self.rate(t, y)

        def rate(self, t, y):
            return 1.0 * self.velocity(t, y)

        @property
        def velocity(self):
            return model

    return Solver()


HOLDS = {
    "module of Python": of_module_of_python,
    "property in a helper method": of_helper_and_property,
    "closure": lambda model: lambda t, y: 1.0 * model(t, y),
    "partial": lambda model: partial(model.forward),
    "global": of_global,
    "default": of_default,
    "dict": of_dict,
    "method": lambda model: Trainer(model).velocity,
    "object": Trainer,
    "object in a closure": of_trainer,
    "list of a Module": Listing,
}


@pytest.mark.parametrize("name", HOLDS)
@pytest.mark.parametrize("kind", [Normed, Lipschitz])
def test_buffers_of_what_a_function_holds_are_changed_once(name, kind):
    found = []
    for solve in (odeint, adjoint):
        torch.manual_seed(0)
        model = kind()
        y = solve(HOLDS[name](model), double(0.3, -0.7, 0.2, 0.9).reshape(2, 2), times(), method="rk4")
        y.square().sum().backward()
        found.append([*(parameter.grad for parameter in model.parameters()), *model.buffers()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("kind", [Normed, Lipschitz])
def test_buffers_to_which_nothing_leads_are_an_error(kind):
    elsewhere = ModuleType("elsewhere")
    elsewhere.model = kind()
    y0 = double(0.3, -0.7, 0.2, 0.9).reshape(2, 2)
    y = adjoint(lambda t, y: 1.0 * getattr(elsewhere, "model")(t, y), y0, times(), method="rk4")  # noqa: B009
    with pytest.raises(errors.RecomputationError, match="gives another result"):
        y.square().sum().backward()


@pytest.mark.parametrize("kind", [Averaged, Normalised, Made, Initialised])
def test_buffers_of_a_solve_of_one_evaluation(kind):
    """A count is not told from a flag before the second one: what gives the forward's result is."""
    found = []
    for solve in (odeint, odeint_adjoint):
        model = kind()
        y = solve(model, double(0.3, -0.7, 0.2, 0.9).reshape(2, 2), double(0, 0.1), method="euler")
        y.square().sum().backward()
        found.append([*(parameter.grad for parameter in model.parameters()), *model.buffers()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def test_what_is_copied_of_tensors_that_are_no_buffers_is_bounded():
    """Data that a velocity's owner holds costs no step; a statistic beside it is as a buffer."""

    class Owner:
        def __init__(self):
            self.net, self.mean = Net(), torch.zeros(2, dtype=DOUBLE)
            self.data = [torch.zeros(2**15) for _ in range(300)]
            self.steps = [torch.zeros(()) for _ in range(3)]

        def velocity(self, t, y):
            self.mean.lerp_(y.detach(), 0.1)
            self.steps[2] += 1
            return self.net(t, y) + self.mean.clone() / self.steps[2].item()

    found = []
    for solve in (odeint, adjoint):
        owner = Owner()
        y = solve(owner.velocity, double(0.3, -0.7), times(), method="rk4")
        y.square().sum().backward()
        found.append([*(parameter.grad for parameter in owner.net.parameters()), owner.mean, owner.steps[2]])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
    buffers = kept_buffers.Buffers(owner.velocity, is_called_back=False)
    buffers.before()
    assert sum(buffer.value.numel() for buffer in buffers.unchanged) <= MOST_OF_SMALL


class Frozen(Net):
    """Statistics that are parameters without a gradient."""

    def __init__(self):
        super().__init__()
        self.count = nn.Parameter(torch.zeros((), dtype=DOUBLE), requires_grad=False)
        self.mean = nn.Parameter(torch.zeros(2, dtype=DOUBLE), requires_grad=False)

    def forward(self, t, y):
        self.count.data.add_(1)
        self.mean.data.lerp_(y.detach(), 0.1)
        return super().forward(t, y) + self.mean.clone() / self.count.item()


class Rescaled(Net):
    """As Frozen; nobody counts the changes, and the derivative reads the parameter itself."""

    def __init__(self):
        super().__init__()
        self.mean = nn.Parameter(torch.ones(2, dtype=DOUBLE), requires_grad=False)

    def forward(self, t, y):
        self.mean.data.mul_(1.1)
        return super().forward(t, y) * self.mean


class Renewed(Net):
    """A parameter without a gradient that is another one after each evaluation."""

    def __init__(self):
        super().__init__()
        self.count = nn.Parameter(torch.zeros((), dtype=DOUBLE), requires_grad=False)

    def forward(self, t, y):
        self.count = nn.Parameter(self.count + 1, requires_grad=False)
        return super().forward(t, y)


class Unfolded(Net):
    """A buffer whose entries share memory, until an evaluation gives it other memory."""

    def __init__(self):
        super().__init__()
        self.register_buffer("level", torch.ones(1, dtype=DOUBLE).expand(2))
        self.register_buffer("wide", torch.ones(1, dtype=DOUBLE).expand(5_000_000))

    def forward(self, t, y):
        self.level.data = self.level * 1.1
        self.wide[0].add_(0.1)
        return super().forward(t, y) * (self.level + 0) * self.wide[-1].item()


class Broadcast(Net):
    """Entries of a buffer, and of an attribute, that share memory."""

    def __init__(self):
        super().__init__()
        self.register_buffer("level", torch.ones(1, dtype=DOUBLE).expand(2))
        self.levels = torch.ones(3, 1, dtype=DOUBLE).expand(3, 2)

    def forward(self, t, y):
        self.level[0].add_(0.1)
        self.levels[1, 1].add_(0.2)
        return super().forward(t, y) * (self.level + 0) + self.levels.sum(0) / 9


class Decayed(Net):
    """A callback that changes a buffer late, and nobody counts it."""

    def __init__(self):
        super().__init__()
        self.register_buffer("level", torch.ones(2, dtype=DOUBLE))

    def callback_step(self, t, y, dt):
        if t > 0.35:
            self.level.data.mul_(0.9)

    def forward(self, t, y):
        return super().forward(t, y) * (self.level + 0)


@pytest.mark.parametrize("method", ["rk4", "explicit_adams"])
@pytest.mark.parametrize("kind", [Frozen, Rescaled, Renewed, Unfolded, Broadcast, Decayed])
def test_statistics_of_other_kinds_are_changed_once(kind, method):
    found = []
    for solve in (odeint, odeint_adjoint):
        model = kind()
        y = solve(model, double(0.3, -0.7), times(), **options_of(method))
        y.square().sum().backward()
        left = [
            *model.buffers(),
            getattr(model, "levels", double(0)),
            *(p for p in model.parameters() if p.grad is None),
        ]
        found.append([*(p.grad for p in model.parameters() if p.requires_grad), *left])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def test_a_large_buffer_is_not_copied(monkeypatch):
    """One that is changed in place is an error; one that stays costs nothing."""
    monkeypatch.setattr(kept_buffers, "MOST_KEPT", 8)
    model = Net()
    model.register_buffer("data", torch.zeros(9, dtype=DOUBLE))
    odeint_adjoint(model, double(0.3, -0.7), times(), method="rk4").sum().backward()
    buffers = kept_buffers.Buffers(model, is_called_back=False)
    buffers.before()
    assert [buffer.value for buffer in buffers.unchanged] == [None]
    model.register_forward_hook(lambda module, given, output: module.data.add_(1).sum() * 0 + output)
    with pytest.raises(errors.RecomputationError, match=r"a buffer of shape \(9,\) was changed in place by the solve"):
        odeint_adjoint(model, double(0.3, -0.7), times(), method="rk4")


def test_what_objects_held_before_is_not_made_by_an_evaluation():
    """However much there is beside it, of which not all is looked into."""

    class Part:
        def __init__(self):
            self.value, self.others = torch.zeros(2), {key: [key] * 3 for key in range(12)}

    model = Net()
    model.parts = [Part() for _ in range(900)]
    buffers = kept_buffers.Buffers(model, is_called_back=False)
    buffers.note_changes(buffers.before())
    assert not buffers.changed


def test_the_statistics_of_a_wide_batch_norm_are_changed_once():
    """Its kernel counts no change, however many there are."""
    found = []
    for solve in (odeint, adjoint):
        norm = nn.BatchNorm1d(SMALL + 1)
        y0 = torch.randn(2, SMALL + 1, generator=torch.Generator().manual_seed(0))
        solve(lambda t, y: norm(y), y0, times().float(), method="euler").sum().backward()  # noqa: B023
        found.append(norm.running_mean)
    torch.testing.assert_close(found[1], found[0], rtol=1e-6, atol=1e-7)


def test_an_event_function_may_change_a_buffer():
    found = []
    for solve in (odeint, odeint_adjoint):
        model = Net()
        model.register_buffer("level", torch.ones(2, dtype=DOUBLE))
        model.register_forward_hook(lambda module, given, output: 1 + output * (module.level + 0))

        def event(t, y):
            model.level.data.mul_(0.9 if t > 0.2 else 1.0)  # noqa: B023
            return y[0] - 1

        options = {"method": "rk4", "options": {"step_size": 0.1}, "event_fn": event}
        _, states = solve(model, double(0.3, -0.7), double(0, 1), **options)
        states[-1].sum().backward()
        found.append([*(parameter.grad for parameter in model.parameters()), model.level])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def test_parameters_that_are_frozen_take_no_room_of_statistics():
    model = Net()
    model.frozen = nn.Sequential(*(nn.Linear(2, 2) for _ in range(150))).requires_grad_(False)
    model.sums = [torch.zeros(2000)]
    model.register_forward_hook(lambda module, given, output: module.sums[0].add_(1).sum() * 0 + output)
    odeint_adjoint(model, double(0.3, -0.7), times(), method="rk4").sum().backward()
    assert model.sums[0][0] == model.nfe / 2


def test_a_broadcast_buffer_of_inference_mode():
    found = []
    for solve in (odeint, odeint_adjoint):
        model = Net()
        with torch.inference_mode():
            model.register_buffer("level", torch.zeros(1, dtype=DOUBLE).expand(2))

        def raised(module, given, output):
            with torch.inference_mode():
                module.level[0].add_(1)
            return output * module.level[0].item()

        model.register_forward_hook(raised)
        solve(model, double(0.3, -0.7), times(), method="rk4").sum().backward()
        found.append([*(parameter.grad for parameter in model.parameters()), model.level.clone()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
