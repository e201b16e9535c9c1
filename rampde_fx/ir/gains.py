"""Gains: powers of two that make up for small factors in a pullback, so that what is behind them is not lost."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from rampde_fx.ir import graphs, operator_table

aten = torch.ops.aten
MOST_GAIN = 2.0**25
SMALL = 2.0**-6  # a number from this on needs no gain, nor does one up to its reciprocal take one back


@dataclass(frozen=True, order=True)
class Gain:
    """What makes up for a factor: a power of two.

    Attributes:
        factor: The factor, by its number among the placeholders of the pullback, or -1.
        number: The gain, where the factor is a number.
        divides: Whether the factor divides.
    """

    factor: int = -1
    number: float = 1.0
    divides: bool = False


# What a value follows from: cotangents, by number, each with the gains on the way. Its scale is the least of theirs.
Origins = frozenset[tuple[int, tuple[Gain, ...]]]


def gain_of(node: fx.Node, read: list[fx.Node], factors: Mapping[fx.Node, int]) -> Gain | None:
    """What makes up for the factor that a product or a quotient multiplies a cotangent by; None for another node."""
    name = operator_table.name_of(node.target)
    if node.target is operator.getitem and node.args[1] == 0:  # the gradient of a norm's input
        weight = operator_table.properties(read[0].target).weight
        return None if weight is None else _of_factor(read[0].args[weight], factors)
    if operator_table.properties(node.target).product != "entries" or len(node.args) != 2 or node.kwargs:
        return None
    divides, (first, second) = name == "div", node.args
    other = second if first is read[0] else first
    if isinstance(other, (int, float)):
        size = abs(other) if not divides else abs(1 / other) if other else 0.0
        is_near_one = not 0 < size < math.inf or SMALL <= size <= 1 / SMALL
        return None if is_near_one else Gain(number=2.0 ** -math.floor(math.log2(size)))
    if divides and first is not read[0]:
        return None
    return _of_factor(other, factors, divides=divides) if other is not read[0] else None


def _of_factor(factor: Any, factors: Mapping[fx.Node, int], *, divides: bool = False) -> Gain | None:
    """What makes up for a factor that depends on no state; None for another one, and for a complex number."""
    while isinstance(factor, fx.Node) and (graphs.is_view(factor) or factor.target is aten._to_copy.default):
        factor = factor.args[0]
    return Gain(factors[factor], divides=divides) if factor in factors else None


def net(gain: Gain, origins: Origins) -> Gain | None:
    """The gain of a number behind those of other numbers on the way: all together they are between 1 and MOST_GAIN.

    A large number takes back the gains of small ones, and no more.
    """
    before = {math.prod(g.number for g in gains if g.factor < 0) for _, gains in origins}
    least, most = min(before), max(before)
    number = min(max(gain.number, 1 / least), MOST_GAIN / most)
    return Gain(number=number) if number != 1 else None


def with_gain(gains: tuple[Gain, ...], gain: Gain) -> tuple[Gain, ...]:
    """Some gains and one more; those of numbers are one."""
    if gain.factor >= 0:
        return tuple(sorted((*gains, gain)))
    number = gain.number * math.prod(g.number for g in gains if g.factor < 0)
    tensors = [g for g in gains if g.factor >= 0]
    return tuple(sorted((*tensors, *([Gain(number=number)] if number != 1 else []))))
