"""Memory by choice: gradients that do not depend on what is stored, and bytes that do."""

import copy

import pytest
import torch
from torch import nn

import rampde_fx
from rampde_fx import errors
from tests.comparison import compiled, gradients, relative_errors
from tests.models import AdamsBashforth, Euler, Flow, Midpoint, Solved, Trajectory
from tests.test_odeint import compiled as solver
from tests.test_random import BatchNorm, Dropout, seeded
from tests.test_storage import Linear, saved_bytes

MODES = (1, 3, 4, "sqrt", "none")
BOUNDS = {torch.float32: 1e-6, torch.float64: 1e-12, torch.float16: 5 * 2.0**-11}


class LogDensity(Flow):
    """A trajectory, and a log-density that nothing reads within the loop."""

    def forward(self, y, t):
        logp, states = torch.zeros_like(y[:, 0]), []
        for t_i, dt in rampde_fx.steps(t):
            k = self.velocity(t_i, y)
            logp = logp - dt * k.square().sum(1)
            y = y + dt * k
            states.append(y)
        return torch.stack(states), logp


def found(model, dtype, y, t, **policy):
    """Outputs and gradients in a compilation of their own."""
    torch._dynamo.reset()
    model = copy.deepcopy(model)
    return gradients(seeded(compiled(model, dtype, **policy)), model, y, t)


def agree(model, dtype, y, t, modes=MODES, **policy):
    """Every mode gives the gradients of "step"."""
    wanted = found(model, dtype, y, t, **policy)
    for mode in modes:
        got = relative_errors(found(model, dtype, y, t, checkpoint=mode, **policy), wanted)
        times = len(got) - 1 - len(list(model.parameters()))  # t's gradient is a sum in which terms cancel
        assert max(error for i, error in enumerate(got) if i != times) < BOUNDS[dtype], (mode, got)
        assert got[times] < 8 * BOUNDS[dtype], (mode, got)


def explained(model, steps, **policy):
    marked = rampde_fx.mixed_precision(model, policy=rampde_fx.PrecisionPolicy(**{"velocity": torch.float16, **policy}))
    return rampde_fx.explain(marked, torch.zeros(3, 5, requires_grad=True), torch.linspace(0, 1, steps + 1))


@pytest.mark.parametrize("steps", [7, 8])
def test_gradients_are_those_of_a_state_stored_per_step(steps):
    agree(LogDensity(), torch.float32, torch.randn(3, 5), torch.linspace(0, 1, steps + 1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_gradients_of_other_dtypes(dtype):
    own = torch.float64 if dtype is torch.float64 else torch.float32
    y, t = torch.randn(3, 5, dtype=own), torch.linspace(0, 1, 8, dtype=own)
    agree(LogDensity().to(own), dtype, y, t, modes=(3, "none"), compiler="eager")


@pytest.mark.parametrize("mode", [3, "none"])
def test_gradcheck(mode):
    model = Euler(dim=2, width=3).double()
    y = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
    t = torch.tensor([0.0, 0.3, 0.5, 0.6, 1.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(compiled(model, torch.float64, checkpoint=mode), (y, t))


@pytest.mark.parametrize(("mode", "steps"), [("step", 7), (1, 7), (3, 7), (4, 7), (4, 8), ("sqrt", 8), ("none", 7)])
def test_saved_bytes_are_as_predicted(mode, steps):
    model, y, t = Midpoint(dim=5, width=7), torch.randn(3, 5), torch.linspace(0, 1, steps + 1)
    (loop,) = explained(copy.deepcopy(model), steps, checkpoint=mode).loops
    state, activations = 3 * 5 * 2, 2 * 3 * (6 + 7) * 2  # in float16; two evaluations: (y, t) and a layer of 7
    length = {"sqrt": 3, "step": 1, "none": 1}.get(mode, mode)
    stored = activations * steps if mode == "none" else state * -(-steps // length)
    assert loop.stored_bytes == stored and loop.stored_bytes_fp32 == 2 * stored and loop.segment == length
    grid = 2 * 4 * steps  # t and dt
    wanted = stored + grid + sum(p.numel() * 4 for p in model.parameters())
    assert saved_bytes(compiled(model, torch.float16, checkpoint=mode), y, t) == wanted


def test_the_report_names_what_is_stored():
    texts = {mode: str(explained(Euler(), 8, checkpoint=mode)) for mode in ("step", 3, "none")}
    assert "each step is recomputed from its state\n  stored per step     y: float16[3, 5]\n" in texts["step"]
    assert (
        "segments of 3 steps are recomputed from their first state\n  stored per segment  y: float16[3, 5]\n"
        in texts[3]
    )
    assert "velocity_0.narrow_1: float16[3, 6], velocity_0.tanh: float16[3, 7]\n" in texts["none"]
    assert "stored in all       90 bytes (180 in the dtype of the state" in texts[3]


def test_the_adjoint_evaluates_no_velocity_where_activations_are_kept():
    (loop,) = explained(Midpoint(), 4, checkpoint="none").loops
    names = [name for name, _ in loop.adjoint.named_children()]
    assert "velocity_0_replay" in names and not any("forward" in name for name in names)
    replayed = [node.target for node in loop.adjoint.velocity_0_replay.graph.nodes if node.op == "call_function"]
    assert set(replayed) == {torch.ops.rampde_fx.narrow.default, torch.ops.aten.t.default}  # of the weights
    assert [node.target for node in loop.step.graph.nodes if node.op == "call_module"] == ["velocity_0_forward"] * 2


def scans(graph_module):
    return [node for node in graph_module.graph.nodes if node.op == "call_function" and "scan" in str(node.target)]


@pytest.mark.parametrize("steps", [6, 7])
def test_a_segmented_loop_holds_its_step_once(steps, monkeypatch):
    emitted = []
    rewrite = rampde_fx.backend.rewrite
    monkeypatch.setattr(rampde_fx.backend, "rewrite", lambda graph: [rewrite(graph), emitted.append(graph)][0])
    compiled(Euler(), torch.float32, "eager", checkpoint=3)(
        torch.randn(3, 5, requires_grad=True), torch.linspace(0, 1, steps + 1)
    )
    forward, backward = emitted[0].loop_0_forward, emitted[0].loop_0_backward
    (outer,) = scans(forward)
    segments = -(-steps // 3)
    assert [value.shape[0] for value in (node.meta["val"] for node in outer.users) if value.ndim == 3] == [segments]
    (inner,) = scans(forward.get_submodule(outer.args[0].target))
    assert inner.args[2][0].meta["val"].shape == (3,)
    (outer,) = scans(backward)
    recomputed, adjoint = scans(backward.get_submodule(outer.args[0].target))
    assert [scan.args[2][0].meta["val"].shape[0] for scan in (recomputed, adjoint)] == [2, 3]
    masks = [
        node
        for module in emitted[0].modules()
        if isinstance(module, torch.fx.GraphModule)
        for node in module.graph.nodes
        if node.target is torch.ops.aten.where.self
    ]
    assert bool(masks) == (steps % 3 != 0)


def test_carries_that_only_the_recomputation_reads():
    """y follows from the last velocity too, which the adjoint of a linear combination does not read."""
    y, t = torch.randn(3, 5), torch.linspace(0, 1, 8)
    agree(AdamsBashforth(), torch.float32, y, t, modes=(3, "none"), compiler="eager")
    *_, loop = explained(AdamsBashforth(), 7, checkpoint=3).loops
    assert len(loop.stored) == 2


@pytest.mark.parametrize("mode", [3, "none"])
def test_dropout_draws_the_same_numbers(mode):
    agree(Dropout(), torch.float32, torch.randn(3, 5), torch.linspace(0, 1, 8), modes=(mode,))


@pytest.mark.parametrize("mode", [3, "none"])
def test_running_statistics_are_updated_once(mode):
    model = BatchNorm()
    y, t = torch.randn(8, 5), torch.linspace(0, 1, 6)
    agree(model, torch.float32, y, t, modes=(mode,))
    plain, own = copy.deepcopy(model), copy.deepcopy(model)
    gradients(plain, plain, y, t)
    torch._dynamo.reset()
    gradients(compiled(own, torch.float32, checkpoint=mode), own, y, t)
    torch.testing.assert_close(dict(own.named_buffers()), dict(plain.named_buffers()))


@pytest.mark.parametrize("mode", [3, "none"])
@pytest.mark.parametrize(
    "policy",
    [
        {"accumulation": "compensated"},
        {"storage": torch.float16, "storage_scaling": "dynamic"},
        {"storage": torch.float16, "storage_scaling": "dynamic", "accumulation": "compensated", "loop": "unroll"},
    ],
    ids=["compensated", "scaled storage", "all, unrolled"],
)
def test_other_policies(mode, policy):
    model, y, t = Trajectory(), torch.randn(3, 5), torch.linspace(0, 1, 8)
    dtype = torch.float16 if "storage" in policy else torch.float32
    agree(model, dtype, y, t, modes=(mode,), compiler="eager", **policy)


def test_compensated_sums_keep_their_error_in_segments():
    """A state of 4096 that takes in increments of 2^-12: recomputed without compensation it stands still."""

    class Drifting(nn.Module):
        def __init__(self):
            super().__init__()
            self.rate = nn.Parameter(torch.ones(3))

        def forward(self, y, t):
            for _, dt in rampde_fx.steps(t):
                y = y + dt * self.rate * torch.cos(2.0**10 * (y - 4096.0))
            return y

    y, t = torch.full((2, 3), 4096.0), torch.linspace(0, 2.0**-6, 65)
    model = Drifting()
    wide = copy.deepcopy(model).double()
    wanted = gradients(wide, wide, y.double(), t.double())
    got = found(model, torch.float32, y, t, checkpoint=64, accumulation="compensated", compiler="eager")
    step = found(model, torch.float32, y, t, accumulation="compensated", compiler="eager")
    errors_ = [relative_errors([g.double() for g in values], wanted)[3] for values in (got, step)]
    assert errors_[0] < 2 * errors_[1], errors_


class Growing(Linear):
    """The state leaves float16's range."""

    def forward(self, y, t):
        for _, dt in rampde_fx.steps(t):
            y = y + dt * (1e5 + torch.tanh(1e-5 * y @ self.weight))
        return y


def test_a_state_beyond_the_storage_is_loud():
    """The state leaves the range within a segment, where nothing of the forward's is stored."""
    model, y, t = Growing(), torch.zeros(2, 4), torch.linspace(0, 1, 7)
    got = found(model, torch.float32, y, t, checkpoint=3, storage=torch.float16, compiler="eager")
    loud = torch.stack([gradient.isnan().any() for gradient in (got[1], *got[3:])])
    assert loud.all()


def test_a_state_beside_kept_activations_has_the_range_of_the_velocity():
    """It is stored as the velocity reads it, in float32."""
    model, y, t = Growing(), torch.zeros(2, 4), torch.linspace(0, 1, 7)
    got = found(model, torch.float32, y, t, checkpoint="none", storage=torch.float16, compiler="eager")
    assert max(relative_errors(got, gradients(model, model, y, t))) < 1e-5


@pytest.mark.parametrize("mode", [3, "sqrt", "none"])
def test_odeint_with_another_number_of_times(mode, monkeypatch):
    rewritten = []
    rewrite = rampde_fx.backend.rewrite
    monkeypatch.setattr(rampde_fx.backend, "rewrite", lambda graph: rewritten.append(0) or rewrite(graph))
    model = Solved(method="midpoint")
    run = solver(model, checkpoint=mode)
    y = torch.randn(3, 5)
    for points in (8, 17, 40, 26):
        t = torch.linspace(0, 1, points)
        wanted = gradients(model, model, y, t)
        assert max(relative_errors(gradients(run, model, y, t), wanted)) < 2e-6
    assert len(rewritten) == 2


@pytest.mark.parametrize("mode", [3, "none"])
def test_odeint_with_a_step_size(mode):
    model = Solved(method="midpoint", options={"step_size": 0.07})
    y, t = torch.randn(3, 5), torch.linspace(0, 1, 4)
    wanted = gradients(model, model, y, t)
    assert max(relative_errors(gradients(solver(model, checkpoint=mode), model, y, t), wanted)) < 2e-6


def test_the_root_of_an_unknown_number_of_steps_is_refused():
    model = Solved(options={"step_size": 0.07})
    with pytest.raises(errors.UnsupportedLoopError, match="sqrt"):
        solver(model, checkpoint="sqrt")(torch.randn(3, 5, requires_grad=True), torch.linspace(0, 1, 4))


@pytest.mark.parametrize("value", [0, -1, 2.0, True, "all", None], ids=repr)
def test_bad_values_are_refused(value):
    with pytest.raises(errors.PolicyError, match="checkpoint"):
        rampde_fx.PrecisionPolicy(checkpoint=value)


@pytest.mark.parametrize("value", ["step", "sqrt", "none", "auto", 5, rampde_fx.MemoryBudget(max_bytes=5)])
def test_the_policy_travels_with_it(value):
    policy = rampde_fx.PrecisionPolicy(checkpoint=value)
    assert rampde_fx.PrecisionPolicy.parse(policy.encoded).checkpoint == value


@pytest.mark.inductor
@pytest.mark.slow
def test_compiled_by_inductor():
    model, y, t = LogDensity(), torch.randn(16, 5), torch.linspace(0, 1, 8)
    wanted = found(model, torch.float16, y, t)
    for mode in (3, "none"):
        got = relative_errors(found(model, torch.float16, y, t, checkpoint=mode, compiler="inductor"), wanted)
        assert max(got[:3] + got[4:]) < BOUNDS[torch.float16] and got[2] < 8 * BOUNDS[torch.float16], got
