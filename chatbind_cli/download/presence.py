"""What of a request is here: by the disk and what is noted of it, without a network."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Literal

from chatbind_cli.checkpoints.json_file import read_json
from chatbind_cli.download.manifest import OURS, Manifest, ManifestEntry
from chatbind_cli.download.requests import Request, matches
from chatbind_cli.errors import CheckpointError, DownloadError

_WEIGHTS = (".bin", ".safetensors", ".pth", ".pt")
FETCH_IT = "run it without --verify"

Found = Literal["here", "to unpack", "to fetch", "in the way"]


def look(
    request: Request,
    entry: ManifestEntry | None,
    *,
    closely: bool = False,
    overwrite: bool = False,
) -> Found:
    """What there is to do about one file; asks the disk alone.

    Args:
        request: the file's.
        entry: what is noted of it.
        closely: compare its hash, too, or look for everything that came out of it.
        overwrite: what came before is to come again.

    Returns:
        `in the way` where what is there came from elsewhere, or did not come by `download`.
    """
    path = request.path
    if entry is not None:
        if overwrite:
            return "to fetch"
        if not entry.is_for(request):
            there = entry.state == "unpacked" or (entry.state == "here" and path.is_file())
            return "in the way" if there else "to fetch"
        if _is_unpacked(request, entry, closely):
            return "here"
    right = _is_right(request, closely)
    # A file without a note may be replaced only by what is the same.
    same = right and (request.checksum is not None or not overwrite)
    if entry is None and os.path.lexists(path) and not same:
        return "in the way"
    if overwrite or not right:
        return "to fetch"
    return "here" if request.unpack is None else "to unpack"


def _is_right(request: Request, closely: bool) -> bool:
    if not request.path.is_file():
        return False
    with suppress(DownloadError):
        (request if closely else replace(request, checksum=None)).check()
        return True
    return False


def _is_unpacked(request: Request, entry: ManifestEntry, closely: bool) -> bool:
    """Whether the archive that is asked for is unpacked; reads no content."""
    if request.unpack is None or entry.state != "unpacked":
        return False
    if request.checksum is not None and request.checksum[0] == "sha256":
        same = request.checksum[1] == entry.sha256
    else:
        same = request.bytes in (None, entry.bytes) and request.source == entry.source
    if not same or not closely:
        return same
    with suppress(OSError):
        sizes = ((request.unpack / m.name).stat().st_size == m.bytes for m in entry.members)
        return bool(entry.members) and all(sizes)
    return False


def is_present(request: Request, manifest: Manifest) -> bool:
    """Whether what a request asks for is here, so far as a look can say."""
    if not request.is_repository:
        return look(request, manifest.of(request)) in ("here", "to unpack")
    # Which files a repository has is known to the hub alone; here, what was wanted of it.
    if known := manifest.of_repository(request):
        return all(c.state == "unpacked" or (request.path / c.path).is_file() for c in known)
    if request.hub is not None and request.hub.kind == "dataset":
        return any(path.is_file() for path in request.path.glob("*"))
    return has_weights(request.path)


def has_weights(folder: Path) -> bool:
    """Whether a folder has weights, and where it has an index, every shard that this names."""
    if not any(path.suffix in _WEIGHTS for path in folder.glob("*")):
        return False
    for index in folder.glob("*.index.json"):
        with suppress(CheckpointError, KeyError, AttributeError):
            shards = set(read_json(index)["weight_map"].values())
            if all((folder / str(shard)).is_file() for shard in shards):
                return True
    return not any(folder.glob("*.index.json"))


def files_here(request: Request, manifest: Manifest) -> list[Request]:
    """The files of a repository that came, or were to come, or else are in its folder."""
    names = [entry.path for entry in manifest.of_repository(request)]
    if not names:
        below = (path.relative_to(request.path) for path in sorted(request.path.rglob("*")))
        names = [path.as_posix() for path in below if path.parts[0] not in OURS]
        names = [name for name in names if (request.path / name).is_file()]
    if request.include:
        names = [name for name in names if matches(name, request.include)]
    if not names:
        raise DownloadError("is not here", where=str(request.path), hint=FETCH_IT)
    return [request.file(name) for name in names]
