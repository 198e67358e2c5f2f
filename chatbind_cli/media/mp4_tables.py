"""The tables of samples in MP4 and QuickTime files, whose counts are believed by FFmpeg.

A few bytes can state twenty million samples of equal size, and each takes 70 bytes of memory
when the file is opened. Knows the boxes that hold such counts, and nothing else of the format.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import BinaryIO

from chatbind_cli.errors import MediaError
from chatbind_cli.media.source import MediaSource

_MOST_SAMPLES = 3_000_000
"""Of all tracks together: ten hours of video at 60 frames a second and sound in packets."""

_LARGEST_MOOV = 64 * 2**20
_MOST_BOXES = 200_000
_FOLDERS = frozenset({b"trak", b"mdia", b"minf", b"stbl", b"traf"})


def refuse_endless_tables(source: MediaSource) -> None:
    """Refuses a file that states more samples than there is room for.

    Raises:
        MediaError: it does, or its tables are compressed or larger than any film's.
    """
    head = source.head(8)
    if head[4:8] not in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot"):
        return
    samples = 0
    with source.open() as stream:
        for kind, start, size in _boxes(stream, 0, source.size):
            if kind not in (b"moov", b"moof"):
                continue
            if size > _LARGEST_MOOV:
                raise MediaError("has larger tables than any film", where=source.name)
            stream.seek(start)
            content = stream.read(size)
            if b"cmov" in content[:64]:
                raise MediaError("has compressed tables, which are not read", where=source.name)
            samples += _samples(content)
            if samples > _MOST_SAMPLES:
                raise MediaError(
                    f"states more than {_MOST_SAMPLES:,} samples", where=source.name, hint="cut it"
                )


def _boxes(stream: BinaryIO, at: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Kind, start and size of the content of each box between two places."""
    for _ in range(_MOST_BOXES):
        stream.seek(at)
        head = stream.read(16)
        size, first = int.from_bytes(head[:4], "big"), 8
        if size == 1:
            size, first = int.from_bytes(head[8:16], "big"), 16
        elif size == 0:
            size = end - at
        if len(head) < 8 or size < first:
            return
        yield head[4:8], at + first, min(size, end - at) - first
        at += size
        if at >= end:
            return


def _samples(content: bytes) -> int:
    """How many samples FFmpeg would list for the boxes of a `moov` or `moof`."""
    stream = io.BytesIO(content)
    listed, even = 0, False
    for kind, start, size in _boxes(stream, 0, len(content)):
        part = content[start : start + size]
        if kind in _FOLDERS:
            listed += _samples(part)
        elif kind in (b"stsz", b"stz2"):
            listed += int.from_bytes(part[8:12], "big")
        elif kind == b"trun":
            listed += int.from_bytes(part[4:8], "big")
        elif kind == b"stts":
            # sound of single samples, each a tick long, is listed by chunks
            even = part[4:8] == b"\0\0\0\1" and part[12:16] == b"\0\0\0\1"
    return 0 if even else listed
