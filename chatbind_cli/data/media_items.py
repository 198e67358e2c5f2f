"""What there is to encode: paths as words or lines, records that name media, training files."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO

from chatbind_cli.errors import ChatBindError, RecordError
from chatbind_cli.json_text import MOST_BYTES, TOO_LONG, Line, lines
from chatbind_cli.jsonl import Record, legible, read_lines
from chatbind_cli.media.medium import Medium, media_of_record
from chatbind_cli.media.modality import MODALITIES
from chatbind_cli.media.root import MediaRoot
from chatbind_cli.media.source import MediaSource, open_source

# an object, an array, gzip, zstd: what `read_records` understands; anything else is lines of paths
_RECORDS_START = (b"{", b"[", b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"\xef\xbb\xbf{", b"\xef\xbb\xbf[")

# what output records say beside the path and the modality, see `encode`
_WRITTEN = ("embedding", "labels", "encoder", "normalized", "label_set", "error", "line")
_NO_MEDIUM = "a record names no medium under path, image, ..."


@dataclass(frozen=True)
class MediaItem:
    """One medium to encode.

    Args:
        medium: as a record or a user names it.
        root: where a record's path starts; None for a path, URL or data URI of the user's own.
        name: what an embedding store calls it: as training records do, from the media root.
        carried: the other keys of its record.
        problem: why its record cannot be used, if so.
        line: where a record that cannot be used stands.
    """

    medium: Medium
    root: MediaRoot | None = None
    name: str = ""
    carried: Record = field(default_factory=dict)
    problem: str | None = None
    line: int | None = None

    @property
    def path(self) -> str:
        """What output records call it: the path as it was given, made `legible`."""
        return legible(self.medium.name)

    @property
    def modality(self) -> str | None:
        """What it is said to be; None where the content has to tell."""
        return self.medium.modality

    def open(self) -> MediaSource:
        """Returns where its bytes are.

        Raises:
            ChatBindError: the record cannot be used, or there is no such file.
        """
        if self.problem is not None:
            raise RecordError(self.problem)
        if self.root is None:
            return open_source(self.medium.ref)
        return open_source(self.root.find(self.medium.name))

    def output(self, modality: str | None) -> Record:
        """Returns what its output record says but for the outcome: whatever came in, and which.

        Args:
            modality: what it was found to be.
        """
        if self.line is not None:
            return {**self.carried, "line": self.line}
        return {**self.carried, "path": self.path, "modality": modality}


def items_of_paths(
    paths: Iterable[str], root: MediaRoot, modality: str | None
) -> Iterator[MediaItem]:
    """Yields the media that the user names by path, URL or data URI."""
    for path in paths:
        yield MediaItem(Medium(modality, path), name=_name_from_root(path, root.folder))


def items_of_list(
    source: str, root: MediaRoot, modality: str | None, *, stdin: IO[bytes] | None = None
) -> Iterator[MediaItem]:
    """Yields the media of a list: one path a line, or records.

    A record names media under `path` (with `modality`, if it likes) or under `image`, `audio`,
    ... as questions and conversations do; its other keys are carried along.

    Args:
        source: a file, or `-` for standard input.
        root: where the media of records lie. Lines of paths are the user's own words.
        modality: of media whose record does not say; None lets the content tell.
        stdin: the byte stream that `-` stands for.

    Raises:
        RecordError: the list is no list.
        OSError: it cannot be read.
    """
    if source == "-":
        yield from _items_of_stream(stdin or sys.stdin.buffer, "<stdin>", root, modality)
    else:
        with Path(source).open("rb") as file:
            yield from _items_of_stream(file, source, root, modality)


def items_of_training_file(
    source: str | Path, root: MediaRoot, modality: str | None
) -> Iterator[MediaItem]:
    """Yields the media of a file of conversations or questions, each once.

    Raises:
        RecordError: the file cannot be read.
    """
    seen = set()
    for line in read_lines(source):
        for item in _items_of_record(line, root, modality):
            key = (item.modality, item.path)
            if item.problem is None and key in seen:
                continue
            seen.add(key)
            yield replace(item, carried={})


def _items_of_stream(
    stream: IO[bytes], name: str, root: MediaRoot, modality: str | None
) -> Iterator[MediaItem]:
    stream = stream if hasattr(stream, "peek") else io.BufferedReader(stream)  # type: ignore[type-var]
    first = stream.peek(64).lstrip()
    if first.startswith(_RECORDS_START):
        for line in read_lines("-", stdin=stream, name=name):
            items = list(_items_of_record(line, root, modality))
            yield from items or [_problem(line, f"{line.where}: {_NO_MEDIUM}")]
        return
    for number, content in enumerate(lines(stream, name), start=1):
        if len(content) > MOST_BYTES:
            yield _problem(Line({}, name, number), f"{name}:{number}: {TOO_LONG}")
            continue
        path = content.decode("utf-8", "surrogateescape").rstrip("\r\n")
        if path.strip():
            yield from items_of_paths([path], root, modality)


def _items_of_record(line: Line, root: MediaRoot, modality: str | None) -> Iterator[MediaItem]:
    try:
        media = _media(line, modality)
    except ChatBindError as error:
        yield _problem(line, str(error))
        return
    carried = _carried(line.record)
    for medium in media:
        yield MediaItem(medium, root, medium.name, carried)


def _media(line: Line, modality: str | None) -> Sequence[Medium]:
    """What a record names under `image`, `audio`, ..., or else under `path`."""
    if line.problem is not None:
        raise line.problem
    record, where = line.record, line.where
    media = media_of_record(record, where=where)
    if media or "path" not in record:
        return media
    path, said = record["path"], record.get("modality") or modality
    if not isinstance(path, str) or not path:
        raise RecordError("path must be a file name", where=where)
    if said not in (None, *MODALITIES):
        raise RecordError(f"{said!r} is not one of {', '.join(MODALITIES)}", where=where)
    return [Medium(said, path)]


def _problem(line: Line, problem: str) -> MediaItem:
    carried = _carried(line.record)
    path = carried.pop("path", "")
    if isinstance(path, str) and path:
        carried["path"] = path
    return MediaItem(Medium(None, ""), carried=carried, problem=problem, line=line.number)


def _carried(record: Record) -> Record:
    """A record without the keys that `encode` writes itself, whatever becomes of the medium."""
    return {key: value for key, value in record.items() if key not in _WRITTEN}


def _name_from_root(path: str, root: Path | None) -> str:
    """A path below the media root as records name it, any other path as it is; both legible."""
    if root is not None:
        with suppress(ValueError):
            path = Path(path).absolute().relative_to(root.absolute()).as_posix()
    return legible(path)
