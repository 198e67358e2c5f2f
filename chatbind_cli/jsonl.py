"""Records in and out: one JSON object on one line, from stdin, plain or compressed files.

Output files are append-only and go by id: a second run of the same command continues the first
one's file, drops a half-written last line, and tries failed records again. Knows nothing of
what the records mean.
"""

from __future__ import annotations

import gzip
import io
import json
import math
import os
import re
import sys
import zlib
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NoReturn, cast

import jsonlines

from chatbind_cli.errors import RecordError, UsageError
from chatbind_cli.files import is_half_record, open_alone, refuse_foreign_records, replace_file

Record = dict[str, Any]

_LARGE = re.compile(r"[eE]\+?[0-9]{3}")
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
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
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
        return io.BufferedReader(_ZstdFile(buffered))
    return buffered


class _ZstdFile(io.RawIOBase):
    """The content of zstd frames; zstandard's own reader takes a cut file for a whole one."""

    def __init__(self, file: IO[bytes]) -> None:
        import zstandard

        self._file = file
        self._new = zstandard.ZstdDecompressor().decompressobj
        self._broken = zstandard.ZstdError
        self._frame: Any = None
        self._packed = b""
        self._ready = b""

    def readable(self) -> bool:
        """Yes."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fills the buffer with what is ready, at least one byte before the end."""
        while not self._ready:
            self._packed = self._packed or self._file.read1(1 << 16)  # type: ignore[attr-defined]
            if not self._packed:
                if self._frame is not None:
                    raise EOFError("the file ended before the end of a zstd frame")
                return 0
            self._frame = self._frame or self._new()
            try:
                self._ready = self._frame.decompress(self._packed)
            except self._broken as error:
                raise EOFError(str(error)) from error
            self._packed = self._frame.unused_data
            if self._frame.eof:
                self._frame = None
        n = min(len(buffer), len(self._ready))
        buffer[:n], self._ready = self._ready[:n], self._ready[n:]
        return n


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


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError("a number is too large")
    return value


def _no_json(name: str) -> NoReturn:
    raise ValueError(f"JSON has no {name}")


def _loads(text: str) -> Any:
    """The value that JSON text means.

    Raises:
        json.JSONDecodeError: it is not JSON.
        ValueError: it is, and could never be written again: NaN, half of a surrogate pair, a
            number of thousands of digits.
        RecursionError: it is nested too deeply.
    """
    value = json.loads(
        text,
        parse_constant=_no_json,
        # a hook on every number would make reading embeddings slow
        parse_float=_finite if _LARGE.search(text) else None,
    )
    if "\\ud" in text or "\\uD" in text:
        try:
            dumps(value).encode()
        except UnicodeEncodeError as error:
            raise ValueError("half of a surrogate pair is no character") from error
    return value


def _object(text: str, where: str) -> Record:
    try:
        value = _loads(text)
    except json.JSONDecodeError as error:
        raise RecordError(f"is not JSON ({error.msg})", where=where) from error
    except ValueError as error:
        raise RecordError(f"cannot be used ({_short(error)})", where=where) from error
    except RecursionError as error:
        raise RecordError("is nested too deeply", where=where) from error
    if not isinstance(value, dict):
        raise RecordError(f"must be a JSON object, not {type(value).__name__}", where=where)
    return value


def _short(error: ValueError) -> str:
    return str(error).split(":")[0].split(";")[0]


def _parse_array(text: str, name: str) -> Iterator[tuple[Record, str]]:
    try:
        values = _loads(text)
    except json.JSONDecodeError as error:
        where = f"{name}:{error.lineno}"
        raise RecordError(f"is not a JSON array ({error.msg})", where=where) from error
    except ValueError as error:
        raise RecordError(f"cannot be used ({_short(error)})", where=name) from error
    except RecursionError as error:
        raise RecordError("is nested too deeply", where=name) from error
    for index, value in enumerate(values):
        if not isinstance(value, dict):
            raise RecordError("must be a JSON object", where=f"{name}[{index}]")
        yield value, f"{name}[{index}]"


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
        expect: values that the records already in the file must have (`{"model_id": ...}`), so
            that a run does not continue another model's file.
        in_words: the record as a person reads it; used where standard output is a terminal.

    Attributes:
        done: the ids that the file held complete and without an `error` when it was opened, plus
            those written since. An id is the value of `key`, or a tuple for several keys.

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
        expect: Mapping[str, Any] | None = None,
        in_words: Callable[[Record], str] | None = None,
    ) -> None:
        self.target = str(target)
        self.key = key
        self.done: set[Hashable] = set()
        self.n_failed = 0
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
        if isinstance(self.key, str):
            return record[self.key]
        return tuple(record[key] for key in self.key)

    def write(self, record: Record) -> None:
        """Writes one line and hands it to the operating system."""
        if "error" in record:
            self.n_failed += 1
        else:
            self.done.add(self.id_of(record))
        if self._in_words is None:
            self._writer.write(record)
        else:
            self._file.write(f"{self._in_words(record)}\n")
            self._file.flush()

    def close(self) -> None:
        """Closes the file; standard output stays open."""
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
                keys = (self.key,) if isinstance(self.key, str) else self.key
                refuse_foreign_records(path, keys, self._expect)
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
            for number, line in enumerate(file, start=1):
                end = start + len(line)
                record = self._kept(line, f"{path}:{number}", last=end == size)
                if record is not None:
                    self.done.add(self.id_of(record))
                    keep.append((start, end))
                start = end
        if sum(end - start for start, end in keep) == size:
            return False
        if keep and keep[-1][1] == sum(end - start for start, end in keep):
            # Only the tail goes: cutting it off is cheaper than a copy of a large file.
            os.truncate(path, keep[-1][1])
            return False
        with replace_file(path) as temporary, path.open("rb") as old, temporary.open("wb") as new:
            for start, end in keep:
                old.seek(start)
                new.write(old.read(end - start))
        return True

    def _kept(self, line: bytes, where: str, *, last: bool) -> Record | None:
        """The record on a line that stays, or None for one that this run writes again."""
        if last and is_half_record(line):
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
