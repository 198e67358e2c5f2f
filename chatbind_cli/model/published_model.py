"""Folders in the published layout opened as ChatBind models.

What their fields and tensors mean is known to `weights.published`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from chatbind_cli.model.chatbind import ChatBindForConditionalGeneration
from chatbind_cli.model.config import ChatBindConfig, saved_end_ids
from chatbind_cli.model.pretrained import make_config, open_model
from chatbind_cli.model.projector_weights import load_into
from chatbind_cli.model.tokenizer import load_tokenizer, media_token_ids, prepare_tokenizer
from chatbind_cli.weights.json_file import read_json
from chatbind_cli.weights.projector_file import ProjectorFile
from chatbind_cli.weights.published import (
    language_model_fields,
    projector_facts,
    read_published_projector,
)

_V0_PADDING = "[PAD]"


def load_published(
    folder: Path, options: dict[str, Any]
) -> tuple[ChatBindForConditionalGeneration, PreTrainedTokenizerBase]:
    """Opens a folder in the published layout.

    Args:
        folder: with config.json, weights (one file or shards, `.bin` or safetensors), tokenizer.
        options: for `from_pretrained` (dtype, ...).

    Raises:
        CheckpointError: the weights cannot be read or have no projector, or there is no tokenizer.
    """
    config, tokenizer, projector = read_published(folder)
    base = open_model(
        folder,
        LlamaForCausalLM,
        config=cast(LlamaConfig, config.text_config),
        generation_config=config.generation(saved_end_ids(folder)),
        **options,
    )
    model = ChatBindForConditionalGeneration(config, base)
    model.projector.to(device=base.device, dtype=base.dtype)
    load_into(model, projector, str(folder))
    return model, tokenizer


def read_published(
    folder: Path,
) -> tuple[ChatBindConfig, PreTrainedTokenizerBase, ProjectorFile]:
    """All of a published folder but its language model: a few megabytes are read.

    The vocabulary tells the version: only v0 has `[PAD]`, and its scripts ask in the style
    `multimodal`; those of v1 in `llava_v1`.

    Raises:
        CheckpointError: there is no projector or no tokenizer.
        WeightsError: a weights file is broken.
    """
    where = folder / "config.json"
    fields = read_json(where, missing_ok=True)
    projector = read_published_projector(folder)
    facts = projector_facts(fields, where)
    tokenizer = load_tokenizer(folder)
    prepare_tokenizer(tokenizer, use_start_end=facts["use_start_end"])
    config = ChatBindConfig(
        text_config=make_config(language_model_fields(fields), where),
        embedding_dim=projector.info.embedding_dim,
        projector_type=projector.info.projector_type,
        prompt_style="multimodal" if _V0_PADDING in tokenizer.get_vocab() else "llava_v1",
        provenance={"published": {k: v for k, v in fields.items() if k.startswith("mm_")}},
        **facts | {"encoder": {**facts["encoder"], "sha256": None}},
        **media_token_ids(tokenizer),
    )
    return config, tokenizer, projector
