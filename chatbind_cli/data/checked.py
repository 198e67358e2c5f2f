"""Training records, read and checked once: the result is kept in the user's cache.

A file of half a million records takes seconds to check. What came of it is an Arrow file named by
the SHA-256 of the records' file, which later runs and other processes map.
"""

from __future__ import annotations

import gc
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pyarrow as pa
from filelock import FileLock

from chatbind_cli.console import note
from chatbind_cli.data.conversations import checked_row
from chatbind_cli.data.parquet_records import is_parquet, read_parquet
from chatbind_cli.data.record_file import RecordFile, Row, write_rows
from chatbind_cli.errors import RecordError, contained
from chatbind_cli.files import cache_folder, replace_file, sha256_file
from chatbind_cli.hardware import cpu_count
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
    if not _is_large(path):
        return _in_memory(path, name)
    try:
        found = _kept(path)
        return _checked_and_kept(path, name) if found is None else found
    except OSError as error:
        note(
            f"{_place(path).parent}: cannot be written ({error.strerror or error}), so the records "
            f"of {name} are held in memory, and checked again by each run"
        )
        return _in_memory(path, name)


@contextmanager
def checked_ahead(paths: Sequence[Path]) -> Iterator[bool]:
    """Has processes check files, for a `checked_file` that comes later.

    Several files side by side, and while this process does other things. Whatever goes wrong in
    one of them comes to light when the file is asked for.

    Yields:
        whether there is anything to be checked.
    """
    new = [path for path in paths if _is_large(path) and _kept(path) is None]
    count = min(len(new), max(1, cpu_count() - 1))
    with ExitStack() as held:
        for share in (new[n::count] for n in range(count)):
            line = [sys.executable, "-m", __name__, *map(str, share)]
            none = subprocess.DEVNULL
            # Ctrl-C is for this process, which ends the other
            process = subprocess.Popen(line, stdin=none, stdout=none, start_new_session=True)
            held.enter_context(process)
            held.callback(process.terminate)
        yield bool(new)


def _is_large(path: Path) -> bool:
    return path.is_file() and path.stat().st_size >= _KEPT_FROM_BYTES


def _place(path: Path) -> Path:
    return cache_folder() / "conversations" / f"{sha256_file(path)}-{_VERSION}.arrow"


def _kept(path: Path) -> RecordFile | None:
    with suppress(OSError, pa.ArrowInvalid):
        return RecordFile(_place(path), legible(str(path)))
    return None


def _checked_and_kept(path: Path, name: str) -> RecordFile:
    place = _place(path)
    with ExitStack() as held:
        place.parent.mkdir(parents=True, exist_ok=True)
        # without locks on a file system each process writes its own
        with suppress(OSError, NotImplementedError):
            held.enter_context(FileLock(place.with_suffix(".lock")))
        found = _kept(path)
        if found is None:
            note(f"{name}: checking its records; later runs take what comes of it")
            with replace_file(place) as temporary:
                write_rows(_rows(path, name), str(temporary))
            found = RecordFile(place, name)
        return found


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


if __name__ == "__main__":  # in a process of `checked_ahead`
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    gc.disable()  # records have no cycles, and looking for some takes a seventh of the time
    for argument in sys.argv[1:]:
        with suppress(Exception):
            _checked_and_kept(Path(argument), legible(argument))
