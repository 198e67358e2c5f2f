"""The sizes of the pages of a Parquet file, read from the pages themselves.

The footer says how large everything is unpacked, and may lie; a reader believes each page's own
header, of which this reads as much as it needs (Thrift's compact protocol).
"""

from __future__ import annotations

from typing import BinaryIO

import pyarrow.parquet

_HEADER_BYTES = 64 * 1024
_MOST_DEPTH = 16
_STOP, _TRUE, _FALSE, _BYTE, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = (
    0, 1, 2, 3, 7, 8, 9, 10, 11, 12,
)  # fmt: skip


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
        header = _Reader(stream.read(_HEADER_BYTES))
        unpacked, packed = header.page_sizes()
        largest = max(largest, unpacked)
        at += header.at + packed
    return largest


class _Reader:
    """Reads a Thrift struct from bytes; running out of them is a ValueError."""

    def __init__(self, content: bytes) -> None:
        self._content = content
        self.at = 0

    def page_sizes(self) -> tuple[int, int]:
        """Fields 2 and 3 of a page header; goes to its end."""
        sizes = {2: -1, 3: -1}
        field = 0
        while True:
            kind, field = self._field(field)
            if kind == _STOP:
                break
            if field in sizes:
                number = self._varint()
                sizes[field] = (number >> 1) ^ -(number & 1)
            else:
                self._skip(kind, 0)
        if min(sizes.values()) < 0:
            raise ValueError("a page without a size")
        return sizes[2], sizes[3]

    def _field(self, last: int) -> tuple[int, int]:
        head = self._byte()
        if (head & 15) == _STOP:
            return _STOP, 0
        if head >> 4:
            return head & 15, last + (head >> 4)
        number = self._varint()
        return head & 15, (number >> 1) ^ -(number & 1)

    def _byte(self) -> int:
        if self.at >= len(self._content):
            raise ValueError("a page header without an end")
        self.at += 1
        return self._content[self.at - 1]

    def _varint(self) -> int:
        value = 0
        for shift in range(0, 70, 7):
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise ValueError("a number without an end")

    def _skip(self, kind: int, depth: int) -> None:
        if depth > _MOST_DEPTH or kind in (_SET, _MAP):
            raise ValueError("no page header")  # which holds neither
        if kind in (_TRUE, _FALSE):
            return
        if kind == _BYTE:
            self.at += 1
        elif kind == _DOUBLE:
            self.at += 8
        elif kind == _BINARY:
            length = self._varint()
            self.at += length
        elif kind == _LIST:
            head = self._byte()
            for _ in range(self._varint() if head >> 4 == 15 else head >> 4):
                self._skip(head & 15, depth + 1)
        elif kind == _STRUCT:
            field = 0
            while True:
                inner, field = self._field(field)
                if inner == _STOP:
                    return
                self._skip(inner, depth + 1)
        else:
            self._varint()
