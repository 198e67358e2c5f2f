"""Unpacks archives that come from elsewhere: zip and tar, nothing outside the folder, no bombs.

What an archive says of itself is bounded before it is read: the length of a header and of a name,
the directory, the number of members, the bytes that come out. Everything is unpacked into a hidden
folder beside the archive first, and moved in once all of it is good and nothing is in the way; a
killed run begins again, and finds what it had moved.
"""

from __future__ import annotations

import io
import os
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

from chatbind_cli.download.manifest import OURS, Member
from chatbind_cli.download.requests import leads_out
from chatbind_cli.errors import ChatBindError, DownloadError, reason
from chatbind_cli.files import check_room

# Pictures hardly shrink; what claims to grow a hundredfold is not an archive of pictures.
_LARGEST_RATIO = 100
_ALWAYS_FINE_BYTES = 1 << 30
_MOST_NAMES_BYTES = 128 << 20  # of all names together, which are kept in memory
_OF_EACH_NAME_BYTES = 100  # besides its letters: then a million members of usual names are fine
_LONGEST_NAME = 4096  # that a file system takes
_BLOCK = 1 << 17  # of a tar at once; what asks for more is a header, and no honest one
_LARGEST_DIRECTORY_BYTES = 64 << 20  # of a zip: half a million members and more
_ZIP_BEGINS = (b"PK\x03\x04", b"PK\x05\x06")

# A member: its name, its size, and how to open it; None for a folder.
_Opened = tuple[str, int, Callable[[], IO[bytes]] | None]


def unpack(
    archive: Path,
    folder: Path,
    *,
    replaceable: Collection[str] = (),
    advance: Callable[[int], None] = lambda n: None,
) -> list[Member]:
    """Unpacks a zip or tar archive (plain, gzip, bzip2, xz) into a folder.

    A file that is there already with the same content is left alone; of the others, only those in
    `replaceable`, which came out before, are written anew. `advance` is called with the number of
    bytes of the archive that are through. For one process at a time.

    Returns:
        The files, each with its CRC-32; of several of one name the last.

    Raises:
        DownloadError: the archive is broken or not to be trusted, a file of another content is in
            the way. Then nothing has come into the folder.
        ChatBindError: the disk has no room.
    """
    temporary = archive.with_name(f".{archive.name}.unpacking")
    _remove(temporary)
    try:
        members = _write_all(archive, temporary, advance)
        for place in {(folder / member.name).parent for member in members}:
            # a link that lay there before must not lead a member out
            if not place.resolve().is_relative_to(folder.resolve()):
                what = f"leads out of {folder} by a link"
                raise DownloadError(what, where=str(place), hint="remove the link")
        coming = [m for m in members if not _is_there(m, folder, replaceable, archive)]
        for member in coming:
            target = folder / member.name
            target.parent.mkdir(parents=True, exist_ok=True)
            (temporary / member.name).replace(target)
    except ChatBindError:
        raise
    except Exception as error:  # whatever a library does with a broken archive
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk's, not the archive's
        what = f"is an archive that cannot be unpacked ({reason(error)})"
        raise DownloadError(what, where=str(archive), hint="fetch it again") from error
    finally:
        _remove(temporary)
    return members


def check_members(folder: Path, members: Sequence[Member], advance: Callable[[int], None]) -> None:
    """Reads everything that came out of an archive and compares it with what was noted.

    Raises:
        DownloadError: files are missing or changed; the message counts them and names the first.
    """
    wrong = [] if members else ["what came out is not known"]
    for member in members:
        try:
            with (folder / member.name).open("rb") as file:
                if _crc32_of(file, advance=advance) != member.crc32:
                    wrong.append(f"{member.name!r} has another content")
        except OSError as error:
            wrong.append(f"{member.name!r} cannot be read ({error.strerror})")
    if wrong:
        raise DownloadError(
            f"{len(wrong)} of {len(members)} files are missing or damaged, the first: {wrong[0]}",
            where=str(folder),
            hint="fetch it again with --overwrite",
        )


def _crc32_of(
    file: IO[bytes],
    write: Callable[[bytes], object] = lambda block: None,
    advance: Callable[[int], None] = lambda n: None,
) -> int:
    """The CRC-32 of what is read from a file, a block at a time, and passed on to `write`."""
    found = 0
    while block := file.read(1 << 17):
        write(block)
        found = zlib.crc32(block, found)
        advance(len(block))
    return found


def _remove(temporary: Path) -> None:
    """Removes what a killed run left; a link that lies there is not followed."""
    if temporary.is_dir() and not temporary.is_symlink():
        shutil.rmtree(temporary)
    else:
        temporary.unlink(missing_ok=True)


def _write_all(archive: Path, folder: Path, advance: Callable[[int], None]) -> list[Member]:
    """Writes all files into a folder that is ours alone."""
    written: dict[str, Member] = {}
    total = names_bytes = through = 0
    with archive.open("rb") as raw:

        def step(n: int) -> None:
            nonlocal through
            advance(max(raw.tell() - through, 0))
            through = max(raw.tell(), through)

        # By its first bytes: a tar may end in a zip that it holds, which zipfile would find.
        members = _zip_members if raw.read(4) in _ZIP_BEGINS else _tar_members
        raw.seek(0)
        for name, size, open_member in members(raw, archive):
            path = _path_of(name, archive)
            names_bytes += len(name) + _OF_EACH_NAME_BYTES
            if names_bytes > _MOST_NAMES_BYTES:
                raise _evil(archive, "has too many members to be plausible")
            if open_member is None:
                continue
            total += size  # of a sparse member, more than the archive's stream has
            _refuse_bomb(archive, total)
            target = folder / path
            target.parent.mkdir(parents=True, exist_ok=True)
            with open_member() as source, target.open("wb") as file:
                crc32 = _crc32_of(source, file.write, step)
                if file.tell() != size:
                    raise EOFError(f"member {name!r} is not as long as it says")
            written[path] = Member(path, size, crc32)
    return list(written.values())


def _path_of(name: str, archive: Path) -> str:
    """Where a member goes, below the folder.

    Raises:
        DownloadError: its name leads out of the folder, or to our notes.
    """
    if len(name) > _LONGEST_NAME:
        raise _evil(archive, f"has a member whose name has {len(name)} characters")
    if leads_out(name):
        raise _evil(archive, f"member {name!r} would leave the folder")
    path = str(PurePosixPath(name))
    if path.partition("/")[0].casefold() in OURS:
        raise _evil(archive, f"member {name!r} has a name that is kept for notes about downloads")
    return path


def _evil(archive: Path, what: str) -> DownloadError:
    return DownloadError(what, where=str(archive), hint="do not trust it")


def _refuse_bomb(archive: Path, size: int) -> None:
    """Refuses an archive of which more comes out than of those of its size."""
    if size <= _ALWAYS_FINE_BYTES:
        return
    limit = max(_ALWAYS_FINE_BYTES, _LARGEST_RATIO * archive.stat().st_size)
    if size > limit:
        shown = f"{limit / 1e9:.1f} GB"
        raise _evil(archive, f"would unpack to more than {shown}, which is not plausible")


def _is_there(member: Member, folder: Path, replaceable: Collection[str], archive: Path) -> bool:
    """Whether a file is there already with the same content.

    Raises:
        DownloadError: one is there that did not come out of the archive before.
    """
    target = folder / member.name
    if not os.path.lexists(target):
        return False
    if target.is_file():
        if member.name in replaceable and not target.is_symlink():
            return False
        with target.open("rb") as file:
            same_size = target.stat().st_size == member.bytes
            if same_size and _crc32_of(file) == member.crc32:
                return True
    raise DownloadError(
        f"would replace others, the first is {target}, which has another content",
        where=str(archive),
        hint="use another folder; --overwrite replaces only what came out of an archive before",
    )


def _zip_members(raw: IO[bytes], path: Path) -> Iterator[_Opened]:
    """What is in a zip, in order; refuses links and devices."""
    bounded = cast(IO[bytes], _Bounded(raw, path, _LARGEST_DIRECTORY_BYTES, "directory"))
    with zipfile.ZipFile(bounded) as archive:
        infos = archive.infolist()
        size = sum(info.file_size for info in infos)
        _refuse_bomb(path, size)
        check_room(path.parent, size, where=str(path))
        for info in infos:
            if stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise _evil(path, f"member {info.filename!r} is a link or device")
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                # the others unpack a block to whatever it becomes, at once
                raise zipfile.BadZipFile(f"compressed by method {info.compress_type}")
            # reads no more than the size that it is told, and compares the CRC-32
            opened = None if info.is_dir() else partial(archive.open, info)
            yield info.filename, info.file_size, opened


def _tar_members(raw: IO[bytes], path: Path) -> Iterator[_Opened]:
    """What is in a tar, in order; refuses links and devices."""
    try:
        opened = _Tar.open(path, fileobj=raw)
    except tarfile.ReadError as error:
        raise DownloadError("is neither a zip nor a tar archive", where=str(path)) from error
    with opened as archive:
        while (info := archive.next()) is not None:
            cast(Any, archive).members.clear()  # they are kept otherwise, a kilobyte each
            if not info.isdir() and not info.isreg():
                raise _evil(path, f"member {info.name!r} is a link or device")
            extract = cast(Any, partial(archive.extractfile, info))
            yield info.name, info.size, None if info.isdir() else extract


class _Bounded(io.RawIOBase):
    """An archive's bytes, unpacked or not: not many at once, and not without end."""

    def __init__(self, stream: IO[bytes], path: Path, at_once: int, what: str) -> None:
        self._stream, self._path, self._at_once, self._what = stream, path, at_once, what

    def read(self, size: int = -1, /) -> bytes:
        if size > self._at_once:
            raise _evil(self._path, f"has a {self._what} of {size} bytes")
        block = self._stream.read(size)
        _refuse_bomb(self._path, self._stream.tell())
        return block

    def seek(self, position: int, whence: int = io.SEEK_SET, /) -> int:
        return self._stream.seek(position, whence)

    def tell(self) -> int:
        return self._stream.tell()

    def close(self) -> None:
        self._stream.close()
        super().close()


class _Tar(tarfile.TarFile):
    """Reads what its kind of compression gives through `_Bounded`."""

    def __init__(self, name: Any, mode: Any, fileobj: Any, **options: Any) -> None:
        super().__init__(
            name, mode, cast(Any, _Bounded(fileobj, name, _BLOCK, "header")), **options
        )
