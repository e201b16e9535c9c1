"""What each pass makes of a loop, told to torch's logs.

TORCH_LOGS="+rampde_fx" prints every loop after every pass; TORCH_TRACE=directory leaves one artifact per loop and pass
in torch's structured trace, which tlparse shows. Without a reader no graph is printed.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable

from torch import fx

from rampde_fx.ir import graphs
from rampde_fx.ir.ends import StateSlot
from rampde_fx.ir.loops import DifferentiatedLoop, HoistedLoop, KeptLoop, Loop
from rampde_fx.torch_private import capturing

# Takes the number of a loop in its captured graph, the name of a pass, and the loop after this pass.
Watcher = Callable[[int, str, Loop], None]

log = logging.getLogger(__name__)


def tell(number: int, pass_name: str, loop: Loop) -> None:
    """Tell the logs what a pass made of a loop."""
    if log.isEnabledFor(logging.DEBUG):
        log.debug("loop %d after %s, %s\n%s", number, pass_name, loop.where, code(loop))
    capturing.trace_artifact(f"rampde_fx_loop_{number}_{pass_name}", lambda: code(loop))


def parts(loop: Loop) -> dict[str, fx.GraphModule]:
    """The graphs of a loop by name: its step and, as far as there are any, what stands beside it."""
    found = {"step": loop.step}
    if isinstance(loop, HoistedLoop) and loop.preamble is not None:
        found = {"preamble": loop.preamble, **found}
    if isinstance(loop, DifferentiatedLoop) and loop.adjoint is not None:
        found["adjoint"] = loop.adjoint.module
    slots = loop.slots if isinstance(loop, KeptLoop) else ()
    states = [slot for slot in slots if isinstance(slot, StateSlot)]
    return found | {f"load of {graphs.placeholders(loop.step)[slot.carry].name}": slot.load for slot in states}


def code(loop: Loop) -> str:
    """The graphs of a loop as readable code, with true dtypes and the user's source lines."""
    return "\n".join(f"# {part}\n{readable(graph_module)}" for part, graph_module in parts(loop).items())


def readable(graph_module: fx.GraphModule) -> str:
    """One graph and those inside it as readable code, without the ends of names (x = None)."""
    text = re.sub(r";  [\w = ]*= None", "", graph_module.print_readable(print_output=False))
    return text.strip("\n") + "\n"
