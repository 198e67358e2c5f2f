"""Columns of numbers from CSV and Parquet files, read within limits.

Knows how such files are written, not what their columns mean.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator, Sequence
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute
import pyarrow.csv
import pyarrow.parquet

from chatbind_cli.errors import MediaError
from chatbind_cli.media.budget import check_time
from chatbind_cli.media.parquet_pages import largest_page
from chatbind_cli.media.source import MediaSource

Columns = dict[str, npt.NDArray[np.float64]]

_MOST_COLUMNS = 1_000
_HEAD_BYTES = 64 * 1024
_BATCH_ROWS = 64 * 1024
_LONGEST_FOOTER = 16 * 2**20
_LARGEST_PAGE = 16 * 2**20
"""Writers make pages of about 1 MiB."""


def read_csv(source: MediaSource, wanted: Callable[[str], bool]) -> tuple[Columns, bool]:
    """Numeric columns of a CSV file; cells that hold no number become NaN.

    Comma, semicolon, tab or white space between the cells; lines that start with `#` before the
    data are passed over.

    Args:
        source: the file.
        wanted: whether a column of that name is needed; without a header all are.

    Returns:
        columns by name, and whether the names come from a header line (else `c0`, `c1`, ...).

    Raises:
        MediaError: it is not text, not a table, or has no rows.
    """
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
                convert_options=pyarrow.csv.ConvertOptions(
                    include_columns=[name for name in names if not named or wanted(name)]
                ),
                parse_options=pyarrow.csv.ParseOptions(
                    delimiter="," if delimiter == " " else delimiter,
                    invalid_row_handler=lambda row: "error",
                ),
            )
        return _numbers(table.to_batches(), table.schema, source), named
    except (pa.ArrowInvalid, pa.ArrowException, UnicodeDecodeError) as error:
        raise _unreadable("CSV table", source, error) from error


def read_parquet(source: MediaSource, max_rows: int, wanted: Callable[[str], bool]) -> Columns:
    """Numeric columns of a Parquet file; other types and nulls become NaN.

    Args:
        source: the file.
        max_rows: as many as the file says it has; it may lie.
        wanted: whether a column of that name is needed.

    Raises:
        MediaError: it is broken, has no rows, more than `max_rows`, or pages larger than any writer
            makes.
    """
    try:
        with source.open() as stream:
            file = pyarrow.parquet.ParquetFile(stream, buffer_size=1 << 20)
            if file.metadata.num_columns > _MOST_COLUMNS:
                raise MediaError(f"has more than {_MOST_COLUMNS} columns", where=source.name)
            schema = file.schema_arrow
            names = [name for name in schema.names if wanted(name)]
            read = [name for name in names if _is_numeric(schema.field(name).type)]
            _refuse_large_pages(file, stream, set(read), source)
            batches = []
            rows = 0
            for batch in file.iter_batches(_BATCH_ROWS, columns=read, use_threads=False):
                check_time()
                rows += batch.num_rows
                if rows > max_rows:
                    raise MediaError(
                        f"says that it has {max_rows:,} rows, and has more", where=source.name
                    )
                batches.append(batch)
            columns = _numbers(batches, pa.schema([schema.field(name) for name in read]), source)
            return columns | {name: np.full(rows, np.nan) for name in names if name not in read}
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise _unreadable("Parquet file", source, error) from error


def parquet_rows(source: MediaSource, max_bytes: int) -> int:
    """How many rows a Parquet file says it has.

    Raises:
        MediaError: it is broken, or would be larger than `max_bytes` unpacked.
    """
    with source.open() as stream:
        stream.seek(max(source.size - 8, 0))
        length, end = stream.read(4), stream.read(4)
        if end == b"PAR1" and int.from_bytes(length, "little") > _LONGEST_FOOTER:
            raise MediaError("has a longer footer than any table", where=source.name)
        try:
            meta = pyarrow.parquet.ParquetFile(stream).metadata
        except (pa.ArrowException, OSError, ValueError) as error:
            raise _unreadable("Parquet file", source, error) from error
    unpacked = sum(meta.row_group(i).total_byte_size for i in range(meta.num_row_groups))
    if max(unpacked, meta.num_rows * meta.num_columns * 8, source.size) > max_bytes:
        raise MediaError(f"is larger than {max_bytes / 2**20:.4g} MiB", where=source.name)
    return max(meta.num_rows, 0)


def _refuse_large_pages(
    file: pyarrow.parquet.ParquetFile, stream: BinaryIO, read: set[str], source: MediaSource
) -> None:
    place = stream.tell()
    for group in range(file.metadata.num_row_groups):
        check_time()
        meta = file.metadata.row_group(group)
        for number in range(meta.num_columns):
            column = meta.column(number)
            if column.path_in_schema not in read:
                continue
            if largest_page(stream, column, source.size) > _LARGEST_PAGE:
                raise MediaError("has larger pages than any table", where=source.name)
    stream.seek(place)


def csv_rows(source: MediaSource, max_bytes: int) -> int:
    """The lines of a text file.

    Raises:
        MediaError: it is larger than `max_bytes`.
    """
    if source.size > max_bytes:
        raise MediaError(f"is larger than {max_bytes / 2**20:.4g} MiB", where=source.name)
    rows = 1
    with source.open() as stream:
        while part := stream.read(1 << 20):
            rows += max(part.count(b"\n"), part.count(b"\r"))
    return rows


def _unreadable(kind: str, source: MediaSource, error: Exception) -> MediaError:
    reason = (str(error).splitlines() or [type(error).__name__])[0][:160]
    return MediaError(f"is not a readable {kind} ({reason})", where=source.name)


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
        found = len(self._rest)
        parts = [self._rest]
        while size < 0 or found < size:
            line = next(self._lines, None)
            if line is None:
                break
            parts.append(line)
            found += len(line)
        self._rest = b"".join(parts)
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


def _is_numeric(kind: pa.DataType) -> bool:
    return any(
        is_kind(kind)
        for is_kind in (
            pa.types.is_timestamp, pa.types.is_duration, pa.types.is_integer,
            pa.types.is_floating, pa.types.is_decimal,
        )
    )  # fmt: skip


def _numbers(batches: Sequence[pa.RecordBatch], schema: pa.Schema, source: MediaSource) -> Columns:
    if not any(batch.num_rows for batch in batches):
        raise MediaError("holds no rows", where=source.name)
    columns: Columns = {}
    for index, field in enumerate(schema):
        parts = pa.chunked_array([batch.column(index) for batch in batches], field.type)
        if pa.types.is_timestamp(field.type) or pa.types.is_duration(field.type):
            columns[f"{field.name}_ns"] = _since_start(parts)
        elif pa.types.is_integer(field.type) or pa.types.is_floating(field.type):
            columns[field.name] = parts.to_numpy().astype(np.float64, copy=False)
        elif pa.types.is_decimal(field.type):
            columns[field.name] = parts.cast(pa.float64()).to_numpy()
        else:
            columns[field.name] = np.full(len(parts), np.nan)
    return columns


def _since_start(column: pa.ChunkedArray) -> npt.NDArray[np.float64]:
    """Nanoseconds since the first entry; a float64 could not hold those since 1970 exactly."""
    clock = pa.timestamp("ns") if pa.types.is_timestamp(column.type) else pa.duration("ns")
    whole = column.cast(clock).cast(pa.int64())
    return pyarrow.compute.subtract(whole, whole[0]).to_numpy().astype(np.float64)
