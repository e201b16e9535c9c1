"""What an installed rampde_fx must have: `make wheel-test` runs these, with others, outside of the source tree."""

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import rampde_fx

ROOT = Path(__file__).parent.parent


def run(*args, **kwargs):
    """What a Python of this environment prints."""
    done = subprocess.run([sys.executable, *args], capture_output=True, text=True, check=False, **kwargs)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_it_is_the_installed_package():
    assert Path(rampde_fx.__file__).resolve().is_relative_to(Path(sys.prefix).resolve())
    assert importlib.metadata.version("rampde_fx") in ROOT.name


def test_files_of_the_wheel():
    files = {str(path) for path in importlib.metadata.files("rampde_fx") if path.suffix != ".pyc"}
    folders = {path.split("/")[0] for path in files}
    assert folders == {"rampde_fx", f"rampde_fx-{rampde_fx.__version__}.dist-info"}, folders
    assert {"rampde_fx/py.typed", "rampde_fx/backend.py", "rampde_fx/passes/emit_loop.py"} <= files
    assert any(path.endswith("/licenses/LICENSE") for path in files)


def test_files_of_the_source_distribution():
    wanted = "Makefile LICENSE README.md CHANGELOG.md CONTRIBUTING.md SECURITY.md pyproject.toml .ci/run"
    configured = ".pre-commit-config.yaml .github/ISSUE_TEMPLATE/bug_report.yml"
    folders = "tests/benchmarks/cases.py examples/density.py docs/numerics.md docs/roundoff.png"
    assert [name for name in f"{wanted} {configured} {folders}".split() if not (ROOT / name).is_file()] == []


def test_the_backend_needs_no_import(tmp_path):
    found = run(
        "-c",
        "import sys, torch\n"
        "assert 'rampde_fx' in torch._dynamo.list_backends() and 'rampde_fx' not in sys.modules\n"
        "compiled = torch.compile(torch.sin, backend='rampde_fx', options={'compiler': 'eager'})\n"
        "assert torch.equal(compiled(torch.ones(3)), torch.sin(torch.ones(3)))\n"
        "print(sys.modules['rampde_fx.backend'].__file__)",
        cwd=tmp_path,
    )
    assert Path(found.strip()).resolve().is_relative_to(Path(sys.prefix).resolve())


def test_a_downstream_file_sees_types(tmp_path):
    (tmp_path / "mypy.ini").write_text("[mypy]\n[mypy-torch.*]\nfollow_imports = skip\n")
    (tmp_path / "use.py").write_text(
        "import rampde_fx\nreveal_type(rampde_fx.steps)\nreveal_type(rampde_fx.PrecisionPolicy().accumulation)\n"
    )
    found = run("-m", "mypy", "use.py", cwd=tmp_path)
    # One Literal, or a union of two: by the version of mypy.
    assert 'Revealed type is "def (t: ' in found, found
    assert found.count("Literal[") > 0 and "'plain'" in found and "'compensated'" in found, found
