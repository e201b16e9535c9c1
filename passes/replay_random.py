"""Draw the random numbers of a step so that the backward's recomputation draws them again.

Before:  step(y, t, w):               m = bernoulli(x, 0.9);  k = f(m * x);  ...
After:   step(y, t, index, w, seed):  m = rampde_fx.bernoulli(seed, index, 0, x, 0.9);  k = f(m * x);  ...

The numbers are a function of a seed, which the loop draws from torch's generator once per call, of the index of the
step, of the number of the draw within the step and of the entry: nothing is stored, and every evaluation has numbers of
its own. Under one torch.manual_seed they differ from eager's, as those of torch.compile do.

Requires: a CapturedStep.
Ensures:  no node of the step depends on torch's random number generator; a step without draws is left as it is.
Raises:   RandomVelocityError for a distribution without a counter-based form.
Source:   Salmon et al., Parallel random numbers: as easy as 1, 2, 3, SC 2011.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from rampde_fx.errors import RandomVelocityError
from rampde_fx.ir import graphs, tracing
from rampde_fx.ir.captured import CapturedStep
from rampde_fx.ir.sources import ORDER, IndexSource, SeedSource
from rampde_fx.torch_private import fake_tensors

aten = torch.ops.aten
ops = torch.ops.rampde_fx


def replay_random(captured: CapturedStep) -> CapturedStep:
    """Replace the random numbers of a captured step by functions of a seed and of the step's index."""
    drawing = [node for node in captured.step.graph.nodes if graphs.draws_random_numbers(node)]
    for node in drawing:
        if node.target not in DRAWS:
            raise RandomVelocityError(
                f"a step of the loop draws random numbers by {node.target}, which the backward cannot draw again",
                required="dropout, or uniform, normal, Bernoulli or exponential numbers",
                fix="draw before the loop and use the drawn tensor in it",
                where=graphs.user_line(node),
            )
    if not drawing:
        return captured
    drawn = graphs.value(drawing[0])
    return _replayed(captured, (drawn[0] if isinstance(drawn, tuple) else drawn).device)  # of a dropout, with its mask


def _replayed(captured: CapturedStep, device: torch.device) -> CapturedStep:
    first = sum(ORDER.index(type(source)) < ORDER.index(IndexSource) for source in captured.inputs)
    step = graphs.copied(captured.step)
    nodes, results = graphs.placeholders(step), graphs.results(step)
    position = {node: i for i, node in enumerate(graphs.placeholders(captured.step))}
    twins = dict(zip(captured.step.graph.nodes, step.graph.nodes, strict=True))
    step.graph.output_node().args = ((*results, *(twins[node] for node in captured.after)),)
    with fake_tensors.fake_mode():
        index, seed = (torch.empty((), dtype=torch.int64, device=device) for _ in range(2))

    def run(*args: Any) -> Any:
        *rest, seed = args
        return _Drawing(step, seed, rest.pop(first)).run(*rest)

    values = [graphs.value(node) for node in nodes]
    traced = tracing.trace(run, [*values[:first], index, *values[first:], seed])
    names = [node.name for node in nodes]
    traced = graphs.named(traced, [*names[:first], "index", *names[first:], "seed"])
    found, inputs = graphs.results(traced), graphs.placeholders(traced)
    after = [
        found[len(results) + i] if node is not captured.after[i] else inputs[i + (i >= first)]
        for node, i in position.items()
    ]
    traced.graph.output_node().args = (tuple(found[: len(results)]),)
    traced.graph.eliminate_dead_code()
    sources = captured.inputs
    return replace(
        captured,
        inputs=[*sources[:first], IndexSource(str(device)), *sources[first:], SeedSource(str(device))],
        step=graphs.refresh(traced),
        after=[*after[:first], inputs[first], *after[first:], inputs[-1]],
    )


class _Drawing(fx.Interpreter):
    """Runs a step, and numbers its draws."""

    def __init__(self, step: fx.GraphModule, seed: torch.Tensor, index: torch.Tensor) -> None:
        super().__init__(step)
        self.stream = (seed, index)
        self.draws = 0

    def run_node(self, n: fx.Node) -> Any:
        if not graphs.draws_random_numbers(n):
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        self.draws += 1
        kwargs = {key: value for key, value in kwargs.items() if key not in ("generator", "pin_memory")}
        return DRAWS[n.target]((*self.stream, self.draws - 1), *args, **kwargs)


def _of_size(draw: Any) -> Callable[..., torch.Tensor]:
    return lambda stream, size, **kwargs: draw(*stream, torch.empty(size, **kwargs))


def _of_like(draw: Any) -> Callable[..., torch.Tensor]:
    return lambda stream, like, **kwargs: draw(*stream, torch.empty_like(like, **kwargs))


def _bernoulli(stream: Any, chances: torch.Tensor) -> torch.Tensor:
    return (ops.uniform(*stream, chances) < chances).to(chances.dtype)


def _uniform(stream: Any, like: torch.Tensor, low: float = 0.0, high: float = 1.0) -> torch.Tensor:
    return low + (high - low) * ops.uniform(*stream, like)


def _normal(stream: Any, like: torch.Tensor, mean: float = 0.0, std: float = 1.0) -> torch.Tensor:
    return mean + std * ops.normal(*stream, like)


def _exponential(stream: Any, like: torch.Tensor, rate: float = 1.0) -> torch.Tensor:
    return -torch.log1p(-ops.uniform(*stream, like)) / rate


def _dropout(stream: Any, x: torch.Tensor, p: float, train: bool | None) -> tuple[torch.Tensor, torch.Tensor]:
    if train is False:
        return x.clone(), torch.ones_like(x, dtype=torch.bool)
    kept = ops.bernoulli(*stream, x, 1.0 - p)
    return x * kept * (1.0 / (1.0 - p) if p < 1.0 else 0.0), kept > 0


DRAWS: dict[Any, Callable[..., Any]] = {
    aten.bernoulli.p: lambda stream, like, p: ops.bernoulli(*stream, like, p),
    aten.bernoulli.default: _bernoulli,
    aten.rand.default: _of_size(ops.uniform),
    aten.rand_like.default: _of_like(ops.uniform),
    aten.randn.default: _of_size(ops.normal),
    aten.randn_like.default: _of_like(ops.normal),
    aten.uniform.default: _uniform,
    aten.normal_functional.default: _normal,
    aten.normal.float_float: lambda stream, mean, std, size, **kw: _normal(stream, torch.empty(size, **kw), mean, std),
    aten.exponential.default: _exponential,
    aten.native_dropout.default: _dropout,
}
