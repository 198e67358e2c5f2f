"""Question records as they come, gathered into batches.

From a file, a batch is a window of fixed size on a fixed grid of positions: a run that goes on
after a kill meets the very same batches again, and so the very same arithmetic. From a pipe that
pauses, a batch is closed early, so that nobody waits for an answer because others have not asked
yet. Knows nothing of what a record means.
"""

from __future__ import annotations

import io
import os
import queue
import stat
import threading
from collections.abc import Iterator
from typing import IO

from chatbind_cli.errors import ChatBindError
from chatbind_cli.jsonl import Line

Item = Line

IDLE_SECONDS = 0.5
"""How long a pipe may pause before the batch that is being gathered is closed."""

_MOST_AHEAD = 256
"""Records that are read before they are asked for; what bounds the memory of a fast pipe."""


def gather(
    records: Iterator[Item], size: int, *, idle_seconds: float | None = None
) -> Iterator[list[Item]]:
    """Batches of `size` records; a smaller one is the last, or the last before a pause.

    Args:
        records: the records with the places where they stand.
        size: records a batch.
        idle_seconds: close a batch early, be it empty, when no record comes for so long; None
            waits for ever. With a number, the records are read in a thread of their own.

    Raises:
        Whatever reading the records raises, after the batch before it.
    """
    batch: list[Item] = []
    arrivals = records if idle_seconds is None else _arrivals(records, idle_seconds)
    while True:
        try:
            item = next(arrivals)
        except StopIteration:
            break
        except (ChatBindError, OSError):
            if batch:
                yield batch
            raise
        if item is not None:
            batch.append(item)
        if item is None or len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def own_stream(stream: IO[bytes]) -> IO[bytes]:
    """The stream over a descriptor of its own, where it has one.

    A thread that still waits in `sys.stdin` when the program ends would keep the interpreter from
    closing it, which ends in a crash.
    """
    try:
        return os.fdopen(os.dup(stream.fileno()), "rb")
    except (OSError, io.UnsupportedOperation):
        return stream


def may_pause(stream: IO[bytes]) -> bool:
    """Whether somebody writes the stream while it is read (a pipe or terminal, not a file)."""
    try:
        return not stat.S_ISREG(os.fstat(stream.fileno()).st_mode)
    except (OSError, io.UnsupportedOperation):
        return False


class _End:
    """Marks the end of the records, and why they ended."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error


def _arrivals(records: Iterator[Item], idle_seconds: float) -> Iterator[Item | None]:
    """The records, and None after each pause longer than `idle_seconds`."""
    arrived: queue.Queue[Item | _End] = queue.Queue(_MOST_AHEAD)
    abandoned = threading.Event()
    # a daemon: it may wait for a record that never comes
    threading.Thread(target=_read, args=(records, arrived, abandoned), daemon=True).start()
    paused = False
    try:
        while True:
            try:
                item = arrived.get(timeout=None if paused else idle_seconds)
            except queue.Empty:
                paused = True
                yield None
                continue
            paused = False
            if isinstance(item, _End):
                if item.error is not None:
                    raise item.error
                return
            yield item
    finally:
        abandoned.set()


def _read(
    records: Iterator[Item], arrived: queue.Queue[Item | _End], abandoned: threading.Event
) -> None:
    end = _End()
    try:
        for item in records:
            if not _put(arrived, item, abandoned):
                return
    except Exception as error:  # raised again in the thread that reads the queue
        end = _End(error)
    _put(arrived, end, abandoned)


def _put(arrived: queue.Queue[Item | _End], item: Item | _End, abandoned: threading.Event) -> bool:
    while not abandoned.is_set():
        try:
            arrived.put(item, timeout=0.2)
        except queue.Full:
            continue
        return True
    return False
