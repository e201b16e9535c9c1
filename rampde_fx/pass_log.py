"""What each pass makes of a loop, told to torch's logs.

TORCH_LOGS="+rampde_fx" prints every loop after every pass; TORCH_TRACE=directory leaves one artifact per loop and pass
in torch's structured trace, which tlparse shows. Without a reader no graph is printed.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable

from torch import fx

from rampde_fx import torch_private
from rampde_fx.loop import Loop

# Takes the number of a loop in its captured graph, the name of a pass, and the loop after this pass.
Watcher = Callable[[int, str, Loop], None]

log = logging.getLogger(__name__)


def tell(number: int, pass_name: str, loop: Loop) -> None:
    """Tell the logs what a pass made of a loop."""
    if log.isEnabledFor(logging.DEBUG):
        log.debug("loop %d after %s, %s\n%s", number, pass_name, loop.where, code(loop))
    torch_private.trace_artifact(f"rampde_fx_loop_{number}_{pass_name}", lambda: code(loop))


def parts(loop: Loop) -> dict[str, fx.GraphModule]:
    """The graphs of a loop by name: its step and, as far as there are any, what stands beside it."""
    graphs = {"preamble": loop.preamble, "step": loop.step, "adjoint": loop.adjoint, "load": loop.load}
    return {part: graph_module for part, graph_module in graphs.items() if graph_module is not None}


def code(loop: Loop) -> str:
    """The graphs of a loop as readable code, with true dtypes and the user's source lines."""
    return "\n".join(f"# {part}\n{readable(graph_module)}" for part, graph_module in parts(loop).items())


def readable(graph_module: fx.GraphModule) -> str:
    """One graph and those inside it as readable code, without the ends of names (x = None)."""
    text = re.sub(r";  [\w = ]*= None", "", graph_module.print_readable(print_output=False))
    return text.strip("\n") + "\n"
