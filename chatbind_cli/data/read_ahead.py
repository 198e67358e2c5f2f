"""Items that are read in a thread of their own, ahead of whoever works on them, but not far."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterable
from typing import Generic, TypeVar

from chatbind_cli.inbox import Inbox

Item = TypeVar("Item")

_WAITING = 128
"""Items that are read before somebody has room for them."""

_AHEAD = 2048
"""Items between the first whose result is not out and the last that is read."""


class ReadAhead(Generic[Item]):
    """Reads items until they end, or nobody wants more.

    Args:
        items: to be read.
        key: tells an item from the others that are under way.
        ring: called when there is another in the inbox, or the end.

    Attributes:
        inbox: where they are put.
        error: what reading has ended with.
    """

    def __init__(
        self, items: Iterable[Item], key: Callable[[Item], Hashable], ring: Callable[[], None]
    ) -> None:
        self.inbox: Inbox[Item] = Inbox(_WAITING)
        self.error: Exception | None = None
        self._items, self._key, self._ring = items, key, ring
        self._numbered: dict[Hashable, tuple[int, Item]] = {}
        self._passed, self._left = 0, False
        self._moved = threading.Condition()
        # a daemon: it may wait for ever for somebody to write the next line into a pipe
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        try:
            for number, item in enumerate(self._items):
                with self._moved:
                    while number - self._passed >= _AHEAD and not self._left:
                        self._moved.wait()
                self._numbered[self._key(item)] = number, item
                if not self.inbox.put(item):
                    return
                self._ring()
        except Exception as error:
            self.error = error
        self.inbox.close()
        self._ring()

    def number(self, item: Item) -> tuple[int, Item]:
        """How many were read before an item, and the item as it was read; to be asked once."""
        return self._numbered.pop(self._key(item))

    def pass_one(self) -> None:
        """Says that the result of one is out."""
        with self._moved:
            self._passed += 1
            self._moved.notify_all()

    def leave(self) -> None:
        """Says that no more are wanted."""
        with self._moved:
            self._left = True
            self._moved.notify_all()
        self.inbox.leave()
