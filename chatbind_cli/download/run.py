"""Fetches what was asked for, several files at a time, and says of each what became of it.

A file is left alone where it is there already, verified before it gets its name, and unpacked
where its content is what is wanted.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from chatbind_cli.console import Progress, note
from chatbind_cli.download.hub import Hub
from chatbind_cli.download.presence import is_present, read_marker, write_marker
from chatbind_cli.download.unpack import unpack
from chatbind_cli.download.verify import check_file, check_room, in_words
from chatbind_cli.download.wanted import HubRef, Request, refuse_outside
from chatbind_cli.download.web import Patience, fetch_url, open_client
from chatbind_cli.errors import ChatBindError, DownloadError
from chatbind_cli.files import sha256_file
from chatbind_cli.jsonl import Record

if TYPE_CHECKING:
    import httpx


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How to fetch.

    Attributes:
        max_workers: files at a time.
        keep_archive: whether an archive stays beside what was unpacked from it.
        verify: only look at what is there, and hash it anew.
        endpoint: the hub's address, where it is not the default.
        patience: with plain URLs.
    """

    max_workers: int = 4
    keep_archive: bool = False
    verify: bool = False
    endpoint: str | None = None
    patience: Patience = field(default_factory=Patience)


_SECONDS_BETWEEN_LINES = 10.0


class _Stopped(Exception):
    """The user wants to stop; raised in the workers."""


class _Meter:
    """Adds up the bytes of all workers, and is where they notice that they are to stop."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._lock = threading.Lock()
        self._rest = 0
        self.stop = threading.Event()

    def advance(self, n: int) -> None:
        if self.stop.is_set():
            raise _Stopped
        with self._lock:
            whole, self._rest = divmod(self._rest + n, 1 << 20)
            if whole:
                self._progress.advance(whole)


class _Unpacked:
    """Says every now and then how far an archive is unpacked."""

    def __init__(self, name: str, stop: threading.Event) -> None:
        self._name = name
        self._stop = stop
        self._bytes = 0
        self._next_s = time.monotonic() + _SECONDS_BETWEEN_LINES

    def advance(self, n: int) -> None:
        if self._stop.is_set():
            raise _Stopped
        self._bytes += n
        if time.monotonic() >= self._next_s:
            self._next_s = time.monotonic() + _SECONDS_BETWEEN_LINES
            note(f"unpacking {self._name}: {in_words(self._bytes)} so far")


def fetch_all(requests: Sequence[Request], settings: Settings = Settings()) -> Iterator[Record]:
    """Fetches everything and yields a record a file, in the order in which they are done.

    A failure is a record with `status` `failed` and an `error`, and does not stop the others.

    Args:
        requests: what to fetch; repositories are looked up on the hub first.
        settings: how.

    Raises:
        DownloadError: the disk has no room for what is known to come.
    """
    hub = Hub(settings.endpoint)
    files: list[Request] = []
    for request in requests:
        try:
            files += _expand(request, hub, settings)
        except ChatBindError as error:
            yield _failed(request, error)
    missing = [file.bytes or 0 for file in files if not settings.verify and not is_present(file)]
    if files and sum(missing):
        check_room(files[0].path.parent, sum(missing), "the download")
    total = sum(missing) >> 20 or None
    with (
        Progress(total, "downloading", "MiB") as progress,
        open_client(settings.patience) as client,
    ):
        yield from _in_parallel(files, _Fetcher(hub, client, _Meter(progress), settings))


def _expand(request: Request, hub: Hub, settings: Settings) -> list[Request]:
    """A repository's files; anything else is one file, with what the hub knows of it."""
    ref = request.hub
    if ref is None:
        return [request]
    if not request.is_repository:
        return [_with_facts(request, ref, hub, settings)]
    if settings.verify:
        return [replace(request, path=path, hub=None) for path in _files_below(request.path)]
    files, commit = hub.files(ref, request.include)
    if not files:
        raise DownloadError("has no file that is wanted", where=request.source)
    expanded = []
    for file in files:
        refuse_outside(file.path, request.source)
        # All files come from the commit that was listed, even if the branch moves meanwhile.
        pinned = HubRef(repo=ref.repo, kind=ref.kind, revision=commit, file=file.path)
        expanded.append(
            replace(
                request,
                path=request.path / file.path,
                hub=pinned,
                bytes=file.bytes,
                sha256=file.sha256,
            )
        )
    return expanded


def _with_facts(request: Request, ref: HubRef, hub: Hub, settings: Settings) -> Request:
    """A request for a file of the hub with size and hash, so that what comes can be verified."""
    if request.sha256 is not None or settings.verify or is_present(request):
        return request
    facts = hub.file(ref)
    if facts is None:
        return request
    size = request.bytes if request.bytes is not None else facts.bytes
    return replace(request, bytes=size, sha256=facts.sha256)


def _files_below(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise DownloadError("is not here", where=str(folder), hint="run it without --verify")
    inside = (path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file())
    return [folder / path for path in inside if path.parts[0] != ".cache"]


def _in_parallel(files: Sequence[Request], fetcher: _Fetcher) -> Iterator[Record]:
    pool = ThreadPoolExecutor(fetcher.settings.max_workers, thread_name_prefix="fetch")
    jobs: dict[Future[Record], Request] = {pool.submit(fetcher.fetch, file): file for file in files}
    left = set(jobs)
    try:
        while left:
            done, left = wait(left, timeout=0.2, return_when=FIRST_COMPLETED)
            for job in sorted(done, key=lambda job: str(jobs[job].path)):
                yield _outcome(job, jobs[job])
    finally:
        # Reached early by Ctrl-C or a closed pipe: the workers stop at their next block.
        fetcher.meter.stop.set()
        pool.shutdown(wait=True, cancel_futures=True)


def _outcome(job: Future[Record], request: Request) -> Record:
    try:
        return job.result()
    except ChatBindError as error:
        return _failed(request, error)


def _failed(request: Request, error: ChatBindError) -> Record:
    return {
        "name": request.name,
        "path": str(request.unpack or request.path),
        "source": request.source,
        "status": "failed",
        "error": str(error),
    }


@dataclass(frozen=True, slots=True)
class _Fetcher:
    """Fetches one file; what the workers share."""

    hub: Hub
    client: httpx.Client
    meter: _Meter
    settings: Settings

    def fetch(self, request: Request) -> Record:
        """Makes sure that one file (or what is in it) is there, and tells about it."""
        marker = read_marker(request)
        if marker is not None:
            return {**_record(request, "present", marker["sha256"], marker["bytes"]), **marker}
        here = is_present(request)
        if self.settings.verify:
            if not here:
                raise DownloadError(
                    "is not here", where=str(request.path), hint="run it without --verify"
                )
            self._check(request)
        elif not here:
            self._bring(request)
        digest = sha256_file(request.path)
        size = request.path.stat().st_size
        record = _record(request, "present" if here else "downloaded", digest, size)
        if request.unpack is not None and not self.settings.verify:
            note(f"unpacking {request.path.name}")
            told = _Unpacked(request.path.name, self.meter.stop)
            record["files"] = unpack(request.path, request.unpack, advance=told.advance)
            facts = {"bytes": size, "sha256": digest, "files": record["files"]}
            write_marker(request, facts)
            if not self.settings.keep_archive:
                request.path.unlink()
        return record

    def _bring(self, request: Request) -> None:
        if request.hub is None:
            fetch_url(
                self.client,
                request.url or "",
                request.path,
                bytes=request.bytes,
                sha256=request.sha256,
                md5=request.md5,
                patience=self.settings.patience,
                advance=self.meter.advance,
            )
            return
        depth = len(PurePosixPath(request.hub.file or "").parts)
        folder = request.path.parents[depth - 1]
        self.hub.fetch(request.hub, folder, advance=self.meter.advance)
        try:
            self._check(request)
        except DownloadError:
            request.path.unlink(missing_ok=True)
            raise

    def _check(self, request: Request) -> None:
        check_file(
            request.path,
            source=request.source,
            bytes=request.bytes,
            sha256=request.sha256,
            md5=request.md5,
        )


def _record(request: Request, status: str, sha256: str, size: int) -> Record:
    return {
        "name": request.name,
        "path": str(request.unpack or request.path),
        "bytes": size,
        "sha256": sha256,
        "source": request.source,
        "status": status,
    }
