"""Unpacks archives that come from elsewhere: zip and tar, nothing outside the folder, no bombs.

What an archive says of itself is bounded before it is read: the length of a header and of a name,
the directory, the number of members, the bytes that come out; and every name is looked at before
the first byte is written. Files that are there already with the same content are left alone, so a
killed run goes on where it stopped.
"""

from __future__ import annotations

import io
import os
import stat
import tarfile
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

from chatbind_cli.download.manifest import MANIFEST, Member, check_room, crc32_of
from chatbind_cli.errors import ChatBindError, DownloadError, reason
from chatbind_cli.folders import RECORD

# Pictures hardly shrink; what claims to grow a hundredfold is not an archive of pictures.
_LARGEST_RATIO = 100
_ALWAYS_FINE_BYTES = 1 << 30
_MOST_MEMBERS = 1_000_000
_MOST_NAMES_BYTES = 128 << 20  # of all names together
_LONGEST_NAME = 4096  # that a file system takes
_BLOCK = 1 << 17  # of a tar at once; what asks for more is a header, and no honest one
_LARGEST_DIRECTORY_BYTES = 64 << 20  # of a zip: half a million members and more
_ZIP_BEGINS = (b"PK\x03\x04", b"PK\x05\x06")

_OURS = (MANIFEST, RECORD, ".cache")  # by what these say, files may be replaced or trusted

_Opener = Callable[[], IO[bytes]]


def unpack(
    archive: Path,
    folder: Path,
    *,
    replaceable: Collection[str] = (),
    begin: Callable[[int], None] = lambda n: None,
    advance: Callable[[int], None] = lambda n: None,
) -> list[Member]:
    """Unpacks a zip or tar archive (plain, gzip, bzip2, xz) into a folder.

    A file that is there already with the same content is left alone, as after a kill. For one
    process at a time.

    Args:
        archive: the file.
        folder: is made if it is not there.
        replaceable: members that came out before, and are written anew.
        begin: called with the number of bytes that will come out, before the first does.
        advance: called with the number of bytes that are through.

    Returns:
        The files, each with its CRC-32; of several of one name the last.

    Raises:
        DownloadError: the archive is broken, has a name that leaves the folder or is ours, a
            link, a device, or would grow beyond reason; a file of another content is in the way;
            or the disk has no room. Nothing has been written if it is a name's fault, or that of
            a file that is in the way and of another size.
    """
    temporary = folder / f".{archive.name}.unpacking"
    out = []
    with _explained(archive):
        wanted = _look_through(archive, temporary.name)
        _refuse_other(wanted, folder, archive, replaceable)
        missing = (m.bytes for path, (_, m) in wanted.items() if not (folder / path).exists())
        check_room(folder, sum(missing), str(archive))
        begin(sum(member.bytes for _, member in wanted.values()))
        safe: set[Path] = set()
        for number, (member, open_member) in enumerate(_members(archive)):
            path = _path_of(member.name, archive)
            if wanted[path][0] != number:
                continue  # the archive holds a later file of that name
            target = folder / path
            if target.parent not in safe:
                _refuse_link_out(target.parent, folder)
                safe.add(target.parent)
            if os.path.lexists(target) and member.name not in replaceable:
                crc32 = _compared(member, open_member, target, archive)
                advance(member.bytes)
            else:
                crc32 = _write_member(member, open_member, target, temporary, advance)
            out.append(member._replace(crc32=crc32))
    return out


def _look_through(archive: Path, temporary: str) -> dict[str, tuple[int, Member]]:
    """What will come out: by its path, the last member of that path and the number of it."""
    wanted: dict[str, tuple[int, Member]] = {}
    total = names_bytes = 0
    for number, (member, _) in enumerate(_members(archive)):
        path = _path_of(member.name, archive)
        if PurePosixPath(path).parts[0].casefold() in (*_OURS, temporary.casefold()):
            raise DownloadError(
                f"member {member.name!r} has a name that is kept for notes about downloads",
                where=str(archive),
                hint="unpack it into another folder",
            )
        total += member.bytes
        names_bytes += len(member.name)
        if names_bytes > _MOST_NAMES_BYTES:
            raise _evil(archive, f"has names of {names_bytes} characters, which is not plausible")
        _refuse_bomb(archive, total)
        wanted[path] = (number, member)
    return wanted


def _path_of(name: str, archive: Path) -> str:
    """Where a member goes, below the folder.

    Raises:
        DownloadError: its name leads out of the folder.
    """
    path = PurePosixPath(name)
    if len(name) > _LONGEST_NAME:
        raise DownloadError(
            f"has a member whose name has {len(name)} characters", where=str(archive)
        )
    drive = len(name) > 1 and name[1] == ":"
    if path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name or drive:
        raise _evil(archive, f"member {name!r} would leave the folder")
    if not path.parts:
        raise DownloadError("has a member without a name", where=str(archive))
    return str(path)


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


def _refuse_other(
    wanted: Mapping[str, tuple[int, Member]],
    folder: Path,
    archive: Path,
    replaceable: Collection[str],
) -> None:
    """Refuses to replace a file that did not come out of the archive before."""

    def is_other(target: Path, member: Member) -> bool:
        if not os.path.lexists(target):
            return False
        if member.name in replaceable and not target.is_symlink():
            return not target.is_file()
        return not target.is_file() or target.stat().st_size != member.bytes

    other = [path for path, (_, member) in wanted.items() if is_other(folder / path, member)]
    if other:
        raise DownloadError(
            f"{len(other)} of its files would replace others, the first is {folder / min(other)}",
            where=str(archive),
            hint=_ELSEWHERE,
        )


_ELSEWHERE = "use another folder; --overwrite replaces only what came out of an archive before"


def _refuse_link_out(place: Path, folder: Path) -> None:
    """A link that lay in the folder before must not lead a member out of it either."""
    if not place.resolve().is_relative_to(folder.resolve()):
        raise DownloadError(
            f"leads out of {folder} by a link", where=str(place), hint="remove the link"
        )


def _compared(member: Member, open_member: _Opener, target: Path, archive: Path) -> int:
    """The CRC-32 of a member whose file is there already.

    Raises:
        DownloadError: the file has another content.
    """
    if (crc32 := member.crc32) is None:
        with open_member() as source:
            crc32 = crc32_of(source)
    with target.open("rb") as file:
        if crc32_of(file) != crc32:
            raise DownloadError(
                f"would replace {target}, which has another content",
                where=str(archive),
                hint=_ELSEWHERE,
            )
    return crc32


def _write_member(
    member: Member,
    open_member: _Opener,
    target: Path,
    temporary: Path,
    advance: Callable[[int], None],
) -> int:
    """Writes one file; returns its CRC-32."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary.unlink(missing_ok=True)
    # A link that lies there is not followed: "x" is for a name that is not there.
    try:
        with open_member() as source, temporary.open("xb") as file:
            found = crc32_of(source, file.write, advance)
        if temporary.stat().st_size != member.bytes:
            raise EOFError(f"member {member.name!r} is not as long as it says")
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    return found


def _members(archive: Path) -> Iterator[tuple[Member, _Opener]]:
    """The files in an archive in order, each with how to open it; refuses links and devices."""
    with archive.open("rb") as raw:
        # By its first bytes: a tar may end in a zip that it holds, which zipfile would find.
        is_zip = raw.read(4) in _ZIP_BEGINS
        raw.seek(0)
        yield from _zip_members(raw, archive) if is_zip else _tar_members(raw, archive)


def _zip_members(raw: IO[bytes], path: Path) -> Iterator[tuple[Member, _Opener]]:
    bounded = cast(IO[bytes], _Bounded(raw, path, _LARGEST_DIRECTORY_BYTES, "directory"))
    with zipfile.ZipFile(bounded) as archive:
        _refuse_many(path, len(archive.infolist()))
        for info in archive.infolist():
            if stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise _evil(path, f"member {info.filename!r} is a link or device")
            if info.is_dir():
                _path_of(info.filename, path)
                continue
            if info.flag_bits & 1:
                raise DownloadError("is encrypted", where=str(path))
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                # the others unpack a block to whatever it becomes, at once
                raise zipfile.BadZipFile(f"compressed by method {info.compress_type}")
            # reads no more than the size that it is told, and compares the CRC-32
            opener = cast(_Opener, partial(archive.open, info))
            yield Member(info.filename, info.file_size, info.CRC), opener


def _tar_members(raw: IO[bytes], path: Path) -> Iterator[tuple[Member, _Opener]]:
    try:
        opened = _Tar.open(path, fileobj=raw)
    except tarfile.ReadError as error:
        raise DownloadError("is neither a zip nor a tar archive", where=str(path)) from error
    with opened as archive:
        count = 0
        while (info := archive.next()) is not None:
            cast(Any, archive).members.clear()  # they are kept otherwise, a kilobyte each
            count += 1
            _refuse_many(path, count)
            if info.isdir():
                _path_of(info.name, path)
            elif info.isreg():
                yield (
                    Member(info.name, info.size),
                    cast(_Opener, partial(archive.extractfile, info)),
                )
            else:
                raise _evil(path, f"member {info.name!r} is a link or device")


def _refuse_many(archive: Path, count: int) -> None:
    if count > _MOST_MEMBERS:
        raise _evil(archive, f"has more than {_MOST_MEMBERS} members, which is not plausible")


class _Bounded(io.RawIOBase):
    """An archive's bytes, unpacked or not: not many at once, and not without end."""

    def __init__(self, stream: IO[bytes], path: Path, at_once: int, what: str) -> None:
        self._stream, self._path, self._at_once, self._what = stream, path, at_once, what
        self._headers = _MOST_MEMBERS * 4 * tarfile.BLOCKSIZE

    def read(self, size: int = -1, /) -> bytes:
        if size > self._at_once:
            raise _evil(self._path, f"has a {self._what} of {size} bytes")
        block = self._stream.read(size)
        _refuse_bomb(self._path, self._stream.tell() - self._headers)
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


@contextmanager
def _explained(archive: Path) -> Iterator[None]:
    """Makes one line of what the libraries say of a broken archive."""
    try:
        yield
    except ChatBindError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk's, not the archive's
        raise DownloadError(
            f"is an archive that cannot be unpacked ({reason(error)})",
            where=str(archive),
            hint="fetch it again",
        ) from error
