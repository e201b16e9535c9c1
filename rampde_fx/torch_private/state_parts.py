"""Parts of a picture of the interpreter's state: numbers, and the items of lists to which a loop appends."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import fx

from rampde_fx.torch_private.names import Names
from rampde_fx.torch_private.step_numbers import is_step_number, parts_of

_torch = Names(
    {"torch._dynamo.variables": "ConstantVariable ConstDictVariable ListVariable TensorVariable TupleVariable"},
    everywhere=False,
)


class Irregular(Exception):
    """A loop is not known to repeat, and why."""


@dataclass
class Number:
    """A whole number that stands in a state.

    Attributes:
        place: Where it stands in the word.
        label: The variable of the user's where it was found.
        value: The number.
        slope: By how much every iteration is known to move it on.
        holder: The dict or list that holds it; None of one that is a step number already.
        name: Its key, or its place.
        tracked: What tracks it, if it is a step number.
    """

    place: int
    label: str
    value: int
    slope: int
    holder: Any = None
    name: Any = None
    tracked: Any = None


@dataclass
class Item:
    """An item of a list to which a loop appends.

    Attributes:
        in_lists: The lists to which the loop appends, and the objects in them that can be changed, of all items.
        effects: What Dynamo has buffered of changes.
        word: What it is made of.
        nodes: The tensors in it.
        numbers: The whole numbers in it, each with what every iteration adds to it.
    """

    in_lists: set[int]
    effects: Any
    word: list[Any] = field(default_factory=list)
    nodes: list[fx.Node] = field(default_factory=list)
    numbers: list[tuple[int, int]] = field(default_factory=list)

    def stays(self, later: Item) -> bool:
        """Whether an item is the same later on."""
        numbers = [[value for value, _ in item.numbers] for item in (self, later)]
        return self.word == later.word and self.nodes == later.nodes and numbers[0] == numbers[1]

    def moves_on(self, later: Item) -> bool:
        """Whether another item is this one, but for its nodes, in the next iteration."""
        pairs = zip(self.numbers, later.numbers, strict=False)
        return self.word == later.word and all(b[0] - a[0] == b[1] for a, b in pairs)

    def add(self, part: Any) -> None:
        """A part of the item.

        Raises:
            Irregular: if it is neither a tensor nor a constant, nor made of these in this iteration alone.
        """
        if is_step_number(part):
            self._add_number(*parts_of(part)[:2])
        elif type(part) is _torch.ConstantVariable and type(part.value) is int:
            self._add_number(part.value, 0)
        elif type(part) is _torch.ConstantVariable:
            self.word.append((type(part.value), repr(part.value)))
        elif type(part) is _torch.TensorVariable and not self.effects.store_attr_mutations.get(part):
            self.word.append("a tensor")
            self.nodes.append(part.proxy.node)
        elif type(part) in (_torch.TupleVariable, _torch.ListVariable, _torch.ConstDictVariable) and not part.source:
            self._add_parts(part)
        else:
            raise Irregular("collects more than tensors, and tuples, lists and dicts of these")

    def _add_number(self, value: int, slope: int) -> None:
        self.word.append("a number")
        self.numbers.append((value, slope))

    def _add_parts(self, whole: Any) -> None:
        if type(whole) is not _torch.TupleVariable:
            if id(whole) in self.in_lists:
                raise Irregular("collects an object twice")
            self.in_lists.add(id(whole))
        is_dict = type(whole) is _torch.ConstDictVariable
        self.word.append((type(whole), len(whole.items), getattr(whole, "user_cls", None)))
        if is_dict:
            self.word += [key.vt.as_python_constant() for key in whole.items]
        for part in whole.items.values() if is_dict else whole.items:
            self.add(part.unwrap())
