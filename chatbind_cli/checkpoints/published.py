"""The published layout of a ChatBind model: a LLaMA folder with a projector among its tensors.

What the fields of `llava_image_bind_select` and `llava_image_bind_select_all` folders, and of
`llava` ones of LLaVA v0 and v1, mean in our words.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from chatbind_cli.checkpoints.json_file import read_json
from chatbind_cli.errors import CheckpointError

_KINDS = ("llava_image_bind_select", "llava_image_bind_select_all", "llava")


def is_published(folder: Path) -> bool:
    """Whether the folder's config.json names a published kind of model."""
    fields = read_json(folder / "config.json", missing_ok=True)
    # transformers has a `llava` of its own, with a vision tower inside and a nested config
    return fields.get("model_type") in _KINDS and "text_config" not in fields


def projector_facts(fields: Mapping[str, Any], where: str | Path) -> dict[str, Any]:
    """What a published config.json says of its projector, as fields of `ProjectorInfo`.

    Published scripts feed embeddings as they come from the encoder, audio with its scale of 20
    still on, and place clips as pytorchvideo 0.1.5 does.

    Raises:
        CheckpointError: `repeat_feature_dim` is no whole number.
    """
    repeat = fields.get("repeat_feature_dim") or 1
    if not isinstance(repeat, int):
        raise CheckpointError(f"repeat_feature_dim is {repeat!r:.40}", where=str(where))
    return {
        "tokens_per_embedding": max(repeat, 1),
        "projector_layout": "repeat",
        "use_start_end": bool(fields.get("mm_use_im_start_end")),
        "normalize_embeddings": False,
        "stage": "published",
        "encoder": {"name": "imagebind_huge"},
        "media_options": {"clip_sampler": "chatbind"},
    }


def language_model_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """What a published config.json says of its language model, as a LLaMA's config.json says it."""
    others = ("architectures", "use_mm_proj", "repeat_feature_dim")
    kept = {
        key: value
        for key, value in fields.items()
        if not key.startswith(("mm_", "tune_", "freeze_")) and key not in others
    }
    return {**kept, "model_type": "llama"}
