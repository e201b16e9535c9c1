"""Rows: indices into one tensor of which a single entry moves on, by the same amount from iteration to iteration."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import fx

from rampde_fx.ir import graphs
from rampde_fx.ir.effects import call
from rampde_fx.torch_private import fake_tensors


@dataclass(frozen=True)
class Rows:
    """The rows of a tensor that consecutive iterations read or write.

    Attributes:
        entries: The entries of the first iteration's index.
        place: Which of them moves on.
        slope: By how much.
    """

    entries: tuple[Any, ...]
    place: int
    slope: int

    @property
    def start(self) -> int:
        """The entry that moves on, in the first iteration."""
        return int(self.entries[self.place])

    def others(self) -> tuple[Any, ...]:
        """All that stays as it is."""
        return (*self.entries[: self.place], self.slope, *self.entries[self.place + 1 :])

    def is_apart(self, other: Rows) -> bool:
        """Whether two indices take different entries of some dimension, in all iterations."""
        if len(self.entries) != len(other.entries) or Ellipsis in self.entries or Ellipsis in other.entries:
            return False
        kinds = [type(entry) is int for entry in self.entries] == [type(entry) is int for entry in other.entries]
        return kinds and any(
            a != b for a, b in zip(self.others(), other.others(), strict=True) if type(a) is type(b) is int
        )

    def dimension(self, ndim: int) -> int:
        """Where the rows of a tensor stand in what an index reads that takes all of them at once."""
        found = 0
        for entry in self.entries[: self.place]:
            if entry is Ellipsis:
                consumed = sum(other is not None and other is not Ellipsis for other in self.entries)
                found += ndim - consumed
            else:
                found += not isinstance(entry, int)
        return found

    def taken(self, stop: Any) -> tuple[Any, ...]:
        """The index that takes all rows at once, up to an entry."""
        return (*self.entries[: self.place], slice(self.start, stop, self.slope), *self.entries[self.place + 1 :])


def rows_among(indices: Sequence[Any]) -> Rows | None:
    """The rows that the indices of consecutive iterations mean; None if they are no rows."""
    entries = [index if isinstance(index, tuple) else (index,) for index in indices]
    if len(entries) < 2 or len({len(row) for row in entries}) > 1 or not all(map(_is_plain, entries)):
        return None
    places = [k for k, column in enumerate(zip(*entries, strict=True)) if any(e != column[0] for e in column)]
    if len(places) != 1 or not all(type(row[places[0]]) is int for row in entries):
        return None
    numbers = [row[places[0]] for row in entries]
    slope = numbers[1] - numbers[0]
    moves = all(b - a == slope for a, b in pairwise(numbers))
    return Rows(entries[0], places[0], slope) if moves and slope > 0 and numbers[0] >= 0 else None


def _is_plain(entries: tuple[Any, ...]) -> bool:
    numbers = [(e.start, e.stop, e.step) if isinstance(e, slice) else (e,) for e in entries]
    return all(n is None or n is Ellipsis or type(n) is int for row in numbers for n in row)


def rows_of_reads(nodes: Sequence[fx.Node]) -> Rows | None:
    """The rows of one tensor that the nodes of consecutive iterations read; None if they read none."""
    if not all(node.target is operator.getitem and node.args[0] is nodes[0].args[0] for node in nodes):
        return None
    return rows_among([node.args[1] for node in nodes])


Maker = Callable[..., fx.Node]


def maker(graph: fx.Graph, meta: dict[str, Any], *, gradients: bool) -> Maker:
    """A function that makes calls where the graph inserts, with their fake values, and the metadata of another node."""

    def make(target: Any, *args: Any) -> fx.Node:
        node = graph.create_node("call_method" if isinstance(target, str) else "call_function", target, args)
        values = {operand: graphs.value(operand) for operand in node.all_input_nodes}
        with fake_tensors.fake_mode(), torch.set_grad_enabled(gradients):
            node.meta = {**meta, "example_value": call(node, values)}
        return node

    return make


def index_of_all(make: Maker, rows: Rows, grid: fx.Node, first: int) -> tuple[Any, ...]:
    """The index that takes the rows of all iterations from the `first` on, which the rows begin with.

    The grid has all time points of the loop; where their number is symbolic it is computed of them.
    """
    size = graphs.value(grid).shape[0]
    offset = rows.start + 1 - rows.slope * (first + 2)
    if isinstance(size, int):
        return rows.taken(rows.slope * size + offset)
    number = make("size", grid, 0)
    number = number if rows.slope == 1 else make(operator.mul, number, rows.slope)
    return rows.taken(make(operator.add, number, offset))
