"""The order of the passes is part of their types: a type checker refuses two neighbours in the other order."""

import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

from rampde_fx import backend

NAMES = [step_pass.__name__ for step_pass in backend.STEP_PASSES]
ROOT = Path(__file__).parent.parent


def pipeline(names):
    """Source that chains passes, and imports them."""
    first, *rest = names
    imports = "".join(f"from rampde_fx.passes.{name} import {name}\n" for name in names)
    return imports + f"Pipeline.of({first}){''.join(f'.then({name})' for name in rest)}\n"


def refused(folder, sources):
    """Which of some sources mypy finds an error of types in, by number."""
    lines = []
    for i, source in enumerate(sources):
        (folder / f"case_{i}.py").write_text(f"from rampde_fx.ir.loops import Pipeline\n{source}")
        lines.append(str(folder / f"case_{i}.py"))
    command = [sys.executable, "-m", "mypy", "--config-file", ROOT / "pyproject.toml", *lines]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    found = re.findall(r"case_(\d+)\.py:\d+: error: .*\[arg-type\]", done.stdout)
    assert done.stdout.count(" error: ") == len(found), done.stdout
    return set(map(int, found))


def test_every_swap_of_neighbouring_passes_is_refused_by_their_types(tmp_path):
    swaps = []
    for i, (a, b) in enumerate(pairwise(NAMES)):
        swaps.append(pipeline([*NAMES[:i], b, a, *NAMES[i + 2 :]]))
    assert refused(tmp_path, [*swaps, pipeline(NAMES)]) == set(range(len(NAMES) - 1))  # near miss: the right order


def test_a_pass_that_is_left_out_is_refused_by_the_types_too(tmp_path):
    shorter = [pipeline([name for name in NAMES if name != left_out]) for left_out in NAMES[1:-1]]
    assert refused(tmp_path, shorter) == set(range(len(shorter)))
