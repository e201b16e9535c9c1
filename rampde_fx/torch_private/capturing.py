"""Models under torch.compile, from outside: captured once, and what Dynamo says of the capture."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import fx

from rampde_fx.torch_private.names import Names

_torch = Names(
    {
        "torch._dynamo": "maybe_mark_dynamic reset_code",
        "torch._dynamo.exc": "Unsupported UserError",
        "torch._dynamo.source": "NumpyTensorSource",
        "torch._dynamo.symbolic_convert": "InstructionTranslator.current_tx",
        "torch._dynamo.utils": "counters",
        "torch._logging": "trace_structured",
    }
)
Unsupported, UserError = _torch.Unsupported, _torch.UserError


def uncompiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """What torch.compile was given, or the function itself."""
    return getattr(function, "_orig_mod", None) or getattr(function, "_torchdynamo_orig_callable", None) or function


def capture(
    function: Callable[..., Any],
    backend: Callable[..., Any],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] = MappingProxyType({}),
    *,
    fullgraph: bool = False,
) -> Any:
    """Run a function once under torch.compile with a backend, and forget the compiled code; what it returns."""

    def run() -> Any:
        return function(*args, **kwargs)

    try:
        return torch.compile(run, backend=backend, dynamic=False, fullgraph=fullgraph)()
    finally:
        _torch.reset_code(run.__code__)


class GraphBreaks:
    """What Dynamo says of the graph breaks of the captures inside of the context.

    Attributes:
        reasons: A line for each reason, in the order in which they were met.
    """

    reasons: tuple[str, ...] = ()

    def __enter__(self) -> GraphBreaks:
        self._before = dict(_torch.counters["graph_break"])
        return self

    def __exit__(self, *_: object) -> None:
        now: Mapping[str, int] = _torch.counters["graph_break"]
        met = [text for text, count in now.items() if count > self._before.get(text, 0)]
        self.reasons = tuple(dict.fromkeys(map(_reason, met)))


def _reason(text: str) -> str:
    """Dynamo's explanation of a graph break, or its first line where there is none."""
    explained = re.search(r"^\s*Explanation: (.*)$", text, re.MULTILINE)
    return explained[1] if explained else text.strip().partition("\n")[0]


def with_dynamic_sizes(tensor: torch.Tensor, dimensions: Sequence[int]) -> torch.Tensor:
    """The tensor, whose sizes in some dimensions Dynamo captures as symbols as far as it can."""
    marked = tensor.detach()
    for dimension in dimensions:
        _torch.maybe_mark_dynamic(marked, dimension)
    return marked


def compiled_by_torch(function: Callable[[], Any], compiler: str) -> tuple[Callable[[], Any], Callable[[], None]]:
    """A function compiled by a backend of torch's own, and what forgets the compiled code."""

    def run() -> Any:
        return function()

    return torch.compile(run, backend=compiler, dynamic=False), lambda: _torch.reset_code(run.__code__)


def source_name(placeholder: fx.Node) -> str:
    """The user's name of an input of a captured graph, such as velocity.linear.0.weight; a readable one if unknown."""
    source = getattr(placeholder.meta.get("grapharg"), "source", None)
    name = getattr(source, "name", "")
    text = name() if callable(name) else name  # a method up to torch 2.11
    text = re.sub(r"^___from_numpy\((.*)\)$", r"\1", text)
    text = re.sub(r"\._(?:modules|parameters|buffers)\['(\w+)'\]", r".\1", text)
    text = re.sub(r"\.__closure__\[\d+\]\.cell_contents", "", text)
    return re.sub(r"^[LG]\['(\w+)'\]", r"\1", text).removeprefix("self.")


def is_of_numpy(placeholder: fx.Node) -> bool:
    """Whether an input of a captured graph shows the memory of an array of numpy."""
    return isinstance(getattr(placeholder.meta.get("grapharg"), "source", None), _torch.NumpyTensorSource)


def captured_frame() -> tuple[str, dict[str, Any]]:
    """The file of the function that Dynamo captures, and its local and free variables."""
    frame: Any = _torch.current_tx().output.root_tx
    return frame.f_code.co_filename, dict(frame.f_locals)


def trace_artifact(name: str, text: Callable[[], str]) -> None:
    """Leave a text in torch's structured trace (TORCH_TRACE, tlparse); it is made only if somebody traces."""
    _torch.trace_structured("artifact", metadata_fn=lambda: {"name": name, "encoding": "string"}, payload_fn=text)
