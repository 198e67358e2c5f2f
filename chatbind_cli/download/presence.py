"""What of a request is on the disk already; looks at names, sizes and notes, not at contents."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

from chatbind_cli.download.receipts import Notes, Receipt, origin
from chatbind_cli.download.wanted import Request
from chatbind_cli.jsonl import Record

_WEIGHTS = (".bin", ".safetensors", ".pth", ".pt")


def is_present(request: Request, notes: Notes | None = None) -> bool:
    """Whether what a request asks for is here: a file gets its name only once it is verified."""
    notes = notes or Notes()
    if request.is_repository:
        return _repository_is_present(request, notes)
    receipt = notes.of(request)
    if receipt is not None and not is_for(receipt, request):
        return False
    if request.unpack is not None and is_unpacked(receipt, request):
        return True
    if not request.path.is_file():
        return False
    return request.bytes is None or request.path.stat().st_size == request.bytes


def is_for(receipt: Receipt, request: Request) -> bool:
    """Whether a file that came is the one that is asked for, or another revision of it."""
    same = receipt.sha256 is not None and receipt.sha256 == request.sha256
    return same or origin(receipt.source) == origin(request.source)


def is_unpacked(receipt: Receipt | None, request: Request) -> bool:
    """Whether the archive that is asked for has been unpacked here, by what was noted of it."""
    if receipt is None or receipt.state != "unpacked":
        return False
    if request.sha256 is not None:
        return receipt.sha256 == request.sha256
    size_fits = request.bytes in (None, receipt.bytes)
    return size_fits and receipt.source == request.source


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


def receipts_of_repository(request: Request, notes: Notes) -> list[Receipt]:
    """What came, or was to come, of a repository."""
    whole = origin(request.source)
    return [
        receipt
        for receipt in notes.below(request.path).values()
        if origin(receipt.source) == f"{whole}/{receipt.path}"
    ]


def _repository_is_present(request: Request, notes: Notes) -> bool:
    """Which files a repository has is known to the hub alone; here, what was wanted of it."""
    receipts = receipts_of_repository(request, notes)
    if receipts:
        return all(r.state == "unpacked" or (request.path / r.path).is_file() for r in receipts)
    if request.hub is not None and request.hub.kind == "dataset":
        return any(path.is_file() for path in request.path.glob("*"))
    return has_weights(request.path)


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
