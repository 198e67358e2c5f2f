"""What came into a folder and from where.

A line a file in the folder's `.downloads.jsonl`, of which the last one counts. By it a file is told
from another of its name that came from elsewhere, and is checked later without a network; what was
wanted of a repository and has not come is known, too. The line of an archive, which is thrown away
once it is unpacked, has what came out: `[name, bytes, CRC-32]` a file.
"""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Literal, NamedTuple

from chatbind_cli.checkpoints.json_file import read_json
from chatbind_cli.download.requests import Request
from chatbind_cli.errors import CheckpointError, DownloadError
from chatbind_cli.files import free_bytes, sha256_file
from chatbind_cli.folders import RECORD
from chatbind_cli.jsonl import Record

MANIFEST = ".downloads.jsonl"
# By what these say, files may be replaced or trusted, so nothing that comes may take their place.
OURS = (MANIFEST, RECORD, ".cache")
_WEIGHTS = (".bin", ".safetensors", ".pth", ".pt")
FETCH_IT = "run it without --verify"
_REVISION = re.compile(r"^(hf:(?:datasets/)?[^/@]+/[^/@]+)@[^/]+")


class Member(NamedTuple):
    """A file that came out of an archive: its path below the folder, its size, its CRC-32."""

    name: str
    bytes: int
    crc32: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ManifestEntry:
    """What is known of a file that came, or is to come.

    Attributes:
        path: below the folder.
        source: where it came from, as records say it.
        state: `wanted`, `here`, or `unpacked` and perhaps thrown away.
        bytes: its size.
        sha256: of its content.
        members: what came out of it, the last time that it was unpacked.
    """

    path: str
    source: str
    state: Literal["wanted", "here", "unpacked"]
    bytes: int | None = None
    sha256: str | None = None
    members: tuple[Member, ...] = ()

    @classmethod
    def wanted(cls, request: Request) -> ManifestEntry:
        """What is noted of a file before it comes."""
        return cls(path=request.place[1], source=request.source, state="wanted")

    @classmethod
    def here(cls, request: Request, *, fresh: bool = False) -> ManifestEntry:
        """What is noted of a file that is there; `fresh`: whatever is remembered of its hash."""
        return replace(
            cls.wanted(request),
            state="here",
            bytes=request.path.stat().st_size,
            sha256=sha256_file(request.path, fresh=fresh),
        )

    def is_for(self, request: Request) -> bool:
        """Whether it is the file that is asked for, or another revision of it."""
        same = self.sha256 is not None and request.checksum == ("sha256", self.sha256)
        return same or _origin(self.source) == _origin(request.source)


def _origin(source: str) -> str:
    """A source without its revision: another one of the same file may take its place."""
    return _REVISION.sub(r"\1", source)


class Manifest:
    """The manifests of any number of folders, as they were when they were first asked for."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: dict[Path, dict[str, ManifestEntry]] = {}

    def of(self, request: Request) -> ManifestEntry | None:
        """What is known of the file that a request would bring; None if nothing is."""
        folder, name = request.place
        return self.below(folder).get(name)

    def below(self, folder: Path) -> dict[str, ManifestEntry]:
        """All that is known of a folder's files, by path; lines that are none are passed over."""
        with self._lock:
            if folder not in self._known:
                known = self._known.setdefault(folder, {})
                with suppress(OSError), (folder / MANIFEST).open("rb") as file:
                    for line in file:
                        with suppress(ValueError, TypeError, KeyError):  # half a line, from a kill
                            _take(known, _entry(json.loads(line)))
            return self._known[folder]

    def of_repository(self, request: Request) -> list[ManifestEntry]:
        """What came, or was to come, of a repository."""
        whole, known = _origin(request.source), self.below(request.path).values()
        return [entry for entry in known if _origin(entry.source) == f"{whole}/{entry.path}"]

    def add(self, folder: Path, files: Iterable[ManifestEntry]) -> None:
        """Adds what is known of files, unless that is noted already; the folder is made.

        Raises:
            OSError: it cannot be written.
        """
        from filelock import lock_descriptor

        known = self.below(folder)
        with self._lock:
            lines = [_line(entry) for entry in files if _take(known, entry)]
            if not lines:
                return
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / MANIFEST).open("a+b") as file:
                with suppress(OSError):  # a file system without locks
                    lock_descriptor(file.fileno())
                file.seek(0, os.SEEK_END)
                if file.tell() and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n":
                    file.write(b"\n")  # what a killed run left is to be a line of its own
                file.write("".join(lines).encode())


def _entry(line: Record) -> ManifestEntry:
    return ManifestEntry(
        path=line["path"],
        source=line["source"],
        state=line["state"],
        bytes=line.get("bytes"),
        sha256=line.get("sha256"),
        members=tuple(Member(*member) for member in line.get("members", ())),
    )


def _line(entry: ManifestEntry) -> str:
    facts = {key: getattr(entry, key) for key in ManifestEntry.__slots__}
    return json.dumps({k: v for k, v in facts.items() if v not in (None, ())}) + "\n"


def _take(known: dict[str, ManifestEntry], entry: ManifestEntry) -> bool:
    """Adds a line to what is known, and says whether it is new.

    What came out of an archive stays known while that is fetched and unpacked anew.
    """
    before = known.get(entry.path)
    if before is not None and not entry.members:
        entry = replace(entry, members=before.members)
    known[entry.path] = entry
    return entry != before


Found = Literal["here", "to unpack", "to fetch", "in the way"]


def look(
    request: Request,
    entry: ManifestEntry | None,
    *,
    closely: bool = False,
    overwrite: bool = False,
) -> Found:
    """What there is to do about one file; asks the disk alone.

    Args:
        request: the file's.
        entry: what is noted of it.
        closely: compare its hash, too, or look for everything that came out of it.
        overwrite: what came before is to come again.

    Returns:
        `in the way` where what is there came from elsewhere, or did not come by `download`.
    """
    path = request.path
    if entry is not None:
        if overwrite:
            return "to fetch"
        if not entry.is_for(request):
            there = entry.state == "unpacked" or (entry.state == "here" and path.is_file())
            return "in the way" if there else "to fetch"
        if _is_unpacked(request, entry, closely):
            return "here"
    right = _is_right(request, closely)
    # A file without a note may be replaced only by what is the same.
    same = right and (request.checksum is not None or not overwrite)
    if entry is None and os.path.lexists(path) and not same:
        return "in the way"
    if overwrite or not right:
        return "to fetch"
    return "here" if request.unpack is None else "to unpack"


def _is_right(request: Request, closely: bool) -> bool:
    if not request.path.is_file():
        return False
    with suppress(DownloadError):
        (request if closely else replace(request, checksum=None)).check()
        return True
    return False


def _is_unpacked(request: Request, entry: ManifestEntry, closely: bool) -> bool:
    """Whether the archive that is asked for is unpacked; reads no content."""
    if request.unpack is None or entry.state != "unpacked":
        return False
    if request.checksum is not None and request.checksum[0] == "sha256":
        same = request.checksum[1] == entry.sha256
    else:
        same = request.bytes in (None, entry.bytes) and request.source == entry.source
    if not same or not closely:
        return same
    with suppress(OSError):
        sizes = ((request.unpack / m.name).stat().st_size == m.bytes for m in entry.members)
        return bool(entry.members) and all(sizes)
    return False


def is_present(request: Request, manifest: Manifest) -> bool:
    """Whether what a request asks for is here, so far as a look can say."""
    if not request.is_repository:
        return look(request, manifest.of(request)) in ("here", "to unpack")
    # Which files a repository has is known to the hub alone; here, what was wanted of it.
    if known := manifest.of_repository(request):
        return all(c.state == "unpacked" or (request.path / c.path).is_file() for c in known)
    if request.hub is not None and request.hub.kind == "dataset":
        return any(path.is_file() for path in request.path.glob("*"))
    return has_weights(request.path)


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a file's name is one that any of the patterns means."""
    return any(fnmatch(name, pattern) for pattern in patterns)


def has_weights(folder: Path) -> bool:
    """Whether a folder has weights, and where it has an index, every shard that this names."""
    if not any(path.suffix in _WEIGHTS for path in folder.glob("*")):
        return False
    for index in folder.glob("*.index.json"):
        with suppress(CheckpointError, KeyError, AttributeError):
            shards = set(read_json(index)["weight_map"].values())
            if all((folder / str(shard)).is_file() for shard in shards):
                return True
    return not any(folder.glob("*.index.json"))


def files_here(request: Request, manifest: Manifest) -> list[Request]:
    """The files of a repository that came, or were to come, or else are in its folder."""
    names = [entry.path for entry in manifest.of_repository(request)]
    if not names:
        below = (path.relative_to(request.path) for path in sorted(request.path.rglob("*")))
        names = [path.as_posix() for path in below if path.parts[0] not in OURS]
        names = [name for name in names if (request.path / name).is_file()]
    if request.include:
        names = [name for name in names if matches(name, request.include)]
    if not names:
        raise DownloadError("is not here", where=str(request.path), hint=FETCH_IT)
    return [request.file(name) for name in names]


def check_room(folder: Path, needed: int, what: str) -> None:
    """Refuses `needed` bytes that cannot fit into a folder, which need not exist yet.

    Raises:
        DownloadError: less is free; `what` says whose bytes they are.
    """
    free = free_bytes(folder)
    if free < needed:
        raise DownloadError(
            f"needs {in_words(needed)} and {in_words(free)} are free in {folder.absolute()}",
            where=what,
            hint="make room, or name another folder with --output",
        )


def in_words(size: int) -> str:
    """A number of bytes for a person: `13.51 GB`, `0.04 MB`."""
    return f"{size / 1e9:.2f} GB" if size >= 10**9 else f"{size / 1e6:.2f} MB"
