"""A ChatBind folder in memory, ours or a published one; and back on disk."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedTokenizerBase

from chatbind_cli.errors import CheckpointError
from chatbind_cli.folders import replace_folder
from chatbind_cli.model import published
from chatbind_cli.model.chatbind import ChatBindForConditionalGeneration, word_embeddings
from chatbind_cli.model.config import MODEL_TYPE, ChatBindConfig, saved_end_ids
from chatbind_cli.model.pretrained import open_config, open_model, quiet_transformers
from chatbind_cli.model.tokenizer import load_tokenizer, media_token_ids
from chatbind_cli.weights.json_file import read_json
from chatbind_cli.weights.likeness import refuse_unapplied


@dataclass(frozen=True)
class ChatBind:
    """What belongs together: model, tokenizer and configuration.

    Args:
        model: the model.
        tokenizer: with the media tokens.
        config: the model's configuration (`model.config`).
    """

    model: ChatBindForConditionalGeneration
    tokenizer: PreTrainedTokenizerBase
    config: ChatBindConfig


def is_chatbind(folder: Path) -> bool:
    """Whether a folder's config.json is that of a ChatBind model, ours or published."""
    fields = read_json(folder / "config.json", missing_ok=True)
    return fields.get("model_type") == MODEL_TYPE or published.is_published(folder)


def load_chatbind(
    path: str | Path,
    *,
    dtype: torch.dtype | str = "auto",
    device: str | torch.device | None = None,
    attn_implementation: str | None = None,
    device_map: Any = None,
) -> ChatBind:
    """Loads a ChatBind model folder, ours or one in the published layout.

    Args:
        path: the folder.
        dtype: type of the weights; `auto`: as saved.
        device: where to put the model; where it is loaded unless given.
        attn_implementation: see `attention.resolve_attention`; None: transformers' choice.
        device_map: as in transformers, in place of `device`.

    Raises:
        CheckpointError: it is no ChatBind model, or its weights are incomplete.
    """
    folder = Path(path)
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            "has no config.json" if folder.is_dir() else "no such folder",
            where=str(path),
            hint="a model comes from `chatbind finetune`, and the published one from `chatbind "
            "download` and `chatbind apply-delta`",
        )
    refuse_unapplied(folder)
    options = {
        "dtype": dtype,
        "device_map": device_map,
        "attn_implementation": attn_implementation,
    }
    load = published.load_published if published.is_published(folder) else _load_ours
    with quiet_transformers():
        model, tokenizer = load(folder, options)
    check_ids(model, tokenizer, str(path))
    for name, index in media_token_ids(tokenizer).items():
        own = getattr(model.config, name)
        if own is not None and own != index:
            raise CheckpointError(
                f"config.json says {name} = {own}, the tokenizer says {index}", where=str(path)
            )
    if device is not None and device_map is None:
        cast(Any, model).to(device)
    model.eval()
    return ChatBind(model, tokenizer, model.config)


def save_chatbind(bundle: ChatBind, folder: str | Path, *, overwrite: bool = False) -> None:
    """Writes a model folder, whole or not at all.

    Raises:
        ChatBindError: the folder exists and may not be replaced.
    """
    with (
        quiet_transformers(),
        replace_folder(Path(folder), made_by="save_chatbind", overwrite=overwrite) as temporary,
    ):
        bundle.model.save_pretrained(temporary)
        bundle.tokenizer.save_pretrained(temporary)


def check_ids(model: Any, tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    """Refuses a tokenizer with ids that a model has no embeddings for.

    Raises:
        CheckpointError: there is one.
    """
    rows = word_embeddings(model).num_embeddings
    wanted = max(tokenizer.get_vocab().values(), default=-1) + 1
    if wanted > rows:
        raise CheckpointError(
            f"the tokenizer has ids for {wanted} tokens, the model {rows} embeddings", where=where
        )


def _load_ours(
    folder: Path, options: dict[str, Any]
) -> tuple[ChatBindForConditionalGeneration, PreTrainedTokenizerBase]:
    config = open_config(folder)
    if config.model_type != MODEL_TYPE:
        raise CheckpointError(
            f"a {config.model_type} model, not a ChatBind model",
            where=str(folder),
            hint="finetune makes one from it",
        )
    model = open_model(
        folder,
        ChatBindForConditionalGeneration,
        config=config,
        generation_config=cast(ChatBindConfig, config).generation(saved_end_ids(folder)),
        **options,
    )
    return cast(ChatBindForConditionalGeneration, model), load_tokenizer(folder)
