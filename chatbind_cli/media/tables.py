"""Columns of numbers from CSV and Parquet files, read within limits.

Knows how such files are written, not what their columns mean.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute
import pyarrow.csv
import pyarrow.parquet

from chatbind_cli.errors import MediaError
from chatbind_cli.media.source import MediaSource

Columns = dict[str, npt.NDArray[np.float64]]

_MOST_COLUMNS = 1_000
_HEAD_BYTES = 64 * 1024


def read_csv(source: MediaSource, max_bytes: int) -> tuple[Columns, bool]:
    """The numeric columns of a CSV file; cells that hold no number become NaN.

    Comma, semicolon, tab or white space between the cells; lines that start with `#` before the
    data are passed over.

    Returns:
        columns by name, and whether the names come from a header line (else `c0`, `c1`, ...).

    Raises:
        MediaError: it is not text, not a table, too large, or has no rows.
    """
    if source.size > max_bytes:
        raise MediaError(f"is larger than {max_bytes / 2**20:.4g} MiB", where=source.name)
    head, skip = _first_lines(source)
    delimiter = _delimiter(head)
    first = _cells(head, delimiter)
    named = not all(_is_number(cell) for cell in first if cell)
    names = _unique(first) if named else [f"c{i}" for i in range(len(first))]
    if len(names) > _MOST_COLUMNS:
        raise MediaError(f"has more than {_MOST_COLUMNS} columns", where=source.name)
    try:
        with source.open() as stream:
            table = pyarrow.csv.read_csv(
                _Plain(stream, delimiter),
                read_options=pyarrow.csv.ReadOptions(
                    column_names=names, skip_rows=skip + named, use_threads=False
                ),
                parse_options=pyarrow.csv.ParseOptions(
                    delimiter="," if delimiter == " " else delimiter,
                    invalid_row_handler=lambda row: "error",
                ),
            )
        return _numbers(table, source), named
    except (pa.ArrowInvalid, pa.ArrowException, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0][:160]
        raise MediaError(f"is not a readable CSV table ({reason})", where=source.name) from error


def read_parquet(source: MediaSource, max_bytes: int) -> Columns:
    """The numeric columns of a Parquet file; others and nulls become NaN.

    Raises:
        MediaError: it is broken, has no rows, or its columns unpacked would exceed `max_bytes`.
    """
    try:
        with source.open() as stream:
            file = pyarrow.parquet.ParquetFile(stream)
            meta = file.metadata
            if meta.num_columns > _MOST_COLUMNS:
                raise MediaError(f"has more than {_MOST_COLUMNS} columns", where=source.name)
            # both what the file says of itself and 8 bytes for each number that comes out
            unpacked = sum(meta.row_group(i).total_byte_size for i in range(meta.num_row_groups))
            if max(unpacked, meta.num_rows * meta.num_columns * 8) > max_bytes:
                raise MediaError(f"is larger than {max_bytes / 2**20:.4g} MiB", where=source.name)
            return _numbers(file.read(use_threads=False), source)
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:160]
        raise MediaError(f"is not a readable Parquet file ({reason})", where=source.name) from error


class _Plain(io.RawIOBase):
    """The stream itself, or, for columns set apart by blanks, with single commas instead."""

    def __init__(self, stream: BinaryIO, delimiter: str) -> None:
        self._lines = self._with_commas(stream) if delimiter == " " else None
        self._stream = stream
        self._rest = b""

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        if self._lines is None:
            return self._stream.read(size)
        while size < 0 or len(self._rest) < size:
            line = next(self._lines, None)
            if line is None:
                break
            self._rest += line
        size = len(self._rest) if size < 0 else size
        part, self._rest = self._rest[:size], self._rest[size:]
        return part

    @staticmethod
    def _with_commas(stream: BinaryIO) -> Iterator[bytes]:
        while line := stream.readline(_HEAD_BYTES):
            yield b",".join(line.split()) + b"\n"


def _first_lines(source: MediaSource) -> tuple[str, int]:
    """The first line that is not a comment, and how many lines stand before it."""
    try:
        text = source.head(_HEAD_BYTES).decode("utf-8-sig", errors="strict")
    except UnicodeDecodeError as error:
        if error.start < _HEAD_BYTES - 4:
            raise MediaError("is not text", where=source.name) from error
        text = source.head(error.start).decode("utf-8-sig")
    for number, line in enumerate(text.splitlines()):
        if line.strip() and not line.startswith("#"):
            return line, number
    raise MediaError("holds no table", where=source.name)


def _delimiter(line: str) -> str:
    for candidate in (",", ";", "\t"):
        if candidate in line:
            return candidate
    return " "


def _cells(line: str, delimiter: str) -> list[str]:
    if delimiter == " ":
        return line.split()
    return [cell.strip() for cell in next(csv.reader([line], delimiter=delimiter))]


def _unique(names: list[str]) -> list[str]:
    seen: dict[str, int] = {}
    result = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        result.append(name if seen[name] == 1 else f"{name}#{seen[name]}")
    return result


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _numbers(table: pa.Table, source: MediaSource) -> Columns:
    if not table.num_rows:
        raise MediaError("holds no rows", where=source.name)
    columns: Columns = {}
    for name, column in zip(table.column_names, table.columns, strict=True):
        if pa.types.is_timestamp(column.type) or pa.types.is_duration(column.type):
            columns[f"{name}_ns"] = _since_start(column)
        elif pa.types.is_integer(column.type) or pa.types.is_floating(column.type):
            columns[name] = column.to_numpy().astype(np.float64)
        elif pa.types.is_decimal(column.type):
            columns[name] = column.cast(pa.float64()).to_numpy()
        else:
            columns[name] = np.full(table.num_rows, np.nan)
    return columns


def _since_start(column: pa.ChunkedArray) -> npt.NDArray[np.float64]:
    """Nanoseconds since the first entry; a float64 could not hold those since 1970 exactly."""
    clock = pa.timestamp("ns") if pa.types.is_timestamp(column.type) else pa.duration("ns")
    whole = column.cast(clock).cast(pa.int64())
    return pyarrow.compute.subtract(whole, whole[0]).to_numpy().astype(np.float64)
