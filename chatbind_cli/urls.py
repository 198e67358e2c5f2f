"""URLs as records, notes and errors may show them."""

from __future__ import annotations

import re
from urllib.parse import parse_qsl, quote, urlsplit, urlunsplit

from chatbind_cli.errors import UsageError

_USER = re.compile("//[^/]*@")
_SECRET = re.compile(r"token|key|secret|sig|passw|credential|auth", re.IGNORECASE)


def check_url(url: str) -> None:
    """Refuses what is no address of a host.

    Raises:
        UsageError: it is none.
    """
    try:
        url.encode()
        parts = urlsplit(url)
        is_one = bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_one = False
    if not is_one or not url.isprintable():
        shown = _USER.sub("//", url)[:200]
        raise UsageError(f"{shown!r} is no URL", hint="write https://HOST/PATH")


def public_url(url: str) -> str:
    """The URL without user name and password, and without the values of secret parameters.

    Other parameters stay: they may be what tells one file from another.
    """
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    query = parts.query
    if _SECRET.search(query):
        pairs = parse_qsl(query, keep_blank_values=True)
        query = "&".join(
            f"{quote(name)}={'...' if _SECRET.search(name) else quote(value)}"
            for name, value in pairs
        )
    return urlunsplit((parts.scheme, host, parts.path, query, ""))
