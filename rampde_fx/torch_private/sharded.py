"""Parameters that FSDP2 (torch.distributed.fsdp.fully_shard) keeps in shards."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from torch import nn

from rampde_fx.torch_private import dynamo

FSDP = "torch.distributed.fsdp"


def hooked_inside() -> str:
    """The name of a module inside the model under capture whose hooks Dynamo would have to trace, or an empty string.

    Dynamo runs the hooks of the outermost module before it captures anything. At those of a module inside it breaks the
    graph, which fullgraph=True forbids: only then every such module is one that is in the way.
    """
    if FSDP not in sys.modules or not (frame := dynamo.current_capture().root_tx).one_graph:
        return ""
    return _first_hooked(frame.f_locals.values())


def _first_hooked(values: Iterable[Any]) -> str:
    """The path, in a module among some values, to the first module inside it that is sharded by itself."""
    for value in values:
        if isinstance(value, tuple) and (name := _first_hooked(value)):  # the arguments of a marked target
            return name
        inside = value.named_modules() if isinstance(value, nn.Module) else ()
        for name, module in inside:
            if module is not value and isinstance(module, sys.modules[FSDP].FSDPModule):
                return name
    return ""
