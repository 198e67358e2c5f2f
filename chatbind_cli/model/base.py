"""The language model that a ChatBind model stands on: room for new tokens, and which one it is."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from chatbind_cli.checkpoints.json_file import read_json
from chatbind_cli.errors import CheckpointError
from chatbind_cli.model.chatbind import word_embeddings
from chatbind_cli.model.config import MODEL_TYPE

_PROBE_BYTES = 1 << 20


@torch.no_grad()
def grow_embeddings(language_model: PreTrainedModel, size: int, *, known: int) -> None:
    """Makes room for new tokens; their rows start as the mean of the known ones.

    The tokenizer has `size` tokens now, and had `known` before. A vocabulary with spare rows keeps
    its size.
    """
    if size > word_embeddings(language_model).num_embeddings:
        language_model.resize_token_embeddings(size, mean_resizing=False)
    if known == size:
        return
    output: Any = language_model.get_output_embeddings()
    for layer in (language_model.get_input_embeddings(), output):
        weight = getattr(layer, "weight", None)
        if weight is not None:
            # of tied layers the second pass takes the same mean of the same rows
            weight[known:size] = weight[:known].mean(dim=0, dtype=torch.float32).to(weight.dtype)
    bias = getattr(output, "bias", None)
    if bias is not None:
        bias[known:size] = bias[:known].mean()


def quick_fingerprint(folder: Path) -> str:
    """A hash of the ends and sizes of all weights files: quick, and it tells two models apart."""
    digest = hashlib.sha256()
    files = [p for p in folder.iterdir() if p.suffix in (".safetensors", ".bin")]
    for path in sorted(files):
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode())
        with path.open("rb") as file:
            digest.update(file.read(_PROBE_BYTES))
            file.seek(max(size - _PROBE_BYTES, 0))
            digest.update(file.read(_PROBE_BYTES))
    return digest.hexdigest()


def adapted_base(folder: Path) -> dict[str, Any] | None:
    """What a folder that holds adapters only says of its base model; None for any other folder."""
    fields = read_json(folder / "config.json", missing_ok=True)
    if fields.get("model_type") != MODEL_TYPE or fields.get("base_model") is None:
        return None
    said = fields["base_model"]
    parts = [said.get(n) if isinstance(said, dict) else None for n in ("path", "fingerprint")]
    if not all(isinstance(part, str) and part for part in parts):
        raise CheckpointError(
            f"base_model is {said!r:.60}, not a path and a fingerprint",
            where=str(folder / "config.json"),
        )
    return cast(dict[str, Any], said)


def weights_folder(folder: Path, base: Path | None = None) -> Path:
    """Where a ChatBind folder's language model lies: in the base of its adapters, or in itself.

    Raises:
        CheckpointError: as `find_base`; or there are no adapters, and a `base` is said.
    """
    if adapted_base(folder) is not None:
        return find_base(folder, base)
    if base is not None:
        raise CheckpointError("is a whole model, and takes no --base", where=str(folder))
    return folder


def find_base(folder: Path, base: Path | None = None) -> Path:
    """The model that a folder's adapters belong to: where it is said to lie, or `base`.

    Raises:
        CheckpointError: it is not there, or another model is.
    """
    said = adapted_base(folder)
    assert said is not None
    place = folder / said["path"] if base is None else base
    hint = "`ask`, `vqa` and `convert --merge` take the folder where it lies now with --base"
    if not place.is_dir():
        raise CheckpointError(
            f"holds adapters, and their base model is not at {place}", where=str(folder), hint=hint
        )
    if quick_fingerprint(place) != said["fingerprint"]:
        raise CheckpointError(
            f"holds adapters of another model than the one at {place}", where=str(folder), hint=hint
        )
    return place
