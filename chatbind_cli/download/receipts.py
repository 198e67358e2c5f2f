"""What came into a folder and from where: a line a file in `.downloads.jsonl`, the last one counts.

By it a file is told from another of its name that came from elsewhere, and is checked later
without a network; what was wanted of a repository and has not come is known, too. Of an archive,
which is thrown away once it is unpacked, a list of everything that came out lies beside it: names,
sizes and CRC-32s.
"""

from __future__ import annotations

import fcntl
import gzip
import io
import json
import os
import re
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from chatbind_cli.download.wanted import Request
from chatbind_cli.errors import DownloadError

NOTES = ".downloads.jsonl"
_BLOCK = 1 << 20
_REVISION = re.compile(r"^(hf:(?:datasets/)?[^/@]+/[^/@]+)@[^/]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """What is known of a file that came, or is to come.

    Attributes:
        path: below the folder.
        source: where it came from, as records say it.
        state: `wanted` of a repository, `here`, or `unpacked` and perhaps thrown away.
        bytes: its size.
        sha256: of its content.
        git_sha1: its name in Git, where that is all that is known.
        files: how many came out of it.
    """

    path: str
    source: str
    state: Literal["wanted", "here", "unpacked"]
    bytes: int | None = None
    sha256: str | None = None
    git_sha1: str | None = None
    files: int | None = None


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


def origin(source: str) -> str:
    """A source without its revision: another one of the same file may take its place."""
    return _REVISION.sub(r"\1", source)


def place_of(request: Request) -> tuple[Path, str]:
    """The folder that notes about a file lie in, and the file's path below it."""
    if request.hub is None or request.hub.file is None:
        return request.path.parent, request.path.name
    name = request.hub.file
    return request.path.parents[len(PurePosixPath(name).parts) - 1], name


def wanted_receipt(request: Request) -> Receipt:
    """What is noted of a file before it comes."""
    return Receipt(
        path=place_of(request)[1],
        source=request.source,
        state="wanted",
        bytes=request.bytes,
        sha256=request.sha256,
        git_sha1=request.git_sha1,
    )


class Notes:
    """What is noted in any number of folders; what others add meanwhile is read as it comes."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._read: dict[Path, int] = {}
        self._known: dict[Path, dict[str, Receipt]] = {}

    def of(self, request: Request) -> Receipt | None:
        """What is known of the file that a request would bring; None if nothing is."""
        folder, name = place_of(request)
        return self.below(folder).get(name)

    def below(self, folder: Path) -> dict[str, Receipt]:
        """All that is known of a folder's files, by path; lines that are none are passed over."""
        with self._lock:
            known = self._known.setdefault(folder, {})
            with suppress(OSError), (folder / NOTES).open("rb") as file:
                file.seek(self._read.get(folder, 0))
                for line in file:
                    if not line.endswith(b"\n"):
                        break  # somebody is writing it, or was killed
                    self._read[folder] = self._read.get(folder, 0) + len(line)
                    with suppress(ValueError, TypeError):
                        receipt = Receipt(**json.loads(line))
                        known[receipt.path] = receipt
            return known

    def add(self, folder: Path, receipts: Iterable[Receipt]) -> None:
        """Adds what is known of files, unless that is noted already.

        Raises:
            OSError: it cannot be written.
        """
        known = self.below(folder)
        lines = [_line(receipt) for receipt in receipts if known.get(receipt.path) != receipt]
        if not lines:
            return
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / NOTES).open("a+b") as file:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0, os.SEEK_END)
            if file.tell() and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n":
                file.write(b"\n")  # what a killed run left is to be a line of its own
            file.write("".join(lines).encode())


def _line(receipt: Receipt) -> str:
    known = {key: value for key, value in asdict(receipt).items() if value is not None}
    return json.dumps(known) + "\n"


def members_name(archive: str) -> str:
    """The name of the list of what came out of an archive, which lies beside it."""
    return f".{archive}.members.jsonl.gz"


@contextmanager
def member_list(request: Request) -> Iterator[Callable[[Member], None]]:
    """Yields what notes a member of an archive; the list is there once all of them are noted.

    For one process at a time: what a killed one has left is written over.
    """
    path = request.path.with_name(members_name(request.path.name))
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


def members_of(request: Request) -> set[str]:
    """The names of what came out of an archive before; none where there is no list of them."""
    with suppress(DownloadError):
        return {member.name for member in _listed(request)}
    return set()


def members_are_there(request: Request) -> bool:
    """Whether everything that came out of an archive is there with its size; reads no content."""
    folder = request.unpack or request.path.parent
    try:
        return all(_path(folder, m).stat().st_size == m.bytes for m in _listed(request))
    except (OSError, DownloadError):
        return False


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
        reason = _what_is_wrong(_path(folder, member), member, advance)
        if reason is not None:
            wrong.append(f"{member.name!r} {reason}")
    if wrong:
        raise DownloadError(
            f"{len(wrong)} of {count} files are missing or damaged, the first: {wrong[0]}",
            where=str(folder),
            hint="fetch it again with --overwrite",
        )
    return count


def crc32_of(path: Path, advance: Callable[[int], None] = lambda n: None) -> int:
    """The CRC-32 of a file's content.

    Raises:
        OSError: it cannot be read.
    """
    found = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            found = zlib.crc32(block, found)
            advance(len(block))
    return found


def _path(folder: Path, member: Member) -> Path:
    return folder.joinpath(*PurePosixPath(member.name).parts)


def _what_is_wrong(path: Path, member: Member, advance: Callable[[int], None]) -> str | None:
    try:
        if path.stat().st_size != member.bytes:
            return "has another size"
        found = crc32_of(path, advance)
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return "has another content" if member.crc32 not in (None, found) else None


def _listed(request: Request) -> Iterator[Member]:
    path = request.path.with_name(members_name(request.path.name))
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
