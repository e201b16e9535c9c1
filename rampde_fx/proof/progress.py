"""What check() is at: a line on stderr for each policy that it compiles or measures."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator
from typing import TypeVar

T = TypeVar("T")


class Progress:
    """Lines on stderr.

    Args:
        shown: Whether to print them; where None, if stderr is a terminal.
    """

    def __init__(self, shown: bool | None) -> None:
        self.shown = sys.stderr.isatty() if shown is None else shown

    def tell(self, what: str) -> None:
        """Say what begins."""
        if self.shown:
            print(f"check: {what}", file=sys.stderr, flush=True)

    def each(self, what: str, items: Collection[T], name: Callable[[T], str]) -> Iterator[T]:
        """The items; a numbered line with the name of each stands before it."""
        for number, item in enumerate(items, start=1):
            self.tell(f"{what} {number} of {len(items)}: {name(item)}")
            yield item
