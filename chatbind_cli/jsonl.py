"""Records in and out: one JSON object on one line, from stdin, plain or compressed files.

Output files are append-only and go by id: a second run of the same command continues the first
one's file, drops a half-written last line, and tries failed records again. Knows nothing of
what the records mean.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import sys
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import jsonlines

from chatbind_cli.errors import RecordError
from chatbind_cli.files import replace_file

Record = dict[str, Any]

_GZIP = b"\x1f\x8b"
_ZSTD = b"\x28\xb5\x2f\xfd"


def dumps(record: Mapping[str, Any]) -> str:
    """The record as one line of JSON, without the line's end.

    Raises:
        ValueError: a number is not finite (JSON has no NaN).
    """
    return json.dumps(record, ensure_ascii=False, separators=(", ", ": "), allow_nan=False)


def read_records(
    source: str | Path, *, stdin: IO[bytes] | None = None
) -> Iterator[tuple[Record, str]]:
    """Reads the records of a file one at a time.

    Args:
        source: a path, or `-` for standard input. JSONL, or one JSON array of objects (LLaVA's
            training files); either may be compressed with gzip or zstd.
        stdin: the byte stream that `-` stands for, `sys.stdin.buffer` unless given.

    Yields:
        The record and where it stands (`file:line`, or `file[index]` in an array).

    Raises:
        RecordError: the file cannot be read, or a line is not a JSON object.
    """
    name = "<stdin>" if str(source) == "-" else str(source)
    try:
        if str(source) == "-":
            yield from _parse(_decompressed(stdin or sys.stdin.buffer), name)
        else:
            with Path(source).open("rb") as file:
                yield from _parse(_decompressed(file), name)
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        hint = "check the path" if isinstance(error, FileNotFoundError) else None
        raise RecordError(error.strerror or "cannot be read", where=name, hint=hint) from error
    except (EOFError, gzip.BadGzipFile) as error:
        raise RecordError(f"broken compression ({error})", where=name) from error


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
            raise RecordError(f"{key} must be text or a whole number, not {value!r}")
    raise RecordError(f"a record has no {' or '.join(keys)}")


def _decompressed(file: IO[bytes]) -> IO[bytes]:
    """The stream itself, or its content if it starts like gzip or zstd."""
    buffered: Any = file if hasattr(file, "peek") else io.BufferedReader(file)
    head = buffered.peek(4)[:4]
    if head.startswith(_GZIP):
        return gzip.GzipFile(fileobj=buffered)  # type: ignore[return-value]
    if head == _ZSTD:
        import zstandard

        stream = zstandard.ZstdDecompressor().stream_reader(buffered, read_across_frames=True)
        return io.BufferedReader(stream)
    return buffered


def _parse(file: IO[bytes], name: str) -> Iterator[tuple[Record, str]]:
    started = False
    for number, line in enumerate(_lines(file, name), start=1):
        text = line.strip().removeprefix("\ufeff")
        if not text:
            continue
        if not started and text.startswith("["):
            yield from _parse_array(text + "\n" + "".join(_lines(file, name)), name)
            return
        started = True
        yield _object(text, f"{name}:{number}"), f"{name}:{number}"


def _lines(file: IO[bytes], name: str) -> Iterator[str]:
    for number, line in enumerate(file, start=1):
        try:
            yield line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise RecordError("is not UTF-8 text", where=f"{name}:{number}") from error


def _object(text: str, where: str) -> Record:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise RecordError(f"is not JSON ({error.msg})", where=where) from error
    except RecursionError as error:
        raise RecordError("is nested too deeply", where=where) from error
    if not isinstance(value, dict):
        raise RecordError(f"must be a JSON object, not {type(value).__name__}", where=where)
    return value


def _parse_array(text: str, name: str) -> Iterator[tuple[Record, str]]:
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        where = f"{name}:{error.lineno}"
        raise RecordError(f"is not a JSON array ({error.msg})", where=where) from error
    except RecursionError as error:
        raise RecordError("is nested too deeply", where=name) from error
    for index, value in enumerate(values):
        if not isinstance(value, dict):
            raise RecordError("must be a JSON object", where=f"{name}[{index}]")
        yield value, f"{name}[{index}]"


class RecordWriter:
    """Writes records to a file that a second run continues, or to standard output.

    Args:
        target: a path, or `-` for standard output.
        key: the key (or keys) of a record's id.
        overwrite: start the file anew.
        expect: values that the records already in the file must have (`{"model_id": ...}`), so
            that a run does not continue another model's file.

    Attributes:
        done: the ids that the file held complete and without an `error` when it was opened, plus
            those written since. An id is the value of `key`, or a tuple for several keys.

    Raises:
        RecordError: a line other than the last is not a record, or a value differs from `expect`.
    """

    def __init__(
        self,
        target: str | Path,
        *,
        key: str | tuple[str, ...] = "question_id",
        overwrite: bool = False,
        expect: Mapping[str, Any] | None = None,
    ) -> None:
        self.target = str(target)
        self.key = key
        self.done: set[Hashable] = set()
        self.n_failed = 0
        self._expect = dict(expect or {})
        self._file: IO[str]
        if self.target == "-":
            self._file = sys.stdout
        else:
            path = Path(target)
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists() and not path.is_file():
                pass  # a pipe or a device (/dev/stdout): it holds nothing to continue
            elif overwrite:
                path.unlink(missing_ok=True)
            elif path.exists():
                self._continue(path)
            self._file = path.open("a", encoding="utf-8")
        self._writer = jsonlines.Writer(self._file, dumps=dumps, flush=True)

    def id_of(self, record: Mapping[str, Any]) -> Hashable:
        """The id that the writer goes by."""
        if isinstance(self.key, str):
            return record[self.key]
        return tuple(record[key] for key in self.key)

    def write(self, record: Record) -> None:
        """Writes one line and hands it to the operating system."""
        if "error" in record:
            self.n_failed += 1
        else:
            self.done.add(self.id_of(record))
        self._writer.write(record)

    def close(self) -> None:
        """Closes the file; standard output stays open."""
        if self.target != "-":
            self._file.close()

    def __enter__(self) -> RecordWriter:
        """Returns itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Closes the file."""
        self.close()

    def _continue(self, path: Path) -> None:
        """Takes stock of an earlier run's file and leaves only its complete records in it."""
        keep: list[tuple[int, int]] = []
        size = path.stat().st_size
        with path.open("rb") as file:
            start = 0
            for number, line in enumerate(file, start=1):
                end = start + len(line)
                record = self._kept(line, f"{path}:{number}", last=end == size)
                if record is not None:
                    self.done.add(self.id_of(record))
                    keep.append((start, end))
                start = end
        if sum(end - start for start, end in keep) == size:
            return
        if keep and keep[-1][1] == sum(end - start for start, end in keep):
            # Only the tail goes: cutting it off is cheaper than a copy of a large file.
            os.truncate(path, keep[-1][1])
            return
        with replace_file(path) as temporary, path.open("rb") as old, temporary.open("wb") as new:
            for start, end in keep:
                old.seek(start)
                new.write(old.read(end - start))

    def _kept(self, line: bytes, where: str, *, last: bool) -> Record | None:
        """The record on a line that stays, or None for one that this run writes again."""
        if last and not line.endswith(b"\n"):
            return None
        if not line.strip():
            return None
        try:
            record = _object(line.decode("utf-8"), where)
            identity = self.id_of(record)
        except (UnicodeDecodeError, RecordError, KeyError) as error:
            raise RecordError(
                f"is not a record with {self.key}, so the file cannot be continued",
                where=where,
                hint="give another output file, or --overwrite",
            ) from error
        for key, value in self._expect.items():
            if record.get(key, value) != value:
                raise RecordError(
                    f"has {key} {record[key]!r}, but this run has {value!r}",
                    where=where,
                    hint="give another output file, or --overwrite",
                )
        return None if "error" in record or identity in self.done else record
