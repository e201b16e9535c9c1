"""Let parameters in low precision have gradients that are summed up in the accumulation dtype.

Before:  step(y: f32, t, dt, w: bf16):                        k = mm(cast(y, bf16), w);  ...
After:   preamble(w: bf16): w_wide = cast(w, f32)
         step(y: f32, t, dt, w_wide: f32):  w = cast(w_wide, bf16);  k = mm(cast(y, bf16), w);  ...

The cast up and the cast down change no number. The loop takes gradients of the wide tensor, and sums and unscales them
in its dtype; autograd casts the total down, once. An input that differs from step to step is cast up and down inside
the step, for each of its gradients is complete there.

Requires: a Loop whose invariants are hoisted. One without narrow inputs is left as it is.
Ensures:  every floating input whose gradient is wanted, carries aside, is as wide as the widest state.
Source:   arXiv 2510.23498 accumulates gradients in high precision.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import fx

from rampde_fx.ir import graphs
from rampde_fx.ir.loops import HoistedLoop, Loop, WidenedLoop
from rampde_fx.policy_text import word_of

CAST = torch.ops.aten._to_copy.default
NAMED = 3  # inputs, in a note


def widen_parameters(loop: HoistedLoop) -> WidenedLoop:
    """Cast narrow inputs with a gradient up before they enter the step, and down again inside."""
    narrow = find_narrow(loop)
    if not narrow:
        return loop.then(WidenedLoop)
    step = graphs.copied(loop.step)
    inputs, dtype = graphs.placeholders(step), accumulation_dtype(loop)
    first = loop.first_invariant
    # A per-step input is cast up and down inside of the step. An invariant arrives wide, from the preamble, and is cast
    # down alone: its placeholder is `wide` itself.
    for i in narrow:
        own = graphs.value(inputs[i]).dtype
        readers = list(inputs[i].users)
        with step.graph.inserting_after(inputs[-1]):
            last = wide = inputs[i]
            if i < first:
                last = wide = step.graph.call_function(CAST, (inputs[i],), {"dtype": dtype})
        with step.graph.inserting_after(inputs[-1] if wide.op == "placeholder" else last):
            again = step.graph.call_function(CAST, (wide,), {"dtype": own})
        for reader in readers:
            reader.replace_input_with(inputs[i], again)
        if wide.op == "placeholder":
            wide.meta["val"] = graphs.value(wide).to(dtype)
    preamble = _widening(loop, [i - first for i in narrow if i >= first], dtype)
    given = graphs.placeholders(loop.step)
    notes = (*loop.notes, *_told([given[i] for i in narrow if i >= first], dtype))
    return loop.then(WidenedLoop, step=graphs.refresh(step), preamble=preamble, notes=notes)


def find_narrow(loop: Loop) -> list[int]:
    """The inputs of the step, but carries, whose gradients would be rounded below the accumulation dtype."""
    dtype = accumulation_dtype(loop)
    return [
        i
        for i, (node, needed) in enumerate(zip(graphs.placeholders(loop.step), loop.needs_grad, strict=True))
        if needed and i >= loop.carries and graphs.is_float(node) and graphs.value(node).dtype.itemsize < dtype.itemsize
    ]


def accumulation_dtype(loop: Loop) -> torch.dtype:
    """The widest dtype of the states' numbers."""
    states = (graphs.value(node) for node in loop.inputs().carries)
    dtypes = [state.dtype.to_real() for state in states if graphs.has_derivatives(state.dtype)]
    return max(dtypes, key=lambda dtype: dtype.itemsize, default=torch.float32)


def _told(parameters: Sequence[fx.Node], dtype: torch.dtype) -> Iterator[str]:
    """How narrow invariants are treated, and what the loop cannot mend."""
    for own in dict.fromkeys(graphs.value(node).dtype for node in parameters):
        names = [node.name for node in parameters if graphs.value(node).dtype is own]
        count, narrow = len(names), word_of(own)
        told = ", ".join(names[:NAMED]) + (f" and {count - NAMED} more" if count > NAMED else "")
        yield (
            f"in {narrow}: {told}; gradients are summed up in {word_of(dtype)} and rounded to"
            f" {narrow} once, at the end; where an optimizer updates these tensors themselves, it loses small steps"
        )


def _widening(loop: HoistedLoop, narrow: list[int], dtype: torch.dtype) -> fx.GraphModule | None:
    """The preamble, with some of its results in a wider dtype."""
    if not narrow:
        return loop.preamble
    preamble = graphs.copied(loop.preamble) if loop.preamble is not None else _identity(loop)
    output = preamble.graph.output_node()
    results = list(output.args[0])
    with preamble.graph.inserting_before(output):
        for i in narrow:
            results[i] = preamble.graph.call_function(CAST, (results[i],), {"dtype": dtype})
    output.args = (tuple(results),)
    return graphs.refresh(preamble)


def _identity(loop: Loop) -> fx.GraphModule:
    invariants = loop.inputs().invariants
    return graphs.extract(loop.step, [], invariants, invariants)
