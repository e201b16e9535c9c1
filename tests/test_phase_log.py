"""What a compilation says at INFO: a line for each loop and phase."""

import logging
import re

import pytest
import torch

import rampde_fx

Y, T = torch.linspace(-1, 1, 12).view(3, 4), torch.linspace(0, 1, 9)
OURS = {"backend": "rampde_fx", "options": {"compiler": "aot_eager"}, "fullgraph": True}
PHASES = ["captured in # s", "rewritten (bfloat16) in # s", "compiling by aot_eager", "done in # s"]


def euler(y, t):
    for _, dt in rampde_fx.steps(t):
        y = y + dt * torch.tanh(y)
    return y


def euler_twice(y, t):
    return euler(euler(y, t).sin(), t)


def solved(y, t):
    return rampde_fx.odeint(lambda t, y: torch.tanh(y), y, t, method="rk4")[-1]


def adaptive(y, t):
    return rampde_fx.odeint(lambda t, y: torch.tanh(y), y, t, rtol=1e-2, atol=1e-2)[-1]


def lines_of(function, caplog, level):
    torch._dynamo.reset()
    with caplog.at_level(level, logger="rampde_fx"):
        torch.compile(rampde_fx.mixed_precision(function, dtype=torch.bfloat16), **OURS)(Y, T)
    return [record.getMessage() for record in caplog.records if record.name.startswith("rampde_fx")]


def told_by(caplog):
    """What follows the loop's name, line by line."""
    names = [record for record in caplog.records if record.name.startswith("rampde_fx")]
    return [record.getMessage().partition(": ")[2] for record in names]


@pytest.mark.parametrize(("function", "loops"), [(euler, 1), (euler_twice, 2), (solved, 1)])
def test_a_line_for_each_loop_and_phase(function, loops, caplog):
    lines = lines_of(function, caplog, logging.INFO)
    told = [re.sub(r"\d+\.\d\d", "#", line.partition(": ")[2]) for line in lines]
    assert sorted(told) == sorted(PHASES * loops)
    assert told.index("captured in # s") < told.index(PHASES[1]) < told.index(PHASES[2]) < told.index(PHASES[3])
    assert all(re.match(r"loop at .*test_phase_log\.py:\d+", line) for line in lines)


def test_a_search_and_its_steps_are_loops(caplog):
    lines = lines_of(adaptive, caplog, logging.INFO)
    for phase in ("rewritten", "compiling", "done in"):
        assert sum(phase in line for line in lines) == 2
    assert any("captured in" in line for line in lines)


@pytest.mark.inductor
def test_inductor_tells_of_the_forward_and_of_the_backward(caplog):
    function = torch.compile(rampde_fx.mixed_precision(euler, dtype=torch.bfloat16), backend="rampde_fx")
    with caplog.at_level(logging.INFO, logger="rampde_fx"):
        loss = function(Y.clone().requires_grad_(), T).sum()
        of_forward = told_by(caplog)
        loss.backward()
    of_backward = told_by(caplog)[len(of_forward) :]
    for direction, told in (("forward", of_forward), ("backward", of_backward)):
        begun, done = (line for line in told if line.startswith(direction))
        assert begun == f"{direction}: Inductor writes kernels and compiles them"
        assert re.fullmatch(direction + r": [1-9]\d* kernels, compiled in \d+\.\d\d s", done)


def test_it_is_silent_by_default(caplog):
    assert lines_of(euler, caplog, logging.WARNING) == []
