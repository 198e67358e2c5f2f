"""Processes that wait for each other in vain end, soon where they train, else after hours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Final

import torch.distributed as dist

# one process may encode media, or write a result, long after the others are done with theirs
PATIENCE: Final = timedelta(hours=6)
# the longest that training has one process do alone is to write a checkpoint
_WHILE_TRAINING = timedelta(minutes=30)


@contextmanager
def noticed_soon() -> Iterator[None]:
    """Has collective operations fail that another process does not come to within half an hour.

    A process that dies ends the others at once where `launch` has started them. Under another
    launcher, and where one hangs, the GPUs of all would be held until `PATIENCE` is over.
    """
    if not dist.is_initialized():
        yield
        return
    _wait(_WHILE_TRAINING)
    try:
        yield
    finally:
        _wait(PATIENCE)


def _wait(at_most: timedelta) -> None:
    processes = dist.group.WORLD
    assert processes is not None
    with suppress(RuntimeError):  # of a backend that is neither gloo nor NCCL
        processes.set_timeout(at_most)
