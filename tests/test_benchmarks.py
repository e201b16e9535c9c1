"""The benchmark command, on the smallest cases and contenders that do not compile."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from tests.benchmarks import __main__ as command
from tests.benchmarks import cases, contenders, measure

COMMAND = [
    sys.executable,
    "-m",
    "tests.benchmarks",
    "--quick",
    "--contenders",
    "eager float32",
    "torch.compile float32",
]


def run(folder, *arguments):
    """The results that the command writes, with the time per turn and all else at the least."""
    settings = ["--out", str(folder), "--rounds", "2", "--turn", "0.01", "--threads", "1", "--longest-unrolled", "1"]
    subprocess.run([*COMMAND, *settings, *arguments], check=True, capture_output=True)
    (file,) = folder.glob("*.json")
    return json.loads(file.read_text()), file.with_suffix(".md").read_text()


def test_a_case_is_measured_and_what_does_not_run_is_named(tmp_path):
    report, text = run(tmp_path, "--cases", "attention")
    (case,) = report["cases"]
    result = case["results"]["eager float32"]
    assert result["steps"] >= 2 and 0 < result["quartiles"][0] <= result["seconds"] <= result["quartiles"][1]
    assert result["saved_bytes"] > 0 and result["gradient_difference"] == 0
    assert "more than 1 unrolled steps" in case["skipped"]["torch.compile float32"]
    assert "Not run:" in text and "torch 2." in text and "| eager float32 |" in text
    assert "arithmetic for" in report["device"] and "arithmetic for" in text


def test_a_sweep_is_measured_and_drawn(tmp_path):
    report, text = run(tmp_path, "--scaling", "--cases", "cnf")
    sizes = {(point["sweep"], point["value"]) for point in report["points"]}
    assert sizes == {("steps", 8), ("steps", 32), ("batch", 16), ("batch", 64)}
    assert "of the roofline" in text and (tmp_path / "cpu-quick-scaling.png").stat().st_size > 10_000


def test_an_unknown_case_is_refused():
    found = subprocess.run([*COMMAND, "--cases", "nothing"], check=False, capture_output=True, text=True)
    assert found.returncode == 2 and "no nothing; there are cnf" in found.stderr


def test_the_table_of_the_readme_has_four_rows_small_and_large():
    options = command.parse(["--readme"])
    assert [case.sizes["width"] for case in options.known] == [64, 512]
    for case in options.known:
        rows = contenders.taking_part(case, quick=False, readme=True)
        assert {row.name for row in rows} == contenders.README and rows[0].name == contenders.BASELINE
        assert len(rows) == 4 and not any(row.absent(case, "cpu", options.longest_unrolled) for row in rows)


def test_names_of_contenders_are_names():
    names = [contender.name for contender in contenders.ALL]
    some = {contenders.BASELINE, *contenders.QUICK, *contenders.README, *set().union(*contenders.QUICK_MORE.values())}
    assert len(names) == len(set(names)) and some <= set(names)


@pytest.mark.parametrize("case", cases.QUICK, ids=lambda case: case.name)
def test_solvers_agree(case):
    """What the benchmarks compare is one model: the marked loop and odeint make the same loss."""
    losses = []
    for solve in (contenders.solve_by_loop, contenders.solve_by_odeint):
        model, x, t = case.build(solve, torch.device("cpu"))
        losses.append(model(x, t))
    torch.testing.assert_close(*losses, rtol=1e-6, atol=0)


def test_the_divergence_of_the_potential_flow_is_that_of_its_velocity():
    velocity = cases.PotentialVelocity(dim=4, width=6).double()
    y, t = torch.randn(3, 7, dtype=torch.float64), torch.tensor(0.3, dtype=torch.float64)
    jacobian = torch.func.vmap(torch.func.jacrev(lambda z: velocity(t, z[None])[0, :4]))(y)[:, :, :4]
    torch.testing.assert_close(velocity(t, y)[:, 4], jacobian.diagonal(dim1=1, dim2=2).sum(dim=1))


def test_operations_of_the_scheme():
    """A product of (8, 4) with (4, 4): forward, recomputation, and two products of the backward."""
    layer = torch.nn.Linear(4, 4, bias=False)
    x = torch.randn(8, 4, requires_grad=True)
    assert measure.scheme_flops(lambda: layer(x).sum(), layer) == 4 * 2 * 8 * 4 * 4


def test_only_waits_within_the_watched_range_count():
    """A profiler waits for the device itself, when it ends."""
    kinds = torch.autograd.DeviceType

    def event(name, start, end, kind=kinds.CPU):
        return SimpleNamespace(name=name, time_range=SimpleNamespace(start=start, end=end), device_type=kind)

    events = [
        event("cudaDeviceSynchronize", 1, 2),
        event(measure.WATCHED, 3, 9),
        event(measure.WATCHED, 3, 12, kinds.CUDA),
        event("cudaStreamSynchronize", 4, 5),
        event("cudaLaunchKernel", 5, 6),
        event("cudaEventSynchronize", 8, 10),
        event("cudaDeviceSynchronize", 11, 12),
    ]
    assert measure.waits(events) == 2


THEIRS = """
import unittest, torch, torchdiffeq

class Tests(unittest.TestCase):
    def test_methods(self):
        for method in ("euler", "rk4", "rk5"):
            with self.subTest(method=method):
                y = torchdiffeq.odeint(lambda t, y: y, torch.ones(1), torch.tensor([0.0, 1.0]), method=method)
                self.assertEqual(y.shape, (2, 1))

    def test_version(self):
        self.assertEqual(torchdiffeq.__version__, "0.2.5")

    def test_wrong(self):
        self.assertEqual(torchdiffeq.__version__, "0|1")
"""


def test_the_suite_of_torchdiffeq_counts_subtests_and_reasons(tmp_path):
    (tmp_path / "small_tests.py").write_text(THEIRS)
    command = [sys.executable, "-m", "tests.benchmarks.torchdiffeq_suite", str(tmp_path)]
    rows = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[2:]
    assert [row.split(" | ")[:3] for row in rows] == [
        ["| `small_tests.Tests.test_methods`", "2", "1"],
        ["| `small_tests.Tests.test_version`", "1", "0"],
        ["| `small_tests.Tests.test_wrong`", "0", "1"],
        ["| all", "3", "2"],
    ]
    assert "1 MethodError: method='rk5' is not known" in rows[0]
    assert "1 AssertionError: '0.2.5' != '0/1'" in rows[2]


def test_an_example_of_torchdiffeqs_runs_with_its_lines_changed(tmp_path):
    (tmp_path / "ode_demo.py").write_text(
        "import argparse\nimport torch\nparser = argparse.ArgumentParser()\n"
        "parser.add_argument('--adjoint', action='store_true')\nargs = parser.parse_args()\nif args.adjoint:\n"
        "    from torchdiffeq import odeint_adjoint as odeint\nelse:\n    from torchdiffeq import odeint\n"
        "func = torch.nn.Linear(2, 2)\nfunc.forward = lambda t, y: y @ func.weight\n"
        "for iteration in range(100):\n"
        "    y = odeint(func, torch.ones(2), torch.tensor([0.0, 1.0]), method='euler')\n"
        "    (0.0 * y.sum() + iteration).backward()\n"
    )
    command = [sys.executable, "-m", "tests.benchmarks.torchdiffeq_examples", str(tmp_path), "--only", "ode_demo"]
    told = subprocess.run([*command, "--how", "uncompiled"], check=True, capture_output=True, text=True).stdout
    for solver in ("odeint", "odeint_adjoint"):
        assert f"| ode_demo | {solver} | rampde_fx.torchdiffeq | -2 +2 | 0 (1), 9 (10), 19 (20) |" in told
    told = subprocess.run([*command, "--how", "float16"], check=True, capture_output=True, text=True).stdout
    assert told.count("| compiled, float16 | -2 +8 | 0 (1), 9 (10), 19 (20) |") == 2, told
    (tmp_path / "ode_demo.py").write_text("raise ValueError('no | example')")
    told = subprocess.run([*command, "--how", "uncompiled"], check=True, capture_output=True, text=True).stdout
    assert "| -0 +0 | ValueError: no / example |" in told
