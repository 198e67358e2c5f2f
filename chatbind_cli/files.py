"""Files and folders that appear whole or not at all, and their hashes.

Knows nothing of what is in them. Record streams, which grow line by line, are in `jsonl`.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from chatbind_cli.errors import ChatBindError

# Hashing a smaller file costs less than looking its hash up.
_CACHED_FROM_BYTES = 64 << 20


@contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; on success it takes the place of `path`.

    A failure inside the block (or a kill) leaves what was at `path` untouched.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        _sync(temporary)
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
        _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replace_folder(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yields a temporary folder beside `path`; on success it becomes `path`.

    Raises:
        ChatBindError: `path` exists, is not an empty folder, and `overwrite` is False.
    """
    path = Path(path).resolve()  # "." has no name
    if not overwrite and path.exists() and (path.is_file() or any(path.iterdir())):
        raise ChatBindError(
            "exists already and is not empty",
            where=str(path),
            hint="choose another folder, or say --overwrite",
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"))
    try:
        temporary.chmod(0o777 & ~_umask())
        yield temporary
        for child in temporary.rglob("*"):
            if child.is_file():
                _sync(child)
        _swap(temporary, path)
        _sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _swap(temporary: Path, path: Path) -> None:
    """Puts a folder in the place of another; a rename cannot replace a folder that has files."""
    if not path.exists():
        temporary.replace(path)
        return
    old = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".old"))
    path.replace(old / "was")
    temporary.replace(path)
    shutil.rmtree(old)


def open_alone(path: Path) -> IO[str]:
    """Opens a text file to append to, for this process alone.

    Two runs that append to one file would each write what the other has written already.

    Raises:
        ChatBindError: another process has it open so.
    """
    while True:
        file = path.open("a", encoding="utf-8")
        try:
            lock_file(file.fileno(), path)
            # the one who had it before may have put another file in its place
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                    return file
        except BaseException:
            file.close()
            raise
        file.close()


def lock_file(handle: int, path: Path) -> None:
    """Takes the lock of an open file; it goes when the file is closed or the process dies.

    Raises:
        ChatBindError: another process has it.
    """
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            return  # a file system without locks
        raise ChatBindError(
            "another process is writing it",
            where=str(path),
            hint="wait for it to end, or give another output",
        ) from error


def sha256_file(path: Path, *, fresh: bool = False) -> str:
    """The SHA-256 of a file as hex digits.

    The hash of a large file is remembered in the user's cache under its path, size and time of
    change, because reading 5 GB at every start of a command would take longer than the command.

    Args:
        path: the file.
        fresh: read the file whatever is remembered: a disk that forgets changes no time.
    """
    path = Path(path).resolve()
    stat = path.stat()
    if stat.st_size < _CACHED_FROM_BYTES:
        return _hash(path)
    identity = f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}"
    entry = cache_folder() / "sha256" / hashlib.sha256(identity.encode()).hexdigest()
    if not fresh:
        with suppress(OSError, ValueError, KeyError):
            return str(json.loads(entry.read_text())["sha256"])
    digest = _hash(path)
    # A read-only home is no reason to fail: the next run hashes again.
    with suppress(OSError), replace_file(entry) as temporary:
        temporary.write_text(json.dumps({"path": str(path), "sha256": digest}))
    return digest


def cache_folder() -> Path:
    """The folder for what can be computed again: `$XDG_CACHE_HOME/chatbind`."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "chatbind"


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
