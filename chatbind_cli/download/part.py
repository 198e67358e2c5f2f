"""A file in the making: `NAME.part`, and beside it what is known of the file that it is part of.

By that a part of another version is told from the rest of this one. Knows nothing of retries.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING

from chatbind_cli.errors import DownloadError

if TYPE_CHECKING:
    import httpx


def begun_bytes(path: Path) -> int:
    """How much of a file an earlier `fetch_url` has left."""
    with suppress(OSError):
        return path.with_name(f"{path.name}.part").stat().st_size
    return 0


class Part:
    """The file in the making and what is known of its source."""

    def __init__(self, path: Path, url: str, expect: Callable[[int], None]) -> None:
        self.path = path.with_name(path.name + ".part")
        self.facts_path = path.with_name(path.name + ".part.json")
        self.url = url
        self.validator: str | None = None
        self.version: dict[str, str] = {}
        self.total: int | None = None
        self._expect = expect

    @contextmanager
    def open(self) -> Iterator[IO[bytes]]:
        """Opens the part for this process alone, at the end of what is there.

        Raises:
            DownloadError: another process is at it.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._locked() as file:
            self._recall()
            if self.validator is None:
                file.truncate(0)
            file.seek(0, os.SEEK_END)
            if self.total is not None:
                self._expect(self.total)
            yield file

    def _locked(self) -> IO[bytes]:
        while True:
            file = self.path.open("ab", buffering=0)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # The one who had it before may have given it its name since.
                with suppress(FileNotFoundError):
                    if os.path.samestat(os.fstat(file.fileno()), self.path.stat()):
                        return file
            except OSError as error:
                file.close()
                raise DownloadError(
                    "another process is fetching it", where=str(self.path), hint="wait for it"
                ) from error
            file.close()

    def _recall(self) -> None:
        if self.path.stat().st_size and not self.facts_path.is_file():
            raise DownloadError(
                "is in the way, and was not begun here", where=str(self.path), hint="move it away"
            )
        with suppress(OSError, ValueError):
            facts = json.loads(self.facts_path.read_text(encoding="utf-8"))
            if facts.get("url_sha256") == hashlib.sha256(self.url.encode()).hexdigest():
                self.validator = facts.get("validator")
                self.version = dict(facts.get("version") or {})
                self.total = facts.get("total")

    def remember(self, response: httpx.Response, total: int | None) -> None:
        """Notes by what the same file can be asked for again; a weak ETag promises too little."""
        self.version = _version(response)
        etag = self.version.get("ETag", "W/")
        self.validator = self.version.get("Last-Modified") if etag.startswith("W/") else etag
        if total is not None and self.total is None:
            self._expect(total)
        self.total = total
        self._write_facts()

    def _write_facts(self) -> None:
        digest = hashlib.sha256(self.url.encode()).hexdigest()  # there may be a secret in it
        facts = {
            "url_sha256": digest,
            "validator": self.validator,
            "version": self.version,
            "total": self.total,
        }
        self.facts_path.write_text(json.dumps(facts), encoding="utf-8")

    def goes_on(self, response: httpx.Response, total: int | None) -> bool:
        """Whether a part of a file is one of the file that the first part came from.

        A server need not heed If-Range, so what it says of its file is compared, too.
        """
        now = _version(response)
        same = all(now.get(name, value) == value for name, value in self.version.items())
        return same and (total is None or self.total in (None, total))

    def forget(self) -> None:
        """What is here cannot be gone on with."""
        self.validator = self.total = None
        self.version = {}
        self._write_facts()

    def become(self, path: Path) -> None:
        """Gives the finished part its name."""
        with self.path.open("rb") as file:
            os.fsync(file.fileno())
        self.path.replace(path)
        self.facts_path.unlink(missing_ok=True)

    def discard(self) -> None:
        """Throws the part away."""
        self.path.unlink(missing_ok=True)
        self.facts_path.unlink(missing_ok=True)


def _version(response: httpx.Response) -> dict[str, str]:
    """By what a server tells one version of a file from another."""
    names = ("ETag", "Last-Modified")
    return {name: response.headers[name] for name in names if response.headers.get(name)}
