"""What a stage leaves behind: the projector and what it fits to, or a whole ChatBind model.

Knows nothing of how they were trained.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Final

import torch
from transformers import PreTrainedConfig

from chatbind_cli.files import sha256_file
from chatbind_cli.model.loading import ChatBind
from chatbind_cli.model.projector_file import ProjectorFile, projector_of, write_projector
from chatbind_cli.model.tokenizer import media_rows
from chatbind_cli.training.stages import RowEmbedding

PROJECTOR_NAME: Final = "projector.safetensors"
CONFIG_NAME: Final = "config.json"


def trained_projector(bundle: ChatBind) -> ProjectorFile:
    """The projector of a model in training, with the trained embeddings of the media tokens.

    The command line stays out of it, so that the same training gives the same file wherever its
    output goes; the folder's config.json has it.
    """
    projector = projector_of(bundle.model)
    provenance = {k: v for k, v in projector.info.provenance.items() if k != "command"}
    words = dict(projector.token_embeddings)
    embeddings = bundle.model.get_input_embeddings()
    if isinstance(embeddings, RowEmbedding):
        rows = dict(zip(embeddings.ids, embeddings.rows.detach().cpu(), strict=True))
        for name, token in media_rows(bundle.config).items():
            if token in rows:
                words[name] = rows[token].clone()
    return ProjectorFile(replace(projector.info, provenance=provenance), projector.tensors, words)


def write_stage_1(bundle: ChatBind, folder: Path) -> None:
    """Writes what stage 1 makes: projector, configuration and tokenizer, not the frozen weights.

    Args:
        bundle: the model in training.
        folder: an existing folder.
    """
    write_projector(folder / PROJECTOR_NAME, trained_projector(bundle))
    bundle.config.save_pretrained(folder)
    bundle.tokenizer.save_pretrained(folder)


def write_model(
    bundle: ChatBind, folder: Path, state: dict[str, torch.Tensor], dtype: torch.dtype
) -> None:
    """Writes a model folder for `from_pretrained`.

    Args:
        bundle: the trained model.
        folder: an existing folder.
        state: its weights, gathered from wherever they were sharded.
        dtype: in which they are saved.
    """
    converted: dict[int, torch.Tensor] = {}
    weights = {}
    for name, tensor in state.items():
        # tied weights are one tensor under two names, and are to stay one
        same = converted.get(tensor.data_ptr())
        if same is None or same.shape != tensor.shape:
            same = tensor.to("cpu", dtype if tensor.is_floating_point() else tensor.dtype)
            converted[tensor.data_ptr()] = same
        weights[name] = same
    bundle.model.save_pretrained(folder, state_dict=weights)
    # saving notes the dtype that the model was trained in; the next reader wants the file's
    text_config = bundle.config.text_config
    assert isinstance(text_config, PreTrainedConfig)
    bundle.config.dtype = text_config.dtype = dtype
    bundle.config.save_pretrained(folder)
    bundle.tokenizer.save_pretrained(folder)


def weights_sha256(folder: Path) -> str:
    """SHA-256 of a folder's weights file; of several, of the list of their hashes."""
    files = sorted(folder.glob("*.safetensors"))
    hashes = [sha256_file(file) for file in files]
    if len(hashes) == 1:
        return hashes[0]
    listing = "".join(f"{h}  {f.name}\n" for h, f in zip(hashes, files, strict=True))
    return hashlib.sha256(listing.encode()).hexdigest()
