"""`convert`, where a model is loaded whole: joined, merged, or its language model by itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import chatbind_cli
from chatbind_cli.checkpoints.checkpoint import open_checkpoint
from chatbind_cli.checkpoints.manifest import fingerprint, made_from, write_manifest
from chatbind_cli.checkpoints.output_folder import (
    DEFAULT_SHARD_BYTES,
    Result,
    made_already,
    source_facts,
)
from chatbind_cli.checkpoints.projector_file import read_projector
from chatbind_cli.checkpoints.side_files import side_files_sha256
from chatbind_cli.errors import CheckpointError
from chatbind_cli.files import sha256_file, sha256_text
from chatbind_cli.folders import replace_folder
from chatbind_cli.model.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from chatbind_cli.model.assemble import build_chatbind
from chatbind_cli.model.base import adapted_base, find_base, weights_folder
from chatbind_cli.model.config import encoder_of
from chatbind_cli.model.convert import CONVERT
from chatbind_cli.model.loading import PROJECTOR_NAME, ChatBind, load_chatbind, refuse_bare
from chatbind_cli.model.pretrained import quiet_transformers
from chatbind_cli.model.probe import note_probe, place_probe

_ADAPTERS = (ADAPTER_CONFIG, ADAPTER_WEIGHTS, PROJECTOR_NAME)


def join(
    language_model: Path,
    projector: Path,
    output: Path,
    *,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    overwrite: bool = False,
) -> Result:
    """Writes a language model and a projector as one ChatBind folder, as `ask` would join them.

    Any causal language model will do, whatever its tensors are called; so it is loaded whole, and
    takes as much memory as it has weights. The projector may be ours or a published one.

    Raises:
        CheckpointError: one of the two cannot be used, or they do not fit together.
        ChatBindError: the output is there already.
    """
    info = read_projector(projector).info

    def load() -> ChatBind:
        bundle = build_chatbind(
            language_model,
            encoder=encoder_of(info),
            projector=projector,
            media_options=info.media_options,
        )
        bundle.model.projector.to(bundle.model.language_model.dtype)
        return bundle

    parts = {"projector": sha256_file(projector)}
    how: dict[str, Any] = {"shard_bytes": shard_bytes, "overwrite": overwrite}
    return _make(output, load, language_model, weights=language_model, parts=parts, **how)


def merge(
    source: Path,
    output: Path,
    *,
    base: Path | None = None,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    overwrite: bool = False,
) -> Result:
    """Writes a folder of adapters and the model that they belong to as one ChatBind folder.

    Matrices become what `ask` makes of them, and keep the numbers of the base model: what adapters
    add to a bfloat16 matrix is rounded to that. The model is loaded whole.

    Args:
        source: of `finetune --lora-r`.
        output: the folder to make.
        base: the model that the adapters belong to, where it has moved.
        shard_bytes: the largest size of an output file.
        overwrite: replace what an earlier call has made.

    Raises:
        CheckpointError: the source holds no adapters, or they do not fit to the base.
        ChatBindError: the output is there already.
    """
    if adapted_base(source) is None:
        raise CheckpointError("holds no adapters to merge", where=str(source))
    place = find_base(source, base)
    load, parts = partial(load_chatbind, source, base=place), {"adapters": _adapters(source)}
    how: dict[str, Any] = {"shard_bytes": shard_bytes, "overwrite": overwrite}
    return _make(output, load, source, weights=place, parts=parts, **how)


def language_model(
    source: Path,
    output: Path,
    *,
    base: Path | None = None,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    overwrite: bool = False,
) -> Result:
    """Writes the language model of a ChatBind folder, ours, published or of adapters, by itself.

    Its folder is that of a plain causal language model, with the tokens for media in its tokenizer
    and its word embeddings: what engines open. How it answers a probe is noted in it and beside
    the model that it was made of, so that the two are known to belong together (see `probe`).

    Raises:
        CheckpointError: the source is no ChatBind folder, or cannot be used.
        ChatBindError: the output is there already.
    """
    refuse_bare(source)
    place = weights_folder(source, base)
    adapted = place != source
    parts = {"adapters": _adapters(source)} if adapted else {}
    # in the numbers of the weights, of which nothing is copied: the files are their memory
    load = partial(load_chatbind, source, base=place if adapted else None)
    how: dict[str, Any] = {"shard_bytes": shard_bytes, "overwrite": overwrite}
    result = _make(output, load, source, weights=place, parts=parts, plain=True, **how)
    note = place_probe(output, source)
    return replace(result, notes=(*result.notes, note)) if note else result


def _make(
    output: Path,
    load: Callable[[], ChatBind],
    source: Path,
    *,
    weights: Path,
    parts: Mapping[str, Any],
    shard_bytes: int,
    overwrite: bool,
    plain: bool = False,
) -> Result:
    """Makes a folder of a model that is loaded whole, unless an earlier call has made the same.

    Args:
        output: the folder to make.
        load: loads the model.
        source: the folder with the tokenizer.
        weights: the folder with the language model's weights.
        parts: hashes of what else the model is made of.
        shard_bytes: the largest size of an output file.
        overwrite: replace what an earlier call has made.
        plain: write its language model alone.

    Raises:
        ChatBindError: whatever loading raises, or the output is there already.
    """
    with open_checkpoint(weights) as checkpoint:
        side_files = side_files_sha256(source)
        facts = [source_facts(checkpoint), side_files, parts, shard_bytes, plain]
        task = sha256_text(f"{chatbind_cli.__version__} {facts}")
        made = None if overwrite else made_already(output, task)
        if made is not None:
            return made
        with replace_folder(output, made_by=CONVERT, overwrite=overwrite) as folder:
            bundle = load()
            model: Any = bundle.model
            if plain:
                note_probe(bundle, source, folder)
                model = bundle.model.language_model
                model.generation_config = bundle.model.generation_config
            with quiet_transformers():
                model.save_pretrained(folder, max_shard_size=shard_bytes)
                bundle.tokenizer.save_pretrained(folder)
            with open_checkpoint(folder) as found:
                sha256 = fingerprint(found)
            manifest = made_from(checkpoint, sha256, weights, side_files)
            manifest["source"] |= parts
            write_manifest(folder, {**manifest, "task": task}, made_by=CONVERT)
    return Result(output, sha256)


def _adapters(source: Path) -> dict[str, str]:
    return {name: sha256_file(source / name) for name in _ADAPTERS}
