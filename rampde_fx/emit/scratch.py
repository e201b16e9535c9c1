"""Where the intermediate results of a step in C++ lie: those that do not live at the same time share memory.

Those whose sizes are numbers share one allocation; those of which one size is a symbol, one for each symbol. The
largest is placed first, and each as low as it fits beside those that live at the same time.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rampde_fx.torch_private.wrapper_code import Allocate

ALIGNMENT = 64  # bytes, as of torch's own allocations
ONE = "1"


@dataclass(frozen=True)
class Room:
    """What a tensor takes.

    Attributes:
        unit: An expression in Python.
        count: How many bytes for each that the unit counts; the product is a multiple of ALIGNMENT.
    """

    unit: str
    count: int


def room(allocation: Allocate) -> Room:
    """What it takes: a number of bytes, so many for each of a symbol's, or else an expression of several."""
    size, stride = (list(map(ast.unparse, values)) for values in (allocation.size, allocation.stride))
    dtype: torch.dtype = getattr(torch, allocation.dtype.removeprefix("torch."))
    symbols = [i for i, n in enumerate(size) if not n.isdigit()]
    if all(step.isdigit() for step in stride) and len(symbols) <= 1:
        numbers = [(int(n) if n.isdigit() else 1, int(step)) for n, step in zip(size, stride, strict=True)]
        entries = 1 + sum((n - 1) * step for n, step in numbers) if math.prod(n for n, _ in numbers) else 1
        if not symbols:
            return Room(ONE, -(-entries * dtype.itemsize // ALIGNMENT) * ALIGNMENT)
        if entries <= int(stride[symbols[0]]):  # of one of the symbol's, before the next begins
            return Room(_rounded(size[symbols[0]]), int(stride[symbols[0]]) * dtype.itemsize)
    entries_at_most = " + ".join(f"({n})*({step})" for n, step in zip(size, stride, strict=True))
    return Room(_rounded(f"({entries_at_most})*{dtype.itemsize}"), 1)


def places(wanted: Sequence[tuple[int, int, int]]) -> tuple[list[int], int]:
    """Where each of (how large, first use, last use) begins, and how much all take together."""
    begins: dict[int, int] = {}
    for i in sorted(range(len(wanted)), key=lambda i: -wanted[i][0]):
        count, first, last = wanted[i]
        beside = sorted((begins[j], wanted[j][0]) for j in begins if first <= wanted[j][2] and wanted[j][1] <= last)
        begins[i] = 0
        for begin, other in beside:
            if begins[i] + count <= begin:
                break
            begins[i] = max(begins[i], begin + other)
    end = max((begins[i] + wanted[i][0] for i in begins), default=0)
    return [begins[i] for i in range(len(wanted))], end


def _rounded(number: str) -> str:
    """The next multiple of ALIGNMENT."""
    return f"(({number}) + {ALIGNMENT - 1})//{ALIGNMENT}*{ALIGNMENT}"
