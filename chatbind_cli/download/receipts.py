"""What is noted of things that were fetched, so that they can be checked later without a network.

Of an archive: that it was unpacked, and name, size and CRC-32 of everything that came out, since
the archive itself is thrown away. Of a file of the hub: what the hub's own library leaves beside
it (`.cache/huggingface/download`): its commit and its ETag, which is a hash of its content.
"""

from __future__ import annotations

import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from chatbind_cli.download.wanted import Request
from chatbind_cli.errors import DownloadError
from chatbind_cli.files import replace_file
from chatbind_cli.jsonl import Record

_BLOCK = 1 << 20
_HUB_NOTES = PurePosixPath(".cache/huggingface/download")


@dataclass(frozen=True, slots=True)
class Member:
    """A file of an archive.

    Attributes:
        name: its path in the archive.
        bytes: its size.
        crc32: of its content; None where the archive does not tell it.
    """

    name: str
    bytes: int
    crc32: int | None = None


def read_marker(request: Request) -> Record | None:
    """What is known of an archive that was unpacked here, and may be gone since."""
    if request.unpack is None or not request.unpack.is_dir():
        return None
    with suppress(OSError, ValueError, KeyError):
        marker = json.loads(_beside(request, "unpacked.json").read_text(encoding="utf-8"))
        if marker.get("source") == request.source:
            return {key: marker[key] for key in ("bytes", "sha256", "files")}
    return None


def write_marker(request: Request, facts: Record) -> None:
    """Remembers that an archive has been unpacked."""
    with replace_file(_beside(request, "unpacked.json")) as temporary:
        temporary.write_text(json.dumps({"source": request.source, **facts}), encoding="utf-8")


@contextmanager
def member_list(request: Request) -> Iterator[Callable[[Member], None]]:
    """Yields what notes a member of an archive; the list is there once all of them are noted.

    For one process at a time: what a killed one has left is written over.
    """
    path = _beside(request, "members.jsonl.gz")
    temporary = path.with_name(f"{path.name}.part")
    try:
        with (
            temporary.open("wb") as raw,
            # No name and no time in it: the same archive gives the same list.
            gzip.GzipFile("", "wb", 1, raw, mtime=0) as packed,
            io.TextIOWrapper(packed, encoding="utf-8") as file,
        ):

            def note_member(member: Member) -> None:
                file.write(json.dumps([member.name, member.bytes, member.crc32]) + "\n")

            yield note_member
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def check_members(request: Request, advance: Callable[[int], None] = lambda n: None) -> int:
    """Reads everything that came out of an archive and compares it with what was noted.

    Args:
        request: the archive's.
        advance: called with the number of bytes that were read.

    Returns:
        The number of files.

    Raises:
        DownloadError: files are missing or changed; the message counts them and names the first.
    """
    folder = request.unpack or request.path.parent
    count, wrong = 0, []
    for member in _listed(request):
        count += 1
        path = folder.joinpath(*PurePosixPath(member.name).parts)
        reason = _what_is_wrong(path, member, advance)
        if reason is not None:
            wrong.append(f"{member.name} {reason}")
    if wrong:
        raise DownloadError(
            f"{len(wrong)} of {count} files are missing or damaged, the first: {wrong[0]}",
            where=str(folder),
            hint="fetch it again with --overwrite",
        )
    return count


def _what_is_wrong(path: Path, member: Member, advance: Callable[[int], None]) -> str | None:
    try:
        if path.stat().st_size != member.bytes:
            return "has another size"
        found = 0
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                found = zlib.crc32(block, found)
                advance(len(block))
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return "has another content" if member.crc32 not in (None, found) else None


def _listed(request: Request) -> Iterator[Member]:
    path = _beside(request, "members.jsonl.gz")
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            for line in file:
                name, size, crc32 = json.loads(line)
                yield Member(name, size, crc32)
    except (OSError, EOFError, ValueError, TypeError, zlib.error) as error:
        raise DownloadError(
            f"the list of what came out of the archive cannot be read ({error})",
            where=str(path),
            hint="fetch it again with --overwrite",
        ) from error


def _beside(request: Request, suffix: str) -> Path:
    return request.path.with_name(f".{request.path.name}.{suffix}")


@dataclass(frozen=True, slots=True, kw_only=True)
class HubNote:
    """What the hub's library noted of a file; one of the hashes, or neither."""

    commit: str | None = None
    sha256: str | None = None
    git_sha1: str | None = None


def hub_note(folder: Path, file: str) -> HubNote:
    """What was noted of a file of the hub that was fetched into a folder.

    Args:
        folder: the folder that stands for the repository.
        file: path in the repository.
    """
    path = folder / _HUB_NOTES / f"{file}.metadata"
    try:
        commit, etag, *_ = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return HubNote()
    sha256, git_sha1 = hashes_of_etag(etag)
    return HubNote(commit=commit or None, sha256=sha256, git_sha1=git_sha1)


def hashes_of_etag(etag: str) -> tuple[str | None, str | None]:
    """SHA-256 of a file in the hub's large-file storage, or the name in Git of any other."""
    if re.fullmatch("[0-9a-f]{64}", etag):
        return etag, None
    return None, etag if re.fullmatch("[0-9a-f]{40}", etag) else None


def hub_files(folder: Path) -> list[str]:
    """Paths in the repository of what was fetched into a folder, else of all files in it."""
    notes = folder / _HUB_NOTES
    noted = [
        path.relative_to(notes).as_posix().removesuffix(".metadata")
        for path in notes.rglob("*.metadata")
    ]
    here = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(noted or [path.as_posix() for path in here if path.parts[0] != ".cache"])
