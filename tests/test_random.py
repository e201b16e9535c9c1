"""Random numbers and running statistics inside the velocity: replayed in the backward, updated once per evaluation."""

import copy

import pytest
import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import rampde_fx
from rampde_fx.ir import graphs, sources, tracing
from rampde_fx.ir.captured import CapturedStep
from rampde_fx.passes.replay_random import replay_random
from rampde_fx.torch_private import fake_tensors
from tests.comparison import compiled, gradients, relative_errors
from tests.models import Flow


class Dropout(Flow):
    """Two evaluations per step, each with a mask of its own."""

    def forward(self, y, t):
        for t_i, dt in rampde_fx.steps(t):
            k = nn.functional.dropout(self.velocity(t_i, y), 0.4)
            y = y + dt * nn.functional.dropout(self.velocity(t_i, y + dt * k), 0.4)
        return y


class FusedDropout(Flow):
    """The operator that dropout is on a GPU: it gives its mask, too."""

    def forward(self, y, t):
        for t_i, dt in rampde_fx.steps(t):
            k, _ = torch.native_dropout(self.velocity(t_i, y), 0.4, True)
            y = y + dt * k
        return y


class Noise(Flow):
    """Euler-Maruyama, with a learned diffusion, and the other distributions that can be replayed."""

    def __init__(self, **sizes):
        super().__init__(**sizes)
        self.diffusion = nn.Parameter(torch.rand(self.dim))

    def forward(self, y, t):
        for t_i, dt in rampde_fx.steps(t):
            noise = torch.randn_like(y) + torch.rand(y.shape) + torch.empty_like(y).uniform_(-1, 1)
            noise = noise + torch.bernoulli(torch.sigmoid(y.detach())) + torch.normal(0.0, 1.0, y.shape)
            k = self.velocity(t_i, y) + torch.empty_like(y).exponential_(2.0) * y
            y = y + dt * k + dt.sqrt() * self.diffusion * noise
        return y


class BatchNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Linear(7, 5))

    def forward(self, y, t):
        for _, dt in rampde_fx.steps(t):
            k = self.net(y)
            y = y + dt * self.net(y + dt * k)
        return y


class Normed(nn.Module):
    """BatchNorm of images without affine parameters, and an evaluation counter of the user's."""

    def __init__(self):
        super().__init__()
        self.norm, self.layer = nn.BatchNorm2d(2, affine=False), nn.Conv2d(2, 2, 3, padding=1)
        self.register_buffer("evaluations", torch.zeros((), dtype=torch.int64))

    def forward(self, y, t):
        for _, dt in rampde_fx.steps(t):
            self.evaluations += 1
            y = y + dt * self.layer(torch.relu(self.norm(y)))
        return y


def seeded(function):
    def run(*args):
        torch.manual_seed(7)
        return function(*args)

    return run


class FusedDropoutOff(Flow):
    def forward(self, y, t):
        for t_i, dt in rampde_fx.steps(t):
            k, kept = torch.native_dropout(self.velocity(t_i, y), 0.4, False)
            y = y + dt * k * kept
        return y


def test_a_dropout_that_is_off():
    model, y, t = FusedDropoutOff(), torch.randn(3, 5), torch.linspace(0, 1, 4)
    torch.testing.assert_close(compiled(model, torch.float32)(y, t), model(y, t))


@pytest.mark.parametrize(
    ("model", "loop"), [(Dropout, "scan"), (Dropout, "unroll"), (Noise, "scan"), (FusedDropout, "scan")]
)
def test_recomputation_draws_the_same_numbers(model, loop):
    model = model().double()
    y, t = torch.randn(3, 5, dtype=torch.float64, requires_grad=True), torch.linspace(0, 1, 4, dtype=torch.float64)
    function = seeded(compiled(model, torch.float64, loop=loop))
    assert not torch.equal(function(y, t), model(y, t))  # random indeed
    assert torch.autograd.gradcheck(lambda y, *_: function(y, t), (y, *model.parameters()), fast_mode=True)


DRAWN = {
    "dropout": lambda y: nn.functional.dropout(y, 0.4),
    "rand": lambda y: torch.rand(y.shape, device=y.device),
    "rand_like": torch.rand_like,
    "randn": lambda y: torch.randn(y.shape, device=y.device),
    "randn_like": torch.randn_like,
    "normal": lambda y: torch.normal(0.0, 1.0, y.shape, device=y.device),
    "bernoulli": lambda y: torch.bernoulli(torch.sigmoid(y)),
}


@pytest.mark.parametrize("draw", DRAWN)
def test_what_is_drawn_on_a_gpu_is_drawn_again(draw):
    """By what torch traces there, for which none is needed."""
    with FakeTensorMode():
        y, t, weight = (torch.empty(size, device="cuda") for size in ((3, 5), (), (5, 5)))
    given = fx.symbolic_trace(lambda y: y)
    graphs.placeholders(given)[0].meta["example_value"] = y
    with fake_tensors.fake_mode_of(given):
        step = tracing.trace(lambda y, t, weight: [y + t * DRAWN[draw](y @ weight)], [y, t, weight])
        assert any(map(graphs.draws_random_numbers, step.graph.nodes))
        kinds = (sources.CarrySource, sources.TimeSource, sources.InvariantSource)
        captured = CapturedStep([kind.__new__(kind) for kind in kinds], step, [], graphs.placeholders(step))
        replayed = replay_random(captured).step
    assert not any(map(graphs.draws_random_numbers, replayed.graph.nodes))
    assert all(graphs.value(node).device.type == "cuda" for node in graphs.placeholders(replayed))


def test_low_precision_follows_the_same_masks():
    wide = Dropout(width=16)
    low = copy.deepcopy(wide)
    y, t = torch.randn(64, 5), torch.linspace(0, 1, 4)
    wanted = gradients(seeded(compiled(wide, torch.float32)), wide, y, t)
    errors = relative_errors(gradients(seeded(compiled(low, torch.float16)), low, y, t), wanted)
    assert max(errors[:2] + errors[3:]) < 2e-3, errors


def test_masks_differ_between_calls_steps_evaluations_and_entries_and_keep_their_share():
    p = 0.4

    @rampde_fx.mixed_precision(dtype=torch.float32)
    def masks(y, t):
        found = []
        for _, dt in rampde_fx.steps(t):
            first = nn.functional.dropout(torch.ones_like(y), p)
            second = nn.functional.dropout(torch.ones_like(y), p)
            y = y + dt * (first - second)
            found += [first, second]
        return torch.stack(found)

    function = torch.compile(masks, backend="rampde_fx", options={"compiler": "aot_eager"}, fullgraph=True)
    y, t = torch.zeros(100, 200), torch.linspace(0, 1, 6)
    kept = torch.cat([function(y, t), function(y, t)]) > 0
    assert kept.shape == (20, 100, 200)
    shares = kept.float().mean((1, 2))
    assert (shares - (1 - p)).abs().max() < 5 * (p * (1 - p) / 20_000) ** 0.5
    centred = kept.float().flatten(1) - shares[:, None]
    correlation = centred @ centred.T / (p * (1 - p) * 20_000)
    assert (correlation - torch.eye(20)).abs().max() < 5 / 20_000**0.5 + 0.02
    neighbours = (centred[:, 1:] * centred[:, :-1]).mean(1) / (p * (1 - p))
    assert neighbours.abs().max() < 5 / 20_000**0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_distributions(dtype):
    seed, like = torch.tensor(2**61 + 12345), torch.empty(200, 1000, dtype=dtype)
    uniform = torch.ops.rampde_fx.uniform(seed, torch.tensor(3), 1, like)
    normal = torch.ops.rampde_fx.normal(seed, torch.tensor(3), 2, like)
    assert uniform.dtype == normal.dtype == dtype and uniform.min() >= 0 and uniform.max() < 1
    u, z, n = uniform.double(), normal.double(), like.numel()
    granularity = {torch.float16: 2**-11, torch.bfloat16: 2**-8}.get(dtype, 0.0)
    assert abs(u.mean() - (1 - granularity) / 2) < 5 * (1 / 12 / n) ** 0.5
    assert abs(u.var() - 1 / 12) < 1e-3
    assert abs(z.mean()) < 5 / n**0.5 and abs(z.var() - 1) < 0.02 and abs((z**4).mean() - 3) < 0.12
    counts = torch.histc(u, 64, 0, 1)
    assert ((counts - n / 64) ** 2 / (n / 64)).sum() < 63 + 5 * (2 * 63) ** 0.5  # chi squared


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("form", [BatchNorm, Normed])
def test_running_statistics_are_updated_once_per_evaluation(form, dtype):
    shape = (16, 5) if form is BatchNorm else (4, 2, 6, 6)
    eager = form()
    model = copy.deepcopy(eager)
    function = compiled(model, dtype)
    y, t = 3 * torch.randn(shape) + 1, torch.linspace(0, 1, 5)
    for _ in range(2):
        wanted, got = gradients(eager, eager, y, t), gradients(function, model, y, t)
        bound = 2e-6 if dtype is torch.float32 else 1e-2
        keep = [i for i in range(len(wanted)) if wanted[i].norm() > 1e-4]  # a bias before a norm has a zero gradient
        errors = relative_errors([got[i] for i in keep], [wanted[i] for i in keep])
        assert max(errors) < bound, errors
    for (name, now), (_, then) in zip(model.named_buffers(), eager.named_buffers(), strict=True):
        assert now.dtype == then.dtype and not now.requires_grad
        if now.is_floating_point():
            assert (now - then).abs().max() < bound * (1 + then.abs().max()), name
        else:
            assert torch.equal(now, then), name
    model.eval(), eager.eval()
    assert torch.allclose(compiled(model, torch.float32)(y, t), eager(y, t), rtol=0.05, atol=0.05)


def test_other_distributions_are_refused():
    class Poisson(Flow):
        def forward(self, y, t):
            for t_i, dt in rampde_fx.steps(t):
                y = y + dt * self.velocity(t_i, y) * torch.poisson(y.abs())
            return y

    with pytest.raises(rampde_fx.errors.RandomVelocityError, match="poisson") as raised:
        compiled(Poisson(), torch.float16)(torch.randn(4, 5), torch.linspace(0, 1, 4))
    assert "torch.poisson(y.abs())" in str(raised.value)
