"""Columns of numbers from CSV and Parquet files, read within limits.

Knows how such files are written, not what their columns mean.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute
import pyarrow.csv
import pyarrow.parquet

from chatbind_cli.errors import MediaError
from chatbind_cli.media.guard import check_time, reading
from chatbind_cli.media.sniff import beginning_of_text, is_number
from chatbind_cli.media.source import MediaSource

Columns = dict[str, npt.NDArray[np.float64]]

_MOST_COLUMNS = 1_000
_HEAD_BYTES = 64 * 1024
_BATCH_ROWS = 64 * 1024
_LONGEST_FOOTER = 16 * 2**20
_LARGEST_PAGE = 16 * 2**20
"""Writers make pages of about 1 MiB."""

_PAGE_HEADER_BYTES = 64 * 1024
_MOST_DEPTH = 16
"""Of what a page's header nests."""

_BROKEN_CSV = "is not a readable CSV table"
_BROKEN_PARQUET = "is not a readable Parquet file"


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
    first, skip = _first_line(source)
    delimiter = next((mark for mark in ",;\t" if mark in first), " ")
    blanks = delimiter == " "
    cells = first.split() if blanks else next(csv.reader([first], delimiter=delimiter))
    cells = [cell.strip() for cell in cells]
    named = not all(is_number(cell) for cell in cells if cell)
    names = _unique(cells) if named else [f"c{i}" for i in range(len(cells))]
    if len(names) > _MOST_COLUMNS:
        raise MediaError(f"has more than {_MOST_COLUMNS} columns", where=source.name)
    with source.open() as stream, reading(source.name, _BROKEN_CSV):
        table = pyarrow.csv.read_csv(
            _with_commas(stream) if blanks else stream,
            read_options=pyarrow.csv.ReadOptions(
                column_names=names, skip_rows=skip + named, use_threads=False
            ),
            convert_options=pyarrow.csv.ConvertOptions(
                include_columns=[name for name in names if not named or wanted(name)]
            ),
            parse_options=pyarrow.csv.ParseOptions(delimiter="," if blanks else delimiter),
        )
        return _numbers(table, source), named


def csv_rows(source: MediaSource, max_bytes: int) -> int:
    """The lines of a text file.

    Raises:
        MediaError: it is larger than `max_bytes`.
    """
    _refuse_larger(source, source.size, max_bytes)
    rows = 1
    with source.open() as stream:
        while part := stream.read(1 << 20):
            rows += max(part.count(b"\n"), part.count(b"\r"))
    return rows


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
    with source.open() as stream, reading(source.name, _BROKEN_PARQUET):
        file = pyarrow.parquet.ParquetFile(stream, buffer_size=1 << 20)
        if file.metadata.num_columns > _MOST_COLUMNS:
            raise MediaError(f"has more than {_MOST_COLUMNS} columns", where=source.name)
        names = [name for name in file.schema_arrow.names if wanted(name)]
        read = [name for name in names if _is_numeric(file.schema_arrow.field(name).type)]
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
        schema = pa.schema([file.schema_arrow.field(name) for name in read])
        columns = _numbers(pa.Table.from_batches(batches, schema), source)
        return columns | {name: np.full(rows, np.nan) for name in names if name not in read}


def parquet_rows(source: MediaSource, max_bytes: int) -> int:
    """How many rows a Parquet file says it has.

    Raises:
        MediaError: it is broken, or would be larger than `max_bytes` unpacked.
    """
    with source.open() as stream, reading(source.name, _BROKEN_PARQUET):
        stream.seek(max(source.size - 8, 0))
        length, end = stream.read(4), stream.read(4)
        if end == b"PAR1" and int.from_bytes(length, "little") > _LONGEST_FOOTER:
            raise MediaError("has a longer footer than any table", where=source.name)
        meta = pyarrow.parquet.ParquetFile(stream).metadata
    unpacked = sum(meta.row_group(i).total_byte_size for i in range(meta.num_row_groups))
    _refuse_larger(source, max(unpacked, meta.num_rows * meta.num_columns * 8), max_bytes)
    _refuse_larger(source, source.size, max_bytes)
    return max(meta.num_rows, 0)


def _refuse_larger(source: MediaSource, size: int, max_bytes: int) -> None:
    if size > max_bytes:
        raise MediaError(f"is larger than {max_bytes / 2**20:.4g} MiB", where=source.name)


def _refuse_large_pages(
    file: pyarrow.parquet.ParquetFile, stream: BinaryIO, read: set[str], source: MediaSource
) -> None:
    """The footer says how large everything is unpacked, and may lie; pages are believed."""
    place = stream.tell()
    for group in range(file.metadata.num_row_groups):
        meta = file.metadata.row_group(group)
        for number in range(meta.num_columns):
            column = meta.column(number)
            if column.path_in_schema not in read:
                continue
            starts = (column.dictionary_page_offset or 0, column.data_page_offset)
            at = min(start for start in starts if start > 0)
            end = min(at + column.total_compressed_size, source.size)
            while at < end:
                check_time()
                stream.seek(at)
                header = io.BytesIO(stream.read(_PAGE_HEADER_BYTES))
                sizes = _thrift_struct(header, 0)
                unpacked, packed = sizes.get(2), sizes.get(3)
                if unpacked is None or packed is None or min(unpacked, packed) < 0:
                    raise ValueError("a page without a size")
                if unpacked > _LARGEST_PAGE:
                    raise MediaError("has larger pages than any table", where=source.name)
                at += header.tell() + packed
    stream.seek(place)


def _thrift_struct(header: BinaryIO, depth: int) -> dict[int, int | None]:
    """The fields of a struct in Thrift's compact protocol by number, as `_thrift_value` has them.

    Raises:
        ValueError: it has no end, or things that no page header has.
    """
    fields: dict[int, int | None] = {}
    number = 0
    while (byte := _byte(header)) & 15:
        number = number + (byte >> 4) if byte >> 4 else _signed(_thrift_number(header))
        fields[number] = _thrift_value(header, byte & 15, depth)
    return fields


def _thrift_value(header: BinaryIO, kind: int, depth: int) -> int | None:
    """A whole number; any other value is passed over."""
    if depth > _MOST_DEPTH:
        raise ValueError("no page header is so deep")
    match kind:
        case 1 | 2:  # true and false, which fields hold in their kind
            pass
        case 3:
            _byte(header)
        case 4 | 5 | 6:
            return _signed(_thrift_number(header))
        case 8:
            header.seek(_thrift_number(header), io.SEEK_CUR)
        case 9:
            byte = _byte(header)
            inner = 3 if byte & 15 in (1, 2) else byte & 15
            for _ in range(_thrift_number(header) if byte >> 4 == 15 else byte >> 4):
                _thrift_value(header, inner, depth + 1)
        case 12:
            _thrift_struct(header, depth + 1)
        case _:
            raise ValueError("no page header")  # which holds neither numbers with a point nor sets
    return None


def _thrift_number(header: BinaryIO) -> int:
    value = 0
    for shift in range(0, 70, 7):
        byte = _byte(header)
        value |= (byte & 127) << shift
        if byte < 128:
            return value
    raise ValueError("a number without an end")


def _signed(number: int) -> int:
    return (number >> 1) ^ -(number & 1)


def _byte(header: BinaryIO) -> int:
    part = header.read(1)
    if not part:
        raise ValueError("a page header without an end")
    return part[0]


def _with_commas(stream: BinaryIO) -> BinaryIO:
    """A table whose cells are set apart by blanks, with single commas instead."""
    lines = iter(lambda: stream.readline(_HEAD_BYTES), b"")
    return io.BytesIO(b"".join(b",".join(line.split()) + b"\n" for line in lines))


def _first_line(source: MediaSource) -> tuple[str, int]:
    """The first line that is not a comment, and how many lines stand before it."""
    try:
        text = beginning_of_text(source.head(_HEAD_BYTES))
    except UnicodeDecodeError as error:
        raise MediaError("is not text", where=source.name) from error
    for number, line in enumerate(text.splitlines()):
        if line.strip() and not line.startswith("#"):
            return line, number
    raise MediaError("holds no table", where=source.name)


def _unique(names: list[str]) -> list[str]:
    """Names that stand there again get a number: `x`, `x#2`."""
    result: list[str] = []
    for at, name in enumerate(names):
        before = names[:at].count(name)
        result.append(f"{name}#{before + 1}" if before else name)
    return result


def _is_time(kind: pa.DataType) -> bool:
    return pa.types.is_timestamp(kind) or pa.types.is_duration(kind)


def _is_numeric(kind: pa.DataType) -> bool:
    types = pa.types
    number = types.is_integer(kind) or types.is_floating(kind) or types.is_decimal(kind)
    return number or _is_time(kind)


def _numbers(table: pa.Table, source: MediaSource) -> Columns:
    if not table.num_rows:
        raise MediaError("holds no rows", where=source.name)
    columns: Columns = {}
    for field, values in zip(table.schema, table.columns, strict=True):
        if _is_time(field.type):
            columns[f"{field.name}_ns"] = _since_start(values)
        elif pa.types.is_decimal(field.type):
            columns[field.name] = values.cast(pa.float64()).to_numpy()
        elif _is_numeric(field.type):
            columns[field.name] = values.to_numpy().astype(np.float64, copy=False)
        else:
            columns[field.name] = np.full(len(values), np.nan)
    return columns


def _since_start(column: pa.ChunkedArray) -> npt.NDArray[np.float64]:
    """Nanoseconds since the first entry; a float64 could not hold those since 1970 exactly."""
    clock = pa.timestamp("ns") if pa.types.is_timestamp(column.type) else pa.duration("ns")
    whole = column.cast(clock).cast(pa.int64())
    return pyarrow.compute.subtract(whole, whole[0]).to_numpy().astype(np.float64)
