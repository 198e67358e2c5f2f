"""One file from a plain URL, however often the connection breaks.

Bytes go to `NAME.part`; a broken or killed fetch goes on from there if the server still has the
same file (Range with If-Range), and the name appears when size and digest are right. Retries are
bounded and wait longer each time.
"""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import httpx  # noqa: TID253  this module is imported once something is fetched

import chatbind_cli
from chatbind_cli.download.requests import Request
from chatbind_cli.errors import DownloadError, reason
from chatbind_cli.files import check_room, open_alone, sha256_text, size_in_words, sync
from chatbind_cli.numerals import whole_number

RETRIED_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})
AGAIN = "run the same command again: it goes on where it stopped"
# A body whose length nobody tells may be endless.
_MOST_UNTOLD_BYTES = 4 << 30
_MOST_TRIES = 50  # whatever they bring
_TRIES_IN_VAIN = 5  # in a row that bring no byte
_FIRST_WAIT_S = 0.5  # it doubles with each of these
_LONGEST_WAIT_S = 30.0  # also for what a server asks for by Retry-After
_STALL_TIMEOUT_S = 30.0  # without a byte before a connection counts as dead
_CONNECT_TIMEOUT_S = 10.0
_HINTS = {
    401: "it wants a login, which plain URLs cannot give",
    403: "the server does not let you have it",
    404: "check the URL",
    410: "it has been taken down",
}


def open_client() -> httpx.Client:
    """An HTTP client for `fetch_url`; safe to share between threads."""
    return httpx.Client(
        follow_redirects=True,
        timeout=httpx.Timeout(_STALL_TIMEOUT_S, connect=_CONNECT_TIMEOUT_S),
        # Compressed bodies have no ranges, and their length is not the file's.
        headers={
            "User-Agent": f"chatbind/{chatbind_cli.__version__}",
            "Accept-Encoding": "identity",
        },
    )


class _TryAgain(Exception):
    """An attempt failed in a way that may pass."""

    def __init__(self, reason: str, wait_s: float | None = None) -> None:
        super().__init__(reason)
        self.wait_s = wait_s


def fetch_url(
    client: httpx.Client,
    request: Request,
    *,
    expect: Callable[[int], None] = lambda n: None,
    advance: Callable[[int], None] = lambda n: None,
) -> None:
    """Fetches a URL into a file that appears only when it is whole and verified.

    `expect` is called with the size that the server tells, where it was not known, and `advance`
    with the number of bytes that have come, in earlier calls or now.

    Raises:
        DownloadError: it could not be had, or is not what it should be. What has come stays for
            the next call unless it is wrong.
    """
    part = _Part(request)
    with part.open() as file:
        advance(file.tell())
        in_vain = 0
        for tries in range(1, _MOST_TRIES + 1):
            before = file.tell()
            try:
                _attempt(client, part, file, expect, advance)
                break
            except _TryAgain as error:
                in_vain = 0 if file.tell() > before else in_vain + 1
                if in_vain >= _TRIES_IN_VAIN or tries == _MOST_TRIES:
                    what = f"could not be fetched ({error})"
                    raise DownloadError(what, where=request.source, hint=AGAIN) from error
                # The jitter keeps parallel fetches from knocking all at once.
                wait = _FIRST_WAIT_S * 2**in_vain * random.uniform(0.5, 1.0)  # noqa: S311
                time.sleep(min(wait if error.wait_s is None else error.wait_s, _LONGEST_WAIT_S))
        try:
            request.check(part.path)
        except DownloadError:
            part.discard()
            raise
        sync(part.path)
        part.path.replace(request.path)
        part.notes.unlink(missing_ok=True)


def begun_bytes(path: Path) -> int:
    """How much of a file an earlier `fetch_url` has left."""
    with suppress(OSError):
        return path.with_name(f"{path.name}.part").stat().st_size
    return 0


class _Part:
    """A file in the making, and beside it by what it is known to be a part of the server's file.

    Attributes:
        validator: a strong ETag or a date, by which the rest of the same file is asked for; None
            where there is none, and then nothing is pieced together.
        total: the size of the whole file, where the server told it.
    """

    def __init__(self, request: Request) -> None:
        self.request = request
        self.path = request.path.with_name(f"{request.path.name}.part")
        self.notes = request.path.with_name(f"{request.path.name}.part.json")
        self.validator: str | None = None
        self.total: int | None = None

    @contextmanager
    def open(self) -> Iterator[IO[bytes]]:
        """Opens the part for this process alone, at the end of what is there.

        Raises:
            ChatBindError: another process is at it, or it was not begun by `fetch_url`.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open_alone(self.path), self.path.open("ab", buffering=0) as file:
            if file.tell() and not self.notes.is_file():
                raise DownloadError(
                    "is in the way, and was not begun here",
                    where=str(self.path),
                    hint="move it away",
                )
            with suppress(OSError, ValueError, AttributeError):
                notes = json.loads(self.notes.read_text(encoding="utf-8"))
                if notes.get("url_sha256") == sha256_text(self.request.url or ""):
                    self.validator, self.total = notes.get("validator"), notes.get("total")
            if self.validator is None:
                file.truncate(0)
                file.seek(0)
            yield file

    def remember(self, validator: str | None, total: int | None) -> None:
        """Notes what the server says of the file that the part is of."""
        self.validator, self.total = validator, total
        # there may be a secret in the URL
        notes = {"url_sha256": sha256_text(self.request.url or ""), "validator": validator}
        self.notes.write_text(json.dumps({**notes, "total": total}), encoding="utf-8")

    def discard(self) -> None:
        """Throws the part away."""
        self.path.unlink(missing_ok=True)
        self.notes.unlink(missing_ok=True)

    def worthless(self, what: str, hint: str | None = None) -> DownloadError:
        """What to raise where what comes is not, and never will be, what was asked for."""
        self.discard()
        return DownloadError(what, where=self.request.source, hint=hint)


def _attempt(
    client: httpx.Client,
    part: _Part,
    file: IO[bytes],
    expect: Callable[[int], None],
    advance: Callable[[int], None],
) -> None:
    """One request; returns when the part is whole."""
    have, source, wanted = file.seek(0, os.SEEK_END), part.request.source, part.request.bytes
    if have and have == part.total:
        return
    ranged = {"Range": f"bytes={have}-", "If-Range": part.validator} if part.validator else {}
    try:
        with client.stream(
            "GET", part.request.url or "", headers=ranged if have else {}
        ) as response:
            total = _begin(response, part, file, have)
            if None not in (wanted, total) and wanted != total:
                raise part.worthless(f"has {total} bytes in place of {wanted}")
            if wanted is None and have == 0:
                expect(total or 0)
            known = total if total is not None else wanted
            check_room(part.path.parent, (known or 0) - file.tell(), where=source)
            limit = _MOST_UNTOLD_BYTES if known is None else known
            # some servers compress though they are asked not to
            for block in response.iter_bytes():
                if file.tell() + len(block) > limit:
                    what = f"has more than {size_in_words(limit)}"
                    raise part.worthless(what, "do not trust it")
                file.write(block)
                advance(len(block))
    except httpx.UnsupportedProtocol as error:  # that a redirect asks for: the one that stays
        raise DownloadError(f"cannot be fetched ({reason(error)})", where=source) from error
    except httpx.TimeoutException as error:
        raise _TryAgain("the server does not answer") from error
    except (httpx.TransportError, httpx.DecodingError) as error:
        raise _TryAgain(reason(error)) from error
    if total is not None and file.tell() < total:
        raise _TryAgain(f"the connection ended at {file.tell()} of {total} bytes")


def _begin(response: httpx.Response, part: _Part, file: IO[bytes], have: int) -> int | None:
    """Looks at the head of a response and sets the file to where its body belongs.

    Returns:
        The size of the whole file, where the server tells it.
    """
    status, head, source = response.status_code, response.headers, part.request.source
    if status in RETRIED_STATUS:
        wait = whole_number(head.get("Retry-After", ""))
        raise _TryAgain(f"the server says {status}", wait)
    if status not in (200, 206, 416):
        said = f"the server says {status} {response.reason_phrase}".strip()
        raise DownloadError(said, where=source, hint=_HINTS.get(status))
    coding = head.get("Content-Encoding", "").strip().lower() or "identity"
    if coding not in ("identity", "gzip", "x-gzip", "deflate"):
        # which may turn a few bytes into gigabytes at once
        raise DownloadError(f"comes compressed as {coding[:20]!r}, unasked", where=source)
    etag = head.get("ETag", "W/")  # a weak one promises too little
    validator = head.get("Last-Modified") if etag.startswith("W/") else etag
    if status == 206 and coding == "identity" and part.validator == (validator or part.validator):
        # A server need not heed If-Range, so what it says of its file is compared.
        unit, _, rest = head.get("Content-Range", "").partition(" ")
        span, _, whole = rest.partition("/")
        total = whole_number(whole)
        fits = unit == "bytes" and whole_number(span.partition("-")[0]) == have
        if fits and (total is None or part.total in (None, total)):
            return total if total is not None else part.total
    file.seek(0)
    file.truncate(0)
    if status == 200 and coding == "identity":
        part.remember(validator, whole_number(head.get("Content-Length", "")))
        return part.total
    part.remember(None, None)
    if status != 200:
        raise _TryAgain("the server sent no part that fits what is here")
    return None  # neither the length of a packed body nor its parts are the file's
