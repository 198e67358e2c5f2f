"""Who made a folder, and what `--overwrite` may do to it.

A folder that a command makes carries a record of its files: a line that says which command, then
a name a line, each written before its file is. Whatever else is in the folder is somebody else's,
and then nothing in it is replaced.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final, Literal

from chatbind_cli.errors import ChatBindError
from chatbind_cli.files import lock_file, replace_text, sync, user_mode

RECORD: Final = ".chatbind-files.jsonl"
_LOCKS: Final = (".lock", "writer.lock", "lock")  # of runs, stores, folders in the making; empty
_TEMPORARY: Final = re.compile(r"\.(.+)\.[a-z0-9_]{8}\.tmp")  # as `tempfile` fills it in
_LARGEST_RECORD: Final = 256 << 20


@contextmanager
def replace_folder(path: Path, *, made_by: str, overwrite: bool = False) -> Iterator[Path]:
    """Yields a temporary folder beside `path`; on success it becomes `path`, with a record.

    Args:
        path: the folder to make.
        made_by: the command.
        overwrite: whether it may replace a folder that the same command made.

    Raises:
        ChatBindError: see `refuse_taken`.
    """
    path = Path(path).resolve()  # "." has no name
    refuse_taken(path, made_by=made_by, overwrite=overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    clear_leftovers(path)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"))
    with _locked_folder(temporary):
        try:
            temporary.chmod(user_mode(0o777))
            yield temporary
            put_folder(temporary, path, made_by=made_by)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def put_folder(folder: Path, path: Path, *, made_by: str) -> None:
    """Gives a finished folder its name and its record, and removes what was made there before.

    A kill leaves the old folder or the new one.

    Args:
        folder: beside `path`, with nothing in it but what is wanted.
        path: empty, not there, or what `refuse_foreign` lets pass.
        made_by: the command.
    """
    files = sorted(f for f in folder.rglob("*") if f.is_file() and f.name not in _LOCKS)
    for file in files:
        sync(file)
    _write_record(folder, (file.relative_to(folder).as_posix() for file in files), made_by)
    refuse_foreign(path, made_by=made_by)  # long work: somebody may have come in between
    if path.exists():
        _exchange(folder, path)
        remove_folder(folder)
    else:
        folder.replace(path)
    sync(path.parent)


def clear_leftovers(path: Path) -> None:
    """Removes what killed makers of a folder left beside it, or puts it back in its place."""
    aside = _aside(path)
    if _read_record(aside) is not None:
        if path.exists():
            remove_folder(aside)
        else:
            aside.replace(path)
    for left in path.parent.glob(".*.tmp"):
        match = _TEMPORARY.fullmatch(left.name)
        if match and match[1] == path.name and left.is_dir() and not left.is_symlink():
            with suppress(ChatBindError), _locked_folder(left):
                if (left / RECORD).exists():
                    remove_folder(left)
                else:
                    shutil.rmtree(left)


def refuse_taken(path: Path, *, made_by: str, overwrite: bool) -> None:
    """Refuses to put a new folder where something is that must stay.

    Raises:
        ChatBindError: it is a file, the working folder, a mount point, or a folder that is not
            empty: without `overwrite` any, with it one that `refuse_foreign` refuses.
    """
    if path.exists() and not path.is_dir():
        raise ChatBindError("is a file", where=str(path), hint="name a folder")
    for found, what in (
        (path.resolve() == Path.cwd(), "is the folder that this runs in"),
        (os.path.ismount(path), "is a mount point"),
    ):
        if found:
            raise ChatBindError(
                f"{what}, and the finished one takes its place",
                where=str(path),
                hint="name a folder in it",
            )
    if overwrite:
        refuse_foreign(path, made_by=made_by)
    elif path.is_dir() and any(path.iterdir()):
        raise ChatBindError(
            "exists already and is not empty",
            where=str(path),
            hint="choose another folder, or say --overwrite",
        )


def note_made(folder: Path, names: Iterable[str], *, made_by: str) -> None:
    """Puts files on a folder's record; to be called before they are written.

    Args:
        folder: is made if it is not there.
        names: relative to it; one that ends in `/` stands for all below a folder of ours.
        made_by: the command, of a record that begins here.
    """
    record = _read_record(folder)
    if record is None:
        _write_record(folder, names, made_by)
        return
    fresh = [json.dumps(name) for name in dict.fromkeys(names) if name not in record.names]
    if fresh:
        with (folder / RECORD).open("a", encoding="utf-8") as file:
            # begun on a new line: a kill may have left half of one
            file.write("\n" + "\n".join(fresh) + "\n")


def is_noted(folder: Path, name: str) -> bool:
    """Whether a file is on a folder's record."""
    record = _read_record(folder)
    return record is not None and name in record.names


def refuse_foreign(folder: Path, *, made_by: str) -> None:
    """Lets pass a folder that is not there, is empty, or holds only what its record names.

    A folder that another command made is refused, too: whoever mistypes a name is not to lose
    days of training.

    Raises:
        ChatBindError: it names the first file that is somebody else's.
    """
    if not folder.is_dir():
        return
    record = _read_record(folder)
    for path, kind in _walk(folder, record or _Record("", frozenset(), frozenset())):
        if kind == "foreign":
            raise ChatBindError(
                f"is on no record of what chatbind made, so all of {folder} stays as it is",
                where=str(_first_file(path)),
                hint="choose another folder, or remove this one by hand",
            )
    if record is not None and record.made_by != made_by:
        raise ChatBindError(
            f"was made by `chatbind {record.made_by}`, so `chatbind {made_by}` leaves it alone",
            where=str(folder),
            hint="choose another folder, or remove this one by hand",
        )


def remove_made(folder: Path, below: str = "") -> None:
    """Removes what a folder's record names, and the record last; all else stays, and locks.

    Args:
        folder: the folder with the record.
        below: of it, only what is in this folder of it.
    """
    record = _read_record(folder)
    if record is None:
        return
    start = folder / below if below else folder
    for path, kind in _walk(start, record, f"{below}/" if below else ""):
        if kind == "whole":
            shutil.rmtree(path)
        elif kind == "folder":
            with suppress(OSError):  # something else is in it
                path.rmdir()
        elif kind == "file" and not (path.parent == folder and path.name in _LOCKS):
            path.unlink()
    if below:
        with suppress(OSError):
            start.rmdir()


def clear_temporaries(folder: Path) -> None:
    """Removes what kills left half written of the files that a folder's record names."""
    record = _read_record(folder)
    for path, kind in _walk(folder, record) if record else ():
        if path.parent == folder and kind == "file" and _TEMPORARY.fullmatch(path.name):
            path.unlink()


@dataclass(frozen=True, slots=True)
class _Record:
    made_by: str
    names: frozenset[str]
    parents: frozenset[str]  # the folders that the names lie in


def _read_record(folder: Path) -> _Record | None:
    """A folder's record; None where there is none that we wrote."""
    path = folder / RECORD
    try:
        found = path.lstat()
        if not stat.S_ISREG(found.st_mode) or found.st_size > _LARGEST_RECORD:
            return None
        lines = path.read_bytes().splitlines()
        made_by = json.loads(lines[0])["made_by"]
    except (OSError, ValueError, IndexError, KeyError, TypeError, RecursionError):
        return None
    names = {RECORD}
    for line in lines[1:]:
        with suppress(ValueError, RecursionError):  # half a line of a run that was killed
            name = json.loads(line)
            if isinstance(name, str):
                names.add(name)
    parents = {str(parent) for name in names for parent in PurePosixPath(name).parents}
    return _Record(str(made_by), frozenset(names), frozenset(parents))


def _write_record(folder: Path, names: Iterable[str], made_by: str) -> None:
    lines = [json.dumps({"made_by": made_by}), *map(json.dumps, dict.fromkeys(names))]
    replace_text(folder / RECORD, "\n".join(lines) + "\n")


def _walk(
    folder: Path, record: _Record, below: str = ""
) -> Iterator[tuple[Path, Literal["file", "folder", "whole", "foreign"]]]:
    """What is in a folder, by the record; links are never ours, and never followed.

    Only what is there is looked up on the record, so a name on it cannot lead anywhere. A folder
    comes after what is in it, a record after all that it names.
    """
    for path in sorted(folder.iterdir(), key=lambda path: (path.name == RECORD, path.name)):
        name = below + path.name
        match = _TEMPORARY.fullmatch(path.name)
        of = match and below + match[1]
        temporary = of is not None and (of in record.names or of in record.parents or of == RECORD)
        if path.is_symlink():
            yield path, "foreign"
        elif path.is_dir():
            if temporary or f"{name}/" in record.names:
                yield path, "whole"
            elif name not in record.parents:
                yield path, "foreign"
            else:
                own = _read_record(path) if f"{name}/{RECORD}" in record.names else None
                yield from _walk(path, own) if own else _walk(path, record, f"{name}/")
                yield path, "folder"
        elif not path.is_file():
            yield path, "foreign"
        elif temporary or name in record.names:
            yield path, "file"
        else:
            empty_lock = path.name in _LOCKS and path.stat().st_size == 0
            yield path, "file" if empty_lock else "foreign"


def _first_file(path: Path) -> Path:
    """A file, or the first that is in a folder; the folder where it holds none."""
    if path.is_symlink() or not path.is_dir():
        return path
    for folder, folders, files in os.walk(path):
        folders.sort()
        if files:
            return Path(folder) / min(files)
    return path


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


def _exchange(folder: Path, path: Path) -> None:
    """Makes two folders change places: at once where the system can do that."""
    import ctypes  # noqa: PLC0415  5 ms of a start-up, seldom needed

    rename: Callable[..., int] | None = getattr(ctypes.CDLL(None), "renameat2", None)
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    names = (here, os.fsencode(folder), here, os.fsencode(path))
    if rename is not None and rename(*names, exchange) == 0:
        return
    aside = _aside(path)  # from where `clear_leftovers` puts it back after a kill
    path.replace(aside)
    folder.replace(path)
    aside.replace(folder)


def remove_folder(folder: Path) -> None:
    """Removes a folder that was replaced, but for what its record does not name."""
    if folder.is_dir() and not folder.is_symlink():
        remove_made(folder)
        with suppress(OSError):
            folder.rmdir()


@contextmanager
def _locked_folder(folder: Path) -> Iterator[None]:
    """Holds the lock of a folder in the making, by which it is told from a killed run's."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        lock_file(handle, folder)
        yield
    finally:
        os.close(handle)
