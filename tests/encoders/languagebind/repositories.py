"""Small random repositories of LanguageBind, as they are published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from chatbind_cli.encoders.languagebind.config import TextConfig, VisionConfig
from chatbind_cli.encoders.languagebind.model import TextTower, VisionTower

SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "hidden_act": "gelu"}
DIM = 8


def save_repository(folder: Path, modality: str, *, dim: int = DIM, **changes: Any) -> Path:
    """Writes config.json and weights of random numbers, the same for a seed."""
    vision: dict[str, Any] = {
        **SMALL, "num_attention_heads": 4, "image_size": 28, "patch_size": 14, "num_frames": 1,
        "lora_r": 0,
    }  # fmt: skip
    if modality == "audio":
        vision |= {"num_mel_bins": 28.0, "target_length": 56.0, "audio_std": 4.5}
    if modality == "video":
        vision |= {"num_frames": 4, "add_time_attn": True}
    texts = {**SMALL, "num_attention_heads": 2, "vocab_size": changes.pop("vocab_size", 49408)}
    vision |= changes
    config = {
        "model_type": f"LanguageBind{modality.title()}",
        "projection_dim": dim,
        "text_config": texts,
        "vision_config": vision,
    }
    known = VisionConfig(
        **{k: int(v) if "mel" in k or "target" in k else v for k, v in vision.items()}
    )
    torch.manual_seed(0)
    state = {
        **VisionTower(known, dim).state_dict(),
        **TextTower(TextConfig(**texts), dim).state_dict(),
    }
    state = {name: torch.randn(tensor.shape) * 0.5 for name, tensor in state.items()}
    state["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    folder.mkdir(parents=True)
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder
