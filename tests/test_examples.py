"""The parts of the examples that need no compiler."""

import argparse
import csv
import importlib
import json
import math
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import rampde_fx
from rampde_fx.torch_private import kernels

for name in ("matplotlib", "sklearn", "tqdm"):
    pytest.importorskip(name)

EXAMPLES = Path(__file__).parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))
adjoint_scaling = importlib.import_module("adjoint_scaling")
classify = importlib.import_module("classify")
common = importlib.import_module("common")
demo = importlib.import_module("demo")
density = importlib.import_module("density")
density_data = importlib.import_module("density_data")
density_plots = importlib.import_module("density_plots")
image_data = importlib.import_module("image_data")
roundoff = importlib.import_module("roundoff")
training = importlib.import_module("training")
training_options = importlib.import_module("training_options")
training_results = importlib.import_module("training_results")


def random_flow(dim: int, width: int) -> torch.nn.Module:
    torch.manual_seed(0)
    flow = density.Flow(dim, width)
    torch.nn.init.normal_(flow.last.weight, std=0.5)
    torch.nn.init.normal_(flow.last.bias, std=0.5)
    return flow


class Line(training.Workload):
    """A scalar is fitted to seeded noise; the loss of one iteration can be made infinite, or the run interrupted."""

    name = "line"
    loss_unit = "1"
    check_every = 2

    def __init__(self, infinite_at: int = -1, interrupt_at: int = -1) -> None:
        self.metrics = {"error": training_results.Metric("held-out error", "1", 2)}
        self.calls = 0
        self.infinite_at, self.interrupt_at = infinite_at, interrupt_at

    def module(self) -> torch.nn.Module:
        return Euler()

    def sample(self, generator: torch.Generator) -> tuple[torch.Tensor]:
        return (torch.randn(4, 1, generator=generator),)

    def loss(self, model, points: torch.Tensor) -> torch.Tensor:
        loss = model(points, torch.linspace(0, 1, 4)).square().mean()
        self.calls += 1
        if self.calls == self.interrupt_at:
            signal.raise_signal(signal.SIGINT)
        return loss / 0 if self.calls == self.infinite_at else loss

    def held_out(self, model) -> dict[str, float]:
        return {"error": model(torch.ones(4, 1), torch.linspace(0, 1, 4)).detach().square().mean().item()}

    def draw(self, module: torch.nn.Module, seed: int, path: Path) -> None:
        path.write_text(str(seed))


class Euler(torch.nn.Module):
    """y' = w y by Euler's method."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(1, 1))

    def forward(self, y: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        for _, dt in rampde_fx.steps(t):
            y = y + dt * (y @ self.weight)
        return y


def options(out: Path, *arguments: str) -> argparse.Namespace:
    parser = training_options.parser("", str(out), iterations=6, batch=4, lr=0.1)
    named = () if {"--dtype", "--compare"} & {*arguments} else ("--dtype", "float16")
    return training_options.parse(parser, ["--device", "cpu", "--compiler", "aot_eager", *named, *arguments])


def table_rows(out: Path) -> list[dict[str, str]]:
    with (out / "line-results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


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


def test_a_table_of_dtypes_and_seeds(tmp_path):
    workload = Line()
    assert training.run(workload, options(tmp_path, "--compare", "--seed", "3", "5")) == 0
    rows = table_rows(tmp_path)
    assert [(row["dtype"], row["seed"]) for row in rows] == [(d, s) for d in training_options.POLICIES for s in "35"]
    # One seed, one error in every dtype, up to its roundoff; float32 and bfloat16 are not scaled.
    for row, reference in zip(rows, rows[:2] * 4, strict=True):
        assert float(row["error"]) == pytest.approx(float(reference["error"]), rel=2e-2)
        assert row["backward_passes"] == ("6" if row["dtype"] == "float16" else "0")
    assert rows[0]["error"] != rows[1]["error"]
    # float16 stores two bytes for each of 3 steps and 4 points.
    assert [row["stored_bytes"] for row in rows[::2]] == ["48", "24", "24", "24"]
    with (tmp_path / "line-float16-seed3.csv").open(newline="") as file:
        curve = list(csv.DictReader(file))
    assert [bool(point["error"]) for point in curve] == [False, True] * 3
    table = (tmp_path / "line-table.md").read_text()
    assert table.count("±") == 4
    assert "Relative difference from float32, held-out error: bfloat16" in table
    assert (tmp_path / "line-float16-seed5.png").read_text() == "5"
    assert (tmp_path / "line-loss.png").stat().st_size > 0


def test_seeds_share_what_is_compiled_and_nothing_else(tmp_path):
    frames = []
    for out, seeds in (("both", ["0", "1"]), ("one", ["1"])):
        torch._dynamo.utils.counters.clear()
        training.run(Line(), options(tmp_path / out, "--seed", *seeds))
        frames.append(torch._dynamo.utils.counters["frames"]["ok"])
    assert frames[0] == frames[1] > 0
    assert table_rows(tmp_path / "both")[1]["error"] == table_rows(tmp_path / "one")[0]["error"]


def test_resumed_table_repeats_the_uninterrupted_one(tmp_path, capsys):
    arguments = ["--dtype", "float32", "float16", "--seed", "0", "1"]
    training.run(Line(), options(tmp_path / "whole", *arguments))
    handler = signal.getsignal(signal.SIGINT)
    # explain calls the loss, too, but puts its count back.
    assert training.run(Line(interrupt_at=6 + 3), options(tmp_path / "part", *arguments)) == 130
    assert signal.getsignal(signal.SIGINT) is handler
    assert "interrupted after 3 iterations of line-float32-seed1; --resume continues" in capsys.readouterr().out
    resumed = Line()
    assert training.run(resumed, options(tmp_path / "part", *arguments, "--resume")) == 0
    assert "line-float32-seed0: finished before" in capsys.readouterr().out
    # The finished run is not repeated.
    assert resumed.calls == 3 + 6 + 6
    whole, part = table_rows(tmp_path / "whole"), table_rows(tmp_path / "part")
    for name in ("error", "training_loss_last_50", "backward_passes", "stored_bytes"):
        assert [row[name] for row in part] == [row[name] for row in whole]


def test_resume_refuses_missing_or_foreign_checkpoints(tmp_path):
    with pytest.raises(SystemExit, match="there is no checkpoint"):
        training.run(Line(), options(tmp_path, "--iterations", "1", "--resume"))
    training.run(Line(), options(tmp_path, "--iterations", "1"))
    with pytest.raises(SystemExit, match=r"--lr 0\.1 \(now 0\.2\)"):
        training.run(Line(), options(tmp_path, "--iterations", "1", "--resume", "--lr", "0.2"))


def test_divergence_is_an_error_alone_and_a_result_in_a_table(tmp_path):
    with pytest.raises(SystemExit, match="the loss is inf at iteration 3"):
        training.run(Line(infinite_at=4), options(tmp_path))
    # The fifth iteration of the second run: explain's call is not counted.
    assert training.run(Line(infinite_at=6 + 5), options(tmp_path, "--dtype", "float32", "float16")) == 0
    first, second = table_rows(tmp_path)
    assert (first["diverged_at"], second["diverged_at"]) == ("", "4")
    assert math.isnan(float(second["error"]))
    assert "diverged at iteration 4" in (tmp_path / "line-table.md").read_text()


def test_cells_say_mean_deviation_and_how_many_diverged():
    metric = training_results.Metric("error", "1", 2)
    first, second, third = (
        training_results.Result("float16", seed, training_results.History(diverged=diverged), {"e": value}, 1, 1)
        for seed, value, diverged in ((0, 1.0, None), (1, 2.0, None), (2, math.nan, 7))
    )
    assert training_results.metric_cell("e", metric, [first]) == "1.00"
    assert training_results.metric_cell("e", metric, [first, second]) == "1.50 ± 0.71"
    assert training_results.metric_cell("e", metric, [first, second, third]) == "1 of 3 diverged"


def test_compare_stands_for_all_dtypes(tmp_path, capsys):
    assert options(tmp_path, "--compare").dtype == list(training_options.POLICIES)
    with pytest.raises(SystemExit):
        options(tmp_path, "--compare", "--dtype", "float16")
    assert "give one or the other" in capsys.readouterr().err


@pytest.mark.parametrize(("has_bfloat16", "chosen"), [(True, "bfloat16"), (False, "float32")])
def test_auto_is_the_default_and_stands_for_a_dtype(tmp_path, monkeypatch, has_bfloat16, chosen):
    monkeypatch.setattr(kernels, "cpu_has_bfloat16", lambda: has_bfloat16)
    parser = training_options.parser("", str(tmp_path), iterations=6, batch=4, lr=0.1)
    assert training_options.parse(parser, ["--device", "cpu"]).dtype == [chosen]
    assert options(tmp_path, "--dtype", "float32", "auto").dtype == list(dict.fromkeys(["float32", chosen]))


def test_density_is_a_workload(tmp_path):
    out = ["--out", str(tmp_path), "--device", "cpu", "--compiler", "aot_eager"]
    small = ["--dtype", "float32", "--iterations", "2", "--steps", "2", "--width", "4"]
    torch._dynamo.utils.counters.clear()
    assert density.main([*out, *small]) == 0
    # The held-out points find what was compiled for the training; explain captures a second time.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    assert (tmp_path / "8gaussians-float32-seed0.png").stat().st_size > 0
    assert "in fp32, 4 x the steps (nats)" in (tmp_path / "8gaussians-table.md").read_text()


@pytest.mark.parametrize("seed", range(3))
def test_classifier_velocity_is_stable(seed):
    torch.manual_seed(seed)
    layer = classify.Layer(3).double()
    y = torch.randn(1, 3, 4, 4, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda y: layer(torch.zeros(()), y), y).view(48, 48)
    eigenvalues = torch.linalg.eigvals(jacobian)
    assert eigenvalues.real.min() < -1e-2
    assert eigenvalues.real.max() < 1e-14
    assert eigenvalues.imag.abs().max() < 1e-14


def test_every_step_of_the_classifier_has_weights_of_its_own():
    torch.manual_seed(0)
    block, t = classify.Block(2, steps=2), torch.linspace(0, 1, 3)
    y = torch.randn(1, 2, 4, 4)
    half = common.rk4(block.layers[0], t[0], t[1] - t[0], y)
    torch.testing.assert_close(block(y, t), common.rk4(block.layers[1], t[1], t[2] - t[1], half))


TINY_CLASSIFIER = ["--device", "cpu", "--batch", "40", "--width", "2", "--steps", "1", "--dtype", "float32"]


@pytest.mark.slow
def test_classifier_trains(tmp_path):
    out = ["--out", str(tmp_path), "--compiler", "aot_eager"]
    torch._dynamo.utils.counters.clear()
    assert classify.main([*TINY_CLASSIFIER, *out, "--iterations", "3", "--lr", "0.1"]) == 0
    with (tmp_path / "digits-results.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["accuracy"] == row["accuracy_fp32"]
    # As for the density: what is compiled for the training suffices for the held-out images.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    assert 0 < float(row["cross_entropy"]) < 10
    # The states of three blocks of one step: 40 images, 2 x 8 x 8, 4 x 4 x 4 and 8 x 2 x 2 numbers in four bytes.
    assert int(row["stored_bytes"]) == 40 * (128 + 64 + 32) * 4
    assert (tmp_path / "digits-float32-seed0.png").stat().st_size > 0


def test_resumed_classifier_repeats_the_uninterrupted_one(tmp_path):
    options = classify.parse_arguments([*TINY_CLASSIFIER, "--iterations", "20"])
    workload = classify.Classification(options)
    settings = training_options.Settings("float32", 0, 20, 40, 1e-2, "cpu", "aot_eager", {})

    def fresh() -> object:
        torch.manual_seed(0)
        return training.State.fresh(workload, settings, workload.module())

    whole = fresh()
    assert training.train(workload, settings, whole, whole.module, tmp_path / "whole.pt")

    halted, calls = fresh(), 0

    def with_interrupt(images, t):
        nonlocal calls
        calls += 1
        if calls == 2 + 8 + 2:  # two iterations, the held-out images in eight chunks, two iterations
            signal.raise_signal(signal.SIGINT)
        return halted.module(images, t)

    assert not training.train(workload, settings, halted, with_interrupt, tmp_path / "part.pt")
    resumed = fresh()
    resumed.restore(training.read_checkpoint(tmp_path / "part.pt", settings))
    assert resumed.history.losses == whole.history.losses[:4]
    assert training.train(workload, settings, resumed, resumed.module, tmp_path / "part.pt")
    assert resumed.history.losses == whole.history.losses
    assert resumed.history.checks == whole.history.checks
    for expected, parameter in zip(whole.module.parameters(), resumed.module.parameters(), strict=True):
        assert torch.equal(expected, parameter)


def test_image_batches_are_shifted_reflected_and_seeded():
    train = torch.arange(2 * 3 * 16 * 16).remainder(251).byte().view(2, 3, 16, 16)
    labels = torch.tensor([0, 1])
    images = image_data.Images(train, labels, train, labels, ("a", "b"), shift=2, flip=True)
    found, found_labels = images.sample(40, torch.Generator().manual_seed(0))
    again, _ = images.sample(40, torch.Generator().manual_seed(0))
    assert torch.equal(found, again)
    plain = images.normalise(train)
    assert plain.mean(dim=(0, 2, 3)).abs().max() < 1e-5
    middle = found[:, :, 2:-2, 2:-2]
    # The middle of every image is part of its original, or of its mirror image.
    places = 0
    for image, label in zip(middle, found_labels, strict=True):
        windows = torch.cat(
            [x.unfold(1, 12, 1).unfold(2, 12, 1).flatten(1, 2) for x in (plain[label], plain[label].flip(2))], 1
        )
        places += (windows == image[:, None]).all(dim=(0, 2, 3)).any()
    assert places == 40


def write_stl10(root: Path, part: str, images: torch.Tensor, labels: list[int]) -> None:
    """Writes images (count, 3, 96, 96) column by column."""
    (root / f"{part}_X.bin").write_bytes(images.transpose(2, 3).contiguous().numpy().tobytes())
    (root / f"{part}_y.bin").write_bytes(bytes(labels))


def test_stl10_files_are_read(tmp_path):
    generator = torch.Generator().manual_seed(0)
    train, test = (torch.randint(256, (n, 3, 96, 96), generator=generator, dtype=torch.uint8) for n in (3, 2))
    write_stl10(tmp_path, "train", train, [10, 1, 2])
    write_stl10(tmp_path, "test", test, [3, 3])
    found = image_data.stl10(tmp_path)
    assert torch.equal(found.train, train)
    assert torch.equal(found.held_out, test)
    assert found.train_labels.tolist() == [9, 0, 1]
    assert image_data.stl10(tmp_path, 64).train.shape == (3, 3, 64, 64)


def test_wrong_stl10_files_are_refused(tmp_path):
    with pytest.raises(SystemExit, match=r"there is no .*train_X.bin; unpack"):
        image_data.stl10(tmp_path)
    blank = torch.zeros(2, 3, 96, 96, dtype=torch.uint8)
    write_stl10(tmp_path, "train", blank, [1])
    with pytest.raises(SystemExit, match=r"55,296 bytes and train_y\.bin 1; 27,648 bytes to each label"):
        image_data.stl10(tmp_path)
    write_stl10(tmp_path, "train", blank, [1, 11])
    with pytest.raises(SystemExit, match="holds 1 to 11; labels are 1 to 10"):
        image_data.stl10(tmp_path)


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("density", "--compare"),
        ("classify", "--root"),
        ("potential_flow", "--alpha-c"),
        ("adjoint_scaling", "--points"),
        ("roundoff", "--quick"),
    ],
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
    policy = rampde_fx.PrecisionPolicy(torch.float16)
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
    velocity = roundoff.Arithmetic("velocity", torch.float16, rampde_fx.PrecisionPolicy(torch.float16), "C0", "-")
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


def test_the_demo_writes_a_page(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "HELD_OUT", 64)
    monkeypatch.setattr(demo, "chosen_dtype", lambda device: torch.bfloat16)
    sizes = ["--iterations", "2", "--width", "16", "--batch", "32", "--steps", "3"]
    assert demo.main([*sizes, "--compiler", "aot_eager", "--out", str(tmp_path)]) == 0
    page, printed = (tmp_path / "demo.html").read_text(encoding="utf-8"), capsys.readouterr().out
    assert page.count("data:image/png;base64,") == 2 and all(name in page for name, _ in demo.COLUMNS)
    wide, low = (demo.Row(**row) for row in json.loads((tmp_path / "rows.json").read_text()))
    assert (wide.dtype, low.dtype) == ("float32", "bfloat16") and low.stored * 2 == wide.stored
    assert wide.error < 1e-5 < low.error < 3e-2
    found = demo.verdict([wide, low], has_arithmetic=True)
    assert found in printed and found in page


def test_progress_without_a_terminal_is_in_lines(capsys):
    bar = common.progress(3, "flow")
    bar.update(3)
    bar.close()
    lines = capsys.readouterr().err.split("\n")
    assert [line[:11] for line in lines if line] == ["flow:   0%|", "flow: 100%|"] and "\r" not in "".join(lines)


def test_the_demo_trains_in_turns(monkeypatch):
    """So that what else runs on the machine disturbs both alike."""
    done = []

    class Counted:
        losses, seconds = [1.0], [1.0]

        def __init__(self, name):
            self.name = name

        def iterate(self):
            done.append(self.name)

    demo.train([Counted("a"), Counted("b")], 3, {"b": 2.0})
    assert done == ["a", "b"] * 3


def test_the_verdict_of_the_demo():
    rows = [demo.Row("float32", 0.2, 9.0, 100, 1.5, 1e-7), demo.Row("bfloat16", 0.1, 9.0, 50, 1.502, 1e-3)]
    fast = demo.verdict(rows, has_arithmetic=True)
    assert "2.0 times as fast as float32 and keeps 0.50" in fast and fast.endswith("nats.")
    slow = demo.verdict([rows[0], replace(rows[1], iteration=0.4)], has_arithmetic=False)
    assert "takes 2.0 times as long as float32" in slow and slow.endswith("no arithmetic in bfloat16: it is imitated.")
    same = demo.verdict([rows[0], replace(rows[1], iteration=0.206)], has_arithmetic=True)
    assert "bfloat16 takes about as long as float32 and" in same and same.endswith("nats.")
    disturbed = demo.verdict([rows[0], replace(rows[1], iteration=0.9)], has_arithmetic=True)
    assert "takes 4.5 times as long as float32" in disturbed and disturbed.endswith("run it again.")


@pytest.mark.parametrize(("chosen", "size"), [("float32", (64, 256)), ("bfloat16", (256, 512))])
def test_the_demo_is_small_where_low_dtypes_are_slow(chosen, size, monkeypatch):
    monkeypatch.setattr(demo, "chosen_dtype", lambda device: getattr(torch, chosen))
    made = demo.Demo(options := demo.parse_arguments([]))
    assert (options.width, options.batch) == size
    assert made.low is (torch.bfloat16 if chosen == "float32" else getattr(torch, chosen))
    assert demo.Demo(demo.parse_arguments(["--width", "8"])).options.width == 8


@pytest.mark.parametrize("has_bfloat16", [False, True])
def test_the_demo_asks_what_is_chosen(has_bfloat16, monkeypatch):
    monkeypatch.setattr(kernels, "cpu_has_bfloat16", lambda: has_bfloat16)
    assert demo.chosen_dtype("cpu") is (torch.bfloat16 if has_bfloat16 else torch.float32)
