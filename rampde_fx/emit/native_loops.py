"""Loops in C++, in what Inductor writes for a CPU: one call from Python runs every step.

Before:  while should_loop:
             (y[0], y[1]) = body([y[0], y[1], w])         which calls a step in C++
             (more,) = condition([y[0], y[1], w])
After:   if should_loop and not profiled():
             (y[0], y[1]) = body_loop([y[0], y[1], w]);   should_loop = False
         while should_loop: ...                           as before

What a step makes anew goes into one of two tensors in turn, for it reads the one that the step before made. A loop in
which a carry changes its place, its layout or its dtype stays in Python, and every loop does while a profile is
recorded, which shows its steps one by one.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping, Sequence

from rampde_fx.emit.native_steps import Step, host, returned
from rampde_fx.torch_private import low_products
from rampde_fx.torch_private.wrapper_code import KNOWN, Allocate, Call, Function, Host, Loop, UnreadError, View

PROFILED = "__import__('rampde_fx.torch_private.callers').torch_private.callers.profiled"
_SIGNS: dict[type[ast.AST], str] = {
    **{ast.Add: "+", ast.Sub: "-", ast.Mult: "*"},
    **{ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">=", ast.Eq: "==", ast.NotEq: "!="},
}


class NativeLoop:
    """A loop whose body is a step in C++.

    Attributes:
        name: The name of the function in C++.
        source: It.
        host: The one in Python that calls it.
        call: What stands before the loop in Python.
        body: The name of the body.
        line: Where the loop begins.

    Raises:
        UnreadError: It cannot be written in C++.
    """

    def __init__(self, loop: Loop, step: Step, condition: Function) -> None:
        self._step, self._function = step, step.function
        self.name, self.body, self.line = f"{loop.body}_loop_native", loop.body, loop.line
        parameters = self._function.parameters
        if len({*parameters}) != len(loop.args) or len(condition.parameters) != len(loop.args):
            raise UnreadError("parameters that are not those of the loop")
        self._turned = dict(self._carries(parameters[: len(loop.carried)]))
        self._require_integers()
        self._passed: dict[str, str] = {}  # integers that stay: expressions in Python, and their names in C++
        asked = self._asked(condition)
        items = [
            f"const int64_t {number} = *reinterpret_cast<const int64_t*>({name});"
            for number, name in self._function.items.items()
        ]
        numbers = [self._integer(text) for text in step.numbers]
        checks, kept = self._checks()
        given = ", ".join([*step.given, *numbers])
        self._taken = [*dict.fromkeys([*step.given, *self._turned.values(), *self._function.items.values(), *asked[1]])]
        self._taken = [name for name in self._taken if name not in self._turned]
        self.source = self._source([*items, *checks], f"{step.name}({given});", asked[0])
        self.host = host(f"{loop.body}_loop", kept, self._allocations(), self._called(), self._ends())
        self._require_constants()
        call = f"({', '.join(loop.carried)},) = {loop.body}_loop([{', '.join(loop.args)}])"
        before = [f"if should_loop and not {PROFILED}():", f"    {call}", "    should_loop = False"]
        self.call = "\n".join(" " * loop.indent + line for line in before)

    def _carries(self, parameters: Sequence[str]) -> Iterator[tuple[str, str]]:
        """For each carry that is made anew: the allocation that holds it, and the parameter."""
        seen = set()
        for name, value in zip(parameters, self._step.results, strict=True):
            storage = value.storage
            if storage.allocation is None:
                if storage.name != name or not value.whole:
                    raise UnreadError(f"a carry that takes the place of {name}")
                continue
            shape = self._function.shapes.get(name)
            wanted = None if shape is None else _shape(shape)
            if storage.name in seen or value.offset != "0" or wanted != (value.size, value.stride):
                raise UnreadError(f"the layout of {name}")
            seen.add(storage.name)
            yield storage.name, name

    def _require_integers(self) -> None:
        """Whatever a step reads as a number is one of its carries, and an integer of 64 bits."""
        dtypes = {
            value.storage.name: value.storage.allocation.dtype
            for value in self._step.results
            if value.storage.allocation
        }
        integers = {name for allocation, name in self._turned.items() if dtypes[allocation] == "torch.int64"}
        if not integers.issuperset(self._function.items.values()):
            raise UnreadError("a number that is no integer of the loop's")

    def _require_constants(self) -> None:
        """What stands in front of the loop reads no number of a step's."""
        names = {node.id for node in ast.walk(ast.parse(self.host)) if isinstance(node, ast.Name)}
        if read := names & {*self._function.items}:
            raise UnreadError(f"{', '.join(sorted(read))} in front of the loop")

    def _asked(self, condition: Function) -> tuple[str, set[str]]:
        """The call of the condition's kernel, and the parameters that it reads."""
        places = dict(zip(condition.parameters, self._function.parameters, strict=True))
        native = [s for s in condition.statements if not isinstance(s, Host)]
        match native, condition.results:
            case [Allocate(name, (), (), "torch.bool"), Call(kernel, args), *rest], (View(result, None),) if (
                result == name and not condition.items and not any(isinstance(s, Call | Allocate) for s in rest)
            ):
                pass
            case _:
                raise UnreadError("a condition of more than one kernel")
        if unknown := {*condition.symbols.values()} - {*places}:
            raise UnreadError(f"a condition on {', '.join(sorted(unknown))}")
        symbols = {symbol: places[name] for symbol, name in condition.symbols.items()}
        given, read = [], set()
        for arg, kind in zip(args, kernel.types, strict=True):
            if not isinstance(arg, View):
                given.append(self._integer(ast.unparse(arg), symbols))
            elif arg.offset is not None:
                raise UnreadError("a condition on a part")
            elif arg.name == name:
                given.append(f"reinterpret_cast<{kind}>(&more_)")
            else:
                read.add(places[arg.name])
                given.append(f"reinterpret_cast<{kind}>({places[arg.name]})")
        return f"{kernel.name}({', '.join(given)});", read

    def _checks(self) -> tuple[list[str], list[str]]:
        """What is checked of the integers that a step reads, in C++; and what of Python stays in front of the loop."""
        checks, kept = [], []
        for statement in self._function.statements:
            if not isinstance(statement, Host):
                continue
            match ast.parse(statement.text).body:
                case [ast.Assign(targets=[ast.Name(id=number)])] if number in self._function.items:
                    continue
                case [
                    ast.If(
                        test=ast.UnaryOp(op=ast.Not(), operand=test),
                        body=[
                            ast.Raise(exc=ast.Call(func=ast.Name("RuntimeError"), args=[ast.Constant(value=str(told))]))
                        ],
                    )
                ]:
                    checks.append(f"if (!({self._expression(test)})) throw std::runtime_error({_text(told)});")
                case [ast.If()]:
                    raise UnreadError(statement.text)
                case _:
                    kept.append(statement.text)
        return checks, kept

    def _integer(self, text: str, symbols: Mapping[str, str] | None = None) -> str:
        """An integer in C++: an expression of those that the step reads, or one that Python computes once."""
        names = {node.id for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Name)}
        if symbols is None and names & {*self._function.items}:
            return self._expression(ast.parse(text, mode="eval").body)
        if symbols is not None and not names <= {*symbols, *KNOWN}:
            raise UnreadError(f"{text} in a condition")
        for symbol in names & {*(symbols or {})}:
            text = re.sub(rf"\b{symbol}\b", (symbols or {})[symbol], text)
        if re.fullmatch(r"-?\d{1,18}", text):
            return f"{text}L"
        return self._passed.setdefault(text, f"passed{len(self._passed)}")

    def _expression(self, value: ast.expr) -> str:
        """An expression that means the same in C++."""
        if isinstance(value, ast.Constant) and type(value.value) is not int:
            raise UnreadError(ast.unparse(value))
        if not any(isinstance(node, ast.Name) and node.id in self._function.items for node in ast.walk(value)):
            return self._integer(ast.unparse(value))
        match value:
            case ast.Name(id=name):
                return name
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return f"(-{self._expression(operand)})"
            case ast.BinOp(left, op, right) | ast.Compare(left, [op], [right]) if type(op) in _SIGNS:
                return f"({self._expression(left)} {_SIGNS[type(op)]} {self._expression(right)})"
        raise UnreadError(ast.unparse(value))

    def _source(self, begin: Sequence[str], step: str, condition: str) -> str:
        parameters = [f"char* {name}" for name in (*self._taken, *self._pairs(), "turns")]
        parameters += [f"int64_t {name}" for name in self._passed.values()]
        keeping = ["const KeepingFactors keeping_;"] if low_products.CALL in self._step.source else []
        lines = [
            *keeping,
            "bool more_ = false;",
            "int64_t count_ = 0;",
            "do {",
            "    let_python_run();",
            *(f"    {line}" for line in begin),
            *(f"    char* const {name} = count_ % 2 ? {name}_1 : {name}_0;" for name in self._turned),
            f"    {step}",
            *(f"    {parameter} = {name};" for name, parameter in self._turned.items()),
            "    ++count_;",
            f"    {condition}",
            "} while (more_);",
            "*reinterpret_cast<int64_t*>(turns) = count_;",
        ]
        return "\n    ".join([f"static void {self.name}({', '.join(parameters)}) {{", *lines]) + "\n}"

    def _pairs(self) -> list[str]:
        """The two tensors that hold each carry that is made anew, in turn."""
        return [f"{name}_{which}" for name in self._turned for which in (0, 1)]

    def _allocations(self) -> list[str]:
        found = ["turns = empty_strided_cpu((), (), torch.int64)"]
        for name, text in self._step.allocations.items():
            target, _, value = text.partition(" = ")
            found += [f"{target}_{which} = {value}" for which in (0, 1)] if name in self._turned else [text]
        return found

    def _called(self) -> list[str]:
        return [f"{self.name}({', '.join([*self._taken, *self._pairs(), 'turns', *self._passed])})"]

    def _ends(self) -> list[str]:
        """What the last step made, as the step gives it."""
        last = [f"{name} = {name}_1 if even else {name}_0" for name in self._turned]
        return ["even = turns.item() % 2 == 0", *last, returned(self._step.results)]


def _shape(view: View) -> tuple[tuple[str, ...], tuple[str, ...]]:
    size, stride = (tuple(map(ast.unparse, values or ())) for values in (view.size, view.stride))
    return size, stride


def _text(message: str) -> str:
    """A string in C++."""
    return '"' + message.replace("\\", "\\\\").replace('"', '\\"').replace("\n", " ") + '"'
