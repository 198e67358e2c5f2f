"""What of a request is on the disk already; looks at names, sizes and markers, not at contents."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

from chatbind_cli.download.receipts import read_marker
from chatbind_cli.download.wanted import Request
from chatbind_cli.jsonl import Record

_WEIGHTS = (".bin", ".safetensors", ".pth", ".pt")


def is_present(request: Request) -> bool:
    """Whether what a request asks for is here: a file gets its name only once it is verified."""
    if read_marker(request) is not None:
        return True
    if request.is_repository:
        # Which files a repository has is known to the hub alone; `download` looks there.
        return has_weights(request.path)
    if not request.path.is_file():
        return False
    return request.bytes is None or request.path.stat().st_size == request.bytes


def has_weights(folder: Path) -> bool:
    """Whether a folder has weights, and where it has an index, every shard that this names."""
    if not any(path.suffix in _WEIGHTS for path in folder.glob("*")):
        return False
    for index in folder.glob("*.index.json"):
        with suppress(OSError, ValueError, KeyError, AttributeError):
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            if all((folder / str(shard)).is_file() for shard in shards):
                return True
    return not any(folder.glob("*.index.json"))


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
