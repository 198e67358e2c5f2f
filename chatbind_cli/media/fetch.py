"""Fetching one media file over http or https, within limits of size and time.

Written for addresses that come from strangers' records as well as from the user: no other scheme is
ever followed, every redirect is checked again, and nothing runs past its deadline. Large artefacts
that should be resumed and verified are the business of `chatbind_cli.download`.
"""

from __future__ import annotations

import asyncio
import ipaddress
import urllib.parse
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from typing import TYPE_CHECKING

from chatbind_cli import __version__
from chatbind_cli.errors import MediaError
from chatbind_cli.media.source import SourceLimits, shown, too_large
from chatbind_cli.numerals import whole_number

if TYPE_CHECKING:
    import httpx

_HIGHEST_PORT = 65_535
_LOCAL_SUFFIXES = (".localhost", ".local", ".internal")


def fetch_url(url: str, limits: SourceLimits) -> bytes:
    """The content behind an http(s) address.

    Raises:
        MediaError: not found, too large, too slow, or a redirect to somewhere that is not followed.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(_fetch_in_time(url, limits))
    # called from inside somebody's event loop (a notebook): that one cannot be entered twice
    with ThreadPoolExecutor(max_workers=1) as pool:
        return pool.submit(asyncio.run, _fetch_in_time(url, limits)).result()


async def _fetch_in_time(url: str, limits: SourceLimits) -> bytes:
    # one deadline over everything: a server that drips a byte a second passes every other timeout
    try:
        return await asyncio.wait_for(_fetch(url, limits), limits.total_timeout_s)
    except TimeoutError as error:
        raise MediaError(
            f"was not complete after {limits.total_timeout_s:g} s", where=shown(url)
        ) from error


async def _fetch(url: str, limits: SourceLimits) -> bytes:
    import httpx  # noqa: PLC0415

    timeout = httpx.Timeout(limits.read_timeout_s, connect=limits.connect_timeout_s)
    # identity: a compressed body could be a bomb, and media do not compress anyway
    headers = {"User-Agent": f"chatbind/{__version__}", "Accept-Encoding": "identity"}
    here = url
    try:
        async with httpx.AsyncClient(timeout=timeout, headers=headers) as client:
            for _ in range(limits.max_redirects + 1):
                port = httpx.URL(here).port
                if port is not None and port > _HIGHEST_PORT:
                    raise httpx.InvalidURL(f"Invalid port: {port}")
                async with client.stream("GET", here) as response:
                    if not response.has_redirect_location:
                        return await _body(response, url, limits)
                    here = _next_address(here, response.headers["location"], url)
    except httpx.TimeoutException as error:
        raise MediaError("the server does not answer in time", where=shown(url)) from error
    except (
        httpx.HTTPError,
        httpx.InvalidURL,
        httpx.StreamError,
        ValueError,  # half an IPv6 address, a host that no name can have
    ) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise MediaError(f"cannot be fetched ({reason[:200]})", where=shown(url)) from error
    raise MediaError(f"redirects more than {limits.max_redirects} times", where=shown(url))


async def _body(response: httpx.Response, url: str, limits: SourceLimits) -> bytes:
    if not response.is_success:
        try:
            phrase = f"{response.status_code} {HTTPStatus(response.status_code).phrase}"
        except ValueError:
            phrase = str(response.status_code)
        raise MediaError(f"the server answers {phrase}", where=shown(url))
    coding = response.headers.get("content-encoding", "identity").lower()
    if coding not in ("", "identity"):
        raise MediaError(f"comes compressed as {coding[:20]!r}, unasked", where=shown(url))
    length = whole_number(response.headers.get("content-length", ""))
    if length is not None and length > limits.max_bytes:
        raise too_large(url, limits)
    body = bytearray()
    async for part in response.aiter_raw():
        body += part
        if len(body) > limits.max_bytes:
            raise too_large(url, limits)
    return bytes(body)


def _next_address(here: str, location: str, first: str) -> str:
    """Where a redirect leads, if it may be followed.

    Raises:
        MediaError: it leads to another scheme, or from the open network into a private one.
    """
    target = urllib.parse.urljoin(here, location)
    parts = urllib.parse.urlsplit(target)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise MediaError(
            f"redirects to {shown(target)}", where=shown(first), hint="only http(s) is followed"
        )
    origin = urllib.parse.urlsplit(here).hostname or ""
    if _is_private(parts.hostname) and not _is_private(origin):
        raise MediaError(
            f"redirects to the private address {parts.hostname}",
            where=shown(first),
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
