"""`extract-projector`: the projector out of a checkpoint, and nothing of it read but that.

Of a 13 GB checkpoint a few megabytes are read: the projector's tensors and the rows of the word
embeddings that belong to the media tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from chatbind_cli.checkpoints.checkpoint import (
    WORD_EMBEDDINGS,
    Checkpoint,
    open_checkpoint,
    open_tensor_file,
)
from chatbind_cli.checkpoints.json_file import read_json
from chatbind_cli.checkpoints.manifest import read_manifest
from chatbind_cli.checkpoints.projector_file import (
    MEDIA_TOKENS,
    ProjectorFile,
    check_projector_name,
    is_published,
    projector_facts,
    projector_from_tensors,
    projector_key,
    read_projector,
    write_projector,
)
from chatbind_cli.errors import CheckpointError, WeightsError
from chatbind_cli.files import bears, refuse_foreign_file


def extract_projector(checkpoint: Path, output: Path) -> tuple[ProjectorFile, list[str]]:
    """Writes the projector of a checkpoint as one file.

    Args:
        checkpoint: a ChatBind folder, ours or published, or a weights file.
        output: `.safetensors`, or `.bin` for the published layout.

    Returns:
        What was written, and the names of its tensors as the checkpoint spells them.

    Raises:
        CheckpointError: there is no projector in it, or the output's name ends in something else.
        ChatBindError: the output is there, and is no projector file.
        WeightsError: a weights file is broken.
    """
    check_projector_name(output)
    refuse_foreign_file(output, _is_projector_file, what="a projector")
    projector, names = find_projector(checkpoint)
    write_projector(output, projector)
    return projector, names


def find_projector(checkpoint: Path) -> tuple[ProjectorFile, list[str]]:
    """The projector of a checkpoint, and the names of its tensors as the checkpoint spells them.

    Raises:
        CheckpointError: there is none, or the checkpoint is a delta not yet applied.
        WeightsError: a weights file is broken.
    """
    with open_checkpoint(checkpoint) as source:
        if read_manifest(source.folder).get("kind") == "delta":
            raise CheckpointError(
                "is a delta",
                where=str(checkpoint),
                hint="apply it first with `chatbind apply-delta`",
            )
        names = [name for name in source.tensors if projector_key(name) is not None]
        if not names:
            raise CheckpointError(
                "has no projector",
                where=str(checkpoint),
                hint="is it a language model without one? `pretrain` makes one",
            )
        if any(name.startswith("token_embeddings.") for name in source.tensors):
            # What stage 1 leaves is a projector file already, and knows more than its tensors.
            return read_projector(source.files[0].path), names
        tensors = {name: source.read(name) for name in names}
        tensors |= {f"token_embeddings.{name}": row for name, row in _token_rows(source)}
        info = _info(source)
    return projector_from_tensors(tensors, where=str(checkpoint), info=info), names


def _is_projector_file(path: Path) -> bool:
    """Whether a file holds a projector and no more; the published layout has no room for a mark."""
    try:
        file = open_tensor_file(path)
    except WeightsError:
        return False
    rest = {name: info for name, info in file.tensors.items() if projector_key(name) is None}
    if len(rest) == len(file.tensors) or any(
        not name.startswith("token_embeddings.")
        and not (name.endswith(WORD_EMBEDDINGS) and info.shape[:1] == (2,))  # <im_start>, <im_end>
        for name, info in rest.items()
    ):
        return False
    return path.suffix == ".bin" or bears(path, b'"chatbind"')


def _info(source: Checkpoint) -> dict[str, Any]:
    """What the config says of the projector, in the words of a projector file."""
    config = source.config
    if config.get("model_type") == "chatbind":
        return config
    if is_published(source.folder):
        return projector_facts(config, source.folder / "config.json")
    return {}


def _token_rows(source: Checkpoint) -> Iterator[tuple[str, torch.Tensor]]:
    """The media tokens' word embeddings, each [hidden_size], as far as they can be told."""
    table = next((name for name in source.tensors if name.endswith(WORD_EMBEDDINGS)), None)
    if table is None:
        return
    info = source.info(table)
    width = info.shape[-1]
    for name, index in _token_ids(source).items():
        # A projector-only file of LLaVA's has two rows in place of the whole table.
        if len(info.shape) == 2 and 0 <= index < info.shape[0]:
            yield name, source.read_flat(table, index * width, (index + 1) * width)


def _token_ids(source: Checkpoint) -> dict[str, int]:
    """`im_start` -> token id and so on, from our config or the tokenizer's files."""
    config = source.config
    if config.get("model_type") == "chatbind":
        found = {name: config.get(f"{name}_id") for name in MEDIA_TOKENS}
        return {name: index for name, index in found.items() if isinstance(index, int)}
    added = _added_tokens(source.folder)
    return {name: added[f"<{name}>"] for name in MEDIA_TOKENS if f"<{name}>" in added}


def _added_tokens(folder: Path) -> dict[str, int]:
    """Added tokens and their ids, from whichever of the tokenizer's files tells them."""
    added = {
        token: index
        for token, index in read_json(folder / "added_tokens.json", missing_ok=True).items()
        if isinstance(index, int)
    }
    try:
        for entry in read_json(folder / "tokenizer.json", missing_ok=True).get("added_tokens", ()):
            added[entry["content"]] = int(entry["id"])
        config = read_json(folder / "tokenizer_config.json", missing_ok=True)
        for index, entry in config.get("added_tokens_decoder", {}).items():
            added[entry["content"]] = int(index)
    except (TypeError, ValueError, LookupError, AttributeError) as error:
        raise CheckpointError("its added tokens cannot be read", where=str(folder)) from error
    return added
