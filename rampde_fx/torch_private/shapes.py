"""Symbolic sizes and numbers: what is known of them when a graph is compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from rampde_fx.torch_private.names import Names

_torch = Names(
    {
        "sympy": "Dummy",
        "torch._dynamo.exc": "TensorifyScalarRestartAnalysis",
        "torch._dynamo.symbolic_convert": "TensorifyState",
        "torch.fx.experimental.symbolic_shapes": "free_unbacked_symbols guard_or_false statically_known_true",
        "torch.utils._sympy.interp": "sympy_interp",
        "torch.utils._sympy.reference": "PythonReferenceAnalysis",
        "torch.utils._sympy.symbol": "SymT symbol_is_type",
    }
)
TensorifyScalarRestartAnalysis = _torch.TensorifyScalarRestartAnalysis


def size_hint(size: Any) -> int:
    """The size, or what a symbolic one was when the graph was captured."""
    return size.node.hint if isinstance(size, torch.SymInt) else int(size)


def hint_of(number: float | torch.SymFloat) -> float | None:
    """The number, or what a symbolic one was when the graph was captured; None of one that is read from a tensor."""
    if not isinstance(number, torch.SymFloat):
        return number
    return None if _torch.free_unbacked_symbols(number) else float(number.node.hint)


def condition_of(inputs: list[Any]) -> Callable[..., bool]:
    """What has to hold of inputs for a graph that was captured with the given fake ones: the guards on their sizes."""
    sizes = [size for value in inputs if isinstance(value, torch.Tensor) for size in value.shape]
    symbolic = next((size for size in [*sizes, *inputs] if isinstance(size, torch.SymInt)), None)
    if symbolic is None:
        return lambda *_: True
    shape_env = symbolic.node.shape_env
    code = shape_env.produce_guards_expression(inputs)
    return lambda *args: code is None or bool(shape_env.evaluate_guards_expression(code, args))


def number_of(size: int | torch.SymInt) -> int | torch.SymInt:
    """The size, as an int where the guards of a symbolic one leave a single number: tracing knows no proxy for it."""
    known = size.node.maybe_as_int() if isinstance(size, torch.SymInt) else size
    return size if known is None else known


def symbol_of(size: torch.SymInt) -> torch.SymInt:
    """The symbol s of a size a s + b with numbers a and b, computed from the size; any other size as it is."""
    _, factor, constant = as_linear(size)
    return (size - constant) // factor


def as_linear(size: torch.SymInt) -> tuple[Any, int, int]:
    """An expression x and the numbers a and b with which a size is a x + b: a symbol or a quotient, or the whole."""
    polynomial = size.node.expr.as_poly()
    if polynomial is None or len(polynomial.gens) != 1 or polynomial.degree() != 1:
        return size.node.expr, 1, 0
    factor, constant = map(int, polynomial.all_coeffs())
    return polynomial.gens[0], factor, constant


def symbol_alone(size: Any) -> Any:
    """The symbol that a size is, to be looked up in a dict; None of a number, and of an expression."""
    expression = size.node.expr if isinstance(size, torch.SymInt) else None
    return expression if expression is not None and expression.is_Symbol else None


def spell(size: torch.SymInt, known: Mapping[Any, fx.Node]) -> fx.Node | None:
    """Compute a size in a graph, where it stands now, from nodes that are symbols, or other expressions, of it.

    None if it follows from another symbol.
    """
    expression, proxies = size.node.expr, {}
    for part, node in known.items():
        symbol = part
        if part is not None and not part.is_Symbol:
            symbol = _torch.Dummy(integer=True, positive=True)
            expression = expression.subs(part, symbol)
        proxies[symbol] = fx.Proxy(node)
    if not expression.free_symbols or not expression.free_symbols <= proxies.keys():
        return None
    return _torch.sympy_interp(_torch.PythonReferenceAnalysis, proxies, expression).node


def known_now(number: torch.SymFloat) -> float | None:
    """The number, from now on guarded, if it follows from sizes alone; None of one that follows from a Python float."""
    symbols = number.node.expr.free_symbols
    if not all(_torch.symbol_is_type(symbol, _torch.SymT.SIZE) for symbol in symbols):
        return None
    return float(number)


def is_data_dependent(number: Any) -> bool:
    """Whether a number is read from a tensor, so that nothing is known of it when the graph is compiled."""
    return isinstance(number, torch.SymInt | torch.SymFloat | torch.SymBool) and not number.node.has_hint()


def are_equal(shape: Sequence[Any], other: Sequence[Any]) -> bool:
    """Whether two shapes are equal. Sizes that are written differently, and are equal now, are guarded to be so.

    A sum guards that its operands have one size, and keeps the expressions of both.
    """
    pairs = zip(shape, other, strict=False)
    return len(shape) == len(other) and all(str(n) == str(m) or _torch.guard_or_false(n == m) for n, m in pairs)


def takes_no_more_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether a tensor takes no more bytes than another one, for all values of their symbolic sizes."""
    return bool(_torch.statically_known_true(a.numel() * a.itemsize <= b.numel() * b.itemsize))


def has_no_more_entries(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether a tensor has no more entries than another one, for all values of their symbolic sizes."""
    return bool(_torch.statically_known_true(a.numel() <= b.numel()))


def capture_again_with(numbers: Iterable[torch.SymFloat]) -> None:
    """Have Dynamo capture the model again, with the present values of its Python floats behind these numbers.

    It guards them then, and compiles anew when one changes. A number that is read from a tensor stays as it is.

    Raises:
        TensorifyScalarRestartAnalysis: which Dynamo catches; unless all of the numbers are read from tensors.
    """
    symbols = {symbol for number in numbers for symbol in number.node._expr.free_symbols}
    floats = {str(symbol) for symbol in symbols if _torch.symbol_is_type(symbol, _torch.SymT.FLOAT)}
    for name in floats:
        _torch.TensorifyState.specialize(name)
    if floats:
        raise TensorifyScalarRestartAnalysis
