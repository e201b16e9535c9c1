"""What a function of the user's reads beside its arguments, as far as attributes, names and containers lead to it.

From a Module, a method, a function, a partial or a callable object: what its closure, its defaults and the globals that
its code names hold, what is in containers of these, the attributes of objects, slots included, and of their classes,
and what the methods and properties of these read. Left out is what modules of Python hold, but for what code of the
user's names there, and what the objects of installed packages do, Modules apart.

Code of the user's is not run: what an object says of itself is not asked for.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import sys
import weakref
from collections import OrderedDict, UserDict, UserList, deque
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from itertools import islice
from types import (
    CellType,
    CodeType,
    FunctionType,
    MappingProxyType,
    MemberDescriptorType,
    MethodType,
    ModuleType,
    SimpleNamespace,
)
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from rampde_fx.small_tensors import small

MOST_ENTRIES, MOST = 1_000, 10_000  # of a container, and in all: behind these modules alone are looked for
FOREIGN = {"torch", "rampde_fx"} | sys.stdlib_module_names - {"__main__"}
INSTALLED = ("site-packages", "dist-packages")
# Classes of Python's library whose attributes are looked into all the same.
OF_OTHERS = (
    *(SimpleNamespace, argparse.Namespace, UserDict, UserList),
    *(weakref.WeakKeyDictionary, weakref.WeakValueDictionary, weakref.WeakSet),
)
SEQUENCES = (list, tuple, deque, set, frozenset)
CACHED = type(functools.lru_cache(len))
LEAVES = (int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
OF_ALL_MODULES = vars(nn.Module()).keys()  # registers of parameters, buffers, modules and hooks
HOOKS = ("_forward_hooks", "_forward_pre_hooks")
UNSET = object()


class Slot(NamedTuple):
    """A name to which a function leads, and which may be bound anew: what stands there, and what binds it.

    Attributes:
        read: Gives what it is bound to, UNSET where it is to nothing.
        bind: Binds it, to nothing if to UNSET.
    """

    read: Callable[[], Any]
    bind: Callable[[Any], None]

    def put_back(self, value: Any) -> None:
        """Bind it to what it was bound to."""
        if self.read() is not value:
            self.bind(value)


class Reached(NamedTuple):
    """What is reached, with a name as the user would write it.

    Attributes:
        modules: The modules, with those inside.
        tensors: The tensors that are no parameter or buffer of one.
        objects: The objects of the user's own classes, and functions, that have attributes of their own.
        containers: The lists, deques, sets and dicts.
        slots: Globals, variables of enclosing functions, attributes in slots and of classes.
        others: Objects of Python's library and of installed packages, which are not looked into.
    """

    modules: list[tuple[nn.Module, str]]
    tensors: list[tuple[torch.Tensor, str]]
    objects: list[tuple[Any, str]]
    containers: list[Any]
    slots: list[Slot]
    others: list[Any]

    def parameters(self) -> list[nn.Parameter]:
        """The parameters of the modules that have a shape; TorchScript keeps its own elsewhere."""
        registers = [module._parameters for module, _ in self.modules if isinstance(module._parameters, dict)]
        return [p for register in registers for p in register.values() if p is not None and not is_lazy(p)]

    def statistics(self) -> list[torch.Tensor]:
        """Of the tensors, and of parameters that need no gradient, those that may be some: as many as cost little."""
        return [*small([tensor for tensor, _ in self.tensors]), *small(self.parameters())]


def reached(function: Any) -> Reached:
    """What a function, or a Module, reads beside its arguments."""
    search = _Search()
    pending, seen = deque([("", function)]), dict[int, Any]()
    count = 0
    while pending:
        name, value = pending.popleft()
        is_module = _is(value, nn.Module)  # which are looked into in any number
        if id(value) in seen or (count >= MOST and not is_module):
            continue
        seen[id(value)] = value  # held, so that its identity is its own
        with contextlib.suppress(Exception):  # what an object of the user's raises where it is looked into
            for key, held in search.inside(name, value):
                count += not is_module
                if not _is(held, LEAVES):
                    pending.append((key, held))
    return search.found


def attributes_of(owner: Any) -> dict[str, Any]:
    """The attributes that an object holds itself; empty where it holds none."""
    held = owner.__dict__ if _has_attributes(type(owner)) else {}
    return held if type(held) is dict else {}


def base_of(container: Any) -> Any:
    """The class of Python's own whose methods read and change a container, as no override of the user's does."""
    return next(kind for kind in (OrderedDict, dict, list, deque, set) if _is(container, kind))


def slot_in(held: dict[Any, Any], key: Any) -> Slot:
    """An entry of a dict."""

    def bind(value: Any) -> None:
        if value is UNSET:
            held.pop(key, None)
        else:
            held[key] = value

    return Slot(lambda: held.get(key, UNSET), bind)


Held = Iterator[tuple[str, Any]]  # what something holds, with the names of it


class _Search:
    """What was found so far, and what of classes waits for code that names it."""

    def __init__(self) -> None:
        self.found = Reached([], [], [], [], [], [])
        self.named = {"forward", "__call__"}
        self.waiting: dict[str, list[Callable[[str], Held]]] = {}

    def inside(self, name: str, value: Any) -> Held:
        """Note a value, and give what it holds."""
        found = self.found
        if _is(value, (list, deque, set, dict)):
            found.containers.append(value)
        if _is(value, torch.Tensor):
            found.tensors.append((value, name))
        elif _is(value, nn.Module):
            found.modules.append((value, name))
            yield from ((_joined(name, key), module) for key, module in value._modules.items())
            yield from ((_joined(name, key), held) for key, held in vars(value).items() if key not in OF_ALL_MODULES)
            yield from ((name, hook) for hooks in HOOKS for hook in vars(value).get(hooks, {}).values())
            yield from self._of_classes(name, value)
        elif _is(value, SEQUENCES):
            kind = next(kind for kind in SEQUENCES if _is(value, kind))
            yield from ((f"{name}[{i}]", held) for i, held in enumerate(islice(kind.__iter__(value), MOST_ENTRIES)))
        elif _is(value, (dict, MappingProxyType)):
            items = value.items() if _is(value, MappingProxyType) else base_of(value).items(value)
            yield from ((f"{name}[{_named(key)}]", held) for key, held in islice(items, MOST_ENTRIES))
        elif _is(value, MethodType):
            yield from ((name, value.__self__), (name, value.__func__))
        elif _is(value, partial):
            yield from ((name, held) for held in (value.func, *value.args, *value.keywords.values()))
        elif _is(value, FunctionType):
            if _is_own(value.__module__):
                found.objects.append((value, name))
            yield from self._of_code(value)
        elif _is(value, CACHED):
            yield from ((name, held) for held in gc.get_referents(value))
        elif _is(value, type) and _is_of_user(value):
            yield from self._as_named(vars(value), partial(self._of_member, value))
        elif _is(value, ModuleType) and _is_own(value.__name__):
            yield from self._as_named(value.__dict__, partial(self._of_name, value.__dict__))
        if not _is(value, (nn.Module, type)) and (_is_own(type(value).__module__) or _is(value, OF_OTHERS)):
            if _has_attributes(type(value)):
                found.objects.append((value, name))
            yield from ((_joined(name, key), held) for key, held in attributes_of(value).items())
            yield from self._of_classes(name, value)
        elif not _is(value, (nn.Module, type, torch.Tensor, FunctionType, ModuleType)):
            found.others.append(value)

    def _of_classes(self, name: str, value: Any) -> Held:
        """What an object holds in slots, and its classes."""
        for owner in filter(_is_of_user, type(value).__mro__):
            yield owner.__name__, owner
            for key, held in vars(owner).items():
                if _is(held, MemberDescriptorType):
                    yield _joined(name, key), self._noted(_in_slot(held, value))

    def _as_named(self, held: Mapping[str, Any], look: Callable[[str], Held]) -> Held:
        """What is looked up by a name, as far as code has it; the rest waits for such code."""
        for name in list(held):
            if name in self.named:
                yield from look(name)
            else:
                self.waiting.setdefault(name, []).append(look)

    def _of_member(self, owner: type, key: str) -> Held:
        """What a class of the user's has under a name, and what it reads."""
        held, name = vars(owner)[key], f"{owner.__name__}.{key}"
        if _is(held, property):
            yield from ((name, part) for part in (held.fget, held.fset, held.fdel))
        elif _is(held, (staticmethod, classmethod)):
            yield name, held.__func__
        elif _is(held, functools.cached_property):
            yield name, held.func
        elif _is(held, FunctionType):
            yield name, held
        elif not _is(held, MemberDescriptorType):
            yield name, self._noted(_of_owner(owner, key))

    def _of_code(self, function: FunctionType) -> Held:
        """What a function of the user's reads by name."""
        if (inner := getattr(function, "__wrapped__", None)) is not None:
            yield "", inner
        if not _is_own(function.__module__):
            return
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            yield name, self._noted(_in_cell(cell))
        yield from (function.__kwdefaults__ or {}).items()
        names = function.__code__.co_varnames[: function.__code__.co_argcount]
        defaults = function.__defaults__ or ()
        yield from zip(names[len(names) - len(defaults) :], defaults, strict=True)
        for name in dict.fromkeys(_names(function.__code__)):
            if name in function.__globals__:
                yield from self._of_name(function.__globals__, name)
            self.named.add(name)
            for look in self.waiting.pop(name, ()):
                yield from look(name)

    def _of_name(self, namespace: dict[str, Any], name: str) -> Held:
        yield name, self._noted(slot_in(namespace, name))

    def _noted(self, slot: Slot) -> Any:
        self.found.slots.append(slot)
        return slot.read()


def _names(code: CodeType) -> Iterator[str]:
    """The names that code, and the functions in it, may read of globals."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _in_cell(cell: CellType) -> Slot:
    def read() -> Any:
        try:
            return cell.cell_contents
        except ValueError:  # a name that is not assigned yet
            return UNSET

    def bind(value: Any) -> None:
        if value is UNSET:
            del cell.cell_contents
        else:
            cell.cell_contents = value

    return Slot(read, bind)


def _in_slot(descriptor: MemberDescriptorType, owner: Any) -> Slot:
    def read() -> Any:
        try:
            return descriptor.__get__(owner, type(owner))
        except AttributeError:
            return UNSET

    def bind(value: Any) -> None:
        if value is UNSET:
            descriptor.__delete__(owner)
        else:
            descriptor.__set__(owner, value)

    return Slot(read, bind)


def _of_owner(owner: type, key: str) -> Slot:
    def bind(value: Any) -> None:
        if value is UNSET:
            type.__delattr__(owner, key)
        else:
            type.__setattr__(owner, key, value)

    return Slot(lambda: vars(owner).get(key, UNSET), bind)


def _is_of_user(owner: type) -> bool:
    return _is_own(owner.__module__)


def _is(value: Any, kinds: Any) -> bool:
    """As isinstance, by the class that a value has, not by the one that it says it has."""
    return issubclass(type(value), kinds)


def _has_attributes(kind: type) -> bool:
    """Whether objects of a class have attributes of their own, which no property of the user's stands for."""
    found = next((vars(owner)["__dict__"] for owner in kind.__mro__ if "__dict__" in vars(owner)), None)
    return found is not None and not _is(found, property)


def _joined(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key


def _named(key: Any) -> str:
    return repr(key[:80]) if isinstance(key, str) else str(key) if isinstance(key, int) else type(key).__name__


@cache
def _is_own(module: str | None) -> bool:
    """Whether a module of Python is the user's."""
    file = getattr(sys.modules.get(module or ""), "__file__", None) or ""
    return (module or "").partition(".")[0] not in FOREIGN and not any(folder in file for folder in INSTALLED)
