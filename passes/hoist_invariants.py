"""Move what depends on invariants alone out of the loop.

Before:  step(y, t, dt, g, v):  w = g * v / norm(v);  k = f(y, w);  ...
After:   preamble(g, v): w = g * v / norm(v);   step(y, t, dt, w):  k = f(y, w);  ...

The preamble is evaluated once, in the accumulation dtype, and differentiated by autograd outside of the loop.

Requires: a Loop whose step is functional. One without such nodes is left as it is.
Ensures:  no node of the step that computes anything depends on invariants alone; views stay where they are read.
"""

from __future__ import annotations

from rampde_fx.ir import graphs
from rampde_fx.ir.loops import HoistedLoop, Loop


def hoist_invariants(loop: Loop) -> HoistedLoop:
    """Split the step into a preamble of the invariants and a step that reads the preamble's results."""
    split = graphs.split_invariants(loop.step, loop.first_invariant)
    if split is None:
        return loop.then(HoistedLoop)
    preamble, step, read = split
    wanted = [n for n, needed in zip(graphs.placeholders(loop.step), loop.needs_grad, strict=True) if needed]
    differentiable = graphs.depends_on(loop.step.graph, wanted, by_gradient=True)
    needs_grad = [
        *loop.needs_grad[: loop.first_invariant],
        *(node in differentiable and graphs.is_differentiable(node) for node in read),
    ]
    return loop.then(HoistedLoop, preamble=preamble, step=step, needs_grad=tuple(needs_grad))
