"""Makes a target or a delta from two checkpoints in pieces, shard by shard.

Memory holds a few pieces of a few megabytes, whatever the size of the model. Hashes of everything
that passes are taken on the way, beside the arithmetic, so identity costs no further read.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch

from chatbind_cli.console import Progress
from chatbind_cli.errors import WeightsError
from chatbind_cli.weights.checkpoint import CHUNK_ELEMENTS, Checkpoint, is_weights_file
from chatbind_cli.weights.delta import Plan, Step
from chatbind_cli.weights.identity import PASSPORT_NAME
from chatbind_cli.weights.writer import SafetensorsWriter, Shard, bytes_of

_LARGEST_SIDE_FILE = 64 << 20


class Arithmetic(Protocol):
    """What is done to the elements that base and delta (or target) share."""

    def combine(
        self, step: Step, start: int, theirs: torch.Tensor, ours: torch.Tensor
    ) -> torch.Tensor:
        """The result for a 1-D piece that starts at element `start` of the tensor.

        Args:
            step: the tensor's step of the plan.
            start: position of the piece in the tensor.
            theirs: the base's elements.
            ours: the delta's (or target's) elements.
        """
        ...

    def rotary(self, step: Step) -> torch.Tensor:
        """The whole buffer of rotary frequencies for a step that is one."""
        ...


@dataclass
class Hashes:
    """SHA-256 of every tensor that passed: of the base, of the other input, of the result."""

    base: dict[str, str] = field(default_factory=dict)
    other: dict[str, str] = field(default_factory=dict)
    result: dict[str, str] = field(default_factory=dict)

    def update(self, more: Hashes) -> None:
        """Takes over the hashes of another part."""
        self.base.update(more.base)
        self.other.update(more.other)
        self.result.update(more.result)


class _Digest:
    """A hash that is fed on another thread, one piece behind."""

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self._pool = pool
        self._hash = hashlib.sha256()
        self._pending: Future[None] | None = None

    def feed(self, piece: torch.Tensor) -> None:
        if self._pending is not None:
            self._pending.result()
        self._pending = self._pool.submit(self._hash.update, bytes_of(piece))

    def hexdigest(self) -> str:
        if self._pending is not None:
            self._pending.result()
        return self._hash.hexdigest()


def stream_shard(
    path: Path,
    shard: Shard,
    plan: Plan,
    base: Checkpoint,
    other: Checkpoint,
    arithmetic: Arithmetic,
    progress: Progress,
) -> Hashes:
    """Writes one shard of the result and returns the hashes of what went through.

    Args:
        path: the file to write.
        shard: the tensors that go into it.
        plan: how base and other fit together.
        base: the base language model.
        other: the delta, or the target.
        arithmetic: what to do.
        progress: advanced by the bytes written, in MiB.

    Raises:
        WeightsError: an input is broken or the disk is full.
    """
    steps = {step.name: step for step in plan.steps}
    hashes = Hashes()
    infos = {name: steps[name].info for name in shard.tensors}
    pool = ThreadPoolExecutor(max_workers=2, thread_name_prefix="hash")
    with pool, SafetensorsWriter(path, infos) as writer:
        for name in writer.order:
            step = steps[name]
            if step.rotary:
                writer.append(arithmetic.rotary(step))
            else:
                for piece in _pieces(step, base, other, arithmetic, hashes, pool):
                    progress.advance(len(writer.append(piece)) >> 20)
    return hashes


def _pieces(
    step: Step,
    base: Checkpoint,
    other: Checkpoint,
    arithmetic: Arithmetic,
    hashes: Hashes,
    pool: ThreadPoolExecutor,
) -> Iterator[torch.Tensor]:
    """The result's elements in order, in 1-D pieces; leaves the three hashes when it is through."""
    of_base, of_other, of_result = _Digest(pool), _Digest(pool), _Digest(pool)
    numel = step.info.numel
    for start in range(0, numel, CHUNK_ELEMENTS):
        stop = min(start + CHUNK_ELEMENTS, numel)
        ours = other.read_flat(step.name, start, stop)
        of_other.feed(ours)
        result = ours
        shared = min(stop, step.overlap) - start
        if step.base is not None and shared > 0:
            theirs = base.read_flat(step.base, start, start + shared)
            of_base.feed(theirs)
            result = arithmetic.combine(step, start, theirs, ours[:shared])
            if shared < ours.numel():
                result = torch.cat((result, ours[shared:]))
        of_result.feed(result)
        yield result
    hashes.other[step.name] = of_other.hexdigest()
    hashes.result[step.name] = of_result.hexdigest()
    if step.base is not None:
        hashes.base[step.base] = of_base.hexdigest()


def copy_side_files(source: Path, destination: Path) -> None:
    """Copies config, tokenizer, licence and the like: every small file that is not weights."""
    for file in sorted(source.iterdir()):
        if (
            file.is_file()
            and not file.name.startswith(".")
            and file.name != PASSPORT_NAME
            and not is_weights_file(file.name)
            and file.stat().st_size <= _LARGEST_SIDE_FILE
        ):
            shutil.copyfile(file, destination / file.name)


def refuse_full_disk(folder: Path, needed: int) -> None:
    """Refuses before a byte is written what cannot fit.

    Args:
        folder: the folder that will be written in (or its nearest parent that exists).
        needed: bytes to come.

    Raises:
        WeightsError: the disk has less room than that.
    """
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise WeightsError(
            f"needs {needed / 1e9:.1f} GB of disk and {free / 1e9:.1f} GB are free",
            where=str(folder),
            hint="make room, or write to another disk",
        )


def source_facts(checkpoint: Checkpoint) -> Mapping[str, object]:
    """What tells one state of a checkpoint's files from another without reading them."""
    files = {}
    for file in checkpoint.files:
        stat = file.path.stat()
        files[file.path.name] = [stat.st_size, stat.st_mtime_ns]
    return {"path": str(checkpoint.path.resolve()), "files": files}
