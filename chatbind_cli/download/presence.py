"""What of a request is on the disk already; looks at names, sizes and markers, not at contents."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

from chatbind_cli.download.wanted import Request
from chatbind_cli.files import replace_file
from chatbind_cli.jsonl import Record

_WEIGHTS = (".bin", ".safetensors", ".pth", ".pt")


def is_present(request: Request) -> bool:
    """Whether what a request asks for is here: a file gets its name only once it is verified."""
    if read_marker(request) is not None:
        return True
    if request.is_repository:
        # Which files a repository has is known to the hub alone; `download` looks there.
        return request.path.is_dir() and any(
            path.suffix in _WEIGHTS for path in request.path.iterdir()
        )
    if not request.path.is_file():
        return False
    return request.bytes is None or request.path.stat().st_size == request.bytes


def planned(request: Request) -> Record:
    """What `--dry-run` says of a request; asks the disk, and not the network."""
    record: Record = {
        "name": request.name,
        "path": str(request.unpack or request.path),
        "source": request.source,
        "status": "present" if is_present(request) else "planned",
    }
    if request.bytes is not None:
        record["bytes"] = request.bytes
    elif request.about is not None:
        record["about"] = request.about
    return record


def read_marker(request: Request) -> Record | None:
    """What is known of an archive that was unpacked here, and may be gone since."""
    if request.unpack is None or not request.unpack.is_dir():
        return None
    with suppress(OSError, ValueError, KeyError):
        marker = json.loads(_marker_path(request).read_text(encoding="utf-8"))
        if marker.get("source") == request.source:
            return {key: marker[key] for key in ("bytes", "sha256", "files")}
    return None


def write_marker(request: Request, facts: Record) -> None:
    """Remembers that an archive has been unpacked."""
    with replace_file(_marker_path(request)) as temporary:
        temporary.write_text(json.dumps({"source": request.source, **facts}), encoding="utf-8")


def _marker_path(request: Request) -> Path:
    return request.path.with_name(f".{request.path.name}.unpacked.json")
