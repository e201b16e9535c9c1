"""What each pass makes of a loop, told to torch's logs.

TORCH_LOGS="+rampde_fx" prints every loop after every pass; TORCH_TRACE=directory leaves one artifact per loop and pass
in torch's structured trace, which tlparse shows. Without a reader no graph is printed.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable

from torch import fx

from rampde_fx.ir.loops import Loop
from rampde_fx.torch_private import capturing

# Takes the number of a loop in its captured graph, the name of a pass, and the loop after this pass.
Watcher = Callable[[int, str, Loop], None]

log = logging.getLogger(__name__)


def tell(number: int, pass_name: str, loop: Loop) -> None:
    """Tell the logs what a pass made of a loop."""
    if log.isEnabledFor(logging.DEBUG):
        log.debug("loop %d after %s, %s\n%s", number, pass_name, loop.where, code(loop))
    capturing.trace_artifact(f"rampde_fx_loop_{number}_{pass_name}", lambda: code(loop))


def code(loop: Loop) -> str:
    """The graphs of a loop as readable code, with true dtypes and the user's source lines."""
    return "\n".join(f"# {part}\n{readable(graph_module)}" for part, graph_module in loop.parts().items())


def readable(graph_module: fx.GraphModule) -> str:
    """One graph and those inside it as readable code, without the ends of names (x = None)."""
    text = re.sub(r";  [\w = ]*= None", "", graph_module.print_readable(print_output=False))
    return text.strip("\n") + "\n"
