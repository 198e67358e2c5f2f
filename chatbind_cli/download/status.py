"""What of a request is here: by a look, as plans and lists say it, or read anew and compared.

Asks the disk alone, and no network.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

from chatbind_cli.checkpoints.json_file import read_json
from chatbind_cli.download.catalogue import Entry
from chatbind_cli.download.manifest import OURS, Manifest, ManifestEntry, crc32_of
from chatbind_cli.download.requests import Request, entry_requests
from chatbind_cli.errors import CheckpointError, DownloadError
from chatbind_cli.jsonl import Record

_WEIGHTS = (".bin", ".safetensors", ".pth", ".pt")
_FETCH_IT = "run it without --verify"


def is_present(request: Request, manifest: Manifest | None = None) -> bool:
    """Whether what a request asks for is here: a file gets its name only once it is verified."""
    manifest = manifest or Manifest()
    if request.is_repository:
        return _repository_is_present(request, manifest)
    entry = manifest.of(request)
    if entry is not None and not entry.is_for(request):
        return False
    if request.unpack is not None and entry is not None and entry.is_unpacked_for(request):
        return True
    return request.path.is_file() and request.bytes in (None, request.path.stat().st_size)


def _repository_is_present(request: Request, manifest: Manifest) -> bool:
    """Which files a repository has is known to the hub alone; here, what was wanted of it."""
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


def planned(request: Request, *, overwrite: bool = False) -> Record:
    """What `--dry-run` says of a request; asks the disk, and not the network."""
    here = is_present(request) and not overwrite
    record: Record = {
        "name": request.name,
        "path": str(request.unpack or request.path),
        "source": request.source,
        "status": "present" if here else "planned",
    }
    if request.bytes is not None:
        record["bytes"] = request.bytes
    elif request.about is not None:
        record["about"] = request.about
    return record


def listed(entry: Entry, output: Path) -> Record:
    """What `--list` says of a catalogue entry, and how much of it is below a folder."""
    requests = entry_requests(entry, output)
    here = sum(is_present(request) for request in requests)
    record: Record = {
        "name": entry.name,
        "title": entry.title,
        "purpose": entry.purpose,
        "source": entry.source,
        "licence": entry.licence,
        "gated": entry.gated,
        "stages": list(entry.stages),
        "commands": list(entry.commands),
        "path": str(requests[0].path if requests[0].is_repository else requests[0].path.parent),
        "present": here == len(requests),
        "files_present": here,
        "files_wanted": len(requests),
    }
    if entry.files:
        record["files"] = [
            {"source": file.get("path") or file.get("url")}
            | {key: file[key] for key in ("bytes", "sha256", "md5") if key in file}
            for file in entry.files
        ]
    if entry.bytes is not None:
        record["bytes"] = entry.bytes
    elif entry.about is not None:
        record["about"] = entry.about
    return record


def files_here(request: Request, manifest: Manifest) -> list[Request]:
    """The files of a repository that came, or were to come, or else are in its folder."""
    names = [entry.path for entry in manifest.of_repository(request)]
    if not names:
        below = (path.relative_to(request.path) for path in sorted(request.path.rglob("*")))
        names = [path.as_posix() for path in below if path.parts[0] not in OURS]
        names = [name for name in names if (request.path / name).is_file()]
    if request.include:
        names = [name for name in names if any(fnmatch(name, p) for p in request.include)]
    if not names:
        raise DownloadError("is not here", where=str(request.path), hint=_FETCH_IT)
    return [request.file(name) for name in names]


def verify(
    request: Request, entry: ManifestEntry | None, advance: Callable[[int], None]
) -> tuple[ManifestEntry, str]:
    """Compares a file, or what came out of it, with what is known.

    Args:
        request: the file's.
        entry: what is noted of it.
        advance: called with the number of bytes that were read.

    Returns:
        What is here, and what was compared: as `Request.check` says it, or `crc32`.

    Raises:
        DownloadError: it is not here, or differs.
    """
    # Where only what came out is left, that is what there is to read, --unpack or not.
    came_out = request.unpack is not None or not request.path.is_file()
    if entry is not None and entry.state == "unpacked" and came_out:
        kind, digest = request.checksum or ("", "")
        if kind == "sha256" and digest != entry.sha256:
            raise DownloadError(
                "what is unpacked here is another archive",
                where=request.source,
                hint="fetch it with --overwrite",
            )
        _check_members(request, entry, advance)
        return entry, "crc32"
    if not request.path.is_file():
        raise DownloadError("is not here", where=str(request.path), hint=_FETCH_IT)
    if request.unpack is not None:
        raise DownloadError("is not unpacked", where=str(request.path), hint=_FETCH_IT)
    if entry is not None and entry.sha256 and request.checksum is None:
        request = replace(request, checksum=("sha256", entry.sha256))
    compared = request.check(fresh=True)
    # Hashed a moment ago, if it is large: then this is what was found.
    found = ManifestEntry.here(request, fresh=compared != "sha256")
    advance(found.bytes or 0)
    return found if entry is None else replace(found, source=entry.source), compared


def _check_members(request: Request, entry: ManifestEntry, advance: Callable[[int], None]) -> None:
    """Reads everything that came out of an archive and compares it with what was noted.

    Raises:
        DownloadError: files are missing or changed; the message counts them and names the first.
    """
    folder = request.unpack or request.path.parent
    wrong = [] if entry.members else ["what came out is not known"]
    for member in entry.members:
        try:
            with (folder / member.name).open("rb") as file:
                if crc32_of(file, advance=advance) != member.crc32:
                    wrong.append(f"{member.name!r} has another content")
        except OSError as error:
            wrong.append(f"{member.name!r} cannot be read ({error.strerror})")
    if wrong:
        raise DownloadError(
            f"{len(wrong)} of {len(entry.members)} files are missing or damaged, "
            f"the first: {wrong[0]}",
            where=str(folder),
            hint="fetch it again with --overwrite",
        )
