"""What a function leads to by names, attributes and containers, whatever stands there."""

import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from rampde_fx.reach import MOST, reached
from rampde_fx.validation.untouched import untouched


class Holder:
    def __init__(self, value):
        self.before, self.value, self.behind = nn.Linear(1, 1), value, nn.Linear(1, 1)

    def __call__(self, t, y):
        return -y


class Raising:
    __slots__ = ()

    def __getattr__(self, name):
        raise KeyError(name)


class NoClass:
    @property
    def __class__(self):
        raise RuntimeError("no object")


class NoItems(dict):
    def items(self):
        raise RuntimeError("no items")


class NoText:
    def __repr__(self):
        raise RuntimeError("no text")


def dead():
    return weakref.proxy(nn.Linear(1, 1))


ODD = {
    "a proxy": lambda: weakref.proxy(KEPT),
    "a dead proxy": dead,
    "a __getattr__ that raises": Raising,
    "a __class__ that raises": NoClass,
    "items that raise": lambda: NoItems(a=1),
    "a key without text": lambda: {NoText(): nn.Linear(1, 1)},
    "TorchScript": lambda: torch.jit.trace(nn.Linear(4, 4), torch.ones(4)),
    "itself": SimpleNamespace,
}
KEPT = nn.Linear(1, 1)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("name", ODD)
def test_what_is_odd_hides_nothing_else(name):
    holder = Holder(ODD[name]())
    if name == "itself":
        holder.value.holder = holder
    found = reached(holder)
    assert {holder.before, holder.behind} <= found.modules.keys()
    assert found.modules[holder.behind] == "behind"
    with untouched(holder):
        holder.value = None
    assert holder.value is not None


def test_names_are_those_of_the_user():
    model, tensor = nn.Sequential(nn.Linear(1, 1)), torch.ones(1)
    held = {"a": [model, SimpleNamespace(scale=tensor)]}
    found = reached(lambda t, y: held["a"][0](y))
    assert found.modules == {model: "held['a'][0]", model[0]: "held['a'][0].0"}
    assert [name for _, name in found.tensors] == ["held['a'][1].scale"]


class Read(list):
    """Counts the entries that are read."""

    count = 0

    def __iter__(self):
        for entry in super().__iter__():
            Read.count += 1
            yield entry


def test_of_what_is_large_a_part_is_read():
    Read.count = 0
    holder = Holder(Read(Read(map(float, range(1000))) for _ in range(1000)))
    assert holder.before in reached(holder).modules
    assert 1000 < Read.count < MOST + 2000


def test_attributes_lists_and_dicts_are_put_back():
    holder = Holder({"list": [1], "dict": {"a": 1}})
    with untouched(holder):
        holder.value["list"].append(2)
        holder.value["dict"]["b"] = 2
        holder.new = 1
    assert holder.value == {"list": [1], "dict": {"a": 1}} and not hasattr(holder, "new")
