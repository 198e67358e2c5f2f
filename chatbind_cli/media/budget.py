"""What decoding may cost: memory for one medium and for all at once, and time for one.

A loader says what a medium will take before it decodes it, from the sizes in its header, and the
readers of streams look at the clock. Nothing here knows a format.
"""

from __future__ import annotations

import ctypes
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Condition, local
from typing import BinaryIO

from chatbind_cli.errors import MediaError

ONE_BYTES = 512 * 2**20
"""Most memory that decoding one medium may take."""

ALL_BYTES = 2**30
"""Most memory that all media that are being decoded may take together."""

ONE_SECONDS = 60.0
"""Longest time that decoding one medium may take, without the time it waits for room."""


class _Room:
    """`ALL_BYTES` of memory, given out in order of asking, so that a large medium gets its turn."""

    def __init__(self) -> None:
        self._changed = Condition()
        self._taken = 0
        self._queue: deque[object] = deque()

    def take(self, cost: int) -> None:
        ticket = object()
        with self._changed:
            self._queue.append(ticket)
            try:
                self._changed.wait_for(
                    lambda: self._queue[0] is ticket and self._taken + cost <= ALL_BYTES
                )
                self._taken += cost
            finally:
                self._queue.remove(ticket)
                self._changed.notify_all()

    def give_back(self, cost: int) -> None:
        with self._changed:
            self._taken -= cost
            self._changed.notify_all()


class _Own(local):
    """What the running thread has taken: nobody waits who holds room, so nobody waits for ever."""

    holds = False
    where = ""
    end: float | None = None


_TRIM = getattr(ctypes.CDLL(None), "malloc_trim", None)
"""glibc keeps what was freed, for each thread apart: eight of them held 4 GB of nothing. This gives
it back to the system; other C libraries lack it."""

_WORTH_TRIMMING = 32 * 2**20

_ROOM = _Room()
_OWN = _Own()


@contextmanager
def decoding(cost: int, where: str) -> Iterator[None]:
    """Waits until there is room for a decode, holds it, and starts the clock of `check_time`.

    Args:
        cost: bytes that the decode takes at its peak, everything counted.
        where: the medium, for the error.

    Raises:
        MediaError: it takes more than one medium may.
        RuntimeError: this thread is decoding something already.
    """
    if cost > ONE_BYTES:
        raise MediaError(
            f"would take {cost / 2**20:,.0f} MiB of memory to decode, more than "
            f"{ONE_BYTES // 2**20} MiB",
            where=where,
            hint="make it smaller, or save it in another format",
        )
    if _OWN.holds:
        raise RuntimeError("a decode inside a decode could wait for itself")
    _ROOM.take(cost)
    if cost > _WORTH_TRIMMING and _TRIM is not None:
        _TRIM(0)
    _OWN.holds, _OWN.where, _OWN.end = True, where, time.monotonic() + ONE_SECONDS
    try:
        yield
    finally:
        _OWN.holds, _OWN.end = False, None
        _ROOM.give_back(cost)


def check_time() -> None:
    """To be called between the steps of a decode.

    Raises:
        MediaError: the medium that this thread decodes has taken longer than one medium may.
    """
    if _OWN.end is not None and time.monotonic() > _OWN.end:
        raise MediaError(
            f"takes more than {ONE_SECONDS:g} s to decode",
            where=_OWN.where,
            hint="make it smaller or shorter, or save it in another format",
        )


class Timed:
    """A stream that looks at the clock with every read, and has neither a name nor a file number.

    Attributes:
        left: how many more bytes may be read; None: no limit.
    """

    def __init__(self, stream: BinaryIO, left: int | None = None) -> None:
        self._stream = stream
        self.left = left
        self.seek = stream.seek
        self.tell = stream.tell

    def read(self, size: int = -1) -> bytes:
        """The next `size` bytes, or all of them.

        Raises:
            MediaError: see `check_time`.
            ValueError: more than `left` was read.
        """
        check_time()
        if self.left is None:
            return self._stream.read(size)
        part = self._stream.read(min(size, self.left + 1) if size >= 0 else self.left + 1)
        self.left -= len(part)
        if self.left < 0:
            raise ValueError("its header is too long")
        return part
