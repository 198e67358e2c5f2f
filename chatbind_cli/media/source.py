"""Where the bytes of a media file come from: a path, a URL, a data URI, a stream, or memory.

A `MediaSource` names its bytes, opens them as often as a decoder likes, and knows their hash. What
the bytes mean is not known here; `sniff` looks at that.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import os
import select
import stat
import sys
import urllib.parse
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, BinaryIO

from chatbind_cli.errors import MediaError
from chatbind_cli.files import sha256_file

_SHOWN_CHARACTERS = 100


@dataclass(frozen=True, kw_only=True)
class SourceLimits:
    """What a source may cost. Files on disk are read where they lie."""

    max_bytes: int = 512 * 1024 * 1024
    """Most bytes taken from a URL, a data URI, a stream or a pipe: they are held in memory."""
    max_file_bytes: int = 128 * 1024**3
    """Largest file on disk: all of it is hashed. An hour of 4K video takes up to 50 GB."""
    connect_timeout_s: float = 10.0
    read_timeout_s: float = 20.0
    """Longest silence of a server or a pipe, and longest wait for a pipe to be written to."""
    total_timeout_s: float = 300.0
    """Longest time for one URL, all redirects included, and for a writer's first byte."""
    max_redirects: int = 5


@dataclass(frozen=True, eq=False)
class MediaSource:
    """Bytes with a name. Exactly one of `path` and `data` is set.

    `ref` is what the user wrote: a path, a URL, `-`, or `<bytes>` for bytes from a program.
    """

    ref: str
    path: Path | None = None
    data: bytes | None = None

    def __post_init__(self) -> None:
        if (self.path is None) == (self.data is None):
            raise ValueError("a media source has either a path or data")

    @property
    def name(self) -> str:
        """`ref`, short enough for an error line and without a password."""
        return shown(self.ref)

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the content, 64 hexadecimal digits."""
        if self.data is not None:
            return hashlib.sha256(self.data).hexdigest()
        assert self.path is not None
        try:
            return sha256_file(self.path)
        except OSError as error:
            raise _unreadable(self.name, error) from error

    @cached_property
    def size(self) -> int:
        """Length of the content in bytes."""
        if self.data is not None:
            return len(self.data)
        assert self.path is not None
        try:
            return self.path.stat().st_size
        except OSError as error:
            raise _unreadable(self.name, error) from error

    def open(self) -> BinaryIO:
        """A fresh seekable stream over the content; the caller closes it.

        Raises:
            MediaError: the file is gone or may not be read.
        """
        if self.data is not None:
            return io.BytesIO(self.data)
        assert self.path is not None
        try:
            return self.path.open("rb")
        except OSError as error:
            raise _unreadable(self.name, error) from error

    def head(self, count: int) -> bytes:
        """The first `count` bytes, or all of a shorter content."""
        with self.open() as stream:
            try:
                return stream.read(count)
            except OSError as error:
                raise _unreadable(self.name, error) from error


def open_source(
    ref: str | Path | bytes,
    *,
    stdin: IO[bytes] | None = None,
    limits: SourceLimits = SourceLimits(),
) -> MediaSource:
    """Finds the bytes behind a path, an http(s) URL, a data URI, `-` (standard input) or bytes.

    URLs, streams and pipes are read at once and held in memory, up to `limits.max_bytes`; a file on
    disk is only looked at. A `Path` is always a path, whatever its name.

    Raises:
        MediaError: there is nothing there, it is empty, too large, too slow, or of a kind that is
            not read (another URL scheme, a folder, a device).
    """
    if isinstance(ref, bytes):
        source = MediaSource(ref="<bytes>", data=ref)
    elif isinstance(ref, str) and ref == "-":
        stream = stdin if stdin is not None else sys.stdin.buffer
        source = MediaSource(ref="-", data=_read_bounded(stream, "standard input", limits))
    elif isinstance(ref, str) and ref[:5].lower() == "data:":
        source = MediaSource(ref=ref, data=_decode_data_uri(ref, limits))
    elif isinstance(ref, str) and _scheme(ref) in ("http", "https"):
        from chatbind_cli.media.fetch import fetch_url  # noqa: PLC0415

        source = MediaSource(ref=ref, data=fetch_url(ref, limits))
    elif isinstance(ref, str) and _scheme(ref) and "://" in ref:
        raise MediaError(
            f"{_scheme(ref)} addresses are not read",
            where=shown(ref),
            hint="give a path, an http(s) URL or a data URI",
        )
    else:
        source = _open_path(ref, limits)
    if source.size == 0:
        raise MediaError("is empty", where=source.name)
    return source


def _open_path(ref: str | Path, limits: SourceLimits) -> MediaSource:
    text = str(ref)
    if not text or "\0" in text:
        raise MediaError("is not a file name", where=repr(shown(text)))
    path = Path(ref)
    try:
        status = path.stat()
        mode = status.st_mode
        if stat.S_ISREG(mode):
            source = MediaSource(ref=text, path=path)
            _refuse_vast(source, limits)
            return source
        if stat.S_ISDIR(mode):
            raise MediaError("is a folder, not a file", where=shown(text))
        if not stat.S_ISFIFO(mode):
            raise MediaError("is not a file", where=shown(text))
        # a pipe (`<(command)` in a shell) can be read only once
        return MediaSource(ref=text, data=_read_pipe(path, text, limits))
    except FileNotFoundError as error:
        raise MediaError("no such file", where=shown(text)) from error
    except OSError as error:
        raise _unreadable(shown(text), error) from error
    except ValueError as error:  # half a character, as JSON can hold it
        raise MediaError("is not a file name", where=shown(text)) from error


def _refuse_vast(source: MediaSource, limits: SourceLimits) -> None:
    """Refuses files that are no media but take hours to hash, such as sparse ones."""
    if source.size > limits.max_file_bytes:
        raise MediaError(
            f"is larger than {limits.max_file_bytes / 2**30:.4g} GiB",
            where=source.name,
            hint="cut out the stretch that matters",
        )
    if source.size > limits.max_bytes and not any(source.head(4096)):
        raise MediaError("begins with nothing but zeros: no medium does", where=source.name)


def _read_pipe(path: Path, name: str, limits: SourceLimits) -> bytes:
    """All that is written to a pipe; opened so that a pipe without a writer blocks nobody."""
    pipe = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        ready = select.poll()
        ready.register(pipe, select.POLLIN)
        parts: list[bytes] = []
        size = 0
        alone = False
        while True:
            patience = limits.read_timeout_s
            try:
                part = os.read(pipe, 1 << 20)
            except BlockingIOError:  # somebody holds it open for writing, and is silent
                alone = False
                patience = limits.read_timeout_s if parts else limits.total_timeout_s
            else:
                if part:
                    parts.append(part)
                    size += len(part)
                    if size > limits.max_bytes:
                        raise too_large(name, limits)
                    continue
                if parts:
                    return b"".join(parts)
                if alone:
                    raise _silent(name, patience)
                alone = True  # a writer that comes and is silent does not end the wait: look again
            events = ready.poll(patience * 1000)
            if not events and not alone:
                raise _silent(name, patience)
            if events and not any(event & select.POLLIN for _, event in events):
                return b"".join(parts)  # its writer has come and gone
    finally:
        os.close(pipe)


def _silent(name: str, seconds: float) -> MediaError:
    return MediaError(f"nothing was written to it in {seconds:g} s", where=shown(name))


def _read_bounded(stream: IO[bytes], name: str, limits: SourceLimits) -> bytes:
    parts = []
    size = 0
    try:
        while part := stream.read(1 << 20):
            size += len(part)
            if size > limits.max_bytes:
                raise too_large(name, limits)
            parts.append(part)
    except OSError as error:
        raise _unreadable(name, error) from error
    return b"".join(parts)


def _decode_data_uri(ref: str, limits: SourceLimits) -> bytes:
    """RFC 2397: `data:[<type>][;base64],<content>`."""
    header, comma, content = ref.partition(",")
    if not comma:
        raise MediaError("is a data URI without a comma", where=shown(ref))
    if len(content) > limits.max_bytes * 4 // 3 + 4:
        raise too_large(shown(ref), limits)
    content_bytes = urllib.parse.unquote_to_bytes(content)
    if header.lower().endswith(";base64"):
        try:
            # white space may come from wrapped lines; padding is often left out
            packed = b"".join(content_bytes.split())
            packed = packed.translate(bytes.maketrans(b"-_", b"+/"))
            packed += b"=" * (-len(packed) % 4)
            return base64.b64decode(packed, validate=True)
        except binascii.Error as error:
            raise MediaError("is a data URI with broken base64", where=shown(ref)) from error
    return content_bytes


def too_large(name: str, limits: SourceLimits) -> MediaError:
    """The error for a stream or download that goes past its limit."""
    return MediaError(
        f"is larger than {limits.max_bytes / 2**20:.4g} MiB",
        where=shown(name),
        hint="save it to a file first: files on disk may be larger",
    )


def _unreadable(name: str, error: OSError) -> MediaError:
    return MediaError(f"cannot be read ({os.strerror(error.errno or 5)})", where=name)


def _scheme(ref: str) -> str:
    """The URL scheme in lower case, or nothing; one letter is a Windows drive."""
    scheme, colon, _ = ref.partition(":")
    plain = scheme.replace("+", "").replace("-", "").replace(".", "")
    if colon and len(scheme) > 1 and plain.isascii() and plain.isalnum() and scheme[0].isalpha():
        return scheme.lower()
    return ""


def shown(ref: str) -> str:
    """A reference for an error line: short, printable, without user name and password."""
    if _scheme(ref) and "@" in ref and "://" in ref:
        scheme, _, rest = ref.partition("://")
        authority, slash, tail = rest.partition("/")
        ref = f"{scheme}://{authority.rpartition('@')[2]}{slash}{tail}"
    ref = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in ref)
    return ref if len(ref) <= _SHOWN_CHARACTERS else ref[: _SHOWN_CHARACTERS - 3] + "..."
