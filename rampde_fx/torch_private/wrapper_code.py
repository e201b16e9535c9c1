"""The module that Inductor writes for a graph on a CPU, read: its kernels, and functions of these.

What a function may hold is listed here: calls of kernels, products of matrices, memory for both, and checks of what it
is given. One that holds anything else is not read.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

_KERNEL = re.compile(r'((?:\s*#include[^\n]*\n)*)\s*extern "C"\s+void\s+kernel(\(.*)', re.DOTALL)
_TYPE = re.compile(r"(const )?([\w:]+\*|int64_t|float|double)")
_SYMBOL = re.compile(r"[su]\d+")
KNOWN = {"math", "torch", "max", "min", "abs", "int", "round"}  # what expressions of sizes call, or call a part of
_TOP_LEVEL_BRACE = re.compile(r"^\}", re.MULTILINE)


class UnreadError(Exception):
    """A statement that is not one of those listed here."""


@dataclass(frozen=True)
class Kernel:
    """A function in C++ that fills buffers.

    Attributes:
        name: Its name in the module.
        types: Those of its arguments, in C++.
        includes: The lines of its headers.
        definition: The function, named as in the module.
        lines: The first and the last line that define it.
    """

    name: str
    types: tuple[str, ...]
    includes: tuple[str, ...]
    definition: str
    lines: tuple[int, int]


@dataclass(frozen=True)
class View:
    """A tensor: the whole of what a name holds, or part of it. Sizes, strides and the offset are expressions."""

    name: str
    size: tuple[ast.expr, ...] | None = None
    stride: tuple[ast.expr, ...] | None = None
    offset: ast.expr | None = None


@dataclass(frozen=True)
class Allocate:
    """A new tensor."""

    name: str
    size: tuple[ast.expr, ...]
    stride: tuple[ast.expr, ...]
    dtype: str
    text: str


@dataclass(frozen=True)
class Bind:
    """Another name for a tensor or a part of it."""

    name: str
    view: View


@dataclass(frozen=True)
class Call:
    """A kernel is called, with tensors and integers."""

    kernel: Kernel
    args: tuple[View | ast.expr, ...]


@dataclass(frozen=True)
class Product:
    """out = left @ right, of matrices, plus what is added, which may have fewer rows."""

    left: View
    right: View
    out: View
    added: View | None = None


@dataclass(frozen=True)
class Host:
    """A statement about numbers and arguments, which stays in Python."""

    text: str


Statement = Allocate | Bind | Call | Product | Host


@dataclass
class Function:
    """A function of a list of tensors and integers.

    Attributes:
        name: Its name.
        parameters: The names of what it takes.
        statements: All but the last.
        results: What it returns.
        shapes: Sizes and strides that are asserted of parameters.
        items: The integers that it reads from tensors, and from which parameters.
        symbols: The integers that are parameters by another name.
        lines: The first and the last one.
    """

    name: str
    lines: tuple[int, int]
    parameters: tuple[str, ...] = ()
    statements: list[Statement] = field(default_factory=list)
    results: tuple[View, ...] = ()
    shapes: dict[str, View] = field(default_factory=dict)
    items: dict[str, str] = field(default_factory=dict)
    symbols: dict[str, str] = field(default_factory=dict)

    @property
    def numbers(self) -> set[str]:
        """All integers that have a name of their own."""
        return {*self.items, *self.symbols}


def read_kernels(module: ast.Module) -> dict[str, Kernel]:
    """The kernels of a module that are one function each."""
    found = {}
    for statement in module.body:
        match statement:
            case ast.Assign(
                targets=[ast.Name(id=name)],
                value=ast.Call(
                    func=ast.Attribute(value=ast.Name(id="async_compile"), attr="cpp_pybinding"),
                    args=[types, ast.Constant(value=str(source))],
                ),
            ):
                match, kinds = _KERNEL.fullmatch(source), tuple(ast.literal_eval(types))
                alone = len(_TOP_LEVEL_BRACE.findall(source)) == 1 and source.rstrip().endswith("}")
                if match and alone and all(map(_TYPE.fullmatch, kinds)):
                    includes = tuple(line.strip() for line in match[1].splitlines() if line.strip())
                    lines = statement.lineno, statement.end_lineno or statement.lineno
                    found[name] = Kernel(name, kinds, includes, f"static void {name}{match[2]}", lines)
    return found


def read_function(definition: ast.FunctionDef, kernels: dict[str, Kernel]) -> Function:
    """A function of the module.

    Raises:
        UnreadError: It has a statement that is not known here.
    """
    found = Function(definition.name, (definition.lineno, definition.end_lineno or definition.lineno))
    *body, last = definition.body
    for statement in body:
        if not isinstance(statement, ast.Delete):  # names end: where memory ends is seen from its uses
            found.statements.append(_read(statement, found, kernels))
    match last:
        case ast.Return(value=ast.Tuple(elts=values)):
            found.results = tuple(map(_view, values))
        case _:
            raise UnreadError(ast.unparse(last))
    return found


@dataclass(frozen=True)
class Loop:
    """A loop that calls a body until a condition is false.

    Attributes:
        body: The name of the body.
        condition: That of the condition.
        carried: What the body gives, in the order of its first parameters.
        args: What both take.
        line: Where it begins.
        indent: How far it is indented.
    """

    body: str
    condition: str
    carried: tuple[str, ...]
    args: tuple[str, ...]
    line: int
    indent: int


def read_loops(module: ast.Module) -> Iterator[Loop]:
    """The loops of a module, those in bodies of loops too."""
    for statement in ast.walk(module):
        match statement:
            case ast.While(
                test=ast.Name(id=flag),
                body=[
                    ast.Assign(targets=[ast.Name(id=given)], value=ast.List(elts=args)),
                    ast.Assign(
                        targets=[ast.Tuple(elts=carried)],
                        value=ast.Call(func=ast.Name(id=body), args=[ast.Name(id=taken)], keywords=[]),
                    ),
                    ast.Assign(targets=[ast.Name(id=asked)], value=ast.List(elts=condition_args)),
                    ast.Assign(
                        targets=[ast.Tuple(elts=[ast.Name(id=result)])],
                        value=ast.Call(func=ast.Name(id=condition), args=[ast.Name(id=told)], keywords=[]),
                    ),
                    ast.Assign(targets=[ast.Name(id=next_flag)], value=ast.Name(id=decided)),
                ],
                orelse=[],
            ) if (flag, given, asked, result) == (next_flag, taken, told, decided) and flag == "should_loop":
                texts = [tuple(map(ast.unparse, values)) for values in (carried, args, condition_args)]
                if texts[1] == texts[2] and texts[1][: len(carried)] == texts[0]:
                    yield Loop(body, condition, texts[0], texts[1], statement.lineno, statement.col_offset)


def _read(statement: ast.stmt, function: Function, kernels: dict[str, Kernel]) -> Statement:
    if _stays(statement, function):
        return Host(ast.unparse(statement))
    match statement:
        case ast.Assign(
            targets=[ast.Name(id=name)],
            value=ast.Call(func=ast.Name(id="empty_strided_cpu"), args=[size, stride, dtype]),
        ):
            return Allocate(name, _items(size), _items(stride), ast.unparse(dtype), ast.unparse(statement))
        case ast.Assign(targets=[ast.Name(id=name)], value=value):
            return Bind(name, _view(value))
        case ast.Expr(value=ast.Call(func=ast.Name(id=name), args=args, keywords=[])) if name in kernels:
            kernel = kernels[name]
            if len(args) != len(kernel.types):
                raise UnreadError(f"{name} with {len(args)} arguments")
            pairs = zip(args, kernel.types, strict=True)
            return Call(kernel, tuple(_view(arg) if kind.endswith("*") else arg for arg, kind in pairs))
        case ast.Expr(
            value=ast.Call(
                func=ast.Attribute(value=ast.Name(id="extern_kernels"), attr="mm"),
                args=[left, right],
                keywords=[ast.keyword(arg="out", value=out)],
            )
        ):
            return Product(_view(left), _view(right), _view(out))
        case ast.Expr(
            value=ast.Call(
                func=ast.Attribute(value=ast.Name(id="extern_kernels"), attr="addmm"),
                args=[added, left, right],
                keywords=[
                    ast.keyword(arg="alpha", value=ast.Constant(value=1)),
                    ast.keyword(arg="beta", value=ast.Constant(value=1)),
                    ast.keyword(arg="out", value=out),
                ],
            )
        ):
            return Product(_view(left), _view(right), _view(out), _view(added))
    raise UnreadError(ast.unparse(statement))


def _stays(statement: ast.stmt, function: Function) -> bool:
    """Whether a statement is about numbers and arguments; the function notes what it says."""
    match statement:
        case ast.Assign(targets=[ast.Tuple(elts=names)], value=ast.Name(id="args")) if not function.parameters:
            function.parameters = tuple(ast.unparse(name) for name in names)
        case ast.Expr(value=ast.Call(func=ast.Name(id="assert_size_stride"), args=[ast.Name(id=name), *shape])):
            _parameters(function, [name])
            function.shapes[name] = View(name, _items(shape[0]), _items(shape[1]))
        case ast.Expr(  # of torch 2.14
            value=ast.Call(func=ast.Name(id="assert_size_stride_grouped"), args=[names, sizes, strides, *_])
        ):
            for each in zip(*map(_items, (names, sizes, strides)), strict=True):
                name = ast.unparse(each[0])
                _parameters(function, [name])
                function.shapes[name] = View(name, _items(each[1]), _items(each[2]))
        case (
            ast.Expr(value=ast.Call(func=ast.Attribute(value=ast.Name(id="args"), attr="clear")))
            | ast.Assign(targets=[ast.Name()], value=ast.Constant(value=None))
        ):
            pass
        case ast.Assign(
            targets=[ast.Name(id=number)],
            value=ast.Call(func=ast.Attribute(value=ast.Name(id=name), attr="item"), args=[]),
        ):
            _parameters(function, [name])
            if any(isinstance(earlier, Call | Product) for earlier in function.statements):
                raise UnreadError("a number that is read behind the first kernel")
            function.items[number] = name
        case ast.Assign(targets=[ast.Name(id=number)], value=ast.Name(id=name)) if _SYMBOL.fullmatch(number):
            _parameters(function, [name])
            function.symbols[number] = name
        case ast.If(test=test, body=[ast.Raise()], orelse=[]):
            _parameters(function, [node.id for node in ast.walk(test) if isinstance(node, ast.Name)])
        case _:
            return False
    return True


def _parameters(function: Function, names: Sequence[str]) -> None:
    known = {*function.parameters, *function.numbers, *KNOWN}
    if not known.issuperset(names):
        raise UnreadError(f"a statement of Python about {sorted({*names} - known)}")


def _view(value: ast.expr) -> View:
    match value:
        case ast.Name(id=name):
            return View(name)
        case ast.Call(
            func=ast.Name(id="reinterpret_tensor"), args=[ast.Name(id=name), size, stride, offset], keywords=[]
        ):
            return View(name, _items(size), _items(stride), offset)
    raise UnreadError(ast.unparse(value))


def _items(value: ast.expr) -> tuple[ast.expr, ...]:
    if not isinstance(value, ast.Tuple):
        raise UnreadError(ast.unparse(value))
    return tuple(value.elts)
