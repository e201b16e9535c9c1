"""Policies, and what they have for fields, as text: FIELD=VALUE with commas between, for any dataclass."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import Field, fields
from difflib import get_close_matches
from typing import Any

from rampde_fx.errors import PolicyError


def changed(in_order: Iterable[Field[Any]], values: Iterable[object]) -> list[str]:
    """Those of the fields that are not as they are by default, as name=value."""
    pairs = zip(in_order, values, strict=True)
    return [f"{field.name}={word_of(value)}" for field, value in pairs if value != field.default]


def text_of(made: Any) -> str:
    """A dataclass as it is written in the text of a policy."""
    values = [getattr(made, field.name) for field in fields(made)]
    return f"{type(made).__name__}({', '.join(changed(fields(made), values))})"


def word_of(value: object) -> str:
    """A value as it is written in text."""
    return str(value).removeprefix("torch.")


def words_of(kind: type[Any], items: Iterable[str]) -> dict[str, str]:
    """The values by the fields of a kind, from items that are written name=value."""
    names = [f.name for f in fields(kind)]
    required = f"FIELD=VALUE, with one of the fields {', '.join(names)}"
    found: dict[str, str] = {}
    for item in items:
        name, equals, word = (part.strip() for part in item.partition("="))
        leave_out = f"leave {item.strip()!r} out"
        if not equals:
            raise PolicyError(f"{name!r} names no field of {kind.__name__}", required=required, fix=leave_out)
        if name not in names:
            nearest = get_close_matches(name, names, n=1)
            fix = f"write {nearest[0]}={word}" if nearest else leave_out
            raise PolicyError(f"{kind.__name__} has no field {name!r}", required=required, fix=fix)
        if name in found:
            raise PolicyError(f"{kind.__name__} is given {name} twice", required="each field once", fix=leave_out)
        found[name] = word
    return found


def number_of(word: str) -> Any:
    """An int or a float, or the word itself where it is none."""
    for kind in (int, float):
        try:
            return kind(word)
        except ValueError:
            continue
    return word
