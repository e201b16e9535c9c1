"""What a function leads to by names, attributes and containers, whatever stands there."""

import array
import functools
import random
import weakref
from collections import Counter, OrderedDict, UserDict, UserList, defaultdict, deque
from dataclasses import dataclass
from types import MappingProxyType, SimpleNamespace
from unittest import mock

import numpy
import pytest
import torch
from torch import nn

from rampde_fx.reach import MOST, reached
from rampde_fx.runtime.random_state import kept_random_state
from rampde_fx.small_tensors import MOST_OF_SMALL, MOST_SMALL, small
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


class NoHash(type):
    def __hash__(cls):
        raise RuntimeError("no hash")


class OfNoHash(metaclass=NoHash):
    pass


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
    "a class without a hash": OfNoHash,
    "what says that it is a Module": lambda: mock.Mock(spec=nn.Module),
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
    assert {(holder.before, "before"), (holder.behind, "behind")} <= set(found.modules)
    with untouched(holder):
        holder.value = None
    assert holder.value is not None


def test_names_are_those_of_the_user():
    model, tensor = nn.Sequential(nn.Linear(1, 1)), torch.ones(1)
    held = {"a": [model, SimpleNamespace(scale=tensor)]}
    found = reached(lambda t, y: held["a"][0](y))
    assert found.modules == [(model, "held['a'][0]"), (model[0], "held['a'][0].0")]
    assert [name for _, name in found.tensors] == ["held['a'][1].scale"]


class Read(list):
    def __iter__(self):
        raise AssertionError("code of the user's runs")


def test_of_what_is_large_a_part_is_read():
    holder = Holder(Read(Read(map(float, range(1000))) for _ in range(1000)))
    found = reached(holder)
    assert (holder.before, "before") in found.modules
    assert 2 < sum(type(held) is Read for held in found.containers) <= MOST / 1000 + 1


class Slotted:
    __slots__ = ("held",)

    def __init__(self, held):
        self.held = held


@dataclass(frozen=True, slots=True)
class Frozen:
    held: object


class OwnList(list):
    pass


class Equal(nn.Linear):
    """Modules that are equal all of them."""

    def __eq__(self, other):
        return True

    def __hash__(self):
        return 1


def of_class(model):
    class Solver:
        inner = model

        def __call__(self, t, y):
            return self.inner(y)

    return Solver()


def of_helper(model):
    class Solver(nn.Module):
        def forward(self, t, y):
            return self.rate(y)

        def rate(self, y):
            return model(y)

    return Solver()


def of_property(model):
    class Solver:
        def __call__(self, t, y):
            return self.rate(y)

        @property
        def rate(self):
            return model

    return Solver()


def of_hook(model):
    layer = nn.Linear(1, 1)
    layer.register_forward_hook(lambda module, args, result: model(result))
    return layer


def of_cached(model):
    @functools.lru_cache
    def built():
        return model

    built()
    return lambda t, y: built()(y)


def of_equal(model):
    return nn.ModuleList([Equal(1, 1), model])


WAYS = {
    "a slot": lambda model: Holder(Slotted(model)),
    "a frozen dataclass": lambda model: Holder(Frozen(model)),
    "a deque": lambda model: Holder(deque([model])),
    "a list of the user's": lambda model: Holder(OwnList([model])),
    "a UserDict": lambda model: Holder(UserDict(a=model)),
    "a proxy of a dict": lambda model: Holder(MappingProxyType({"a": model})),
    "a class": of_class,
    "a helper method": of_helper,
    "a property": of_property,
    "a hook": of_hook,
    "a cache": of_cached,
    "what is equal to another": of_equal,
}


@pytest.mark.parametrize("way", WAYS)
def test_ways_to_a_module(way):
    model = Equal(1, 1) if way == "what is equal to another" else nn.Linear(1, 1)
    assert any(module is model for module, _ in reached(WAYS[way](model)).modules)


def test_methods_that_no_code_names_lead_nowhere():
    class Solver(nn.Module):
        data = torch.ones(3)

        def forward(self, t, y):
            return -y

        def evaluate(self):
            return KEPT(self.data)

    found = reached(Solver())
    assert [name for _, name in found.modules] == [""] and not found.tensors


COUNT = 0


def counts_in_a_global():
    def func():
        global COUNT  # noqa: PLW0603
        COUNT += 1

    return func, lambda: COUNT


def counts_in_a_variable():
    count = 0

    def func():
        nonlocal count
        count += 1

    return func, lambda: count


def makes_a_variable():
    made: int

    def func():
        nonlocal made
        made = 1

    return func, lambda: "empty" in repr(func.__closure__[0])


def counts_in_a_class():
    class Solver:
        count = 0

        def __call__(self):
            type(self).count += 1

    return Solver(), lambda: Solver.count


def counts_in_a_slot():
    slotted = Slotted(0)

    def func():
        slotted.held += 1

    return func, lambda: slotted.held


def makes_a_slot():
    slotted = Slotted.__new__(Slotted)

    def func():
        slotted.held = 1

    return func, lambda: hasattr(slotted, "held")


class Weak:
    """May be referred to weakly."""


def changes(value, act, read):
    return lambda: ((lambda: act(value)), lambda: read(value))


def weak_keys():
    held, key = weakref.WeakKeyDictionary(), Weak()
    held[key] = 0

    def func():
        held[key] += 1

    return func, lambda: (held[key], len(held))


def grows(container, add):
    return lambda: ((lambda: add(container)), lambda: list(container))


def hook_that_goes():
    held = torch.zeros(2, requires_grad=True)
    handle = held.register_hook(lambda gradient: 2 * gradient)

    def state():
        (gradient,) = torch.autograd.grad(held.sum(), held)
        return gradient.tolist()

    return lambda: held is not None and handle.remove(), state


CHANGES = {
    "a global": counts_in_a_global,
    "a variable": counts_in_a_variable,
    "a variable that is made": makes_a_variable,
    "a class": counts_in_a_class,
    "a slot": counts_in_a_slot,
    "a slot that is made": makes_a_slot,
    "a deque": grows(deque([1, 2], maxlen=2), lambda held: held.append(3)),
    "a list of the user's": grows(OwnList([1]), lambda held: held.append(3)),
    "a UserList": grows(UserList([1]), lambda held: held.append(3)),
    "a UserDict": grows(UserDict(a=1), lambda held: held.update(b=2)),
    "a defaultdict": grows(defaultdict(int, a=1), lambda held: held["b"]),
    "a Counter": grows(Counter("ab"), lambda held: held.update("c")),
    "an order": grows(OrderedDict(a=1, b=2), lambda held: held.move_to_end("a")),
    "a set": grows({1}, lambda held: held.add(2)),
    "weak keys": weak_keys,
    "bytes": grows(bytearray(b"a"), lambda held: held.append(1)),
    "an array of Python's": grows(array.array("d", [1.0]), lambda held: held.append(2.0)),
    "an array of numpy": grows(numpy.zeros(2), lambda held: held.__setitem__(0, 1.0)),
    "a tensor": changes(torch.zeros(2), lambda held: held.add_(1), torch.Tensor.tolist),
    "a tensor, by data": changes(torch.zeros(2), lambda held: held.data.add_(1), torch.Tensor.tolist),
    "an expanded tensor of NaN": changes(
        [torch.full((1, 2), float("nan")).expand(3, 2), torch.zeros(2, dtype=torch.uint8).view(torch.bits8)],
        lambda held: held.append(1),
        len,
    ),
    "an array that is frozen": changes(
        [numpy.zeros(2)], lambda held: held[0].setflags(write=False) or held.append(1), len
    ),
    "an attribute of a tensor": changes(
        torch.zeros(2), lambda held: setattr(held, "calls", 1), lambda held: vars(held).copy()
    ),
    "a hook of a tensor": changes(
        torch.zeros(2, requires_grad=True),
        lambda held: held.register_hook(lambda gradient: gradient),
        lambda held: list(held._backward_hooks or ()),
    ),
    "a hook that is taken away": hook_that_goes,
    "a hook behind a sum": changes(
        torch.zeros(2, requires_grad=True),
        lambda held: held.register_post_accumulate_grad_hook(lambda parameter: None),
        lambda held: list(held._post_accumulate_grad_hooks or ()),
    ),
    "a graph": changes(
        torch.zeros(2), lambda held: held.add_(torch.ones(2, requires_grad=True)), lambda held: held.grad_fn
    ),
    "what needs a gradient": changes(
        torch.zeros(2), lambda held: held.requires_grad_(True), lambda held: held.requires_grad
    ),
    "which buffers are saved": changes(
        nn.BatchNorm1d(2),
        lambda held: held.register_buffer("running_mean", held.running_mean, persistent=False),
        lambda held: [*held.state_dict()],
    ),
    "torch's generator": changes(
        torch.Generator(), lambda held: torch.rand(1, generator=held), lambda held: held.get_state().tolist()
    ),
    "Python's generator": changes(random.Random(0), random.Random.random, random.Random.getstate),
    "numpy's generator": changes(
        numpy.random.default_rng(0), lambda held: held.random(), lambda held: str(held.bit_generator.state)
    ),
    "numpy's old generator": changes(
        numpy.random.RandomState(0), lambda held: held.rand(), lambda held: str(held.get_state())
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_a_function_changes_is_put_back(change):
    func, state = CHANGES[change]()
    before = state()
    with untouched(func):
        func()
        assert state() != before
    assert state() == before


class Key:
    """Hashes by its value."""

    def __init__(self, value):
        self.value = value

    def __hash__(self):
        return hash(self.value)

    def __eq__(self, other):
        return self.value == other.value


def test_keys_that_change_in_the_run_find_their_values():
    keys = [Key(1), Key(2)]
    held = {keys[0]: 1.0, keys[1]: 2.0}

    def func():
        keys[0].value = 2
        held[keys[0]] = 3.0

    with untouched(func):
        func()
    assert [key.value for key in keys] == [1, 2] and [held[key] for key in keys] == [1.0, 2.0]


FAILING = []


class Unhashed:
    def __hash__(self):
        if FAILING:
            raise RuntimeError("no hash")
        return 1


def test_what_cannot_be_put_back_hides_nothing_else():
    first, other, last = {Unhashed()}, [1], {1}
    try:
        with pytest.raises(RuntimeError, match="no hash"), untouched(lambda: (first, other, last)):
            other.append(2)
            last.add(2)
            FAILING.append(True)
    finally:
        FAILING.clear()
    assert other == [1] and last == {1}


def test_values_of_buffers_gradients_and_hooks_are_put_back():
    """Code of the user's may run outside of what is captured."""
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    model[0].weight.grad = gradient = torch.ones(2, 2)

    def func():
        model(torch.randn(5, 2))
        model[0].weight.grad = None
        model[0].bias.requires_grad_(False)
        model[0].register_forward_hook(lambda *_: None)
        func.calls = 1

    before = {name: value.clone() for name, value in model.named_buffers()}
    with untouched(func):
        func()
        assert not torch.equal(model[1].running_mean, before["1.running_mean"])
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())
    assert model[0].weight.grad is gradient and model[0].bias.requires_grad
    assert not model[0]._forward_hooks and not hasattr(func, "calls")


def test_of_many_tensors_tiny_ones_are_found_first():
    large, count = [torch.ones(256, 256) for _ in range(6)], torch.zeros(())
    found = small([*large, torch.ones(300, 300), *(torch.ones(2) for _ in range(10)), count])
    assert any(tensor is count for tensor in found) and sum(tensor.numel() for tensor in found) <= MOST_OF_SMALL
    assert len(found) > 10
    assert len(small([torch.ones(()) for _ in range(1000)])) == MOST_SMALL


def test_generators_of_all_are_left_as_they_are():
    def states():
        return torch.get_rng_state().tolist(), random.getstate(), str(numpy.random.get_state())

    before = states()
    with kept_random_state() as drew:
        random.random()
        numpy.random.rand()
        assert not drew()
        torch.rand(1)
        assert drew()
    assert states() == before


def test_attributes_lists_and_dicts_are_put_back():
    holder = Holder({"list": [1], "dict": {"a": 1}})
    with untouched(holder):
        holder.value["list"].append(2)
        holder.value["dict"]["b"] = 2
        holder.new = 1
    assert holder.value == {"list": [1], "dict": {"a": 1}} and not hasattr(holder, "new")


def test_a_broadcast_buffer_is_put_back_whatever_memory_it_was_given():
    model = nn.Module()
    model.register_buffer("level", torch.ones(1).expand(2))
    model.register_buffer("mean", torch.ones(2))
    for change in (lambda: model.level[0].add_(1), lambda: setattr(model.level, "data", model.level * 1.1)):
        with untouched(model):
            change()
            model.mean.data = torch.zeros(1).expand(2)
        assert model.level.tolist() == [1, 1] and model.mean.tolist() == [1, 1]
