"""The operators that rampde_fx adds to torch: markers, and what a rewritten graph shows as one node.

Any other backend decomposes the markers to plain slices of t, gradients included. The rest appears in rewritten graphs
only; DECOMPOSITIONS spells out at emission what Inductor is to fuse.
"""

from __future__ import annotations

import torch

from rampde_fx import counts, torch_private

library = torch.library.Library("rampde_fx", "DEF")
library.define("step(Tensor t, int i, str policy) -> (Tensor, Tensor)")
library.define("end(Tensor t) -> Tensor")
# The user's detach() in a step, as an operation of its own: tracing leaves detach nodes that mean nothing.
library.define("stop_gradient(Tensor x) -> Tensor")
# A state as float16; what lies beyond its range becomes NaN, for a velocity may saturate at inf and hide it.
library.define("narrow(Tensor x) -> Tensor")
# One run of the reverse loop, counted on the host where the loop decides whether to run again.
library.define("record_sweep(Tensor overflow, Tensor attempt, int attempts, str loop) -> Tensor")


def _step(t: torch.Tensor, i: int, policy: str) -> tuple[torch.Tensor, torch.Tensor]:
    return t[i], t[i + 1] - t[i]


def _end(t: torch.Tensor) -> torch.Tensor:
    return t[-1]


def _narrow(x: torch.Tensor) -> torch.Tensor:
    low = x.to(torch.float16)
    return torch.where(low.abs() == float("inf"), float("nan"), low)


def _record_sweep(overflow: torch.Tensor, attempt: torch.Tensor, attempts: int, loop: str) -> torch.Tensor:
    counts.record(loop, int(attempt), overflow=bool(overflow), last=int(attempt) + 1 == attempts)
    return overflow.clone()


library.impl("step", _step, "CompositeImplicitAutograd")
library.impl("end", _end, "CompositeImplicitAutograd")
library.impl("stop_gradient", torch.clone, "CompositeExplicitAutograd")
library.impl("stop_gradient", torch_private.below_autograd(torch.ops.rampde_fx.stop_gradient), "Autograd")
library.impl("narrow", _narrow, "CompositeExplicitAutograd")
torch.library.register_autograd(
    "rampde_fx::narrow",
    lambda ctx, gradient: gradient.to(ctx.dtype),
    setup_context=lambda ctx, inputs, output: setattr(ctx, "dtype", inputs[0].dtype),
    lib=library,
)
library.impl("record_sweep", _record_sweep, "CPU")
torch.library.register_fake("rampde_fx::record_sweep", lambda overflow, *_: torch.empty_like(overflow), lib=library)

DECOMPOSITIONS = {torch.ops.rampde_fx.narrow.default: _narrow}
step, end = torch.ops.rampde_fx.step, torch.ops.rampde_fx.end
