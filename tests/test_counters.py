"""Numbers that a loop changes in Python: refused by name where one step stands for all, right or refused elsewhere."""

from typing import ClassVar

import pytest
import torch
from torch import nn

import rampde_fx
from rampde_fx.errors import CounterError, UnsupportedLoopError
from tests.comparison import relative_errors

Y, T = torch.linspace(-1, 1, 12).view(4, 3), torch.linspace(0, 1, 4)
W = torch.eye(3) - 0.4
OURS = {"backend": "rampde_fx", "options": {"compiler": "aot_eager"}}
evaluations = 0


class Plain:
    nfe = 0


class Solve(nn.Module):
    """An odeint whose velocity keeps something in Python; subclasses say what."""

    arguments: ClassVar = {"method": "midpoint"}

    def __init__(self):
        super().__init__()
        self.nfe, self.inner, self.plain, self.counts, self.rows = 0, nn.Module(), Plain(), [0, 7], 0
        self.inner.nfe, self.table = 0, {"n": 0}

    def keep(self, y):
        pass

    def velocity(self, t, y):
        self.keep(y)
        return torch.tanh(y @ W)

    def forward(self, y, t):
        return rampde_fx.odeint(self.velocity, y, t, **self.arguments)[-1]


class Attribute(Solve):
    def keep(self, y):
        self.nfe += 1


class OfOneStage(Attribute):
    arguments: ClassVar = {"method": "euler"}


class Adaptive(Attribute):
    arguments: ClassVar = {"method": "bosh3", "rtol": 1e-2, "atol": 1e-2}


class SetToZeroInForward(Attribute):
    def forward(self, y, t):
        self.nfe = 0
        return super().forward(y, t)


class OfASubmodule(Solve):
    def keep(self, y):
        self.inner.nfe += 1


class OfAPlainObject(Solve):
    def keep(self, y):
        self.plain.nfe += 1


class InAList(Solve):
    def keep(self, y):
        self.counts[0] += 1


class InADictionary(Solve):
    def keep(self, y):
        self.table["n"] += 1


class OfForward(Solve):
    """A variable of forward, which the velocity changes."""

    def forward(self, y, t):
        calls = 0

        def velocity(t, y):
            nonlocal calls
            calls += 1
            return torch.tanh(y @ W)

        return rampde_fx.odeint(velocity, y, t, method="midpoint")[-1]


class InAListOfForward(Solve):
    def forward(self, y, t):
        calls = [0]

        def velocity(t, y):
            calls[0] += 1
            return torch.tanh(y @ W)

        return rampde_fx.odeint(velocity, y, t, method="midpoint")[-1] * calls[0]


class Global(Solve):
    def keep(self, y):
        global evaluations  # noqa: PLW0603
        evaluations += 1


class Steps(Attribute):
    def forward(self, y, t):
        for t_i, dt in rampde_fx.steps(t):
            y = y + dt * self.velocity(t_i, y)
        return y


COUNTERS = {
    Attribute: "nfe",
    OfOneStage: "nfe",
    Adaptive: "nfe",
    SetToZeroInForward: "nfe",
    OfASubmodule: "nfe",
    OfAPlainObject: "nfe",
    InAList: r"'self\.counts\[0\]'",
    InADictionary: r"self\.table\['n'\]",
    OfForward: "'calls'",
    InAListOfForward: r"'calls\[0\]'",
    Global: "evaluations",
    Steps: "nfe",
}


@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.parametrize("form", COUNTERS)
def test_a_counter_is_refused_by_its_name(form, fullgraph):
    function = torch.compile(rampde_fx.mixed_precision(form(), dtype=torch.float16), fullgraph=fullgraph, **OURS)
    for _ in range(2):
        with pytest.raises(CounterError, match=COUNTERS[form]) as raised:
            function(Y, T)
    assert "test_counters.py" in str(raised.value)


# Near misses: what is kept counts nothing, and the model is right in mixed precision.


class Rows(Solve):
    def keep(self, y):
        self.rows = y.shape[0]


class ReadsAList(Solve):
    def velocity(self, t, y):
        return torch.tanh(y @ W) * (self.counts[1] / 7)


class CountsCalls(Solve):
    def forward(self, y, t):
        self.plain.nfe += 1
        return super().forward(y, t)


class StepsCountedFromZero(Steps):
    def forward(self, y, t):
        self.nfe = 0
        return super().forward(y, t)


class StepsOfAPlainObject(Steps):
    def keep(self, y):
        self.plain.nfe += 1


@pytest.mark.parametrize("form", [Solve, Rows, ReadsAList, CountsCalls, StepsCountedFromZero, StepsOfAPlainObject])
def test_what_is_no_counter(form):
    model, plain = form(), form()
    function = torch.compile(rampde_fx.mixed_precision(model, dtype=torch.float16), **OURS)
    for calls in range(1, 5):
        got, wanted = function(Y, T), plain(Y, T)
        assert 1e-6 < relative_errors([got], [wanted])[0] < 2.5e-3, calls
    assert [model.nfe, model.plain.nfe, model.rows] == [plain.nfe, plain.plain.nfe, plain.rows]


def test_a_loop_without_a_policy_is_told_that_first():
    with pytest.raises(UnsupportedLoopError, match="outside of any mixed_precision target"):
        torch.compile(Attribute(), **OURS)(Y, T)
