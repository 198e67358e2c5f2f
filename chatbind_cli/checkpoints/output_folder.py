"""A folder of weights in the making: whole or not at all, and continued after a kill.

The folder has a fixed name beside its target and a progress file that says what it is the
beginning of; a beginning of something else is thrown away. One process at a time may work on it.
It carries a record (`folders`) from the start, so that a folder of somebody else's that has this
name is told from it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import StateDictSplit, split_state_dict_into_shards_factory

import chatbind_cli
from chatbind_cli.checkpoints.checkpoint import INDEX_NAMES, Checkpoint, open_checkpoint
from chatbind_cli.checkpoints.manifest import read_manifest, write_manifest
from chatbind_cli.checkpoints.safetensors_file import TensorInfo
from chatbind_cli.console import Progress
from chatbind_cli.errors import ChatBindError, WeightsError
from chatbind_cli.files import check_room, lock_file, replace_text, sha256_text
from chatbind_cli.folders import (
    RECORD,
    clear_leftovers,
    is_noted,
    note_made,
    put_folder,
    refuse_foreign,
    refuse_taken,
    remove_folder,
)

DEFAULT_SHARD_BYTES = 4 << 30
_PROGRESS = "progress.json"
_LOCK = "lock"

# What is remembered of a finished file: `files` are others that belong to it.
Facts = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Result:
    """A folder that was made.

    Attributes:
        path: the folder.
        sha256: the fingerprint of its weights.
        notes: what the user should know about it.
    """

    path: Path
    sha256: str
    notes: tuple[str, ...] = ()


def make_folder(
    target: Path,
    tensors: Mapping[str, TensorInfo],
    write_file: Callable[[Path, list[str], Progress], Facts],
    finish: Callable[[Path, list[Facts]], dict[str, Any]],
    *,
    made_by: str,
    label: str,
    inputs: Mapping[str, Any],
    shard_bytes: int,
    overwrite: bool,
    notes: Sequence[str] = (),
) -> Result:
    """Makes a folder of weights, or goes on where an earlier run of the same work was stopped.

    Args:
        target: the folder to make.
        tensors: name -> shape and dtype of every tensor that is to be written.
        write_file: writes one file of weights with these tensors, and returns what is to be
            remembered of it.
        finish: writes what lies beside the weights, and returns the manifest.
        made_by: the command.
        label: what the progress line calls the work.
        inputs: everything that the content follows from, as JSON; other inputs start anew.
        shard_bytes: largest size of an output file.
        overwrite: whether a folder that this command made may be replaced.
        notes: those of the result; both functions may add to them.

    Raises:
        ChatBindError: the folder is there already, another process works on it, or the disk has no
            room for it.
        WeightsError: the inputs are not what they should be, or the disk gets full.
    """
    shards = plan_shards(tensors, shard_bytes)
    files = shards.filename_to_tensors
    facts = {"made_by": made_by, "version": chatbind_cli.__version__, "files": files, **inputs}
    task = sha256_text(json.dumps(facts, sort_keys=True))
    made = None if overwrite else made_already(target, task, tensors)
    if made is not None:
        return Result(target, made.sha256, (*made.notes, *notes))
    place = target.resolve()  # "." has no name
    refuse_taken(place, made_by=made_by, overwrite=overwrite)
    with _beginning(place, task, made_by=made_by) as (folder, done):
        left = {file: names for file, names in files.items() if file not in done}
        needed = sum(tensors[name].nbytes for names in left.values() for name in names)
        check_room(folder, needed, where=str(target))
        with Progress(needed >> 20, label, "MiB") as progress:
            for file, names in left.items():
                done[file] = write_file(folder / file, names, progress)
                replace_text(folder / _PROGRESS, json.dumps({"task": task, "done": done}))
        if shards.is_sharded:
            (folder / INDEX_NAMES[0]).write_text(index_of(shards), encoding="utf-8")
        manifest = finish(folder, list(done.values()))
        write_manifest(folder, {**manifest, "task": task}, made_by=made_by)
        refuse_foreign(place, made_by=made_by)
        (folder / _PROGRESS).unlink(missing_ok=True)
        put_folder(folder, place, made_by=made_by)
        (place / _LOCK).unlink()
    return Result(target, manifest["sha256"], tuple(notes))


def made_already(
    target: Path, task: str, tensors: Mapping[str, TensorInfo] | None = None
) -> Result | None:
    """What an earlier run of the same work made, if its folder is there and whole.

    `task` is the hash of all that its content follows from; it has to hold `tensors`, whose data
    are not looked at.
    """
    manifest = read_manifest(target) if target.is_dir() else {}
    if manifest.get("task") != task:
        return None
    try:
        with open_checkpoint(target) as found:
            if tensors is not None and found.tensors != tensors:
                return None
    except ChatBindError:
        return None
    _clear_replaced(target.resolve())
    return Result(target, manifest["sha256"], ("it is here already",))


def plan_shards(tensors: Mapping[str, TensorInfo], max_bytes: int) -> StateDictSplit:
    """Cuts tensors, in their order, into files of at most `max_bytes` (or one larger tensor)."""
    return split_state_dict_into_shards_factory(
        dict(tensors),
        get_storage_size=lambda info: info.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_bytes,
    )


def index_of(shards: StateDictSplit) -> str:
    """The content of `model.safetensors.index.json` for these shards."""
    index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
    return json.dumps(index, indent=2) + "\n"


def source_facts(checkpoint: Checkpoint) -> dict[str, Any]:
    """What tells one state of a checkpoint's files from another without reading them."""
    files = {}
    for file in checkpoint.files:
        stat = file.path.stat()
        files[file.path.name] = [stat.st_size, stat.st_mtime_ns]
    return {"path": str(checkpoint.path.resolve()), "files": files}


@contextmanager
def _beginning(target: Path, task: str, *, made_by: str) -> Iterator[tuple[Path, dict[str, Facts]]]:
    """The folder in the making, for this process alone, and what is recorded of its whole files.

    Those of an earlier run of the same work are kept, and nothing else. An error keeps what is
    done.
    """
    folder = _beginning_of(target)
    if folder.is_symlink():
        raise WeightsError("is a link", where=str(folder), hint="remove it")
    if not is_noted(folder, RECORD):
        refuse_foreign(folder, made_by=made_by)
    clear_leftovers(target)
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder / _LOCK, os.O_CREAT | os.O_RDWR, 0o644)
    try:
        lock_file(lock, target)
        try:
            progress = json.loads((folder / _PROGRESS).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            progress = {}
        done = progress["done"] if progress.get("task") == task else {}
        more = (name for facts in done.values() for name in facts.get("files", ()))
        kept = {_LOCK, _PROGRESS, RECORD, *done, *more}
        for child in folder.iterdir():
            if child.is_dir() and not child.is_symlink():
                shutil.rmtree(child)
            elif child.name not in kept:
                child.unlink()
        note_made(folder, (), made_by=made_by)
        yield folder, done
    finally:
        os.close(lock)


def _clear_replaced(target: Path) -> None:
    """Removes what a run left that was killed when it had put a finished folder in its place."""
    clear_leftovers(target)
    # one in the making has a lock
    if not (_beginning_of(target) / _LOCK).exists():
        remove_folder(_beginning_of(target))
        if (target / _LOCK).is_file() and (target / _LOCK).stat().st_size == 0:
            (target / _LOCK).unlink()


def _beginning_of(target: Path) -> Path:
    return target.parent / f".{target.name}.partial"
