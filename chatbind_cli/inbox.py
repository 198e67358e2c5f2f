"""What one thread hands to another: a bounded queue that ends, and that may end with an error."""

from __future__ import annotations

import threading
from collections import deque
from typing import Generic, TypeVar

T = TypeVar("T")


class Inbox(Generic[T]):
    """Items on their way from writers to one reader, in order.

    Args:
        size: items that may wait; a writer waits for room.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._items: deque[T] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._left = False
        self._error: Exception | None = None

    def put(self, item: T) -> bool:
        """Hands an item on, when there is room; False: nobody reads any more."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._items) < self._size or self._left)
            if not self._left:
                self._items.append(item)
            self._changed.notify_all()
            return not self._left

    def withdraw(self, item: T) -> bool:
        """Takes an item back; False: it is not there any more."""
        with self._changed:
            if item not in self._items:
                return False
            self._items.remove(item)
            self._changed.notify_all()
            return True

    def close(self, error: Exception | None = None) -> None:
        """Says that nothing more comes, and of what error that is; the first word counts."""
        with self._changed:
            if not self._closed:
                self._closed, self._error = True, error
            self._changed.notify_all()

    def leave(self) -> None:
        """Says that nobody reads any more."""
        with self._changed:
            self._left = True
            self._items.clear()
            self._changed.notify_all()

    @property
    def ended(self) -> bool:
        """Whether every item is taken, and no other comes."""
        with self._changed:
            return self._closed and not self._items

    def take(self, *, wait: bool = True) -> T | None:
        """The next item; None: there is no other, or, unless it waits, none yet (see `ended`).

        Raises:
            Exception: the error that the items ended with, each time.
        """
        with self._changed:
            if wait:
                self._changed.wait_for(lambda: self._items or self._closed)
            if self._items:
                item = self._items.popleft()
                self._changed.notify_all()
                return item
            if self._closed and self._error is not None:
                raise self._error
            return None
