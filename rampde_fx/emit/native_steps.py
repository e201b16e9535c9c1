"""A step as one function in C++, in what Inductor writes for a CPU.

Inductor calls every kernel and every product from Python. A body of a loop that consists of kernels and products of
matrices is written anew here: one call from Python runs all of it, in memory that one allocation takes.
"""

from __future__ import annotations

import ast
import itertools
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import NamedTuple

from rampde_fx.emit.scratch import ONE, Room, places, room
from rampde_fx.torch_private import low_products, native_library
from rampde_fx.torch_private.wrapper_code import (
    KNOWN,
    Allocate,
    Bind,
    Call,
    Function,
    Host,
    Product,
    Statement,
    UnreadError,
    View,
)


class Kernel(NamedTuple):
    """A product in C++: its numbers, its function, where that is, and whether it takes as its last argument if the
    right factor stays as it is in a loop."""

    number: str
    function: str
    module: ModuleType
    keeps: bool = False


# By their dtype.
PRODUCTS = {
    "torch.float32": Kernel("float", "product<float>", native_library),
    "torch.float64": Kernel("double", "product<double>", native_library),
    "torch.bfloat16": Kernel("at::BFloat16", "low_product", low_products, keeps=True),
}


@dataclass
class Storage:
    """Memory of a parameter or of an allocation.

    Attributes:
        name: Its first name.
        allocation: How it is allocated; None for a parameter.
        uses: The numbers of the statements that use it.
    """

    name: str
    allocation: Allocate | None
    uses: list[int] = field(default_factory=list)

    @property
    def dtype(self) -> str | None:
        """As Python writes it; None for a parameter's."""
        return self.allocation.dtype if self.allocation else None


@dataclass(frozen=True)
class Value:
    """A tensor in a storage, the whole of it or part; the texts of its sizes and strides, if known, and its offset."""

    storage: Storage
    whole: bool
    size: tuple[str, ...] | None
    stride: tuple[str, ...] | None
    offset: str = "0"


class Step:
    """What a function in Python did, as one in C++ and one in Python that calls it.

    Args:
        function: What is read.
        constants: Its parameters that are the same in all steps of a loop.

    Attributes:
        function: What was read.
        name: The name of the one in C++.
        source: It.
        given: The tensors that it takes, by their names in Python.
        numbers: The integers that it takes behind them: expressions in Python, and their names in C++.
        allocations: Statements of Python that make those of its tensors that are no parameters, by their names.
        results: What it returns.
        host: The one in Python.
        lines: Which lines of the module that replaces.

    Raises:
        UnreadError: It cannot be written in C++.
    """

    def __init__(self, function: Function, constants: Collection[str] = ()) -> None:
        self.function, self.name, self.lines = function, f"{function.name}_native", function.lines
        self._constants = constants
        self._values: dict[str, Value] = {}
        self.numbers: dict[str, str] = {}  # in Python, and in C++
        self._integers = {*function.parameters, *function.numbers, *KNOWN}
        for name in function.parameters:
            shape = function.shapes.get(name, View(name))
            self._values[name] = Value(Storage(name, None), True, _texts(shape.size), _texts(shape.stride))
        body = [line for at, statement in enumerate(function.statements) for line in self._write(at, statement)]
        self.results = [self._value(view, len(function.statements)) for view in function.results]
        tensors, inner = self._storages()
        memory, scratch = self._place(inner)
        used = [storage for storage in tensors if storage.uses[0] < len(function.statements)]
        self.given = [*(storage.name for storage in used), *scratch]
        self.allocations = {storage.name: storage.allocation.text for storage in tensors if storage.allocation}
        self.allocations |= scratch
        parameters = [*(f"char* {name}" for name in self.given), *(f"int64_t {name}" for name in self.numbers.values())]
        self.source = "\n    ".join([f"static void {self.name}({', '.join(parameters)}) {{", *memory, *body]) + "\n}"
        self.host = host(
            function.name,
            [statement.text for statement in function.statements if isinstance(statement, Host)],
            [
                *self.allocations.values(),
                f"{self.name}({', '.join([*self.given, *self.numbers])})",
                returned(self.results),
            ],
        )

    def _write(self, at: int, statement: Statement) -> list[str]:
        """A statement in C++."""
        match statement:
            case Allocate(name=name) | Bind(name=name) if name in self._values:
                raise UnreadError(f"another {name}")
            case Allocate(name, size, stride):
                self._values[name] = Value(Storage(name, statement), True, _texts(size), _texts(stride))
            case Bind(name, view):
                self._values[name] = self._value(view)
            case Call(kernel, args):
                pairs = zip(args, kernel.types, strict=True)
                given = [
                    self._pointer(self._value(arg, at), kind) if isinstance(arg, View) else self._number(arg, kind)
                    for arg, kind in pairs
                ]
                return [f"{kernel.name}({', '.join(given)});"]
            case Product(left, right, out, added):
                factors = self._value(left, at), self._value(right, at)
                sums = None if added is None else self._value(added, at)
                return [self._product(*factors, self._value(out, at), sums)]
        return []

    def _value(self, view: View, at: int | None = None) -> Value:
        """What a view is of, used by a statement."""
        if view.name not in self._values:
            raise UnreadError(f"{view.name} is not a tensor")
        value = self._values[view.name]
        if view.offset is not None:
            offsets = [text for text in (value.offset, ast.unparse(view.offset)) if text != "0"]
            offset = offsets[0] if len(offsets) == 1 else " + ".join(f"({text})" for text in offsets) or "0"
            value = Value(value.storage, False, _texts(view.size), _texts(view.stride), offset)
        if at is not None:
            value.storage.uses.append(at)
        return value

    def _pointer(self, value: Value, kind: str) -> str:
        return f"reinterpret_cast<{kind}>({value.storage.name}) + {self._integer(value.offset)}"

    def _number(self, arg: ast.expr, kind: str) -> str:
        if kind.replace("const ", "") != "int64_t":
            raise UnreadError(f"an argument of type {kind}")
        return self._integer(ast.unparse(arg))

    def _integer(self, text: str) -> str:
        """An integer in C++: a constant, or a parameter that Python computes."""
        if re.fullmatch(r"-?\d{1,18}", text):
            return f"{text}L"
        if not {node.id for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Name)} <= self._integers:
            raise UnreadError(f"{text} is not known before the step")
        return self.numbers.setdefault(text, f"number{len(self.numbers)}")

    def _product(self, left: Value, right: Value, out: Value, added: Value | None) -> str:
        """A product of matrices as a call."""
        known = PRODUCTS.get(out.storage.dtype or "")
        if known is None or not known.module.multiplies():
            raise UnreadError("a product that neither BLAS nor oneDNN has")
        if any(value.storage.dtype not in (out.storage.dtype, None) for value in (left, right, added) if value):
            raise UnreadError("a product of numbers of two kinds")
        transposed, leads = zip(*map(self._leading, (left, right, out)), strict=True)
        if transposed[2]:
            raise UnreadError("a product that is written by columns")
        (rows, columns), (_, inner) = out.size or (), left.size or ()
        kinds = f"const {known.number}*", f"const {known.number}*", f"{known.number}*"
        factors = [
            f"{self._pointer(value, kind)}, {self._integer(lead)}"
            for value, lead, kind in zip((left, right, out), leads, kinds, strict=True)
        ]
        sizes = map(self._integer, (rows, columns, inner))
        flags = [str(flag).lower() for flag in transposed[:2]]
        given = [*flags, *sizes, *factors, *self._added(added, rows, columns, kinds[0])]
        if known.keeps:
            given.append(str(right.storage.name in self._constants).lower())
        return f"{known.function}({', '.join(given)});"

    def _added(self, added: Value | None, rows: str, columns: str, kind: str) -> list[str]:
        """What is added to a product, and how far apart its rows and its columns are."""
        if added is None:
            return ["nullptr", "0L", "0L"]
        if not added.size or added.stride is None or len(added.size) > 2:
            raise UnreadError(f"the shape of {added.storage.name}")
        size, stride = (
            (*[filler] * (2 - len(values)), *values) for values, filler in ((added.size, "1"), (added.stride, "0"))
        )
        steps = ["0" if n == "1" else step for n, step in zip(size, stride, strict=True)]
        if any(n not in ("1", whole) for n, whole in zip(size, (rows, columns), strict=True)):
            raise UnreadError(f"the shape of {added.storage.name}")
        return [self._pointer(added, kind), *map(self._integer, steps)]

    def _leading(self, value: Value) -> tuple[bool, str]:
        """Whether a matrix is stored by columns, and how far apart two of these, or of its rows, are."""
        if value.size is None or value.stride is None or len(value.size) != 2:
            raise UnreadError(f"the shape of {value.storage.name}")
        for transposed in (False, True):
            (count, length), (lead, step) = (
                (sizes[::-1] if transposed else sizes) for sizes in (value.size, value.stride)
            )
            if step != "1" and length != "1":
                continue
            if count == "1":
                return transposed, length if length != "0" else "1"
            if lead == length or (lead.isdigit() and length.isdigit() and int(lead) >= int(length) > 0):
                return transposed, lead
        raise UnreadError(f"the strides of {value.storage.name}")

    def _storages(self) -> tuple[list[Storage], list[Storage]]:
        """Those that are tensors in Python, and those that are memory in C++ alone, by their first uses."""
        found = {id(value.storage): value.storage for value in self._values.values() if value.storage.uses}
        kept = {id(result.storage) for result in self.results}
        tensors, inner = list[Storage](), list[Storage]()
        for key, storage in sorted(found.items(), key=lambda item: item[1].uses[0]):
            (tensors if storage.allocation is None or key in kept else inner).append(storage)
        return tensors, inner

    def _place(self, inner: Sequence[Storage]) -> tuple[list[str], dict[str, str]]:
        """Where each storage is, in C++; and statements of Python that allocate what they lie in, by its names."""
        groups: dict[str, list[tuple[Storage, Room]]] = {}
        for storage in inner:
            assert storage.allocation is not None
            needed = room(storage.allocation)
            groups.setdefault(needed.unit, []).append((storage, needed))
        lines, scratch = [], {}
        for i, (unit, group) in enumerate(groups.items()):
            begins, end = places([(needed.count, storage.uses[0], storage.uses[-1]) for storage, needed in group])
            factor = "" if unit == ONE else f" * {self._integer(unit)}"
            lines += [
                f"char* const {storage.name} = scratch{i} + {begin}L{factor};"
                for (storage, _), begin in zip(group, begins, strict=True)
            ]
            count = str(end) if unit == ONE else f"{end} * ({unit})"
            scratch[f"scratch{i}"] = f"scratch{i} = empty_strided_cpu(({count},), (1,), torch.uint8)"
        return lines, scratch


def host(name: str, *texts: Iterable[str]) -> str:
    """A function of args in Python."""
    lines = [line for text in itertools.chain(*texts) for line in text.split("\n")]
    return "\n    ".join([f"def {name}(args):", *lines])


def returned(results: Sequence[Value]) -> str:
    """Give the results."""
    return f"return ({', '.join(map(_result, results))}{',' * bool(results)})"


def _texts(values: Sequence[ast.expr] | None) -> tuple[str, ...] | None:
    return None if values is None else tuple(map(ast.unparse, values))


def _result(value: Value) -> str:
    """A tensor in Python."""
    if value.whole:
        return value.storage.name
    size, stride = (f"({', '.join(values or ())}{',' * bool(values)})" for values in (value.size, value.stride))
    return f"reinterpret_tensor({value.storage.name}, {size}, {stride}, {value.offset})"
