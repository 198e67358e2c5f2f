"""Training records, read and checked once: the result is kept in the user's cache.

A file of half a million records takes seconds to check. What came of it is an Arrow file named by
the SHA-256 of the records' file, which later runs and other processes map.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pyarrow as pa
from filelock import FileLock

from chatbind_cli.console import note
from chatbind_cli.data.conversations import checked_row
from chatbind_cli.data.parquet_records import is_parquet, read_parquet
from chatbind_cli.data.record_file import RecordFile, Row, write_rows
from chatbind_cli.errors import RecordError, contained
from chatbind_cli.files import cache_folder, replace_file, sha256_file
from chatbind_cli.jsonl import legible, read_lines

_VERSION = 1
"""Of what is kept: another one wherever other records are good, or are kept otherwise."""

_KEPT_FROM_BYTES = 1 << 20
"""A smaller file is checked in less time than two more files take."""


def checked_file(path: Path) -> RecordFile:
    """The records of a file, good and bad.

    Processes that ask for the same file at the same time wait for the first. Where nothing can be
    written the records are held in memory.

    Raises:
        RecordError: the file cannot be read as records at all.
    """
    name = legible(str(path))
    if not path.is_file() or path.stat().st_size < _KEPT_FROM_BYTES:
        return _in_memory(path, name)
    kept = cache_folder() / "conversations" / f"{sha256_file(path)}-{_VERSION}.arrow"
    found = _kept(kept, name)
    if found is not None:
        return found
    try:
        with ExitStack() as held:
            kept.parent.mkdir(parents=True, exist_ok=True)
            # without locks on a file system each process writes its own
            with suppress(OSError, NotImplementedError):
                held.enter_context(FileLock(kept.with_suffix(".lock")))
            found = _kept(kept, name)
            if found is None:
                note(f"{name}: checking its records; later runs take what comes of it")
                with replace_file(kept) as temporary:
                    write_rows(_rows(path, name), str(temporary))
                found = RecordFile(kept, name)
            return found
    except OSError as error:
        note(
            f"{kept.parent}: cannot be written ({error.strerror or error}), so the records of "
            f"{name} are held in memory, and checked again by each run"
        )
        return _in_memory(path, name)


def _kept(path: Path, name: str) -> RecordFile | None:
    with suppress(OSError, pa.ArrowInvalid):
        return RecordFile(path, name)
    return None


def _in_memory(path: Path, name: str) -> RecordFile:
    sink = pa.BufferOutputStream()
    write_rows(_rows(path, name), sink)
    return RecordFile(sink.getvalue(), name)


def _rows(path: Path, name: str) -> Iterator[Row]:
    """Rows whose places do not hold the file's name: another file may have the same content."""
    lines = read_parquet(path, name) if is_parquet(path) else read_lines(path, name=name)
    for record, where, _, problem in lines:
        place = where.removeprefix(name)
        try:
            if problem is not None:
                raise RecordError(problem.what, where=place, hint=problem.hint)
            row = checked_row(record, place)
        except Exception as error:
            row = Row(place, error=str(contained(error, where=place)))
        yield row
