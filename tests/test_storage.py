"""What is saved for the backward, measured; what is computed in which dtype; what is compiled again."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import rampde_fx
from rampde_fx.passes import store_states
from rampde_fx.runtime.scales import power_of_two_scale
from tests.benchmarks import measure
from tests.comparison import compiled, gradients, relative_errors
from tests.models import FORMS, RK4, Midpoint, Uneven


def saved_bytes(function, y, t):
    """Bytes of the distinct tensors that a forward leaves for the backward, parameters among them."""
    function(y, t)  # compiles, if it has to
    return measure.saved_bytes(lambda: function(y, t))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_saved_bytes_are_one_state_per_step_in_the_storage_dtype(dtype):
    model = Midpoint(dim=16, width=32)
    y = torch.randn(64, 16)
    measured = {}
    for steps in (3, 7):
        torch._dynamo.reset()
        measured[steps] = saved_bytes(compiled(model, dtype), y, torch.linspace(0, 1, steps + 1))
    state, grid = 64 * 16 * dtype.itemsize, 2 * 4  # the stored state; t and dt
    assert measured[7] - measured[3] == 4 * (state + grid)
    assert measured[3] - 3 * (state + grid) <= 8 * sum(p.numel() for p in model.parameters())


def test_explain_reports_what_is_measured():
    model = rampde_fx.mixed_precision(RK4(dim=16, width=32), dtype=torch.float16)
    y, t = torch.randn(64, 16), torch.linspace(0, 1, 9)
    (loop,) = rampde_fx.explain(model, y, t).loops
    assert loop.steps == 8 and loop.evaluations == 4 and loop.emitted == "scan"
    assert loop.carries == ("y: float32[64, 16]",) and loop.stored == ("y: float16[64, 16]",)
    assert loop.stored_bytes == 8 * 64 * 16 * 2 and loop.stored_bytes_fp32 == 8 * 64 * 16 * 4
    plain, small, large = RK4(dim=16, width=32), torch.linspace(0, 1, 3), torch.linspace(0, 1, 5)
    per_step = (saved_bytes(plain, y, large) - saved_bytes(plain, y, small)) // 2
    assert abs(loop.stored_bytes_autograd - 8 * per_step) < 0.05 * 8 * per_step
    text = str(rampde_fx.explain(torch.compile(model, backend="rampde_fx"), y, t))
    assert "models.py" in text and "4 evaluations per step in float16" in text and "16,384 bytes" in text


def test_explain_names_unequal_iterations():
    report = rampde_fx.explain(
        rampde_fx.mixed_precision(Uneven(), dtype=torch.float16), torch.randn(3, 5), torch.linspace(0, 1, 4)
    )
    assert [loop.steps for loop in report.loops] == [1, 1, 1]
    assert all("differ" in str(loop) for loop in report.loops)


def narrow(factor):
    """The dtype of a factor before it was widened for a product that is formed in float32."""
    before = factor.args[0] if factor.target is torch.ops.aten._to_copy.default else factor
    return min((node.meta["val"].dtype for node in (factor, before)), key=lambda dtype: dtype.itemsize)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_matrix_products_are_low_and_states_are_not(form):
    model = rampde_fx.mixed_precision(form(), dtype=torch.float16)
    for loop in rampde_fx.explain(model, torch.randn(16, model.dim), torch.linspace(0, 1, 5)).loops:
        assert loop.evaluations > 0
        for module in (loop.step, loop.adjoint):
            for name, graph in ((n, m.graph) for n, m in module.named_modules() if isinstance(m, torch.fx.GraphModule)):
                for node in graph.nodes:
                    low = node.meta["val"].dtype if isinstance(node.meta.get("val"), torch.Tensor) else None
                    if node.target in (
                        torch.ops.aten.mm.default,
                        torch.ops.aten.addmm.default,
                        torch.ops.aten.bmm.default,
                    ):
                        factors = [narrow(factor) for factor in node.all_input_nodes]
                        assert name and factors == [torch.float16] * len(factors), (node, factors)
                    elif not name and node.op == "call_function" and "getitem" not in str(node.target):
                        stored = [user.op for user in node.users] == ["output"] and module is loop.step
                        assert low is not torch.float16 or stored, (node, "outside of a velocity")


def test_a_changed_batch_size_compiles_again_at_most_once():
    counter = CompileCounterWithBackend("rampde_fx")
    model = torch.compile(
        rampde_fx.mixed_precision(Midpoint(), dtype=torch.float16), backend=with_aot_eager(counter), fullgraph=True
    )
    for batch in (16, 12, 7, 33):
        y = torch.randn(batch, 5, requires_grad=True)
        model(y, torch.linspace(0, 1, 5)).sum().backward()
        assert y.grad.isfinite().all()
    assert counter.frame_count <= 2


def with_aot_eager(counter):
    from rampde_fx.backend import rampde_fx as backend

    def compile_and_count(graph_module, inputs):
        counter.frame_count += 1
        return backend(graph_module, inputs, options={"compiler": "aot_eager"})

    return compile_and_count


class Linear(torch.nn.Module):
    """y' = w y, of which the velocity is a matrix product."""

    def __init__(self, weight=-0.5):
        super().__init__()
        self.weight = torch.nn.Parameter(weight * torch.eye(4))

    def forward(self, y, t):
        for _, dt in rampde_fx.steps(t):
            y = y + dt * (torch.sin(1e-5 * y) @ self.weight)
        return y


def test_scaled_storage_has_the_range_of_the_state():
    y, t = 7e4 * (1 + torch.rand(8, 4)), torch.linspace(0, 1, 5)
    wanted = gradients(plain := Linear(), plain, y, t)
    found = {}
    for scaling in ("none", "dynamic"):
        torch._dynamo.reset()
        model = Linear()
        policy = {"storage": torch.float16, "storage_scaling": scaling, "compiler": "eager"}
        found[scaling] = gradients(compiled(model, torch.float32, **policy), model, y, t)
    assert not found["none"][1].isfinite().any()  # loud, not wrong
    assert max(relative_errors(found["dynamic"], wanted)) < 2e-3


@pytest.mark.parametrize("velocity", [torch.float16, torch.float32], ids=str)
def test_float8_storage(velocity):
    model = Midpoint(dim=16, width=32)
    y = torch.randn(64, 16)
    wanted = gradients(model, model, y, torch.linspace(0, 1, 8))
    policy = {"storage": torch.float8_e4m3fn}
    errors = relative_errors(gradients(compiled(model, velocity, **policy), model, y, torch.linspace(0, 1, 8)), wanted)
    assert errors[0] < 1e-3 and max(errors[1:2] + errors[3:]) < 2.0**-4  # the solution does not see the storage
    measured = []
    for steps in (3, 7):
        torch._dynamo.reset()
        fresh = Midpoint(dim=16, width=32)
        measured.append(saved_bytes(compiled(fresh, velocity, **policy), y, torch.linspace(0, 1, steps + 1)))
    assert measured[1] - measured[0] == 4 * (64 * 16 * 1 + 4 + 8)  # the state, its scale, t and dt
    (loop,) = rampde_fx.explain(fresh, y, torch.linspace(0, 1, 8)).loops
    assert loop.stored == ("y: float8_e4m3fn[64, 16]", "scale of y: float32[]")
    assert loop.stored_bytes == 7 * (64 * 16 + 4) and loop.stored_bytes_fp32 == 7 * 64 * 16 * 4


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_a_state_beyond_float16_is_loud_where_the_velocity_would_hide_it(compiler):
    class Saturating(Linear):
        def forward(self, y, t):
            for _, dt in rampde_fx.steps(t):
                y = y + dt * torch.tanh((1e-5 * y) @ self.weight)
            return y

    class SaturatingLater(Linear):
        def forward(self, y, t):
            for _, dt in rampde_fx.steps(t):
                y = y + dt * torch.tanh(y @ (1e-5 * self.weight))
            return y

    y, t = torch.full((2, 4), 7e4), torch.linspace(0, 1, 3)
    inside = Saturating()
    assert relative_errors([compiled(inside, torch.float16, compiler=compiler)(y, t)], [inside(y, t)])[0] < 1e-6
    torch._dynamo.reset()
    assert compiled(SaturatingLater(), torch.float16, compiler=compiler)(y, t).isnan().all()


class Radial(torch.nn.Module):
    """A velocity of constant length away from the origin: the derivative has terms that cancel along the state."""

    def __init__(self):
        super().__init__()
        self.mix = torch.nn.Linear(3, 3, bias=False)
        torch.nn.init.eye_(self.mix.weight)

    def forward(self, y, t):
        for _, dt in rampde_fx.steps(t):
            x = y * self.mix(torch.ones_like(y))
            y = y + dt * x / x.norm(dim=-1, keepdim=True)
        return y


@pytest.mark.parametrize(
    "velocity, storage, bound",
    [
        (torch.float32, torch.float16, 1e-6),
        (torch.float32, torch.float8_e4m3fn, 1e-6),
        (torch.float16, torch.float8_e4m3fn, 1e-3),
        (torch.float16, torch.bfloat16, 1e-3),
    ],
    ids=str,
)
def test_states_beside_kept_activations_are_those_that_the_velocity_read(velocity, storage, bound):
    """Else a pullback reads norms of the state and the rounded state, whose difference stands where 0 should."""
    torch.manual_seed(0)
    y, t = torch.randn(16, 3, requires_grad=True), torch.linspace(0, 1, 5)
    policy = rampde_fx.PrecisionPolicy(velocity, storage=storage, checkpoint="none")
    (loop,) = rampde_fx.explain(rampde_fx.mixed_precision(Radial(), policy=policy), y, t).loops
    assert f"y: {str(velocity).removeprefix('torch.')}[16, 3]" in loop.stored
    assert any(
        f"states are stored in {velocity}, for the velocity reads them so" in n and f"not in {storage}" in n
        for n in loop.notes
    )
    model = compiled(Radial(), velocity, storage=storage, checkpoint="none")
    model(y, t).norm(dim=-1).sum().backward()
    assert (y.grad - y.detach() / y.detach().norm(dim=-1, keepdim=True)).abs().max() < bound


class Joined(Radial):
    """The velocity reads the state among other entries, which are carried on."""

    def forward(self, y, t):
        for _, dt in rampde_fx.steps(t):
            both = torch.cat([y, y.flip(0)], dim=1)[:, :3]
            y = both + dt * both * torch.tanh(self.mix(both))
        return y


def test_a_state_that_evaluations_read_among_others_is_read_itself():
    policy = rampde_fx.PrecisionPolicy(torch.float16, storage=torch.bfloat16, checkpoint="none")
    y, t = torch.randn(16, 3, requires_grad=True), torch.linspace(0, 1, 5)
    (loop,) = rampde_fx.explain(rampde_fx.mixed_precision(Joined(), policy=policy), y, t).loops
    assert "y: float16[16, 3]" in loop.stored


class Staged(torch.nn.Module):
    """The velocity reads the state through a stage of the step; terms that cancel are those of one point."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 4)

    def forward(self, y, t):
        for _, dt in rampde_fx.steps(t):
            stage = y + 0.5 * dt
            y = y + dt * (1000 * ((stage * stage).sqrt() - stage) + 1e-3 * self.layer(stage))
        return y


def test_a_state_that_evaluations_read_through_a_stage():
    torch.manual_seed(0)
    model, y, t = Staged(), (30 + torch.randn(5, 4)).requires_grad_(), torch.linspace(0, 1, 4)

    def gradients(run):
        return torch.autograd.grad(run(y, t).square().sum(), [y, *model.parameters()])

    low = compiled(model, torch.float32, storage=torch.float16, checkpoint="none")
    assert max(relative_errors(gradients(low), gradients(model))) < 1e-6


class Growth(torch.nn.Module):
    """A large state grows by a rate that follows from another one, the only one that the velocity reads."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3, 3)

    def forward(self, y, t):
        size = 1e6 * (1 + y[:, :1].abs())
        for _, dt in rampde_fx.steps(t):
            rate = torch.tanh(self.layer(y))
            size, y = size + dt * size * rate[:, :1], y + dt * rate
        return y, 1e-6 * size


def test_a_state_that_no_evaluation_reads_is_stored_as_the_policy_says():
    """Beside activations, too: bfloat16 was chosen for a range that float16 does not have."""
    torch.manual_seed(0)
    model, y, t = Growth(), torch.randn(16, 3, requires_grad=True), torch.linspace(0, 1, 5)
    policy = rampde_fx.PrecisionPolicy(torch.float16, storage=torch.bfloat16, checkpoint="none")
    (loop,) = rampde_fx.explain(rampde_fx.mixed_precision(model, policy=policy), y, t).loops
    assert "size: bfloat16[16, 1]" in loop.stored and not any("states are stored" in note for note in loop.notes)

    def gradients(run):
        return torch.autograd.grad(sum(part.square().sum() for part in run(y, t)), [y, *model.parameters()])

    low = compiled(model, torch.float16, storage=torch.bfloat16, checkpoint="none")
    assert max(relative_errors(gradients(low), gradients(model))) < 1e-2


class Scaled(torch.nn.Module):
    """Evaluations read what the step makes of a state alone, which float16 could not hold itself."""

    def __init__(self, size, spelling):
        super().__init__()
        self.layer, self.size, self.spelling = torch.nn.Linear(3, 3), size, spelling

    def forward(self, y, t):
        large = self.size * y
        for _, dt in rampde_fx.steps(t):
            small = large / self.size if self.spelling == "quotient" else (large - self.size) / self.size
            rate = torch.tanh(self.layer(y))
            large, y = large + dt * self.size * small.square(), y + dt * rate * (1 + small)
        return y + large / self.size


@pytest.mark.parametrize("size", [1e6, 1e-9])
@pytest.mark.parametrize("spelling", ["quotient", "difference"])
def test_a_state_of_which_evaluations_read_a_multiple_keeps_its_range(size, spelling):
    torch.manual_seed(0)
    model, y, t = Scaled(size, spelling), (0.3 * torch.randn(16, 3)).requires_grad_(), torch.linspace(0, 1, 5)
    policy = rampde_fx.PrecisionPolicy(torch.float16, storage=torch.bfloat16, checkpoint="none")
    (loop,) = rampde_fx.explain(rampde_fx.mixed_precision(model, policy=policy), y, t).loops
    assert "large: float32[16, 3]" in loop.stored
    assert any("states are stored in torch.float32" in note for note in loop.notes)

    def gradients(run):
        return torch.autograd.grad(run(y, t).square().sum(), [y, *model.parameters()])

    low = compiled(model, torch.float16, storage=torch.bfloat16, checkpoint="none")
    assert max(relative_errors(gradients(low), gradients(model))) < 5e-3


@pytest.mark.parametrize("checkpoint", ["step", rampde_fx.MemoryBudget(max_bytes=0)], ids=str)
def test_states_are_stored_as_the_policy_says_where_no_activations_are(checkpoint):
    policy = rampde_fx.PrecisionPolicy(torch.float32, storage=torch.float16, checkpoint=checkpoint)
    model = rampde_fx.mixed_precision(Radial(), policy=policy)
    (loop,) = rampde_fx.explain(model, torch.randn(16, 3, requires_grad=True), torch.linspace(0, 1, 5)).loops
    assert loop.stored == ("y: float16[16, 3]",) and not any("states are stored" in note for note in loop.notes)


@pytest.mark.parametrize("dtype", store_states.TARGETS, ids=str)
def test_the_largest_entry_is_put_at_the_upper_end_of_the_range(dtype):
    """Whatever its mantissa: twice the target is within the range, four times it is not."""
    largest, target = torch.finfo(dtype).max, store_states.TARGETS[dtype]
    assert largest / 4 < target <= largest / 2
    for size in (1.0, 1.5, 2 - 2.0**-23):
        state = torch.tensor([size, -size / 3])
        scaled = (state * power_of_two_scale(target, state)).to(dtype).float()
        assert scaled.isfinite().all() and target <= scaled.abs().max() <= 2 * target


def test_what_is_no_wider_than_the_storage_dtype_is_stored_as_it_is():
    model, y, t = Radial(), torch.randn(16, 3, requires_grad=True), torch.linspace(0, 1, 5)
    (loop,) = rampde_fx.explain(rampde_fx.mixed_precision(model, dtype=torch.float32), y, t).loops
    (stored,) = [node for node in loop.step.graph.output_node().args[0] if node.op == "placeholder"]
    assert stored.name == "y" and loop.stored == ("y: float32[16, 3]",)


@pytest.mark.parametrize("storage", [torch.float16, torch.float8_e4m3fn], ids=str)
def test_a_state_without_entries_has_no_scale(storage):
    model, y, t = torch.nn.Linear(3, 3), torch.ones(0, 3, requires_grad=True), torch.linspace(0, 1, 5)

    def flow(y, t):
        for _, dt in rampde_fx.steps(t):
            y = y + dt * torch.tanh(model(y))
        return y

    policy = rampde_fx.PrecisionPolicy(torch.float16, storage=storage)
    (loop,) = rampde_fx.explain(rampde_fx.mixed_precision(flow, policy=policy), y, t).loops
    assert loop.stored == ("y: float32[0, 3]",)
    compiled(flow, torch.float16, storage=storage)(y, t).sum().backward()
    assert y.grad.shape == (0, 3) and not model.weight.grad.any()
