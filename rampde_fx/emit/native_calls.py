"""Whether Inductor writes the code that calls the kernels of a loop in C++ (its cpp_wrapper) or in Python.

A step of a small network on a CPU takes about as long as the calls of its kernels. In C++ these take half as long.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import fx

from rampde_fx.ir import graphs
from rampde_fx.torch_private import inductor

OPTION = "cpp_wrapper"
_KNOWN = {"aten", "prims", "rampde_fx"}


def with_native_calls(graph_module: fx.GraphModule, options: dict[str, Any], mode: str | None) -> dict[str, Any]:
    """The options for Inductor: calls in C++ where nobody chose, and code in C++ can do what Python does.

    Not beside a mode of torch.compile, and not where an operator of another package is called: an error that one raises
    loses its type and its text in C++ (ours are kept, rampde_fx/runtime/raised.py).
    """
    chosen = OPTION in options or mode is not None or inductor.asks_for("triton.cudagraphs", options, mode)
    if chosen or sys.platform != "linux" or not inductor.cpp_wrapper_calls_loops():
        return options
    nodes = list(graphs.all_nodes(graph_module))
    if all(_is_on_cpu(node) and _is_known(node.target) for node in nodes):
        return {**options, OPTION: True}
    return options


def _is_on_cpu(node: fx.Node) -> bool:
    value = graphs.value(node)
    return not isinstance(value, torch.Tensor) or value.device.type == "cpu"


def _is_known(target: Any) -> bool:
    """Whether what a node calls is torch's or ours."""
    if isinstance(target, torch._ops.OpOverload):
        return target.namespace in _KNOWN
    if isinstance(target, torch._ops.OpOverloadPacket):
        return str(target._qualified_op_name).partition("::")[0] in _KNOWN
    return True
