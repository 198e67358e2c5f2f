"""Bytes that do not lie on disk: standard input, pipes and data URIs.

They are read at once and held in memory, within limits of size and time. `where` is what an error
calls the medium.
"""

from __future__ import annotations

import base64
import os
import select
import urllib.parse
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from chatbind_cli.errors import MediaError
from chatbind_cli.media.guard import reading

_PART = 1 << 20


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


def read_stream(stream: IO[bytes], where: str, limits: SourceLimits) -> bytes:
    """All of a stream.

    Raises:
        MediaError: it is too large or cannot be read.
    """
    body = bytearray()
    with reading(where, "cannot be read"):
        while part := stream.read(_PART):
            add_part(body, part, where, limits)
    return bytes(body)


def read_pipe(path: Path, where: str, limits: SourceLimits) -> bytes:
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
            patience = limits.read_timeout_s
            try:
                part = os.read(pipe, _PART)
            except BlockingIOError:  # somebody holds it open for writing, and is silent
                alone = False
                patience = limits.read_timeout_s if body else limits.total_timeout_s
            else:
                if part:
                    add_part(body, part, where, limits)
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


def decode_data_uri(uri: str, where: str, limits: SourceLimits) -> bytes:
    """The content of `data:[<type>][;base64],<content>` (RFC 2397).

    Raises:
        MediaError: it is broken or too large.
    """
    header, comma, content = uri.partition(",")
    if not comma:
        raise MediaError("is a data URI without a comma", where=where)
    if len(content) > limits.max_bytes * 4 // 3 + 4:
        raise too_large(where, limits)
    data = urllib.parse.unquote_to_bytes(content)
    if not header.lower().endswith(";base64"):
        return data
    with reading(where, "is a data URI with broken base64"):
        # white space may come from wrapped lines; padding is often left out
        packed = b"".join(data.split()).translate(bytes.maketrans(b"-_", b"+/"))
        return base64.b64decode(packed + b"=" * (-len(packed) % 4), validate=True)


def add_part(body: bytearray, part: bytes, where: str, limits: SourceLimits) -> None:
    """Appends to what was read so far.

    Raises:
        MediaError: it is larger than the limit now.
    """
    body += part
    if len(body) > limits.max_bytes:
        raise too_large(where, limits)


def too_large(where: str, limits: SourceLimits) -> MediaError:
    """The error for a stream or download that goes past its limit."""
    return MediaError(
        f"is larger than {limits.max_bytes / 2**20:.4g} MiB",
        where=where,
        hint="save it to a file first: files on disk may be larger",
    )
