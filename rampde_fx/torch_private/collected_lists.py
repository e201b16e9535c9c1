"""Lists to which a loop that is captured once appends: what they hold after all of its iterations.

The list stays one whose length nobody has asked for, until somebody does. torch.stack takes it as it is, so that the
number of steps may stay symbolic. Whoever asks for anything else has the number of steps fixed, and gets every item.
"""

from __future__ import annotations

import functools
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from rampde_fx.torch_private.names import Names

_torch = Names(
    {
        "torch._dynamo.symbolic_convert": "InstructionTranslator.current_tx",
        "torch._dynamo.variables": "ListVariable TorchInGraphFunctionVariable",
        "torch._dynamo.variables.builder": "wrap_fx_proxy",
        "torch._dynamo.variables.torch_function": "_flatten_vts",
    },
    everywhere=False,
)


@dataclass
class Later:
    """What a list holds after all iterations.

    Attributes:
        grid: The time points.
        captured: How many iterations were captured.
        before: What it held before the last of them.
        each: What the last of them appended, and each one after it appends: the same values of its own.
        finals: Of these what the very last iteration appends, where that is known as a final value.
    """

    grid: fx.Proxy
    captured: int
    before: list[Any]
    each: list[Any]
    finals: dict[fx.Node, fx.Proxy]

    @classmethod
    def of(cls, grid: fx.Proxy, captured: int, tracked: Any, before: list[fx.Node], each: list[fx.Node]) -> Later:
        """That of a list of Dynamo's, given as the nodes of its items."""
        items = [item.unwrap().clone() for item in tracked.items]  # the user's names of them will be final values
        return cls(grid, captured, items[: len(before)], items[len(before) :], {})

    def stacked(self) -> Any:
        """All items, stacked."""
        operands = (self.grid, self.captured, [x.as_proxy() for x in self.before], [x.as_proxy() for x in self.each])
        return _tracked(torch.ops.rampde_fx.collect, *operands)

    def items(self) -> list[Any]:
        """The items one by one; fixes the number of steps."""
        count = int(self.grid.node.meta["example_value"].shape[0]) - self.captured
        columns = [self._column(item, count) for item in self.each]
        return [*self.before, *(item for row in zip(*columns, strict=True) for item in row)]

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
        tracked.items[:] = [item.unwrap().clone() for item in tracked.items]
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
    whole = tensors.later.stacked()
    place = 0 if dim is None else dim.as_python_constant()
    return whole if place == 0 else _tracked(torch.movedim, whole.as_proxy(), 0, place)
