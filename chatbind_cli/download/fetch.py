"""Fetches what was asked for, several files at a time, and says of each what became of it.

A file is left alone where it is there already, verified before it gets its name, and unpacked
where its content is what is wanted.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path

from chatbind_cli.console import Progress, note
from chatbind_cli.download.archive import unpack
from chatbind_cli.download.hub import Hub, is_offline
from chatbind_cli.download.manifest import Manifest, ManifestEntry, Member, check_room
from chatbind_cli.download.requests import Request
from chatbind_cli.download.status import files_here, is_present, verify
from chatbind_cli.download.web import AGAIN, begun_bytes, fetch_url, open_client
from chatbind_cli.errors import ChatBindError, DownloadError, contained, reason
from chatbind_cli.files import lock_file
from chatbind_cli.jsonl import Record


class _Stopped(Exception):
    """The user wants to stop; raised in the workers."""


@dataclass(kw_only=True)
class Downloader:
    """Fetches or verifies files; for one call of `fetch_all`.

    Attributes:
        max_workers: files at a time.
        keep_archive: whether an archive stays beside what was unpacked from it.
        verify: only look at what is there, and read all of it anew.
        overwrite: fetch what came before, too.
        endpoint: the hub's address, where it is not the default.
    """

    max_workers: int = 4
    keep_archive: bool = False
    verify: bool = False
    overwrite: bool = False
    endpoint: str | None = None
    _stop: threading.Event = field(default_factory=threading.Event, init=False)
    _counting: threading.Lock = field(default_factory=threading.Lock, init=False)

    def __post_init__(self) -> None:
        self._hub, self._manifest = Hub(self.endpoint), Manifest()

    def fetch_all(self, requests: Sequence[Request]) -> Iterator[Record]:
        """Fetches everything and yields a record a file, in the order in which they are done.

        A failure is a record with `status` `failed` and an `error`, and does not stop the others.

        Args:
            requests: what to fetch; repositories are looked up on the hub first.

        Raises:
            DownloadError: the disk has no room for what is known to come.
        """
        files: list[Request] = []
        for request in requests:
            try:
                files += self._files_of(request)
            except ChatBindError as error:
                yield _failed(request, error)
        total = None
        if not self.verify:
            wanted = [file for file in files if not self._is_here(file)]
            if coming := sum(file.bytes or 0 for file in wanted):
                begun = sum(begun_bytes(file.path) for file in wanted if file.bytes)
                check_room(files[0].path.parent, coming - begun, "the download")
                total = coming >> 20 or None
        label = "verifying" if self.verify else "downloading"
        # The pool's threads are daemons: one that waits for a server that stalls cannot be woken,
        # and what it has so far is on the disk in any case.
        pool = ThreadPool(min(self.max_workers, len(files)) or 1)
        with Progress(total, label, "MiB") as self._progress, open_client() as self._client:
            try:
                yield from pool.imap_unordered(self._outcome, files)
            finally:
                # Reached early by Ctrl-C or a closed pipe: the workers stop at their next block.
                self._stop.set()
                pool.terminate()

    def _files_of(self, request: Request) -> list[Request]:
        """A repository's files; anything else is one file, with what is known of it.

        What is wanted of a repository is noted, so that what has not come is missed.

        Raises:
            DownloadError: a repository cannot be listed, or is not here.
        """
        here = self._is_here(request)
        if request.is_repository:
            if self.verify or (here and is_offline()):
                return files_here(request, self._manifest)
            files = self._hub.files(request)
            if not files:
                raise DownloadError("has no file that is wanted", where=request.source)
            known = self._manifest.below(request.path)
            # What is there without a note is somebody's own, and must not come to look like ours.
            new = [f for f in files if f.place[1] not in known and not os.path.lexists(f.path)]
            self._manifest.add(request.path, [ManifestEntry.wanted(file) for file in new])
            return files
        if request.hub is None or request.checksum is not None or self.verify:
            return [request]
        entry = self._manifest.of(request)
        if here and entry is not None and entry.sha256 and entry.source == request.source:
            return [replace(request, checksum=("sha256", entry.sha256))]
        # offline, only what the hub's cache has could be said, and that is not the whole
        return [request] if is_offline() else self._hub.files(request) or [request]

    def _is_here(self, request: Request) -> bool:
        return not self.overwrite and is_present(request, self._manifest)

    def _advance(self, progress: Progress, n: int) -> None:
        """Adds up the bytes of all workers, and is where these notice that they are to stop."""
        if self._stop.is_set():
            raise _Stopped
        with self._counting:
            progress.advance_bytes(n)

    def _expect(self, n: int) -> None:
        """So many bytes more will come than was known."""
        with self._counting:
            self._progress.expect((self._progress.total or 0) + (n >> 20))

    def _outcome(self, request: Request) -> Record:
        """What became of a file; whatever may fail is one failed record."""
        try:
            return self._verify(request) if self.verify else self._fetch(request)
        except _Stopped:
            raise
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            failure = DownloadError(
                error.strerror or reason(error),
                where=str(error.filename or request.path),
                hint=f"make room and {AGAIN}" if full else None,
            )
            return _failed(request, failure)
        except Exception as error:
            return _failed(request, contained(error, where=request.source))

    def _verify(self, request: Request) -> Record:
        entry = self._manifest.of(request)
        _refuse_other(request, entry)
        found, compared = verify(request, entry, partial(self._advance, self._progress))
        record = _record(request, "present", found)
        return {**record, "source": found.source, "compared": compared}

    def _fetch(self, request: Request) -> Record:
        """Makes sure that one file (or what is in it) is there, and tells about it."""
        folder, entry = request.place[0], self._manifest.of(request)
        if not self.overwrite:
            _refuse_other(request, entry)
        here = self._is_here(request)
        if here and request.unpack and entry and entry.is_unpacked_for(request):
            if entry.members_are_there(request.unpack):
                return _record(request, "present", entry)
            note(f"files of {request.path.name} are missing: unpacking it again")
        here = here and request.path.is_file()
        if here and not _is_right(request):
            here = False
            if entry is not None:
                note(f"{request.path} is here and not as it should be: fetching it again")
        if not here:
            if entry is None:
                _refuse_foreign(request)
                self._manifest.add(folder, [ManifestEntry.wanted(request)])
            self._bring(request)
        replaceable = {m.name for m in entry.members} if entry and self.overwrite else set()
        entry = ManifestEntry.here(request)
        self._manifest.add(folder, [entry])
        if request.unpack is not None:
            members = self._unpack(request, request.unpack, replaceable)
            entry = replace(entry, state="unpacked", members=tuple(members))
            self._manifest.add(folder, [entry])
            if not self.keep_archive:
                request.path.unlink()
        return _record(request, "present" if here else "downloaded", entry)

    def _bring(self, request: Request) -> None:
        advance = partial(self._advance, self._progress)
        if request.hub is None:
            expect = self._expect if request.bytes is None else lambda n: None
            fetch_url(self._client, request, expect=expect, advance=advance)
            return
        # Not where it belongs: the hub's library takes the old file away before it has the new.
        aside = request.place[0] / ".cache" / "chatbind"
        path = self._hub.fetch(request.hub, aside, advance=advance)
        try:
            request.check(path)
        except DownloadError:
            path.unlink(missing_ok=True)
            raise
        request.path.parent.mkdir(parents=True, exist_ok=True)
        path.replace(request.path)

    def _unpack(self, request: Request, folder: Path, replaceable: set[str]) -> list[Member]:
        label, size = f"unpacking {request.path.name}", request.path.stat().st_size
        with (
            request.path.open("rb") as archive,
            self._progress.beside(size >> 20 or None, label) as progress,
        ):
            lock_file(archive.fileno(), request.path)
            advance = partial(self._advance, progress)
            return unpack(request.path, folder, replaceable=replaceable, advance=advance)


def _refuse_other(request: Request, entry: ManifestEntry | None) -> None:
    """Refuses a file of another source that is in the place of the one that is asked for."""
    if entry is None or entry.state == "wanted" or entry.is_for(request):
        return
    if entry.state == "unpacked" or request.path.is_file():
        raise DownloadError(
            f"what is here came from {entry.source}",
            where=str(request.path),
            hint=f"fetch {request.source} into another folder, or say --overwrite",
        )


def _refuse_foreign(request: Request) -> None:
    """Refuses to replace a file that did not come by `download`, unless it is the same."""
    if not os.path.lexists(request.path):
        return
    with suppress(DownloadError, OSError):
        if request.check() not in ("bytes", "nothing"):
            return
    raise DownloadError(
        "is here, and did not come by `chatbind download`, so it stays as it is",
        where=str(request.path),
        hint="move it away, or name another folder with --output",
    )


def _is_right(request: Request) -> bool:
    try:
        request.check()
    except DownloadError:
        return False
    return True


def _record(request: Request, status: str, entry: ManifestEntry) -> Record:
    record: Record = {
        "name": request.name,
        "path": str(request.unpack or request.path),
        "bytes": entry.bytes,
        "sha256": entry.sha256,
        "source": request.source,
        "status": status,
    }
    return {**record, "files": len(entry.members)} if entry.state == "unpacked" else record


def _failed(request: Request, error: ChatBindError) -> Record:
    return {
        "name": request.name,
        "path": str(request.unpack or request.path),
        "source": request.source,
        "status": "failed",
        "error": str(error),
    }
