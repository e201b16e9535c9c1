"""What must hold on every device: on the CPU without Inductor, on a GPU, where there is one, as users compile."""

import copy

import pytest
import torch
from torch import nn

import rampde_fx
from rampde_fx import AdjointScaling, PrecisionPolicy, torchdiffeq
from rampde_fx.errors import RecomputationError
from tests.benchmarks.cases import AttentionVelocity, PotentialFlow
from tests.benchmarks.contenders import solve_by_odeint
from tests.benchmarks.measure import host_synchronisations, peak_bytes, saved_bytes, training_step
from tests.comparison import gradients, relative_errors
from tests.models import RK4, LogDensity, Solved
from tests.test_random import Dropout
from tests.test_scaling import Steep

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU")
BOUNDS = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}  # a few unit roundoffs
GPU = torch.device("cuda")
MODES = ("default", "reduce-overhead")


@pytest.fixture(params=["cpu", *(pytest.param(f"cuda {mode}", marks=NO_GPU) for mode in MODES)])
def where(request):
    """A device, and a mode of torch.compile."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    device, _, mode = request.param.partition(" ")
    return torch.device(device), mode or "default"


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=NO_GPU)])
def device(request):
    """A device, where nothing is compiled by Inductor."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    return torch.device(request.param)


def compiled_for(where, model, **policy):
    device, mode = where
    marked = rampde_fx.mixed_precision(model, policy=PrecisionPolicy(**{"velocity": torch.float16, **policy}))
    if device.type == "cpu":
        return torch.compile(marked, backend="rampde_fx", options={"compiler": "aot_eager"}, fullgraph=True)
    return torch.compile(marked, backend="rampde_fx", mode=mode, fullgraph=True)


def errors(where, model, y, t, **policy):
    """Relative errors of outputs and gradients against float64 at the third call, at which a graph is replayed."""
    device, _ = where
    exact = copy.deepcopy(model).double().to(device)
    model = model.to(device)
    function = compiled_for(where, model, **policy)
    for call in range(3):
        y = y + 0.1 * call
        got = gradients(function, model, y.to(device), t.to(device))
    wanted = gradients(exact, exact, y.double().to(device), t.double().to(device))
    return relative_errors([value.double() for value in got], wanted)


class Convolution(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.first, self.norm = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.InstanceNorm2d(width, affine=True)

    def forward(self, t, y):
        return torch.tanh(self.norm(self.first(y))) + t


@pytest.mark.parametrize("dtype", BOUNDS)
class TestGradients:
    """Against float64. The gradient of t is a sum in which terms cancel, so it is left out here."""

    @staticmethod
    def largest(found):
        output, state, _, *parameters = found
        return max(output, state, *parameters)

    def test_a_perceptron(self, where, dtype):
        model, y = RK4(dim=5, width=32), torch.randn(64, 5)
        found = errors(where, model, y, torch.linspace(0, 1, 9), velocity=dtype)
        assert self.largest(found) < BOUNDS[dtype]

    def test_a_convolution(self, where, dtype):
        model, y = Solved(Convolution(), method="midpoint"), torch.randn(3, 4, 8, 8)
        found = errors(where, model, y, torch.linspace(0, 1, 5), velocity=dtype)
        assert self.largest(found) < 2 * BOUNDS[dtype]

    def test_a_dropout(self, where, dtype):
        """Against the same masks in float32, which a seed repeats."""
        model, y, t = Dropout(dim=5, width=32).to(where[0]), torch.randn(64, 5).to(where[0]), torch.linspace(0, 1, 5)
        found = []
        for velocity in (torch.float32, dtype):
            torch._dynamo.reset()
            torch.manual_seed(0)
            found.append(gradients(compiled_for(where, model, velocity=velocity), model, y, t.to(where[0])))
        assert self.largest(relative_errors(*found[::-1])) < 2 * BOUNDS[dtype]

    @pytest.mark.parametrize("heads", [2, 4])
    def test_an_attention(self, where, dtype, heads):
        """Heads of size 8; and of size 4, for which CUDA has no kernel in half precision."""
        model, y = Solved(AttentionVelocity(16, heads), method="rk4"), torch.randn(3, 12, 16)
        found = errors(where, model, y, torch.linspace(0, 1, 5), velocity=dtype)
        assert self.largest(found) < 2 * BOUNDS[dtype]


POLICIES = {
    "compensated": {"accumulation": "compensated"},
    "segments": {"checkpoint": 3},
    "kept": {"checkpoint": "none"},
    "unrolled": {"loop": "unroll"},
    "scaled states": {"storage_scaling": "dynamic"},
}


class TestPolicies:
    @pytest.mark.parametrize("name", POLICIES)
    def test_float16(self, where, name):
        model, y, t = RK4(dim=5, width=16), torch.randn(32, 5), torch.linspace(0, 1, 8)
        found = errors(where, model, y, t, velocity=torch.float16, **POLICIES[name])
        assert TestGradients.largest(found) < BOUNDS[torch.float16]

    def test_states_of_one_byte(self, where):
        model, y, t = RK4(dim=5, width=16), torch.randn(32, 5), torch.linspace(0, 1, 8)
        found = errors(where, model, y, t, velocity=torch.float16, storage=torch.float8_e4m3fn)
        assert TestGradients.largest(found) < 4 * 2.0**-4  # unit roundoff of a stored state

    def test_adaptive_steps(self, where):
        model = Solved(RK4(dim=5, width=16).velocity, method="dopri5", rtol=1e-2, atol=1e-3)
        found = errors(where, model, torch.randn(32, 5), torch.linspace(0, 1, 3), velocity=torch.float16)
        assert TestGradients.largest(found) < 2e-2  # two searches, in float16 and float64, to the tolerances

    def test_an_inner_derivative(self, where):
        device, _ = where
        model = LogDensity(dim=5, width=16).to(device)
        y, t = torch.randn(32, 5).to(device), torch.linspace(0, 1, 8, device=device)
        function, exact = compiled_for(where, model, velocity=torch.float16), copy.deepcopy(model)
        for _ in range(3):
            got = gradients(function, model, y, t)
        wanted = gradients(exact, exact, y, t)
        assert max(relative_errors(got, wanted)) < 2 * BOUNDS[torch.float16]


class TestScaling:
    @staticmethod
    def prepared(where):
        device, _ = where
        model = RK4(dim=5, width=16).to(device)
        y, t = torch.randn(32, 5).to(device), torch.linspace(0, 1, 8, device=device)
        return compiled_for(where, model, velocity=torch.float16), model, y, t

    def test_a_small_loss(self, where):
        function, model, y, t = self.prepared(where)
        for _ in range(3):
            small = gradients(function, model, y, t, loss_scale=1e-8)
            large = gradients(function, model, y, t)
        assert max(relative_errors([1e8 * g for g in small[1:]], large[1:])) < 1e-3

    def test_a_backward_that_is_repeated(self, where):
        device, _ = where
        model = Steep(64).to(device)
        exact = copy.deepcopy(model).double()
        function = compiled_for(where, model, velocity=torch.float16)
        rampde_fx.backward_counts(reset=True)
        y, t = 1e-3 * (1 + torch.rand(16, 64)).to(device), torch.linspace(0, 1e-6, 4, device=device)
        for _ in range(3):
            got = gradients(function, model, y, t)
        wanted = gradients(exact, exact, y.double(), t.double())
        assert max(relative_errors([value.double() for value in got], wanted)) < 5e-3
        (count,) = rampde_fx.backward_counts(reset=True).values()
        assert count.passes == count.repeated == 3 and count.overflowed == 0

    def test_a_sum_over_a_batch_beyond_the_range(self, where):
        """Sums of weight gradients over 70,000 entries of magnitude 1: formed in float32 they do not overflow."""
        model = nn.Linear(4, 4, bias=False)
        nn.init.constant_(model.weight, 0.25)

        class Sum(nn.Module):
            def __init__(self):
                super().__init__()
                self.velocity = model

            def forward(self, y, t):
                for _, dt in rampde_fx.steps(t):
                    y = y + dt * self.velocity(y)
                return y

        device, _ = where
        flow = Sum().to(device)
        policy = {"velocity": torch.float16, "scaling": AdjointScaling(target=1.0, max_attempts=1)}
        function = compiled_for(where, flow, **policy)
        y, t = torch.ones(70_000, 4, device=device), torch.linspace(0, 1, 3, device=device)
        for _ in range(3):
            got = gradients(function, flow, y, t)
        exact = copy.deepcopy(flow).double()
        wanted = gradients(exact, exact, y.double(), t.double())
        assert max(relative_errors([value.double() for value in got], wanted)) < 4e-3

    def test_a_monitor(self, where):
        function, model, y, t = self.prepared(where)
        with rampde_fx.monitor() as monitor:
            for _ in range(3):
                gradients(function, model, y, t)
        assert len(monitor.records) == 3
        for record in monitor.records:
            assert (record.scales > 0).all() and torch.isfinite(record.largest).all()


def test_times_on_the_host(where):
    device, _ = where
    model = Solved(RK4(dim=5, width=16).velocity, method="rk4").to(device)
    y, t = torch.randn(32, 5).to(device), torch.linspace(0, 1, 8)
    function = compiled_for(where, model, velocity=torch.float16)
    got = function(y, t)
    assert got.device.type == device.type
    assert relative_errors([got], [function(y, t.to(device))])[0] < BOUNDS[torch.float16]


def test_inference(where):
    """A loop with one result, which has no backward."""
    device, _ = where
    model, y, t = RK4(dim=5, width=16).to(device), torch.randn(32, 5).to(device), torch.linspace(0, 1, 8)
    function = compiled_for(where, model, velocity=torch.float16)
    with torch.no_grad():
        for _ in range(3):
            got = function(y, t.to(device))
        wanted = copy.deepcopy(model)(y, t.to(device))
    assert relative_errors([got], [wanted])[0] < BOUNDS[torch.float16]


@NO_GPU
class TestCosts:
    """Counts and bytes on a GPU; the CPU's are in tests/test_cost.py."""

    @staticmethod
    def flow(mode="default", **policy):
        model = PotentialFlow(solve_by_odeint, dim=15, width=128).to(GPU)
        function = compiled_for((GPU, mode), model, **policy)
        x, t = torch.randn(512, 18, device=GPU), torch.linspace(0, 1, 17, device=GPU)
        for _ in range(3):
            training_step(lambda: function(x, t), model)
        return lambda: function(x, t), model

    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 0), (torch.bfloat16, 0), (torch.float16, 1)])
    def test_the_host_waits_at_most_once_in_a_training_step(self, dtype, most, mode):
        loss, model = self.flow(mode, velocity=dtype)
        assert host_synchronisations(lambda: training_step(loss, model), GPU) <= most

    def test_memory(self):
        peaks, saved = [], []
        of_the_loss = 512 * 18 * 4  # the final state
        for dtype in (torch.float32, torch.float16):
            loss, model = self.flow(velocity=dtype)
            peaks.append(peak_bytes(lambda loss=loss, model=model: training_step(loss, model), GPU))
            saved.append(saved_bytes(loss, model) - of_the_loss)
        assert saved[1] <= 0.51 * saved[0]
        assert peaks[1] <= 0.6 * peaks[0]


def test_statistics(where):
    """Counted on the device; the same as those of the same steps uncompiled."""
    device, _ = where
    model = Solved(RK4(dim=5, width=16).velocity, method="dopri5", options={"stats": True}).to(device)
    y, t = torch.randn(32, 5).to(device), torch.linspace(0, 1, 3, device=device)
    function = compiled_for(where, model, velocity=torch.float32)
    for _ in range(3):
        _, found = function(y, t)
    assert found.accepted.device.type == device.type
    _, wanted = model(y, t)
    assert [int(count) for count in found] == [int(count) for count in wanted]


@pytest.mark.parametrize("budget", [0, 20_000, 10**9])
def test_a_budget_of_memory(where, budget):
    model, y, t = RK4(dim=5, width=16), torch.randn(32, 5), torch.linspace(0, 1, 8)
    checkpoint = rampde_fx.MemoryBudget(max_bytes=budget) if budget else "auto"
    found = errors(where, model, y, t, velocity=torch.float16, checkpoint=checkpoint)
    assert TestGradients.largest(found) < BOUNDS[torch.float16]


def test_a_check(device):
    model, y = RK4(dim=5, width=16).to(device), torch.randn(32, 5).to(device)
    policy = PrecisionPolicy(velocity=torch.float16)
    found = rampde_fx.check(model, y, torch.linspace(0, 1, 4, device=device), policies=[policy])
    (row,) = [row for row in found.rows if row.policy == policy]
    assert 0 < row.error < BOUNDS[torch.float16]


class Layers(nn.Module):
    """A velocity of images, (batch, 4, 6, 6), that keeps statistics, draws numbers and adds entries in any order."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.evaluations = kind, 0
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        if kind == "a spectral norm":
            self.conv = nn.utils.parametrizations.spectral_norm(self.conv)
        self.norm = nn.BatchNorm2d(4)
        self.register_buffer("index", torch.arange(5000) % 3)

    def forward(self, t, y):
        h = torch.tanh(self.norm(self.conv(y)))
        if self.kind == "dropout":
            return nn.functional.dropout(h, 0.3)
        if self.kind == "sums at an index":  # atomic on a GPU
            many = h.flatten(1).repeat(1, 40)[:, :5000]
            sums = torch.zeros(len(h), 3, device=h.device).index_add(1, self.index, many)
            return h + 1e-3 * sums.sum(1)[:, None, None, None]
        if self.kind == "a counter":
            self.evaluations += 1
            return h + 1e-2 * self.evaluations
        return h


class TestRecomputation:
    """The backward of an uncompiled odeint_adjoint, which evaluates the velocity once more."""

    @staticmethod
    def trained(solve, kind, device):
        torch.manual_seed(0)
        velocity = Layers(kind).to(device)
        y = torch.randn(8, 4, 6, 6, device=device, requires_grad=True)
        found = solve(velocity, y, torch.linspace(0, 1, 5, device=device), method="rk4")[-1]
        found.square().mean().backward()
        return [found.detach(), y.grad, *(p.grad for p in velocity.parameters()), *velocity.buffers()]

    @pytest.mark.parametrize("kind", ["statistics", "dropout", "sums at an index", "a spectral norm"])
    def test_what_differs_by_noise_is_no_error(self, device, kind):
        wanted = self.trained(torchdiffeq.odeint, kind, device)
        got = self.trained(torchdiffeq.odeint_adjoint, kind, device)
        # A bias in front of a norm has no gradient but rounding.
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-5)

    def test_a_counter_is_an_error(self, device):
        with pytest.raises(RecomputationError, match="gives another result"):
            self.trained(torchdiffeq.odeint_adjoint, "a counter", device)

    def test_a_weight_that_is_changed_before_the_backward_is_an_error(self, device):
        velocity = Layers("statistics").to(device)
        y, t = torch.randn(8, 4, 6, 6, device=device), torch.linspace(0, 1, 5, device=device)
        found = torchdiffeq.odeint_adjoint(velocity, y, t, method="rk4")
        with torch.no_grad():
            velocity.conv.weight.add_(1e-3)
        with pytest.raises(RecomputationError, match="changed in place"):
            found.sum().backward()
