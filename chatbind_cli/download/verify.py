"""Whether a file is what it was promised to be: size, SHA-256, MD5; and room on the disk."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

from chatbind_cli.errors import DownloadError
from chatbind_cli.files import sha256_file


def check_file(
    path: Path,
    *,
    source: str,
    bytes: int | None = None,
    sha256: str | None = None,
    md5: str | None = None,
) -> None:
    """Compares a file with what is known of it.

    Raises:
        DownloadError: it differs.
    """
    found = path.stat().st_size
    if bytes is not None and found != bytes:
        raise DownloadError(f"has {found} bytes in place of {bytes}", where=source, hint=_AGAIN)
    if sha256 is not None and (digest := sha256_file(path)) != sha256.lower():
        raise DownloadError(
            f"has the SHA-256 {digest[:12]}... in place of {sha256[:12].lower()}...",
            where=source,
            hint=_AGAIN,
        )
    if sha256 is None and md5 is not None and (digest := _md5(path)) != md5.lower():
        raise DownloadError(
            f"has the MD5 {digest} in place of {md5.lower()}", where=source, hint=_AGAIN
        )


_AGAIN = "fetch it again; if it stays so, the source has changed"


def _md5(path: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def check_room(folder: Path, needed: int, what: str) -> None:
    """Refuses what cannot fit, before it fills the disk.

    Args:
        folder: where it goes; need not exist yet.
        needed: bytes.
        what: whose bytes, for the message.

    Raises:
        DownloadError: less than that is free.
    """
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DownloadError(
            f"needs {in_words(needed)} and {in_words(free)} are free in {folder}",
            where=what,
            hint="make room, or name another folder with --output",
        )


def in_words(size: int) -> str:
    """A number of bytes for a person: `13.51 GB`, `0.04 MB`."""
    return f"{size / 1e9:.2f} GB" if size >= 10**9 else f"{size / 1e6:.2f} MB"
