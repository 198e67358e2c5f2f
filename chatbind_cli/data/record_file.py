"""Checked records of a file as Arrow keeps them: mapped from another file, or in memory.

A record stays the JSON that it was and is parsed when it is asked for, which takes microseconds:
half a million of them cost no Python objects, and processes that map one file share its pages.
What the records mean is not known here.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import orjson
import pyarrow as pa
import pyarrow.compute as pc

from chatbind_cli.json_text import Record

_SCHEMA = pa.schema(
    {
        "place": pa.string(),
        "record": pa.binary(),
        "names": pa.large_list(pa.large_string()),
        "error": pa.string(),
    }
)
_BATCH_ROWS, _BATCH_BYTES = 8192, 16 << 20  # that wait in memory while a file is written
_BY_JSON = b" "  # what begins a record that orjson cannot write, and would not read exactly


class Row(NamedTuple):
    """A record as it is kept.

    Args:
        place: where it stands in its file, `:17` or `[16]`.
        record: its JSON, see `packed`; None of one that cannot be used.
        names: what it names, to be found without parsing it.
        error: why it cannot be used, beginning with the place; None of one that can.
    """

    place: str
    record: bytes | None = None
    names: list[str] | None = None
    error: str | None = None


def packed(record: Any) -> bytes:
    """A record's JSON: any that Python can read again."""
    try:
        return orjson.dumps(record)
    except TypeError:  # whole numbers of more than 64 bits, halves of surrogate pairs
        return _BY_JSON + json.dumps(record).encode()


def write_rows(rows: Iterable[Row], sink: Any) -> None:
    """Writes an Arrow file; `sink` is a path or what pyarrow can write to.

    Raises:
        OSError: it cannot be written.
    """
    with pa.ipc.new_file(sink, _SCHEMA) as writer:
        for some in _batched(rows):
            writer.write_batch(pa.record_batch(list(zip(*some, strict=True)), schema=_SCHEMA))


def _batched(rows: Iterable[Row]) -> Iterator[list[Row]]:
    some: list[Row] = []
    held = 0
    for row in rows:
        some.append(row)
        held += len(row.record or b"")
        if len(some) == _BATCH_ROWS or held >= _BATCH_BYTES:
            yield some
            some, held = [], 0
    if some:
        yield some


class RecordFile:
    """The records that `write_rows` wrote.

    Args:
        source: the Arrow file, or its bytes.
        name: what messages call the file that was read.

    Raises:
        OSError: it cannot be opened.
        pyarrow.ArrowInvalid: it is no such file.
    """

    def __init__(self, source: Path | pa.Buffer, name: str) -> None:
        self.name = name
        self._source = source
        reader = pa.ipc.open_file(
            pa.memory_map(str(source)) if isinstance(source, Path) else pa.BufferReader(source)
        )
        if reader.schema != _SCHEMA:
            raise pa.ArrowInvalid("holds other columns")
        batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        self._starts = np.cumsum([0, *(batch.num_rows for batch in batches)]).tolist()
        self._columns = {
            field.name: [batch.column(field.name) for batch in batches] for field in _SCHEMA
        }

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process maps the file itself."""
        return RecordFile, (self._source, self.name)

    def __len__(self) -> int:
        """The number of records, good and bad."""
        return int(self._starts[-1])

    def record(self, row: int) -> tuple[Record, str]:
        """A record that can be used, and where it stands."""
        index = bisect_right(self._starts, row) - 1
        row -= self._starts[index]
        text = self._columns["record"][index][row].as_py()
        record = json.loads(text) if text.startswith(_BY_JSON) else orjson.loads(text)
        return record, self.name + self._columns["place"][index][row].as_py()

    @cached_property
    def good(self) -> npt.NDArray[np.int64]:
        """The rows that can be used."""
        return np.flatnonzero(pc.is_null(self._column("error")).to_numpy())

    def errors(self) -> list[Record]:
        """What is wrong with the others, `{"record": where, "error": ...}` each."""
        table = pa.table({"place": self._column("place"), "error": self._column("error")})
        bad = table.filter(pc.is_valid(table["error"])).to_pylist()
        return [
            {"record": self.name + row["place"], "error": self.name + row["error"]} for row in bad
        ]

    def sizes(self) -> npt.NDArray[np.int64]:
        """The bytes of each record."""
        sizes = pc.binary_length(self._column("record")).cast(pa.int64())
        return pc.fill_null(sizes, 0).to_numpy()

    def names(self, rows: npt.NDArray[np.int64]) -> list[pa.Array]:
        """The names in some records, in order, a part after the other."""
        return [lists.flatten() for lists in self._names(rows).chunks]

    def naming(self, rows: npt.NDArray[np.int64], names: Iterable[str]) -> npt.NDArray[np.bool_]:
        """Which of some records have one of these names."""
        wanted = pa.array(list(names), pa.large_string())
        return self._hitting(rows, lambda found: pc.is_in(found, value_set=wanted))

    def naming_like(
        self, rows: npt.NDArray[np.int64], beginnings: Iterable[str]
    ) -> npt.NDArray[np.bool_]:
        """Which of some records have a name with one of these beginnings."""
        some = [self._hitting(rows, partial(pc.starts_with, pattern=b)) for b in beginnings]
        return np.logical_or.reduce([np.zeros(len(rows), bool), *some])

    def _hitting(
        self, rows: npt.NDArray[np.int64], hit: Callable[[pa.Array], pa.Array]
    ) -> npt.NDArray[np.bool_]:
        naming, start = np.zeros(len(rows), bool), 0
        for lists in self._names(rows).chunks:
            hits = hit(lists.flatten())
            naming[start + pc.list_parent_indices(lists).filter(hits).to_numpy()] = True
            start += len(lists)
        return naming

    def _names(self, rows: npt.NDArray[np.int64]) -> pa.ChunkedArray:
        """A list of names for each of some records."""
        names = self._column("names")
        whole = len(rows) == len(self) and (np.diff(rows) == 1).all()  # then no copy is made
        return names if whole else names.take(pa.array(rows))

    def _column(self, name: str) -> pa.ChunkedArray:
        return pa.chunked_array(self._columns[name], _SCHEMA.field(name).type)
