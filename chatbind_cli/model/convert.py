"""`convert`: a ChatBind folder, published or ours, written in our layout, tensor by tensor.

Only names change: every tensor keeps its bits. `whole` has the other ways, for which a model is
loaded.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from chatbind_cli.checkpoints.checkpoint import Checkpoint, open_checkpoint
from chatbind_cli.checkpoints.delta import OWN_PREFIX, refuse_unapplied
from chatbind_cli.checkpoints.manifest import combine_hashes, is_rotary, made_from
from chatbind_cli.checkpoints.output_folder import (
    DEFAULT_SHARD_BYTES,
    Facts,
    Result,
    make_folder,
    source_facts,
)
from chatbind_cli.checkpoints.projector_file import is_published, projector_key
from chatbind_cli.checkpoints.safetensors_file import SafetensorsWriter, TensorInfo
from chatbind_cli.checkpoints.side_files import (
    GENERATION,
    copy_side_files,
    is_side_file,
    side_files_sha256,
)
from chatbind_cli.console import Progress
from chatbind_cli.errors import CheckpointError
from chatbind_cli.model.base import adapted_base
from chatbind_cli.model.loading import read_published, refuse_bare
from chatbind_cli.model.pretrained import (
    model_without_memory,
    one_line,
    open_config,
    quiet_transformers,
)

CONVERT: Final = "convert"


def convert(
    source: Path,
    output: Path,
    *,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    overwrite: bool = False,
) -> Result:
    """Writes a published ChatBind folder in our layout; one of ours is cut into other shards.

    `shard_bytes` is the largest size of an output file.

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
        side_files = side_files_sha256(source)

        def write_file(path: Path, tensors: list[str], progress: Progress) -> Facts:
            part = {name: infos[name] for name in tensors}
            return {"hashes": _copy(checkpoint, names, path, part, progress)}

        def finish(folder: Path, done: list[Facts]) -> dict[str, Any]:
            if tokenizer is None:
                copy_side_files(source, folder)
            else:
                _write_settings(config, tokenizer, infos, source, folder)
            hashes = {name: digest for facts in done for name, digest in facts["hashes"].items()}
            return made_from(checkpoint, combine_hashes(infos, hashes), source, side_files)

        return make_folder(
            output,
            infos,
            write_file,
            finish,
            made_by=CONVERT,
            label="converting",
            inputs={
                "source": source_facts(checkpoint),
                "side_files": side_files,
                "config": config.to_json_string(),
            },
            shard_bytes=shard_bytes,
            overwrite=overwrite,
            notes=[f"{len(left_out)} tensors have no place in it, the first is {left_out[0]}"]
            if left_out
            else [],
        )


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
    if adapted_base(source) is not None:
        raise CheckpointError(
            "holds adapters, and not the model that they belong to",
            where=str(source),
            hint="say --merge",
        )
    refuse_bare(source)
    return open_config(source), None


def _wanted(config: Any, checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor that a model of this configuration has."""
    with one_line("its config.json makes no model", checkpoint.path):
        model = model_without_memory(config, checkpoint)
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
        ours = name if name in wanted else OWN_PREFIX + name
        if "mm_projector" in name:
            ours = projector_key(name) or ours
        if ours in wanted:
            found[ours] = name
        elif not is_rotary(name):
            left_out.append(name)
    tied = checkpoint.text_config.get("tie_word_embeddings")
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


def _copy(
    checkpoint: Checkpoint,
    names: Mapping[str, str],
    path: Path,
    infos: Mapping[str, TensorInfo],
    progress: Progress,
) -> dict[str, str]:
    """Writes one file of tensors under our names; returns the hash of each."""
    hashes = {}
    with SafetensorsWriter(path, infos) as writer:
        for name in writer.order:
            digest = hashlib.sha256()
            for piece in checkpoint.chunks(names[name]):
                digest.update(writer.append(piece))
                progress.advance_bytes(piece.nbytes)
            hashes[name] = digest.hexdigest()
    return hashes
