"""Whether a file is what it was promised to be: size, hashes; and room on the disk."""

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
    git_sha1: str | None = None,
    fresh: bool = False,
) -> str:
    """Compares a file with what is known of it, by the strongest of the hashes that are known.

    Args:
        path: the file.
        source: where it came from, for the message.
        bytes: its size.
        sha256: hex digest.
        md5: hex digest.
        git_sha1: its name in Git, as the hub lists files that are not in large-file storage.
        fresh: read it whatever is remembered of its hash.

    Returns:
        What was compared: `sha256`, `git-sha1`, `md5`, `bytes` or `nothing`.

    Raises:
        DownloadError: it differs.
    """
    found = path.stat().st_size
    if bytes is not None and found != bytes:
        raise DownloadError(f"has {found} bytes in place of {bytes}", where=source, hint=_AGAIN)
    if sha256 is not None:
        _compare("SHA-256", sha256_file(path, fresh=fresh), sha256, source)
        return "sha256"
    if git_sha1 is not None:
        _compare("Git hash", _git_sha1(path), git_sha1, source)
        return "git-sha1"
    if md5 is not None:
        _compare("MD5", _digest(path, hashlib.md5(usedforsecurity=False)), md5, source)
        return "md5"
    return "bytes" if bytes is not None else "nothing"


_AGAIN = "fetch it again; if it stays so, the source has changed"
_SHOWN = 12


def _compare(kind: str, found: str, wanted: str, source: str) -> None:
    if found != wanted.lower():
        raise DownloadError(
            f"has the {kind} {found[:_SHOWN]}... in place of {wanted[:_SHOWN].lower()}...",
            where=source,
            hint=_AGAIN,
        )


def _git_sha1(path: Path) -> str:
    head = f"blob {path.stat().st_size}\0".encode()
    return _digest(path, hashlib.sha1(head, usedforsecurity=False))


def _digest(path: Path, digest: hashlib._Hash) -> str:
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
