"""The parts of the examples that need no compiler."""

import importlib
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import rampde_fx

for name in ("matplotlib", "sklearn", "tqdm"):
    pytest.importorskip(name)

EXAMPLES = Path(__file__).parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))
adjoint_scaling = importlib.import_module("adjoint_scaling")
common = importlib.import_module("common")
density = importlib.import_module("density")
density_data = importlib.import_module("density_data")
density_plots = importlib.import_module("density_plots")
roundoff = importlib.import_module("roundoff")


def random_flow(dim: int, width: int) -> torch.nn.Module:
    torch.manual_seed(0)
    flow = density.Flow(dim, width)
    torch.nn.init.normal_(flow.last.weight, std=0.5)
    torch.nn.init.normal_(flow.last.bias, std=0.5)
    return flow


def tiny_settings(**changes: object) -> object:
    fields = {
        "data": "8gaussians",
        "dtype": "float32",
        "steps": 2,
        "iterations": 6,
        "batch": 8,
        "width": 4,
        "lr": 1e-2,
        "seed": 3,
        "device": "cpu",
        "compiler": "aot_eager",
    }
    return density.Settings(**{**fields, **changes})


@pytest.mark.parametrize("dim", [2, 5])
def test_trace_is_the_divergence(dim):
    flow = random_flow(dim, 16).double()
    t = torch.tensor(0.3, dtype=torch.float64)
    z = torch.randn(7, dim, dtype=torch.float64)

    def velocity(point):
        return flow.velocity(t, torch.cat([point, point.new_zeros(1)])[None])[0, :-1]

    jacobian = torch.vmap(torch.func.jacrev(velocity))(z)
    trace = flow.velocity(t, torch.nn.functional.pad(z, (0, 1)))[:, -1]
    torch.testing.assert_close(trace, jacobian.diagonal(dim1=1, dim2=2).sum(dim=1))


def test_density_integrates_to_one():
    flow = random_flow(2, 16)
    # Three times as wide as in the picture, so that no mass lies outside.
    points = 3 * density_plots.grid()
    with torch.no_grad():
        p = density.log_density(flow, points, torch.linspace(0, 1, 9)).exp()
    side = 3 * 2 * density_plots.EXTENT / (density_plots.GRID_POINTS - 1)
    assert p.sum().item() * side**2 == pytest.approx(1, abs=1e-3)


def test_draw_inverts_the_flow():
    flow = random_flow(3, 16)
    t = torch.linspace(0, 1, 17)
    base = torch.randn(10, 3)
    there = flow(torch.nn.functional.pad(density.draw(flow, base, t), (0, 1)), t)[:, :-1]
    torch.testing.assert_close(there, base, atol=1e-4, rtol=0)


def test_held_out_loss_counts_every_point_once():
    flow = random_flow(2, 16)
    t = torch.linspace(0, 1, 5)
    points = torch.randn(11, 2)
    whole = -density.log_density(flow, points, t).mean().item()
    assert density.held_out_loss(flow, points, t, batch=4) == pytest.approx(whole, rel=1e-5)
    assert density.held_out_loss(flow, points, t, batch=32) == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize("name", density_data.NAMES)
def test_data_sets_are_seeded(name):
    data = density_data.load(name)
    first = data.sample(50, torch.Generator().manual_seed(1))
    assert first.shape == (50, data.dim)
    assert first.dtype == torch.float32
    assert first.isfinite().all()
    assert data.held_out.shape[1] == data.dim
    assert data.held_out.isfinite().all()
    assert torch.equal(first, data.sample(50, torch.Generator().manual_seed(1)))
    assert not torch.equal(first, data.sample(50, torch.Generator().manual_seed(2)))
    assert torch.equal(data.held_out, density_data.load(name).held_out)


def test_digits_are_whitened_and_mapped_back():
    data = density_data.Digits(dim=64)
    points = data.sample(4000, torch.Generator().manual_seed(0))
    assert points.mean(dim=0).abs().max() < 0.1
    assert (points.std(dim=0) - 1).abs().max() < 0.2
    images = data.to_images(points)
    assert images.shape == (4000, 8, 8)
    # All 64 components lose nothing: pixels that are blank in every image come back as dequantisation noise.
    assert 0 <= images.min() <= images[:, 0, 0].max() <= 1 / 17 + 1e-4


def test_resumed_run_repeats_the_uninterrupted_one(tmp_path, capsys):
    settings = tiny_settings()
    data = density_data.load(settings.data)

    def fresh_flow():
        torch.manual_seed(settings.seed)
        return density.Flow(data.dim, settings.width)

    flow = fresh_flow()
    whole, interrupted = density.train(settings, data, flow, flow, tmp_path / "whole.pt", resume=False)
    assert not interrupted
    assert len(whole.losses) == settings.iterations

    calls = 0
    halted = fresh_flow()

    def with_interrupt(y, t):
        nonlocal calls
        calls += 1
        if calls == 3:
            signal.raise_signal(signal.SIGINT)
        return halted(y, t)

    handler = signal.getsignal(signal.SIGINT)
    part, interrupted = density.train(settings, data, halted, with_interrupt, tmp_path / "part.pt", resume=False)
    assert interrupted
    assert part.losses == whole.losses[:3]
    assert signal.getsignal(signal.SIGINT) is handler

    again = density.Flow(data.dim, settings.width)
    resumed, interrupted = density.train(settings, data, again, again, tmp_path / "part.pt", resume=True)
    assert not interrupted
    assert resumed.losses == whole.losses
    for expected, parameter in zip(flow.parameters(), again.parameters(), strict=True):
        assert torch.equal(expected, parameter)


def test_resume_refuses_a_missing_or_foreign_checkpoint(tmp_path):
    settings = tiny_settings(iterations=1)
    data = density_data.load(settings.data)
    flow = density.Flow(data.dim, settings.width)
    path = tmp_path / "run.pt"
    with pytest.raises(SystemExit, match="there is no checkpoint"):
        density.train(settings, data, flow, flow, path, resume=True)
    density.train(settings, data, flow, flow, path, resume=False)
    with pytest.raises(SystemExit, match=r"--lr 0\.01 \(now 0\.1\)"):
        density.train(tiny_settings(iterations=1, lr=0.1), data, flow, flow, path, resume=True)


def test_compare_needs_a_low_precision(capsys):
    with pytest.raises(SystemExit):
        density.parse_arguments(["--compare", "--dtype", "float32"])
    assert "float16" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "option"), [("density", "--compare"), ("adjoint_scaling", "--points"), ("roundoff", "--quick")]
)
def test_help(name, option):
    done = subprocess.run(
        [sys.executable, EXAMPLES / f"{name}.py", "--help"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert option in done.stdout


def test_markdown_table_is_aligned():
    table = common.markdown(["name", "y"], [["a", "1.5"], ["longer", "20"]])
    assert table.splitlines() == ["| name   |   y |", "|--------|----:|", "| a      | 1.5 |", "| longer |  20 |"]


def test_closed_form_holds_for_rk4_in_float64():
    decay = adjoint_scaling.Decay().double()
    y0 = adjoint_scaling.initial_values().double()
    t = torch.linspace(0, adjoint_scaling.END, 400, dtype=torch.float64)
    measured = adjoint_scaling.measure(decay, list(decay.parameters()), y0, t)
    exact = adjoint_scaling.closed_form(y0)
    torch.testing.assert_close(measured.values, exact[:, 0], rtol=5e-4, atol=0)
    torch.testing.assert_close(torch.stack([measured.final, measured.gradient]), exact[:2], rtol=5e-4, atol=0)


def test_expected_error_of_a_rounded_velocity():
    y0, t = adjoint_scaling.initial_values(), torch.linspace(0, adjoint_scaling.END, 400)
    plain = adjoint_scaling.rounded(y0, t, torch.bfloat16, cast=False, product=False)
    both = adjoint_scaling.rounded(y0, t, torch.bfloat16, cast=True, product=True)
    error = both / plain - 1
    worst, mean = adjoint_scaling.bounds(t, torch.bfloat16)
    assert error.abs().max() < worst
    assert error.square().mean().sqrt().item() == pytest.approx(mean, rel=0.3)


def test_trajectory_is_that_of_the_compiled_loop():
    policy = rampde_fx.PrecisionPolicy()
    t = torch.linspace(0, 1, 6)
    replayed = adjoint_scaling.trajectory(policy, t)
    model = adjoint_scaling.Decay()
    function = common.compiled(model, policy, "aot_eager")
    measured = adjoint_scaling.measure(function, list(model.parameters()), adjoint_scaling.initial_values(), t)
    assert measured.values[0] == replayed.states[-1]
    assert measured.values[1] == replayed.adjoints[0]
    assert replayed.scales.shape == (5, 4)
    assert torch.equal(replayed.scales.log2(), replayed.scales.log2().round())


def test_roundoff_of_a_low_state_grows_and_that_of_a_low_velocity_does_not():
    problem = roundoff.Problem("Euler", seed=0)
    low = roundoff.Arithmetic("low", torch.float16, None, "C0", "-")
    velocity = roundoff.Arithmetic("velocity", torch.float16, rampde_fx.PrecisionPolicy(), "C0", "-")
    state_errors = [roundoff.run(problem, low, steps, "aot_eager", 32).solution for steps in (4, 64)]
    assert state_errors[1] > 4 * state_errors[0]
    error = roundoff.run(problem, velocity, 16, "aot_eager", 32).solution
    assert error < 2 * common.unit_roundoff(torch.float16)


@pytest.mark.parametrize(("method", "order"), [("Euler", 1), ("midpoint", 2), ("RK4", 4)])
def test_methods_have_their_order(method, order):
    problem, steps = roundoff.Problem(method, seed=0), (16, 32)
    errors = [roundoff.run(problem, roundoff.DISCRETISATION, n, "aot_eager", 128).solution for n in steps]
    assert -roundoff.slope(steps, errors) == pytest.approx(order, abs=0.2)


def test_rows_of_roundoff_are_read_back(tmp_path):
    path = tmp_path / "rows.csv"
    rows = [roundoff.Row("Euler", "float16 state", n, 0, 1e-3 / n, 2e-3, float("nan"), 0.5) for n in (4, 8)]
    for row in rows:
        roundoff.append_row(path, row)
    assert [repr(row) for row in roundoff.read_rows(path)] == [repr(row) for row in rows]
    assert roundoff.read_rows(tmp_path / "none.csv") == []
