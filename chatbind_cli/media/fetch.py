"""Bytes that do not lie on disk: addresses, data URIs, standard input and pipes.

They are read at once and held in memory, within limits of size and time. `where` is what an error
calls the medium. Addresses come from strangers' records as well as from the user: no scheme but
http and https is ever followed, every redirect is checked again, and nothing runs past its
deadline. Where a server fetches for strangers (`Limits.allowed`), the connection goes to the very
address that was checked, so that DNS cannot say something else a moment later. Large artefacts that
should be resumed and verified are the business of `chatbind_cli.download`.
"""

from __future__ import annotations

import asyncio
import base64
import http.client
import ipaddress
import os
import select
import urllib.parse
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

from chatbind_cli import __version__
from chatbind_cli.errors import MediaError
from chatbind_cli.media.guard import reading
from chatbind_cli.media.public import Address, resolve
from chatbind_cli.numerals import whole_number
from chatbind_cli.urls import public_url

if TYPE_CHECKING:
    import httpx

MOST_BYTES = 512 * 2**20
"""Most that is taken from an address, a data URI, a stream or a pipe."""

CONNECT_SECONDS = 10.0
SILENCE_SECONDS = 20.0
"""Longest silence of a server or a pipe, and longest wait for a pipe to be written to."""

TOTAL_SECONDS = 300.0
"""Longest time for one address, all redirects included, and for a writer's first byte."""

MOST_REDIRECTS = 5

_PART = 1 << 20
_HIGHEST_PORT = 65_535
_LOCAL_SUFFIXES = (".localhost", ".local", ".internal")


@dataclass(frozen=True)
class Limits:
    """What is taken from addresses and data URIs.

    Args:
        most_bytes: of one.
        seconds: for one address, all redirects included.
        allowed: says of each address of a host, after DNS, whether it may be connected to; one that
            may not refuses the host. None: all may, by way of the environment's proxies, too.
        resolve: finds the addresses of a host.
    """

    most_bytes: int = MOST_BYTES
    seconds: float = TOTAL_SECONDS
    allowed: Callable[[Address], bool] | None = None
    resolve: Callable[[str], Awaitable[list[str]]] = resolve


def read_stream(stream: IO[bytes], where: str) -> bytes:
    """All of a stream.

    Raises:
        MediaError: it is too large or cannot be read.
    """
    body = bytearray()
    with reading(where, "cannot be read"):
        while part := stream.read(_PART):
            _add_part(body, part, where, MOST_BYTES)
    return bytes(body)


def read_pipe(path: Path, where: str) -> bytes:
    """All that is written to a pipe; opened so that a pipe without a writer blocks nobody.

    Raises:
        MediaError: nobody writes to it, or falls silent, or it is too large.
    """
    pipe = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        ready = select.poll()
        ready.register(pipe, select.POLLIN)
        body = bytearray()
        alone = False
        while True:
            patience = SILENCE_SECONDS
            try:
                part = os.read(pipe, _PART)
            except BlockingIOError:  # somebody holds it open for writing, and is silent
                alone = False
                patience = SILENCE_SECONDS if body else TOTAL_SECONDS
            else:
                if part:
                    _add_part(body, part, where, MOST_BYTES)
                    continue
                if body:
                    return bytes(body)
                if alone:
                    raise _silent(where, patience)
                alone = True  # a writer that comes and is silent does not end the wait: look again
            events = ready.poll(patience * 1000)
            if not events and not alone:
                raise _silent(where, patience)
            if events and not any(event & select.POLLIN for _, event in events):
                return bytes(body)  # its writer has come and gone
    finally:
        os.close(pipe)


def _silent(where: str, seconds: float) -> MediaError:
    return MediaError(f"nothing was written to it in {seconds:g} s", where=where)


def decode_data_uri(uri: str, where: str, most_bytes: int) -> bytes:
    """The content of `data:[<type>][;base64],<content>` (RFC 2397).

    Raises:
        MediaError: it is broken or too large.
    """
    header, comma, content = uri.partition(",")
    if not comma:
        raise MediaError("is a data URI without a comma", where=where)
    if len(content) > most_bytes * 4 // 3 + 4:
        raise _too_large(where, most_bytes)
    data = urllib.parse.unquote_to_bytes(content)
    if not header.lower().endswith(";base64"):
        return data
    with reading(where, "is a data URI with broken base64"):
        # white space may come from wrapped lines; padding is often left out
        packed = b"".join(data.split()).translate(bytes.maketrans(b"-_", b"+/"))
        return base64.b64decode(packed + b"=" * (-len(packed) % 4), validate=True)


def _add_part(body: bytearray, part: bytes, where: str, most_bytes: int) -> None:
    body += part
    if len(body) > most_bytes:
        raise _too_large(where, most_bytes)


def _too_large(where: str, most_bytes: int) -> MediaError:
    return MediaError(
        f"is larger than {most_bytes / 2**20:.4g} MiB",
        where=where,
        hint="save it to a file first: files on disk may be larger",
    )


def fetch_url(url: str, where: str, limits: Limits) -> bytes:
    """The content behind an http(s) address.

    Raises:
        MediaError: not found, too large, too slow, not to be connected to, or a redirect to
            somewhere that is not followed.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(_fetch_in_time(url, where, limits))
    # called from inside somebody's event loop (a notebook): that one cannot be entered twice
    with ThreadPoolExecutor(max_workers=1) as pool:
        return pool.submit(asyncio.run, _fetch_in_time(url, where, limits)).result()


async def _fetch_in_time(url: str, where: str, limits: Limits) -> bytes:
    # one deadline over everything: a server that drips a byte a second passes every other timeout
    try:
        return await asyncio.wait_for(_fetch(url, where, limits), limits.seconds)
    except TimeoutError as error:
        raise MediaError(f"was not complete after {limits.seconds:g} s", where=where) from error


async def _fetch(url: str, where: str, limits: Limits) -> bytes:
    import httpx  # noqa: PLC0415

    timeout = httpx.Timeout(SILENCE_SECONDS, connect=CONNECT_SECONDS)
    # identity: a compressed body could be a bomb, and media do not compress anyway
    headers = {"User-Agent": f"chatbind/{__version__}", "Accept-Encoding": "identity"}
    here = url
    # a ValueError may be half an IPv6 address, or a host that no name can have
    with reading(where, "cannot be fetched"):
        async with httpx.AsyncClient(
            timeout=timeout,
            headers=headers,
            # the environment's certificates count in any case, its proxies where all is allowed
            verify=httpx.create_ssl_context(),
            trust_env=limits.allowed is None,
        ) as client:
            for _ in range(MOST_REDIRECTS + 1):
                port = httpx.URL(here).port
                if port is not None and port > _HIGHEST_PORT:
                    raise httpx.InvalidURL(f"Invalid port: {port}")
                try:
                    async with _asked(client, here, where, limits) as response:
                        if not response.has_redirect_location:
                            return await _body(response, where, limits.most_bytes)
                        location = response.headers["location"]
                        here = next_address(here, location, where, guarded=bool(limits.allowed))
                except httpx.TimeoutException as error:
                    raise MediaError("the server does not answer in time", where=where) from error
    raise MediaError(f"redirects more than {MOST_REDIRECTS} times", where=where)


@asynccontextmanager
async def _asked(
    client: httpx.AsyncClient, url: str, where: str, limits: Limits
) -> AsyncIterator[httpx.Response]:
    """The reply to a request, which goes to none but an allowed address."""
    import httpx  # noqa: PLC0415

    if limits.allowed is None:
        async with client.stream("GET", url) as response:
            yield response
        return
    named = httpx.URL(url)
    host = named.raw_host.decode()
    addresses = await limits.resolve(host) if host else []
    if not addresses or not all(map(limits.allowed, map(ipaddress.ip_address, addresses))):
        # which it is would tell a stranger what names mean inside
        raise MediaError("is at no public address", where=where)
    while True:
        request = client.build_request(
            "GET",
            named.copy_with(host=addresses.pop(0)),
            headers={"Host": named.netloc.decode()},
            extensions={"sni_hostname": host},
        )
        try:
            response = await client.send(request, stream=True)
            break
        except (httpx.ConnectError, httpx.ConnectTimeout):
            if not addresses:
                raise
    try:
        yield response
    finally:
        await response.aclose()


async def _body(response: httpx.Response, where: str, most_bytes: int) -> bytes:
    if not response.is_success:
        code = response.status_code
        said = f"the server answers {code} {http.client.responses.get(code, '')}"
        raise MediaError(said.strip(), where=where)
    coding = response.headers.get("content-encoding", "identity").lower()
    if coding not in ("", "identity"):
        raise MediaError(f"comes compressed as {coding[:20]!r}, unasked", where=where)
    length = whole_number(response.headers.get("content-length", ""))
    if length is not None and length > most_bytes:
        raise _too_large(where, most_bytes)
    body = bytearray()
    async for part in response.aiter_raw():
        _add_part(body, part, where, most_bytes)
    return bytes(body)


def next_address(here: str, location: str, where: str, *, guarded: bool = False) -> str:
    """Where a redirect leads, if it may be followed; `guarded`: that is looked at again.

    Raises:
        MediaError: it leads to another scheme, or from the open network into a private one.
    """
    target = urllib.parse.urljoin(here, location)
    parts = urllib.parse.urlsplit(target)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise MediaError(
            f"redirects to {public_url(target)[:100]}",
            where=where,
            hint="only http(s) is followed",
        )
    origin = urllib.parse.urlsplit(here).hostname or ""
    if not guarded and _is_private(parts.hostname) and not _is_private(origin):
        raise MediaError(
            f"redirects to the private address {parts.hostname}",
            where=where,
            hint="if that is what you want, give that address itself",
        )
    return target


def _is_private(host: str) -> bool:
    """Whether a host names this machine or a private network. Looks at the name, asks no DNS."""
    if host == "localhost" or host.endswith(_LOCAL_SUFFIXES):
        return True
    try:
        return not ipaddress.ip_address(host.strip("[]")).is_global
    except ValueError:
        return False
