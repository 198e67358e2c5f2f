"""`apply-delta`: target = base + delta.

What is hashed: the target always, in full, as it is written. A delta of `make-delta` carries the
hashes of its target, so a target that comes out right proves base and delta without another hash.
Other deltas and their bases are hashed in full as they pass, for the record.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from chatbind_cli.checkpoints.checkpoint import Checkpoint, open_checkpoint
from chatbind_cli.checkpoints.delta import Step, fit, refuse_mistaken
from chatbind_cli.checkpoints.manifest import combine_hashes, fingerprint, read_manifest, sample
from chatbind_cli.checkpoints.output_folder import (
    DEFAULT_SHARD_BYTES,
    Facts,
    Result,
    make_folder,
    source_facts,
)
from chatbind_cli.checkpoints.side_files import copy_side_files, side_files_sha256
from chatbind_cli.checkpoints.stream import STREAMS, merged, stream_file
from chatbind_cli.console import Progress
from chatbind_cli.errors import WeightsError
from chatbind_cli.files import sha256_file


def apply_delta(
    base: Path,
    delta: Path,
    target: Path,
    *,
    base_name: str | None = None,
    delta_name: str | None = None,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    overwrite: bool = False,
) -> Result:
    """Adds a delta to its base model and writes the target as safetensors.

    The sum is rounded in the delta's dtype, as published deltas want it. Vocabulary rows beyond
    the base's and the projector come from the delta alone. A delta that `make_delta` made gives
    its target bit for bit, and is refused over any base but its own. Config and tokenizer files
    come from the delta's folder. The manifest calls base and delta what `base_name` and
    `delta_name` say.

    Raises:
        CheckpointError: a checkpoint is missing.
        WeightsError: base and delta do not fit together (nothing is written), a file is broken,
            or the disk is full (the same call goes on where it stopped).
    """
    names = {"base": base_name or base.name, "delta": delta_name or str(delta)}
    with open_checkpoint(base) as base_weights, open_checkpoint(delta) as delta_weights:
        adder = _Adder(base_weights, delta_weights)
        side_files = side_files_sha256(delta)

        def finish(folder: Path, done: list[Facts]) -> dict[str, Any]:
            copy_side_files(delta, folder)
            return adder.manifest(done, names) | {"side_files": side_files}

        return make_folder(
            target,
            {name: step.info for name, step in adder.steps.items()},
            adder.write_file,
            finish,
            made_by="apply-delta",
            label="adding the delta",
            inputs={
                "base": source_facts(base_weights),
                "delta": source_facts(delta_weights),
                "side_files": side_files,
                "hashed": adder.hashed,
            },
            shard_bytes=shard_bytes,
            overwrite=overwrite,
            notes=adder.notes,
        )


class _Adder:
    """The sum of two checkpoints: its files, its manifest, and the proof that it is right.

    Attributes:
        steps: what becomes of each tensor.
        notes: what the user should know.
        hashed: the streams that are hashed as they pass; the fewer, the faster.
    """

    def __init__(self, base: Checkpoint, delta: Checkpoint) -> None:
        self.base = base
        self.delta = delta
        self.made = read_manifest(delta.folder)
        if self.made.get("kind") == "target":
            raise WeightsError(
                "is a target already, and a delta is wanted",
                where=str(delta.path),
                hint="are --delta and --target swapped?",
            )
        self.steps, self.notes = fit(base, delta)
        # Before the stream and not after it: a file that was touched all over is then read with a
        # third of the system's time.
        self.samples = {"base": sample(base), "delta": sample(delta)}
        made_over = self.made.get("base", {})
        if self.samples["base"] != made_over.get("sample_sha256", self.samples["base"]):
            raise WeightsError(
                "is not the base that the delta was made over",
                where=str(base.path),
                hint=f"the delta belongs to {made_over.get('name', 'another model')}",
            )
        # What the delta's maker had, tensor by tensor.
        self._known: dict[str, Mapping[str, str]] = {
            "base": made_over.get("tensors", {}),
            "result": self.made.get("target", {}).get("tensors", {}),
        }
        self._proven = all(
            step.rotary or name in self._known["result"] for name, step in self.steps.items()
        )
        if not self._proven:
            refuse_mistaken(base, delta)
        self.hashed = ("result",) if self._proven else STREAMS
        self._corrections = _Corrections(delta.folder, self.made.get("exact", {}))

    def write_file(self, path: Path, names: list[str], progress: Progress) -> Facts:
        """Writes a file of the target.

        Raises:
            WeightsError: base or delta are others than the delta's maker had; what was made of them
                is thrown away.
        """
        steps = [self.steps[name] for name in names]
        hashes = stream_file(
            path, steps, self.base, self.delta, self._add, hashed=self.hashed, progress=progress
        )
        for stream, known in self._known.items():
            for name, found in hashes.get(stream, {}).items():
                if found != known.get(name, found):
                    shutil.rmtree(path.parent, ignore_errors=True)
                    raise WeightsError(
                        f"tensor {name} is not what the delta's maker had",
                        where=str((self.base if stream == "base" else self.delta).path),
                        hint="base or delta is damaged: fetch them again",
                    )
        return {"hashes": hashes}

    def _add(
        self, step: Step, start: int, theirs: torch.Tensor, ours: torch.Tensor, out: torch.Tensor
    ) -> None:
        if step.rotary:
            out.copy_(theirs)
        elif theirs.dtype == ours.dtype:
            torch.add(theirs, ours, out=out)
        else:
            out.copy_(theirs).add_(ours)
        self._corrections.put(step, start, out)

    def manifest(self, done: list[Facts], names: Mapping[str, str]) -> dict[str, Any]:
        """What is written about the finished target."""
        hashes = merged(facts["hashes"] for facts in done)
        base: dict[str, Any] = {"name": names["base"], "sample_sha256": self.samples["base"]}
        delta: dict[str, Any] = {"name": names["delta"], "sample_sha256": self.samples["delta"]}
        if self._proven:
            base["sha256"] = self.made.get("base", {}).get("sha256")
            delta["sha256"] = self.made.get("sha256")
        else:
            base["sha256"] = fingerprint(self.base, hashes["base"])
            delta["sha256"] = combine_hashes(self.delta.tensors, hashes["other"])
        infos = {name: step.info for name, step in self.steps.items()}
        return {
            "kind": "target",
            "sha256": combine_hashes(infos, hashes["result"]),
            "base": base,
            "delta": delta,
        }


class _Corrections:
    """What rounding lost in a delta of `make-delta`, put in as the target streams by.

    Args:
        folder: the delta's.
        files: name -> SHA-256 of its files of corrections; none for a delta of the published kind.

    Raises:
        WeightsError: a file is missing or damaged.
    """

    def __init__(self, folder: Path, files: Mapping[str, str]) -> None:
        self._file_of: dict[str, Checkpoint] = {}
        self._current: tuple[torch.Tensor, torch.Tensor] | None = None
        for name, digest in files.items():
            path = folder / Path(name).name
            if not path.is_file() or sha256_file(path) != digest:
                raise _damaged(path)
            file = open_checkpoint(path)
            self._file_of |= {
                key.removesuffix(".value"): file for key in file.tensors if key.endswith(".value")
            }

    def put(self, step: Step, start: int, piece: torch.Tensor) -> None:
        """Corrects a piece in place.

        Args:
            step: the tensor's; its pieces come in order.
            start: position of the piece's first element in the tensor.
            piece: 1-D.
        """
        if step.name not in self._file_of:
            return
        if start == 0 or self._current is None:
            self._current = self._read(step)
        index, value = self._current
        bounds = torch.tensor([start, start + piece.numel()])
        first, last = torch.searchsorted(index, bounds).tolist()
        piece[index[first:last] - start] = value[first:last]

    def _read(self, step: Step) -> tuple[torch.Tensor, torch.Tensor]:
        file = self._file_of[step.name]
        if f"{step.name}.index" not in file.tensors:
            raise _damaged(file.path)
        index, value = (file.read(f"{step.name}.{part}") for part in ("index", "value"))
        index = index.view(-1).to(torch.int64)
        sound = index.numel() == value.numel() and value.dtype == step.info.dtype
        if not sound or (index[1:] <= index[:-1]).any():
            raise _damaged(file.path)
        return index, value.view(-1)


def _damaged(path: Path) -> WeightsError:
    return WeightsError("is missing or damaged", where=str(path), hint="fetch the delta again")
