"""A ChatBind folder, published or ours, written in our layout, tensor by tensor.

Only names change: every tensor keeps its bits. What the config, the tokenizer and the projector
of a published folder mean is known to `loading` and `weights.published`.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import chatbind_cli
from chatbind_cli.console import Progress
from chatbind_cli.errors import CheckpointError
from chatbind_cli.files import sha256_file
from chatbind_cli.model.assemble import build_chatbind
from chatbind_cli.model.chatbind import ChatBindForConditionalGeneration
from chatbind_cli.model.config import MODEL_TYPE, encoder_of
from chatbind_cli.model.loading import read_published
from chatbind_cli.model.pretrained import one_line, open_config, quiet_transformers, within
from chatbind_cli.weights.checkpoint import INDEX_NAMES, Checkpoint, open_checkpoint
from chatbind_cli.weights.identity import (
    combine_hashes,
    fingerprint,
    is_rotary,
    read_passport,
    sample,
    write_passport,
)
from chatbind_cli.weights.job import holds
from chatbind_cli.weights.json_file import read_json
from chatbind_cli.weights.likeness import refuse_unapplied
from chatbind_cli.weights.partial import PartialFolder, clear_replaced
from chatbind_cli.weights.projector_file import projector_key, read_projector
from chatbind_cli.weights.published import is_published
from chatbind_cli.weights.side_files import (
    GENERATION,
    copy_side_files,
    is_side_file,
    side_files_sha256,
)
from chatbind_cli.weights.streaming import refuse_full_disk, source_facts
from chatbind_cli.weights.tensor_file import TensorInfo
from chatbind_cli.weights.writer import (
    DEFAULT_SHARD_BYTES,
    SafetensorsWriter,
    Shard,
    index_of,
    plan_shards,
)

_COMMAND = "convert"
_LANGUAGE_MODEL = "language_model."
_PIECE_ELEMENTS = 4 << 20


@dataclass(frozen=True, slots=True)
class Conversion:
    """A folder that was written.

    Attributes:
        path: the folder.
        sha256: hash over its tensors, as `identity.combine_hashes` makes it.
        left_out: tensors of the source that have no place in it.
        is_new: whether it was written now; else it was there already.
    """

    path: Path
    sha256: str
    left_out: tuple[str, ...]
    is_new: bool = True


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
        WeightsError: a weights file is broken, the output is there already, or the disk is full
            (the same call goes on where it stopped).
    """
    refuse_unapplied(source)
    with open_checkpoint(source) as checkpoint:
        with quiet_transformers():
            config, tokenizer = _settings(source)
            names, left_out = _match(checkpoint, _wanted(config, checkpoint))
        infos = {new: checkpoint.info(old) for new, old in names.items()}
        shards = plan_shards(infos, shard_bytes)
        passport = _passport(_identity(source, checkpoint))
        made = None if overwrite else _made_already(output, passport)
        if made is not None and holds(output, infos, shards):
            return Conversion(output, made, left_out, is_new=False)
        task = {
            "version": chatbind_cli.__version__,
            "source": source_facts(checkpoint),
            "config": config.to_json_string(),
            "shards": [asdict(shard) for shard in shards],
        }
        with PartialFolder(output, task, made_by=_COMMAND, overwrite=overwrite) as partial:
            sha256 = _write(checkpoint, names, infos, shards, partial)
            if tokenizer is None:
                copy_side_files(source, partial.folder)
            else:
                _write_settings(config, tokenizer, infos, source, partial.folder)
            write_passport(partial.folder, passport | {"sha256": sha256})
            partial.commit()
    return Conversion(output, sha256, left_out)


def join(
    language_model: Path,
    projector: Path,
    output: Path,
    *,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    overwrite: bool = False,
) -> Conversion:
    """Writes a language model and a projector as one ChatBind folder, as `ask` would join them.

    Any causal language model will do, whatever its tensors are called; so it is loaded whole, and
    takes as much memory as it has weights.

    Args:
        language_model: the folder of a bare language model.
        projector: a projector file, ours or a published one.
        output: the folder to make.
        shard_bytes: largest size of an output file.
        overwrite: whether a folder that is there may be replaced.

    Raises:
        CheckpointError: one of the two cannot be used, or they do not fit together.
        WeightsError: the output is there already.
    """
    info = read_projector(projector).info
    with open_checkpoint(language_model) as checkpoint:
        parts = _identity(language_model, checkpoint) | {"projector": sha256_file(projector)}
    passport = _passport(parts)
    made = None if overwrite else _made_already(output, passport)
    if made is not None:
        return Conversion(output, made, (), is_new=False)
    task = {"version": chatbind_cli.__version__, "parts": parts}
    with PartialFolder(output, task, made_by=_COMMAND, overwrite=overwrite) as partial:
        bundle = build_chatbind(
            language_model,
            encoder=encoder_of(info),
            projector=projector,
            media_options=info.media_options,
        )
        with quiet_transformers():
            bundle.model.save_pretrained(partial.folder, max_shard_size=shard_bytes)
            bundle.tokenizer.save_pretrained(partial.folder)
        with open_checkpoint(partial.folder) as found:
            sha256 = fingerprint(found)
        write_passport(partial.folder, passport | {"sha256": sha256})
        partial.commit()
    return Conversion(output, sha256, ())


def _identity(folder: Path, checkpoint: Checkpoint) -> dict[str, str]:
    """What a folder is, its configuration and tokenizer included."""
    return {
        "name": folder.name,
        "sample_sha256": sample(checkpoint),
        "side_files": side_files_sha256(folder),
    }


def _passport(source: Mapping[str, str]) -> dict[str, Any]:
    return {"kind": "model", "made_by": f"chatbind {_COMMAND}", "source": dict(source)}


def _made_already(output: Path, passport: Mapping[str, Any]) -> str | None:
    """The hash of what an earlier conversion of the same source left; None if there is none."""
    found = read_passport(output) if output.is_dir() else {}
    if not found or any(found.get(key) != value for key, value in passport.items()):
        return None
    clear_replaced(output)
    return str(found["sha256"])


def _write_settings(
    config: Any, tokenizer: Any, infos: Mapping[str, TensorInfo], source: Path, folder: Path
) -> None:
    """Writes what a published folder says in another way: the configuration, the tokenizer."""
    dtypes = {str(info.dtype).removeprefix("torch.") for info in infos.values()}
    config.dtype = dtypes.pop() if len(dtypes) == 1 else config.dtype
    with quiet_transformers():
        config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    if is_side_file(source, GENERATION):
        shutil.copyfile(source / GENERATION, folder / GENERATION)


def _settings(source: Path) -> tuple[Any, Any]:
    """Our configuration, and the tokenizer; None for the latter where its files can stay.

    Raises:
        CheckpointError: the folder is no ChatBind model.
    """
    if is_published(source):
        return read_published(source)[:2]
    kind = read_json(source / "config.json", missing_ok=True).get("model_type")
    if kind != MODEL_TYPE:
        raise CheckpointError(
            f"is no ChatBind model but {kind or 'a folder without a config.json'}",
            where=str(source),
            hint="give the projector of a bare language model with --projector",
        )
    return open_config(source), None


def _wanted(config: Any, checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor that a model of this configuration has."""
    unusable = one_line("its config.json makes no model", checkpoint.path)
    with unusable, torch.device("meta"), within(checkpoint):
        model = ChatBindForConditionalGeneration(config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _match(
    checkpoint: Checkpoint, wanted: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, str], tuple[str, ...]]:
    """Our name -> the source's for every tensor that is wanted, and what is not.

    Raises:
        CheckpointError: a tensor is missing, or has another shape.
    """
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
    shards: Sequence[Shard],
    partial: PartialFolder,
) -> str:
    """Writes the weights that are not there yet; returns the fingerprint of all of them."""
    left = [shard for shard in shards if shard.file not in partial.done]
    needed = sum(infos[name].nbytes for shard in left for name in shard.tensors)
    refuse_full_disk(partial.folder, needed)
    with Progress(needed >> 20, "converting", "MiB") as progress:
        for shard in left:
            hashes: dict[str, str] = {}
            part = {name: infos[name] for name in shard.tensors}
            with SafetensorsWriter(partial.folder / shard.file, part) as writer:
                for name in writer.order:
                    digest = hashlib.sha256()
                    for piece in checkpoint.chunks(names[name], _PIECE_ELEMENTS):
                        digest.update(writer.append(piece))
                        progress.advance_bytes(piece.nbytes)
                    hashes[name] = digest.hexdigest()
            partial.record(shard.file, {"hashes": hashes})
    if len(shards) > 1:
        text = json.dumps(index_of(shards, infos), indent=2)
        (partial.folder / INDEX_NAMES[0]).write_text(text + "\n", encoding="utf-8")
    every = {
        name: hash for facts in partial.done.values() for name, hash in facts["hashes"].items()
    }
    return combine_hashes(infos, every)
