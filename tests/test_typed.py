"""What a type checker sees of the package, as a user's own strict one does."""

import os
import subprocess
import sys

from tests.sources import ROOT

USER = """
from typing import assert_type

import torch

import rampde_fx
from rampde_fx import errors, torchdiffeq


@rampde_fx.mixed_precision(dtype=torch.float16)
class Flow(torch.nn.Module):
    def forward(self, y: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        for t_i, dt in rampde_fx.steps(t):
            y = y + dt * torch.sin(y + t_i)
        return y


def rate(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return -y


def pair(t: torch.Tensor, y: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    return -y[1], y[0]


y, t = torch.ones(2), torch.linspace(0, 1, 3)
assert_type(rampde_fx.odeint(rate, y, t, method="rk4"), torch.Tensor)
assert_type(rampde_fx.odeint(pair, (y, y), t), tuple[torch.Tensor, torch.Tensor])
solution = torchdiffeq.odeint(rate, y, t)
try:
    report = rampde_fx.explain(Flow(), y, t)
    assert_type(report, rampde_fx.Report)
    assert_type(report.loops[0], rampde_fx.LoopReport)
    assert_type(rampde_fx.check(Flow(), y, t).best(error=1e-2), rampde_fx.PrecisionPolicy)
except errors.RampdeError as error:
    print(error.where)
policy: rampde_fx.PrecisionPolicy | None = rampde_fx.policy_of(Flow())
"""


def checked(folder, source):
    (folder / "user.py").write_text(source)
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", str(folder / "user.py")]
    env = {**os.environ, "MYPYPATH": str(ROOT)}  # an editable install is not seen
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)


def test_a_users_script_passes_strictly(tmp_path):
    done = checked(tmp_path, USER)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_wrong_call_is_an_error_of_types(tmp_path):
    done = checked(tmp_path, USER.replace("rampde_fx.odeint(rate, y, t,", "rampde_fx.odeint(pair, y, t,"))
    assert done.returncode == 1 and "[arg-type]" in done.stdout, done.stdout + done.stderr
