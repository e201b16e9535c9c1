"""What `import rampde_fx` imports, who touches private names of torch, and what is said where torch lacks one."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.fx.passes import fake_tensor_prop

import rampde_fx
from rampde_fx import errors
from rampde_fx.torch_private import dynamo, names
from tests.sources import FILES, PACKAGE
from tests.test_structure import ORDER

# Where they stand for public ones: a type and a function by which nodes are recognised, and what documents itself.
ALLOWED = {"torch._ops", "torch._C._set_grad_enabled", "torch._check", "torch.utils._pytree"}
# Code that Dynamo captures takes it by its full name.
ALLOWED_IN_PARTS = {"torch._dynamo.patch_dynamo_config", "torch._higher_order_ops.while_loop"}

MODEL = """
import json, sys, torch

def model(y, t):
    for _, dt in rampde_fx.steps(t):
        y = y + dt * torch.tanh(y)
    return rampde_fx.odeint(lambda t, y: -y, y, t, method="euler")[-1]
"""


def run(script):
    """What a Python of its own prints last, as JSON."""
    command = [sys.executable, "-c", MODEL + script]
    done = subprocess.run(command, cwd=PACKAGE.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_nothing_heavy_is_imported_before_something_is_compiled():
    imported = run("""
before = set(sys.modules)
import rampde_fx
y, t = torch.ones(3), torch.linspace(0, 1, 3)
rampde_fx.mixed_precision(torch.nn.Linear(3, 3), dtype=torch.float16)
rampde_fx.mixed_precision(model, dtype=torch.float16)(y, t)
rampde_fx.odeint(lambda t, y: -y, y, t, method="dopri5", policy=rampde_fx.PrecisionPolicy(torch.float16))
print(json.dumps(sorted(set(sys.modules) - before)))
""")
    roots = {name.partition(".")[0] for name in imported} - set(sys.stdlib_module_names)
    assert roots <= {"rampde_fx"}, sorted(name for name in imported if name.partition(".")[0] in roots)
    assert "rampde_fx.backend" not in imported


def test_contributing_says_which_files_are_loaded_at_once():
    loaded = run("""
import rampde_fx
print(json.dumps([name for name in sys.modules if name.startswith("rampde_fx.")]))
""")
    text = " ".join((PACKAGE.parent / "CONTRIBUTING.md").read_text(encoding="utf-8").split())
    told = text.partition("`import rampde_fx` loads")[2].partition("sees to it")[0]
    heavy = {*ORDER[: ORDER.index("ir") + 1], "torch_private"}
    found = [name.split(".")[1:] for name in loaded if name.split(".")[1] in heavy]
    files = {"/".join(parts[-2:]) for parts in found if len(parts) > 1}
    private = re.findall(r"`(\w+)\.py`", told.partition("of `torch_private/`")[2])
    assert files == {"proof/check_table", *(f"torch_private/{name}" for name in private)}
    assert "`proof/check_table.py` alone" in told


def test_a_clone_in_the_current_folder_is_not_the_package(tmp_path):
    """Its folder has the package's name, and is none."""
    (tmp_path / "rampde_fx").mkdir()
    command = [sys.executable, "-c", "import rampde_fx; print(rampde_fx.__version__)"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == rampde_fx.__version__, done.stderr


def test_what_compiles_is_imported_when_it_is_asked_for():
    found = run("""
import rampde_fx
from rampde_fx import *
print(json.dumps([name for name in rampde_fx.__all__ if name not in globals()]))
""")
    assert found == []
    assert rampde_fx.backend.rampde_fx is not None and rampde_fx.explain is rampde_fx.report.explain.explain
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        rampde_fx.nothing  # noqa: B018


MISSING = [
    ("torch._dynamo.utils", "run_node"),
    ("torch._dynamo.variables.base", "ValueMutationNew"),
    ("torch._dynamo.exc", "Unsupported"),
    ("torch._functorch.compile_utils", "fx_graph_cse"),
    ("torch._higher_order_ops.scan", "scan_op"),
    ("torch.utils._sympy.symbol", "symbol_is_type"),
    ("torch._inductor.compile_fx", "compile_fx_inner"),
    ("torch._C", "_AutoDispatchBelowAutograd"),
]


def test_a_missing_name_breaks_compiling_with_its_name():
    told = run(f"""
import importlib, torch._inductor.compile_fx, torch._dynamo
frames = torch._C._dynamo.eval_frame
kept = frames.set_code_exec_strategy
del frames.set_code_exec_strategy
import rampde_fx
frames.set_code_exec_strategy = kept
rampde_fx.mixed_precision(model, dtype=torch.float16)(torch.ones(3), torch.linspace(0, 1, 3))
told = []
for module, name in {MISSING}:
    owner = importlib.import_module(module)
    kept = getattr(owner, name)
    delattr(owner, name)
    try:
        torch.compile(rampde_fx.mixed_precision(model, dtype=torch.float16), backend="rampde_fx")
    except rampde_fx.errors.MissingTorchNameError as error:
        told.append(str(error))
    setattr(owner, name, kept)
print(json.dumps(told))
""")
    for (module, name), text in zip(MISSING, told, strict=True):
        assert f"{module}.{name}," in text and torch.__version__ in text and names.CHECKED in text


def test_a_name_that_is_missing_later(monkeypatch):
    assert rampde_fx.backend is not None
    monkeypatch.delattr(fake_tensor_prop, "FakeTensorProp")
    compiled = torch.compile(
        lambda y, t: rampde_fx.odeint(
            lambda t, y: -y, y, t, method="rk4", policy=rampde_fx.PrecisionPolicy(torch.float16)
        )[-1],
        backend="rampde_fx",
        options={"compiler": "eager"},
    )
    with pytest.raises(errors.MissingTorchNameError, match=r"torch\.fx\.passes\.fake_tensor_prop\.FakeTensorProp"):
        compiled(torch.ones(3), torch.linspace(0, 1, 3))


def test_this_version_has_every_name():
    assert rampde_fx.backend is not None
    names.require_all()


def test_a_constant_is_marked_as_torch_marks_it():
    def ours():
        """Marked by us."""

    def torchs():
        """Marked by torch."""

    torch.compiler.assume_constant_result(torchs)
    assert vars(dynamo.constant(ours)) == vars(torchs)


class _Names(ast.NodeVisitor):
    """Every dotted name that a file imports or reads."""

    def __init__(self):
        self.found = set()

    def visit_Import(self, node):
        self.found |= {alias.name for alias in node.names}

    def visit_ImportFrom(self, node):
        self.found |= {f"{node.module}.{alias.name}" for alias in node.names}

    def visit_Attribute(self, node):
        parts, owner = [node.attr], node.value
        while isinstance(owner, ast.Attribute):
            parts, owner = [owner.attr, *parts], owner.value
        if isinstance(owner, ast.Name):
            self.found.add(".".join([owner.id, *parts]))
        self.visit(owner)


def private_names(file):
    """The private names of torch that a file imports or reads."""
    names_read = _Names()
    names_read.visit(ast.parse(file.read_text()))
    private = {name for name in names_read.found if re.match(r"torch\.(?!ops\.)(\w+\.)*_(?!_)", name)}
    return {name for name in private if not any(f"{name}.".startswith(f"{allowed}.") for allowed in ALLOWED)}


def files():
    return [file for name, file in FILES.items() if ".torch_private" not in name]


def test_private_names_are_read_in_torch_private_alone():
    assert len(files()) > 60
    assert {file.name: found for file in files() if (found := private_names(file))} == {}


def test_torch_private_reads_them_by_its_tables():
    parts = list((PACKAGE / "torch_private").glob("*.py"))
    found = set().union(*map(private_names, parts))
    assert len(parts) > 5 and found == ALLOWED_IN_PARTS


@pytest.mark.parametrize("page", ["README.md", "docs/install.md"])
def test_the_pages_say_on_which_versions_the_names_were_checked(page):
    text = (Path(__file__).parent.parent / page).read_text(encoding="utf-8")
    assert f"checked on torch {names.CHECKED}" in " ".join(text.split())
