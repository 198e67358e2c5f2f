"""Counts that a file states, and that the library which reads it would believe.

MP4 and QuickTime: a few bytes can state twenty million samples of equal size, and FFmpeg takes 70
bytes of memory for each when the file is opened. Parquet: the footer says how large everything is
unpacked, and may lie; a reader believes each page's own header.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import TYPE_CHECKING, BinaryIO

from chatbind_cli.errors import MediaError
from chatbind_cli.media.source import MediaSource

if TYPE_CHECKING:
    import pyarrow.parquet

_MOST_SAMPLES = 3_000_000
"""Of all tracks together: ten hours of video at 60 frames a second and sound in packets."""

_LARGEST_MOOV = 64 * 2**20
_MOST_BOXES = 200_000
_FOLDERS = frozenset({b"trak", b"mdia", b"minf", b"stbl", b"traf"})

_HEADER_BYTES = 64 * 1024
_MOST_DEPTH = 16

# the kinds of Thrift's values; the whole numbers, 4 to 6, have one form
_STOP, _TRUE, _FALSE, _BYTE, _DOUBLE, _BINARY, _LIST, _STRUCT = 0, 1, 2, 3, 7, 8, 9, 12
_INTEGERS = (4, 5, 6)


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


def largest_page(stream: BinaryIO, column: pyarrow.parquet.ColumnChunkMetaData, size: int) -> int:
    """Bytes of the largest page of a column chunk, unpacked.

    Args:
        stream: the file.
        column: what the footer says of the chunk.
        size: length of the file.

    Raises:
        ValueError: there is no page where one should be.
    """
    starts = (column.dictionary_page_offset or 0, column.data_page_offset)
    at = min(start for start in starts if start > 0)
    end = min(at + column.total_compressed_size, size)
    largest = 0
    while at < end:
        stream.seek(at)
        header = _Header(stream.read(_HEADER_BYTES))
        numbers = {field: header.value(kind) for field, kind in header.fields()}
        unpacked, packed = numbers.get(2, -1), numbers.get(3, -1)
        if min(unpacked, packed) < 0:
            raise ValueError("a page without a size")
        largest = max(largest, unpacked)
        at += header.at + packed
    return largest


class _Header:
    """Reads a struct in Thrift's compact protocol; running out of bytes is a ValueError."""

    def __init__(self, content: bytes) -> None:
        self._content = content
        self.at = 0

    def fields(self) -> Iterator[tuple[int, int]]:
        """Number and kind of each field of a struct, whose value is to be read before the next."""
        number = 0
        while (head := self._byte()) & 15 != _STOP:
            number = number + (head >> 4) if head >> 4 else self._integer()
            yield number, head & 15

    def value(self, kind: int, depth: int = 0) -> int:
        """A whole number; of any other value the end is found, and -1 given."""
        if depth > _MOST_DEPTH:
            raise ValueError("no page header is so deep")
        if kind in _INTEGERS:
            return self._integer()
        if kind in (_BYTE, _DOUBLE):
            self.at += 1 if kind == _BYTE else 8
        elif kind == _BINARY:
            length = self._varint()
            self.at += length
        elif kind == _LIST:
            head = self._byte()
            inner = _BYTE if head & 15 in (_TRUE, _FALSE) else head & 15
            for _ in range(self._varint() if head >> 4 == 15 else head >> 4):
                self.value(inner, depth + 1)
        elif kind == _STRUCT:
            for _, inner in self.fields():
                self.value(inner, depth + 1)
        elif kind not in (_TRUE, _FALSE):
            raise ValueError("no page header")  # which holds neither sets nor maps
        return -1

    def _integer(self) -> int:
        number = self._varint()
        return (number >> 1) ^ -(number & 1)

    def _varint(self) -> int:
        value = 0
        for shift in range(0, 70, 7):
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise ValueError("a number without an end")

    def _byte(self) -> int:
        if self.at >= len(self._content):
            raise ValueError("a page header without an end")
        self.at += 1
        return self._content[self.at - 1]
