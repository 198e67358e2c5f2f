"""Small repositories with random weights, as transformers saves them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, PreTrainedModel

from chatbind_cli.model.pretrained import quiet_transformers

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
TEXT = {**SIZES, "vocab_size": 300, "max_position_embeddings": 16}
VISION = {**SIZES, "image_size": 32, "patch_size": 8}


def save(folder: Path, model: PreTrainedModel, processor: Any = None) -> Path:
    with quiet_transformers():
        model.save_pretrained(folder)
        if processor is not None:
            processor.save_pretrained(folder)
    return folder


def clip(folder: Path) -> tuple[Path, CLIPModel]:
    torch.manual_seed(0)
    ids = {"bos_token_id": 298, "eos_token_id": 299, "pad_token_id": 299}
    with quiet_transformers():
        config = CLIPConfig(text_config={**TEXT, **ids}, vision_config=VISION, projection_dim=24)
        model = CLIPModel(config).eval()
        processor = CLIPImageProcessor(
            size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
        )
    return save(folder, model, processor), model


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
