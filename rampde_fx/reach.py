"""What a function of the user's reads beside its arguments, as far as attributes, names and containers lead to it.

From a Module, a method, a function, a partial or a callable object: what its closure, its defaults and the globals that
its code names hold, what is in lists, tuples, sets and dicts of these, and the attributes of objects. Left out is what
modules of Python hold, and what the objects of installed packages do, Modules apart.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterator
from functools import cache, partial
from itertools import islice
from types import CodeType, FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import nn

MOST_ENTRIES, MOST = 1_000, 10_000  # of a container, and in all: behind these nothing is looked for
FOREIGN = {"torch", "rampde_fx"} | sys.stdlib_module_names - {"__main__"}
INSTALLED = ("site-packages", "dist-packages")
NAMESPACES = (SimpleNamespace, argparse.Namespace)
CONTAINERS = {list, set, dict, OrderedDict, defaultdict, Counter}
CALL = "__call__"
LEAVES = (int, float, complex, str, bytes, type(None), type, ModuleType, torch.dtype, torch.device)
OF_ALL_MODULES = vars(nn.Module()).keys()  # registers of parameters, buffers, modules and hooks


class Reached(NamedTuple):
    """What is reached, with a name as the user would write it.

    Attributes:
        modules: The modules, with those inside.
        tensors: The tensors that are no parameter or buffer of one.
        objects: The objects of the user's own classes.
        containers: The lists, sets and dicts.
    """

    modules: dict[nn.Module, str]
    tensors: list[tuple[torch.Tensor, str]]
    objects: list[tuple[Any, str]]
    containers: list[Any]


def reached(function: Any) -> Reached:
    """What a function, or a Module, reads beside its arguments."""
    found = Reached({}, [], [], [])
    pending, seen = deque([("", function)]), dict[int, Any]()
    count = 0
    while pending and count < MOST:
        name, value = pending.popleft()
        if id(value) in seen:
            continue
        seen[id(value)] = value  # held, so that its identity is its own
        with contextlib.suppress(Exception):  # what an object of the user's raises where it is looked into
            for key, held in _inside(found, name, value):
                count += not isinstance(value, nn.Module)  # which are looked into in any number
                if not issubclass(type(held), LEAVES):
                    pending.append((key, held))
    return found


def _inside(found: Reached, name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Note a value, and give what it holds."""
    if type(value) in CONTAINERS:
        found.containers.append(value)
    if isinstance(value, torch.Tensor):
        found.tensors.append((value, name))
    elif isinstance(value, nn.Module):
        found.modules[value] = name
        yield from ((_joined(name, key), module) for key, module in value._modules.items())
        yield from ((_joined(name, key), held) for key, held in vars(value).items() if key not in OF_ALL_MODULES)
        yield from _of_code(getattr(type(value), "forward", None))
    elif isinstance(value, (list, tuple, set)):
        yield from ((f"{name}[{i}]", held) for i, held in enumerate(islice(value, MOST_ENTRIES)))
    elif isinstance(value, dict):
        yield from ((f"{name}[{_named(key)}]", held) for key, held in islice(value.items(), MOST_ENTRIES))
    elif isinstance(value, MethodType):
        yield from ((name, value.__self__), (name, value.__func__))
    elif isinstance(value, partial):
        yield from ((name, held) for held in (value.func, *value.args, *value.keywords.values()))
    elif isinstance(value, FunctionType):
        yield from _of_code(value)
    elif isinstance(value, NAMESPACES) or (hasattr(value, "__dict__") and _is_own(type(value).__module__)):
        found.objects.append((value, name))
        yield from ((_joined(name, key), held) for key, held in vars(value).items())
        yield from _of_code(getattr(type(value), CALL, None))


def _joined(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key


def _named(key: Any) -> str:
    return repr(key[:80]) if isinstance(key, str) else str(key) if isinstance(key, int) else type(key).__name__


@cache
def _is_own(module: str | None) -> bool:
    """Whether a module of Python is the user's."""
    file = getattr(sys.modules.get(module or ""), "__file__", None) or ""
    return (module or "").partition(".")[0] not in FOREIGN and not any(folder in file for folder in INSTALLED)


def _of_code(function: Any) -> Iterator[tuple[str, Any]]:
    """What a function of the user's reads by name."""
    if not isinstance(function, FunctionType):
        return
    if (inner := getattr(function, "__wrapped__", None)) is not None:
        yield "", inner
    if not _is_own(function.__module__):
        return
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield name, cell.cell_contents
        except ValueError:  # a name that is not assigned yet
            continue
    yield from (function.__kwdefaults__ or {}).items()
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    defaults = function.__defaults__ or ()
    yield from zip(names[len(names) - len(defaults) :], defaults, strict=True)
    for name in _names(function.__code__):
        if name in function.__globals__:
            yield name, function.__globals__[name]


def _names(code: CodeType) -> Iterator[str]:
    """The names that code, and the functions in it, may read of globals."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
