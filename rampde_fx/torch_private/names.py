"""How private names of torch are read: where they are used, so that one that is missing breaks that, and no import."""

from __future__ import annotations

import operator
import os
import pkgutil
import sys
from importlib import import_module
from typing import Any

import torch

from rampde_fx.errors import MissingTorchNameError

CHECKED = "2.11 to 2.13"

_tables: list[Names] = []


class Names:
    """Private names of torch, as attributes. A module that has one is imported when the name is read.

    Args:
        modules: Names, one space apart, by the module that has them; "." is the module itself. The last part of a
            dotted name is the attribute.
        everywhere: Whether every build of torch has them.
    """

    def __init__(self, modules: dict[str, str], *, everywhere: bool = True) -> None:
        places = [(module, name.strip(".")) for module, names in modules.items() for name in names.split()]
        self._places = {(path or module).rpartition(".")[2]: (module, path) for module, path in places}
        if everywhere:
            _tables.append(self)

    def __getattr__(self, name: str) -> Any:
        if name not in self._places:  # what inspects modules asks for other names
            raise AttributeError(name)
        module, path = self._places[name]
        try:
            owner = sys.modules.get(module) or import_module(module)
            return operator.attrgetter(path)(owner) if path else owner
        except (ImportError, AttributeError) as error:
            missing = f"{module}.{path}" if path else module
            raise MissingTorchNameError(
                f"torch {torch.__version__} has no {missing}, a private name that compiling needs",
                required=f"a version of torch that rampde_fx was checked on: {CHECKED}",
                fix="install one of these, or a newer rampde_fx",
            ) from error

    def require(self) -> None:
        """Read all of them.

        Raises:
            MissingTorchNameError: if one is missing.
        """
        for name in self._places:
            getattr(self, name)


def require_all() -> None:
    """Read the private names of every part, before anything is compiled.

    Raises:
        MissingTorchNameError: if one is missing.
    """
    for part in pkgutil.iter_modules([os.path.dirname(__file__)]):
        import_module(f"{__package__}.{part.name}")
    for table in _tables:
        table.require()
