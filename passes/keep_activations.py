"""Keep what the velocity's pullbacks read, instead of recomputing the velocity, if the policy says so.

Before:  step(y, dt, w):  k = velocity_0(y, w); ...        adjoint(a, y, dt, w):  k, r, w_lo = velocity_0_forward(y, w)
         return y_next                                         dy, dw = velocity_0_pullback(r, w_lo, dt * a); ...
After:   step(y, dt, w):  k, r = velocity_0_forward(y, w)  adjoint(a, r, dt, w):  w_lo = velocity_0_replay(w)
         ...;  return y_next, r                                dy, dw = velocity_0_pullback(r, w_lo, dt * a); ...

Under checkpoint="auto" as many of a step's evaluations are kept as fit into the loop's budget, from the last one on: so
nothing is kept but what pullbacks read, for an earlier evaluation needs no result of a later one. The others are
recomputed. A budget of 0 leaves the loop as it is.

Kept are tensors that depend on a carry, in the dtype they have. What depends on no carry, views, casts to a wider dtype
and states between the evaluations are made again.

Requires: a Loop whose adjoint, if any, reads its carries as operands. One without an adjoint, or whose schedule
          keeps no activations, is left as it is.
Ensures:  the adjoint evaluates no velocity that is kept; the step's last results are what it reads instead.
Source:   Griewank and Walther, Evaluating Derivatives, 2008, chapter 4: reverse mode without checkpoints.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from rampde_fx.ir import graphs
from rampde_fx.ir.budgets import activations, bytes_of, kept_bytes
from rampde_fx.ir.ends import ActivationSlot, Evaluation, Operand, Saved, remaining
from rampde_fx.ir.loops import KeptLoop, WatchedLoop
from rampde_fx.schedules import Activations, MemoryBudget
from rampde_fx.torch_private import fake_tensors, shapes

aten = torch.ops.aten


def keep_activations(loop: WatchedLoop) -> KeptLoop:
    """Let the step return what the pullbacks read of its velocity evaluations."""
    if loop.adjoint is None or not isinstance(loop.policy.schedule, Activations | MemoryBudget):
        return loop.then(KeptLoop)
    if isinstance(loop.policy.schedule, Activations):
        return _kept(loop, loop.adjoint.evaluations, None)
    if loop.keeps is not None:
        return _kept(loop, loop.adjoint.evaluations[len(loop.adjoint.evaluations) - loop.keeps :], None)
    unknown = shapes.is_data_dependent(loop.steps)
    kept = _kept(loop, loop.adjoint.evaluations, 0 if unknown else loop.budget)
    return replace(kept, notes=(*kept.notes, _told(kept, unknown)))


def _kept(loop: WatchedLoop, evaluations: Sequence[Evaluation], budget: int | None) -> KeptLoop:
    """The loop that keeps the last ones of some evaluations, as many as fit into a budget, all of them where None."""
    keeping, count = _Keeping(loop, budget), 0
    if budget != 0:
        for evaluation in reversed(evaluations):  # keeping one may leave an earlier one without readers
            if not keeping.keep(evaluation):
                break
            count += 1
    return replace(keeping.finished(), kept=count) if count else loop.then(KeptLoop)


def _told(loop: KeptLoop, unknown: bool) -> str:
    """What was kept of a budget."""
    assert loop.adjoint is not None
    if unknown:
        return 'checkpoint="auto" keeps nothing: the number of steps is known at run time only'
    sizes = [loop.steps, *bytes_of(loop, activations(loop))]
    captured = (
        ", by the sizes at the capture, which may change" if any(isinstance(n, torch.SymInt) for n in sizes) else ""
    )
    return (
        f'checkpoint="auto" keeps the activations of {loop.kept} of {len(loop.adjoint.evaluations)} evaluations, '
        f"{kept_bytes(loop):,} bytes of a budget of {loop.budget:,}{captured}"
    )


def find_kept(read: list[fx.Node], varying: set[fx.Node]) -> list[fx.Node]:
    """The nodes from which what is read can be made again at no cost; none is a placeholder."""
    kept: dict[fx.Node, None] = {}
    open_nodes = list(reversed(read))
    while open_nodes:
        node = open_nodes.pop()
        if node not in varying or node.op == "placeholder":
            continue
        if not isinstance(graphs.value(node), torch.Tensor) or _is_cheap(node):
            open_nodes += node.all_input_nodes
        else:
            kept[node] = None
    return list(kept)


def _is_cheap(node: fx.Node) -> bool:
    """Whether a node is a view, a cast or an entry of what it reads, which takes no more bytes than the node."""
    if node.target is operator.getitem:
        return False
    (operand, *others) = node.all_input_nodes
    is_cast = node.target is aten._to_copy.default
    cheap = (graphs.is_view(node) or is_cast) and not others
    return cheap and shapes.takes_no_more_bytes(graphs.value(operand), graphs.value(node))


@dataclass(frozen=True)
class _Split:
    """A velocity that recomputes, split in what the step evaluates and what is left to the adjoint.

    Attributes:
        forward: Name of the step's submodule, inputs -> outputs, kept values.
        outputs: Number of its outputs.
        kept: The kept nodes of the velocity.
        direct: For each result that the adjoint reads which kept value it is, None where it is made again.
        replay: Name of the adjoint's submodule, inputs, kept values -> results made again; None where all are kept.
        inputs: The inputs that the replay reads, and whether it reads their sizes alone.
        reread: The kept values that the replay reads.
    """

    forward: str
    outputs: int
    kept: tuple[fx.Node, ...]
    direct: tuple[int | None, ...]
    replay: str | None
    inputs: dict[int, bool]
    reread: list[int]


class _Keeping:
    """The step and the adjoint while values move from the adjoint's recomputation to the step's results."""

    def __init__(self, loop: WatchedLoop, left: int | None) -> None:
        assert loop.adjoint is not None
        self.loop, self.before, self.left = loop, loop.adjoint, left
        self.step, self.adjoint = graphs.copied(loop.step), graphs.copied(loop.adjoint.module)
        self.inputs = dict(zip(graphs.placeholders(self.adjoint), loop.adjoint.inputs, strict=True))
        self.carries = [n for n, e in self.inputs.items() if isinstance(e, Operand) and e.operand < loop.carries]
        self.varying = graphs.depends_on(self.adjoint.graph, self.carries)
        self.splits: dict[tuple[str, tuple[int, ...], tuple[bool, ...]], _Split] = {}
        self.values: list[fx.Node] = []
        self.slots: list[ActivationSlot] = []

    def keep(self, evaluation: Evaluation) -> bool:
        """Let the step return what the adjoint reads of an evaluation; whether it fits into what is left."""
        self.adjoint.graph.eliminate_dead_code()
        found = [node for node in self.adjoint.graph.nodes if node.name == evaluation.forward and node.users]
        if not found:
            return True
        (call,) = found
        (step_call,) = [node for node in self.step.graph.nodes if node.name == evaluation.step_call]
        items = sorted(call.users, key=lambda user: user.args[1])
        key = (
            call.target,
            tuple(item.args[1] for item in items),
            tuple(arg in self.varying for arg in call.args),
        )
        if key not in self.splits:
            self.splits[key] = self._split(*key, graphs.results(self.step.get_submodule(str(step_call.target))))
        split = self.splits[key]
        if not self._spend(split):
            return False
        kept = self._moved(step_call, split)
        again = iter(self._replayed(call, split, kept))
        for item, j in zip(items, split.direct, strict=True):
            item.replace_all_uses_with(next(again) if j is None else kept[j])
        return True

    def _spend(self, split: _Split) -> bool:
        """Take what an evaluation keeps in all steps from the budget, if it fits."""
        if self.left is None:
            return True
        sizes = bytes_of(self.loop, map(graphs.value, split.kept))
        if any(map(shapes.is_data_dependent, sizes)):
            return False
        needed = sum(map(shapes.size_hint, sizes))
        fits = needed <= self.left
        self.left -= needed if fits else 0
        return fits

    def _split(self, name: str, read: tuple[int, ...], varying: tuple[bool, ...], outputs: list[Any]) -> _Split:
        velocity = self.adjoint.get_submodule(name)
        inputs, results = graphs.placeholders(velocity), graphs.results(velocity)
        wanted = [results[i] for i in read]
        reached = graphs.depends_on(velocity.graph, [n for n, varies in zip(inputs, varying, strict=True) if varies])
        kept = find_kept(wanted, reached)
        again = [node for node in wanted if node not in kept]
        suffix = f"_{count}" if (count := sum(key[0] == name for key in self.splits)) else ""
        forward, replay = f"{name}{suffix}", f"{name.removesuffix('forward')}replay{suffix}" if again else None
        self.step.add_submodule(forward, graphs.part(velocity, inputs, [*results[: len(outputs)], *kept]))
        made = graphs.ancestors(again, kept)
        needed = {i: _sizes_alone(node, made) for i, node in enumerate(inputs) if node in made}
        reread = [j for j, node in enumerate(kept) if any(user in made for user in node.users)]
        if replay is not None:
            module = graphs.part(velocity, [*(inputs[i] for i in needed), *(kept[j] for j in reread)], again)
            self.adjoint.add_submodule(replay, module)
        direct = tuple(kept.index(node) if node in kept else None for node in wanted)
        return _Split(forward, len(outputs), tuple(kept), direct, replay, needed, reread)

    def _moved(self, evaluation: fx.Node, split: _Split) -> list[fx.Node]:
        """The placeholders of the adjoint that stand for the kept values, which the step returns."""
        evaluation.target = split.forward
        made = []
        for j, node in enumerate(split.kept, start=split.outputs):
            with self.step.graph.inserting_before(self.step.graph.output_node()):
                value = graphs.item(self.step.graph, f"kept_{node.name}", evaluation, j)
            with self.adjoint.graph.inserting_after(list(self.inputs)[-1]):
                made.append(graphs.placeholder(self.adjoint.graph, f"{evaluation.name}_{node.name}"))
            made[-1].meta["val"] = fake_tensors.detached(graphs.value(node))
            self.inputs[made[-1]] = Saved(len(self.slots))
            self.slots.append(ActivationSlot(evaluation.name))
            self.values.append(value)
        return made

    def _replayed(self, call: fx.Node, split: _Split, kept: list[fx.Node]) -> list[fx.Node]:
        """The results that are made again from the kept values."""
        if split.replay is None:
            return []
        graph = self.adjoint.graph
        args = [self._of_same_shape(call.args[i]) if sizes else call.args[i] for i, sizes in split.inputs.items()]
        with graph.inserting_before(call):
            replay = graph.call_module(split.replay, (*args, *(kept[j] for j in split.reread)))
            return [graphs.item(graph, "again", replay, j) for j in range(split.direct.count(None))]

    def _of_same_shape(self, node: fx.Node) -> fx.Node:
        """A placeholder that is there anyhow, if there is one of this shape, or the node itself."""
        shape = str(graphs.value(node).shape)
        others = (p for p in self.inputs if p not in self.carries and isinstance(graphs.value(p), torch.Tensor))
        return next((p for p in others if str(graphs.value(p).shape) == shape), node)

    def finished(self) -> KeptLoop:
        """The loop that keeps."""
        output = self.step.graph.output_node()
        output.args = ((*output.args[0], *self.values),)
        self.adjoint.graph.eliminate_dead_code()
        for node in [node for node in self.carries if not node.users]:
            self.adjoint.graph.erase_node(node)
            del self.inputs[node]
        for module in (self.step, self.adjoint):
            module.delete_all_unused_submodules()
        adjoint = replace(
            self.before,
            module=graphs.refresh(self.adjoint),
            inputs=tuple(self.inputs.values()),
            evaluations=remaining(self.before.evaluations, self.adjoint),
        )
        return self.loop.then(KeptLoop, step=graphs.refresh(self.step), adjoint=adjoint, slots=tuple(self.slots))


def _sizes_alone(node: fx.Node, readers: set[fx.Node]) -> bool:
    """Whether the readers ask for nothing but the sizes of a node."""
    return all(user.target is aten.sym_size.int for user in node.users if user in readers)
