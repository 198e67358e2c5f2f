"""Small repositories with random weights, as transformers saves them."""

from __future__ import annotations

import json
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    PreTrainedTokenizerFast,
    SiglipImageProcessor,
    ViTImageProcessor,
)

from chatbind_cli.model.pretrained import quiet_transformers

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
IDS = {"bos_token_id": 298, "eos_token_id": 299, "pad_token_id": 299}
TEXT = {**SIZES, "vocab_size": 300, "max_position_embeddings": 16, **IDS}
VISION = {**SIZES, "image_size": 32, "patch_size": 8}
SQUARE = {"height": 32, "width": 32}


def _clip_processor() -> Any:
    return CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=SQUARE)


def _two(name: str, vision: dict[str, Any], processor: Any, **more: Any) -> Callable[[], Any]:
    def make() -> Any:
        config = getattr(transformers, f"{name}Config")(
            text_config={**TEXT, "projection_size": 32}, vision_config=vision, **more
        )
        return getattr(transformers, f"{name}Model")(config), processor()

    return make


def _one(
    name: str, processor: Any, head: str = "Model", sizes: dict[str, Any] = VISION
) -> Callable[[], Any]:
    def make() -> Any:
        config = getattr(transformers, f"{name}Config")(**sizes)
        return getattr(transformers, f"{name}{head}")(config), processor()

    return make


KINDS = {
    "clip": _two("CLIP", VISION, _clip_processor, projection_dim=24),
    "clipseg": _two("CLIPSeg", VISION, _clip_processor, projection_dim=24),
    "metaclip_2": _two("MetaClip2", VISION, _clip_processor, projection_dim=24),
    "siglip": _two("Siglip", VISION, lambda: SiglipImageProcessor(size=SQUARE)),
    "siglip2": _two(
        "Siglip2",
        {**SIZES, "patch_size": 8, "num_patches": 16},
        lambda: transformers.Siglip2ImageProcessor(patch_size=8, max_num_patches=16),
    ),
    "dinov2": _one("Dinov2", lambda: transformers.BitImageProcessor(size={"shortest_edge": 32})),
    "resnet": _one(
        "ResNet",
        lambda: ViTImageProcessor(size=SQUARE),
        sizes={"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [1, 1]},
    ),
    "vit": _one("ViT", lambda: ViTImageProcessor(size=SQUARE)),
    "vit classifier": _one("ViT", lambda: ViTImageProcessor(size=SQUARE), "ForImageClassification"),
}
"""Of each kind a model and its picture processor."""

TWO_TOWERS = ("clip", "clipseg", "metaclip_2", "siglip", "siglip2")


def make(kind: str, folder: Path) -> Path:
    """Saves a repository of one of `KINDS`, with random weights."""
    torch.manual_seed(0)
    with quiet_transformers():
        model, processor = KINDS[kind]()
        if kind in TWO_TOWERS:
            with torch.no_grad():
                model.logit_scale.fill_(2.5)
            words = tokenizer(masked="clip" in kind)
            whole = transformers.CLIPProcessor if kind == "clip" else transformers.SiglipProcessor
            processor = whole(processor, words)
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    return folder


def clip(folder: Path) -> tuple[Path, CLIPModel]:
    """A CLIP without a tokenizer, and its model."""
    torch.manual_seed(0)
    with quiet_transformers():
        config = CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=24)
        model = CLIPModel(config).eval()
        model.save_pretrained(folder)
        _clip_processor().save_pretrained(folder)
    return folder, model


def tokenizer(*, masked: bool) -> PreTrainedTokenizerFast:
    """Letters, those inside of words apart."""
    letters = dict(zip(string.ascii_lowercase, range(26), strict=True))
    inside = {f"##{letter}": 26 + index for letter, index in letters.items()}
    marks = {"<unk>": 297, "<s>": 298, "</s>": 299}
    made = Tokenizer(models.WordPiece({**letters, **inside, **marks}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 298), ("</s>", 299)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        model_max_length=16,
        model_input_names=["input_ids", "attention_mask"] if masked else ["input_ids"],
    )


def close(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Whether each row is equal to 1e-5 of its largest number."""
    most = wanted.abs().amax(dim=-1, keepdim=True)
    return bool(((found - wanted).abs() <= 1e-5 * most).all())


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
