"""Towers of other sizes than the published ones, beside plain arithmetic in float64."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional

from chatbind_cli.encoders.encoder import Decoded
from chatbind_cli.encoders.opening import open_encoder
from chatbind_cli.media.source import MediaSource
from tests.encoders.languagebind.repositories import DIM, save_repository

State = dict[str, torch.Tensor]
TABLE = "vision_model.embeddings.position_embedding.weight"


def norm(state: State, name: str, x: torch.Tensor) -> torch.Tensor:
    return functional.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])


def linear(state: State, name: str, x: torch.Tensor) -> torch.Tensor:
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def attention(state: State, name: str, heads: int, x: torch.Tensor) -> torch.Tensor:
    """[n, d] -> [n, d], head by head."""
    q, k, v = (
        x @ state[f"{name}.{p}_proj.weight"].T + state[f"{name}.{p}_proj.bias"] for p in "qkv"
    )
    size = x.shape[1] // heads
    parts = [slice(head * size, (head + 1) * size) for head in range(heads)]
    mixed = [(q[:, p] @ k[:, p].T / size**0.5).softmax(dim=-1) @ v[:, p] for p in parts]
    return linear(state, f"{name}.out_proj", torch.cat(mixed, dim=1))


def block(state: State, name: str, config: dict[str, Any], x: torch.Tensor) -> torch.Tensor:
    """[t, n, d] -> [t, n, d]."""
    heads = config["num_attention_heads"]
    if config.get("add_time_attn"):
        x = x + state[f"{name}.temporal_embedding"][0][:, None]
        places = [norm(state, f"{name}.temporal_layer_norm1", x[:, n]) for n in range(x.shape[1])]
        seen = [attention(state, f"{name}.temporal_attn", heads, place) for place in places]
        x = x + torch.stack(seen, dim=1)
    frames = norm(state, f"{name}.layer_norm1", x)
    x = x + torch.stack([attention(state, f"{name}.self_attn", heads, one) for one in frames])
    hidden = linear(state, f"{name}.mlp.fc1", norm(state, f"{name}.layer_norm2", x))
    quick = hidden / (1 + (-1.702 * hidden).exp())
    hidden = quick if config["hidden_act"] == "quick_gelu" else functional.gelu(hidden)
    return x + linear(state, f"{name}.mlp.fc2", hidden)


def plain(folder: Path, medium: torch.Tensor, table: torch.Tensor | None = None) -> torch.Tensor:
    """The scaled embedding of [3, rows, columns] or [3, t, rows, columns]."""
    state = {k: v.double() for k, v in load_file(folder / "model.safetensors").items()}
    config = json.loads((folder / "config.json").read_text())["vision_config"]
    film = medium.double() if medium.ndim == 4 else medium.double()[:, None]
    weight, patch = state["vision_model.embeddings.patch_embedding.weight"], config["patch_size"]
    weight = weight.view(weight.shape[0], 3, 1, patch, patch)
    patches = functional.conv3d(film[None], weight, stride=(1, patch, patch))[0]  # [d, t, r, c]
    tokens = patches.flatten(2).permute(1, 2, 0)
    first = state["vision_model.embeddings.class_embedding"].reshape(-1, 1, tokens.shape[2])
    x = torch.cat([first.expand(len(tokens), -1, -1), tokens], dim=1)
    x = norm(state, "vision_model.pre_layrnorm", x + (state[TABLE] if table is None else table))
    for number in range(config["num_hidden_layers"]):
        x = block(state, f"vision_model.encoder.layers.{number}", config, x)
    pooled = norm(state, "vision_model.post_layernorm", x[:, 0]).mean(dim=0)
    row = state["visual_projection.weight"] @ pooled
    return row / row.norm() * state["logit_scale"].exp()


def embedded(folder: Path, modality: str, medium: torch.Tensor) -> torch.Tensor:
    item = Decoded(MediaSource("x", data=b"x"), modality, medium)
    return open_encoder(folder).embed([item], normalize=False)[0]


@pytest.mark.parametrize(
    ("modality", "shape", "changes"),
    [
        ("image", (45, 45), {"image_size": 45, "num_attention_heads": 2, "num_hidden_layers": 1}),
        ("thermal", (64, 64), {"image_size": 64, "patch_size": 32, "hidden_act": "quick_gelu"}),
        ("depth", (28, 28), {"hidden_size": 30, "num_attention_heads": 3, "tube_size": 2}),
        ("audio", (30, 75), {"num_mel_bins": 30, "target_length": 75.0, "image_size": 224}),
        ("video", (5, 28, 28), {"num_frames": 5, "num_attention_heads": 8}),
        (
            "video",
            (3, 28, 28),
            {"num_frames": 3, "clip_type": "vl_new", "hidden_act": "quick_gelu"},
        ),
        ("video", (2, 28, 28), {"num_frames": 2, "add_time_attn": False}),
    ],
)
def test_a_tower_of_any_size_is_what_plain_arithmetic_makes_it(
    modality: str, shape: tuple[int, ...], changes: dict[str, Any], tmp_path: Path
) -> None:
    folder = save_repository(tmp_path / "one", modality, **changes)
    medium = torch.randn(3, *shape, generator=torch.Generator().manual_seed(1))
    wanted = plain(folder, medium)
    found = embedded(folder, modality, medium)
    assert found.shape == (DIM,)
    assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_a_table_of_square_places_is_resized_for_a_sound(tmp_path: Path) -> None:
    folder = save_repository(tmp_path / "one", "audio", image_size=70)  # 5 x 5; the sound's: 2 x 4
    state = load_file(folder / "model.safetensors")
    state[TABLE] = torch.randn(1 + 5 * 5, 16)
    save_file(state, folder / "model.safetensors")
    squares = state[TABLE][1:].T.reshape(16, 5, 5).numpy()
    # Pillow's bicubic is antialiased, too
    fitted = [np.asarray(Image.fromarray(one).resize((4, 2), Image.BICUBIC)) for one in squares]
    places = torch.from_numpy(np.stack(fitted)).flatten(1).T
    medium = torch.randn(3, 28, 56, generator=torch.Generator().manual_seed(1))
    wanted = plain(folder, medium, torch.cat([state[TABLE][:1], places]).double())
    found = embedded(folder, "audio", medium)
    assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()
