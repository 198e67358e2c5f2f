"""Fetches what was asked for, several files at a time, and says of each what became of it.

A file is left alone where it is there already, verified before it gets its name, and unpacked
where its content is what is wanted.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.pool import ThreadPool
from pathlib import Path

from chatbind_cli.console import Progress, note
from chatbind_cli.download.archive import check_members, unpack
from chatbind_cli.download.hub import Hub, is_offline
from chatbind_cli.download.manifest import Manifest, ManifestEntry, Member
from chatbind_cli.download.presence import FETCH_IT, files_here, is_present, look
from chatbind_cli.download.requests import Request
from chatbind_cli.download.web import AGAIN, begun_bytes, fetch_url, open_client
from chatbind_cli.errors import ChatBindError, DownloadError, contained, reason
from chatbind_cli.files import check_room, lock_file
from chatbind_cli.jsonl import Record


@dataclass(kw_only=True)
class Downloader:
    """Fetches or verifies files; for one call of `fetch_all`.

    Attributes:
        max_workers: files at a time.
        keep_archive: whether an archive stays beside what was unpacked from it.
        verify: only look at what is there, and read all of it anew.
        overwrite: fetch what came before, too.
    """

    max_workers: int = 4
    keep_archive: bool = False
    verify: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        self._hub, self._manifest = Hub(), Manifest()

    def fetch_all(self, requests: Sequence[Request]) -> Iterator[Record]:
        """Fetches everything and yields a record a file, in the order in which they are done.

        Repositories are looked up on the hub first. A failure is a record with `status` `failed`
        and an `error`, and does not stop the others.

        Raises:
            ChatBindError: the disk has no room for what is known to come.
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
                check_room(files[0].path.parent, coming - begun, where="the download")
                total = coming >> 20 or None
        label = "verifying" if self.verify else "downloading"
        # The pool's threads are daemons: one that waits for a server that stalls cannot be woken,
        # and what it has so far is on the disk in any case.
        pool = ThreadPool(min(self.max_workers, len(files)) or 1)
        with Progress(total, label, "MiB") as self._progress, open_client() as self._client:
            try:
                yield from pool.imap_unordered(self._outcome, files)
            finally:
                pool.terminate()  # reached early by Ctrl-C or a closed pipe: nothing new is begun

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

    def _outcome(self, request: Request) -> Record:
        """What became of a file; whatever may fail is one failed record."""
        try:
            if self.verify:
                return _verify(request, self._manifest.of(request), self._progress.advance_bytes)
            return self._fetch(request)
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
        folder, entry = request.place[0], self._manifest.of(request)
        place = request.unpack or request.path
        found = look(request, entry, closely=True, overwrite=self.overwrite)
        if found == "in the way":
            raise _in_the_way(request, entry)
        if found == "here" and entry is not None and request.unpack is not None:
            return _record(request, "present", entry)
        if found == "to fetch":
            if entry is None:
                self._manifest.add(folder, [ManifestEntry.wanted(request)])
            elif entry.state != "wanted" and not self.overwrite and place.exists():
                note(f"{place} is here and not as it should be: fetching it again")
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
        return _record(request, "downloaded" if found == "to fetch" else "present", entry)

    def _bring(self, request: Request) -> None:
        advance = self._progress.advance_bytes
        if request.hub is None:
            fetch_url(self._client, request, expect=self._progress.expect_bytes, advance=advance)
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
            return unpack(
                request.path, folder, replaceable=replaceable, advance=progress.advance_bytes
            )


def _in_the_way(request: Request, entry: ManifestEntry | None) -> DownloadError:
    if entry is None:
        return DownloadError(
            "is here, and did not come by `chatbind download`, so it stays as it is",
            where=str(request.path),
            hint="move it away, or name another folder with --output",
        )
    return DownloadError(
        f"what is here came from {entry.source}",
        where=str(request.path),
        hint=f"fetch {request.source} into another folder, or say --overwrite",
    )


def _verify(
    request: Request, entry: ManifestEntry | None, advance: Callable[[int], None]
) -> Record:
    """Compares a file, or what came out of it, with what is known, and reads all of it.

    Raises:
        DownloadError: it is not here, or differs.
    """
    if entry is not None and look(request, entry) == "in the way":
        raise _in_the_way(request, entry)
    # Where only what came out is left, that is what there is to read, --unpack or not.
    came_out = request.unpack is not None or not request.path.is_file()
    if entry is not None and entry.state == "unpacked" and came_out:
        kind, digest = request.checksum or ("", "")
        if kind == "sha256" and digest != entry.sha256:
            raise DownloadError(
                "what is unpacked here is another archive",
                where=request.source,
                hint="fetch it with --overwrite",
            )
        check_members(request.unpack or request.path.parent, entry.members, advance)
        found, compared = entry, "crc32"
    elif not request.path.is_file():
        raise DownloadError("is not here", where=str(request.path), hint=FETCH_IT)
    elif request.unpack is not None:
        raise DownloadError("is not unpacked", where=str(request.path), hint=FETCH_IT)
    else:
        if entry is not None and entry.sha256 and request.checksum is None:
            request = replace(request, checksum=("sha256", entry.sha256))
        compared = request.check(fresh=True)
        # Hashed a moment ago, if it is large: then this is what was found.
        found = ManifestEntry.here(request, fresh=compared != "sha256")
        advance(found.bytes or 0)
    source = found.source if entry is None else entry.source
    return {**_record(request, "present", found), "source": source, "compared": compared}


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
