"""Which values a search keeps of the steps that count, and how the loop behind it reads them instead of its own steps.

The step of the search and that of the loop evaluate the same stages. So the search has what the loop would give of each
step: its outputs, and what it stores for the backward, which follows from the state at its start. The loop keeps its
adjoint, which recomputes each step from what is stored. Behind the steps that count the loop may have one more, of size
0: it gives the last state, and the velocity there, which the search carries.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from rampde_fx.emit.recurrence import Body
from rampde_fx.ir import graphs
from rampde_fx.ir.ends import Inputs, Results
from rampde_fx.ir.loops import CompensatedLoop
from rampde_fx.runtime import kept_steps
from rampde_fx.schedules import Activations

COUNT = torch.ops.rampde_fx.count_underflow.default
FINDINGS = 7  # results of leave_search, before what is kept
_numbers = itertools.count()


def search_of(call: fx.Node) -> fx.Node | None:
    """The call of the search that found the steps of a loop."""
    search = call.kwargs.get("search")
    return search.args[0] if isinstance(search, fx.Node) else None


def evaluated_once(search: fx.Node) -> None:
    """Let the statistics of a solve count the evaluations of its search alone."""
    for finding in list(search.users):
        for user in [user for user in finding.users if user.target is kept_steps.evaluations]:
            if user.args[0] is finding:
                user.replace_all_uses_with(user.args[1])
                user.graph.erase_node(user)


def why_twice(search: CompensatedLoop, loop: CompensatedLoop, *, apart: bool) -> str:
    """Why a loop evaluates its steps itself; empty if it reads what the search keeps.

    Args:
        search: The search.
        loop: The loop behind it.
        apart: Whether they do not stand in the graph that is compiled itself.
    """
    if apart:
        return "it is computed again by a checkpoint around it"
    if isinstance(loop.policy.schedule, Activations):
        return 'checkpoint="none" stores what the velocities compute inside'
    if loop.slots and loop.segment() != 1:
        return "its states are stored in segments"
    if loop.corrections:
        return "its sums are compensated"
    if loop.unrolled:
        return "it is unrolled"
    carries, results = loop.inputs().carries, loop.results()
    if not set(carries).issuperset(graphs.placeholders_among(results.stored)):
        return "what it stores follows from more than its states"
    pairs = zip(picked(search, loop), results.outputs, strict=True)
    if search.carries < loop.carries or any(a is not None and _differ(a, b) for a, b in pairs):
        return "its states are not those of the search"
    return ""


def picked(search: CompensatedLoop, loop: CompensatedLoop) -> list[fx.Node | None]:
    """What the step of the search has for each per-step output of the loop; None for a count that it does not have."""
    nodes, errors = [*search.results().carries, *search.results().outputs], search.carries
    places = [search.named[m] for m in range(loop.carries)]
    places += search.named[errors + search.estimates :]
    outputs = len(loop.results().outputs) - loop.counted
    found: list[fx.Node | None] = [nodes[places[loop.named.index(loop.carries + o)]] for o in range(outputs)]
    if loop.counted:
        found.append(nodes[-1] if search.counted else None)
    return found


def _differ(a: fx.Node, b: fx.Node) -> bool:
    x, y = graphs.value(a), graphs.value(b)
    return (x.shape, x.dtype, x.device) != (y.shape, y.dtype, y.device)


class KeptSteps:
    """What one search keeps for the loop behind it.

    Args:
        search: The search.
        loop: The loop, of which why_twice says nothing.
    """

    def __init__(self, search: CompensatedLoop, loop: CompensatedLoop) -> None:
        self.search, self.loop, self.number = search, loop, next(_numbers)
        self.picked, results = picked(search, loop), loop.results()
        carries = loop.inputs().carries
        of_states = [node for node in loop.step.graph.nodes if node.target is COUNT and _follow(node, carries)]
        self.stored = len(results.stored)
        # What is stored of a state, and what of it underflows there.
        self.part = Body(loop.step, Inputs(carries, [], [], []), Results([], [], [], [*results.stored, *of_states]))
        self.prepared = self.part.prepare([])
        # In the structure of what the search keeps: values for the backward, then the loop's outputs.
        self.outputs = [graphs.value(node) for node in results.outputs]
        self.tokens = int(bool(self.stored or self.outputs))  # nothing is kept where the end alone is read

    def results_of_search(self) -> Results[Any]:
        """What the body of the search computes: its states and errors, then what it keeps of its own."""
        found = self.search.results()
        further = [node for node in self.picked if node is not None]
        return Results(found.carries, [*found.outputs[: self.search.estimates], *further], [], [])

    def given(self, graph_module: fx.GraphModule, call: fx.Node) -> list[fx.Node]:
        """What the loop reads of the emitted search, for the graph that calls it: a token, and what it carries last."""
        emitted, graph = search_of(call), graph_module.graph
        assert emitted is not None, "why_twice was asked"
        values = graphs.results(graph_module.get_submodule(str(emitted.target)))[FINDINGS:]
        nodes = [graph.call_function(operator.getitem, (emitted, FINDINGS + i)) for i in range(len(values))]
        for node, value in zip(nodes, values, strict=True):
            node.meta["example_value"] = graphs.value(value)
        return nodes

    def begin(self, t: torch.Tensor) -> list[torch.Tensor]:
        """The token of a run, if there is anything to keep."""
        return [kept_steps.begin_keeping(t, self.number)] * self.tokens

    def keep(
        self, token: torch.Tensor, states: Sequence[Any], further: Sequence[Any], counts: torch.Tensor
    ) -> torch.Tensor:
        """A zero, once the values of a step from these states are kept; further is what results_of_search adds."""
        stored, of_states = self._of(states)
        given = iter(further)
        outputs = [self._count(counts) if node is None else next(given) for node in self.picked]
        if of_states:
            outputs[-1] = outputs[-1] + sum(of_states)
        return kept_steps.keep(token, [*stored, *outputs], counts)

    def read(
        self, given: Sequence[Any], like: torch.Tensor
    ) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
        """The last states, the outputs of all steps, and what is stored of each, from what the search gives."""
        token, finals = given[: self.tokens], [value.clone() for value in given[self.tokens :]]
        if not token:
            return finals, [], []
        stored, _ = self._of(finals)
        outputs = [self._last(i, finals, like) for i in range(len(self.outputs))]
        found = kept_steps.kept(*token, [*stored, *outputs], like)
        return finals, found[self.stored :], found[: self.stored]

    def _of(self, states: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        found = self.part(*states[: self.loop.carries], *self.prepared)
        return found[: self.stored], found[self.stored :]

    def _last(self, i: int, finals: Sequence[Any], like: torch.Tensor) -> torch.Tensor:
        """An output of a step of size 0 at the end: its state, its velocity; nothing reads its quartic term."""
        if self.loop.counted and i == len(self.outputs) - 1:
            return self._count(like)
        place = self.loop.named.index(self.loop.carries + i)
        if place < len(finals):
            return finals[place].clone()
        return torch.zeros_like(finals[place % self.loop.carries], dtype=self.outputs[i].dtype)

    def _count(self, like: torch.Tensor) -> torch.Tensor:
        return torch.zeros(3, dtype=torch.int64, device=like.device)  # as count_underflow gives


def _follow(node: fx.Node, inputs: Sequence[fx.Node]) -> bool:
    return set(inputs).issuperset(graphs.placeholders_among([node]))
