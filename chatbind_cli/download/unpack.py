"""Unpacks archives that come from elsewhere: zip and tar, nothing outside the folder, no bombs.

Every name is looked at before the first byte is written. Files that are there already with the
same content are left alone, so a killed run goes on where it stopped.
"""

from __future__ import annotations

import lzma
import os
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO

from chatbind_cli.download.archives import (
    MOST_READ_BYTES,
    Archive,
    open_archive,
    refuse_bomb,
    target_of,
)
from chatbind_cli.download.receipts import Member, crc32_of
from chatbind_cli.download.verify import check_room
from chatbind_cli.errors import DownloadError

_ELSEWHERE = "use another folder; --overwrite replaces only what came out of an archive before"


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
    with _reading(archive), open_archive(archive) as opened:
        plan = _look_through(opened, archive, folder, {*reserved, temporary.name}, replaceable)
        check_room(folder, plan.needed, str(archive))
        begin(plan.total)
        safe: set[Path] = set()
        for number, (member, open_member) in enumerate(opened.files()):
            target = target_of(member.name, folder, archive)
            if plan.last.get(str(target)) != number:
                advance(member.bytes)
                continue  # the archive holds a later file of that name
            if target.parent not in safe:
                _refuse_link_out(target.parent, folder)
                safe.add(target.parent)
            if str(target) in plan.there:
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
        last: the number of the member that each file (by its path as text, of which there may be
            a million) is to be; of several of a name the last.
        there: files that seem to be there already.
        total: bytes that come out.
        needed: bytes that are not there yet.
    """

    last: dict[str, int] = field(default_factory=dict)
    there: set[str] = field(default_factory=set)
    total: int = 0
    needed: int = 0


def _look_through(
    opened: Archive,
    archive: Path,
    folder: Path,
    reserved: Collection[str],
    replaceable: Collection[str],
) -> _Plan:
    plan = _Plan()
    closed = {name.casefold() for name in reserved}
    other: set[str] = set()
    names_bytes = 0
    for number, (member, _) in enumerate(opened.files()):
        target = target_of(member.name, folder, archive)
        names_bytes += len(member.name)
        if PurePosixPath(member.name).parts[0].casefold() in closed:
            raise DownloadError(
                f"member {member.name!r} has a name that is kept for notes about downloads",
                where=str(archive),
                hint="unpack it into another folder",
            )
        plan.total += member.bytes
        refuse_bomb(archive, plan.total, number + 1, names_bytes)
        plan.last[str(target)] = number
        plan.there.discard(str(target))
        other.discard(str(target))
        if not os.path.lexists(target) or (
            member.name in replaceable and target.is_file() and not target.is_symlink()
        ):
            plan.needed += member.bytes
        else:
            (plan.there if _may_be(target, member) else other).add(str(target))
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
            while block := source.read(MOST_READ_BYTES):
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
        while block := source.read(MOST_READ_BYTES):
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
        ValueError,
        MemoryError,
    ) as e:
        raise DownloadError(
            f"is a broken archive ({e})", where=str(archive), hint="fetch it again"
        ) from e
    except (RuntimeError, OSError) as error:
        free = shutil.disk_usage(archive.parent).free
        hint = "make room and run the same command again" if free < 1 << 20 else None
        raise DownloadError(
            f"cannot be unpacked ({error})", where=str(archive), hint=hint
        ) from error
