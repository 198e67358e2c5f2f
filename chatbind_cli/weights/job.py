"""The common course of `apply-delta` and `make-delta`: plan, check, stream, sign, rename."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import chatbind_cli
from chatbind_cli.console import Progress
from chatbind_cli.errors import ChatBindError, WeightsError
from chatbind_cli.weights.checkpoint import INDEX_NAMES, Checkpoint, open_checkpoint
from chatbind_cli.weights.delta import Plan, plan
from chatbind_cli.weights.identity import (
    combine_hashes,
    hash_tensor,
    is_rotary,
    read_passport,
    sample,
    write_passport,
)
from chatbind_cli.weights.partial import PartialFolder, clear_replaced
from chatbind_cli.weights.side_files import copy_side_files, side_files_sha256
from chatbind_cli.weights.streaming import (
    STREAMS,
    Arithmetic,
    Hashes,
    Streamer,
    refuse_full_disk,
    source_facts,
)
from chatbind_cli.weights.tensor_file import TensorInfo
from chatbind_cli.weights.writer import Shard, index_of, plan_shards


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


class Job(ABC):
    """Makes one folder of weights from a base and another checkpoint.

    Args:
        base: the base language model.
        other: the delta to apply, or the target to make a delta of.
        output: the folder to make.
        shard_bytes: largest size of an output file.
        overwrite: whether a folder that is there may be replaced.
    """

    command: ClassVar[str]
    label: ClassVar[str]
    other_kind: ClassVar[str]

    def __init__(
        self,
        base: Checkpoint,
        other: Checkpoint,
        output: Path,
        *,
        shard_bytes: int,
        overwrite: bool,
    ) -> None:
        self.base = base
        self.other = other
        self.output = output
        self.shard_bytes = shard_bytes
        self.overwrite = overwrite
        self.plan: Plan = plan(base, other)
        self.notes: list[str] = []
        for name, reason in self.plan.unused:
            if not is_rotary(name):
                self.notes.append(f"{name} of the base is not in the result: {reason}")
        if any(is_rotary(name) for name, _ in self.plan.unused):
            self.notes.append(
                "the base's rotary_emb.inv_freq buffers are not in the result: "
                "loaders compute them from the config"
            )

    @abstractmethod
    def arithmetic(self, shard: Path) -> Arithmetic:
        """What is done to the tensors of one output file."""

    @abstractmethod
    def check(self, hashes: Hashes) -> None:
        """Refuses inputs that turn out to be others than expected, as they stream by."""

    @abstractmethod
    def passport(self, folder: Path, hashes: Hashes, done: Mapping[str, Any]) -> dict[str, Any]:
        """What is written about the finished folder, which still has its temporary name."""

    @property
    def hashed(self) -> Collection[str]:
        """Which of `STREAMS` are hashed as they pass; the less, the faster."""
        return STREAMS

    def finish(self, arithmetic: Arithmetic) -> dict[str, Any]:
        """Ends an output file; returns facts to remember about it."""
        return {}

    def run(self) -> Result:
        """Makes the folder, or goes on where an earlier run of the same job was stopped.

        Raises:
            WeightsError: the inputs are not what they should be, the output is there already, or
                the disk is full.
        """
        tensors = self.plan.tensors
        made = None if self.overwrite else self._made_already()
        if made is not None:
            clear_replaced(self.output)
            return made
        shards = plan_shards(tensors, self.shard_bytes)
        with PartialFolder(
            self.output, self._task(shards), made_by=self.command, overwrite=self.overwrite
        ) as partial:
            left = [shard for shard in shards if shard.file not in partial.done]
            needed = sum(tensors[name].nbytes for shard in left for name in shard.tensors)
            refuse_full_disk(partial.folder, needed)
            with (
                Progress(needed >> 20, self.label, "MiB") as progress,
                Streamer(self.plan, self.base, self.other, self.hashed) as streamer,
            ):
                for shard in left:
                    self._make(shard, partial, streamer, progress)
            hashes = self._all_hashes(partial.done)
            copy_side_files(self.other.path, partial.folder)
            passport = self.passport(partial.folder, hashes, partial.done)
            passport["side_files"] = side_files_sha256(self.other.path)
            write_passport(partial.folder, passport)
            if len(shards) > 1:
                text = json.dumps(index_of(shards, tensors), indent=2)
                (partial.folder / INDEX_NAMES[0]).write_text(text + "\n", encoding="utf-8")
            partial.commit()
        return Result(self.output, passport["sha256"], tuple(self.notes))

    @cached_property
    def samples(self) -> dict[str, str]:
        """Samples of the inputs, under the names that the passport has for them."""
        return {"base": sample(self.base), self.other_kind: sample(self.other)}

    def _made_already(self) -> Result | None:
        """The result of an earlier run of the same job, if its folder is there and whole."""
        passport = read_passport(self.output) if self.output.is_dir() else {}
        known = {
            name: passport.get(name, {}).get("sample_sha256") for name in ("base", self.other_kind)
        }
        if known != self.samples or not self.is_result(passport):
            return None
        if passport.get("side_files") != side_files_sha256(self.other.path):
            return None
        shards = plan_shards(self.plan.tensors, self.shard_bytes)
        if not holds(self.output, self.plan.tensors, shards):
            return None
        return Result(self.output, passport["sha256"], ("it is here already",))

    def is_result(self, passport: Mapping[str, Any]) -> bool:
        """Whether a folder with this passport, made of the same inputs, is what is wanted."""
        return passport.get("made_by") == f"chatbind {self.command}"

    def _make(
        self, shard: Shard, partial: PartialFolder, streamer: Streamer, progress: Progress
    ) -> None:
        path = partial.folder / shard.file
        arithmetic = self.arithmetic(path)
        hashes = streamer.make(path, shard, arithmetic, progress)
        try:
            self.check(hashes)
        except WeightsError:
            partial.discard()
            raise
        facts = self.finish(arithmetic)
        for extra in facts.get("files", ()):
            partial.record(extra, {})
        partial.record(shard.file, {"hashes": asdict(hashes), **facts})

    def _task(self, shards: list[Shard]) -> dict[str, Any]:
        return {
            "command": self.command,
            "version": chatbind_cli.__version__,
            "base": source_facts(self.base),
            "other": source_facts(self.other),
            "shards": [asdict(shard) for shard in shards],
            "hashed": sorted(self.hashed),
        }

    def _all_hashes(self, done: Mapping[str, Any]) -> Hashes:
        hashes = Hashes()
        for facts in done.values():
            if "hashes" in facts:
                hashes.update(Hashes(**facts["hashes"]))
        # What the base has in vain counts as part of it all the same.
        for name in self.base.tensors if "base" in self.hashed else ():
            if name not in hashes.base and not is_rotary(name):
                hashes.base[name] = hash_tensor(self.base, name)
        return hashes

    def fingerprints(self, hashes: Hashes) -> tuple[str, str, str]:
        """Fingerprints of the base, of the other input and of the result."""
        return (
            combine_hashes(self.base.tensors, hashes.base),
            combine_hashes(self.other.tensors, hashes.other),
            combine_hashes(self.plan.tensors, hashes.result),
        )

    def signature(self) -> dict[str, str]:
        """Who made it."""
        return {"made_by": f"chatbind {self.command}", "version": chatbind_cli.__version__}


def holds(folder: Path, tensors: Mapping[str, TensorInfo], shards: Sequence[Shard]) -> bool:
    """Whether a folder has just these tensors in just these files; looks at no data."""
    try:
        with open_checkpoint(folder) as found:
            files = {file.path.name for file in found.files}
            return found.tensors == tensors and files == {shard.file for shard in shards}
    except ChatBindError:
        return False
