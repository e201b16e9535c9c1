"""odeint_adjoint uncompiled, where a step of the backward is not that of the forward: an error, and no false alarm."""

import contextlib
import math

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from rampde_fx import errors
from rampde_fx.small_tensors import has_equality
from rampde_fx.torchdiffeq import odeint, odeint_adjoint, recomputation
from rampde_fx.torchdiffeq.fingerprints import LENGTH, Fingerprints, _whole_direction
from tests.adjoint_solves import DOUBLE, Net, Normed, adjoint, double, options_of, times


@pytest.mark.parametrize("method", ["dopri5", "rk4", "implicit_adams"])
def test_what_was_changed_in_place_is_an_error(method):
    y0, given = double(0.3, -0.7).requires_grad_(), options_of(method)
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss = odeint_adjoint(model, y0, times(), **given).sum()
    model.zero_grad()
    torch.autograd.backward(odeint(model, y0, times(), **given).sum())
    optimizer.step()
    with pytest.raises(errors.RecomputationError, match=r"changed in place.*\n.*stay as they are.*\n.*optimizer\.step"):
        loss.backward()
    start = double(0.3, -0.7)
    loss = odeint_adjoint(model, start, times(), **given).sum()
    start.mul_(2)
    with pytest.raises(errors.RecomputationError, match="the state that func is given was changed in place"):
        loss.backward()


class Counting(Net):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", double(0)[0])

    def forward(self, t, y):
        self.calls += 1
        return super().forward(t, y) * self.calls


class Growing(Net):
    def forward(self, t, y):
        rate = super().forward(t, y)
        return torch.exp(rate * y) if self.nfe > 12 else rate


class Widening(Net):
    def forward(self, t, y):
        rate = super().forward(t, y)
        return (rate * y.new_ones(self.nfe, 1) * y).mean(0)


@pytest.mark.parametrize(
    ("kind", "told"),
    [(Counting, "changed in place"), (Growing, r"saves \(2,\) of"), (Widening, r"saves \(\d+, \d\) of torch.float64")],
)
def test_a_velocity_that_changes_from_call_to_call_is_an_error(kind, told):
    y = odeint_adjoint(kind(), double(0.3, -0.7), times(), method="rk4")
    with pytest.raises(errors.RecomputationError, match=told):
        y.sum().backward()


def of_own_generator(model):
    draws = torch.Generator().manual_seed(0)
    model.register_forward_hook(lambda module, given, output: output[..., torch.randperm(2, generator=draws)])


def counted(model):
    model.register_forward_hook(lambda module, given, output: output * (1 + 1e-3 * module.nfe))


OTHERS = {  # what is done to a velocity before the solve, and between the forward and the backward
    "attribute": (lambda model: None, lambda model: setattr(model, "context", 1.001)),
    "buffer": (lambda model: None, lambda model: setattr(model, "context", 1.001 * model.context)),
    "data": (lambda model: None, lambda model: setattr(model.last.bias, "data", model.last.bias + 1e-3)),
    "counter": (counted, lambda model: None),
    "generator": (of_own_generator, lambda model: None),
}


@pytest.mark.parametrize("method", ["dopri5", "euler", "explicit_adams"])
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
@pytest.mark.parametrize("other", OTHERS)
def test_a_step_with_another_result_is_an_error(method, dtype, other):
    """Nothing else tells it: shapes and dtypes are the same, and no count of changes says it."""
    model, (before, between) = Net(dtype=dtype), OTHERS[other]
    model.register_buffer("context", torch.ones((), dtype=dtype))
    if other == "attribute":
        del model.context
        model.context = 1.0
    model.register_forward_hook(lambda module, given, output: output * module.context)
    before(model)
    y = odeint_adjoint(model, torch.tensor([0.3, -0.7], dtype=dtype), times().to(dtype), **options_of(method))
    between(model)
    with pytest.raises(
        errors.RecomputationError, match=r"gives another result .* of their size, in the backward.*\n.*"
    ):
        y.square().sum().backward()


EXTREME = {  # a state, a factor of its rate in the forward, and in the backward
    "NaN": (double(1, float("nan"), 0.5), 1.0, 1.5),
    "inf": (double(1, float("inf"), 0.5), 1.0, 1.5),
    "1e200": (double(1e200, 1e199), 1.0, 1.5),
    "1e30, float32": (double(1e30, 1e29).float(), 1.0, 1.5),
    "1e-30, float32": (double(1e-30, 1e-29).float(), 1.0, 1.5),
    "bfloat16": (double(1, 0.5).bfloat16(), 1.0, 1.3),
    "float16": (double(1, 0.5).half(), 1.0, 1.05),
    "a sign, one entry": (double(0), 1.0, -1.0),
    "a sign, the first entry": (double(0, 1, 1), double(1, 1, 1), double(-1, 1, 1)),
    "a small entry": (double(1e4, 1).float(), double(1, 1).float(), double(1, 1.5).float()),
}


# Adaptive steps begin with a finite state.
@pytest.mark.parametrize(
    ("case", "method"),
    [(case, method) for case in EXTREME for method in ("euler", "rk4", "dopri5") if (case, method)
     not in (("NaN", "dopri5"), ("inf", "dopri5"))],
)  # fmt: skip
def test_another_result_is_seen_whatever_its_size(case, method):
    y0, before, after = EXTREME[case]
    weight, factor = torch.ones(len(y0), dtype=y0.dtype, requires_grad=True), before
    start = (y0 == 0).to(y0)

    def func(t, y):
        return factor * weight * (y + start)

    t = torch.tensor([0.0, 0.5, 1.0])
    y = adjoint(
        func, y0, t, method=method, rtol=1e-3, atol=1e-3 * y0.nan_to_num(1, 1).abs().amax().clamp(min=1e-30).item()
    )
    factor = after
    with pytest.raises(errors.RecomputationError, match="gives another result"):
        y.sum().backward()


class Swapping(nn.Module):
    """The first evaluation, which a flag tells, saves its parameters in another order."""

    def __init__(self):
        super().__init__()
        self.u, self.w = (nn.Parameter(double(*numbers)) for numbers in ((0.5, 0.2), (0.3, -0.4)))
        self.done = torch.tensor(False)
        with torch.no_grad():
            for _ in range(3):
                self.w.mul_(1.1)

    def forward(self, t, y):
        first, second = (self.u, self.w) if self.done else (self.w, self.u)
        if not self.done:
            self.done.fill_(True)
        return y * first * second + y * first


@pytest.mark.parametrize("method", ["euler", "rk4"])
def test_what_one_try_has_saved_is_not_compared_with_the_next(method):
    """The first try keeps the flag, and is another computation; a parameter was changed in place before."""
    found = []
    for solve in (odeint, odeint_adjoint):
        model = Swapping()
        y0 = double(0.3, -0.7).requires_grad_()
        solve(model, y0, times(), method=method).square().sum().backward()
        found.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=0)


class Masked(Net):
    """Of which autograd saves scores, some of them as small as a number can be."""

    def __init__(self, dtype, fill):
        super().__init__(dtype=dtype)
        self.scores = nn.Linear(2, 64).to(dtype)
        self.register_buffer("mask", torch.arange(64) % 3 == 0)
        self.fill, self.factor = fill, 1.0

    def forward(self, t, y):
        scores = (self.factor * self.scores(y)).masked_fill(self.mask, self.fill)
        return super().forward(t, y) * nn.functional.softplus(scores).sum(-1, keepdim=True).sign()


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE], ids=str)
@pytest.mark.parametrize("fill", ["-inf", "lowest", "-1e30", "-1e9", "-1e6", "-1e4"])
def test_scores_that_are_masked(dtype, fill):
    """They are no false alarm, and hide no change of the others, of which the result says nothing."""
    fill = torch.finfo(dtype).min if fill == "lowest" else float(fill)
    y0, found = torch.tensor([0.3, -0.7], dtype=dtype), []
    for solve in (odeint, odeint_adjoint):
        torch.manual_seed(0)
        model = Masked(dtype, fill)
        solve(model, y0, times().to(dtype), method="rk4").sum().backward()
        found.append([parameter.grad for parameter in model.first.parameters()])
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=0)
    y = odeint_adjoint(model, y0, times().to(dtype), method="rk4")
    model.factor = 1.01
    with pytest.raises(errors.RecomputationError, match="gives another result"):
        y.sum().backward()


class Crowded(nn.Module):
    """Many entries that mask, beside the state times a factor, of which the result says nothing."""

    def __init__(self, fill):
        super().__init__()
        self.weight, self.factor = nn.Parameter(torch.zeros(())), 1.0
        self.register_buffer("fill", fill)

    def forward(self, t, y):
        return (torch.cat([self.fill, y * self.factor]) * self.weight)[len(self.fill) :]


@pytest.mark.parametrize("fill", [-500.0, -1e4, -1e7, -1e9, float("-inf"), torch.finfo().min])
@pytest.mark.parametrize("count", [44, 710, 50_000])
@pytest.mark.parametrize("size", [1.0, 1e2, 1e5])
def test_however_many_entries_mask_they_hide_no_other(count, fill, size):
    model = Crowded(torch.full((count,), fill))
    y = odeint_adjoint(model, size * torch.tensor([1.0, 2.0]), times().float(), method="euler")
    model.factor = 1.1
    with pytest.raises(errors.RecomputationError, match="gives another result"):
        y.sum().backward()


@pytest.mark.parametrize("shape", [(44,), (709,), (710,), (64, 64), (1024, 64), (4, 355), (3, 65_536)])
@pytest.mark.parametrize("kind", ["all", "last dimension", "one column", "halves"])
def test_a_change_of_many_entries_alike_is_seen(shape, kind):
    """It may be a shift of all, whose sum along a smooth direction is next to nothing."""
    weight, shift = torch.tensor(0.5, requires_grad=True), torch.zeros(shape)
    y0 = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    shifts = {
        "all": torch.full((), 1e-2),
        "last dimension": 1e-2 * torch.linspace(-1, 1, shape[-1]),
        "one column": torch.zeros(shape).index_fill(-1, torch.tensor(0), 0.1 * y0.norm() / y0.numel() ** 0.5),
        "halves": torch.arange(shape[-1]).lt(shape[-1] // 2) * 2e-2 - 1e-2,
    }
    y = adjoint(lambda t, y: (y + shift) * weight, y0, times().float(), method="euler")
    shift.data += shifts[kind]  # which nobody counts
    with pytest.raises(errors.RecomputationError, match="gives another result"):
        y.sum().backward()


def test_the_error_of_a_counter_beside_a_low_dtype():
    """What differs each time on the host is no order of sums, however coarse a dtype is."""

    class Drifting(Net):
        def forward(self, t, y):
            with torch.autocast("cpu", torch.bfloat16):
                beside = self.first(y).mean()
            return (1 + 0.002 * self.nfe) * super().forward(t, y) + 0.01 * beside.float()

    for seed in range(3):
        torch.manual_seed(seed)
        y = odeint_adjoint(Drifting(dtype=torch.float32), torch.rand(5, 2), times().float(), method="rk4")
        with pytest.raises(errors.RecomputationError, match="gives another result each time: two evaluations differ"):
            y.sum().backward()


def test_a_tensor_of_which_a_part_was_never_written_is_warned_of():
    """What it hides nobody can see: its number in the forward was partly that of other memory."""

    def func(t, y):
        padded = y.new_empty(6)
        padded[:2] = y
        return (padded * weight)[:2]

    weight = double(1, 2, 0, 0, 0, 0).requires_grad_()
    y = adjoint(func, double(0.3, -0.7), times(), method="rk4")
    keep = [torch.full((6,), float(number), dtype=DOUBLE) for number in range(64)]
    del keep
    with pytest.warns(UserWarning, match=r"shape \(6,\) for its derivative, of which 2 entries are written"):
        y.sum().backward()
    again = double(1, 2, 0, 0, 0, 0).requires_grad_()
    odeint(lambda t, y: y * again[:2], double(0.3, -0.7), times(), method="rk4").sum().backward()
    torch.testing.assert_close(weight.grad[:2], again.grad[:2], rtol=1e-12, atol=0)


def test_copies_by_hooks_hide_no_change():
    """Hooks that copy are given a state with a count of changes; those of other tensors are counted all the same."""

    class Added(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.tensor(0.5, dtype=DOUBLE))
            self.register_buffer("sum", torch.ones(2, dtype=DOUBLE))

        def forward(self, t, y):
            self.sum.add_(0.5)
            return y * (self.weight * self.sum) if t < 0.4 else y * self.weight

    for start in (double(1, 2), double(1, 2).mul_(1)):
        with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda tensor: tensor):
            y = odeint_adjoint(Added(), start, times(points=3), method="euler")
            with pytest.raises(errors.RecomputationError, match="changed in place"):
                y[-1].sum().backward()


@pytest.mark.parametrize("enabled", [False, True])
def test_a_result_within_rounding_is_no_other(enabled, monkeypatch):
    """As where sums are taken in any order, in a low dtype too, if the device is one that does so."""
    monkeypatch.setattr(recomputation, "sums_in_order", lambda device: not enabled)
    generator, model = torch.Generator().manual_seed(0), Net(dtype=torch.float32)

    def roughly(module, given, output):
        signs = torch.randint(0, 2, output.shape, generator=generator) * 2 - 1
        return output * (1 + 2 * signs * torch.finfo(output.dtype).eps)

    model.first.register_forward_hook(roughly)
    with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        y = odeint_adjoint(model, torch.tensor([0.3, -0.7]), times().float(), method="rk4")
    y.sum().backward()
    assert model.first.weight.grad.isfinite().all()


@pytest.mark.parametrize("name", ["another object", "functional_call", "assign"])
@pytest.mark.parametrize("factor", [1.0, 1.001])
def test_another_parameter_in_the_place_of_one(name, factor):
    """Of other values it is an error; of the same ones the gradients are the first one's."""
    model, y0 = Net(), double(0.3, -0.7)
    parameters = {key: factor * value.detach() for key, value in model.state_dict().items()}
    given = {key: value.requires_grad_() for key, value in parameters.items()}
    wanted = torch.autograd.grad(odeint(model, y0, times(), method="rk4").sum(), model.first.weight)
    first = given["first.weight"] if name == "functional_call" else model.first.weight
    if name == "functional_call":

        class Solved(nn.Module):
            def __init__(self):
                super().__init__()
                self.net = model

            def forward(self):
                return odeint_adjoint(self.net, y0, times(), method="rk4")

        y = torch.func.functional_call(Solved(), {f"net.{key}": value for key, value in given.items()}, ())
    else:
        y = odeint_adjoint(model, y0, times(), method="rk4")
        if name == "assign":
            model.load_state_dict(given, assign=True)
        else:
            model.first.weight = nn.Parameter(given["first.weight"])
    if factor == 1.0:
        assert torch.equal(torch.autograd.grad(y.sum(), first)[0], wanted[0])
    else:
        with pytest.raises(errors.RecomputationError, match="gives another result"):
            y.sum().backward()


def test_a_velocity_may_make_parameters_of_its_own():
    weight = double(0.5, 0.6)
    y0 = double(0.3, -0.7).requires_grad_()

    def func(t, y):
        return torch.tanh(nn.Parameter(weight.clone()) * y)

    found = [torch.autograd.grad(solve(func, y0, times(), method="rk4").sum(), y0)[0] for solve in (odeint, adjoint)]
    assert torch.equal(*found)


class Hidden(nn.Module):
    """Its last layer begins with zeros, as those of flows do: the result is the same for every context."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(2, 3, dtype=DOUBLE), nn.Linear(3, 2, dtype=DOUBLE)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)
        self.context = double(1, 1, 1)

    def forward(self, t, y):
        return self.last(torch.tanh(self.first(y) + self.context))


@pytest.mark.parametrize("method", ["dopri5", "euler", "implicit_adams"])
@pytest.mark.parametrize("other", ["context", "sign", "weight", "index"])
def test_what_the_result_hides_is_seen_by_what_is_saved(method, other):
    model = Hidden()
    if other == "index":
        index = torch.tensor([0, 1, 2])
        model.first.register_forward_hook(lambda module, given, output: output[..., index])
    y = odeint_adjoint(model, double(0.3, -0.7), times(), **options_of(method))
    if other == "context":
        model.context = double(1, 1, 1.001)
    elif other == "sign":
        model.context = -model.context
    elif other == "weight":
        model.first.weight.data = model.first.weight.data * 1.001
    else:
        index = torch.tensor([2, 1, 0])
    with pytest.raises(errors.RecomputationError, match="gives another result"):
        y.square().sum().backward()


def bfloat16_entry():
    weight = nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
    other = weight.detach().clone()
    other[7, 3] = -1
    return lambda t, y: y * weight.tanh(), torch.ones(64, 64).bfloat16(), lambda: setattr(weight, "data", other)


def masked_logits():
    weight, held = double(1, 0, 0, 2, 3, 4).reshape(3, 2), {"mask": double(float("-inf"), 0, 0)}

    def func(t, y):
        return torch.logsumexp(torch.stack([weight @ y, weight @ y]) + held["mask"], 1)

    return func, double(0, 0), lambda: held.update(mask=double(0, float("-inf"), 0))


def factor(before, after):
    held = {"factor": before}

    def func(t, y):
        product = held["factor"] @ y if held["factor"].ndim == 2 else held["factor"] * y
        return product.to(y.dtype)

    return lambda: (func, double(0, 0), lambda: held.update(factor=after))


def conjugate():
    held = {"other": lambda x: x}

    def func(t, y):
        number = torch.complex(y[0], y[1])
        return torch.view_as_real(number * COMPLEX + number * held["other"](COMPLEX))

    return func, double(0, 0), lambda: held.update(other=torch.conj)


COMPLEX = torch.tensor(1 + 2j, dtype=torch.complex128)
SPARSE = double(1, 2, 0, 1).reshape(2, 2).to_sparse()
HIDDEN_BY_SIZE_OR_KIND = {
    "one entry in bfloat16": bfloat16_entry,
    "an infinity": masked_logits,
    "uint8": factor(torch.tensor([1, 1], dtype=torch.uint8), torch.tensor([0, 3], dtype=torch.uint8)),
    "a whole number": factor(torch.tensor(1), torch.tensor(3)),
    "the conjugate of another that is saved": conjugate,
    "sparse": factor(SPARSE, SPARSE * 3),
    "sparse CSR": factor(SPARSE.to_sparse_csr(), (SPARSE * 3).to_sparse_csr()),
}


@pytest.mark.parametrize("name", HIDDEN_BY_SIZE_OR_KIND)
def test_no_size_and_no_kind_of_tensor_hides_a_change(name):
    func, y0, change = HIDDEN_BY_SIZE_OR_KIND[name]()
    y = adjoint(func, y0.requires_grad_(), torch.linspace(0, 1, 3, dtype=DOUBLE), method="rk4")
    change()
    with pytest.raises(errors.RecomputationError, match="gives another result"):
        y.sum().backward()


def test_the_error_tells_by_how_much():
    model = Net()
    y = odeint_adjoint(model, double(0.3, -0.7), times(), method="rk4")
    model.last.bias.data = model.last.bias.data * (1 + 1e-9)
    with pytest.raises(errors.RecomputationError, match=r"differ by \d\.\de-(09|10|11)"):
        y.sum().backward()


class Unwritten(torch.autograd.Function):
    """Saves memory that nobody has written, as kernels do, and does not read it."""

    @staticmethod
    def forward(ctx, x):
        garbage = x.new_empty(7)
        garbage.data.copy_(torch.randn(7)) if not torch.utils.deterministic.fill_uninitialized_memory else None
        whole = torch.empty(5, dtype=torch.uint8)
        ctx.save_for_backward(x, garbage, whole)
        return x.sin()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.saved_tensors[0].cos()


@pytest.mark.parametrize(
    "layer",
    [nn.RReLU().eval(), nn.BatchNorm1d(4, momentum=None, dtype=DOUBLE), Unwritten.apply],
    ids=["RReLU", "BatchNorm, all batches alike", "unwritten"],
)
def test_what_the_derivative_does_not_read_is_no_false_alarm(layer):
    linear = nn.Linear(4, 4, dtype=DOUBLE)
    y0 = torch.linspace(-1, 1, 12, dtype=DOUBLE).reshape(3, 4).requires_grad_()
    found = []
    for solve in (odeint, adjoint):
        y = solve(lambda t, y: layer(linear(y)), y0, times(), method="rk4")
        found.append(torch.autograd.grad(y.square().sum(), [y0, *linear.parameters()]))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def test_memory_that_looks_like_a_number_is_no_false_alarm():
    """Solves one after the other: what was filled for one is handed out to the next."""
    linear, kept = nn.Linear(4, 4, dtype=DOUBLE), []
    y0 = torch.linspace(-1, 1, 12, dtype=DOUBLE).reshape(3, 4).requires_grad_()
    for _ in range(6):
        y = adjoint(lambda t, y: Unwritten.apply(linear(y)), y0, times(), method="rk4")
        kept.append(torch.autograd.grad(y.square().sum(), linear.weight)[0])
    assert all(map(kept[0].equal, kept))


@pytest.mark.parametrize("other", ["counter", "generator"])
@pytest.mark.parametrize("hole", [math.nan, math.inf])
def test_a_number_that_is_missing_hides_no_change(other, hole):
    model = Net()
    OTHERS[other][0](model)
    y0 = torch.tensor([[hole, 0.2], [0.3, -0.7], [0.1, 0.4]], dtype=DOUBLE).requires_grad_()
    y = odeint_adjoint(model, y0, times(), method="rk4")
    with pytest.raises(errors.RecomputationError, match="gives another result"):
        y.nan_to_num(0, 0, 0).square().sum().backward()


@pytest.mark.parametrize("last", [6, 100])
def test_what_is_computed_to_tell_memory_from_numbers_hides_no_change(last):
    """A counter of the user's gives NaN at the call for which memory is filled, and later."""

    class Scheduled(Net):
        def forward(self, t, y):
            rate = super().forward(t, y)
            return rate * (1 if self.nfe < 5 else math.nan if 6 <= self.nfe <= last else 1.01)

    y = odeint_adjoint(Scheduled(), double(0.3, -0.7), double(0, 0.1, 0.2, 0.3, 0.4), method="euler")
    with pytest.raises(errors.RecomputationError, match="gives another result"):
        y[-1].square().sum().backward()


class LateBackward(Net):
    def forward(self, t, y):
        rate = super().forward(t, y)
        if t > 0.5:
            torch.autograd.grad(rate.sum(), self.last.weight, retain_graph=True)
            rate.square().sum().backward(retain_graph=True)
        return rate


class BackwardOfASum(Net):
    """Saves nothing."""

    def forward(self, t, y):
        self.first.weight.sum().backward()
        return super().forward(t, y)


class BackwardOfATensor(Net):
    def __init__(self):
        super().__init__()
        self.scale = double(1, 2).requires_grad_()

    def forward(self, t, y):
        (self.scale * y.detach()).square().sum().backward()
        return super().forward(t, y)


@pytest.mark.parametrize("kind", [LateBackward, BackwardOfASum, BackwardOfATensor])
def test_a_velocity_that_adds_to_gradients_is_an_error(kind):
    with pytest.raises(errors.RecomputationError, match=r"func calls backward\(\)(.|\n)*autograd\.grad"):
        odeint_adjoint(kind(), double(0.3, -0.7), times(), method="rk4")


def test_another_number_of_threads_in_the_backward():
    """Sums are taken in another order."""
    layer = nn.Linear(700, 700, dtype=DOUBLE)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        y = adjoint(lambda t, y: layer(y), torch.ones(64, 700, dtype=DOUBLE), double(0, 0.1), method="euler")
        torch.set_num_threads(2)
        y.sum().backward()
    finally:
        torch.set_num_threads(before)
    assert layer.weight.grad.isfinite().all()


def test_a_velocity_that_spoils_its_own_tensors_is_an_error():
    """Of autograd in odeint; here of the step, which finds it, too."""
    weight = double(0.5, 0.6).requires_grad_()

    def func(t, y):
        rate = torch.exp(weight * y)
        return rate.mul_(2)  # the derivative of exp needs its result

    for solve in (odeint, adjoint):
        y = solve(func, double(0.3, -0.7), times(), method="euler")
        with pytest.raises(RuntimeError, match=r"inplace operation|changed in place"):
            y.sum().backward()


def test_how_seldom_a_change_is_missed():
    """As Migration says: of a thousand roundings of a norm, about one in 300 for one direction; of 10^5 none."""
    generator, prints = torch.Generator().manual_seed(0), Fingerprints()
    rounding = torch.finfo(torch.float32).eps
    for roundings, most in ((1e3, 0.01), (1e5, 0.0)):
        missed = 0
        for _ in range(1000):
            before = torch.randn(500, generator=generator)
            change = torch.randn(500, generator=generator)
            now = before + roundings * rounding * change * before.norm() / change.norm()
            numbers = prints.of(before, []).numbers
            missed += bool(prints.of(now, []).is_near(numbers).all())
        assert missed <= 1000 * most


def test_autocast_does_not_round_what_is_compared():
    weight, shift = torch.tensor(0.5, requires_grad=True), torch.zeros(512, 512)
    with torch.autocast("cpu", torch.bfloat16):
        y = adjoint(lambda t, y: (y + shift) * weight, torch.ones(512, 512), times().float(), method="euler")
        shift.data += 1e-5
        with pytest.raises(errors.RecomputationError, match="gives another result"):
            y.sum().backward()


def test_the_default_device_is_not_that_of_the_directions():
    _whole_direction.cache_clear()
    has_equality.cache_clear()
    y0, t, found = double(0.3, -0.7, 0.2, 0.9).reshape(2, 2), times(), []
    for solve in (odeint, odeint_adjoint):
        model = Normed()
        with torch.device("meta"):
            solve(model, y0, t, method="rk4").sum().backward()
        found.append([*(parameter.grad for parameter in model.parameters()), *model.buffers()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


class Tripled(TorchFunctionMode):
    """In which a sine is three."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        return 3 * found if func is torch.sin else found


class Waving(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(double(0.5)[0])

    def forward(self, t, y):
        return torch.sin(self.weight * y)


@pytest.mark.parametrize("inside", [True, False])
def test_a_mode_of_the_forward_is_active_in_the_backward(inside):
    gradients = []
    for solve in (odeint, odeint_adjoint):
        model = Waving()
        with contextlib.ExitStack() as stack:
            stack.enter_context(Tripled())
            loss = solve(model, double(0.3, -0.7), times(), method="rk4").square().sum()
            if not inside:
                stack.close()
            loss.backward()
        gradients.append(model.weight.grad)
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-13)
    assert torch.sin(double(1)) < 1  # it has ended


def swapped(n):
    """A matrix of as many columns as a direction is long, in which two blocks are transposed."""
    before = torch.zeros(n, LENGTH)
    before[:, :n] = torch.arange(float(n * n)).view(n, n) / n**2
    after = before.clone()
    after[:, :n] = before[:, :n].T
    return before, after


def test_a_matrix_that_is_transposed_is_another():
    before, after = swapped(8)
    prints = Fingerprints()
    assert not prints.of(after, []).is_near(prints.of(before, []).numbers).all()


def padded(dtype):
    def func(t, y, weight):
        rows = torch.empty((64, 3), dtype=dtype)
        rows[:4] = y
        return (rows * weight)[:4].real

    return func


def normalised(t, y, weight):
    rows = y.new_empty((64, 3))
    rows[:4] = y
    return (rows / rows.norm(dim=1, keepdim=True) * weight)[:4]


def compiled_beside(t, y, weight):
    rows = y.new_empty((64, 3))
    rows[:4] = y
    return (COMPILED(rows) * weight)[:4]


COMPILED = torch.compile(torch.tanh, backend="eager")
PARTS = {
    "complex": padded(torch.complex128),
    "NaN for zeros": normalised,
    "compiled": compiled_beside,
}


@pytest.mark.filterwarnings("ignore:func saves a tensor of shape")
@pytest.mark.parametrize("name", PARTS)
def test_what_follows_from_memory_that_nobody_has_written_is_no_false_alarm(name):
    found = []
    y0 = torch.rand(4, 3, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
    for solve in (odeint, adjoint):
        weight = torch.ones(64, 1, dtype=DOUBLE, requires_grad=True)
        y = solve(lambda t, y: PARTS[name](t, y, weight), y0, times(), method="rk4")  # noqa: B023
        keep = [torch.full((64, 3), float(number), dtype=DOUBLE) for number in range(8)]
        del keep
        y.sum().backward()
        found.append(weight.grad[:4])
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=0)


def test_a_complex_tensor_of_which_a_part_was_never_written_is_warned_of():
    weight = torch.ones((), dtype=DOUBLE, requires_grad=True)
    y = adjoint(lambda t, y: PARTS["complex"](t, y, weight), torch.ones(4, 3, dtype=DOUBLE), times(), method="rk4")
    keep = [torch.full((64, 3), float(number), dtype=torch.complex128) for number in range(8)]
    del keep
    with pytest.warns(UserWarning, match=r"shape \(64, 3\) for its derivative, of which 12 entries are written"):
        y.sum().backward()
