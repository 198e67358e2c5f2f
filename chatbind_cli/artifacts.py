"""Artefact records: how one command tells the next in a pipe what it has made and where.

`{"artifact": "projector", "path": ..., "sha256": ..., "made_by": ...}` ends the output of every
command that makes a file or folder; where a command takes one, `-` reads that record.
"""

from __future__ import annotations

import sys
from collections.abc import Collection
from pathlib import Path
from typing import IO, Any

from chatbind_cli import worker
from chatbind_cli.errors import CheckpointError
from chatbind_cli.jsonl import Record, dumps, read_records


def emit_record(record: Record, stream: IO[str] | None = None) -> None:
    """Writes a record to stdout at once; workers other than the first stay silent.

    Args:
        record: what is written.
        stream: the true stdout, where something else stands in its place.
    """
    stream = stream or sys.stdout
    if worker.rank() == 0:
        stream.write(dumps(record) + "\n")
        stream.flush()


def emit_artifact(record: Record) -> None:
    """Writes the last record of a command that made something; in words for a person."""
    if not sys.stdout.isatty():
        emit_record(record)
    elif worker.rank() == 0:
        digest = f"  (SHA-256 {record['sha256'][:12]}...)" if "sha256" in record else ""
        sys.stdout.write(f"{record['artifact']}: {record['path']}{digest}\n")
        sys.stdout.flush()


def artifact_record(
    kind: str, path: Path, *, made_by: str, sha256: str | None = None, **extra: Any
) -> Record:
    """The last record of a command that made something.

    Args:
        kind: `projector`, `checkpoint`, `model`, `store`, `target`, `delta`, `toy`.
        path: the file or folder; written as an absolute path, since the next command of a pipe
            may run in another folder.
        made_by: the command.
        sha256: hash of the file, or of the folder's weights.
        extra: further keys that readers may use.
    """
    record: Record = {"artifact": kind, "path": str(Path(path).resolve())}
    if sha256 is not None:
        record["sha256"] = sha256
    return {**record, "made_by": made_by, **extra}


def resolve_artifact(value: str | Path, kinds: Collection[str]) -> Path:
    """The path that an option names, or the one that the stage before in the pipe made.

    Args:
        value: a path, or `-` for an artefact record on standard input.
        kinds: the kinds of artefact that will do.

    Raises:
        CheckpointError: standard input ended without such a record, or names a path that is not
            there.
    """
    if str(value) != "-":
        return Path(value)
    found: str | None = None
    for record, _ in read_records("-"):
        if record.get("artifact") in kinds:
            found = str(record.get("path", ""))
    if found is None:
        raise CheckpointError(
            f"standard input ended without a record of a {' or '.join(sorted(kinds))}",
            hint="the stage before it in the pipe did not finish; see its message",
        )
    if not Path(found).exists():
        raise CheckpointError("the stage before named it, but it is not there", where=found)
    return Path(found)
