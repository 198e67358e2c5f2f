"""Training records from Parquet files: a row a record, columns named as LLaVA's keys."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.types as types

from chatbind_cli.errors import RecordError, reason
from chatbind_cli.json_text import Line
from chatbind_cli.media.modality import MODALITIES

_MAGIC = b"PAR1"
_KEYS = ("id", *MODALITIES, "conversations", "instruction", "input", "output")
_MOST_BYTES = 1 << 30  # of the columns of a row group; writers make groups of 128 MiB
_BATCH_ROWS = 256
_LONGEST_TEXT, _MOST_ITEMS = 16 << 20, 1_000_000  # of a footer


def is_parquet(path: Path) -> bool:
    """Whether a file says so; a pipe is not asked."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(_MAGIC)) == _MAGIC


def read_parquet(path: Path, name: str) -> Iterator[Line]:
    """Reads the records of a file a few at a time; a key without a value is none.

    Args:
        path: the file.
        name: what messages call it.

    Yields:
        The records at `NAME[row]`; only the keys of conversations are read.

    Raises:
        RecordError: the file cannot be read, has a row group that takes more than a GiB, or media
            in place of their names.
    """
    row = 0
    try:
        with pq.ParquetFile(
            path,
            thrift_string_size_limit=_LONGEST_TEXT,
            thrift_container_size_limit=_MOST_ITEMS,
        ) as file:
            columns = _columns(file, name)
            for batch in file.iter_batches(_BATCH_ROWS, columns=columns, use_threads=False):
                for values in batch.to_pylist():
                    record = {key: value for key, value in values.items() if value is not None}
                    yield Line(record, f"{name}[{row}]", row + 1)
                    row += 1
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        where = f"{name}[{row}]" if row else name
        raise RecordError(f"is not readable as Parquet ({reason(error)})", where=where) from error


def _columns(file: pq.ParquetFile, name: str) -> list[str]:
    """Those that are read: no more than fits, and names where media are wanted."""
    schema = file.schema_arrow
    columns = [key for key in _KEYS if key in schema.names]
    for key in MODALITIES:
        kind = schema.field(key).type if key in columns else pa.string()
        if types.is_list(kind) or types.is_large_list(kind):
            kind = kind.value_type
        if not (types.is_string(kind) or types.is_large_string(kind) or types.is_null(kind)):
            raise RecordError(
                f"its column {key} holds {kind!s:.80}, not file names",
                where=name,
                hint="write the media to files, and their names into the column",
            )
    for index in range(file.num_row_groups):
        group = file.metadata.row_group(index)
        parts = [group.column(n) for n in range(group.num_columns)]
        size = sum(
            p.total_uncompressed_size for p in parts if p.path_in_schema.split(".")[0] in columns
        )
        if size > _MOST_BYTES:
            raise RecordError(
                f"its row group {index} takes {size / 2**30:.1f} GiB",
                where=name,
                hint="write it anew with smaller row groups",
            )
    return columns
