"""Unpacks archives that come from elsewhere: zip and tar, nothing outside the folder, no bombs.

Every name is looked at before the first byte is written. Files that are there already with the
same content are left alone, so a killed run goes on where it stopped.
"""

from __future__ import annotations

import lzma
import os
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, Protocol

from chatbind_cli.download.receipts import Member, crc32_of
from chatbind_cli.download.verify import check_room
from chatbind_cli.errors import DownloadError

# Pictures hardly shrink; what claims to grow a hundredfold is not an archive of pictures.
_LARGEST_RATIO = 100
_ALWAYS_FINE_BYTES = 1 << 30
_MOST_MEMBERS = 20_000_000
_BLOCK = 1 << 20
_ELSEWHERE = "use another folder; --overwrite replaces only what came out of an archive before"


class _Archive(Protocol):
    def files(self) -> Iterator[tuple[Member, Callable[[], IO[bytes]]]]:
        """The files in order, each with how to open it; refuses links and devices."""
        ...


def unpack(
    archive: Path,
    folder: Path,
    *,
    replaceable: Collection[str] = (),
    reserved: Collection[str] = (),
    begin: Callable[[int], None] = lambda n: None,
    advance: Callable[[int], None] = lambda n: None,
    on_member: Callable[[Member], None] = lambda member: None,
) -> int:
    """Unpacks a zip or tar archive (plain, gzip, bzip2, xz) into a folder.

    A file that is there already with the same content is left alone, as after a kill. For one
    process at a time.

    Args:
        archive: the file.
        folder: is made if it is not there.
        replaceable: members that came out before, and are written anew.
        reserved: names in the folder that no member may have.
        begin: called with the number of bytes that will come out, before the first does.
        advance: called with the number of bytes that are through.
        on_member: called with each file once it is there.

    Returns:
        The number of files.

    Raises:
        DownloadError: the archive is broken, has a name that leaves the folder or is reserved, a
            link, a device, or would grow beyond reason; a file of another content is in the way;
            or the disk has no room. Nothing has been written if it is a name's fault, or that of
            a file that is in the way and of another size (or, of a zip, of another content).
    """
    temporary = folder / f".{archive.name}.unpacking"
    with _reading(archive), _opened(archive) as opened:
        plan = _look_through(opened, archive, folder, {*reserved, temporary.name}, replaceable)
        check_room(folder, plan.needed, str(archive))
        begin(plan.total)
        safe: set[Path] = set()
        for number, (member, open_member) in enumerate(opened.files()):
            target = target_of(member.name, folder, archive)
            if plan.last[target] != number:
                advance(member.bytes)
                continue  # the archive holds a later file of that name
            if target.parent not in safe:
                _refuse_link_out(target.parent, folder)
                safe.add(target.parent)
            if target in plan.there:
                crc32 = _compared(member, open_member, target, archive)
                advance(member.bytes)
            else:
                crc32 = _write_member(member, open_member, target, temporary, archive, advance)
            on_member(Member(member.name, member.bytes, crc32))
    return len(plan.last)


@dataclass
class _Plan:
    """What is known of an archive before anything is written.

    Attributes:
        last: the number of the member that each file is to be; of several of a name the last.
        there: files that seem to be there already.
        total: bytes that come out.
        needed: bytes that are not there yet.
    """

    last: dict[Path, int] = field(default_factory=dict)
    there: set[Path] = field(default_factory=set)
    total: int = 0
    needed: int = 0


def _look_through(
    opened: _Archive,
    archive: Path,
    folder: Path,
    reserved: Collection[str],
    replaceable: Collection[str],
) -> _Plan:
    plan = _Plan()
    closed = {name.casefold() for name in reserved}
    other: set[Path] = set()
    for number, (member, _) in enumerate(opened.files()):
        target = target_of(member.name, folder, archive)
        if PurePosixPath(member.name).parts[0].casefold() in closed:
            raise DownloadError(
                f"member {member.name!r} has a name that is kept for notes about downloads",
                where=str(archive),
                hint="unpack it into another folder",
            )
        plan.total += member.bytes
        _refuse_bomb(archive, plan.total, number + 1)
        plan.last[target] = number
        plan.there.discard(target)
        other.discard(target)
        if not os.path.lexists(target) or (
            member.name in replaceable and target.is_file() and not target.is_symlink()
        ):
            plan.needed += member.bytes
        else:
            (plan.there if _may_be(target, member) else other).add(target)
    if other:
        raise DownloadError(
            f"{len(other)} of its files would replace others, the first is {min(other)}",
            where=str(archive),
            hint=_ELSEWHERE,
        )
    return plan


def _may_be(target: Path, member: Member) -> bool:
    """Whether a file may be the one of the archive, as far as the archive's directory tells."""
    if not target.is_file() or target.stat().st_size != member.bytes:
        return False
    return member.crc32 is None or member.crc32 == crc32_of(target)


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


def _write_member(
    member: Member,
    open_member: Callable[[], IO[bytes]],
    target: Path,
    temporary: Path,
    archive: Path,
    advance: Callable[[int], None],
) -> int:
    """Writes one file; returns its CRC-32."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary.unlink(missing_ok=True)
    # A link that lies there is not followed: "x" is for a name that is not there.
    found = 0
    try:
        with open_member() as source, temporary.open("xb") as file:
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
                found = zlib.crc32(block, found)
                advance(len(block))
        if left:
            raise DownloadError(f"member {member.name!r} is cut short", where=str(archive))
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    return found


def _compared(
    member: Member, open_member: Callable[[], IO[bytes]], target: Path, archive: Path
) -> int:
    """The CRC-32 of a member whose file is there already with its size.

    Raises:
        DownloadError: the file has another content.
    """
    if member.crc32 is not None:
        return member.crc32
    found = 0
    with open_member() as source:
        while block := source.read(_BLOCK):
            found = zlib.crc32(block, found)
    if found != crc32_of(target):
        raise DownloadError(
            f"would replace {target}, which has another content",
            where=str(archive),
            hint=_ELSEWHERE,
        )
    return found


def _refuse_link_out(place: Path, folder: Path) -> None:
    """A link that lay in the folder before must not lead a member out of it either."""
    if not place.resolve().is_relative_to(folder.resolve()):
        raise DownloadError(
            f"leads out of {folder} by a link", where=str(place), hint="remove the link"
        )


@contextmanager
def _opened(archive: Path) -> Iterator[_Archive]:
    # By its first bytes: a tar may end in a zip that it holds, which zipfile would find.
    with archive.open("rb") as file:
        begins_as_zip = file.read(2) == b"PK"
    if not begins_as_zip and tarfile.is_tarfile(archive):
        yield _Tar(archive)
    elif zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as opened:
            yield _Zip(opened, archive)
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

            yield Member(info.filename, info.file_size, info.CRC), opener


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
    except (
        zipfile.BadZipFile,
        tarfile.TarError,
        zlib.error,
        lzma.LZMAError,
        EOFError,
        NotImplementedError,
    ) as e:
        raise DownloadError(
            f"is a broken archive ({e})", where=str(archive), hint="fetch it again"
        ) from e
    except (RuntimeError, OSError) as error:
        free = shutil.disk_usage(archive.parent).free
        hint = "make room and run the same command again" if free < _BLOCK else None
        raise DownloadError(
            f"cannot be unpacked ({error})", where=str(archive), hint=hint
        ) from error
