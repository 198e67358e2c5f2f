"""`make-delta`: delta = target - base, so that base + delta gives the target bit for bit.

A delta in half precision cannot express every target: where the base's value is much larger than
the target's, the step between neighbouring deltas is too coarse. Those few elements are written
beside the delta, in files that other programs ignore: `<tensor>.index` (int32 or int64, rising)
and `<tensor>.value`. Memory holds those of one file of weights.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from chatbind_cli.checkpoints.checkpoint import Checkpoint, open_checkpoint
from chatbind_cli.checkpoints.delta import Step, fit
from chatbind_cli.checkpoints.manifest import combine_hashes, fingerprint, sample
from chatbind_cli.checkpoints.output_folder import (
    DEFAULT_SHARD_BYTES,
    Facts,
    Result,
    make_folder,
    source_facts,
)
from chatbind_cli.checkpoints.side_files import copy_side_files, side_files_sha256
from chatbind_cli.checkpoints.stream import merged, stream_file
from chatbind_cli.console import Progress
from chatbind_cli.files import sha256_file, sync

_EXACT_PREFIX = "chatbind_exact-"
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


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

    Config and tokenizer files come from the target's folder. `exact` has the elements that rounding
    would get wrong written, too, in files of their own.

    Raises:
        CheckpointError: a checkpoint is missing.
        WeightsError: base and target do not fit together (nothing is written), a file is broken,
            or the disk is full (the same call goes on where it stopped).
    """
    with open_checkpoint(base) as base_weights, open_checkpoint(target) as target_weights:
        maker = _Maker(base_weights, target_weights, exact=exact)
        side_files = side_files_sha256(target)

        def finish(folder: Path, done: list[Facts]) -> dict[str, Any]:
            copy_side_files(target, folder)
            return maker.manifest(folder, done) | {"side_files": side_files}

        return make_folder(
            delta,
            {name: step.info for name, step in maker.steps.items()},
            maker.write_file,
            finish,
            made_by="make-delta",
            label="taking the difference",
            inputs={
                "base": source_facts(base_weights),
                "target": source_facts(target_weights),
                "side_files": side_files,
                "exact": exact,
            },
            shard_bytes=shard_bytes,
            overwrite=overwrite,
            notes=maker.notes,
        )


class _Maker:
    """The difference of two checkpoints: its files and its manifest."""

    def __init__(self, base: Checkpoint, target: Checkpoint, *, exact: bool) -> None:
        self.base = base
        self.target = target
        self.exact = exact
        self.steps, self.notes = fit(base, target)
        self.samples = {"base": sample(base), "target": sample(target)}  # as in `apply_delta`

    def write_file(self, path: Path, names: list[str], progress: Progress) -> Facts:
        """Writes a file of the delta, and what rounding loses in it."""
        lost: dict[str, list[torch.Tensor]] = defaultdict(list)
        rounded = 0

        def subtract(
            step: Step, start: int, theirs: torch.Tensor, ours: torch.Tensor, out: torch.Tensor
        ) -> None:
            nonlocal rounded
            if step.rotary:
                out.zero_()
                return
            base = theirs.to(ours.dtype)
            torch.sub(ours, base, out=out)
            index = _differing(base + out, ours)
            rounded += index.numel()
            if self.exact and index.numel():
                wide = step.info.numel > torch.iinfo(torch.int32).max
                place = (index + start).to(torch.int64 if wide else torch.int32)
                lost[f"{step.name}.index"].append(place)
                lost[f"{step.name}.value"].append(ours[index])

        steps = [self.steps[name] for name in names]
        hashes = stream_file(path, steps, self.base, self.target, subtract, progress=progress)
        files = []
        if lost:
            beside = path.with_name(_EXACT_PREFIX + path.name)
            tensors = {name: torch.cat(parts) for name, parts in lost.items()}
            save_file(tensors, beside, metadata={"format": "pt"})
            sync(beside)
            files.append(beside.name)
        return {"hashes": hashes, "rounded": rounded, "files": files}

    def manifest(self, folder: Path, done: list[Facts]) -> dict[str, Any]:
        """What is written about the finished delta."""
        hashes = merged(facts["hashes"] for facts in done)
        rounded = sum(facts["rounded"] for facts in done)
        if rounded:
            total = sum(step.overlap for step in self.steps.values())
            fate = "they are kept beside it" if self.exact else "--no-exact leaves them so"
            self.notes.append(
                f"{rounded} of {total} elements ({rounded / total:.2%}) cannot be expressed as "
                f"a rounded difference; {fate}"
            )
        infos = {name: step.info for name, step in self.steps.items()}
        return {
            "kind": "delta",
            "sha256": combine_hashes(infos, hashes["result"]),
            "base": {
                "name": self.base.path.name,
                "sha256": fingerprint(self.base, hashes["base"]),
                "sample_sha256": self.samples["base"],
                "tensors": hashes["base"],
            },
            "target": {
                "name": self.target.path.name,
                "sha256": combine_hashes(self.target.tensors, hashes["other"]),
                "sample_sha256": self.samples["target"],
                "tensors": hashes["other"] if self.exact else {},
            },
            "exact": {
                name: sha256_file(folder / name) for facts in done for name in facts["files"]
            },
        }


def _differing(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Positions at which two 1-D tensors differ in any bit (so -0 is not 0, and NaN is NaN)."""
    bits = _BITS[found.dtype.itemsize]
    return (found.view(bits) != wanted.view(bits)).nonzero().view(-1)
