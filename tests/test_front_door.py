"""What a user meets first: policies made anywhere, graphs without a loop, and the caches of another version."""

import copy
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import rampde_fx
import rampde_fx.passes
from rampde_fx import AdjointScaling, PrecisionPolicy, errors
from rampde_fx.backend import OWN_OPTIONS
from tests.comparison import relative_errors

Y, T, W = torch.linspace(-1, 1, 12).view(4, 3), torch.linspace(0, 1, 5), torch.eye(3) - 0.4
OURS = {"backend": "rampde_fx", "options": {"compiler": "aot_eager"}}


def solve(y, t, **given):
    return rampde_fx.odeint(lambda t, y: torch.tanh(y @ W), y, t, method="midpoint", **given)[-1]


def full():
    return PrecisionPolicy(
        velocity=torch.bfloat16,
        storage=torch.float8_e4m3fn,
        storage_scaling="dynamic",
        scaling=AdjointScaling(target=2.0**-4, max_attempts=2),
        accumulation="compensated",
        loop="scan",
        checkpoint=2,
    )


POLICIES = {
    "default": PrecisionPolicy,
    "every field": full,
    "names": lambda: PrecisionPolicy(scaling="none", checkpoint="sqrt", loop="unroll"),
    "default scaling": lambda: PrecisionPolicy(scaling=AdjointScaling()),
}


@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.parametrize("make", POLICIES.values(), ids=POLICIES)
def test_a_policy_made_in_the_compiled_function_is_the_one_made_outside(make, fullgraph):
    outside = make()
    counters.clear()
    got = torch.compile(lambda y, t: solve(y, t, policy=make()), fullgraph=fullgraph, **OURS)(Y, T)
    assert not counters["graph_break"]
    assert torch.equal(got, torch.compile(lambda y, t: solve(y, t, policy=outside), fullgraph=True, **OURS)(Y, T))
    is_low = outside.chosen_for("cpu").velocity != torch.float32
    assert (relative_errors([got], [solve(Y, T)])[0] > 1e-6) == is_low


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: PrecisionPolicy(velocity=torch.int32), "velocity"),
        (lambda: PrecisionPolicy(scaling=AdjointScaling(target=3.0)), "target"),
        (lambda: PrecisionPolicy(scaling=(1.0, 3)), "scaling"),
        (lambda: PrecisionPolicy(checkpoint=0), "checkpoint"),
    ],
)
def test_a_wrong_policy_made_in_the_compiled_function(make, field):
    with pytest.raises(errors.PolicyError, match=field):
        torch.compile(lambda y, t: solve(y, t, policy=make()), **OURS)(Y, T)
    with pytest.raises(errors.PolicyError, match=field):
        torch.compile(lambda y, t: solve(y, t, policy=make()), fullgraph=True, **OURS)(Y, T)


def test_mixed_precision_applied_in_the_compiled_function():
    def inside(y, t):
        return rampde_fx.mixed_precision(solve, dtype=torch.float16)(y, t)

    assert 1e-6 < relative_errors([torch.compile(inside, **OURS)(Y, T)], [solve(Y, T)])[0] < 1e-3
    torch._dynamo.reset()
    with pytest.raises(errors.PolicyError, match="outside of the compiled function"):
        torch.compile(inside, fullgraph=True, **OURS)(Y, T)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_dtype_and_a_policy(dtype):
    with pytest.raises(errors.PolicyError, match="either a dtype or a PrecisionPolicy"):
        rampde_fx.mixed_precision(dtype=dtype, policy=PrecisionPolicy(torch.bfloat16))
    with pytest.raises(errors.PolicyError, match=r"policy='bfloat16'(.|\n)*PrecisionPolicy\.parse"):
        rampde_fx.mixed_precision(policy="bfloat16")
    for given in ({}, {"dtype": dtype}, {"policy": PrecisionPolicy()}, {"dtype": None, "policy": None}):
        rampde_fx.mixed_precision(solve, **given)


@pytest.mark.parametrize(
    ("options", "fix"),
    [
        ({"verfy": True}, "write 'verify'"),
        ({"triton.cudagraph": 1}, "leave 'triton.cudagraph' out"),
        ({"max-autotune": True}, "write 'max_autotune'"),
    ],
)
def test_options_that_nobody_has(options, fix):
    model = torch.compile(rampde_fx.mixed_precision(solve, dtype=torch.float16), backend="rampde_fx", options=options)
    with pytest.raises(errors.PolicyError, match=f"{' and '.join(map(repr, OWN_OPTIONS))}(.|\n)*fix: {re.escape(fix)}"):
        model(Y, T)


def reads_a_number(x):
    return x * x.sum().item()


def sized_by_data(x):
    return x[x > 0] * 2


def in_place(x):
    x = x.clone()
    x[1:] += 1
    return x.add_(x.mean())


def twice_differentiable(x):
    return x.sin().square().sum()


def branches(x):
    return x.exp() if x.sum() > 0 else x.cos()


def under_autocast(x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return x @ x.T


ORDINARY = [
    reads_a_number, sized_by_data, in_place, twice_differentiable, branches, under_autocast,
    nn.Sequential(nn.Linear(3, 8), nn.GELU(), nn.Dropout(0.0), nn.Linear(8, 2)),
    nn.LSTM(3, 4), nn.MultiheadAttention(3, 1), nn.BatchNorm1d(3),
]  # fmt: skip


@pytest.mark.parametrize("program", ORDINARY, ids=lambda program: getattr(program, "__name__", type(program).__name__))
@pytest.mark.parametrize("settings", [{}, {"dynamic": True}], ids=["static", "dynamic"])
def test_a_program_without_a_loop_is_as_under_torchs_own_backend(program, settings):
    outcomes = []
    for backend in (OURS, {"backend": "aot_eager"}):
        torch._dynamo.reset()
        counters.clear()
        y = Y.clone().requires_grad_()
        args = (y, y, y) if isinstance(program, nn.MultiheadAttention) else (y,)
        results = torch.compile(program, **backend, **settings)(*args)
        leaves = [leaf for leaf in torch.utils._pytree.tree_leaves(results) if leaf is not None]
        (gradient,) = torch.autograd.grad(sum(leaf.float().square().sum() for leaf in leaves), y)
        outcomes.append([*(leaf.detach() for leaf in leaves), gradient, counters["stats"]["unique_graphs"]])
    assert outcomes[0][-1] == outcomes[1][-1]
    assert all(torch.equal(a, b) for a, b in zip(outcomes[0][:-1], outcomes[1][:-1], strict=True))


SCRIPT = """import torch, rampde_fx
from torch._dynamo.utils import counters
@rampde_fx.mixed_precision(dtype=torch.float16)
def f(y, w, t):
    for _, dt in rampde_fx.steps(t):
        y = y + dt * torch.tanh(y @ w)
    return y
with torch.no_grad():
    torch.compile(f, backend="rampde_fx")(torch.ones(3, 5), torch.eye(5), torch.linspace(0, 1, 9))
print(counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"])"""


@pytest.mark.inductor
def test_what_another_version_of_the_package_compiled_is_not_taken_from_a_cache(tmp_path):
    for package, folder in ((rampde_fx, "rampde_fx"), (rampde_fx.passes, "rampde_fx/passes")):
        shutil.copytree(Path(package.__file__).parent, tmp_path / folder, dirs_exist_ok=True)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}

    def hits():
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT], env=environment, cwd=tmp_path, capture_output=True, text=True, check=True
        )
        return int(done.stdout)

    assert hits() == 0
    assert hits() > 0  # near miss: the same version again
    for file in ("rampde_fx/ir/loops.py", "rampde_fx/passes/emit_loop.py"):
        with (tmp_path / file).open("a") as source:
            source.write("\n# another version\n")
        assert hits() == 0


def test_a_copy_of_the_repository_imports_its_own_passes(tmp_path):
    root = Path(__file__).parent.parent
    for folder in ("rampde_fx", "passes"):
        shutil.copytree(root / folder, tmp_path / folder, symlinks=True)
    script = "import rampde_fx.backend, rampde_fx.passes.emit_loop as p; print(rampde_fx.__file__); print(p.__file__)"
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert [Path(line).resolve() for line in done.stdout.splitlines()] == [
        tmp_path / "rampde_fx" / "__init__.py",
        tmp_path / "passes" / "emit_loop.py",
    ]


@pytest.mark.parametrize(
    "name", ["target", "gain", "ratio", "factor", "correction_y", "adjoint_y", "scale_y", "vanished"]
)
def test_a_parameter_may_have_the_name_of_what_a_pass_adds(name):
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            for i, value in enumerate((0.5, 1e-6, 2e-6)):
                setattr(self, f"{name}_{i}", nn.Parameter(torch.tensor(value)))
            setattr(self, name, nn.Parameter(torch.randn(3, 3)))

        def forward(self, y, t):
            first, second, third = (getattr(self, f"{name}_{i}") for i in range(3))
            for _, dt in rampde_fx.steps(t):
                k = torch.tanh(y @ getattr(self, name))
                y = y + dt * (first * k + second * torch.sin(k) + third * (k @ getattr(self, name)))
            return y

    model = Named()
    plain = copy.deepcopy(model)
    policy = rampde_fx.PrecisionPolicy(torch.float16, accumulation="compensated", storage_scaling="dynamic")
    marked = rampde_fx.mixed_precision(model, policy=policy)
    run = torch.compile(marked, backend="rampde_fx", options={"compiler": "eager"}, fullgraph=True)
    y, t = torch.randn(5, 3), torch.linspace(0, 1, 3)
    for module, function in ((model, run), (plain, plain)):
        function(y, t).square().sum().backward()
        assert all(p.grad is not None for p in module.parameters())
    assert max(relative_errors([p.grad for p in model.parameters()], [p.grad for p in plain.parameters()])) < 1e-2


@pytest.mark.parametrize("name", ["l_1", "l_in", "L_2", "l_lambda", "class_", "args_0_net"])
def test_a_layer_may_have_any_name(name):
    """Dynamo's names of inputs begin with l_, and what is left may be no name in Python."""

    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            setattr(self, name, nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 3)))

        def forward(self, y, t):
            for _, dt in rampde_fx.steps(t):
                y = y + dt * torch.tanh(getattr(self, name)(y))
            return y

    model = Named()
    plain = copy.deepcopy(model)
    run = torch.compile(
        rampde_fx.mixed_precision(model, dtype=torch.float16), backend="rampde_fx", options={"compiler": "eager"}
    )
    y, t = torch.randn(5, 3), torch.linspace(0, 1, 3)
    assert relative_errors([run(y, t)], [plain(y, t)])[0] < 2.5e-3
