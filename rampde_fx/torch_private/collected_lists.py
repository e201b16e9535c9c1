"""Lists to which a loop that is captured once appends: what they hold after all of its iterations.

The list stays one whose length nobody has asked for, until somebody does. torch.stack takes it as it is, so that the
number of steps may stay symbolic. Whoever asks for anything else has the number of steps fixed, and gets every item.

An item is a tensor, or tuples, lists and dicts of tensors, numbers and constants that are made anew in each iteration.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from rampde_fx.torch_private.names import Names
from rampde_fx.torch_private.step_numbers import is_step_number, parts_of, step_number

_torch = Names(
    {
        "torch._dynamo.symbolic_convert": "InstructionTranslator.current_tx",
        "torch._dynamo.variables": "ConstantVariable ConstDictVariable ListVariable TensorVariable"
        " TorchInGraphFunctionVariable TupleVariable",
        "torch._dynamo.variables.base": "ValueMutationNew",
        "torch._dynamo.variables.builder": "wrap_fx_proxy",
        "torch._dynamo.variables.torch_function": "_flatten_vts",
    },
    everywhere=False,
)


Leaf = Callable[[Any], Any]


def made_again(item: Any, tensor: Leaf, number: Leaf) -> Any:
    """An item like another one: of its tensors and step numbers, as Dynamo tracks them, what two functions give."""
    if is_step_number(item):
        return number(item)
    item = item.unwrap()
    if isinstance(item, _torch.TensorVariable):
        return tensor(item)
    if type(item) is _torch.TupleVariable:
        return item.clone(items=[made_again(part, tensor, number) for part in item.items])
    if type(item) is _torch.ListVariable:
        parts = [made_again(part, tensor, number) for part in item.items]
        return item.clone(items=parts, mutation_type=_torch.ValueMutationNew())
    if type(item) is _torch.ConstDictVariable:
        values = {key: made_again(value, tensor, number) for key, value in item.items.items()}
        return item.clone(items=values, mutation_type=_torch.ValueMutationNew())
    return item


def _as_it_is(item: Any) -> Any:
    """A copy of an item: what the user's names of its parts mean will change."""
    return made_again(item, lambda x: x.clone(), lambda number: _torch.ConstantVariable.create(parts_of(number)[0]))


def _leaves(item: Any) -> list[Any]:
    """The tensors in an item, in the order in which made_again meets them."""
    found: list[Any] = []

    def met(tensor: Any) -> Any:
        found.append(tensor)
        return tensor

    made_again(item, met, lambda number: number)
    return found


@dataclass
class Later:
    """What a list holds after all iterations.

    Attributes:
        grid: The time points.
        captured: How many iterations were captured.
        before: The items that it held before the last of them.
        each: The items that the last of them appended, and each one after it appends, of its own values.
        finals: Of these what the very last iteration appends, where that is known as a final value.
    """

    grid: fx.Proxy
    captured: int
    before: list[Any]
    each: list[Any]
    finals: dict[fx.Node, fx.Proxy]

    @classmethod
    def of(cls, grid: fx.Proxy, captured: int, tracked: Any, count: int) -> Later:
        """That of a list of Dynamo's, of which the last iteration appended a number of items."""
        each = [made_again(x, lambda x: x.clone(), lambda n: step_number(*parts_of(n))) for x in tracked.items[-count:]]
        return cls(grid, captured, [_as_it_is(item) for item in tracked.items[:-count]], each, {})

    def holds_tensors(self) -> bool:
        """Whether all items are tensors."""
        return all(isinstance(item.unwrap(), _torch.TensorVariable) for item in (*self.before, *self.each))

    def stacked(self) -> Any:
        """All items, which are tensors, stacked."""
        operands = (self.grid, self.captured, [x.as_proxy() for x in self.before], [x.as_proxy() for x in self.each])
        return _tracked(torch.ops.rampde_fx.collect, *operands)

    def items(self) -> list[Any]:
        """The items one by one; fixes the number of steps."""
        count = int(self.grid.node.meta["example_value"].shape[0]) - self.captured
        columns = [[self._column(leaf, count) for leaf in _leaves(item)] for item in self.each]
        rows = [
            [self._item(item, own, row) for item, own in zip(self.each, columns, strict=True)] for row in range(count)
        ]
        return [*self.before, *(item for row in rows for item in row)]

    def _item(self, item: Any, columns: list[list[Any]], row: int) -> Any:
        """What an iteration appends: the one that was captured last, or one after it."""
        tensors = iter(columns)

        def number(tracked: Any) -> Any:
            value, slope, _ = parts_of(tracked)
            return _torch.ConstantVariable.create(value + slope * row)

        return made_again(item, lambda _: next(tensors)[row], number)

    def _column(self, item: Any, count: int) -> list[Any]:
        last = self.finals.get(item.as_proxy().node)
        stack = _tracked(torch.ops.rampde_fx.collect, self.grid, self.captured, [], [item.as_proxy()])
        parts = _tracked(torch.unbind, stack.as_proxy())
        rows = range(count if last is None else count - 1)
        column = [_tracked("clone", parts.items[row].as_proxy()) for row in rows]  # which may be updated in place
        if last is not None:
            final = item.clone()
            final.proxy = last
            column.append(final)
        return column


def _tracked(function: Any, *operands: Any) -> Any:
    """Put a call into the graph; what tracks its result."""
    tx = _torch.current_tx()
    kind = "call_method" if isinstance(function, str) else "call_function"
    return _torch.wrap_fx_proxy(tx, tx.output.create_proxy(kind, function, operands, {}))


def collect_on(tracked: Any, later: Later | None, finals: dict[fx.Node, fx.Proxy]) -> None:
    """Give a list of Dynamo's what it holds after all iterations; None if they append nothing more."""
    if later is None:
        tracked.items[:] = map(_as_it_is, tracked.items)
        return
    later.finals = finals
    own = vars(tracked)
    del own["items"]
    tracked.__class__ = _list_type()
    own.update(later=later, filled=None)


@functools.cache
def _list_type() -> Any:
    _torch.TorchInGraphFunctionVariable._get_handlers().setdefault(torch.stack, _stack)

    class CollectedListVariable(_torch.ListVariable):  # type: ignore[name-defined]
        """A list of Dynamo's, to which a loop has appended; filled once it is asked for its items."""

        later: Later
        filled: list[Any] | None

        @property
        def items(self) -> list[Any]:
            if self.filled is None and sys._getframe(1).f_code is _torch._flatten_vts.__code__:
                return [*self.later.before, *self.later.each]  # it looks for overrides of torch.stack in what is alike
            if self.filled is None:
                self.filled = self.later.items()
            return self.filled

        @items.setter
        def items(self, items: list[Any]) -> None:
            self.filled = items

        def clone(self, **changes: Any) -> Any:
            own = {name: value for name, value in vars(self).items() if name not in ("later", "filled")}
            return _torch.ListVariable(**{"items": self.items, **own, **changes})

    return CollectedListVariable


def _stack(function: Any, tx: Any, *args: Any, **kwargs: Any) -> Any:
    """torch.stack of a list that nobody has asked for its items; None for all else, which Dynamo then does itself."""
    named = {**dict(zip(("tensors", "dim"), args, strict=False)), **kwargs}
    tensors, dim = named.get("tensors"), named.get("dim")
    if not isinstance(tensors, _list_type()) or tensors.filled is not None or named.keys() - {"tensors", "dim"}:
        return None
    if not tensors.later.holds_tensors():
        return None
    whole = tensors.later.stacked()
    place = 0 if dim is None else dim.as_python_constant()
    return whole if place == 0 else _tracked(torch.movedim, whole.as_proxy(), 0, place)
