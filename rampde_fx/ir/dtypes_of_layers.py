"""Loops between layers under torch.autocast: a step takes what arrives in half precision in a wider dtype."""

from __future__ import annotations

import torch
from torch import fx

from rampde_fx.ir import graphs
from rampde_fx.ir.captured import CapturedStep, Run
from rampde_fx.ir.sources import Source, carries_among


def notes_on_dtypes(captured: CapturedStep) -> tuple[str, ...]:
    """Sentences for the report: what arrives in half precision."""
    wide = zip(captured.inputs, graphs.placeholders(captured.step), strict=True)
    names = [f"'{node.name}'" for source, node in wide if _arrives_narrow(source, node)]
    told = f"{', '.join(names)}: half precision, as autocast made it before the loop, which takes it in float32"
    return (told,) if names else ()


def _arrives_narrow(source: Source, taken: fx.Node) -> bool:
    """Whether the step takes an operand in a wider dtype than it arrives in."""
    own, wide = [graphs.value(node) for node in source.values[:1]], graphs.value(taken)
    return bool(own) and isinstance(wide, torch.Tensor) and own[0].dtype != wide.dtype


def in_dtypes_of_step(graph: fx.Graph, captured: CapturedStep, operands: list[fx.Node]) -> list[fx.Node]:
    """The operands in the dtypes that the step takes: it is wider than what a layer under autocast made."""
    made = []
    for node, source, taken in zip(operands, captured.inputs, graphs.placeholders(captured.step), strict=True):
        narrow = _arrives_narrow(source, taken)
        made.append(graph.call_function(torch.Tensor.to, (node, graphs.value(taken).dtype)) if narrow else node)
    return made


def in_own_dtypes(graph: fx.Graph, run: Run, captured: CapturedStep, results: list[fx.Node]) -> list[fx.Node]:
    """The loop's results in the dtypes that they have in the user's code, where autocast may have set them."""
    keys = [*(source.key for source in carries_among(captured.inputs)), *captured.outputs]
    made = []
    for node, key, result in zip(results, keys, graphs.results(captured.step), strict=True):
        own = graphs.value(run.iterations[-1][key]) if isinstance(key, int) and key >= 0 else None
        dtype = own.dtype if isinstance(own, torch.Tensor) else None
        casts = dtype is not None and dtype != graphs.value(result).dtype
        made.append(graph.call_function(torch.Tensor.to, (node, dtype)) if casts else node)
    return made
