"""What Inductor writes for a graph on a CPU, with its kernels in one library, and its loops in C++ where they can be.

Inductor has each kernel compiled by itself. Here the C++ compiler runs once for a graph: reading its headers takes two
seconds, a kernel a twentieth of one. A loop that consists of kernels and products of matrices is one function in that
library (native_loops.py), and so is a body (native_steps.py) whose loop is not. Whatever else stands there stays.
"""

from __future__ import annotations

import ast
import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from rampde_fx.emit.native_loops import NativeLoop
from rampde_fx.emit.native_steps import Step
from rampde_fx.torch_private import low_products, native_library
from rampde_fx.torch_private.wrapper_code import Kernel, Loop, UnreadError, read_function, read_kernels, read_loops

log = logging.getLogger(__name__)
PRIVATE = "__import__('rampde_fx.torch_private.{0}').torch_private.{0}"
LOW_PRODUCT = re.compile(r"\bextern_kernels\.(add)?mm\(")  # which stays in Python
BODY = re.compile(r"(\w+_)?while_loop_body_graph_[\d_]+")


@dataclass(frozen=True)
class Written:
    """A module that was written anew.

    Attributes:
        text: Of the module.
        names: The functions of its library.
        source: That of the library.
    """

    text: str
    names: list[str]
    source: str


@dataclass(frozen=True)
class NativeOrKept:
    """From the module that Inductor wrote to the one that native makes of it; to itself, if that fails."""

    def __call__(self, code: str) -> str:
        try:
            written = native(code)
            if written is None:
                return code
            compile(written.text, "<what Inductor wrote, written anew>", "exec")
            native_library.load_library(written.names, written.source)
        except Exception:  # whatever it is: Inductor's own module does the same, in more time
            log.warning("what Inductor wrote is kept: its loops run in Python", exc_info=True)
            return code
        return written.text

    def uuid(self) -> str:
        """What the result depends on, for Inductor's caches."""
        return repr((self, native_library.multiplies(), low_products.multiplies()))


def native(code: str) -> Written | None:
    """The module that Inductor wrote, with its kernels in one library, and its loops in it where they can be.

    Returns:
        None for a module without kernels, and for one whose lines are not those that Python's parser counts.
    """
    module = ast.parse(code)
    kernels = read_kernels(module)
    if not kernels or "\r" in code:
        return None
    found = list(read_loops(module))
    steps = {step.function.name: step for step in _steps(module, kernels, found)}
    loops = list(_loops(module, kernels, steps, found))
    hosts = {name: step.host for name, step in steps.items()}
    for loop in loops:
        hosts[loop.body] = f"{hosts[loop.body]}\n\n{loop.host}"
    replaced = {kernel.lines: "" for kernel in kernels.values()}
    replaced |= {step.lines: hosts[name] for name, step in steps.items()}
    replaced |= {(loop.line, loop.line - 1): loop.call for loop in loops}  # before a line, none is replaced
    rest = _replace(code, replaced)
    called = [kernel.name for kernel in kernels.values() if re.search(rf"\b{kernel.name}\(", rest)]
    functions: list[Step | NativeLoop] = [*steps.values(), *loops]
    names, sources = [*called, *(function.name for function in functions)], [function.source for function in functions]
    products = ""
    if LOW_PRODUCT.search(rest) and "torch.bfloat16" in rest and low_products.multiplies():
        names, sources = [*names, "multiply_low"], [*sources, low_products.FROM_PYTHON]
        products = f"\nextern_kernels = {PRIVATE.format('low_products')}.WithLowProducts(extern_kernels, multiply_low)"
    source = "\n" + _source(kernels.values(), sources) + "\n"
    library = f"[{', '.join(names)}] = {PRIVATE.format('native_library')}.load_library({names}, r'''{source}''')"
    first = min(kernel.lines for kernel in kernels.values())
    return Written(_replace(code, {**replaced, first: library + products}), names, source)


def _steps(module: ast.Module, kernels: dict[str, Kernel], loops: Sequence[Loop]) -> Iterator[Step]:
    carried = {loop.body: len(loop.carried) for loop in loops}
    for statement in module.body:
        if isinstance(statement, ast.FunctionDef) and BODY.fullmatch(statement.name):
            try:
                function = read_function(statement, kernels)
                constants = function.parameters[carried[statement.name] :] if statement.name in carried else ()
                yield Step(function, constants)
            except UnreadError as error:  # it stays in Python
                log.debug("%s stays in Python: %s", statement.name, error)


def _loops(
    module: ast.Module, kernels: dict[str, Kernel], steps: dict[str, Step], found: Sequence[Loop]
) -> Iterator[NativeLoop]:
    functions = {statement.name: statement for statement in module.body if isinstance(statement, ast.FunctionDef)}
    for loop in found:
        if loop.body not in steps or loop.condition not in functions:
            continue
        try:
            if sum(other.body == loop.body for other in found) > 1:
                raise UnreadError("two loops with one body")
            condition = read_function(functions[loop.condition], kernels)
            yield NativeLoop(loop, steps[loop.body], condition)
        except UnreadError as error:
            log.debug("the loop of %s stays in Python: %s", loop.body, error)


def _replace(code: str, texts: dict[tuple[int, int], str]) -> str:
    lines, kept, begin = code.split("\n"), [], 0
    for (first, last), text in sorted(texts.items()):
        kept += [*lines[begin : first - 1], text]
        begin = last
    return "\n".join([*kept, *lines[begin:]])


def _source(kernels: Iterable[Kernel], functions: Sequence[str]) -> str:
    includes = dict.fromkeys(line for kernel in kernels for line in kernel.includes)
    return "\n".join([*includes, *(kernel.definition for kernel in kernels), *functions])
