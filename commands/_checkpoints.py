"""Options and words of the commands that work on checkpoints tensor by tensor."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from chatbind_cli.artifacts import artifact_record, emit_artifact
from chatbind_cli.console import note
from chatbind_cli.errors import UsageError

from ._base import in_group

if TYPE_CHECKING:
    from chatbind_cli.checkpoints.output_folder import Result
    from chatbind_cli.download.requests import HubRef

shard_size_option = in_group("Output")(
    "--shard-size",
    type=click.FloatRange(min=0.001),
    default=4.0,
    callback=lambda _context, _option, gib: int(gib * (1 << 30)),  # to bytes
    metavar="GIB",
    help="Largest size of a weights file, in GiB.",
)

CHECKPOINT = "PATH|OWNER/NAME"

base_option = partial(
    in_group("Input"),
    "--base",
    "--base-model-path",
    "base",
    metavar=CHECKPOINT,
    help="The base model: a folder, a weights file, or a hub repository.",
)


def emit_folder(kind: str, result: Result, *, made_by: str) -> None:
    """Says what there is to know of a folder that was made, and ends with its record."""
    for text in result.notes:
        note(text)
    emit_artifact(artifact_record(kind, result.path, made_by=made_by, sha256=result.sha256))


def checkpoint_paths(*words: str) -> list[Path]:
    """Where checkpoints lie: a path as it is; a hub repository goes to the hub's cache first.

    `checkpoints/llama` is taken for a repository only where there is no folder `checkpoints`.
    Nothing is fetched before every word has been looked at.

    Raises:
        UsageError: there is no such path, or a file of a repository is named.
        DownloadError: a repository cannot be had.
    """
    references = {word: _repository(word) for word in words}
    paths = {}
    for word, ref in references.items():
        paths[word] = Path(word)
        if ref is not None:
            from chatbind_cli.download.hub import fetch_snapshot  # noqa: PLC0415  heavy

            note(f"{word} is no path here: fetching it from the hub")
            paths[word] = fetch_snapshot(ref)
    return [paths[word] for word in words]


def _repository(word: str) -> HubRef | None:
    """The repository that a word means; None for a path."""
    path = Path(word)
    if path.exists():
        return None
    from chatbind_cli.download.requests import is_repo_id, parse_hub_ref  # noqa: PLC0415  heavy

    if not word.startswith("hf:") and (not is_repo_id(word) or path.parent.is_dir()):
        raise UsageError("no such file or folder", where=word, hint="check the path")
    ref = parse_hub_ref(word if word.startswith("hf:") else f"hf:{word}")
    if ref.file is not None:
        raise UsageError(f"{word!r} names a file", hint="name the repository")
    return ref
