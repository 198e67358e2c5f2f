"""`make-delta`: delta = target - base, so that base + delta gives the target bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch

from chatbind_cli.files import sha256_file
from chatbind_cli.weights.checkpoint import Checkpoint, open_checkpoint
from chatbind_cli.weights.corrections import CorrectionSpool, differing
from chatbind_cli.weights.delta import Step
from chatbind_cli.weights.job import Job, Result
from chatbind_cli.weights.rotary import inverse_frequencies
from chatbind_cli.weights.streaming import Arithmetic, Hashes
from chatbind_cli.weights.writer import DEFAULT_SHARD_BYTES

_EXACT_PREFIX = "chatbind_exact-"


def make_delta(
    base: Path,
    target: Path,
    delta: Path,
    *,
    exact: bool = True,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    overwrite: bool = False,
) -> Result:
    """Writes what turns a base model into a target, in the published layout, as safetensors.

    Args:
        base: folder or file of the base model.
        target: folder or file of the finished model.
        delta: folder to make; config and tokenizer files are copied from the target's folder.
        exact: also write the elements that rounding would get wrong, in files of their own.
        shard_bytes: largest size of an output file.
        overwrite: whether a folder that is there may be replaced.

    Raises:
        CheckpointError: a checkpoint is missing.
        WeightsError: base and target do not fit together (nothing is written), a file is broken,
            or the disk is full (the same call goes on where it stopped).
    """
    with open_checkpoint(base) as base_checkpoint, open_checkpoint(target) as target_checkpoint:
        job = _MakeJob(
            base_checkpoint,
            target_checkpoint,
            delta,
            exact=exact,
            shard_bytes=shard_bytes,
            overwrite=overwrite,
        )
        return job.run()


class _MakeJob(Job):
    command: ClassVar[str] = "make-delta"
    label: ClassVar[str] = "taking the difference"
    other_kind: ClassVar[str] = "target"

    def __init__(
        self,
        base: Checkpoint,
        other: Checkpoint,
        output: Path,
        *,
        exact: bool,
        shard_bytes: int,
        overwrite: bool,
    ) -> None:
        super().__init__(base, other, output, shard_bytes=shard_bytes, overwrite=overwrite)
        self.exact = exact
        self._note_rotary()

    def _note_rotary(self) -> None:
        for step in self.plan.steps:
            if not step.rotary:
                continue
            computed = inverse_frequencies(self.other.config, step.info.numel)
            found = self.other.read(step.name)
            if computed is None or not torch.equal(computed.to(found.dtype), found):
                self.notes.append(
                    f"{step.name} is not what the config gives; apply-delta computes it anew, so "
                    "this buffer alone will not come back bit for bit"
                )
                return

    def _task(self, shards: Any) -> dict[str, Any]:
        return {**super()._task(shards), "exact": self.exact}

    def is_result(self, passport: Mapping[str, Any]) -> bool:
        """See the base class."""
        exact = bool(passport.get("target", {}).get("tensors"))
        return super().is_result(passport) and exact == self.exact

    def arithmetic(self, shard: Path) -> Arithmetic:
        """See the base class."""
        return _Difference(shard.with_name(_EXACT_PREFIX + shard.name))

    def finish(self, arithmetic: Arithmetic) -> dict[str, Any]:
        """See the base class."""
        if not isinstance(arithmetic, _Difference):
            raise TypeError(arithmetic)
        spool = arithmetic.spool
        facts: dict[str, Any] = {"rounded": spool.count, "files": []}
        if spool.finish():
            if self.exact:
                facts["files"] = [spool.path.name]
            else:
                spool.path.unlink()
        return facts

    def check(self, hashes: Hashes) -> None:
        """See the base class: any base will do for a delta that does not exist yet."""

    def passport(self, folder: Path, hashes: Hashes, done: Mapping[str, Any]) -> dict[str, Any]:
        """See the base class."""
        base, target, delta = self.fingerprints(hashes)
        files = [name for facts in done.values() for name in facts.get("files", ())]
        rounded = sum(facts.get("rounded", 0) for facts in done.values())
        if rounded:
            total = sum(step.overlap for step in self.plan.steps)
            fate = "they are kept beside it" if self.exact else "--no-exact leaves them so"
            self.notes.append(
                f"{rounded} of {total} elements ({rounded / total:.2%}) cannot be expressed as "
                f"a rounded difference; {fate}"
            )
        return {
            "kind": "delta",
            "sha256": delta,
            **self.signature(),
            "base": {
                "name": self.base.path.name,
                "sha256": base,
                "sample_sha256": self.samples["base"],
                "tensors": hashes.base,
            },
            "target": {
                "name": self.other.path.name,
                "sha256": target,
                "sample_sha256": self.samples["target"],
                "tensors": hashes.other if self.exact else {},
            },
            "exact": {name: sha256_file(folder / name) for name in files},
        }


class _Difference:
    """Target minus base in the target's dtype, and the elements that do not come back from it."""

    def __init__(self, corrections: Path) -> None:
        self.spool = CorrectionSpool(corrections)

    def combine(
        self, step: Step, start: int, theirs: torch.Tensor, ours: torch.Tensor, out: torch.Tensor
    ) -> None:
        """See `Arithmetic`."""
        base = theirs.to(ours.dtype)
        torch.sub(ours, base, out=out)
        wrong = differing(base + out, ours)
        self.spool.add(step.name, wrong + start, ours[wrong], step.info.numel)

    def rotary(self, step: Step) -> torch.Tensor:
        """See `Arithmetic`."""
        return torch.zeros(step.info.shape, dtype=step.info.dtype)
