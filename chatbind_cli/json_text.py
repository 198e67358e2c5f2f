"""JSON text -> records, in bounded memory, and only such as can be written again.

A bad record is a value among the others. Where the bytes come from is not known here.
"""

from __future__ import annotations

import codecs
import itertools
import json
import math
import re
from collections.abc import Iterator
from typing import IO, Any, NamedTuple

import orjson

from chatbind_cli.errors import RecordError

Record = dict[str, Any]

_BOM = b"\xef\xbb\xbf"
MOST_BYTES = 64 << 20  # of a record
_MOST_PARTS = 8  # of that size, of a line that is too long, before the file is given up
_MOST_EMPTY = 1_000_000  # lines in a row
_MOST_DEPTH = 100  # of lists and objects; a thousand would be more than Python can write again
_CHUNK_BYTES = 1 << 20
TOO_LONG = f"is longer than {MOST_BYTES >> 20} MiB"
_TOO_DEEP = "is nested too deeply"

_SPACE = re.compile(r"[ \t\n\r]*")


class Line(NamedTuple):
    """One record as it was read.

    Args:
        record: the record; of a bad one, the words and whole numbers that can be told.
        where: `file:line`, or `file[index]` in an array.
        number: the line, or the element of an array, counted from 1.
        problem: why it cannot be used, if so.
    """

    record: Record
    where: str
    number: int
    problem: RecordError | None = None


def parse(file: IO[bytes], name: str) -> Iterator[Line]:
    """Yields the records of JSONL or of one array; see `read_lines` of `jsonl`."""
    started = False
    empty = 0
    for number, line in enumerate(lines(file, name), start=1):
        content = line.removeprefix(_BOM).lstrip()
        if not content:
            empty += 1
            if empty > _MOST_EMPTY:
                raise RecordError(f"{_MOST_EMPTY:,} empty lines in a row", where=f"{name}:{number}")
            continue
        if not started and content.startswith(b"["):
            yield from _Array(file, name, content, number).elements()
            return
        started, empty = True, 0
        yield parse_line(content, f"{name}:{number}", number)


def lines(file: IO[bytes], name: str) -> Iterator[bytes]:
    """Yields the lines of a file; of one that is too long, enough to show that.

    Raises:
        RecordError: there is no end to a line.
    """
    for number in itertools.count(1):
        line = file.readline(MOST_BYTES + 1)
        if not line:
            return
        yield line
        for _ in range(_MOST_PARTS):
            if len(line) <= MOST_BYTES or line.endswith(b"\n"):
                break
            line = file.readline(MOST_BYTES + 1)
        else:
            raise RecordError("a line without end", where=f"{name}:{number}")


def parse_line(line: bytes, where: str, number: int = 1) -> Line:
    """The record on a line."""
    if len(line) > MOST_BYTES:
        return _bad(TOO_LONG, where, number)
    try:
        text = line.decode("utf-8")
        return _line(_DECODER.decode(text), where, number)
    except UnicodeDecodeError:
        return _bad("is not UTF-8 text", where, number)
    except json.JSONDecodeError as error:
        return _bad(f"is not JSON ({error.msg})", where, number)
    except RecursionError:
        return _bad(_TOO_DEEP, where, number)


def _line(value: Any, where: str, number: int) -> Line:
    """The value that JSON text means; no problem if it is a record that can be written again."""
    if not isinstance(value, dict):
        return _bad(f"must be a JSON object, not {type(value).__name__}", where, number)
    if _is_plain(value):
        return Line(value, where, number)
    problem = _TOO_DEEP if _is_deeper(value, _MOST_DEPTH) else _unwritable(value)
    if problem is None:
        return Line(value, where, number)
    plain = {k: v for k, v in value.items() if isinstance(v, str | int) and not _unwritable({k: v})}
    return _bad(problem, where, number, plain)


def _bad(problem: str, where: str, number: int, record: Record | None = None) -> Line:
    return Line(record or {}, where, number, RecordError(problem, where=where))


def _is_plain(value: Record) -> bool:
    """Whether it is seen at a glance that a value is not deep and can be written again."""
    try:
        text = orjson.dumps(value)
    except TypeError:
        return False
    # what is not finite becomes null; each level has a bracket
    return b"null" not in text and text.count(b"{") + text.count(b"[") <= _MOST_DEPTH


def _unwritable(value: Record) -> str | None:
    """Why a value cannot be written as JSON in UTF-8, if so."""
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError:
        return "has text that is not UTF-8 (half of a surrogate pair)"
    except ValueError:
        return "has a number that is too large, or NaN"
    return None


def _whole(text: str) -> int | float:
    try:
        return int(text)
    except ValueError:  # thousands of digits; `_line` refuses infinity
        return math.inf


_DECODER = json.JSONDecoder(parse_int=_whole)


def _is_deeper(value: Any, levels: int) -> bool:
    """Whether more lists and objects than so many lie in one another."""
    if not isinstance(value, dict | list):
        return False
    children = value.values() if isinstance(value, dict) else value
    return levels == 0 or any(_is_deeper(child, levels - 1) for child in children)


class _Array:
    """A JSON array, of which no more is in memory than one element takes.

    Args:
        file: what comes after `head`.
        name: what the file is called.
        head: its content from the bracket on, as far as it was read.
        line: the line that the bracket is on.
    """

    def __init__(self, file: IO[bytes], name: str, head: bytes, line: int) -> None:
        self._file = file
        self._name = name
        # bytes that are not UTF-8 are the business of the element that they are in
        self._decoded = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode
        self._text = self._decoded(head)
        self._at = 1
        self._line = line

    def elements(self) -> Iterator[Line]:
        """Yields the elements.

        Raises:
            RecordError: it is no array from here on.
        """
        after = "]" if self._next() == "]" else ","
        for number in itertools.count(1):
            if after == "]":
                break
            where = f"{self._name}[{number - 1}]"
            yield self._element(where, number)
            after = self._next()
            if after not in ("]", ","):
                raise self._broken("Expecting ',' delimiter")
            self._at += after == ","
        self._at += 1
        if self._next():
            raise self._broken("Extra data")

    def _element(self, where: str, number: int) -> Line:
        self._next()
        while True:
            problem = "Expecting value"
            try:
                value, end = _DECODER.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                problem, end = error.msg, 0
            except RecursionError as error:
                raise RecordError(_TOO_DEEP, where=where) from error
            if 0 < end < len(self._text):
                self._at = end
                return _line(value, where, number)
            # a number that ends where the text does may go on
            if len(self._text) - self._at > MOST_BYTES:
                raise RecordError(TOO_LONG, where=where)
            if not self._more():
                raise self._broken(problem)

    def _next(self) -> str:
        """The next character that is no space, or nothing at the end."""
        skipped = 0
        while True:
            space = _SPACE.match(self._text, self._at)
            skipped -= self._at
            self._at = space.end() if space else self._at
            skipped += self._at
            if self._at < len(self._text):
                return self._text[self._at]
            if skipped > MOST_BYTES:
                raise self._broken("nothing but spaces")
            if not self._more():
                return ""

    def _more(self) -> bool:
        """Reads as much again as is waiting, so that what is tried again is twice as much."""
        self._line += self._text.count("\n", 0, self._at)
        waiting = self._text[self._at :]
        chunk = self._file.read(max(_CHUNK_BYTES, len(waiting)))
        self._text = waiting + self._decoded(chunk, not chunk)
        self._at = 0
        return bool(chunk)

    def _broken(self, problem: str) -> RecordError:
        line = self._line + self._text.count("\n", 0, self._at)
        return RecordError(f"is not a JSON array ({problem})", where=f"{self._name}:{line}")
