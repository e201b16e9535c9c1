"""The numbers that a capture of Dynamo's reads and changes in Python: attributes, globals, cells, lists and dicts."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from typing import Any

import torch

from rampde_fx.torch_private.dynamo import current_capture, names_of_arguments
from rampde_fx.torch_private.names import Names

_torch = Names(
    {
        "torch._dynamo.variables": "ConstantVariable ConstDictVariable LazyVariableTracker ListVariable"
        " SymNodeVariable",
        "torch._dynamo.variables.base": "AttributeMutationNew ValueMutationExisting ValueMutationNew",
    }
)
CELL = "cell_contents"  # what Dynamo calls the value of a variable that several functions share


def numbers_kept() -> dict[tuple[Any, str], Any]:
    """The numbers that the capture under way has put into attributes, globals, cells, lists and dicts.

    By the variable and the name of each; of a list or a dict by the variable and what its entries are.
    """
    effects, found = current_capture().side_effects, {}
    for owner, attributes in effects.store_attr_mutations.items():
        found.update({(owner, name): _number(value) for name, value in attributes.items()})
    changed = [entries for entries in list(effects.id_to_variable.values()) if _is_changed(entries)]
    for entries in dict.fromkeys([*changed, *_containers_kept()]):
        found.update({(entries, name): _number(value) for name, value in _entries(entries)})
    return {key: number for key, number in found.items() if number is not None}


def _is_changed(entries: Any) -> bool:
    effects = current_capture().side_effects
    return isinstance(entries.mutation_type, _torch.ValueMutationExisting) and effects.is_modified(entries)


def _containers_kept() -> Iterator[Any]:
    """The lists and dicts that were made in the code that is captured, and put into cells and attributes."""
    for attributes in current_capture().side_effects.store_attr_mutations.values():
        for value in attributes.values():
            if _is_container(value) and isinstance(value.mutation_type, _torch.ValueMutationNew):
                yield value


def _is_container(variable: Any) -> bool:
    return isinstance(variable, _torch.ListVariable | _torch.ConstDictVariable)


def _entries(entries: Any) -> list[tuple[str, Any]]:
    if isinstance(entries, _torch.ListVariable):
        return [(str(i), value) for i, value in enumerate(entries.items)]
    if isinstance(entries, _torch.ConstDictVariable):
        return [(repr(getattr(key.vt, "value", key)), value) for key, value in entries.items.items()]
    return []


def _number(variable: Any) -> Any:
    """The number that a variable of Dynamo's holds, as text if it is symbolic; None if it holds anything else."""
    if isinstance(variable, _torch.LazyVariableTracker):
        if not variable.is_realized():  # nobody has read it, nor put another there, unless it was computed
            return variable._cache.value if _operands(variable) else None
        variable = variable.realize()
    if isinstance(variable, _torch.SymNodeVariable):
        return str(variable.sym_num)
    value = variable.as_python_constant() if isinstance(variable, _torch.ConstantVariable) else None
    return value if isinstance(value, (int, float, bool)) else None


def _operands(variable: Any) -> list[Any]:
    """The numbers that a number was computed from which Dynamo does not guard: torch 2.14 computes it anew."""
    if not isinstance(variable, _torch.LazyVariableTracker) or variable.is_realized():
        return []
    return list(getattr(variable._cache, "lazy_vars", ()))


def name_of(owner: Any, name: str) -> str:
    """How the user writes an attribute, a global or an entry of a list that is a variable of Dynamo's."""
    if name == CELL:
        return str(getattr(owner, "local_name", None) or _local_name(owner) or "a variable around the velocity")
    if not _is_container(owner):
        return name
    return f"{_readable(_source_of(owner)) or _holder_of(owner)}[{name}]"


def _readable(source: str) -> str:
    """Dynamo's name of a value as the user writes it: what mixed_precision has wrapped takes *args."""
    names = names_of_arguments()

    def argument(position: re.Match[str]) -> str:
        return names[int(position[1])] if int(position[1]) < len(names) else position[0]

    return re.sub(r"^[LG]\['(\w+)'\]", r"\1", re.sub(r"^L\['args'\]\[(\d+)\]", argument, source))


def _local_name(variable: Any) -> str | None:
    """The name of a variable in a function that is being captured, or in one that has called it."""
    frame: Any = sys._getframe()  # Dynamo's own: each of its translators knows those that have called it alone
    while frame is not None:
        for name, value in getattr(frame.f_locals.get("self"), "symbolic_locals", {}).items():
            if value is variable:
                return str(name)
        frame = frame.f_back
    return None


def _holder_of(entries: Any) -> str:
    """The variable or attribute that holds a list or dict that was made in the code that is captured."""
    for holder, attributes in current_capture().side_effects.store_attr_mutations.items():
        for name, value in attributes.items():
            if value is entries:
                return name_of(holder, name)
    return "a list or dict of the function"


def was_read(owner: Any, name: str) -> bool:
    """Whether the capture under way has read such a number, which it guards then, before it put another there."""
    if isinstance(owner.mutation_type, _torch.AttributeMutationNew | _torch.ValueMutationNew):  # nobody knew it before
        return False
    guards = [*map(_name_of_source, current_capture().guards), *_read_without_guard(owner)]
    wanted = (f"[{name}]",) if _is_container(owner) else (f".{name}", f"['{name}']")
    wanted = (f"{_source_of(owner)}.{name}",) if name == CELL else wanted
    return any(guard.endswith(wanted) for guard in guards) or any(
        key.endswith(wanted) for key in current_capture().unspec_variable_map
    )


def _read_without_guard(owner: Any) -> list[str]:
    """The sources of the numbers that those of an owner were computed from."""
    kept = current_capture().side_effects.store_attr_mutations.get(owner, {})
    values = [*kept.values(), *(value for _, value in _entries(owner))]
    return [_name_of_source(operand._cache.source) for value in values for operand in _operands(value)]


def _source_of(owner: Any) -> str:
    return _name_of_source(owner.source)


def _name_of_source(source: Any) -> str:
    """Dynamo's name of what is guarded, or of where it comes from; a method up to torch 2.11."""
    name = getattr(source, "name", "")
    return str(name() if callable(name) else name)


def is_specialized(owner: Any) -> bool:
    """Whether Dynamo compiles anew for every number that it finds in an attribute of this owner."""
    return isinstance(getattr(owner, "value", None), torch.nn.Module)
