"""Reads what is here anew, and compares it with all that is known of it; asks no network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from fnmatch import fnmatch

from chatbind_cli.download.manifest import MANIFEST, Came, Manifest, crc32_of
from chatbind_cli.download.requests import Request
from chatbind_cli.errors import DownloadError

_FETCH_IT = "run it without --verify"


def files_here(request: Request, manifest: Manifest) -> list[Request]:
    """The files of a repository that came, or were to come, or else are in its folder."""
    names = [came.path for came in manifest.of_repository(request)]
    if not names:
        below = (path.relative_to(request.path) for path in sorted(request.path.rglob("*")))
        names = [path.as_posix() for path in below if path.parts[0] not in (".cache", MANIFEST)]
        names = [name for name in names if (request.path / name).is_file()]
    if request.include:
        names = [name for name in names if any(fnmatch(name, p) for p in request.include)]
    if not names:
        raise DownloadError("is not here", where=str(request.path), hint=_FETCH_IT)
    return [request.file(name) for name in names]


def verify(request: Request, came: Came | None, advance: Callable[[int], None]) -> tuple[Came, str]:
    """Compares a file, or what came out of it, with what is known.

    Args:
        request: the file's.
        came: what is noted of it.
        advance: called with the number of bytes that were read.

    Returns:
        What is here, and what was compared: as `Request.check` says it, or `crc32`.

    Raises:
        DownloadError: it is not here, or differs.
    """
    # Where only what came out is left, that is what there is to read, --unpack or not.
    came_out = request.unpack is not None or not request.path.is_file()
    if came is not None and came.state == "unpacked" and came_out:
        kind, digest = request.checksum or ("", "")
        if kind == "sha256" and digest != came.sha256:
            raise DownloadError(
                "what is unpacked here is another archive",
                where=request.source,
                hint="fetch it with --overwrite",
            )
        _check_members(request, came, advance)
        return came, "crc32"
    if not request.path.is_file():
        raise DownloadError("is not here", where=str(request.path), hint=_FETCH_IT)
    if request.unpack is not None:
        raise DownloadError("is not unpacked", where=str(request.path), hint=_FETCH_IT)
    if came is not None and came.sha256 and request.checksum is None:
        request = replace(request, checksum=("sha256", came.sha256))
    compared = request.check(fresh=True)
    # Hashed a moment ago, if it is large: then this is what was found.
    found = Came.here(request, fresh=compared != "sha256")
    advance(found.bytes or 0)
    return found if came is None else replace(found, source=came.source), compared


def _check_members(request: Request, came: Came, advance: Callable[[int], None]) -> None:
    """Reads everything that came out of an archive and compares it with what was noted.

    Raises:
        DownloadError: files are missing or changed; the message counts them and names the first.
    """
    folder = request.unpack or request.path.parent
    wrong = [] if came.members else ["what came out is not known"]
    for member in came.members:
        try:
            with (folder / member.name).open("rb") as file:
                if crc32_of(file, advance=advance) != member.crc32:
                    wrong.append(f"{member.name!r} has another content")
        except OSError as error:
            wrong.append(f"{member.name!r} cannot be read ({error.strerror})")
    if wrong:
        raise DownloadError(
            f"{len(wrong)} of {len(came.members)} files are missing or damaged, "
            f"the first: {wrong[0]}",
            where=str(folder),
            hint="fetch it again with --overwrite",
        )
