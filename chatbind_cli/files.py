"""Files that appear whole or not at all, whose they are, their hashes, and room for them.

Whole folders are in `folders`; record streams, which grow line by line, are in `jsonl`.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from stat import S_ISDIR, S_ISREG
from typing import IO, Any

from chatbind_cli.errors import ChatBindError, UsageError

# Hashing a smaller file costs less than looking its hash up.
_CACHED_FROM_BYTES = 64 << 20

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_OF_RUST = re.compile(r"\(os error (\d+)\)")

_MARK_WITHIN = 8 << 10
_LONGEST_RECORD = 64 << 20


@contextmanager
def replace_file(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """Yields a temporary path beside `path`; on success it takes the place of `path`.

    A failure inside the block (or a kill) leaves what was at `path` untouched; so does a power
    cut, if it is `durable`, which takes as long as the disk needs.

    Raises:
        OSError: the disk is full; it names `path`, which a failing write does not.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        if durable:
            sync(temporary)
        temporary.chmod(user_mode(0o666))
        temporary.replace(path)
        if durable:
            sync(path.parent)
    except Exception as error:
        number = _os_error(error)
        if number in _FULL:
            raise OSError(number, os.strerror(number), str(path)) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def _os_error(error: Exception) -> int | None:
    """The system's number of an error, which safetensors puts into the text of its own."""
    if isinstance(error, OSError):
        return error.errno
    found = _OF_RUST.search(str(error))
    return int(found[1]) if found else None


def replace_text(path: Path, text: str) -> None:
    """Writes a file of UTF-8 as `replace_file` does."""
    with replace_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def refuse_foreign_file(path: Path, is_ours: Callable[[Path], bool], *, what: str) -> None:
    """Refuses to replace a file that does not show that it is of our making.

    Args:
        path: what is to be written.
        is_ours: whether a file there that is not empty is.
        what: what it is to be, with its article, for the message.

    Raises:
        ChatBindError: it is not.
    """
    if not os.path.lexists(path):
        return
    if path.is_file() and (path.stat().st_size == 0 or is_ours(path)):
        return
    raise ChatBindError(
        f"is there already, and is not {what} that chatbind made",
        where=str(path),
        hint="name another file, or remove this one by hand",
    )


def refuse_foreign_records(path: Path, keys: Collection[str], expect: Collection[str]) -> None:
    """Refuses to replace a record file that does not begin with a record of the command's.

    Args:
        path: the file.
        keys: what makes a record's id.
        expect: what every record has beside it that carries no `error`.

    Raises:
        ChatBindError: it begins with something else.
    """

    def is_ours(path: Path) -> bool:
        with path.open("rb") as file:
            line = b"\n"
            while line and not line.strip():
                line = file.readline(_LONGEST_RECORD)
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            return not line or is_half_record(line)
        return isinstance(record, dict) and is_record_of(record, keys, expect)

    refuse_foreign_file(path, is_ours, what=f"a file of records with {', '.join([*keys, *expect])}")


def is_record_of(record: Mapping[str, Any], keys: Collection[str], expect: Collection[str]) -> bool:
    """Whether a command may have written a record; see `refuse_foreign_records`."""
    failed = record.get("error") is not None
    if failed and isinstance(record.get("line"), int):
        return True  # for want of an id it says which line of the input it was
    has_id = all(isinstance(record.get(key, []), Hashable) for key in keys)
    return has_id and (failed or all(key in record for key in expect))


def is_half_record(line: bytes) -> bool:
    """Whether a file's last line may be what a kill left of a record, and not somebody's words."""
    half = not line.endswith(b"\n")
    return half and (line[:2] in (b"{", b'{"') or not line.strip(b"\0"))


def bears(path: Path, mark: bytes) -> bool:
    """Whether a file of ours says so near its beginning or end."""
    with path.open("rb") as file:
        head = file.read(_MARK_WITHIN)
        file.seek(max(0, path.stat().st_size - _MARK_WITHIN))
        return mark in head or mark in file.read(_MARK_WITHIN)


def refuse_overlap(output: str | Path, inputs: Iterable[str | Path | None]) -> None:
    """Refuses an output that is an input, or a folder that holds one, links or not.

    Raises:
        UsageError: it names the input.
    """
    place = Path(output).resolve()
    for given in inputs:
        if given is None or "-" in (str(given), str(output)):
            continue
        try:
            mode, path = Path(given).stat().st_mode, Path(given).resolve()
        except (OSError, ValueError):  # not there, or no path but a URL
            continue
        same = path == place or (place.exists() and path.samefile(place))
        if (same and (S_ISREG(mode) or S_ISDIR(mode))) or place in path.parents:
            how = "is" if same else "holds"
            raise UsageError(
                f"the output {how} the input {given}", where=str(output), hint="name another output"
            )


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

    A file system without locks gives every process one.

    Raises:
        ChatBindError: another process has it.
    """
    from filelock import lock_descriptor

    with suppress(OSError):
        if not lock_descriptor(handle, blocking=False):
            raise ChatBindError(
                "another process is writing it",
                where=str(path),
                hint="wait for it to end, or give another output",
            )


def own_stream(stream: IO[bytes]) -> IO[bytes]:
    """The stream over a descriptor of its own, where it has one.

    A thread that still waits in `sys.stdin` when the program ends would keep the interpreter from
    closing it, which ends in a crash.
    """
    try:
        return os.fdopen(os.dup(stream.fileno()), "rb")
    except (OSError, ValueError):  # not a file: a test's, or another program's
        return stream


def sha256_text(text: str) -> str:
    """The SHA-256 of a text's UTF-8 as hex digits."""
    return hashlib.sha256(text.encode()).hexdigest()


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


def free_bytes(place: Path) -> int:
    """Bytes that are free where a path is, or would be."""
    place = place.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def check_room(place: Path, needed: int, *, where: str) -> None:
    """Refuses `needed` bytes that cannot fit where a path is, or would be.

    Raises:
        ChatBindError: less is free; `where` says whose bytes they are.
    """
    free = free_bytes(place)
    if free < needed:
        raise ChatBindError(
            f"needs {size_in_words(needed)} and {size_in_words(free)} are free in "
            f"{place.absolute()}",
            where=where,
            hint="make room, or write elsewhere",
        )


def size_in_words(size: int) -> str:
    """A number of bytes for a person: `13.51 GB`, `0.04 MB`."""
    return f"{size / 1e9:.2f} GB" if size >= 10**9 else f"{size / 1e6:.2f} MB"


def sync(path: Path) -> None:
    """Waits until a file or folder has reached the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def user_mode(mode: int) -> int:
    """The permissions that the user gives new files (0o666) or folders (0o777)."""
    mask = os.umask(0)
    os.umask(mask)
    return mode & ~mask
