"""One file from a plain URL, however often the connection breaks.

Bytes go to `NAME.part`; a broken or killed fetch goes on from there if the server still has the
same file (Range with If-Range), and the name appears when size and digest are right. Retries are
bounded and wait longer each time. Knows nothing of catalogues or hubs.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import IO, Any

import httpx  # noqa: TID253  this module is imported once something is fetched

import chatbind_cli
from chatbind_cli.download.part import Part
from chatbind_cli.download.verify import check_file, check_room, in_words
from chatbind_cli.errors import DownloadError
from chatbind_cli.numerals import whole_number
from chatbind_cli.urls import public_url

_RETRIED_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})
# A body whose length nobody tells may be endless.
_MOST_UNTOLD_BYTES = 4 << 30
_HINTS = {
    401: "it wants a login, which plain URLs cannot give",
    403: "the server does not let you have it",
    404: "check the URL",
    410: "it has been taken down",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long to go on.

    Attributes:
        tries: attempts in a row that bring no byte before giving up.
        all_tries: attempts in total, whatever they bring.
        first_wait_s: the wait after the first failure; it doubles with each.
        longest_wait_s: its limit, also for what a server asks for by Retry-After.
        connect_timeout_s: for a connection to come about.
        stall_timeout_s: without a byte before a connection counts as dead.
    """

    tries: int = 5
    all_tries: int = 50
    first_wait_s: float = 0.5
    longest_wait_s: float = 30.0
    connect_timeout_s: float = 10.0
    stall_timeout_s: float = 30.0


def open_client(patience: Patience = Patience()) -> httpx.Client:
    """An HTTP client for `fetch_url`; safe to share between threads."""
    return httpx.Client(
        follow_redirects=True,
        timeout=httpx.Timeout(patience.stall_timeout_s, connect=patience.connect_timeout_s),
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


class _Worthless(DownloadError):
    """What comes is not what was asked for, and never will be."""


def fetch_url(
    client: httpx.Client,
    url: str,
    path: Path,
    *,
    bytes: int | None = None,
    sha256: str | None = None,
    md5: str | None = None,
    patience: Patience = Patience(),
    expect: Callable[[int], None] = lambda n: None,
    advance: Callable[[int], None] = lambda n: None,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Fetches a URL into a file that appears only when it is whole and verified.

    Args:
        client: see `open_client`.
        url: http or https.
        path: the file; its folder is made.
        bytes: the size that it must have, where it is known.
        sha256: the digest that it must have, where it is known.
        md5: the same, where only that is known.
        patience: how long to go on.
        expect: called with the size that the server tells, where it was not known.
        advance: called with the number of bytes that have come, in earlier calls or now.
        sleep: how to wait.

    Raises:
        DownloadError: it could not be had, or is not what it should be. What has come stays for
            the next call unless it is wrong.
    """
    part = Part(path, url, expect if bytes is None else lambda n: None)
    with part.open() as file:
        advance(file.tell())
        try:
            _fetch_patiently(client, part, file, bytes, patience, advance, sleep)
        except _Worthless:
            part.discard()
            raise
        try:
            check_file(part.path, source=public_url(url), bytes=bytes, sha256=sha256, md5=md5)
        except DownloadError:
            part.discard()
            raise
        part.become(path)


def _fetch_patiently(
    client: httpx.Client,
    part: Part,
    file: IO[bytes],
    expected: int | None,
    patience: Patience,
    advance: Callable[[int], None],
    sleep: Callable[[float], None],
) -> None:
    in_vain = 0
    for _ in range(patience.all_tries):
        before = file.tell()
        try:
            _attempt(client, part, file, expected, advance)
            return
        except _TryAgain as error:
            failure = error
        in_vain = 0 if file.tell() > before else in_vain + 1
        if in_vain >= patience.tries:
            break
        wait = failure.wait_s
        if wait is None:
            # The jitter keeps parallel fetches from knocking all at once.
            wait = patience.first_wait_s * 2**in_vain * random.uniform(0.5, 1.0)  # noqa: S311
        sleep(min(wait, patience.longest_wait_s))
    raise DownloadError(
        f"could not be fetched ({failure})",
        where=public_url(part.url),
        hint="run the same command again: it goes on where it stopped",
    )


def _attempt(
    client: httpx.Client,
    part: Part,
    file: IO[bytes],
    expected: int | None,
    advance: Callable[[int], None],
) -> None:
    """One request; returns when the part is whole."""
    have = file.seek(0, os.SEEK_END)
    if have and have == part.total:
        return
    headers = {}
    if have and part.validator:
        headers = {"Range": f"bytes={have}-", "If-Range": part.validator}
    try:
        with client.stream("GET", part.url, headers=headers) as response:
            total = _begin(response, part, file, have)
            size = total if total is not None else expected
            if expected not in (None, size):
                raise _Worthless(
                    f"has {size} bytes in place of {expected}", where=public_url(part.url)
                )
            if size is not None:
                check_room(part.path.parent, size - file.tell(), public_url(part.url))
            # Some servers compress though they are asked not to.
            blocks = response.iter_bytes() if _is_encoded(response) else response.iter_raw()
            for block in blocks:
                _refuse_endless(file.tell() + len(block), size, part)
                _write(file, block, part)
                advance(len(block))
    except (
        httpx.UnsupportedProtocol,
        httpx.InvalidURL,
        httpx.TooManyRedirects,
        UnicodeError,  # a host in letters that no name has
        OverflowError,  # a port that no machine has
    ) as error:
        raise DownloadError(f"cannot be fetched ({error})", where=public_url(part.url)) from error
    except (httpx.TransportError, httpx.DecodingError) as error:
        raise _TryAgain(_reason(error)) from error
    if total is not None and file.tell() < total:
        raise _TryAgain(f"the connection ended at {file.tell()} of {total} bytes")


def _begin(response: httpx.Response, part: Part, file: IO[bytes], have: int) -> int | None:
    """Looks at the head of a response and sets the file to where its body belongs.

    Returns:
        The size of the whole file, where the server tells it.
    """
    status = response.status_code
    if status in _RETRIED_STATUS:
        raise _TryAgain(f"the server says {status}", _retry_after(response))
    if status == 416:
        # What is here does not fit what is there: begin again.
        file.truncate(0)
        part.forget()
        raise _TryAgain("the server has no such part of it")
    if status not in (200, 206):
        raise DownloadError(
            f"the server says {status} {response.reason_phrase}".strip(),
            where=public_url(part.url),
            hint=_HINTS.get(status),
        )
    if status == 206:
        start, total = _content_range(response)
        if start == have and part.goes_on(response, total) and not _is_encoded(response):
            return total if total is not None else part.total
        file.truncate(0)
        part.forget()
        raise _TryAgain("the server sent a part that does not fit what is here")
    file.seek(0)
    file.truncate(0)
    total = whole_number(response.headers.get("Content-Length", ""))
    if _is_encoded(response):
        part.forget()  # neither its length nor its parts are the file's
        return None
    part.remember(response, total)
    return total


def _is_encoded(response: httpx.Response) -> bool:
    """Whether a body is compressed.

    Raises:
        DownloadError: in a way that may turn a few bytes into gigabytes at once.
    """
    coding = response.headers.get("Content-Encoding", "").strip().lower()
    if coding not in ("", "identity", "gzip", "x-gzip", "deflate"):
        raise DownloadError(
            f"comes compressed as {coding[:20]!r}, unasked", where=public_url(str(response.url))
        )
    return coding not in ("", "identity")


def _refuse_endless(size: int, known: int | None, part: Part) -> None:
    limit = _MOST_UNTOLD_BYTES if known is None else known
    if size > limit:
        told = "" if known is not None else ", and the server does not tell its size"
        raise _Worthless(
            f"has more than {in_words(limit)}{told}",
            where=public_url(part.url),
            hint="do not trust it",
        )


def _content_range(response: httpx.Response) -> tuple[int | None, int | None]:
    """First byte and whole size from `Content-Range: bytes 100-199/200`."""
    unit, _, rest = response.headers.get("Content-Range", "").partition(" ")
    span, _, total = rest.partition("/")
    if unit != "bytes":
        return None, None
    return whole_number(span.partition("-")[0]), whole_number(total)


def _retry_after(response: httpx.Response) -> float | None:
    """What the server asks for, in seconds or as a date; no wait for a date that has passed."""
    value = response.headers.get("Retry-After", "")
    seconds = whole_number(value)
    if seconds is not None:
        return float(seconds)
    try:
        # a date has thirty characters or so
        return max(parsedate_to_datetime(value[:64]).timestamp() - time.time(), 0.0)
    except (ValueError, TypeError, OverflowError):
        return None


def _write(file: IO[bytes], block: Any, part: Part) -> None:
    try:
        file.write(block)
    except OSError as error:
        raise DownloadError(
            f"cannot be written ({error.strerror})",
            where=str(part.path),
            hint="make room and run the same command again: it goes on where it stopped",
        ) from error


def _reason(error: httpx.RequestError) -> str:
    if isinstance(error, httpx.TimeoutException):
        return "the server does not answer"
    if isinstance(error, httpx.ConnectError):
        return f"no connection: {error}"
    return str(error) or type(error).__name__
