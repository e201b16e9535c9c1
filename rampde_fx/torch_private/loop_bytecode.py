"""What the bytecode of a loop says of its local variables. Each instruction is one of Dynamo's."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

from rampde_fx.torch_private.names import Names

_torch = Names({"torch._dynamo.bytecode_analysis": "TERMINAL_OPCODES"}, everywhere=False)

Instructions = Sequence[Any]
LOADS = ("LOAD_FAST", "LOAD_FAST_BORROW", "LOAD_FAST_CHECK")
SEES_ALL_LOCALS = {"locals", "vars", "dir", "eval", "exec", "_getframe", "currentframe"}


def _names(instruction: Any) -> tuple[str, ...]:
    """The locals that an instruction loads, stores or deletes."""
    if "FAST" not in instruction.opname:
        return ()
    return instruction.argval if isinstance(instruction.argval, tuple) else (instruction.argval,)


def _targets(instruction: Any) -> Iterator[Any]:
    """Where it may jump to, the handler of an exception included."""
    for target in (instruction.target, instruction.exn_tab_entry and instruction.exn_tab_entry.target):
        if target is not None:
            yield target


def live_locals(instructions: Instructions, here: Any) -> set[str]:
    """The locals that may be read from an instruction on before they are written.

    Dynamo's own analysis takes every local that a loop reads for live.
    """
    place = {id(instruction): k for k, instruction in enumerate(instructions)}
    live: list[set[str]] = [set() for _ in range(len(instructions) + 1)]
    changed = True
    while changed:
        changed = False
        for k in reversed(range(len(instructions))):
            now = _live_before(instructions[k], live[k + 1], [live[place[id(to)]] for to in _targets(instructions[k])])
            if now != live[k]:
                live[k], changed = now, True
    return live[place[id(here)]]


def _live_before(instruction: Any, behind: set[str], at_targets: list[set[str]]) -> set[str]:
    found = set() if instruction.opcode in _torch.TERMINAL_OPCODES else set(behind)
    if instruction.opname == "STORE_FAST":
        return (found - {instruction.argval}).union(*at_targets)  # a handler sees the old value
    return found.union(_names(instruction), *at_targets)


def body_of_loop(instructions: Instructions, head: Any) -> list[Any]:
    """What can run from the FOR_ITER at the head of a loop until that runs again, and what runs behind a break."""
    place = {id(instruction): k for k, instruction in enumerate(instructions)}
    start = place[id(head)]
    seen, open_places = {start}, [start + 1]
    while open_places:
        k = open_places.pop()
        while k not in seen and k < len(instructions):
            seen.add(k)
            open_places += [place[id(target)] for target in _targets(instructions[k])]
            if instructions[k].opcode in _torch.TERMINAL_OPCODES:
                break
            k += 1
    return [instructions[k] for k in sorted(seen - {start})]


def only_appended_to(body: Instructions) -> set[str]:
    """The locals of which a loop reads nothing but the method append, to call it."""
    appended: set[str] = set()
    otherwise: set[str] = set()
    for instruction, behind in pairwise([*body, None]):
        if instruction.opname in LOADS and behind is not None and _calls_append(behind):
            appended.add(instruction.argval)
        else:
            otherwise.update(_names(instruction))
    return appended - otherwise


def _calls_append(instruction: Any) -> bool:
    is_call = instruction.opname == "LOAD_METHOD"
    is_call |= instruction.opname == "LOAD_ATTR" and sys.version_info >= (3, 12) and bool(instruction.arg & 1)
    return is_call and instruction.argval == "append"
