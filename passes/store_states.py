"""Store the states that the backward re-reads in the storage dtype: all that a step stores, but kept activations.

Before:  step(y, ...): ...; return y_next           adjoint(a, y: f32[B, D], ...): ...
After:   step(y, ...): ...; return y_next, cast(y)  adjoint(a, y: f16[B, D], ...): y_wide: f32[B, D] = cast(y); ...
Scaled:  step(y, ...): ...; y_lo, s = store_0(y);   adjoint(a, y: u8[B, D], ..., s): y_wide = load_0(y, s); ...
         return y_next, y_lo, s

A carry that the adjoint does not read (a log-density, into which nothing is fed back) is not stored at all, unless the
policy asks for segments and their recomputation reads it. Integers and states that are no wider than the storage dtype
are stored as they are. Where the policy says so, each step's state has a power-of-two scale of its own, which brings
its largest entry to the upper end of the storage dtype's range.

Beside activations that are kept, the states that evaluations read are stored no more coarsely than these read them. A
pullback that reads both would otherwise differentiate at two points at once, and terms that cancel in exact arithmetic
would not. Where they read what the step makes of a state, and in a dtype of less range than the policy's, the state is
stored as it is.

A state that is stored in float16 without a scale, and that no evaluation reads in float16, is counted like those that
passes/count_underflow.py counts, whatever the velocity's dtype: it may underflow as well. Only the parts that the
adjoint reads count (not the log-density behind the position in one tensor).

Requires: a Loop behind keep_activations. One without an adjoint is left as it is.
Ensures:  each carry that the adjoint re-reads has a slot; the adjoint reads it from there alone.
Error:    O(u) in the point at which each step is recomputed, u the unit roundoff of the storage dtype.
Source:   arXiv 2510.23498.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from rampde_fx.ir import graphs, operator_table, tracing
from rampde_fx.ir.ends import Adjoint, Operand, Saved, StateSlot, remaining
from rampde_fx.ir.loops import KeptLoop, Loop, StoredLoop
from rampde_fx.runtime.scales import power_of_two_scale

CAST = torch.ops.aten._to_copy.default
NARROW = torch.ops.rampde_fx.narrow.default
COUNT = torch.ops.rampde_fx.count_underflow.default
# The targets of scaled states: where the largest entry is put. Twice this is below the largest number of the dtype. A
# dtype that is not here has float32's range, and no scale.
TARGETS = {torch.float16: 2.0**14, torch.float8_e4m3fn: 2.0**7}


def store_states(loop: KeptLoop) -> StoredLoop:
    """Let the step return the carries that the adjoint reads, in their storage dtype, and widen them there."""
    if loop.adjoint is None:
        return loop.then(StoredLoop)
    storing = _Storing(loop, loop.adjoint)
    for carry in find_stored(loop, loop.adjoint):
        storing.store(carry)
    return storing.finished()


def find_stored(loop: Loop, adjoint: Adjoint) -> list[int]:
    """The carries that the adjoint reads, and those from which several steps of these are recomputed."""
    read = [e.operand for e in adjoint.inputs if isinstance(e, Operand) and e.operand < loop.carries]
    if loop.segment() == 1:
        return read
    nodes, nexts = loop.inputs().carries, loop.results().carries
    while True:
        needed = graphs.ancestors([nexts[carry] for carry in read])
        more = [carry for carry, node in enumerate(nodes) if node in needed and carry not in read]
        if not more:
            return read
        read += more


def storage_dtype(value: torch.Tensor, wanted: torch.dtype) -> torch.dtype:
    """The dtype in which a state is stored."""
    return wanted if value.is_floating_point() and wanted.itemsize < value.dtype.itemsize else value.dtype


def beside_activations(loop: KeptLoop, state: fx.Node) -> torch.dtype:
    """The storage dtype of the policy, or where the loop keeps activations the finest in which they read the state.

    An evaluation that reads the state itself is finite only where the state is in that dtype, too. One that reads what
    the step has made of it says nothing of its range: then no range is given up, and the state is stored as it is.
    """
    stored = loop.policy.storage_dtype
    itself, made = _read_by_evaluations(loop.step, state) if loop.kept else (set[torch.dtype](), set[torch.dtype]())
    if not itself | made:
        return stored
    finest = min(stored, *itself, *made, key=lambda dtype: torch.finfo(dtype).eps)
    gives_up = torch.finfo(finest).max < torch.finfo(stored).max
    return graphs.value(state).dtype if gives_up and not itself else finest


def _read_by_evaluations(step: fx.GraphModule, state: fx.Node) -> tuple[set[torch.dtype], set[torch.dtype]]:
    """The dtypes in which evaluations read a state itself, and what the step makes of it before them."""
    found = set[torch.dtype](), set[torch.dtype]()
    pending, seen = [(state, True)], set[tuple[fx.Node, bool]]()
    while pending:
        node, is_itself = pending.pop()
        if (node, is_itself) in seen:
            continue
        seen.add((node, is_itself))
        for user in node.users:
            if user.op == "call_module" and user.meta.get("role") == "velocity":
                entries = graphs.placeholders(step.get_submodule(str(user.target)))
                read = [entry for x, entry in zip(user.args, entries, strict=True) if x is node]
                found[0 if is_itself else 1].update(*map(_read_in, read))
            elif graphs.is_float(user):
                pending.append((user, is_itself and graphs.moves(user)))
    return found


def _read_in(entry: fx.Node) -> set[torch.dtype]:
    """The dtypes in which an evaluation reads one of its inputs."""
    found = set[torch.dtype]()
    for user in entry.users:
        if graphs.is_view(user):
            found |= _read_in(user)
        elif graphs.is_float(entry) and user.op != "output":
            found.add(graphs.value(user if user.target in (CAST, NARROW) else entry).dtype)
    return found


# A view of a part of a tensor: its target, and its arguments but for the tensor.
_Part = tuple[Any, ...]


class _Storing:
    """The step and the adjoint while slots are added to both."""

    def __init__(self, loop: KeptLoop, adjoint: Adjoint) -> None:
        self.loop, self.before = loop, adjoint
        self.step, self.adjoint = graphs.copied(loop.step), graphs.copied(adjoint.module)
        self.states = graphs.placeholders(self.step)
        self.inputs = dict(zip(graphs.placeholders(self.adjoint), adjoint.inputs, strict=True))
        self.slots = list(loop.slots)
        self.values: list[fx.Node] = []
        self.unscaled: list[fx.Node] = []  # the carries that are stored in float16 without a scale
        self.parts: dict[fx.Node, dict[_Part, None] | None] = {}  # what the adjoint reads of carries
        self.finer: dict[torch.dtype, None] = {}  # the dtypes of those that are not stored as the policy says

    def store(self, carry: int) -> None:
        """Give a carry a slot, from which the adjoint reads it if it does."""
        state, value = self.states[carry], graphs.value(self.states[carry])
        dtype = storage_dtype(value, beside_activations(self.loop, state))
        if dtype != storage_dtype(value, self.loop.policy.storage_dtype):
            self.finer[dtype] = None
        if dtype == value.dtype or value.numel() == 0:
            stored, load = [state], _load(lambda x: [x], [state])
        elif self.loop.policy.scales_storage and dtype in TARGETS:
            stored, load = self._scaled(state, dtype)
        else:
            narrows = dtype is torch.float16  # what overflows is NaN: an infinity of the user's is one in float16, too
            self.unscaled += [state] if narrows else []
            stored = [self._at_end(f"{state.name}_stored", NARROW if narrows else CAST, (state,), {"dtype": dtype})]
            stored[0].meta["val"] = value.to(dtype)
            load = _load(lambda x: [x.to(value.dtype)], stored)
        read = next((node for node, entry in self.inputs.items() if entry == Operand(carry)), None)
        if read is not None:
            self.parts[state] = _parts_read(read)
            self._read_from(read, stored, load)
        self.slots.append(StateSlot(carry, load))
        self.values += stored

    def _scaled(self, state: fx.Node, dtype: torch.dtype) -> tuple[list[fx.Node], fx.GraphModule]:
        """A state with a scale of its own, as it is stored, and what loads it."""
        own = graphs.value(state).dtype
        bits = torch.uint8 if dtype.itemsize == 1 else dtype  # few operations know float8: it travels as bytes

        def store(value: torch.Tensor) -> list[torch.Tensor]:
            scale = power_of_two_scale(TARGETS[dtype], value)
            return [(value * scale).to(dtype).view(bits), scale]

        def load(value: torch.Tensor, scale: torch.Tensor) -> list[torch.Tensor]:
            return [value.view(dtype).to(own) / scale]

        name, stores = f"store_{len(self.slots)}", tracing.trace(store, [graphs.value(state)])
        self.step.add_submodule(name, stores)
        with self.step.graph.inserting_before(self.step.graph.output_node()):
            call = self.step.graph.call_module(name, (state,))
        call.meta["role"] = "storage"
        names = [f"{state.name}_stored", f"{state.name}_scale"]
        stored = [self._at_end(part, operator.getitem, (call, i)) for i, part in enumerate(names)]
        for item, result in zip(stored, graphs.results(stores), strict=True):
            item.meta["val"] = graphs.value(result)
        return stored, _load(load, stored)

    def _at_end(self, name: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> fx.Node:
        with self.step.graph.inserting_before(self.step.graph.output_node()):
            return graphs.call(self.step.graph, name, target, *args, **(kwargs or {}))

    def _read_from(self, read: fx.Node, stored: list[fx.Node], load: fx.GraphModule) -> None:
        """Let the adjoint take what is stored of a carry instead of the carry, and load it."""
        graph, number = self.adjoint.graph, len(self.slots)
        parts = [read]
        for value in stored[1:]:
            with graph.inserting_after(list(self.inputs)[-1]):
                parts.append(graphs.placeholder(graph, f"scale_{read.name}"))
            self.inputs[parts[-1]] = Saved(number, len(parts) - 1)
            parts[-1].meta["val"] = graphs.value(value)
        self.inputs[read] = Saved(number)
        if graphs.body(load):
            with graph.inserting_after(list(self.inputs)[-1]):
                wide = first = self._loaded(parts, load, number)
            if first.op == "call_module":
                with graph.inserting_after(first):
                    wide = graphs.item(graph, f"{read.name}_wide", first, 0)
            read.replace_all_uses_with(wide, delete_user_cb=lambda user: user is not first)
        read.meta["val"] = graphs.value(stored[0])

    def _loaded(self, parts: list[fx.Node], load: fx.GraphModule, number: int) -> fx.Node:
        """A call of the load, or the one operation that it is."""
        if len(graphs.body(load)) > 1:
            self.adjoint.add_submodule(f"load_{number}", load)
            call = self.adjoint.graph.call_module(f"load_{number}", tuple(parts))
            call.meta["role"] = "storage"
            return call
        (node,) = graphs.body(load)
        args = fx.map_arg(node.args, dict(zip(graphs.placeholders(load), parts, strict=True)).__getitem__)
        return graphs.call(self.adjoint.graph, f"{parts[0].name}_wide", node.target, *args, **node.kwargs)

    def finished(self) -> StoredLoop:
        """The loop that stores."""
        output = self.step.graph.output_node()
        outputs = list(output.args[0])
        uncounted = [node for state in self.unscaled if not _is_counted(state) for node in self._uncounted(state)]
        if uncounted:  # read by wide operations alone, and yet rounded for the backward
            place = len(outputs) - self.loop.tail()[0]
            more = self._at_end("underflow", COUNT, (uncounted,))
            if self.loop.counted:
                both = (outputs[place - 1], more)
                outputs[place - 1] = self._at_end("underflow", torch.ops.aten.add.Tensor, both)
            else:
                outputs.insert(place, more)
        output.args = ((*outputs, *self.values),)
        adjoint = replace(
            self.before,
            module=graphs.refresh(self.adjoint),
            inputs=tuple(self.inputs.values()),
            evaluations=remaining(self.before.evaluations, self.adjoint),
        )
        return self.loop.then(
            StoredLoop,
            step=graphs.refresh(self.step),
            adjoint=adjoint,
            slots=tuple(self.slots),
            counted=self.loop.counted or bool(uncounted),
            notes=(*self.loop.notes, *self._told()),
        )

    def _uncounted(self, state: fx.Node) -> list[fx.Node]:
        """The state, or those parts of it that the adjoint reads and that are not counted yet."""
        parts = self.parts.get(state)
        if parts is None:
            return [state]
        counted = _parts_counted(state)
        return [self._at_end("part", part[0], (state, *part[1:])) for part in parts if part not in counted]

    def _told(self) -> list[str]:
        """A note on states that are not stored as the policy says."""
        policy = self.loop.policy.storage_dtype
        return [
            f"states are stored in {stored}, for the velocity reads them so, or what the step makes of them, not in"
            f" {policy}: beside activations that are kept, a rounded state would be another point"
            for stored in self.finer
        ]


def _load(function: Callable[..., list[torch.Tensor]], stored: list[fx.Node]) -> fx.GraphModule:
    """What maps stored values to a state, as a module of its own."""
    names = ["stored", "scale"][: len(stored)]
    traced = tracing.trace(function, [graphs.value(node) for node in stored])
    return graphs.refresh(graphs.named(traced, names))


def _is_counted(state: fx.Node) -> bool:
    """Whether a state, or what only moves its entries, is counted where it enters an evaluation."""
    return any(
        user.target is COUNT
        or (
            (graphs.is_view(user) or operator_table.properties(user.target).dtype == "follows")
            and not graphs.is_part(user)
            and _is_counted(user)
        )
        for user in state.users
    )


def _parts_counted(state: fx.Node) -> set[_Part]:
    """Of a state itself: what is counted of a sum with it says nothing of its own entries."""
    return {_written(user) for user in state.users if graphs.is_part(user) and _is_counted(user)}


def _parts_read(node: fx.Node) -> dict[_Part, None] | None:
    """The parts of a state that the adjoint reads, of sums with it, too, in order; None if it reads the whole."""
    found = dict[_Part, None]()
    for user in node.users:
        if graphs.is_part(user):
            more = None if len(user.all_input_nodes) > 1 or user.kwargs else {_written(user): None}
        elif operator_table.properties(user.target).update == "add":
            more = _parts_read(user) if graphs.value(user).shape == graphs.value(node).shape else None
        else:
            more = None
        if more is None:
            return None
        found |= more
    return found


def _written(view: fx.Node) -> _Part:
    return view.target, *view.args[1:]
