"""A ChatBind folder, published or ours, written in our layout, tensor by tensor.

Only names change: every tensor keeps its bits. What the config, the tokenizer and the projector
of a published folder mean is known to `chatbind_cli.model.published`.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from chatbind_cli.console import Progress
from chatbind_cli.errors import CheckpointError
from chatbind_cli.files import replace_folder
from chatbind_cli.weights.checkpoint import INDEX_NAMES, Checkpoint, open_checkpoint, read_json
from chatbind_cli.weights.identity import combine_hashes, is_rotary
from chatbind_cli.weights.likeness import refuse_unapplied
from chatbind_cli.weights.streaming import copy_side_files, refuse_full_disk
from chatbind_cli.weights.tensor_file import TensorInfo
from chatbind_cli.weights.writer import (
    DEFAULT_SHARD_BYTES,
    SafetensorsWriter,
    index_of,
    plan_shards,
)

_LANGUAGE_MODEL = "language_model."
_GENERATION = "generation_config.json"
_PIECE_ELEMENTS = 4 << 20


@dataclass(frozen=True, slots=True)
class Conversion:
    """A folder that was written.

    Attributes:
        path: the folder.
        sha256: hash over its tensors, as `identity.combine_hashes` makes it.
        left_out: tensors of the source that have no place in it.
    """

    path: Path
    sha256: str
    left_out: tuple[str, ...]


def convert(
    source: Path,
    output: Path,
    *,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    overwrite: bool = False,
) -> Conversion:
    """Writes a ChatBind folder in our layout; one of ours is cut into other shards.

    Args:
        source: the folder, published or ours.
        output: the folder to make: config, safetensors, tokenizer.
        shard_bytes: largest size of an output file.
        overwrite: whether a folder that is there may be replaced.

    Raises:
        CheckpointError: the folder is no ChatBind model, or lacks a tensor.
        WeightsError: a weights file is broken, or the disk is full.
    """
    # The model's room loads transformers: only when there is work for it.
    from chatbind_cli.model.quiet import quiet_transformers  # noqa: PLC0415

    refuse_unapplied(source)
    with (
        open_checkpoint(source) as checkpoint,
        replace_folder(output, overwrite=overwrite) as folder,
    ):
        with quiet_transformers():
            config, tokenizer = _settings(source)
            names, left_out = _match(checkpoint, _wanted(config))
        infos = {new: checkpoint.info(old) for new, old in names.items()}
        refuse_full_disk(folder, sum(info.nbytes for info in infos.values()))
        if tokenizer is None:
            copy_side_files(source, folder)
        else:
            dtypes = {str(info.dtype).removeprefix("torch.") for info in infos.values()}
            config.dtype = dtypes.pop() if len(dtypes) == 1 else config.dtype
            with quiet_transformers():
                config.save_pretrained(folder)
                tokenizer.save_pretrained(folder)
            if (source / _GENERATION).is_file():
                shutil.copyfile(source / _GENERATION, folder / _GENERATION)
        sha256 = _write(checkpoint, names, infos, folder, shard_bytes)
    return Conversion(output, sha256, left_out)


def _settings(source: Path) -> tuple[Any, Any]:
    """Our configuration, and the tokenizer; None for the latter where its files can stay.

    Raises:
        CheckpointError: the folder is no ChatBind model.
    """
    from chatbind_cli.model.config import MODEL_TYPE, ChatBindConfig  # noqa: PLC0415
    from chatbind_cli.model.published import is_published, read_published  # noqa: PLC0415

    if is_published(source):
        return read_published(source)[:2]
    kind = read_json(source / "config.json", missing_ok=True).get("model_type")
    if kind != MODEL_TYPE:
        raise CheckpointError(
            f"is no ChatBind model but {kind or 'a folder without a config.json'}",
            where=str(source),
            hint="a language model and --projector serve everywhere as they are",
        )
    return ChatBindConfig.from_pretrained(source), None


def _wanted(config: Any) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor that a model of this configuration has."""
    from transformers import AutoModelForCausalLM  # noqa: PLC0415

    from chatbind_cli.model.chatbind import ChatBindForConditionalGeneration  # noqa: PLC0415

    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config.text_config)
        model = ChatBindForConditionalGeneration(config, base)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _match(
    checkpoint: Checkpoint, wanted: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, str], tuple[str, ...]]:
    """Our name -> the source's for every tensor that is wanted, and what is not.

    Raises:
        CheckpointError: a tensor is missing, or has another shape.
    """
    from chatbind_cli.model.projector_file import projector_key  # noqa: PLC0415

    found: dict[str, str] = {}
    left_out = []
    for name in checkpoint.tensors:
        ours = name if name in wanted else _LANGUAGE_MODEL + name
        if "mm_projector" in name:
            ours = projector_key(name) or ours
        if ours in wanted:
            found[ours] = name
        elif not is_rotary(name):
            left_out.append(name)
    text = checkpoint.config.get("text_config") or checkpoint.config
    tied = text.get("tie_word_embeddings")
    for name, shape in wanted.items():
        if name not in found:
            if tied and name.endswith("lm_head.weight"):
                continue
            raise CheckpointError(f"its weights have no {name}", where=str(checkpoint.path))
        has = checkpoint.info(found[name]).shape
        if has != shape:
            raise CheckpointError(
                f"tensor {found[name]} has shape {list(has)}, and the config says {list(shape)}",
                where=str(checkpoint.path),
            )
    return found, tuple(left_out)


def _write(
    checkpoint: Checkpoint,
    names: Mapping[str, str],
    infos: Mapping[str, TensorInfo],
    folder: Path,
    shard_bytes: int,
) -> str:
    """Writes the weights; returns their fingerprint."""
    shards = plan_shards(infos, shard_bytes)
    hashes: dict[str, str] = {}
    total = sum(info.nbytes for info in infos.values())
    with Progress(total >> 20, "converting", "MiB") as progress:
        for shard in shards:
            part = {name: infos[name] for name in shard.tensors}
            with SafetensorsWriter(folder / shard.file, part) as writer:
                for name in writer.order:
                    digest = hashlib.sha256()
                    for piece in checkpoint.chunks(names[name], _PIECE_ELEMENTS):
                        digest.update(writer.append(piece))
                        progress.advance(piece.nbytes >> 20)
                    hashes[name] = digest.hexdigest()
    if len(shards) > 1:
        text = json.dumps(index_of(shards, infos), indent=2)
        (folder / INDEX_NAMES[0]).write_text(text + "\n", encoding="utf-8")
    return combine_hashes(infos, hashes)
