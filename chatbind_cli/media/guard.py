"""What stands around the decoding of a file that anybody may have made.

Room: a loader says what a medium will take before it decodes it, from the sizes in its header.
Time: readers of streams look at the clock. Failure: whatever a library raises becomes one line.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import Condition, Lock, RLock, local
from typing import BinaryIO

from chatbind_cli.errors import ChatBindError, MediaError, reason

ONE_BYTES = 640 * 2**20
"""Most memory that decoding one medium may take."""

ALL_BYTES = 2**30
"""Most memory that all media that are being decoded may take together."""

ONE_SECONDS = 60.0
"""Longest time that decoding one medium may take, without the time it waits for room."""

IMPORTING = RLock()
"""Hold it while a library for media is imported inside a function: PyAV's modules import each other
in a circle, and of two threads one would find the other's half-made module."""

_WORTH_TRIMMING = 32 * 2**20

_TURN = Lock()
"""Held while one waits for room: a large medium is not overtaken by small ones."""

_CHANGED = Condition()


class _All:
    """What all decodes hold together, in bytes; changed under `_CHANGED`."""

    taken = 0


class _Own(local):
    """What the running thread decodes: nobody waits who holds room, so nobody waits for ever."""

    where = ""
    end: float | None = None


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
    if _OWN.end is not None:
        raise RuntimeError("a decode inside a decode could wait for itself")
    with _TURN, _CHANGED:
        _CHANGED.wait_for(lambda: _All.taken + cost <= ALL_BYTES)
        _All.taken += cost
    if cost > _WORTH_TRIMMING:
        _give_back_what_was_freed()
    _OWN.where, _OWN.end = where, time.monotonic() + ONE_SECONDS
    try:
        yield
    finally:
        _OWN.end = None
        with _CHANGED:
            _All.taken -= cost
            _CHANGED.notify_all()


def _give_back_what_was_freed() -> None:
    """Glibc keeps it, for each thread apart: eight of them held 4 GB of nothing."""
    import ctypes  # noqa: PLC0415  not needed to show help

    with suppress(AttributeError):  # other C libraries lack it
        ctypes.CDLL(None).malloc_trim(0)


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


@contextmanager
def reading(where: str, what: str) -> Iterator[None]:
    """Makes one line of whatever a library raises: they check little before they compute.

    Args:
        where: the medium, for the error.
        what: what it is then said to be, such as `is a broken picture`.

    Raises:
        MediaError: something but a `ChatBindError` was raised inside the block.
    """
    try:
        yield
    except ChatBindError:
        raise
    except Exception as error:
        said = getattr(error, "strerror", None) or reason(error)
        raise MediaError(f"{what} ({said})", where=where) from error


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
