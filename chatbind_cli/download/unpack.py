"""Unpacks archives that come from elsewhere: zip and tar, nothing outside the folder, no bombs.

Every name is looked at before the first byte is written. Members that are there already with
their full size are left alone, so a killed run goes on where it stopped.
"""

from __future__ import annotations

import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Protocol

from chatbind_cli.download.verify import check_room
from chatbind_cli.errors import DownloadError

# Pictures hardly shrink; what claims to grow a hundredfold is not an archive of pictures.
_LARGEST_RATIO = 100
_ALWAYS_FINE_BYTES = 1 << 30
_MOST_MEMBERS = 20_000_000
_BLOCK = 1 << 20


@dataclass(frozen=True, slots=True)
class Member:
    """A file of an archive: its name, and its size in bytes as the archive tells it."""

    name: str
    bytes: int


class _Archive(Protocol):
    def files(self) -> Iterator[tuple[Member, Callable[[], IO[bytes]]]]:
        """The files in order, each with how to open it; refuses links and devices."""
        ...


def unpack(archive: Path, folder: Path, *, advance: Callable[[int], None] = lambda n: None) -> int:
    """Unpacks a zip or tar archive (plain, gzip, bzip2, xz) into a folder.

    Args:
        archive: the file.
        folder: is made if it is not there.
        advance: called with the number of bytes that are through.

    Returns:
        The number of files.

    Raises:
        DownloadError: the archive is broken, has a name that leaves the folder, a link, a device,
            or would grow beyond reason; or the disk has no room. The last of these apart,
            nothing has been written if a name was at fault.
    """
    with _reading(archive), _opened(archive) as opened:
        total = 0
        for count, (member, _) in enumerate(opened.files(), 1):
            target_of(member.name, folder, archive)
            total += member.bytes
            _refuse_bomb(archive, total, count)
        check_room(folder, total - _size_below(folder, total), str(archive))
        count = 0
        for member, open_member in opened.files():
            target = target_of(member.name, folder, archive)
            if not (target.is_file() and target.stat().st_size == member.bytes):
                _refuse_link_out(target, folder)
                _write_member(member, open_member, target, archive)
            advance(member.bytes)
            count += 1
    return count


def target_of(name: str, folder: Path, archive: Path) -> Path:
    """Where a member goes.

    Raises:
        DownloadError: its name leads out of the folder.
    """
    path = PurePosixPath(name)
    drive = len(name) > 1 and name[1] == ":"
    if path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name or drive:
        raise DownloadError(
            f"member {name!r} would leave the folder", where=str(archive), hint="do not trust it"
        )
    if not path.parts:
        raise DownloadError("has a member without a name", where=str(archive))
    return folder.joinpath(*path.parts)


def _refuse_bomb(archive: Path, total: int, count: int) -> None:
    limit = max(_ALWAYS_FINE_BYTES, _LARGEST_RATIO * archive.stat().st_size)
    if total > limit or count > _MOST_MEMBERS:
        raise DownloadError(
            f"would unpack to more than {min(total, limit) / 1e9:.1f} GB, which is not plausible",
            where=str(archive),
            hint="do not trust it",
        )


def _size_below(folder: Path, needed: int) -> int:
    """Bytes that an earlier run has put there; only asked for where there may be any."""
    if not folder.is_dir():
        return 0
    return min(needed, sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()))


def _write_member(
    member: Member, open_member: Callable[[], IO[bytes]], target: Path, archive: Path
) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.part")
    try:
        with open_member() as source, temporary.open("wb") as file:
            left = member.bytes
            while block := source.read(_BLOCK):
                left -= len(block)
                if left < 0:
                    raise DownloadError(
                        f"member {member.name!r} is larger than the archive says",
                        where=str(archive),
                        hint="do not trust it",
                    )
                file.write(block)
        if left:
            raise DownloadError(f"member {member.name!r} is cut short", where=str(archive))
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def _refuse_link_out(target: Path, folder: Path) -> None:
    """A link that lay in the folder before must not lead a member out of it either."""
    if not target.parent.resolve().is_relative_to(folder.resolve()):
        raise DownloadError(
            f"leads out of {folder} by a link", where=str(target.parent), hint="remove the link"
        )


@contextmanager
def _opened(archive: Path) -> Iterator[_Archive]:
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as opened:
            yield _Zip(opened, archive)
    elif tarfile.is_tarfile(archive):
        yield _Tar(archive)
    else:
        raise DownloadError("is neither a zip nor a tar archive", where=str(archive))


class _Zip:
    def __init__(self, archive: zipfile.ZipFile, path: Path) -> None:
        self.archive = archive
        self.path = path

    def files(self) -> Iterator[tuple[Member, Callable[[], IO[bytes]]]]:
        """See `_Archive`."""
        for info in self.archive.infolist():
            kind = stat.S_IFMT(info.external_attr >> 16)
            if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise DownloadError(
                    f"member {info.filename!r} is a link or device",
                    where=str(self.path),
                    hint="do not trust it",
                )
            if info.is_dir():
                target_of(info.filename, Path(), self.path)
                continue
            if info.flag_bits & 1:
                raise DownloadError("is encrypted", where=str(self.path))

            def opener(info: zipfile.ZipInfo = info) -> IO[bytes]:
                return self.archive.open(info)

            yield Member(info.filename, info.file_size), opener


class _Tar:
    def __init__(self, path: Path) -> None:
        self.path = path

    def files(self) -> Iterator[tuple[Member, Callable[[], IO[bytes]]]]:
        """See `_Archive`; opened anew each time, since a compressed tar reads forward only."""
        with tarfile.open(self.path, "r:*") as archive:
            for info in archive:
                if info.isdir():
                    target_of(info.name, Path(), self.path)
                    continue
                if not info.isreg():
                    raise DownloadError(
                        f"member {info.name!r} is a link or device",
                        where=str(self.path),
                        hint="do not trust it",
                    )

                def opener(info: tarfile.TarInfo = info) -> IO[bytes]:
                    stream = archive.extractfile(info)
                    if stream is None:
                        raise tarfile.TarError(f"{info.name} has no data")
                    return stream

                yield Member(info.name, info.size), opener


@contextmanager
def _reading(archive: Path) -> Iterator[None]:
    try:
        yield
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, NotImplementedError) as e:
        raise DownloadError(
            f"is a broken archive ({e})", where=str(archive), hint="fetch it again"
        ) from e
    except (RuntimeError, OSError) as error:
        free = shutil.disk_usage(archive.parent).free
        hint = "make room and run the same command again" if free < _BLOCK else None
        raise DownloadError(
            f"cannot be unpacked ({error})", where=str(archive), hint=hint
        ) from error
