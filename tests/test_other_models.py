"""What rampde_fx teaches Dynamo for its own loops leaves the capture of other models as it was."""

import json
import os
import subprocess
import sys

import torch
from torch import nn

import rampde_fx
from tests.models import RK4
from tests.sources import ROOT


class Layers(nn.Module):
    """Layers by number, and a count of calls."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        for i, layer in enumerate(self.layers):
            x = layer(x) * (i + 1) if i % 2 else layer(x)
        return x * self.calls


def rows(x):
    out = torch.zeros_like(x)
    for i, row in enumerate(x):
        out[i] = row * i
    return out + x[-1, ..., 0] + x[(0, slice(None))]


def words(x):
    return x * len(f"{x.shape[1]}:{x.dim()}") + int("%d" % x.dim())  # noqa: UP031


def numbers(x):
    quotient, rest = divmod(x.shape[0], 2)
    kept = [x * k for k in range(3) if k != rest and isinstance(k, int)]
    return sum(kept) + quotient + max(rest, 1)


def pairs(x):
    def doubled(values):
        for k, value in enumerate(values, start=1):
            yield k, 2 * value

    return sum(k * value for k, value in zip((3, 2, 1), (v for _, v in doubled(x.unbind(1))), strict=False))


def broken(x):
    n = x.shape[0] + 1
    print(end="")
    return x * n


def failing(x):
    return x[x.shape[0] + 7]


def lists(x):
    kept, names = [x], {}
    while len(kept) < 4:
        kept.append(kept[-1] + len(kept))
        names[len(kept)] = str(len(kept))
    return torch.stack(kept[::-1]) * len("".join(names.values()))


PROGRAMS = [Layers, rows, words, numbers, pairs, broken, failing, lists]


def captured(program, *, fullgraph, dynamic):
    """Graphs, results and the error of a program over some sizes."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    told = []

    def noted(graph_module, inputs):
        told.append(graph_module.code)
        return graph_module.forward

    model = program() if isinstance(program, type) else program
    function = torch.compile(model, backend=noted, fullgraph=fullgraph, dynamic=dynamic)
    for n in (3, 5, 4, 1):
        try:
            told.append(function(torch.randn(n, 4)).tolist())
        except Exception as error:
            told.append(f"{type(error).__name__}: {str(error).splitlines()[0]}")
    return told


def everything():
    cases = [(fullgraph, dynamic) for fullgraph in (True, False) for dynamic in (None, True)]
    return {
        f"{program.__name__} {case}": captured(program, fullgraph=case[0], dynamic=case[1])
        for program in PROGRAMS
        for case in cases
    }


def main():
    step = torch._dynamo.symbolic_convert.InstructionTranslatorBase.step
    before = everything()
    torch._dynamo.reset()
    marked = rampde_fx.mixed_precision(Counting(), dtype=torch.float32)
    function = torch.compile(marked, backend="rampde_fx", options={"compiler": "eager"})
    for n in (8, 12):
        function(torch.randn(3, 5), torch.linspace(0, 1, n + 1))
    taught = torch._dynamo.symbolic_convert.InstructionTranslatorBase.step is not step
    after = everything()
    print(json.dumps({"taught": taught, "different": [name for name in before if before[name] != after[name]]}))
    print(json.dumps({"graphs": sum(isinstance(x, str) and "forward" in x for told in before.values() for x in told)}))


class Counting(RK4):
    """A loop that counts its steps."""

    def forward(self, y, t):
        for i, (t_i, dt) in enumerate(rampde_fx.steps(t)):
            y = y + dt * self.velocity(t_i, y) * t[i]
        return y


def test_ordinary_models_are_captured_as_before():
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", "-m", "tests.test_other_models"]
    output = subprocess.run(command, env=environment, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    compared, counted = map(json.loads, output.splitlines())
    assert compared == {"taught": True, "different": []}
    assert counted["graphs"] > len(PROGRAMS)


if __name__ == "__main__":
    main()
