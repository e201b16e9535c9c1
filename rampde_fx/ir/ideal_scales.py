"""Ideal scales: by what the values of a pullback should be multiplied, so that float16 holds them.

A value follows from cotangents, each with a scale of its own, and from factors on the way that are known before the
pullback runs, for they depend on no state: learned gains, numbers. An ideal scale is an expression of both. It is
written down when a pullback is rewritten, and evaluated in each of its calls.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx

from rampde_fx.ir import graphs, operator_table
from rampde_fx.runtime.scales import exponent_for, exponent_of, power_of_two

aten = torch.ops.aten
MOST_EXPONENT = 64  # of what makes up for factors
LARGEST_EXPONENT = 120  # of a scale, so that its inverse is a normal float32 too
NEAR_ONE = 6  # a known power of two below it needs no multiplication

Kind = Literal["times", "divides", "where", "where not"]


@dataclass(frozen=True, order=True)
class Factor:
    """What a product or a quotient multiplies a cotangent by.

    Attributes:
        number: The factor, if it is a number.
        node: The factor's name in the pullback, if it is a tensor.
        kind: What the tensor does: "times", "divides"; as a condition it lets pass "where" it is true, or is not.
    """

    number: float = 1.0
    node: str = ""
    kind: Kind = "times"

    def made_up(self, tensor: torch.Tensor) -> torch.Tensor:
        """The exponent of two, not rounded, that makes up for the tensor: float32, 0-d."""
        if self.kind == "divides":
            return exponent_for(1 / tensor)
        return exponent_for(tensor.logical_not() if self.kind == "where not" else tensor)


@dataclass(frozen=True)
class Own:
    """The scale of a cotangent, by its number: a power of two."""

    cotangent: int


@dataclass(frozen=True)
class Least:
    """The least of some scales, by their numbers: that of a sum."""

    of: tuple[int, ...]


@dataclass(frozen=True)
class Behind:
    """A scale, by its number, times what makes up for factors.

    Attributes:
        of: The scale.
        exponent: Of two, for all numbers among the factors.
        factors: The tensors among them, in order.
    """

    of: int
    exponent: float
    factors: tuple[Factor, ...]


class Scales:
    """Ideal scales, each written down once and named by its number."""

    def __init__(self) -> None:
        self.entries: list[Own | Least | Behind] = []
        self.numbers: dict[Own | Least | Behind, int] = {}
        self.cotangents: list[frozenset[int]] = []  # that each follows from

    def own(self, cotangent: int) -> int:
        """The scale of a cotangent."""
        return self._number(Own(cotangent), frozenset([cotangent]))

    def least(self, scales: Sequence[int]) -> int:
        """The least of some scales, at least one."""
        parts: set[int] = set()
        for scale in scales:
            parts.update(self._parts(scale))
        if len(parts) == 1:
            return parts.pop()
        return self._number(Least(tuple(sorted(parts))), frozenset().union(*(self.cotangents[part] for part in parts)))

    def behind(self, scale: int, factor: Factor) -> int:
        """The scale of a product of what has a scale and a factor."""
        old = self._as_behind(scale)
        exponent, factors = old.exponent, old.factors
        if factor.node:
            factors = tuple(sorted((*factors, factor)))
        elif 0 < abs(factor.number) < math.inf:
            exponent -= math.log2(abs(factor.number))
        if not factors and abs(exponent) < 1e-6:
            return old.of
        return self._number(Behind(old.of, exponent, factors), self.cotangents[old.of])

    def are_near(self, new: int, old: int) -> bool:
        """Whether it is known now that two scales are nearly equal."""
        a, b = self._as_behind(new), self._as_behind(old)
        return (a.of, a.factors) == (b.of, b.factors) and abs(a.exponent - b.exponent) < NEAR_ONE

    def _as_behind(self, scale: int) -> Behind:
        """A scale as one behind factors, of which there may be none."""
        entry = self.entries[scale]
        return entry if isinstance(entry, Behind) else Behind(scale, 0.0, ())

    def _parts(self, scale: int) -> tuple[int, ...]:
        entry = self.entries[scale]
        return entry.of if isinstance(entry, Least) else (scale,)

    def _number(self, entry: Own | Least | Behind, cotangents: frozenset[int]) -> int:
        if entry not in self.numbers:
            self.numbers[entry] = len(self.entries)
            self.entries.append(entry)
            self.cotangents.append(cotangents)
        return self.numbers[entry]

    def factors(self, scales: Iterable[int]) -> tuple[Factor, ...]:
        """The tensors among the factors that some scales make up for."""
        found: set[Factor] = set()
        open_scales, done = list(scales), set[int]()
        while open_scales:
            if (scale := open_scales.pop()) in done:
                continue
            done.add(scale)
            match self.entries[scale]:
                case Least(of):
                    open_scales += of
                case Behind(of, _, factors):
                    open_scales.append(of)
                    found.update(factors)
        return tuple(sorted(found))

    def values(
        self,
        wanted: Iterable[int],
        own: Mapping[int, torch.Tensor],
        made_up: Mapping[Factor, torch.Tensor],
        one: torch.Tensor,
    ) -> dict[int, torch.Tensor]:
        """Some scales: powers of two, float32, 0-d.

        None is below the least of its cotangents' scales, so that what is large is not made small: another entry may
        be neither.

        Args:
            wanted: The scales.
            own: Those of the cotangents; one that has no entries has none.
            made_up: For each factor of the wanted scales, the exponent of two that makes up for it, 0-d.
            one: A 0-d float32 tensor, 1: the scale of what follows from no entry.
        """

        @functools.cache
        def exponent(scale: int) -> torch.Tensor | None:
            match self.entries[scale]:
                case Own(cotangent):
                    return exponent_of(own[cotangent]) if cotangent in own else None
                case Least(of):
                    return least(of)
                case Behind(of, number, factors):
                    start = exponent(of)
                    return start if start is None else sum((made_up[f] for f in factors), start + number)

        def least(scales: Iterable[int]) -> torch.Tensor | None:
            return _least([exponent(scale) for scale in scales])

        @functools.cache
        def value(scale: int) -> torch.Tensor | None:
            match self.entries[scale]:
                case Own(cotangent):
                    return own.get(cotangent)
                case Least(of):
                    return _least([value(part) for part in of])
            ideal, lowest = exponent(scale), least(self.numbers[Own(i)] for i in sorted(self.cotangents[scale]))
            if ideal is None or lowest is None:
                return None
            highest = torch.clamp(lowest + MOST_EXPONENT, max=LARGEST_EXPONENT)
            return power_of_two(torch.minimum(torch.maximum(ideal, lowest), highest))

        found = {scale: value(scale) for scale in wanted}
        return {scale: one if power is None else power for scale, power in found.items()}


def _least(values: Iterable[torch.Tensor | None]) -> torch.Tensor | None:
    known = [value for value in values if value is not None]
    return None if not known else known[0] if len(known) == 1 else torch.stack(known).amin()


def independent(module: fx.GraphModule, varying: Collection[fx.Node]) -> set[fx.Node]:
    """The tensors that follow from none of the varying placeholders, but for their shapes, and from nothing random."""
    found = {node for node in graphs.placeholders(module) if node not in varying and _is_tensor(node)}
    for node in graphs.body(module):
        if not _is_tensor(node):
            continue
        call = node.args[0] if node.target is operator.getitem else None
        if isinstance(call, fx.Node) and call.op == "call_module":
            inner = module.get_submodule(str(call.target))
            pairs = zip(graphs.placeholders(inner), call.args, strict=True)
            is_independent = graphs.results(inner)[node.args[1]] in independent(
                inner, [inner_node for inner_node, arg in pairs if arg not in found]
            )
        elif node.op == "call_function" and not graphs.draws_random_numbers(node):
            reads_shape = operator_table.properties(node.target).reads_shape
            is_independent = reads_shape or found.issuperset(node.all_input_nodes)
        else:
            is_independent = False
        if is_independent:
            found.add(node)
    return found


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(graphs.value(node), torch.Tensor)


def factor_of(node: fx.Node, read: Sequence[fx.Node], stateless: Collection[fx.Node]) -> Factor | None:
    """What a product or a quotient multiplies a cotangent by, if it depends on no state; None for another node."""
    row = operator_table.properties(node.target)
    if node.target is operator.getitem and node.args[1] == 0:  # the gradient of a norm's input
        weight = operator_table.properties(read[0].target).weight
        return None if weight is None else _tensor(read[0].args[weight], stateless)
    if row.update == "choose":
        return _tensor(node.args[0], stateless, "where" if node.args[1] is read[0] else "where not")
    if row.product != "entries" or len(node.args) != 2 or node.kwargs:
        return None
    first, second = node.args
    if row.divides and first is not read[0]:
        return None
    other = second if first is read[0] else first
    if isinstance(other, (int, float)):
        return Factor(number=1 / other if row.divides and other else other)
    return _tensor(other, stateless, "divides" if row.divides else "times")


def _tensor(factor: Any, stateless: Collection[fx.Node], kind: Kind = "times") -> Factor | None:
    while isinstance(factor, fx.Node) and (graphs.is_view(factor) or factor.target is aten._to_copy.default):
        factor = factor.args[0]
    is_factor = factor in stateless and graphs.value(factor).numel() != 0
    return Factor(node=factor.name, kind=kind) if is_factor else None
