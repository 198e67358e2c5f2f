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
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import httpx  # noqa: TID253  this module is imported once something is fetched

import chatbind_cli
from chatbind_cli.download.manifest import check_room, in_words
from chatbind_cli.download.requests import Request
from chatbind_cli.errors import DownloadError, reason
from chatbind_cli.files import open_alone, sha256_text, sync
from chatbind_cli.numerals import whole_number

RETRIED_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})
# A body whose length nobody tells may be endless.
_MOST_UNTOLD_BYTES = 4 << 30
_MOST_TRIES = 50  # whatever they bring
_CONNECT_TIMEOUT_S = 10.0
AGAIN = "run the same command again: it goes on where it stopped"
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
        first_wait_s: the wait after the first failure; it doubles with each.
        longest_wait_s: its limit, also for what a server asks for by Retry-After.
        stall_timeout_s: without a byte before a connection counts as dead.
    """

    tries: int = 5
    first_wait_s: float = 0.5
    longest_wait_s: float = 30.0
    stall_timeout_s: float = 30.0


def open_client(patience: Patience = Patience()) -> httpx.Client:
    """An HTTP client for `fetch_url`; safe to share between threads."""
    return httpx.Client(
        follow_redirects=True,
        timeout=httpx.Timeout(patience.stall_timeout_s, connect=_CONNECT_TIMEOUT_S),
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
    patience: Patience = Patience(),
    expect: Callable[[int], None] = lambda n: None,
    advance: Callable[[int], None] = lambda n: None,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Fetches a URL into a file that appears only when it is whole and verified.

    Args:
        client: see `open_client`.
        request: says where from and where to; the folder is made.
        patience: how long to go on.
        expect: called with the size that the server tells, where it was not known.
        advance: called with the number of bytes that have come, in earlier calls or now.
        sleep: how to wait.

    Raises:
        DownloadError: it could not be had, or is not what it should be. What has come stays for
            the next call unless it is wrong.
    """
    part = _Part(request, expect if request.bytes is None else lambda n: None)
    with part.open() as file:
        advance(file.tell())
        _fetch_patiently(client, part, file, patience, advance, sleep)
        try:
            request.check(part.path)
        except DownloadError:
            part.discard()
            raise
        sync(part.path)
        part.path.replace(request.path)
        part.facts_path.unlink(missing_ok=True)


def begun_bytes(path: Path) -> int:
    """How much of a file an earlier `fetch_url` has left."""
    with suppress(OSError):
        return path.with_name(f"{path.name}.part").stat().st_size
    return 0


class _Part:
    """A file in the making, and beside it what is known of the file that it is a part of.

    By that a part of another version is told from the rest of this one.
    """

    def __init__(self, request: Request, expect: Callable[[int], None]) -> None:
        self.request = request
        self.path = request.path.with_name(f"{request.path.name}.part")
        self.facts_path = request.path.with_name(f"{request.path.name}.part.json")
        self.version: dict[str, str] = {}
        self.total: int | None = None
        self._expect = expect

    @property
    def validator(self) -> str | None:
        """By what the same file can be asked for again; a weak ETag promises too little."""
        etag = self.version.get("ETag", "W/")
        return self.version.get("Last-Modified") if etag.startswith("W/") else etag

    @contextmanager
    def open(self) -> Iterator[IO[bytes]]:
        """Opens the part for this process alone, at the end of what is there.

        Raises:
            ChatBindError: another process is at it, or it was not begun by `fetch_url`.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open_alone(self.path), self.path.open("ab", buffering=0) as file:
            if file.tell() and not self.facts_path.is_file():
                raise DownloadError(
                    "is in the way, and was not begun here",
                    where=str(self.path),
                    hint="move it away",
                )
            with suppress(OSError, ValueError, AttributeError):
                facts = json.loads(self.facts_path.read_text(encoding="utf-8"))
                if facts.get("url_sha256") == sha256_text(self.request.url or ""):
                    self.version = dict(facts.get("version") or {})
                    self.total = facts.get("total")
            if self.validator is None:
                file.truncate(0)
                file.seek(0)
            if self.total is not None:
                self._expect(self.total)
            yield file

    def remember(self, version: dict[str, str], total: int | None) -> None:
        """Notes what the server says of the file; nothing of it is to be gone on with by `{}`."""
        if total is not None and self.total is None:
            self._expect(total)
        self.version, self.total = version, total
        # there may be a secret in the URL
        facts = {"url_sha256": sha256_text(self.request.url or ""), "version": version}
        self.facts_path.write_text(json.dumps({**facts, "total": total}), encoding="utf-8")

    def goes_on(self, version: dict[str, str], total: int | None) -> bool:
        """Whether a part of a file is one of the file that the first part came from.

        A server need not heed If-Range, so what it says of its file is compared, too.
        """
        same = all(version.get(name, value) == value for name, value in self.version.items())
        return same and (total is None or self.total in (None, total))

    def worthless(self, what: str, hint: str | None = None) -> DownloadError:
        """What to raise where what comes is not, and never will be, what was asked for."""
        self.discard()
        return DownloadError(what, where=self.request.source, hint=hint)

    def discard(self) -> None:
        """Throws the part away."""
        self.path.unlink(missing_ok=True)
        self.facts_path.unlink(missing_ok=True)


def _fetch_patiently(
    client: httpx.Client,
    part: _Part,
    file: IO[bytes],
    patience: Patience,
    advance: Callable[[int], None],
    sleep: Callable[[float], None],
) -> None:
    in_vain = 0
    for _ in range(_MOST_TRIES):
        before = file.tell()
        try:
            _attempt(client, part, file, advance)
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
    raise DownloadError(f"could not be fetched ({failure})", where=part.request.source, hint=AGAIN)


def _attempt(
    client: httpx.Client, part: _Part, file: IO[bytes], advance: Callable[[int], None]
) -> None:
    """One request; returns when the part is whole."""
    have = file.seek(0, os.SEEK_END)
    if have and have == part.total:
        return
    headers = {}
    if have and part.validator:
        headers = {"Range": f"bytes={have}-", "If-Range": part.validator}
    source = part.request.source
    try:
        with client.stream("GET", part.request.url or "", headers=headers) as response:
            total = _begin(response, part, file, have)
            limit = _limit(part, total)
            known = total if total is not None else part.request.bytes or 0
            check_room(part.path.parent, known - file.tell(), source)
            # some servers compress though they are asked not to
            for block in response.iter_bytes():
                if file.tell() + len(block) > limit:
                    what = f"has more than {in_words(limit)}"
                    raise part.worthless(what, "do not trust it")
                file.write(block)
                advance(len(block))
    except (
        httpx.UnsupportedProtocol,
        httpx.InvalidURL,
        httpx.TooManyRedirects,
        UnicodeError,  # a host in letters that no name has
        OverflowError,  # a port that no machine has
    ) as error:
        raise DownloadError(f"cannot be fetched ({reason(error)})", where=source) from error
    except httpx.TimeoutException as error:
        raise _TryAgain("the server does not answer") from error
    except (httpx.TransportError, httpx.DecodingError) as error:
        raise _TryAgain(reason(error)) from error
    if total is not None and file.tell() < total:
        raise _TryAgain(f"the connection ended at {file.tell()} of {total} bytes")


def _limit(part: _Part, total: int | None) -> int:
    """How many bytes a file may have.

    Raises:
        DownloadError: it is to have as many as the server does not have.
    """
    wanted = part.request.bytes
    if None not in (wanted, total) and wanted != total:
        raise part.worthless(f"has {total} bytes in place of {wanted}")
    known = total if total is not None else wanted
    return _MOST_UNTOLD_BYTES if known is None else known


def _begin(response: httpx.Response, part: _Part, file: IO[bytes], have: int) -> int | None:
    """Looks at the head of a response and sets the file to where its body belongs.

    Returns:
        The size of the whole file, where the server tells it.
    """
    status, head = response.status_code, response.headers
    if status in RETRIED_STATUS:
        wait = whole_number(head.get("Retry-After", ""))
        raise _TryAgain(f"the server says {status}", wait)
    if status not in (200, 206, 416):
        raise DownloadError(
            f"the server says {status} {response.reason_phrase}".strip(),
            where=part.request.source,
            hint=_HINTS.get(status),
        )
    coding = head.get("Content-Encoding", "").strip().lower() or "identity"
    if coding not in ("identity", "gzip", "x-gzip", "deflate"):
        # which may turn a few bytes into gigabytes at once
        raise DownloadError(
            f"comes compressed as {coding[:20]!r}, unasked", where=part.request.source
        )
    version = {name: head[name] for name in ("ETag", "Last-Modified") if head.get(name)}
    if status == 200:
        file.seek(0)
        file.truncate(0)
        if coding != "identity":
            part.remember({}, None)  # neither its length nor its parts are the file's
            return None
        total = whole_number(head.get("Content-Length", ""))
        part.remember(version, total)
        return total
    if status == 206 and coding == "identity":
        start, total = _content_range(head.get("Content-Range", ""))
        if start == have and part.goes_on(version, total):
            return total if total is not None else part.total
    # What is here does not fit what is there: begin again.
    file.truncate(0)
    part.remember({}, None)
    raise _TryAgain("the server sent no part that fits what is here")


def _content_range(text: str) -> tuple[int | None, int | None]:
    """First byte and whole size from `bytes 100-199/200`."""
    unit, _, rest = text.partition(" ")
    span, _, total = rest.partition("/")
    if unit != "bytes":
        return None, None
    return whole_number(span.partition("-")[0]), whole_number(total)
