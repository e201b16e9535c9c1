"""A velocity of odeint that does something else in its second step is refused, one that does the same is right."""

import copy

import pytest
import torch
from torch import nn

import rampde_fx
from rampde_fx.errors import CounterError, UnsupportedLoopError

OURS = {"backend": "rampde_fx", "options": {"compiler": "aot_eager"}}
Y, T = torch.linspace(-1, 1, 12, dtype=torch.float64).view(4, 3), torch.linspace(0, 1, 5, dtype=torch.float64)


class Solve(nn.Module):
    """An odeint of an evaluation f(y, kept), kept being made anew in every call of the model."""

    def __init__(self, velocity, make=lambda: None):
        super().__init__()
        self.norm = nn.BatchNorm1d(3, dtype=torch.float64)
        self.linear = nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3, dtype=torch.float64))
        self.f, self.make = velocity, make

    def forward(self, y, t):
        kept = self.make()
        return rampde_fx.odeint(lambda s, y: self.f(self, y, kept), y, t, method="heun2")[-1]


def cached(self, y, kept):
    if not kept:
        kept.append(y.detach())
    return -y * kept[0]


def marked_in_a_dictionary(self, y, kept):
    if "known" in kept:
        return -y
    kept["known"] = True
    return -2 * y


def flagged(self, y, kept):
    factor = 2.0 if kept else 1.0
    kept.append(True)
    return -y * factor


def counted(self, y, kept):
    kept[0] += 1
    return -y * kept[0]


KEPT = {
    "a tensor that is made at the first call": Solve(cached, list),
    "an iterator": Solve(lambda self, y, kept: -y * next(kept), lambda: iter(range(99))),
    "a list that is used up": Solve(lambda self, y, kept: -y * kept.pop(0), lambda: list(range(99))),
    "a list that grows": Solve(flagged, list),
    "an entry of a dictionary": Solve(marked_in_a_dictionary, dict),
    "a number in a list": Solve(counted, lambda: [0]),
}


@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.parametrize("name", KEPT)
def test_what_a_velocity_keeps_in_python_is_refused(name, fullgraph):
    model = rampde_fx.mixed_precision(KEPT[name], dtype=torch.float64)
    with pytest.raises((CounterError, UnsupportedLoopError)) as caught:
        torch.compile(model, fullgraph=fullgraph, **OURS)(Y, T)
    assert "test_repetition.py" in str(caught.value)


SAME = {
    "a function of y": Solve(lambda self, y, kept: -torch.tanh(y)),
    "running statistics": Solve(lambda self, y, kept: -torch.tanh(self.norm(y))),
    "the vectors of a spectral norm": Solve(lambda self, y, kept: -torch.tanh(self.linear(y))),
    "what it reads alone": Solve(lambda self, y, kept: -torch.tanh(y) * kept[0], lambda: [2.0]),
    "a size": Solve(lambda self, y, kept: -torch.tanh(y) / y.shape[0]),
}


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("name", SAME)
def test_near_misses_are_right(name, dynamic):
    model = copy.deepcopy(SAME[name])
    plain = copy.deepcopy(model)
    run = torch.compile(rampde_fx.mixed_precision(model, dtype=torch.float64), dynamic=dynamic, **OURS)
    for rows in (4, 3, 2):
        torch.testing.assert_close(run(Y[:rows], T), plain(Y[:rows], T))
    for got, wanted in zip(model.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(got, wanted)
