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
from pathlib import Path
from typing import Literal, NamedTuple

from chatbind_cli.download.requests import Request
from chatbind_cli.files import sha256_file
from chatbind_cli.folders import RECORD
from chatbind_cli.jsonl import Record

MANIFEST = ".downloads.jsonl"
# By what these say, files may be replaced or trusted, so nothing that comes may take their place.
OURS = (MANIFEST, RECORD, ".cache")
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
