"""Published ChatBind checkpoints: a LLaMA folder with a projector among its tensors.

Maps the fields and key names of `llava_image_bind_select` and `llava_image_bind_select_all`
folders, and of `llava` ones of LLaVA v0 and v1, to ours. How such folders are made from deltas is
not known here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from chatbind_cli.errors import CheckpointError
from chatbind_cli.model.chatbind import ChatBindForConditionalGeneration
from chatbind_cli.model.config import ChatBindConfig, saved_end_ids
from chatbind_cli.model.pretrained import make_config, open_model
from chatbind_cli.model.projector_file import (
    ProjectorFile,
    ProjectorInfo,
    load_into,
    projector_from_tensors,
    projector_key,
)
from chatbind_cli.model.tokenizer import load_tokenizer, media_token_ids, prepare_tokenizer
from chatbind_cli.weights.checkpoint import open_checkpoint
from chatbind_cli.weights.json_file import read_json

PUBLISHED_TYPES = ("llava_image_bind_select", "llava_image_bind_select_all", "llava")

_V0_PADDING = "[PAD]"


def is_published(folder: Path) -> bool:
    """Whether the folder's config.json names a published kind of model."""
    fields = _read_config(folder)
    # transformers has a `llava` of its own, with a vision tower inside and a nested config
    return fields.get("model_type") in PUBLISHED_TYPES and "text_config" not in fields


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

    Raises:
        CheckpointError: there is no projector or no tokenizer.
        WeightsError: a weights file is broken.
    """
    fields = _read_config(folder)
    with open_checkpoint(folder) as source:
        found = {
            name: source.read(name)
            for name in source.tensors
            if "mm_projector" in name and projector_key(name) is not None
        }
    projector = projector_from_tensors(found, where=str(folder))
    tokenizer = _tokenizer(folder, bool(fields.get("mm_use_im_start_end")))
    config = config_from_published(fields, tokenizer, projector.info, folder)
    return config, tokenizer, projector


def config_from_published(
    fields: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    projector: ProjectorInfo,
    where: Path,
) -> ChatBindConfig:
    """Our configuration for a published one.

    Published scripts feed embeddings as they come from the encoder, audio with its scale of 20
    still on, and place clips as pytorchvideo 0.1.5 does. The vocabulary tells the version: only v0
    has `[PAD]`, and its scripts ask in the style `multimodal`; those of v1 in `llava_v1`.
    """
    repeat = fields.get("repeat_feature_dim") or 1
    if not isinstance(repeat, int):
        raise CheckpointError(f"repeat_feature_dim is {repeat!r:.40}", where=str(where))
    text = {
        key: value
        for key, value in fields.items()
        if not key.startswith(("mm_", "tune_", "freeze_"))
        and key not in ("architectures", "use_mm_proj", "repeat_feature_dim")
    }
    text["model_type"] = "llama"
    is_v0 = _V0_PADDING in tokenizer.get_vocab()
    return ChatBindConfig(
        text_config=make_config(text, where),
        embedding_dim=projector.embedding_dim,
        projector_type=projector.projector_type,
        tokens_per_embedding=max(repeat, 1),
        projector_layout="repeat",
        use_start_end=bool(fields.get("mm_use_im_start_end")),
        normalize_embeddings=False,
        prompt_style="multimodal" if is_v0 else "llava_v1",
        stage="published",
        encoder={"name": "imagebind_huge", "sha256": None},
        media_options={"clip_sampler": "chatbind"},
        provenance={"published": {k: v for k, v in fields.items() if k.startswith("mm_")}},
        **media_token_ids(tokenizer),
    )


def _read_config(folder: Path) -> dict[str, Any]:
    return read_json(folder / "config.json", missing_ok=True)


def _tokenizer(folder: Path, use_start_end: bool) -> PreTrainedTokenizerBase:
    tokenizer = load_tokenizer(folder)
    prepare_tokenizer(tokenizer, use_start_end=use_start_end)
    return tokenizer
