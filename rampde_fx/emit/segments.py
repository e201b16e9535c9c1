"""Loops in segments: every K-th state is stored, and the backward recomputes the states between two of them.

Forward:   for every segment:         store(y); for each of its K steps: y = step(y)
Backward:  for every segment, the last one first:
               y = load(stored);      for its first K - 1 steps: y = step(y), store(y)
               for each of its K steps, in reverse: a = adjoint(a, stored y)

Where K does not divide N the last segment is padded: its surplus steps are evaluated, and change no carry. Corrections
of compensated sums begin at zero in every recomputed segment.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from rampde_fx.emit.recurrence import Body, at, iterate, owned
from rampde_fx.ir import graphs
from rampde_fx.ir.ends import Inputs, Results, StateSlot
from rampde_fx.ir.loops import CompensatedLoop
from rampde_fx.torch_private import shapes

Tensors = Sequence[torch.Tensor]


class Recomputation:
    """The step as far as the stored carries follow from one another.

    Attributes:
        operands: The placeholders of the step, beside carries and corrections, that it reads.
        body: Maps (stored carries, operands, corrections) to (next stored carries, next corrections).
    """

    def __init__(self, loop: CompensatedLoop) -> None:
        self.slots = [slot for slot in loop.slots if isinstance(slot, StateSlot)]
        carries = [slot.carry for slot in self.slots]
        inputs, results = loop.inputs(), loop.results()
        corrected = [p for p, carry in enumerate(loop.corrections) if carry in carries]
        nexts = [results.carries[i] for i in carries]
        next_corrections = [results.corrections[p] for p in corrected]
        reached = graphs.ancestors([*nexts, *next_corrections])
        rest = list(enumerate([*inputs.per_step, *inputs.invariants], start=loop.carries))
        self.operands = [i for i, node in rest if node in reached]
        states = [inputs.carries[i] for i in carries]
        self.body = Body(
            loop.step,
            Inputs(
                states,
                [node for node in inputs.per_step if node in reached],
                [node for node in inputs.invariants if node in reached],
                [inputs.corrections[p] for p in corrected],
            ),
            Results(nexts, [], [], next_corrections),
            [carries.index(loop.corrections[p]) for p in corrected],
        )
        self._store = graphs.part(loop.step, states, results.stored)

    def store(self, carries: Tensors) -> list[torch.Tensor]:
        """What is stored of the step's carries."""
        return self._stored([carries[slot.carry] for slot in self.slots])

    def states(
        self, segments: Segments, begin: Tensors, row: Tensors, operands: tuple[Tensors, Sequence[Any]]
    ) -> list[torch.Tensor]:
        """What a segment's steps store, K each, from what its first one stored, with stacks and invariants."""
        starts = self.body.starts(self._loaded(begin))

        def step(carries: Tensors, entry: Tensors, shared: Any) -> list[Any]:
            nexts = segments.step(self.body, carries, entry, *shared)
            return [*nexts, *self._stored(nexts[: len(self.slots)])]

        index, *active = row
        row = [index[:-1], *(flag[1:] for flag in active)]  # a step that leads to a surplus one is not needed
        _, later = segments.iterate(step, starts, row, operands)
        return [torch.cat([first[None], rest]) for first, rest in zip(begin, later, strict=True)]

    def _loaded(self, stored: Tensors) -> list[torch.Tensor]:
        """The carries, from what is stored of them."""
        values = iter(stored)
        return [fx.Interpreter(slot.load).run(*(next(values) for _ in range(slot.parts)))[0] for slot in self.slots]

    def _stored(self, states: Tensors) -> list[torch.Tensor]:
        return list(map(owned, fx.Interpreter(self._store).run(*states)))


class Segments:
    """The N steps of a loop as segments of K, where K is at least 2."""

    def __init__(self, loop: CompensatedLoop) -> None:
        self._loop, self._unrolled = loop, loop.unrolled
        numbers = isinstance(loop.steps, int) and isinstance(loop.segment(), int)
        self.padded = not (numbers and loop.steps % loop.segment() == 0)

    def count(self) -> int | torch.SymInt:
        """How many segments; computed where it is asked for, for a trace knows no other symbolic sizes."""
        return (self._loop.steps + self._loop.segment() - 1) // self._loop.segment()

    def advance(
        self, body: Body, recomputation: Recomputation, starts: list[Any], stacks: list[Any], invariants: list[Any]
    ) -> tuple[list[Any], list[Any], list[Any]]:
        """All steps of a body(*carries, *slices, *invariants).

        Returns:
            The final carries; the per-step outputs, N each; what is stored at the start of each segment.
        """
        counts: list[int] = []

        def step(carries: Tensors, entry: Tensors, shared: Any) -> list[Any]:
            return self.step(body, carries, entry, *shared)

        def segment(carries: Tensors, row: Tensors, shared: Any) -> list[Any]:
            finals, outputs = self.iterate(step, carries, row, shared)
            counts[:] = [len(outputs)]
            return [*finals, *outputs, *recomputation.store(carries)]

        rows = self._rows(starts[0].device)
        finals, collected = self.iterate(segment, starts, rows, (stacks, invariants))
        return finals, list(map(self._flat, collected[: counts[0]])), collected[counts[0] :]

    def sweep(
        self,
        adjoint: Body,
        starts: list[Any],
        own: tuple[list[Any], list[Any]],
        recomputed: list[int | None],
        recomputation: Recomputation,
        stored: list[Any],
        operands: tuple[list[Any], list[Any]],
        fit: Callable[[list[Any]], torch.Tensor | None],
    ) -> tuple[list[Any], list[Any], torch.Tensor | None]:
        """All steps of the adjoint, in reverse.

        Args:
            adjoint: Maps (carries, slices, invariants) to (next carries, per-step outputs).
            starts: Its initial carries.
            own: The stacks of which it reads slices, and its invariants.
            recomputed: For each slice which stored value it is; None for one of a stack.
            recomputation: How the stored values between the segments' starts come about.
            stored: What the forward stored at the start of each segment.
            operands: The stacks and the invariants of the recomputation.
            fit: Whether the stored values that are recomputed fit their dtype, None where they always do.

        Returns:
            The final carries; the per-step outputs, N each, in the order of the steps; whether everything fits.
        """

        def step(carries: Tensors, entry: Tensors, shared: Any) -> list[Any]:
            (place, *entry), (states, stacks, invariants) = entry, shared
            given = iter([at(stack, entry[0]) for stack in stacks])
            slices = [next(given) if p is None else at(states[p], place) for p in recomputed]
            return self._kept(adjoint(*carries, *slices, *invariants), carries, entry)

        def segment(carries: Tensors, row: Tensors, shared: Any) -> list[Any]:
            (number, *row), (stored, operands, own) = row, shared
            states = recomputation.states(self, [at(stack, number) for stack in stored], row, operands)
            places = torch.arange(row[0].shape[0], device=number.device)
            reverse = [values.flip(0) for values in (places, *row)]
            finals, outputs = self.iterate(step, carries, reverse, (states, *own))
            fits = fit(states)
            return [*finals, *outputs, *([] if fits is None else [fits])]

        device = starts[0].device
        rows = [values.flip(0) for values in (torch.arange(self.count(), device=device), *self._rows(device))]
        finals, collected = self.iterate(segment, starts, rows, (stored, operands, own))
        flags = [flag.all() for flag in collected if flag.ndim == 1 and flag.dtype == torch.bool]
        outputs = collected[: len(collected) - len(flags)]
        return finals, [self._flat(stack.flip(0, 1)) for stack in outputs], flags[0] if flags else None

    def step(
        self, body: Body, carries: Tensors, entry: Tensors, stacks: Tensors, invariants: Sequence[Any]
    ) -> list[Any]:
        """One step, the one at an entry of a row; a surplus one leaves the carries as they are."""
        slices = [at(stack, entry[0]) for stack in stacks]
        return self._kept(body(*carries, *slices, *invariants), carries, entry)

    def iterate(
        self,
        body: Callable[[Tensors, Tensors, Any], list[Any]],
        starts: Tensors,
        rows: Tensors,
        shared: Any,
    ) -> tuple[list[Any], list[Any]]:
        """All steps of a body(carries, slices of the rows, what all share, a tree)."""
        leaves, structure = pytree.tree_flatten(shared)
        given = list({id(leaf): leaf for leaf in leaves}.values())  # scan takes nothing twice
        places = [next(p for p, value in enumerate(given) if value is leaf) for leaf in leaves]
        n, m = len(starts), len(rows)

        def run(*args: Any) -> list[Any]:
            shared = pytree.tree_unflatten([args[n + m + place] for place in places], structure)
            return body(args[:n], args[n : n + m], shared)

        return iterate(run, list(starts), list(rows), given, steps=rows[0].shape[0], unrolled=self._unrolled)

    def _rows(self, device: torch.device) -> list[torch.Tensor]:
        """Of shape (M, K): the index of every step, and where steps are padded which are the loop's."""
        steps, count, length = self._loop.steps, self.count(), self._loop.segment()
        index = torch.arange(count * length, device=device).reshape(count, length)
        return [torch.where(index < steps, index, steps - 1), index < steps] if self.padded else [index]

    def _kept(self, results: list[Any], carries: Tensors, entry: Tensors) -> list[Any]:
        if not self.padded:
            return results
        nexts = [torch.where(entry[1], new, old) for new, old in zip(results, carries, strict=False)]
        return [*nexts, *results[len(carries) :]]

    def _flat(self, stack: torch.Tensor) -> torch.Tensor:
        """What segments of steps returned, as the N steps returned it."""
        whole = stack.flatten(0, 1)
        if not self.padded:
            return whole
        if shapes.is_data_dependent(self._loop.steps):  # a slice would have a size of its own, to torch 2.11
            return whole.index_select(0, torch.arange(self._loop.steps, device=whole.device))
        return whole[: self._loop.steps]
