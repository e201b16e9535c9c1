"""Take out of a marked loop what its steps read and write of a tensor by the number of the step.

Before:  iteration k: setitem(out, k + 1, y_k), getitem(controls, k), ...
After:   iteration k: row_k = clone(y_k), ...;   behind the loop: setitem(out, slice(1, N + 1), stack of all rows)
         before the loop: getitem(controls, k)

A preallocated trajectory is a list of what the steps write. Where a step reads what an earlier one wrote, as in
`out[i + 1] = out[i] + dt * k`, it reads that value: it is carried.

Requires: a MarkedLoop.
Ensures:  rows that nothing else in the loop shows are written behind it; of a loop that goes on behind its captured
          iterations the rows that its steps read stand before it, and become per-step inputs. What does not fit stays
          as it is.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from rampde_fx.ir import graphs
from rampde_fx.ir.captured import MarkedLoop, begins_iteration
from rampde_fx.ir.effects import Observer, gradient_modes
from rampde_fx.ir.rows import Rows, index_of_all, maker, rows_among, rows_of_reads
from rampde_fx.runtime import operators
from rampde_fx.torch_private import fake_tensors

Column = list[fx.Node]  # the nodes of consecutive iterations that do the same


def lift_rows(marked: MarkedLoop) -> MarkedLoop:
    """The loop, whose rows are written behind it, and read before it where it goes on."""
    if marked.from_odeint or len(marked.iterations) < 2:
        return marked
    for base in _written(marked):
        trajectory = _Trajectory.of(marked, base)
        if trajectory.is_whole():
            marked = trajectory.lifted()
    return _read_before(marked) if marked.repeats else marked


def _written(marked: MarkedLoop) -> list[fx.Node]:
    """The tensors from outside into which the last iteration writes by an index."""
    inside = _inside(marked)
    written = [n.args[0] for n in marked.iterations[-1] if n.target is operator.setitem]
    return [node for node in dict.fromkeys(written) if isinstance(node, fx.Node) and node not in inside]


def _inside(marked: MarkedLoop) -> set[fx.Node]:
    return {node for nodes in marked.iterations for node in nodes}


def _columns(marked: MarkedLoop, target: Any, base: fx.Node) -> list[Column] | None:
    """The calls of a function on a tensor, in their order; None if the iterations do not have as many."""
    rows = [[n for n in nodes if n.target is target and n.args[0] is base] for nodes in marked.iterations]
    return [list(column) for column in zip(*rows, strict=True)] if len(set(map(len, rows))) == 1 else None


def _computed_plainly(marked: MarkedLoop, own: set[fx.Node]) -> bool:
    """Whether some nodes of the loop compute with gradients exactly if the loop does."""
    modes = [gradient_modes(nodes, outer=marked.with_gradients) for nodes in marked.iterations]
    pairs = (pair for both in zip(marked.iterations, modes, strict=True) for pair in zip(*both, strict=True))
    return all(mode is marked.with_gradients for node, mode in pairs if node in own)


@dataclass(frozen=True)
class _Trajectory:
    """A tensor into which the steps write.

    Attributes:
        marked: The loop.
        base: The tensor.
        writes: What writes into it, column by column.
        reads: What reads it by an index, likewise.
        written: The rows that each column writes; None if these are no rows.
        read: The rows that each column reads.
    """

    marked: MarkedLoop
    base: fx.Node
    writes: list[Column]
    reads: list[Column]
    written: list[Rows | None]
    read: list[Rows | None]

    @classmethod
    def of(cls, marked: MarkedLoop, base: fx.Node) -> _Trajectory:
        writes, reads = (_columns(marked, target, base) for target in (operator.setitem, operator.getitem))
        if writes is None or reads is None:
            return cls(marked, base, [], [], [], [])
        written = [rows_among([node.args[1] for node in column]) for column in writes]
        return cls(marked, base, writes, reads, written, list(map(rows_of_reads, reads)))

    def is_whole(self) -> bool:
        """Whether every row is written by one iteration alone, and nothing else in the loop shows the tensor."""
        known = [row for row in self.written if row is not None]
        if not known or len(known) < len(self.written):
            return False
        moves = {(row.place, row.start, row.slope) for row in known}
        own = {node for column in (*self.writes, *self.reads) for node in column}
        fits = all(self._fits(node) for column in self.writes for node in column)
        follow = all(self._source(row) is not None for row in self.read)
        return len(moves) == 1 and fits and follow and _computed_plainly(self.marked, own) and self._stands_alone()

    def _fits(self, write: fx.Node) -> bool:
        """Whether a tensor is written that takes the whole row, or is known to be spread over it."""
        value = graphs.value(write.args[2]) if isinstance(write.args[2], fx.Node) else None
        return isinstance(value, torch.Tensor) and (
            value.shape == self._shape(write) or all(isinstance(size, int) for size in self._shape(write))
        )

    def _shape(self, write: fx.Node) -> torch.Size:
        with fake_tensors.fake_mode(), torch.no_grad():
            return graphs.value(self.base)[write.args[1]].shape

    def _source(self, read: Rows | None) -> int | None:
        """The column that wrote what is read, in earlier iterations; None unless it is the only one."""
        same = [k for k, row in enumerate(self.written) if row and read and row.others() == read.others()]
        if len(same) != 1 or read is None:
            return None
        source = self.written[same[0]]
        others = [row for row in self.written if row is not source]
        if source is None or not all(row is not None and source.is_apart(row) for row in others):
            return None
        lag, rest = divmod(source.start - read.start, read.slope)
        return same[0] if lag > 0 and not rest else None

    def _stands_alone(self) -> bool:
        """Whether nothing else shows the tensor, and what is read of it is not changed, and read in the loop alone."""
        own = {node for column in self.writes for node in column}
        shown = {node for column in self.reads for node in column}
        observer, storage, entries = Observer(), _storage(self.base), own | shown
        if _storage(self.marked.markers[0].args[0]) == storage:
            return False
        for node in (node for nodes in self.marked.iterations for node in nodes):
            operands = {n for n in node.all_input_nodes if _storage(n) == storage}
            if not operands <= shown | ({self.base} if node in entries else set()):
                return False
            if node not in own and storage in observer.written(node):
                return False
            if _storage(node) == storage:
                shown.add(node)
        inside = _inside(self.marked)
        return all(user in inside for node in shown for user in node.users)

    def lifted(self) -> MarkedLoop:
        """The loop without its writes; they follow behind it."""
        made = [[self._row(node) for node in column] for column in self.writes]
        rows = [[nodes[-1] for nodes in column] for column in made]
        for read, column in zip(self.read, self.reads, strict=True):
            k = self._source(read)
            assert read is not None and k is not None, "is_whole"
            self._forward(read, column, self.written[k], rows[k])
        following = self.marked.end.next
        with following.graph.inserting_before(following):
            for written, column, own in zip(self.written, self.writes, rows, strict=True):
                self._write_behind(written, column[0], own)
        became = {
            write: nodes for a, b in zip(self.writes, made, strict=True) for write, nodes in zip(a, b, strict=True)
        }
        became.update({node: [] for column in self.reads for node in column})
        iterations = [[m for n in nodes for m in became.get(n, [n])] for nodes in self.marked.iterations]
        for node in became:
            node.graph.erase_node(node)
        return replace(self.marked, iterations=iterations)

    def _row(self, write: fx.Node) -> list[fx.Node]:
        """What makes of the value that a step writes a row as the tensor takes it."""
        value, base = write.args[2], graphs.value(self.base)
        with write.graph.inserting_before(write):
            make = maker(write.graph, write.meta, gradients=self.marked.with_gradients)
            spread = (
                [] if graphs.value(value).shape == self._shape(write) else [make("expand", value, self._shape(write))]
            )
            value = [value, *spread][-1]
            if (graphs.value(value).dtype, graphs.value(value).device) == (base.dtype, base.device):
                return [*spread, make("clone", value)]
            return [*spread, make("to", value, base.device, base.dtype)]

    def _forward(self, read: Rows, column: Column, written: Rows | None, rows: Column) -> None:
        """Let what reads a row take what an earlier iteration made of it; in the first ones what the tensor held."""
        assert written is not None, "is_whole"
        lag, first = (written.start - read.start) // read.slope, self.marked.markers[0]
        for k, node in enumerate(column):
            if k < lag:
                with node.graph.inserting_before(first):
                    make = maker(node.graph, node.meta, gradients=self.marked.with_gradients)
                    node.replace_all_uses_with(make("clone", make(operator.getitem, *node.args)))
            else:
                node.replace_all_uses_with(rows[k - lag])

    def _write_behind(self, rows: Rows | None, write: fx.Node, values: Column) -> None:
        assert rows is not None, "is_whole"
        grid, base = self.marked.markers[0].args[0], graphs.value(self.base)
        make = maker(write.graph, write.meta, gradients=self.marked.with_gradients)
        if self.marked.repeats:
            whole = make(operators.collect, grid, len(values), values[:-1], values[-1:])
        else:
            whole = make(torch.stack, values)
        if place := rows.dimension(base.ndim):
            whole = make(torch.movedim, whole, 0, place)
        write.graph.call_function(operator.setitem, (self.base, index_of_all(make, rows, grid, 0), whole))


def _storage(node: Any) -> int | None:
    return fake_tensors.storage_of(graphs.value(node))


def _read_before(marked: MarkedLoop) -> MarkedLoop:
    """The loop, whose steps are given the rows that they read of what nothing in it writes to."""
    inside = _inside(marked)
    written = Observer().written_among(inside)
    last = [n.args[0] for n in marked.iterations[-1] if n.target is operator.getitem]
    outside = [n for n in dict.fromkeys(last) if isinstance(n, fx.Node) and n not in inside and not begins_iteration(n)]
    columns = [column for base in outside for column in _columns(marked, operator.getitem, base) or []]
    moved = {
        node
        for column in columns
        if rows_of_reads(column) and _storage(column[0]) not in written and _computed_plainly(marked, set(column))
        for node in column
    }
    for node in (node for nodes in marked.iterations for node in nodes if node in moved):
        marked.markers[0].prepend(node)
    return replace(marked, iterations=[[n for n in nodes if n not in moved] for nodes in marked.iterations])
