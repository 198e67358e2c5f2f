"""Records in and out: one JSON object on one line, from stdin, plain or compressed files.

Output files are append-only and go by id: a second run of the same command continues the first
one's file, drops a half-written last line, and tries failed records again. Knows nothing of
what the records mean.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

import jsonlines

from chatbind_cli.compression import BROKEN, decompressed
from chatbind_cli.errors import ChatBindError, RecordError, UsageError
from chatbind_cli.files import (
    is_half_record,
    is_record_of,
    open_alone,
    refuse_foreign_records,
    replace_file,
)
from chatbind_cli.json_text import Line, Record, lines, parse, parse_line

__all__ = [
    "Line",
    "Record",
    "RecordWriter",
    "dumps",
    "legible",
    "read_lines",
    "read_records",
    "record_id",
]

_HALF = re.compile("[\udc80-\udcff]")
_MOST_SHOWN = 80  # characters of a bad id


def dumps(record: Mapping[str, Any]) -> str:
    """The record as one line of JSON, without the line's end; always UTF-8, see `legible`.

    Raises:
        ValueError: a number is not finite (JSON has no NaN).
    """
    text = json.dumps(record, ensure_ascii=False, separators=(", ", ": "), allow_nan=False)
    return legible(text, backslash=r"\\")


def legible(text: str, *, backslash: str = "\\") -> str:
    r"""The text, with `\xe9` for each byte of a file name that is not UTF-8.

    Python holds such a byte as half of a surrogate pair, which can be written nowhere.
    """
    if text.isascii():
        return text
    return _HALF.sub(lambda half: f"{backslash}x{ord(half[0]) & 0xFF:02x}", text)


def read_records(source: str | Path) -> Iterator[tuple[Record, str]]:
    """Reads the records of a file one at a time, and ends at the first bad one.

    Args:
        source: see `read_lines`.

    Yields:
        The record and where it stands (`file:line`, or `file[index]` in an array).

    Raises:
        RecordError: the file cannot be read, or a line is not a JSON object.
    """
    for record, where, _, problem in read_lines(source):
        if problem is not None:
            raise problem
        yield record, where


def read_lines(
    source: str | Path, *, stdin: IO[bytes] | None = None, name: str | None = None
) -> Iterator[Line]:
    """Reads the records of a file one at a time; a bad one is an error among the others.

    A file may have any size, a record 64 MiB (room for media in data URIs). What is compressed is
    never unpacked further than that ahead, and from windows of at most 128 MiB (zstd).

    Args:
        source: a path, or `-` for standard input. JSONL, or one JSON array of objects (LLaVA's
            training files); either may be compressed with gzip or zstd.
        stdin: the byte stream that `-` stands for, `sys.stdin.buffer` unless given.
        name: what messages call it.

    Raises:
        RecordError: the file cannot be read, or not on from here.
    """
    name = name or ("<stdin>" if str(source) == "-" else legible(str(source)))
    try:
        if str(source) == "-":
            yield from parse(decompressed(stdin or sys.stdin.buffer), name)
        else:
            with Path(source).open("rb") as file:
                yield from parse(decompressed(file), name)
    except BROKEN as error:
        raise RecordError(f"broken compression ({error})", where=name) from error
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        hint = "check the path" if isinstance(error, FileNotFoundError) else None
        raise RecordError(error.strerror or "cannot be read", where=name, hint=hint) from error


def record_id(record: Record, keys: Sequence[str] = ("question_id", "id")) -> str | int:
    """The value of the first of `keys` that the record has.

    Raises:
        RecordError: it has none of them, or the value is neither text nor a whole number.
    """
    for key in keys:
        if key in record:
            value = record[key]
            if isinstance(value, str | int) and not isinstance(value, bool):
                return value
            shown = repr(value)
            shown = shown if len(shown) <= _MOST_SHOWN else f"{shown[:_MOST_SHOWN]}..."
            raise RecordError(f"{key} must be text or a whole number, not {shown}")
    raise RecordError(f"a record has no {' or '.join(keys)}")


class _Stdout:
    """Standard output as it is at the time: on a terminal a progress bar stands before it."""

    def write(self, text: str) -> int:
        return sys.stdout.write(text)

    def flush(self) -> None:
        sys.stdout.flush()

    def close(self) -> None:
        """Leaves it open: others write there, too."""


class RecordWriter:
    """Writes records to a file that a second run continues, or to standard output.

    Args:
        target: a path, or `-` for standard output.
        key: the key (or keys) of a record's id.
        overwrite: start the file anew, if it is one of these records.
        keep_failed: leave failed records in the file to be continued; else this run writes them
            again, and they go.
        expect: values that the records already in the file must have (`{"model_id": ...}`), so
            that a run does not continue another model's file; None: whatever it is.
        in_words: the record as a person reads it; used where standard output is a terminal.

    Attributes:
        done: the ids that the file held complete and without an `error` (null is none) when it was
            opened, plus those written since. An id is the value of `key`, or a tuple for several
            keys.

    Raises:
        ChatBindError: the file to start anew begins with something else.
        RecordError: a line other than the last is not a record, or a value differs from `expect`.
        UsageError: the file's name says that it is compressed.
    """

    def __init__(
        self,
        target: str | Path,
        *,
        key: str | tuple[str, ...] = "question_id",
        overwrite: bool = False,
        keep_failed: bool = False,
        expect: Mapping[str, Any] | None = None,
        in_words: Callable[[Record], str] | None = None,
    ) -> None:
        self.target = str(target)
        self._keys = (key,) if isinstance(key, str) else key
        self.done: set[Hashable] = set()
        self._keep_failed = keep_failed
        self._expect = dict(expect or {})
        self._file: IO[str]
        self._in_words: Callable[[Record], str] | None = None
        if self.target == "-":
            self._file = cast(IO[str], _Stdout())
            self._in_words = in_words if sys.stdout.isatty() else None
        else:
            self._file = self._opened(Path(target), overwrite)
        self._writer = jsonlines.Writer(self._file, dumps=dumps, flush=True)

    def id_of(self, record: Mapping[str, Any]) -> Hashable:
        """The id that the writer goes by."""
        values = tuple(record[key] for key in self._keys)
        return values if len(values) > 1 else values[0]

    def write(self, record: Record) -> None:
        """Writes one line and hands it to the operating system."""
        if record.get("error") is None:
            self.done.add(self.id_of(record))
        with self._writing():
            if self._in_words is None:
                self._writer.write(record)
            else:
                self._file.write(f"{self._in_words(record)}\n")
                self._file.flush()

    def close(self) -> None:
        """Closes the file; standard output stays open."""
        with self._writing():
            self._file.close()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Says which file it is that cannot be written; who reads no more need not be told."""
        try:
            yield
        except BrokenPipeError:
            raise
        except OSError as error:
            where = "<stdout>" if self.target == "-" else self.target
            raise ChatBindError(f"cannot be written ({error.strerror})", where=where) from error

    def __enter__(self) -> RecordWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _opened(self, path: Path, overwrite: bool) -> IO[str]:
        """The file to append to, with the complete records of an earlier run in it."""
        if path.suffix in (".gz", ".zst"):
            raise UsageError(
                "records are added one by one, which a compressed file does not bear",
                where=str(path),
                hint=f"write to - and pipe it through {'gzip' if path.suffix == '.gz' else 'zstd'}",
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_file():
            # a pipe or a device (/dev/stdout): it holds nothing to continue
            return path.open("a", encoding="utf-8")
        file = open_alone(path)
        try:
            if overwrite:
                refuse_foreign_records(path, self._keys, self._expect)
                # not cut off: a hard link to it is a copy that somebody keeps
                with replace_file(path.resolve()):
                    pass
            if overwrite or self._continue(path):
                file.close()
                file = open_alone(path)
        except BaseException:
            file.close()
            raise
        return file

    def _continue(self, path: Path) -> bool:
        """Takes stock of an earlier run's file and leaves only its complete records in it.

        Returns:
            Whether the file was replaced by another.
        """
        keep: list[tuple[int, int]] = []
        size = path.stat().st_size
        with path.open("rb") as file:
            start = 0
            for number, line in enumerate(lines(file, str(path)), start=1):
                end = start + len(line)
                record = self._kept(line, f"{path}:{number}", last=end == size)
                if record is not None:
                    if record.get("error") is None:
                        self.done.add(self.id_of(record))
                    keep.append((start, end))
                start = end
        if sum(end - start for start, end in keep) == size:
            return False
        with replace_file(path) as temporary, path.open("rb") as old, temporary.open("wb") as new:
            for start, end in keep:
                old.seek(start)
                new.write(old.read(end - start))
        return True

    def _kept(self, line: bytes, where: str, *, last: bool) -> Record | None:
        """The record on a line that stays, or None for one that this run writes again."""
        record, _, _, problem = parse_line(line, where)
        half = last and is_half_record(line)  # one that is whole may be somebody's: it is looked at
        if not line.strip() or (half and problem is not None):
            return None
        if problem is not None or not is_record_of(record, self._keys, self._expect):
            keys = ", ".join([*self._keys, *self._expect])
            raise RecordError(
                f"is not a record with {keys}, so the file cannot be continued",
                where=where,
                hint="give another output file, or --overwrite",
            )
        for key, value in self._expect.items():
            if value is not None and record.get(key, value) != value:
                raise RecordError(
                    f"has {key} {record[key]!r}, but this run has {value!r}",
                    where=where,
                    hint="give another output file, or --overwrite",
                )
        if record.get("error") is not None:
            return record if self._keep_failed and not half else None
        return None if half or self.id_of(record) in self.done else record
