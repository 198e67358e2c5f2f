"""Zip and tar archives as lists of files, read as if they were out for harm.

What an archive says of itself is bounded before it is read: the length of a header and of a name,
the directory, the number of members, the bytes that come out. Writes nothing.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Any, Protocol, cast

from chatbind_cli.download.receipts import Member
from chatbind_cli.errors import DownloadError

# Pictures hardly shrink; what claims to grow a hundredfold is not an archive of pictures.
_LARGEST_RATIO = 100
_ALWAYS_FINE_BYTES = 1 << 30
_MOST_MEMBERS = 1_000_000
_MOST_NAMES_BYTES = 128 << 20  # of all names together
_LONGEST_NAME = 4096  # that a file system takes
MOST_READ_BYTES = 1 << 17  # of a tar at once; what asks for more is a header, and no honest one
_LARGEST_DIRECTORY_BYTES = 64 << 20  # of a zip: half a million members and more


class Archive(Protocol):
    """An archive that is open."""

    def files(self) -> Iterator[tuple[Member, Callable[[], IO[bytes]]]]:
        """The files in order, each with how to open it; refuses links and devices."""
        ...


def target_of(name: str, folder: Path, archive: Path) -> Path:
    """Where a member goes.

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
        raise DownloadError(
            f"member {name!r} would leave the folder", where=str(archive), hint="do not trust it"
        )
    if not path.parts:
        raise DownloadError("has a member without a name", where=str(archive))
    return folder.joinpath(*path.parts)


def refuse_bomb(archive: Path, total: int, count: int, names_bytes: int = 0) -> None:
    """Refuses an archive that claims more than archives of its size hold.

    Raises:
        DownloadError: so many bytes or members are not plausible.
    """
    if count > _MOST_MEMBERS or names_bytes > _MOST_NAMES_BYTES:
        raise DownloadError(
            f"has more than {count - 1} members, which is not plausible",
            where=str(archive),
            hint="do not trust it",
        )
    if total > _ALWAYS_FINE_BYTES and total > (limit := _plausible_bytes(archive)):
        raise DownloadError(
            f"would unpack to more than {limit / 1e9:.1f} GB, which is not plausible",
            where=str(archive),
            hint="do not trust it",
        )


def _plausible_bytes(archive: Path) -> int:
    return max(_ALWAYS_FINE_BYTES, _LARGEST_RATIO * archive.stat().st_size)


@contextmanager
def open_archive(archive: Path) -> Iterator[Archive]:
    """Opens a zip or tar archive.

    Raises:
        DownloadError: it is neither.
    """
    # By its first bytes: a tar may end in a zip that it holds, which zipfile would find.
    with archive.open("rb") as file:
        begins_as_zip = file.read(2) == b"PK"
    if not begins_as_zip and _is_tar(archive):
        yield _Tar(archive)
    elif zipfile.is_zipfile(archive):
        with (
            _DirectoryReader(io.FileIO(archive)) as file,
            zipfile.ZipFile(cast(IO[bytes], file)) as opened,
        ):
            yield _Zip(opened, archive)
    else:
        raise DownloadError("is neither a zip nor a tar archive", where=str(archive))


class _DirectoryReader(io.BufferedReader):
    """A zip whose directory is read at once, in one piece as long as the archive says."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > _LARGEST_DIRECTORY_BYTES:
            raise zipfile.BadZipFile(f"a directory of {size} bytes")
        return super().read(size)


class _Zip:
    def __init__(self, archive: zipfile.ZipFile, path: Path) -> None:
        self.archive = archive
        self.path = path

    def files(self) -> Iterator[tuple[Member, Callable[[], IO[bytes]]]]:
        """See `Archive`."""
        refuse_bomb(self.path, 0, len(self.archive.infolist()))
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
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                # the others unpack a block to whatever it becomes, at once
                raise zipfile.BadZipFile(f"compressed by method {info.compress_type}")

            def opener(info: zipfile.ZipInfo = info) -> IO[bytes]:
                return self.archive.open(info)

            yield Member(info.filename, info.file_size, info.CRC), opener


class _Tar:
    def __init__(self, path: Path) -> None:
        self.path = path

    def files(self) -> Iterator[tuple[Member, Callable[[], IO[bytes]]]]:
        """See `Archive`; opened anew each time, since a compressed tar reads forward only."""
        with _open_tar(self.path) as archive:
            count = 0
            while (info := archive.next()) is not None:
                # they are kept otherwise, a kilobyte each
                cast(Any, archive).members.clear()
                count += 1
                refuse_bomb(self.path, 0, count)
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


class _TarReader(io.RawIOBase):
    """The bytes of a tar, compressed or not, forward only and not without end."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            begins = file.read(6)
        opened = (open_ for magic, open_ in _COMPRESSED if begins.startswith(magic))
        self._unpack = next(opened, None)
        self._stream: IO[bytes] = (self._unpack or open)(path, "rb")
        self._at = 0
        self._limit = _plausible_bytes(path) + _MOST_MEMBERS * 4 * tarfile.BLOCKSIZE
        self._path = path

    def read(self, size: int = -1, /) -> bytes:
        if size > MOST_READ_BYTES:
            raise DownloadError(
                f"has a header of {size} bytes", where=str(self._path), hint="do not trust it"
            )
        block = self._stream.read(size)
        self._at += len(block)
        if self._at > self._limit:
            refuse_bomb(self._path, self._at, 0)
        return block

    def tell(self) -> int:
        return self._at

    def seek(self, position: int, whence: int = io.SEEK_SET, /) -> int:
        if self._unpack is None:
            self._at = self._stream.seek(position)
        while self._at < position and self.read(min(MOST_READ_BYTES, position - self._at)):
            pass
        return self._at

    def close(self) -> None:
        self._stream.close()
        super().close()


_COMPRESSED: tuple[tuple[bytes, Any], ...] = (
    (b"\x1f\x8b", gzip.open),
    (b"BZh", bz2.open),
    (b"\xfd7zXZ\0", lzma.open),
    (b"\x5d\0\0", lzma.open),
)


@contextmanager
def _open_tar(path: Path) -> Iterator[tarfile.TarFile]:
    with _TarReader(path) as reader, tarfile.open(fileobj=reader, mode="r:") as archive:
        yield archive


def _is_tar(path: Path) -> bool:
    try:
        with _open_tar(path):
            return True
    except (tarfile.TarError, zlib.error, lzma.LZMAError, EOFError, OSError):
        return False
