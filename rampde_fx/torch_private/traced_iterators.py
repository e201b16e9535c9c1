"""How Dynamo is to trace what programs put round the steps of a marked loop: zip with tensors, and progress bars."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from rampde_fx.torch_private.dynamo import current_capture, innermost
from rampde_fx.torch_private.names import Names

_torch = Names(
    {
        "torch._dynamo.variables": "TensorVariable UserDefinedClassVariable",
        "torch._dynamo.variables.base": "VariableTracker",
        "torch._dynamo.variables.builtin": "BuiltinVariable",
        "torch._dynamo.variables.functions": "LocalGeneratorObjectVariable",
    },
    everywhere=False,
)

TAKES_REPEATS = "takes_repeats"  # attribute of a backend that knows what repeat means


def takes_repeats() -> bool:
    """Whether the capture under way is for a backend that knows what repeat means."""
    return getattr(innermost(current_capture().compiler_fn), TAKES_REPEATS, False)


def rows_beside(steps: Iterable[Any], *others: Any, strict: bool = False) -> Iterator[tuple[Any, ...]]:
    """What zip gives, each row of a tensor read when its turn comes: Dynamo would read all of them before the loop."""
    iterators = [other if isinstance(other, torch.Tensor) else iter(other) for other in others]
    n = 0
    for step in steps:
        row = [step]
        for other in iterators:
            if isinstance(other, torch.Tensor):
                if n >= len(other):
                    break
                row.append(other[n])
                continue
            try:
                row.append(next(other))
            except StopIteration:
                break
        if len(row) <= len(others):
            if strict:
                raise ValueError(f"zip() argument {len(row) + 1} is shorter than argument 1")
            return
        yield tuple(row)
        n += 1
    if strict and _goes_on(iterators, n):
        raise ValueError("zip() argument 1 is shorter than another one")


def _goes_on(iterators: list[Any], n: int) -> bool:
    """Whether one of them has more than n entries, n of which were read."""
    for other in iterators:
        if isinstance(other, torch.Tensor):
            if n < len(other):
                return True
            continue
        try:
            next(other)
        except StopIteration:
            continue
        return True
    return False


class Unseen:
    """What stands for a progress bar while it is traced: it gives what it was given, and shows nothing."""

    def __init__(self, iterable: Iterable[Any]) -> None:
        self.iterable = iterable

    def __iter__(self) -> Iterator[Any]:
        return iter(self.iterable)

    def __enter__(self) -> Unseen:
        return self

    def __exit__(self, *_: Any) -> None:
        return None

    def _shows_nothing(self, *_: Any, **__: Any) -> None:
        return None

    update = close = clear = refresh = reset = display = unpause = _shows_nothing
    set_description = set_description_str = set_postfix = set_postfix_str = _shows_nothing


def unseen(iterable: Iterable[Any]) -> Unseen:
    """The stand-in for a progress bar."""
    return Unseen(iterable)


@functools.cache
def teach_dynamo() -> None:
    """Have Dynamo trace these as above, for backends that know what repeat means."""
    builtin, user_class = _torch.BuiltinVariable, _torch.UserDefinedClassVariable
    make_handler, call = builtin._make_handler, user_class.call_function

    @functools.wraps(make_handler)
    def made(function: Any, types: list[type], has_kwargs: bool) -> Any:
        handler = make_handler(function, types, has_kwargs)
        is_beside = function is zip and types[:1] == [_torch.LocalGeneratorObjectVariable]
        if is_beside and any(issubclass(kind, _torch.TensorVariable) for kind in types):
            return functools.partial(_zipped, handler)
        return handler

    @functools.wraps(call)
    def called(self: Any, tx: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
        if not _is_progress_bar(self.value) or not takes_repeats():
            return call(self, tx, args, kwargs)
        shown = args[0] if args else kwargs.get("iterable")
        if not isinstance(shown, _torch.LocalGeneratorObjectVariable):
            return call(self, tx, args, kwargs)
        return tx.inline_user_function_return(_torch.VariableTracker.build(tx, unseen), [shown], {})

    builtin._make_handler = staticmethod(made)
    user_class.call_function = called
    builtin.call_function_handler_cache.clear()


def _zipped(handler: Callable[..., Any], tx: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
    if not takes_repeats():
        return handler(tx, args, kwargs)
    return tx.inline_user_function_return(_torch.VariableTracker.build(tx, rows_beside), args, kwargs)


def _is_progress_bar(kind: Any) -> bool:
    bar = getattr(sys.modules.get("tqdm.std"), "tqdm", None)
    return bar is not None and isinstance(kind, type) and issubclass(kind, bar)
