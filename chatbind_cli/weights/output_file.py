"""A file of known size, written front to back; a large one around the page cache.

Tens of gigabytes that go through the page cache push everything else out of it, and finding room
for them takes the processor longer than all sums and hashes. So a large file is written by direct
I/O, in large aligned blocks, where the system and the file system know that; else as any other.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from pathlib import Path

import numpy as np

_LARGE_BYTES = 256 << 20
_BLOCK_BYTES = 8 << 20


class OutputFile:
    """The file, open for writing.

    Args:
        path: is created, or written anew.
        size: how many bytes it will have; the room for them is taken at once, so that a full disk
            is noticed at once.

    Raises:
        OSError: it cannot be made, or there is no room for it.
    """

    def __init__(self, path: Path, size: int) -> None:
        self._handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            _reserve(self._handle, size)
        except OSError:
            os.close(self._handle)
            raise
        self._direct = size >= _LARGE_BYTES and _set_direct(self._handle, True)
        # Pages of their own, because direct I/O wants aligned memory.
        self._block = np.frombuffer(
            mmap.mmap(-1, _BLOCK_BYTES if self._direct else mmap.PAGESIZE), dtype=np.uint8
        )
        self._filled = 0

    def write(self, data: bytes | memoryview) -> None:
        """Writes the next bytes.

        Raises:
            OSError: they cannot be written.
        """
        if not self._direct:
            _write_all(self._handle, memoryview(data))
            return
        left = np.frombuffer(data, dtype=np.uint8)
        while left.size:
            count = min(left.size, self._block.size - self._filled)
            self._block[self._filled : self._filled + count] = left[:count]
            left = left[count:]
            self._filled += count
            if self._filled == self._block.size:
                self._flush()

    def _flush(self) -> None:
        """Writes what has gathered; a block that is not full goes through the page cache."""
        view = self._block[: self._filled].data
        self._filled = 0
        if self._direct and len(view) < self._block.size:
            self._direct = not _set_direct(self._handle, False)
        try:
            _write_all(self._handle, view)
        except OSError as error:
            # Some file systems take the flag and then want blocks of another kind.
            if error.errno != errno.EINVAL or not self._direct:
                raise
            _set_direct(self._handle, False)
            _write_all(self._handle, view)

    def close(self, *, sync: bool) -> None:
        """Closes the file.

        Args:
            sync: whether it is whole and has to be on the disk after this.

        Raises:
            OSError: it could not be brought to the disk.
        """
        try:
            if sync:
                self._flush()
                os.fsync(self._handle)
        finally:
            os.close(self._handle)


def _write_all(handle: int, view: memoryview) -> None:
    while view:
        view = view[os.write(handle, view) :]


def _set_direct(handle: int, on: bool) -> bool:
    """Turns direct I/O on or off; returns whether that was possible."""
    if not hasattr(os, "O_DIRECT"):
        return False
    flags = fcntl.fcntl(handle, fcntl.F_GETFL)
    wanted = flags | os.O_DIRECT if on else flags & ~os.O_DIRECT
    try:
        fcntl.fcntl(handle, fcntl.F_SETFL, wanted)
    except OSError:
        return False
    return True


def _reserve(handle: int, size: int) -> None:
    if not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(handle, 0, size)
    except OSError as error:
        # Some file systems cannot do it; then the room is taken as the data come.
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
