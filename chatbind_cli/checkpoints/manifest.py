"""What a set of weights is, whatever files and shards it lies in: hashes, and the manifest of them.

The fingerprint of a checkpoint is the SHA-256 of one line per tensor, sorted by name: name, dtype,
shape and the SHA-256 of its data. Rotary frequency buffers do not count, since they are derived
from the config and come and go with versions of transformers.

A sample of a checkpoint is the same over the first 16 KiB of every 16 MiB of each tensor. It takes
a second where the fingerprint takes a minute, and tells any two models apart that were trained or
converted differently; it does not find a single damaged byte.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import chatbind_cli
from chatbind_cli.checkpoints.checkpoint import Checkpoint, open_checkpoint
from chatbind_cli.checkpoints.json_file import read_json
from chatbind_cli.checkpoints.safetensors_file import TensorInfo, bytes_of
from chatbind_cli.console import Progress
from chatbind_cli.errors import WeightsError

MANIFEST_NAME = "chatbind_weights.json"
_FORMAT = 1

_SAMPLE_BYTES = 16 << 10
_SAMPLE_EVERY_BYTES = 16 << 20


def is_rotary(name: str) -> bool:
    """Whether a tensor is a buffer of rotary frequencies, which is recomputed and not carried."""
    return name.endswith("rotary_emb.inv_freq")


def combine_hashes(tensors: Mapping[str, TensorInfo], hashes: Mapping[str, str]) -> str:
    """The fingerprint of a checkpoint from the hashes of its tensors.

    Args:
        tensors: name -> shape and dtype of every tensor.
        hashes: name -> SHA-256 of the data, for every tensor that is not a rotary buffer.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        if is_rotary(name):
            continue
        info = tensors[name]
        dtype = str(info.dtype).removeprefix("torch.")
        digest.update(f"{name} {dtype} {list(info.shape)} {hashes[name]}\n".encode())
    return digest.hexdigest()


def fingerprint(
    checkpoint: Checkpoint,
    hashes: dict[str, str] | None = None,
    advance: Callable[[int], None] = lambda n: None,
) -> str:
    """The fingerprint of a checkpoint.

    `hashes` has the SHA-256 of tensors that need not be read again; those of all others are added.
    `advance` is called with the number of bytes of each tensor that is through.

    Raises:
        WeightsError: a file is broken.
    """
    hashes = {} if hashes is None else hashes
    for name, info in checkpoint.tensors.items():
        if name not in hashes and not is_rotary(name):
            digest = hashlib.sha256()
            for piece in checkpoint.chunks(name):
                digest.update(bytes_of(piece))
            hashes[name] = digest.hexdigest()
        advance(info.nbytes)
    return combine_hashes(checkpoint.tensors, hashes)


def sample(checkpoint: Checkpoint) -> str:
    """The sample of a checkpoint, as hex digits.

    Raises:
        WeightsError: a file is broken.
    """
    hashes = {}
    for name, info in checkpoint.tensors.items():
        digest = hashlib.sha256()
        length, step = (n // info.dtype.itemsize for n in (_SAMPLE_BYTES, _SAMPLE_EVERY_BYTES))
        for start in range(0, info.numel, step):
            stop = min(start + length, info.numel)
            digest.update(bytes_of(checkpoint.read_flat(name, start, stop)))
        hashes[name] = digest.hexdigest()
    return combine_hashes(checkpoint.tensors, hashes)


def read_manifest(folder: Path) -> dict[str, Any]:
    """What `make-delta`, `apply-delta` or `convert` wrote about a folder; empty for anybody else's.

    Raises:
        WeightsError: it was written by a newer version, or is not what it should be.
    """
    manifest = read_json(folder / MANIFEST_NAME, missing_ok=True)
    if manifest and manifest.get("format") != _FORMAT:
        raise WeightsError(
            f"has the unknown format {manifest.get('format')!r}",
            where=str(folder / MANIFEST_NAME),
            hint="update chatbind",
        )
    for name in ("base", "target", "delta", "exact", "source"):
        part = manifest.get(name, {})
        if not isinstance(part, dict) or not isinstance(part.get("tensors", {}), dict):
            raise WeightsError(f"says nothing that is {name}", where=str(folder / MANIFEST_NAME))
    return manifest


def made_from(checkpoint: Checkpoint, sha256: str, source: Path, side_files: str) -> dict[str, Any]:
    """The manifest of a folder with the fingerprint `sha256` that was made of a checkpoint.

    `source` is its name for people, `side_files` the hash of what lay beside its weights.
    """
    told = {"name": source.name, "sample_sha256": sample(checkpoint), "side_files": side_files}
    return {"kind": "model", "sha256": sha256, "source": told}


def write_manifest(folder: Path, manifest: Mapping[str, Any], *, made_by: str) -> None:
    """Writes the manifest into a folder in the making, and who made it."""
    maker = {"made_by": f"chatbind {made_by}", "version": chatbind_cli.__version__}
    text = json.dumps({"format": _FORMAT, **manifest, **maker}, indent=2)
    (folder / MANIFEST_NAME).write_text(text + "\n", encoding="utf-8")


def verify(folder: Path) -> dict[str, Any]:
    """Recomputes the fingerprint of a folder that has a manifest and compares the two.

    Returns:
        The manifest.

    Raises:
        WeightsError: there is no manifest, or the weights are not those that it describes.
    """
    manifest = read_manifest(folder)
    if not manifest:
        raise WeightsError(
            f"has no {MANIFEST_NAME}", where=str(folder), hint="chatbind did not write this folder"
        )
    with open_checkpoint(folder) as checkpoint:
        total = sum(info.nbytes for info in checkpoint.tensors.values())
        with Progress(total >> 20, "verifying", "MiB") as progress:
            found = fingerprint(checkpoint, advance=progress.advance_bytes)
    if found != manifest.get("sha256"):
        raise WeightsError(
            f"weights have the hash {found[:12]}..., its manifest says "
            f"{str(manifest.get('sha256'))[:12]}...",
            where=str(folder),
            hint="they were changed or damaged after they were written: make them again",
        )
    return manifest
