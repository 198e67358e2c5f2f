"""Streams that may be compressed, unpacked no further ahead than is read.

Knows nothing of what is in them.
"""

from __future__ import annotations

import gzip
import io
import zlib
from typing import IO, Any

BROKEN = (EOFError, gzip.BadGzipFile, zlib.error)
"""What reading a stream from `decompressed` raises where its compression is broken."""

_GZIP = b"\x1f\x8b"
_ZSTD = b"\x28\xb5\x2f\xfd"
_MOST_WINDOW = 128 << 20  # what the zstd program takes without being asked


def decompressed(file: IO[bytes]) -> IO[bytes]:
    """The stream itself, or its content if it starts like gzip or zstd."""
    buffered: Any = file if hasattr(file, "peek") else io.BufferedReader(file)
    head = buffered.peek(4)[:4]
    if head.startswith(_GZIP):
        return gzip.GzipFile(fileobj=buffered)  # type: ignore[return-value]
    if head == _ZSTD:
        return io.BufferedReader(_ZstdFile(buffered))
    return buffered


class _ZstdFile(io.RawIOBase):
    """The content of zstd frames; zstandard's own reader takes a cut file for a whole one."""

    def __init__(self, file: IO[bytes]) -> None:
        import zstandard

        self._file = file
        self._new = zstandard.ZstdDecompressor(max_window_size=_MOST_WINDOW).decompressobj
        self._broken = zstandard.ZstdError
        self._frame: Any = None
        self._packed = b""
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Fills the buffer with what is ready, at least one byte before the end."""
        while not self._ready:
            # a KiB at a time: all that is given is unpacked at once, and four bytes may be 128 KiB
            self._packed = self._packed or self._file.read1(1 << 10)  # type: ignore[attr-defined]
            if not self._packed:
                if self._frame is not None:
                    raise EOFError("the file ended before the end of a zstd frame")
                return 0
            self._frame = self._frame or self._new()
            try:
                self._ready = memoryview(self._frame.decompress(self._packed))
            except self._broken as error:
                raise EOFError(str(error)) from error
            self._packed = self._frame.unused_data
            if self._frame.eof:
                self._frame = None
        n = min(len(buffer), len(self._ready))
        buffer[:n], self._ready = self._ready[:n], self._ready[n:]
        return n
