"""What there is to encode: paths as words or lines, records that name media, training files.

Knows how an input becomes a name and a file, and nothing of decoding, encoders and outputs.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from chatbind_cli.data.conversations import media_of_record
from chatbind_cli.errors import ChatBindError, RecordError
from chatbind_cli.jsonl import Record, read_records
from chatbind_cli.media.modality import MODALITIES
from chatbind_cli.media.source import MediaSource, open_source, resolve_in_root

# an object, an array, gzip, zstd: what `read_records` understands; anything else is lines of paths
_RECORDS_START = (b"{", b"[", b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"\xef\xbb\xbf{", b"\xef\xbb\xbf[")


@dataclass(frozen=True, kw_only=True)
class MediaFolder:
    """Where the media of records lie; see `resolve_in_root`."""

    root: Path | None = None
    prefix: str = ""
    allow_outside: bool = False

    def find(self, name: str) -> Path:
        """Returns the file that a record means by a name.

        Raises:
            MediaError: it leaves the root, or is not there.
        """
        return resolve_in_root(
            name, self.root, prefix=self.prefix, allow_outside=self.allow_outside
        )


@dataclass(frozen=True, kw_only=True)
class MediaItem:
    """One medium to encode.

    Attributes:
        path: what output records call it: the path as it was given.
        name: what an embedding store calls it: as training records do, from the media root.
        modality: None where the content has to tell.
        folder: where a record's path starts; None for a path, URL or data URI of the user's own.
        carried: the other keys of its record.
        problem: why its record cannot be used, if so.
    """

    path: str
    name: str
    modality: str | None = None
    folder: MediaFolder | None = None
    carried: Record = field(default_factory=dict)
    problem: str | None = None

    def open(self) -> MediaSource:
        """Returns where its bytes are.

        Raises:
            ChatBindError: the record cannot be used, or there is no such file.
        """
        if self.problem is not None:
            raise RecordError(self.problem)
        if self.folder is None:
            return open_source(self.path)
        return open_source(self.folder.find(self.path))


def items_of_paths(
    paths: Iterable[str], folder: MediaFolder, modality: str | None
) -> Iterator[MediaItem]:
    """Yields the media that the user names by path, URL or data URI."""
    for path in paths:
        yield MediaItem(path=path, name=_name_from_root(path, folder.root), modality=modality)


def items_of_list(
    source: str, folder: MediaFolder, modality: str | None, *, stdin: IO[bytes] | None = None
) -> Iterator[MediaItem]:
    """Yields the media of a list: one path a line, or records.

    A record names media under `path` (with `modality`, if it likes) or under `image`, `audio`,
    ... as questions and conversations do; its other keys are carried along.

    Args:
        source: a file, or `-` for standard input.
        folder: where the media of records lie. Lines of paths are the user's own words.
        modality: of media whose record does not say; None lets the content tell.
        stdin: the byte stream that `-` stands for.

    Raises:
        RecordError: the list cannot be read.
    """
    if source == "-":
        yield from _items_of_stream(stdin or sys.stdin.buffer, "<stdin>", folder, modality)
        return
    try:
        with Path(source).open("rb") as file:
            yield from _items_of_stream(file, source, folder, modality)
    except OSError as error:
        raise RecordError(error.strerror or "cannot be read", where=source) from error


def items_of_training_file(
    source: str | Path, folder: MediaFolder, modality: str | None
) -> Iterator[MediaItem]:
    """Yields the media of a file of conversations or questions, each once.

    Raises:
        RecordError: the file cannot be read.
    """
    seen = set()
    for record, where in read_records(source):
        for item in _items_of_record(record, where, folder, modality):
            key = (item.modality, item.path)
            if key not in seen:
                seen.add(key)
                yield MediaItem(
                    path=item.path,
                    name=item.name,
                    modality=item.modality,
                    folder=folder,
                    problem=item.problem,
                )


def _items_of_stream(
    stream: IO[bytes], name: str, folder: MediaFolder, modality: str | None
) -> Iterator[MediaItem]:
    stream = stream if hasattr(stream, "peek") else io.BufferedReader(stream)  # type: ignore[type-var]
    first = stream.peek(64).lstrip()
    if first.startswith(_RECORDS_START):
        for record, where in read_records("-", stdin=stream):
            where = where.replace("<stdin>", name, 1)
            items = list(_items_of_record(record, where, folder, modality))
            if not items:
                yield _problem(record, f"{where}: a record names no medium under path, image, ...")
            yield from items
        return
    for number, line in enumerate(stream, start=1):
        try:
            path = line.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError:
            path = line.decode("utf-8", "backslashreplace").rstrip("\r\n")
            yield _problem({"path": path}, f"{name}:{number}: is not UTF-8 text")
            continue
        if path.strip():
            yield from items_of_paths([path], folder, modality)


def _items_of_record(
    record: Record, where: str, folder: MediaFolder, modality: str | None
) -> Iterator[MediaItem]:
    try:
        named = [(medium.modality, medium.ref) for medium in media_of_record(record, where=where)]
    except ChatBindError as error:
        yield _problem(record, str(error))
        return
    carried = {key: value for key, value in record.items() if key not in ("embedding", "error")}
    if not named and "path" in record:
        path, said = record["path"], record.get("modality") or modality
        if not isinstance(path, str) or not path:
            yield _problem(record, f"{where}: path must be a file name")
            return
        if said not in (None, *MODALITIES):
            yield _problem(record, f"{where}: {said!r} is not one of {', '.join(MODALITIES)}")
            return
        yield MediaItem(path=path, name=path, modality=said, folder=folder, carried=carried)
    for said, path in named:
        yield MediaItem(path=path, name=path, modality=said, folder=folder, carried=carried)


def _problem(record: Record, problem: str) -> MediaItem:
    path = record.get("path")
    path = path if isinstance(path, str) else ""
    carried = {key: value for key, value in record.items() if key not in ("embedding", "error")}
    return MediaItem(path=path, name=path, carried=carried, problem=problem)


def _name_from_root(path: str, root: Path | None) -> str:
    """Returns a path below the media root as records name it, any other path as it is."""
    if root is None:
        return path
    try:
        return Path(path).absolute().relative_to(root.absolute()).as_posix()
    except ValueError:
        return path
