"""Store the states that the backward re-reads in the storage dtype, and nothing else per step.

Before:  step(y, ...): ...; return y_next           adjoint(a, y: f32[B, D], ...): ...
After:   step(y, ...): ...; return y_next, cast(y)  adjoint(a, y: f16[B, D], ...): y_wide: f32[B, D] = cast(y); ...
Scaled:  step(y, ...): ...; y_lo, s = store_0(y);   adjoint(a, y: u8[B, D], ..., s): y_wide = load_0(y, s); ...
         return y_next, y_lo, s

A carry that the adjoint does not read (a log-density, into which nothing is fed back) is not stored at all, unless
the recomputation of several steps reads it, where the policy asks for that (checkpoint). Integers
and states that are no wider than the storage dtype are stored as they are. Where the policy says so, each step's state
has a power-of-two scale of its own, which brings its largest entry to the upper end of the storage dtype's range.

A state that is stored in float16 without a scale, and that no evaluation reads in float16, is counted like those that
passes/count_underflow.py counts: it may underflow as well.

Requires: a Loop with an adjoint.
Ensures:  the step returns what the adjoint re-reads; the adjoint reads no carry by another way.
Error:    O(u) in the point at which each step is recomputed, u the unit roundoff of the storage dtype.
Source:   arXiv 2510.23498.
"""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from rampde_fx import graphs, operator_table, torch_private
from rampde_fx.loop import Loop
from rampde_fx.scales import power_of_two_scale

CAST = torch.ops.aten._to_copy.default
NARROW = torch.ops.rampde_fx.narrow.default
COUNT = torch.ops.rampde_fx.count_underflow.default
# Where the largest entry is put: twice this is below the largest number of the dtype. Others have float32's range.
TARGETS = {torch.float16: 2.0**14, torch.float8_e4m3fn: 2.0**7}


def store_states(loop: Loop) -> Loop:
    """Let the step return the carries that the adjoint reads, in their storage dtype, and widen them there."""
    if loop.adjoint is None:
        return loop
    storing = _Storing(loop)
    for carry in find_stored(loop):
        storing.store(carry)
    return storing.finished()


def find_stored(loop: Loop) -> list[int]:
    """The carries that the adjoint reads, and those from which several steps of these are recomputed."""
    read = [index for kind, index in loop.adjoint_inputs if kind == "operand" and index < loop.carries]
    if loop.segment() == 1:
        return read
    nodes, nexts = graphs.placeholders(loop.step)[: loop.carries], graphs.results(loop.step)
    while True:
        needed = graphs.ancestors([nexts[carry] for carry in read])
        more = [carry for carry, node in enumerate(nodes) if node in needed and carry not in read]
        if not more:
            return read
        read += more


def storage_dtype(value: torch.Tensor, wanted: torch.dtype) -> torch.dtype:
    """The dtype in which a state is stored."""
    return wanted if value.is_floating_point() and wanted.itemsize < value.dtype.itemsize else value.dtype


class _Storing:
    """The step and the adjoint while stored values are added to both."""

    def __init__(self, loop: Loop) -> None:
        self.loop = loop
        self.step, self.adjoint = graphs.copied(loop.step), graphs.copied(loop.adjoint)
        self.states, self.reads = graphs.placeholders(self.step), graphs.placeholders(self.adjoint)
        self.inputs = dict(zip(self.reads, loop.adjoint_inputs, strict=True))
        self.stored = list(loop.stored)
        self.values: list[fx.Node] = []
        self.wide: list[fx.Node] = []  # of each carry, what the adjoint reads
        self.low: list[fx.Node] = []  # the carries that are stored in float16 without a scale

    def store(self, carry: int) -> None:
        """Store a carry."""
        state = self.states[carry]
        read = next((node for node, kind in self.inputs.items() if kind == ("operand", carry)), None)
        read = read or self._placeholder(state.name, state)
        value = graphs.value(state)
        dtype = storage_dtype(value, self.loop.policy.storage_dtype)
        self._take(read, carry)
        if dtype == value.dtype or value.numel() == 0:
            self.values.append(state)
            self.wide.append(read)
        elif self.loop.policy.scales_storage and dtype in TARGETS:
            self._store_scaled(state, read, carry, dtype)
        else:
            narrows = dtype is torch.float16  # what overflows is NaN: an infinity of the user's is one in float16, too
            self.low += [state] if narrows else []
            self.values.append(self._at_end(NARROW if narrows else CAST, (state,), {"dtype": dtype}))
            self._widen(read, dtype, CAST, (read,), {"dtype": value.dtype})

    def _placeholder(self, name: str, like: fx.Node) -> fx.Node:
        with self.adjoint.graph.inserting_after(graphs.placeholders(self.adjoint)[-1]):
            node = graphs.placeholder(self.adjoint.graph, name)
        node.meta["val"] = graphs.value(like)
        return node

    def _take(self, read: fx.Node, carry: int) -> None:
        """Let a placeholder of the adjoint be the next stored value, which belongs to a carry."""
        self.inputs[read] = ("stored", len(self.stored))
        self.stored.append(carry)

    def _store_scaled(self, state: fx.Node, read: fx.Node, carry: int, dtype: torch.dtype) -> None:
        own, number = graphs.value(state).dtype, len(self.stored) - 1
        bits = torch.uint8 if dtype.itemsize == 1 else dtype  # few operations know float8: it travels as bytes

        def store(value: torch.Tensor) -> list[torch.Tensor]:
            scale = power_of_two_scale(TARGETS[dtype], value)
            return [(value * scale).to(dtype).view(bits), scale]

        def load(value: torch.Tensor, scale: torch.Tensor) -> list[torch.Tensor]:
            return [value.view(dtype).to(own) / scale]

        stores = torch_private.trace(store, [graphs.value(state)])
        self.step.add_submodule(f"store_{number}", stores)
        call = self._at_end(f"store_{number}", (state,))
        self.values += [self._at_end(operator.getitem, (call, i)) for i in range(2)]
        narrow, own_scale = graphs.results(stores)
        scale = self._placeholder(f"scale_{read.name}", own_scale)
        loads = torch_private.trace(load, [graphs.value(narrow), graphs.value(scale)])
        self.adjoint.add_submodule(f"load_{number}", loads)
        self._take(scale, carry)
        self._widen(read, bits, f"load_{number}", (read, scale))

    def _at_end(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> fx.Node:
        with self.step.graph.inserting_before(self.step.graph.output_node()):
            return _call(self.step.graph, target, args, kwargs)

    def _widen(self, read: fx.Node, dtype: torch.dtype, target: Any, args: tuple[Any, ...], kwargs: Any = None) -> None:
        """Let the placeholder of the adjoint have the storage dtype, and its readers read it widened."""
        read.meta["val"] = graphs.value(read).to(dtype)
        graph = self.adjoint.graph
        with graph.inserting_after(graphs.placeholders(self.adjoint)[-1]):
            wide = first = _call(graph, target, args, kwargs)
        if isinstance(target, str):
            with graph.inserting_after(first):
                wide = graph.call_function(operator.getitem, (first, 0))
        read.replace_all_uses_with(wide, delete_user_cb=lambda user: user is not first)
        self.wide.append(wide)

    def finished(self) -> Loop:
        """The loop that stores."""
        output = self.step.graph.output_node()
        outputs = list(output.args[0])
        uncounted = [state for state in self.low if not _is_counted(state)]
        if self.loop.counted and uncounted:  # read by wide operations alone, and yet rounded for the backward
            last = len(outputs) - len(self.loop.stored) - 1
            more = self._at_end(COUNT, (uncounted,))
            outputs[last] = self._at_end(torch.ops.aten.add.Tensor, (outputs[last], more))
        output.args = ((*outputs, *self.values),)
        kept = len(self.loop.stored)
        places = {p: node for node, (kind, p) in self.inputs.items() if kind == "stored" and p >= kept}
        taken = [places[p] for p in sorted(places)]  # the order of loop.stored, in which the load is fed
        load = graphs.refresh(graphs.part(self.adjoint, taken, self.wide))
        adjoint = graphs.refresh(self.adjoint)
        for node in [node for node in taken if not node.users]:  # read by the recomputation alone
            adjoint.graph.erase_node(node)
            del self.inputs[node]
        adjoint.recompile()
        return replace(
            self.loop,
            step=graphs.refresh(self.step),
            adjoint=adjoint,
            adjoint_inputs=tuple(self.inputs.values()),
            stored=tuple(self.stored),
            load=load,
        )


def _is_counted(state: fx.Node) -> bool:
    """Whether a state, or what only moves its entries, is counted where it enters an evaluation."""
    return any(
        user.target is COUNT
        or ((graphs.is_view(user) or operator_table.name_of(user.target) in operator_table.MOVES) and _is_counted(user))
        for user in state.users
    )


def _call(graph: fx.Graph, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> fx.Node:
    call = graph.call_module if isinstance(target, str) else graph.call_function
    node: fx.Node = call(target, args, kwargs)
    return node
