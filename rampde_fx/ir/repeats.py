"""What is read of a loop that goes on behind its captured iterations: values at its end, and lists that it fills.

repeat gives the values that move on with the iterations as they are at last, collect what a list holds to which each
iteration appends. Both are read here as values of a run and, once the run is rolled up, from its results.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from rampde_fx.errors import MutationError, RewriteError
from rampde_fx.ir import graphs
from rampde_fx.ir.captured import MarkedLoop, Owner, Run
from rampde_fx.ir.rows import rows_of_reads
from rampde_fx.ir.sources import Key, PerStepSource
from rampde_fx.runtime import operators
from rampde_fx.torch_private import fake_tensors


def final_values(marked: MarkedLoop) -> dict[fx.Node, fx.Node]:
    """What reads, by each captured value, what it is at last."""
    found = {marked.end.args[1][user.args[1]]: user for user in marked.end.users if user.users}
    return found if marked.repeats else {}


def read_at_end(node: fx.Node, k: int, marked: MarkedLoop, count: int) -> Iterator[int]:
    """The iterations of which a value is read outside of its run, which has `count` of them and goes on.

    Counted from the end, where that is read; k where the value of iteration k itself is, or those of all from it on.
    """
    if node in final_values(marked):
        yield k - count
    if any(user is not marked.end for user in node.users):
        yield k


def check_extension(marked: MarkedLoop, run: Run) -> None:
    """Check that a run which goes on repeats its last iterations, by the iterations themselves.

    Raises:
        RewriteError: if the interpreter's state promised what they do not keep.
    """
    own = [source for row in run.sources for source in row if isinstance(source, PerStepSource)]
    if len(run.iterations) < 2 or not all(rows_of_reads(source.values) for source in own):
        raise RewriteError(
            "a loop that was captured in part does not repeat its last iterations",
            required="equal iterations at its end",
            fix="report this as a bug, with the loop",
            where=graphs.user_line(marked.markers[0]),
        )


@dataclass(frozen=True)
class RepeatedResults:
    """The results of a run that goes on.

    Attributes:
        graph: The graph that holds them; nodes are made where it inserts.
        marked: The loop, whose last run it is.
        owner: Of the values in it the iteration and the key.
        finals: By the key and the lag of a carry what it is at last.
        stacked: By its key the stack of a value.
        written: Storages that are written to behind the loop.
    """

    graph: fx.Graph
    marked: MarkedLoop
    owner: Owner
    finals: dict[tuple[Key, int], fx.Node]
    stacked: dict[Key, fx.Node]
    written: set[int]

    def rewire(self) -> None:
        """Let all that reads the loop read its results."""
        users = dict.fromkeys(user for node in self.owner for user in node.users)
        lists = [user for user in users if user.target is operators.collect]
        finals = final_values(self.marked)
        self._check_names(finals, lists)
        for node, final in finals.items():
            read = self._at_end(node)
            read.meta.setdefault("example_value", graphs.value(node))
            final.replace_all_uses_with(read)
        for collected in lists:
            if any(node in self.owner for node in collected.args[3]):
                self._rewrite_list(collected)
        inside = {*self.owner, self.marked.end}
        for node, (k, key) in self.owner.items():
            readers = [user for user in node.users if user not in inside]
            if readers:
                read = self._entry(key, k)
                read.meta.setdefault("example_value", graphs.value(node))
            for user in readers:
                user.replace_input_with(node, read)
        for user in list(self.marked.end.users):
            self.graph.erase_node(user)
        self.marked.end.args = ()

    def _check_names(self, finals: dict[fx.Node, fx.Node], lists: list[fx.Node]) -> None:
        """Refuse writes behind the loop to what is read of it under two names, or by a list."""
        names: dict[int, fx.Node] = {}
        in_lists = [node for collected in lists for node in collected.all_input_nodes if node in self.owner]
        inside = {*self.owner, *lists, self.marked.end}
        others = [node for node in self.owner if any(user not in inside for user in node.users)]
        for node in (*in_lists, *in_lists, *finals, *others):  # a list is a second name
            storage = fake_tensors.storage_of(graphs.value(node))
            if storage is None or storage not in self.written:
                continue
            if storage in names:
                raise MutationError(
                    f"'{graphs.user_name(node)}' of a step is updated in place after the loop, and has another name",
                    required="in-place updates of what leaves the loop under one name",
                    fix="collect a clone(), or write y = y * 2 instead of y *= 2",
                    where=graphs.user_line(node),
                )
            names[storage] = node

    def _at_end(self, node: fx.Node) -> fx.Node:
        k, key = self.owner[node]
        lag = 1 + self._last() - k
        final = self.finals.get((key, lag))
        return self._entry(key, -lag) if final is None else final

    def _entry(self, key: Key, k: int) -> fx.Node:
        """One entry of a stack: a clone, for the user may update it in place."""
        return self.graph.call_method("clone", (self.graph.call_function(torch.select, (self.stacked[key], 0, k)),))

    def _rewrite_list(self, collected: fx.Node) -> None:
        """A list's stack: the stacks of what is appended, interleaved, behind a stack of what it held before."""
        before, each = list(collected.args[2]), collected.args[3]
        values = [self.owner[node] for node in each]
        rows = self._rows_before(before, values)
        before = before[: len(before) - rows * len(each)]
        with self.graph.inserting_before(collected):
            columns = [self._column(value, rows) for value in values]
            later = columns[0]
            if len(columns) > 1:
                later = self.graph.call_function(torch.stack, (columns, 1))
                later = self.graph.call_method("flatten", (later, 0, 1))
            parts = [self.graph.call_function(torch.stack, (before,)), later] if before else [later]
            whole = self.graph.call_function(torch.cat, (parts,)) if before else later
            whole = self.graph.call_method("clone", (whole,))
        whole.meta = dict(collected.meta)
        collected.replace_all_uses_with(whole)
        self.graph.erase_node(collected)

    def _rows_before(self, before: list[Any], values: list[tuple[int, Key]]) -> int:
        """How many of the iterations just before appended in the same way what the list holds at its end."""
        place = {value: node for node, value in self.owner.items()}
        rows = 0
        while all(k - rows - 1 >= 0 for k, _ in values):
            wanted = [place.get((k - rows - 1, key)) for k, key in values]
            end = len(before) - rows * len(values)
            if end < len(values) or before[end - len(values) : end] != wanted:
                break
            rows += 1
        return rows

    def _column(self, value: tuple[int, Key], rows: int) -> fx.Node:
        """The stack of a value from some rows before its captured iteration on, as long as those of other values."""
        k, key = value
        behind = self._last() - k
        if k == rows and not behind:
            return self.stacked[key]
        return self.graph.call_function(operator.getitem, (self.stacked[key], slice(k - rows, -behind or None)))

    def _last(self) -> int:
        return max(k for k, _ in self.owner.values())
