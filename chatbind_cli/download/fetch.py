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
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import TYPE_CHECKING

from chatbind_cli.console import Progress, note
from chatbind_cli.download.archive import unpack
from chatbind_cli.download.hub import Hub, is_offline
from chatbind_cli.download.manifest import (
    ManifestEntry,
    Manifests,
    Member,
    check_room,
    is_present,
    members_are_there,
    members_of,
)
from chatbind_cli.download.requests import Request
from chatbind_cli.download.verify import files_here, verify
from chatbind_cli.download.web import AGAIN, Patience, begun_bytes, fetch_url, open_client
from chatbind_cli.errors import ChatBindError, DownloadError, contained, reason
from chatbind_cli.files import lock_file
from chatbind_cli.jsonl import Record

if TYPE_CHECKING:
    import httpx


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How to fetch.

    Attributes:
        max_workers: files at a time.
        keep_archive: whether an archive stays beside what was unpacked from it.
        verify: only look at what is there, and read all of it anew.
        overwrite: fetch what came before, too.
        endpoint: the hub's address, where it is not the default.
        patience: with plain URLs.
    """

    max_workers: int = 4
    keep_archive: bool = False
    verify: bool = False
    overwrite: bool = False
    endpoint: str | None = None
    patience: Patience = field(default_factory=Patience)


def fetch_all(requests: Sequence[Request], settings: Settings = Settings()) -> Iterator[Record]:
    """Fetches everything and yields a record a file, in the order in which they are done.

    A failure is a record with `status` `failed` and an `error`, and does not stop the others.

    Args:
        requests: what to fetch; repositories are looked up on the hub first.
        settings: how.

    Raises:
        DownloadError: the disk has no room for what is known to come.
    """
    hub, manifests = Hub(settings.endpoint), Manifests()
    files: list[Request] = []
    for request in requests:
        try:
            files += _files_of(request, hub, manifests, settings)
        except ChatBindError as error:
            yield _failed(request, error)
    total = None
    if not settings.verify:
        wanted = [file for file in files if settings.overwrite or not is_present(file, manifests)]
        if coming := sum(file.bytes or 0 for file in wanted):
            begun = sum(begun_bytes(file.path) for file in wanted if file.bytes)
            check_room(files[0].path.parent, coming - begun, "the download")
            total = coming >> 20 or None
    label = "verifying" if settings.verify else "downloading"
    with (
        Progress(total, label, "MiB") as progress,
        open_client(settings.patience) as client,
    ):
        yield from _in_parallel(files, _Fetcher(hub, client, manifests, _Meter(progress), settings))


def _files_of(
    request: Request, hub: Hub, manifests: Manifests, settings: Settings
) -> list[Request]:
    """A repository's files; anything else is one file, with what is known of it.

    What is wanted of a repository is noted, so that what has not come is missed.

    Raises:
        DownloadError: a repository cannot be listed, or is not here.
    """
    here = not settings.overwrite and is_present(request, manifests)
    if request.is_repository:
        if settings.verify or (here and is_offline()):
            return files_here(request, manifests)
        files = hub.files(request)
        if not files:
            raise DownloadError("has no file that is wanted", where=request.source)
        known = manifests.below(request.path)
        # What is there without a note is somebody's own, and must not come to look like ours.
        new = [f for f in files if f.place[1] not in known and not os.path.lexists(f.path)]
        manifests.add(request.path, [ManifestEntry.wanted(file) for file in new])
        return files
    if request.hub is None or request.checksum is not None or settings.verify:
        return [request]
    entry = manifests.of(request)
    if here and entry is not None and entry.sha256 and entry.source == request.source:
        return [replace(request, checksum=("sha256", entry.sha256))]
    # offline, only what the hub's cache has could be said, and that is not the whole
    return [request] if is_offline() else hub.files(request) or [request]


class _Stopped(Exception):
    """The user wants to stop; raised in the workers."""


class _Meter:
    """Adds up the bytes of all workers, and is where they notice that they are to stop."""

    def __init__(self, progress: Progress, stop: threading.Event | None = None) -> None:
        self.progress = progress
        self.stop = stop or threading.Event()
        self._lock = threading.Lock()

    def expect(self, n: int) -> None:
        """So many bytes more will come than was known."""
        with self._lock:
            self.progress.expect((self.progress.total or 0) + (n >> 20))

    def advance(self, n: int) -> None:
        if self.stop.is_set():
            raise _Stopped
        with self._lock:
            self.progress.advance_bytes(n)


def _in_parallel(files: Sequence[Request], fetcher: _Fetcher) -> Iterator[Record]:
    """What became of each file, as it is known.

    The pool's threads are daemons: one that waits for a server that stalls cannot be woken, and
    what it has so far is on the disk in any case.
    """
    pool = ThreadPool(min(fetcher.settings.max_workers, len(files)) or 1)
    try:
        yield from pool.imap_unordered(fetcher.outcome, files)
    finally:
        # Reached early by Ctrl-C or a closed pipe: the workers stop at their next block.
        fetcher.meter.stop.set()
        pool.terminate()


@dataclass(frozen=True, slots=True)
class _Fetcher:
    """Fetches or verifies one file; what the workers share."""

    hub: Hub
    client: httpx.Client
    manifests: Manifests
    meter: _Meter
    settings: Settings

    def outcome(self, request: Request) -> Record:
        """What became of a file; whatever may fail is one failed record."""
        try:
            return self._fetch(request)
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

    def _fetch(self, request: Request) -> Record:
        """Makes sure that one file (or what is in it) is there, and tells about it."""
        entry = self.manifests.of(request)
        if not self.settings.overwrite:
            _refuse_other(request, entry)
        if self.settings.verify:
            found, compared = verify(request, entry, self.meter.advance)
            record = _record(request, "present", found)
            return {**record, "source": found.source, "compared": compared}
        here = not self.settings.overwrite and is_present(request, self.manifests)
        if here and entry is not None and entry.is_unpacked_for(request) and request.unpack:
            if members_are_there(request):
                return _record(request, "present", entry)
            note(f"files of {request.path.name} are missing: unpacking it again")
        here = here and request.path.is_file()
        if here and not _is_right(request):
            here = False
            if entry is not None:
                note(f"{request.path} is here and not as it should be: fetching it again")
        folder = request.place[0]
        if not here:
            if entry is None:
                _refuse_foreign(request)
                self.manifests.add(folder, [ManifestEntry.wanted(request)])
            self._bring(request)
        entry = ManifestEntry.here(request)
        self.manifests.add(folder, [entry])
        if request.unpack is not None:
            members = self._unpack(request, request.unpack)
            entry = replace(entry, state="unpacked", files=len(members))
            self.manifests.add_unpacked(folder, entry, members)
            if not self.settings.keep_archive:
                request.path.unlink()
        return _record(request, "present" if here else "downloaded", entry)

    def _bring(self, request: Request) -> None:
        if request.hub is None:
            fetch_url(
                self.client,
                request,
                patience=self.settings.patience,
                expect=self.meter.expect,
                advance=self.meter.advance,
            )
            return
        folder = request.place[0]
        # The hub's library takes a file that is there away before it has the new one.
        aside = folder / ".cache" / "chatbind" if request.path.exists() else folder
        path = self.hub.fetch(request.hub, aside, advance=self.meter.advance)
        try:
            request.check(path)
        except DownloadError:
            path.unlink(missing_ok=True)
            raise
        if path != request.path:
            path.replace(request.path)

    def _unpack(self, request: Request, folder: Path) -> list[Member]:
        replaceable: set[str] = set()
        if self.settings.overwrite:
            with suppress(DownloadError):  # nothing came out before
                replaceable = {member.name for member in members_of(request)}
        with request.path.open("rb") as archive:
            lock_file(archive.fileno(), request.path)
            # How much is to come is known once the archive's names have been looked at.
            label = f"unpacking {request.path.name}"
            with self.meter.progress.beside(None, label) as progress:
                return unpack(
                    request.path,
                    folder,
                    replaceable=replaceable,
                    begin=lambda total: progress.expect(total >> 20),
                    advance=_Meter(progress, self.meter.stop).advance,
                )


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
    return record if entry.files is None else {**record, "files": entry.files}


def _failed(request: Request, error: ChatBindError) -> Record:
    return {
        "name": request.name,
        "path": str(request.unpack or request.path),
        "source": request.source,
        "status": "failed",
        "error": str(error),
    }
