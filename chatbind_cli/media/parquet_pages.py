"""The sizes of the pages of a Parquet file, read from the pages themselves.

The footer says how large everything is unpacked, and may lie; a reader believes each page's own
header, of which this reads as much as it needs (Thrift's compact protocol).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

import pyarrow.parquet

_HEADER_BYTES = 64 * 1024
_MOST_DEPTH = 16

# the kinds of Thrift's values; the whole numbers, 4 to 6, have one form
_STOP, _TRUE, _FALSE, _BYTE, _DOUBLE, _BINARY, _LIST, _STRUCT = 0, 1, 2, 3, 7, 8, 9, 12
_INTEGERS = (4, 5, 6)


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
    """Reads a Thrift struct from bytes; running out of them is a ValueError."""

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
