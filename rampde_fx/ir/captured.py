"""A marked loop as it was captured, before it is rolled up.

Its markers, the operators step, end, repeat, enter, leave and leave_search, are defined in runtime/operators.py.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import fx

from rampde_fx.ir import graphs
from rampde_fx.ir.sources import CarrySource, Key, Source, carries_among
from rampde_fx.policy import PrecisionPolicy
from rampde_fx.runtime import operators

STEP = {torch.ops.rampde_fx.step, torch.ops.rampde_fx.step.default}
END = {
    torch.ops.rampde_fx.end,
    torch.ops.rampde_fx.end.default,
    operators.repeat,
    operators.leave,
    operators.leave_search,
}


Owner = dict[fx.Node, tuple[int, Key]]  # of a value in a loop: its iteration, and its key there


class Leave(NamedTuple):
    """The arguments of leave, which ends an odeint."""

    states: list[fx.Node]
    nexts: list[fx.Node]
    collected: list[fx.Node]
    search: fx.Node | None
    outputs: Any
    every: Any
    method: str
    evaluations: int
    problem: str


class LeaveSearch(NamedTuple):
    """The arguments of leave_search, which ends a search for adaptive steps."""

    states: list[fx.Node]
    nexts: list[fx.Node]
    collected: list[fx.Node]
    errors: int
    t: fx.Node
    numbers: fx.Node
    order: Any
    max_steps: Any
    rtol: Any
    atol: Any
    own_norm: bool
    until_event: bool
    method: str
    evaluations: int
    problem: str


@dataclass(frozen=True)
class MarkedLoop:
    """A marked loop in a captured graph.

    Attributes:
        policy: The policy that the markers carry.
        markers: The markers that begin an iteration: a step for each, or the one enter of an odeint.
        end: The marker that ends the loop: end, repeat, leave or leave_search.
        iterations: The nodes between two markers, one list per iteration, in graph order.
        with_gradients: Whether gradients are on where the loop stands.
        monitored: Whether a monitor was open where it was captured.
        notes: Sentences for the report.
        autocast: Whether torch.autocast may be on where the loop, or its backward, stands.
    """

    policy: PrecisionPolicy
    markers: list[fx.Node]
    end: fx.Node
    iterations: list[list[fx.Node]]
    with_gradients: bool
    monitored: bool
    notes: tuple[str, ...] = ()
    autocast: bool = False

    @property
    def from_odeint(self) -> bool:
        """Whether odeint left its markers: the one iteration stands for all, its states named by enter and leave."""
        return self.markers[0].target is operators.enter

    @property
    def searches(self) -> bool:
        """Whether the one iteration is tried by a search for adaptive steps."""
        return self.end.target is operators.leave_search

    @property
    def repeats(self) -> bool:
        """Whether all iterations after the captured ones repeat these."""
        return self.end.target is operators.repeat

    def leave(self) -> Leave:
        """What the end of an odeint that is no search tells."""
        return Leave(*self.end.args)

    def leave_search(self) -> LeaveSearch:
        """What the end of a search tells."""
        return LeaveSearch(*self.end.args)

    def left(self) -> Leave | LeaveSearch:
        """What the end of an odeint tells, be it a search or not."""
        return self.leave_search() if self.searches else self.leave()

    def holder(self) -> fx.GraphModule:
        """The module in whose graph the loop stands: the captured one, or a checkpointed body inside it."""
        return self.end.graph.owning_module


@dataclass(frozen=True)
class Run:
    """Consecutive equal iterations of a marked loop.

    Attributes:
        iterations: The nodes of each iteration, aligned position by position.
        sources: For every position, the source of each node argument, in order; a key is a value of the same
            iteration.
        outputs: For each key that is read outside of the run, the iterations whose value is read.
        entered: Of an odeint, its times and carries in the order in which enter names them; its outputs are wanted of
            every step. Empty for all other loops.
        extended: Whether the run goes on behind its last iteration, up to the end of the loop. Of a value that is read
            at the end the iteration is then counted from there, -1 for the last one.
        unread: Of a run of one iteration, keys of floating tensors from which nothing follows that is read, as the next
            state where the loop ends.
    """

    iterations: list[list[fx.Node]]
    sources: list[list[Source | Key]]
    outputs: dict[Key, list[int]]
    entered: tuple[Source, ...] = ()
    extended: bool = False
    unread: tuple[Key, ...] = ()

    @property
    def from_odeint(self) -> bool:
        """Whether it is the one iteration of an odeint, which stands for all."""
        return bool(self.entered)

    def stacked(self) -> list[Key]:
        """Keys of the outputs to be stacked: all but the carries of which only the last value is read."""
        carried = {(s.key, s.lag) for row in self.sources for s in row if isinstance(s, CarrySource)}
        if self.extended:
            ends = {(key, -1 - j) for key, lag in carried for j in range(lag)}
        else:
            ends = {(key, len(self.iterations) - 1) for key, lag in carried if lag == 1}
        return [key for key, ks in self.outputs.items() if self.from_odeint or any((key, k) not in ends for k in ks)]


@dataclass(frozen=True)
class CapturedStep:
    """One iteration of a run as functional ATen.

    Attributes:
        inputs: The source of every placeholder of the step; carries first.
        step: Maps the inputs to the next carries, then to the outputs; before find_states also to what is unread, and
            to what the inputs have become.
        outputs: Keys of the values that are read outside of the run, apart from final carries.
        after: For every placeholder the node that holds its value after the step (before find_states).
        written: The outside tensors that carries were updated in, by the index of the carry.
        unread: How many values the step gives that nothing reads (before find_states).
    """

    inputs: list[Source]
    step: fx.GraphModule
    outputs: list[Key]
    after: list[fx.Node]
    written: dict[int, fx.Node] = field(default_factory=dict)
    unread: int = 0

    def carries(self) -> int:
        """Number of carried states."""
        return len(carries_among(self.inputs))


def owner_of(iterations: list[list[fx.Node]], markers: list[fx.Node]) -> Owner:
    """Whose each value of some iterations is, their times included."""
    owner: Owner = {}
    for k, (nodes, marker) in enumerate(zip(iterations, markers, strict=False)):
        owner.update({node: (k, position) for position, node in enumerate(nodes)})
        for user in marker.users:
            if user.target is operator.getitem:
                owner[user] = (k, ("t", "dt")[user.args[1]])
    return owner


def begins_iteration(node: fx.Node) -> bool:
    """Whether a captured node is the marker at the start of an iteration."""
    return node.target in STEP or node.target is operators.enter


def begins_loop(node: fx.Node) -> bool:
    """Whether a captured node marks the start of a loop's first iteration."""
    return begins_iteration(node) and (node.target is operators.enter or node.args[1] == 0)


def ends_loop(node: fx.Node) -> bool:
    """Whether a captured node marks the end of a loop."""
    return node.target in END


def reads_end(user: fx.Node) -> bool:
    """Whether a reader of a trajectory reads its last entry alone."""
    index = user.args[1] if user.target is operator.getitem else None
    return index == -1 or (isinstance(index, tuple) and len(index) > 1 and index[0] == -1)


def has_loop(graph_module: fx.GraphModule) -> bool:
    """Whether the graph, or one inside it, holds any marker."""
    return first_marker(graph_module) is not None


def repeats(graph_module: fx.GraphModule) -> bool:
    """Whether the graph, or one inside it, holds a loop whose last iterations stand for more of them."""
    return any(node.target is operators.repeat for node in graphs.all_nodes(graph_module))


def first_marker(graph_module: fx.GraphModule) -> fx.Node | None:
    """The first marker of the graph, or of one inside it."""
    return next(filter(begins_iteration, graphs.all_nodes(graph_module)), None)
