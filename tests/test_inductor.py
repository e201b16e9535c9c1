"""Compiled by Inductor: the same numbers as the rewritten graph run by aot_eager."""

import copy
import json
import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch._inductor.utils import run_and_get_code
from torch.torch_version import TorchVersion

import rampde_fx
from rampde_fx.errors import PolicyError
from tests.comparison import compiled, gradients, relative_errors
from tests.models import Euler, Flow, LogDensity, Midpoint, Solved, ThreeStep, Trajectory, TwoLoops, Velocity
from tests.test_accumulation import DRIFT, drift
from tests.test_scaling import Steep

pytestmark = [pytest.mark.inductor, pytest.mark.slow]


def agree(model, y, t, bound, **policy):
    """Gradients under Inductor against those under aot_eager and against eager fp32."""
    other, plain = copy.deepcopy(model), copy.deepcopy(model)
    got = gradients(compiled(model, torch.float16, "inductor", **policy), model, y, t)
    torch._dynamo.reset()
    wanted = gradients(compiled(other, torch.float16, **policy), other, y, t)
    assert max(relative_errors(got, wanted)) < bound
    assert max(relative_errors(got, gradients(plain, plain, y, t))) < 2 * bound


def test_two_chained_loops():
    agree(TwoLoops(), torch.randn(16, 5), torch.linspace(0, 1, 6), 2e-3)


def test_buffers_of_the_outer_graph_are_not_donated_to_the_bodies_of_loops():
    """With torch's default, donated_buffer=True, the parameters' gradients of this loop come out wrong."""
    model = ThreeStep()
    plain = copy.deepcopy(model)
    y, t = torch.randn(16, 5), torch.linspace(0, 1, 6)
    got = gradients(compiled(model, torch.float32, "inductor"), model, y, t)
    assert max(relative_errors(got, gradients(plain, plain, y, t))) < 1e-6


class OutOfRange(torch.nn.Module):
    """A velocity that saturates at infinity, of a state and a parameter of which float16 may make one."""

    def __init__(self, offset, parts):
        super().__init__()
        self.offset, self.parts = torch.nn.Parameter(torch.full((4,), offset)), parts

    def forward(self, y, t):
        for _, dt in rampde_fx.steps(t):
            z = y
            for _ in range(self.parts):
                z = z - self.offset
            y = y + dt * torch.tanh(z)
        return y


@pytest.mark.parametrize(
    ("state", "offset", "parts", "nan_forward"),
    [(1.2e5, 3e4, 4, False), (0.0, 1e5, 1, True)],
    ids=["state", "parameter"],
)
def test_an_infinity_of_float16_is_told_where_its_rounding_is_left_out(state, offset, parts, nan_forward):
    """Inductor has what is rounded to float16 in float32: memory holds infinities that no number in a kernel is."""
    model = OutOfRange(offset, parts)
    y = (state + torch.randn(8, 4)).requires_grad_()
    result = compiled(model, torch.float16, "inductor")(y, torch.linspace(0, 1, 5))
    assert bool(result.isnan().any()) is nan_forward
    result.sum().backward()
    assert y.grad.isnan().all()
    assert model.offset.grad.isnan().all()


class Pooled(torch.nn.Module):
    """A loop whose cotangent comes from a convolution: Inductor lays it out channels last."""

    def __init__(self):
        super().__init__()
        self.velocity, self.after = torch.nn.Conv2d(3, 3, 3, padding=1), torch.nn.Conv2d(3, 4, 3)

    def forward(self, y, t):
        for _, dt in rampde_fx.steps(t):
            y = y + dt * torch.tanh(self.velocity(y))
        return self.after(torch.nn.functional.avg_pool2d(y, 2))


def test_a_loop_before_a_convolution():
    agree(Pooled(), torch.randn(2, 3, 8, 8), torch.linspace(0, 1, 4), 2e-3)


def test_a_backward_that_is_repeated():
    rampde_fx.backward_counts(reset=True)
    agree(Steep(64), 1e-3 * (1 + torch.rand(16, 64)), torch.linspace(0, 1e-6, 4), 2.5e-3)
    (count,) = rampde_fx.backward_counts().values()
    assert count.passes == 2 and count.overflowed == 0
    if torch.__version__ >= TorchVersion("2.13"):
        assert count.repeated == 2
    else:  # there Inductor leaves out roundings of products, and with them some of the overflows
        assert count.repeated >= 1


def test_equal_batch_sums_without_fullgraph():
    """Two gradients that are the same sum over the batch; Inductor's C++ declares such a sum twice."""

    class Shifted(Flow):
        def __init__(self):
            super().__init__()
            self.shift = torch.nn.Parameter(torch.randn(7))

        def forward(self, y, t):
            first, last = self.velocity.linear
            for t_i, dt in rampde_fx.steps(t):
                y = y + dt * last(torch.tanh(first(torch.cat([y, y[:, :1]], 1)) + t_i * self.shift))
            return y

    model = Shifted()
    plain = copy.deepcopy(model)
    y, t = torch.randn(16, 5), torch.linspace(0, 1, 6)
    function = torch.compile(rampde_fx.mixed_precision(model, dtype=torch.float16), backend="rampde_fx")
    errors = relative_errors(gradients(function, model, y, t), gradients(plain, plain, y, t))
    assert max(errors) < 2.5e-3, errors


def test_states_collected_and_an_unrolled_loop():
    agree(Trajectory(), torch.randn(16, 5), torch.linspace(0, 1, 4), 4e-3, loop="unroll")


def test_one_compilation_serves_all_batch_sizes():
    torch._dynamo.utils.counters.clear()
    model = LogDensity()
    plain = copy.deepcopy(model)
    function = compiled(model, torch.float16, "inductor")
    for batch in (16, 12, 33):
        y, t = torch.randn(batch, 5), torch.linspace(0, 1, 6)
        errors = relative_errors(gradients(function, model, y, t), gradients(plain, plain, y, t))
        assert max(errors[:3] + errors[4:]) < 2.5e-3, errors
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


def test_the_name_of_the_backend_is_enough_and_inductor_is_the_default():
    @rampde_fx.mixed_precision(dtype=torch.float16)
    def double(y, t):
        for _, dt in rampde_fx.steps(t):
            y = y + dt * y
        return y

    assert "rampde_fx" in torch._dynamo.list_backends()
    y, t = torch.ones(3), torch.linspace(0, 1, 2)
    assert torch.equal(torch.compile(double, backend="rampde_fx")(y, t), 2 * y)


def test_a_loop_with_one_result():
    """One state, nothing stored: Inductor mistakes the list of a scan's results for the result where it is alone."""

    def solve(y, t):
        for _, dt in rampde_fx.steps(t):
            y = y + dt * torch.sin(y)
        return y

    y, t = torch.randn(4, 5, requires_grad=True), torch.linspace(0, 1, 5)
    with torch.no_grad():
        torch.testing.assert_close(compiled(solve, torch.float32, "inductor")(y, t), solve(y, t))
    got, wanted = (
        torch.autograd.grad(f(y, t).sum(), y)[0] for f in (compiled(solve, torch.float16, "inductor"), solve)
    )
    assert max(relative_errors([got], [wanted])) < 2e-3


class Growth(torch.nn.Module):
    """Linear in y: entry by entry the derivative is y(T) / y0, if the backward draws the forward's masks."""

    def forward(self, y, t):
        for _, dt in rampde_fx.steps(t):
            y = y + dt * torch.nn.functional.dropout(y, 0.5)
        return y


def test_random_numbers_are_drawn_again():
    y, t = 1 + torch.rand(64, 5), torch.linspace(0, 1, 9)
    end, gradient, _ = gradients(compiled(Growth(), torch.float32, "inductor"), Growth(), y, t)
    ratio = end / y
    assert len(ratio.round(decimals=3).unique()) > 5  # masks that differ from entry to entry
    torch.testing.assert_close(gradient, 2 * end * ratio / end.numel(), rtol=1e-5, atol=0)


def test_compensated_sums_and_states_of_one_byte():
    policy = {"storage": torch.float8_e4m3fn, "accumulation": "compensated"}
    agree(Euler(), torch.randn(16, 5), torch.linspace(0, 1, 6), 2e-2, **policy)


@pytest.mark.parametrize("rows", [200, 2000])
def test_threads_share_large_kernels_alone(rows, monkeypatch):
    """Two threads: by itself Inductor has them share kernels of both numbers of rows."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    _, (code,) = run_and_get_code(
        compiled(Euler(), torch.float32, "inductor"), torch.ones(rows, 5), torch.linspace(0, 1, 3)
    )
    assert ("#pragma omp parallel" in code) == (rows == 2000)


@pytest.mark.parametrize(
    ("make", "policy"),
    [
        (Euler, {"velocity": torch.float16}),
        (Midpoint, {"velocity": torch.bfloat16, "checkpoint": rampde_fx.MemoryBudget(max_bytes=2500)}),
        (lambda: Solved(method="bosh3", rtol=1e-2), {"velocity": torch.float32}),
    ],
    ids=["scaled", "kept in part", "a search"],
)
def test_the_cpp_wrapper_calls_the_same_kernels(make, policy):
    model, other = make(), make()
    other.load_state_dict(model.state_dict())
    y, t = torch.randn(16, 5), torch.linspace(0, 1, 6)
    policy = rampde_fx.PrecisionPolicy(**policy)
    marked = rampde_fx.mixed_precision(other, policy=policy)
    wrapped = torch.compile(marked, backend="rampde_fx", options={"cpp_wrapper": True}, fullgraph=True)
    if torch.__version__ < TorchVersion("2.13"):
        with pytest.raises(PolicyError, match="cpp_wrapper was asked for"):
            wrapped(y, t)
        return
    got = gradients(wrapped, other, y, t)
    torch._dynamo.reset()
    marked = rampde_fx.mixed_precision(model, policy=policy)
    plain = torch.compile(marked, backend="rampde_fx", fullgraph=True)
    assert max(relative_errors(got, gradients(plain, model, y, t))) < 1e-6


def test_the_cpp_wrapper_has_no_monitor():
    function = torch.compile(
        rampde_fx.mixed_precision(Euler()), backend="rampde_fx", options={"cpp_wrapper": True}, fullgraph=True
    )
    with rampde_fx.monitor(), pytest.raises(PolicyError, match="cpp_wrapper was asked for"):
        function(torch.randn(16, 5), torch.linspace(0, 1, 6))


class OwnLoop(nn.Module):
    """A flow behind a loop of the user's, which is no step."""

    def __init__(self):
        super().__init__()
        self.flow = Euler()

    def forward(self, y, t):
        i = torch.zeros((), dtype=torch.int64)
        _, y = torch.while_loop(lambda i, y: i < 2, lambda i, y: (i + 1, torch.tanh(y)), (i, y))
        return self.flow(y, t)


@pytest.mark.parametrize(
    ("make", "policy", "backward"),
    [
        (Euler, {"dtype": torch.float16}, 6),  # within a loop of attempts
        (Euler, {"dtype": torch.bfloat16, "checkpoint": 3}, 10),  # and two of each three steps once more
        (OwnLoop, {"dtype": torch.float32}, None),
    ],
    ids=["scaled", "segments", "a loop of the user's"],
)
def test_a_profile_shows_the_steps(make, policy, backward):
    function = compiled(make(), compiler="inductor", **policy)
    y, t = torch.randn(16, 5), torch.linspace(0, 1, 7)
    if backward is None:
        steps = {"rampde_fx step": 0}
        with torch.no_grad():
            function(y, t)
            with torch.profiler.profile() as profile:
                function(y, t)
    else:
        steps = {"rampde_fx step": 6, "rampde_fx step of the backward": backward}
        function(y, t).sum().backward()
        with torch.profiler.profile() as profile:
            function(y, t).sum().backward()
    events = [event for event in profile.events() if event.name.startswith("rampde_fx step")]
    assert {name: sum(event.name == name for event in events) for name in steps} == steps
    assert all(any(child.name.startswith("aten::") for child in event.cpu_children) for event in events)


def test_compensation_survives_the_optimiser():
    y, t = DRIFT
    assert torch.equal(torch.compile(drift, backend="rampde_fx")(y, t), y + 2.0**-6)


def test_odeint_with_another_number_of_times():
    """The second compilation has a symbolic length; step_size has one that is computed from the times."""
    velocity = Velocity()
    policy = rampde_fx.PrecisionPolicy(velocity=torch.float16)
    for options in ({"num_steps": 2}, {"step_size": 0.15}):

        def solve(y, t, options=options, policy=policy):
            return rampde_fx.odeint(velocity, y, t, method="midpoint", options=options, policy=policy)

        function = torch.compile(solve, backend="rampde_fx", fullgraph=True)
        for points in (3, 5):
            y, t = torch.randn(16, 5), torch.linspace(0, 1, points)
            errors = relative_errors(gradients(function, velocity, y, t), gradients(solve, velocity, y, t))
            assert max(errors[:2] + errors[3:]) < 2.5e-3, errors


# Prints what the caches did, and a gradient. Its arguments are a constant of the velocity and, if asked for, what to do
# with the caches as one file.
CACHED = """
import json, sys, torch, rampde_fx
from pathlib import Path
from torch._dynamo.utils import counters

if sys.argv[2:] and sys.argv[2] == "load":
    assert torch.compiler.load_cache_artifacts(Path(sys.argv[3]).read_bytes()) is not None

factor = float(sys.argv[1])

@rampde_fx.mixed_precision(dtype=torch.float16)
def solve(y, t):
    for _, dt in rampde_fx.steps(t):
        y = y + dt * torch.sin(factor * y)
    if factor == 4:
        y = rampde_fx.odeint(lambda t, y: torch.sin(y), y, t, method="bosh3")[-1]
    return y

y = torch.linspace(-1, 1, 16).requires_grad_()
torch.compile(solve, backend="rampde_fx")(y, torch.linspace(0, 1, 5)).sum().backward()
if sys.argv[2:] and sys.argv[2] == "save":
    Path(sys.argv[3]).write_bytes(torch.compiler.save_cache_artifacts()[0])
print(json.dumps([counters["aot_autograd"], counters["inductor"], y.grad.tolist()]))
"""


def run_cached(folder, factor, *how):
    """What CACHED prints in a process of its own, with its caches in a folder."""
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(folder)}
    command = [sys.executable, "-c", CACHED, str(factor), *map(str, how)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(run.stdout.splitlines()[-1])


def test_a_second_process_takes_the_compiled_loop_from_the_caches(tmp_path):
    first, second, other = (run_cached(tmp_path, factor) for factor in (2.0, 2.0, 3.0))
    assert first[0]["autograd_cache_miss"] == first[0]["autograd_cache_saved"] == 1
    assert second[0]["autograd_cache_hit"] == 1 and "fxgraph_cache_miss" not in second[1]
    assert second[2] == first[2]
    # A constant deep inside the loop is part of the key.
    assert other[0]["autograd_cache_miss"] == 1
    y = torch.linspace(-1, 1, 16).requires_grad_()
    z = y
    for _ in range(4):
        z = z + 0.25 * torch.sin(3.0 * z)
    z.sum().backward()
    assert max(relative_errors([torch.tensor(other[2])], [y.grad])) < 2e-3


def test_caches_that_are_shipped_as_one_file(tmp_path):
    """torch.compiler.save_cache_artifacts here, load_cache_artifacts there: nothing is compiled there.

    The factor of 4 has adaptive steps behind the others.
    """
    first = run_cached(tmp_path / "here", 4.0, "save", tmp_path / "artifacts")
    second = run_cached(tmp_path / "there", 4.0, "load", tmp_path / "artifacts")
    assert first[0]["autograd_cache_miss"] == 1 and "autograd_cache_miss" not in second[0]
    assert second[0]["autograd_cache_hit"] == 1 and "fxgraph_cache_miss" not in second[1]
    assert second[2] == first[2]


@pytest.mark.parametrize("how", [{"method": "rk4", "options": {"step_size": 0.3}}, {"method": "bosh3", "rtol": 1e-2}])
def test_odeint_with_a_number_of_steps_that_the_times_decide(how):
    agree(Solved(**how), torch.randn(16, 5), torch.linspace(0, 1, 3), 2e-2 if "rtol" in how else 4e-3)
