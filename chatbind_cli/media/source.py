"""Where the bytes of a media file come from: a path, a URL, a data URI, a stream, or memory.

A `MediaSource` names its bytes, opens them as often as a decoder likes, and knows their hash. What
the bytes mean is not known here; `sniff` looks at that.
"""

from __future__ import annotations

import hashlib
import io
import re
import stat
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

from chatbind_cli.errors import MediaError
from chatbind_cli.files import sha256_file
from chatbind_cli.media.fetch import (
    MOST_BYTES,
    Limits,
    decode_data_uri,
    fetch_url,
    read_pipe,
    read_stream,
)
from chatbind_cli.media.guard import reading
from chatbind_cli.urls import public_url

_MOST_FILE_BYTES = 128 * 2**30
"""Largest file on disk: all of it is hashed. An hour of 4K video takes up to 50 GB."""

_SHOWN_CHARACTERS = 100
_LONGEST_URL = 10_000

_SCHEME = re.compile(r"([a-z][a-z0-9+.-]+):", re.IGNORECASE)
"""Of a URL; one letter is a Windows drive."""


@dataclass(frozen=True, eq=False)
class MediaSource:
    """Bytes with a name. Exactly one of `path` and `data` is set.

    `ref` is what the user wrote: a path, a URL, `-`, or `<bytes>` for bytes from a program.
    """

    ref: str
    path: Path | None = None
    data: bytes | None = None

    @property
    def name(self) -> str:
        """`ref`, short enough for an error line and without a password."""
        return shown(self.ref)

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the content, 64 hexadecimal digits."""
        if self.path is None:
            return hashlib.sha256(self.data or b"").hexdigest()
        with reading(self.name, "cannot be read"):
            return sha256_file(self.path)

    @cached_property
    def size(self) -> int:
        """Length of the content in bytes."""
        if self.path is None:
            return len(self.data or b"")
        with reading(self.name, "cannot be read"):
            return self.path.stat().st_size

    def open(self) -> BinaryIO:
        """A fresh seekable stream over the content; the caller closes it.

        Raises:
            MediaError: the file is gone or may not be read.
        """
        if self.path is None:
            return io.BytesIO(self.data or b"")
        with reading(self.name, "cannot be read"):
            return self.path.open("rb")

    def head(self, count: int) -> bytes:
        """The first `count` bytes, or all of a shorter content."""
        with self.open() as stream, reading(self.name, "cannot be read"):
            return stream.read(count)


def open_source(
    ref: str | Path | bytes,
    *,
    limits: Limits = Limits(),  # noqa: B008 (frozen)
) -> MediaSource:
    """Finds the bytes behind a path, an http(s) URL, a data URI, `-` (standard input) or bytes.

    URLs, streams and pipes are read at once and held in memory, up to half a GiB or what `limits`
    say; a file on disk is only looked at. A `Path` is always a path, whatever its name.

    Raises:
        MediaError: there is nothing there, it is empty, too large, too slow, or of a kind that is
            not read (another URL scheme, a folder, a device).
    """
    if isinstance(ref, bytes):
        source = MediaSource("<bytes>", data=ref)
    elif isinstance(ref, Path):
        source = _open_path(ref)
    else:
        source = _open_named(ref, limits)
    if source.size == 0:
        raise MediaError("is empty", where=source.name)
    return source


def _open_named(ref: str, limits: Limits) -> MediaSource:
    where = shown(ref)
    found = _SCHEME.match(ref)
    scheme = found[1].lower() if found else ""
    if ref == "-":
        return MediaSource(ref, data=read_stream(sys.stdin.buffer, "standard input"))
    if scheme == "data":
        return MediaSource(ref, data=decode_data_uri(ref, where, limits.most_bytes))
    if scheme in ("http", "https"):
        return MediaSource(ref, data=fetch_url(ref, where, limits))
    if scheme and "://" in ref:
        raise MediaError(
            f"{scheme} addresses are not read",
            where=where,
            hint="give a path, an http(s) URL or a data URI",
        )
    return _open_path(ref)


def _open_path(ref: str | Path) -> MediaSource:
    text, path = str(ref), Path(ref)
    where = shown(text)
    if not text or "\0" in text:
        raise MediaError("is not a file name", where=repr(where))
    try:
        mode = path.stat().st_mode
    except FileNotFoundError as error:
        raise MediaError("no such file", where=where) from error
    except OSError as error:
        raise MediaError(f"cannot be read ({error.strerror})", where=where) from error
    except ValueError as error:  # half a character, as JSON can hold it
        raise MediaError("is not a file name", where=where) from error
    if stat.S_ISREG(mode):
        source = MediaSource(text, path=path)
        _refuse_vast(source)
        return source
    if stat.S_ISFIFO(mode):  # `<(command)` in a shell: it can be read only once
        with reading(where, "cannot be read"):
            return MediaSource(text, data=read_pipe(path, where))
    kind = "a folder, not a file" if stat.S_ISDIR(mode) else "not a file"
    raise MediaError(f"is {kind}", where=where)


def _refuse_vast(source: MediaSource) -> None:
    """Refuses files that are no media but take hours to hash, such as sparse ones."""
    if source.size > _MOST_FILE_BYTES:
        raise MediaError(
            f"is larger than {_MOST_FILE_BYTES / 2**30:.4g} GiB",
            where=source.name,
            hint="cut out the stretch that matters",
        )
    if source.size > MOST_BYTES and not any(source.head(4096)):
        raise MediaError("begins with nothing but zeros: no medium does", where=source.name)


def shown(ref: str) -> str:
    """A reference for an error line: short, printable, without user name and password."""
    ref = ref[:_LONGEST_URL]  # a data URI may have megabytes, each character of which is looked at
    if "://" in ref:
        try:
            ref = public_url(ref)
        except ValueError:  # too broken to be taken apart
            ref = ref.rpartition("@")[2]
    ref = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in ref)
    return ref if len(ref) <= _SHOWN_CHARACTERS else ref[: _SHOWN_CHARACTERS - 3] + "..."
