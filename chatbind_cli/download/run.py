"""Fetches what was asked for, several files at a time, and says of each what became of it.

A file is left alone where it is there already, verified before it gets its name, and unpacked
where its content is what is wanted.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from typing import TYPE_CHECKING

from chatbind_cli.console import Progress, note
from chatbind_cli.download.expand import FETCH_IT, expand
from chatbind_cli.download.hub import Hub
from chatbind_cli.download.part import begun_bytes
from chatbind_cli.download.presence import (
    is_for,
    is_present,
    is_unpacked,
)
from chatbind_cli.download.receipts import (
    NOTES,
    Notes,
    Receipt,
    check_members,
    member_list,
    members_are_there,
    members_name,
    members_of,
    place_of,
    wanted_receipt,
)
from chatbind_cli.download.unpack import unpack
from chatbind_cli.download.verify import check_file, check_room
from chatbind_cli.download.wanted import Request
from chatbind_cli.download.web import Patience, fetch_url, open_client
from chatbind_cli.errors import ChatBindError, DownloadError, contained
from chatbind_cli.files import lock_file, sha256_file
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


_SECONDS_TO_STOP = 2.0


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


def fetch_all(requests: Sequence[Request], settings: Settings = Settings()) -> Iterator[Record]:
    """Fetches everything and yields a record a file, in the order in which they are done.

    A failure is a record with `status` `failed` and an `error`, and does not stop the others.

    Args:
        requests: what to fetch; repositories are looked up on the hub first.
        settings: how.

    Raises:
        DownloadError: the disk has no room for what is known to come.
    """
    hub, notes = Hub(settings.endpoint), Notes()
    files: list[Request] = []
    for request in requests:
        try:
            files += expand(
                request, hub, notes, verify=settings.verify, overwrite=settings.overwrite
            )
        except ChatBindError as error:
            yield _failed(request, error)
    total = None
    if not settings.verify:
        wanted = [file for file in files if settings.overwrite or not is_present(file, notes)]
        if coming := sum(file.bytes or 0 for file in wanted):
            begun = sum(begun_bytes(file.path) for file in wanted if file.bytes)
            check_room(files[0].path.parent, coming - begun, "the download")
            total = coming >> 20 or None
    label = "verifying" if settings.verify else "downloading"
    with (
        Progress(total, label, "MiB") as progress,
        open_client(settings.patience) as client,
    ):
        yield from _in_parallel(files, _Fetcher(hub, client, notes, _Meter(progress), settings))


def _in_parallel(files: Sequence[Request], fetcher: _Fetcher) -> Iterator[Record]:
    """What became of each file, as it is known.

    The threads are daemons: one that waits for a server that stalls cannot be woken, and what it
    has so far is on the disk in any case.
    """
    waiting: SimpleQueue[Request] = SimpleQueue()
    done: SimpleQueue[Record | BaseException] = SimpleQueue()
    for file in files:
        waiting.put(file)

    def work() -> None:
        while not fetcher.meter.stop.is_set():
            try:
                request = waiting.get_nowait()
            except Empty:
                return
            done.put(_outcome(fetcher, request))

    count = min(fetcher.settings.max_workers, len(files))
    threads = [Thread(target=work, name=f"fetch-{n}", daemon=True) for n in range(count)]
    for thread in threads:
        thread.start()
    try:
        for _ in files:
            outcome = done.get()
            if isinstance(outcome, BaseException):
                raise outcome
            yield outcome
    finally:
        # Reached early by Ctrl-C or a closed pipe: the workers stop at their next block.
        fetcher.meter.stop.set()
        last = time.monotonic() + _SECONDS_TO_STOP
        for thread in threads:
            thread.join(max(0.0, last - time.monotonic()))


def _outcome(fetcher: _Fetcher, request: Request) -> Record | BaseException:
    try:
        return fetcher.fetch(request)
    except ChatBindError as error:
        return _failed(request, error)
    except OSError as error:
        reason = error.strerror or str(error)
        return _failed(request, DownloadError(reason, where=str(error.filename or request.path)))
    except _Stopped as error:
        return error
    except Exception as error:
        return _failed(request, contained(error, where=request.source))
    except BaseException as error:  # it is for the caller's thread to end by it
        return error


@dataclass(frozen=True, slots=True)
class _Fetcher:
    """Fetches or verifies one file; what the workers share."""

    hub: Hub
    client: httpx.Client
    notes: Notes
    meter: _Meter
    settings: Settings

    def fetch(self, request: Request) -> Record:
        """Makes sure that one file (or what is in it) is there, and tells about it."""
        receipt = self.notes.of(request)
        if not self.settings.overwrite:
            _refuse_other(request, receipt)
        if self.settings.verify:
            return self._verify(request, receipt)
        if receipt is not None and self._is_unpacked(request, receipt):
            return _unpacked_record(request, receipt)
        here = not self.settings.overwrite and is_present(request, self.notes)
        here = here and request.path.is_file()
        if here and not self._is_right(request):
            here = False
            if receipt is not None:
                note(f"{request.path} is here and not as it should be: fetching it again")
        folder, name = place_of(request)
        if not here:
            if receipt is None:
                self._refuse_foreign(request)
                self.notes.add(folder, [wanted_receipt(request)])
            self._bring(request)
        digest = sha256_file(request.path)
        size = request.path.stat().st_size
        here_now = Receipt(
            path=name, source=request.source, state="here", bytes=size, sha256=digest
        )
        self.notes.add(folder, [here_now])
        record = _record(request, "present" if here else "downloaded", digest, size)
        if request.unpack is not None:
            record["files"] = self._unpack(request, request.unpack)
            self.notes.add(folder, [replace(here_now, state="unpacked", files=record["files"])])
            if not self.settings.keep_archive:
                request.path.unlink()
        return record

    def _refuse_foreign(self, request: Request) -> None:
        """Refuses to replace a file that did not come by `download`, unless it is the same."""
        if not os.path.lexists(request.path):
            return
        with suppress(DownloadError, OSError):
            if self._check(request) not in ("bytes", "nothing"):
                return
        raise DownloadError(
            "is here, and did not come by `chatbind download`, so it stays as it is",
            where=str(request.path),
            hint="move it away, or name another folder with --output",
        )

    def _is_unpacked(self, request: Request, receipt: Receipt) -> bool:
        if self.settings.overwrite or request.unpack is None or not is_unpacked(receipt, request):
            return False
        if members_are_there(request):
            return True
        note(f"files of {request.path.name} are missing: unpacking it again")
        return False

    def _unpack(self, request: Request, folder: Path) -> int:
        label = f"unpacking {request.path.name}"
        reserved = {NOTES, ".cache", request.path.name, members_name(request.path.name)}
        reserved |= {f"{name}.part" for name in reserved}
        same = folder.resolve() == request.path.parent.resolve()
        with request.path.open("rb") as archive, ExitStack() as stack:
            lock_file(archive.fileno(), request.path)
            replaceable = members_of(request) if self.settings.overwrite else ()
            noted = stack.enter_context(member_list(request))
            # How much is to come is known once the archive's names have been looked at.
            progress = stack.enter_context(self.meter.progress.beside(None, label))
            meter = _Meter(progress, self.meter.stop)
            return unpack(
                request.path,
                folder,
                replaceable=replaceable,
                reserved=reserved if same else (),
                begin=lambda total: progress.expect(total >> 20),
                advance=meter.advance,
                on_member=noted,
            )

    def _verify(self, request: Request, receipt: Receipt | None) -> Record:
        """Reads what is there and compares it with all that is known of it."""
        # Where only what came out is left, that is what there is to read, --unpack or not.
        came_out = request.unpack is not None or not request.path.is_file()
        if receipt is not None and receipt.state == "unpacked" and came_out:
            if request.sha256 not in (None, receipt.sha256):
                raise DownloadError(
                    "what is unpacked here is another archive",
                    where=request.source,
                    hint="fetch it with --overwrite",
                )
            check_members(request, self.meter.advance)
            return {**_unpacked_record(request, receipt), "compared": "crc32"}
        if not request.path.is_file():
            raise DownloadError("is not here", where=str(request.path), hint=FETCH_IT)
        if request.unpack is not None:
            raise DownloadError("is not unpacked", where=str(request.path), hint=FETCH_IT)
        if receipt is not None and request.sha256 is None:
            request = replace(request, sha256=receipt.sha256, git_sha1=receipt.git_sha1)
        compared = self._check(request, fresh=True)
        size = request.path.stat().st_size
        self.meter.advance(size)
        # Hashed a moment ago, if it is large: then this is what was found.
        digest = sha256_file(request.path, fresh=compared != "sha256")
        source = request.source if receipt is None else receipt.source
        record = _record(request, "present", digest, size)
        return {**record, "source": source, "compared": compared}

    def _is_right(self, request: Request) -> bool:
        try:
            self._check(request)
        except DownloadError:
            return False
        return True

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
                expect=self.meter.expect,
                advance=self.meter.advance,
            )
            return
        folder, _ = place_of(request)
        # The hub's library takes a file that is there away before it has the new one.
        aside = folder / ".cache" / "chatbind" if request.path.exists() else folder
        came = self.hub.fetch(request.hub, aside, advance=self.meter.advance)
        try:
            self._check(replace(request, path=came))
        except DownloadError:
            came.unlink(missing_ok=True)
            raise
        if came != request.path:
            came.replace(request.path)

    def _check(self, request: Request, *, fresh: bool = False) -> str:
        return check_file(
            request.path,
            source=request.source,
            bytes=request.bytes,
            sha256=request.sha256,
            md5=request.md5,
            git_sha1=request.git_sha1,
            fresh=fresh,
        )


def _refuse_other(request: Request, receipt: Receipt | None) -> None:
    """Refuses a file of another source that is in the place of the one that is asked for."""
    if receipt is None or receipt.state == "wanted" or is_for(receipt, request):
        return
    if receipt.state == "unpacked" or request.path.is_file():
        raise DownloadError(
            f"what is here came from {receipt.source}",
            where=str(request.path),
            hint=f"fetch {request.source} into another folder, or say --overwrite",
        )


def _unpacked_record(request: Request, receipt: Receipt) -> Record:
    record = _record(request, "present", receipt.sha256 or "", receipt.bytes or 0)
    return {**record, "files": receipt.files}


def _record(request: Request, status: str, sha256: str, size: int) -> Record:
    return {
        "name": request.name,
        "path": str(request.unpack or request.path),
        "bytes": size,
        "sha256": sha256,
        "source": request.source,
        "status": status,
    }


def _failed(request: Request, error: ChatBindError) -> Record:
    return {
        "name": request.name,
        "path": str(request.unpack or request.path),
        "source": request.source,
        "status": "failed",
        "error": str(error),
    }
