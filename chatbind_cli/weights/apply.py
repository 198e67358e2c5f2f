"""`apply-delta`: target = base + delta.

What is hashed: the target always, in full, as it is written. A delta of `make-delta` carries the
hashes of its target, so a target that comes out right proves base and delta without another hash.
Other deltas and their bases are hashed in full as they pass, for the record; without `hash_inputs`
only a sample of them is recorded (see `identity`), which tells which ones they were.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch

from chatbind_cli.errors import WeightsError
from chatbind_cli.files import sha256_file
from chatbind_cli.weights.checkpoint import Checkpoint, open_checkpoint
from chatbind_cli.weights.corrections import Corrections
from chatbind_cli.weights.delta import Step
from chatbind_cli.weights.identity import (
    combine_hashes,
    hash_tensor,
    is_rotary,
    read_passport,
)
from chatbind_cli.weights.job import Job, Result
from chatbind_cli.weights.likeness import refuse_misfit
from chatbind_cli.weights.rotary import inverse_frequencies
from chatbind_cli.weights.streaming import STREAMS, Arithmetic, Hashes
from chatbind_cli.weights.writer import DEFAULT_SHARD_BYTES

# Tensors up to this size are compared with the passport before anything is written.
_QUICK_CHECK_BYTES = 1 << 20


def apply_delta(
    base: Path,
    delta: Path,
    target: Path,
    *,
    base_name: str | None = None,
    delta_name: str | None = None,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    hash_inputs: bool = True,
    overwrite: bool = False,
) -> Result:
    """Adds a delta to its base model and writes the target as safetensors.

    The sum is rounded in the delta's dtype, as published deltas want it. Vocabulary rows beyond
    the base's and the projector come from the delta alone. A delta that `make_delta` made gives
    its target bit for bit, and is refused over any base but its own.

    Args:
        base: folder or file of the base model.
        delta: folder or file of the delta.
        target: folder to make; config and tokenizer files are copied from the delta's folder.
        base_name: what to call the base in the target's passport (a hub repository, say).
        delta_name: the same for the delta.
        shard_bytes: largest size of an output file.
        hash_inputs: whether to hash base and delta in full where nothing else proves them.
        overwrite: whether a target that is there may be replaced.

    Raises:
        CheckpointError: a checkpoint is missing.
        WeightsError: base and delta do not fit together (nothing is written), a file is broken,
            or the disk is full (the same call goes on where it stopped).
    """
    with open_checkpoint(base) as base_checkpoint, open_checkpoint(delta) as delta_checkpoint:
        job = _ApplyJob(
            base_checkpoint,
            delta_checkpoint,
            target,
            base_name=base_name or base.name,
            delta_name=delta_name or str(delta),
            shard_bytes=shard_bytes,
            hash_inputs=hash_inputs,
            overwrite=overwrite,
        )
        return job.run()


class _ApplyJob(Job):
    command: ClassVar[str] = "apply-delta"
    label: ClassVar[str] = "adding the delta"
    other_kind: ClassVar[str] = "delta"

    def __init__(
        self,
        base: Checkpoint,
        other: Checkpoint,
        output: Path,
        *,
        base_name: str,
        delta_name: str,
        shard_bytes: int,
        hash_inputs: bool,
        overwrite: bool,
    ) -> None:
        self.base_name = base_name
        self.delta_name = delta_name
        self.hash_inputs = hash_inputs
        self.delta_passport = read_passport(other.folder)
        if self.delta_passport.get("kind") == "target":
            raise WeightsError(
                "is a target already, and a delta is wanted",
                where=str(other.path),
                hint="are --delta and --target swapped?",
            )
        super().__init__(base, other, output, shard_bytes=shard_bytes, overwrite=overwrite)
        self._quick_check()
        if not self._proven:
            refuse_misfit(self.plan, base, other)
        self.corrections = Corrections(self._correction_files())

    def is_result(self, passport: Mapping[str, Any]) -> bool:
        """See the base class."""
        known = all("sha256" in passport.get(name, {}) for name in ("base", "delta"))
        return super().is_result(passport) and (known or not self.hash_inputs)

    def _expected(self) -> Mapping[str, str]:
        tensors: Mapping[str, str] = self.delta_passport.get("base", {}).get("tensors", {})
        return tensors

    def _quick_check(self) -> None:
        """Finds a wrong base before anything is written, by its norm weights as a rule."""
        small = (
            name
            for name, info in self.base.tensors.items()
            if info.nbytes <= _QUICK_CHECK_BYTES and name in self._expected()
        )
        self._compare({name: hash_tensor(self.base, name) for name in small})

    def _compare(self, hashes: Mapping[str, str]) -> None:
        for name, found in hashes.items():
            expected = self._expected().get(name, found)
            if found != expected:
                made_over = self.delta_passport["base"].get("name", "another model")
                raise WeightsError(
                    f"is not the base that the delta was made over: {name} differs",
                    where=str(self.base.path),
                    hint=f"the delta belongs to {made_over}",
                )

    def _correction_files(self) -> list[Path]:
        files = []
        for name, digest in self.delta_passport.get("exact", {}).items():
            path = self.other.folder / Path(name).name
            if not path.is_file() or sha256_file(path) != digest:
                raise WeightsError(
                    "is missing or damaged", where=str(path), hint="fetch the delta again"
                )
            files.append(path)
        return files

    def arithmetic(self, shard: Path) -> Arithmetic:
        """See the base class."""
        return _Sum(self.base, self.other, self.corrections)

    @property
    def _proven(self) -> bool:
        """Whether a target that comes out right proves that base and delta were the right ones."""
        expected = self.delta_passport.get("target", {}).get("tensors", {})
        return all(step.rotary or step.name in expected for step in self.plan.steps)

    @property
    def hashed(self) -> Collection[str]:
        """See the base class."""
        return STREAMS if self.hash_inputs and not self._proven else ("result",)

    def check(self, hashes: Hashes) -> None:
        """See the base class."""
        self._compare(hashes.base)
        expected = self.delta_passport.get("target", {}).get("tensors", {})
        bases = {step.name: step.base for step in self.plan.steps}
        for name, found in hashes.result.items():
            if found == expected.get(name, found):
                continue
            partner = bases[name]
            if partner is not None:
                self._compare({partner: hash_tensor(self.base, partner)})
            raise WeightsError(
                f"tensor {name} does not come out as the delta's maker had it",
                where=str(self.other.path),
                hint="the delta is damaged: fetch it again",
            )

    def passport(self, folder: Path, hashes: Hashes, done: Mapping[str, Any]) -> dict[str, Any]:
        """See the base class."""
        target = combine_hashes(self.plan.tensors, hashes.result)
        base, delta = ({"sample_sha256": self.samples[name]} for name in ("base", "delta"))
        if self._proven:
            base["sha256"] = self.delta_passport["base"]["sha256"]
            delta["sha256"] = self.delta_passport["sha256"]
        elif self.hash_inputs:
            base["sha256"], delta["sha256"], _ = self.fingerprints(hashes)
        return {
            "kind": "target",
            "sha256": target,
            **self.signature(),
            "base": {"name": self.base_name, **base},
            "delta": {"name": self.delta_name, **delta},
        }


class _Sum:
    """Base plus delta in the delta's dtype, and the corrections of an exact delta."""

    def __init__(self, base: Checkpoint, delta: Checkpoint, corrections: Corrections) -> None:
        self.base = base
        self.delta = delta
        self.corrections = corrections

    def combine(
        self, step: Step, start: int, theirs: torch.Tensor, ours: torch.Tensor, out: torch.Tensor
    ) -> None:
        """See `Arithmetic`."""
        if theirs.dtype == ours.dtype:
            torch.add(theirs, ours, out=out)
        else:
            out.copy_(theirs).add_(ours)
        self.corrections.put(step.name, start, out)

    def rotary(self, step: Step) -> torch.Tensor:
        """See `Arithmetic`."""
        computed = inverse_frequencies(self.delta.config, step.info.numel)
        if computed is None and step.base is not None and is_rotary(step.base):
            computed = self.base.read(step.base)
        if computed is None:
            computed = self.delta.read(step.name)
        return computed.to(step.info.dtype)
