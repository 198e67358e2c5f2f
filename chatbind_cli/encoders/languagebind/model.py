"""LanguageBind's towers: CLIP's, with an attention over time in that of films.

Parameter names are those of the published checkpoints, LoRA merged and its wrapper's names left
out, so that a state dict loads strictly.

Shapes: b batch, t frames, n tokens (class token first), d width.

Source: Zhu et al., "LanguageBind", ICLR 2024; CLIP (Radford et al., 2021).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from chatbind_cli.encoders.languagebind.config import TextConfig, VisionConfig


class _Attention(nn.Module):
    """Self-attention: [b, n, d] -> [b, n, d]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor, *, causal: bool = False) -> torch.Tensor:
        q, k, v = (
            projection(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))


class _Mlp(nn.Module):
    def __init__(self, config: TextConfig | VisionConfig) -> None:
        super().__init__()
        self.quick = config.hidden_act == "quick_gelu"
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.fc1(x)
        return self.fc2(x * torch.sigmoid(1.702 * x) if self.quick else F.gelu(x))


class _Block(nn.Module):
    """A pre-norm block; `frames` are those of an attention over time, 0 for none."""

    def __init__(self, config: TextConfig | VisionConfig, frames: int = 0) -> None:
        super().__init__()
        width, heads, eps = config.hidden_size, config.num_attention_heads, config.layer_norm_eps
        self.frames = frames
        self.self_attn = _Attention(width, heads)
        self.layer_norm1 = nn.LayerNorm(width, eps=eps)
        self.mlp = _Mlp(config)
        self.layer_norm2 = nn.LayerNorm(width, eps=eps)
        if frames:
            self.temporal_embedding = nn.Parameter(torch.empty(1, frames, width))
            self.temporal_attn = _Attention(width, heads)
            self.temporal_layer_norm1 = nn.LayerNorm(width, eps=eps)

    def forward(self, x: torch.Tensor, *, causal: bool = False) -> torch.Tensor:
        """Returns [b, n, d] for [b, n, d]; with time, the frames of a film follow each other."""
        if self.frames:
            x = self._over_time(x.unflatten(0, (-1, self.frames))).flatten(0, 1)
        x = x + self.self_attn(self.layer_norm1(x), causal=causal)
        return x + self.mlp(self.layer_norm2(x))

    def _over_time(self, x: torch.Tensor) -> torch.Tensor:
        """[b, t, n, d]: each place of a frame looks at the same place of the others."""
        x = x + self.temporal_embedding[:, :, None]
        places = self.temporal_layer_norm1(x).transpose(1, 2)  # [b, n, t, d]
        mixed = self.temporal_attn(places.flatten(0, 1)).unflatten(0, places.shape[:2])
        return x + mixed.transpose(1, 2)


class _Encoder(nn.Module):
    def __init__(self, config: TextConfig | VisionConfig, frames: int = 0) -> None:
        super().__init__()
        blocks = range(config.num_hidden_layers)
        self.layers = nn.ModuleList(_Block(config, frames) for _ in blocks)

    def forward(self, x: torch.Tensor, *, causal: bool = False) -> torch.Tensor:
        for block in self.layers:
            x = block(x, causal=causal)
        return x


class _VisionEmbeddings(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        width, patch = config.hidden_size, config.patch_size
        rows, columns = config.grid
        timed = config.clip_type == "vl_new"
        kernel = (1, patch, patch) if timed else (patch, patch)
        self.patch = patch
        self.class_embedding = nn.Parameter(
            torch.empty(config.num_frames, width) if timed else torch.empty(width)
        )
        self.patch_embedding = nn.Module()
        self.patch_embedding.weight = nn.Parameter(torch.empty(width, 3, *kernel))
        self.position_embedding = nn.Embedding(1 + rows * columns, width)

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        """Returns the tokens [b t, n, d] of frames [b t, 3, rows, columns]."""
        weight = self.patch_embedding.get_parameter("weight").flatten(1)
        # as a matrix product: on GPUs cuDNN's convolutions would round float32 to TF32 by default
        pixels = F.unfold(frames, self.patch, stride=self.patch).mT  # [b t, patches, 3 patch^2]
        classes = self.class_embedding.view(-1, weight.shape[0])  # one, or one a frame
        classes = classes.repeat(len(frames) // len(classes), 1)[:, None]
        tokens = torch.cat([classes, F.linear(pixels, weight)], dim=1)
        return tokens + self.position_embedding.weight


class _VisionModel(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        self.embeddings = _VisionEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(width, eps=eps)  # sic
        self.encoder = _Encoder(config, config.num_frames if config.add_time_attn else 0)
        self.post_layernorm = nn.LayerNorm(width, eps=eps)

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        x = self.encoder(self.pre_layrnorm(self.embeddings(frames)))
        return self.post_layernorm(x[:, 0])


class VisionTower(nn.Module):
    """The tower of a modality, its projection, and the scale of its embeddings."""

    def __init__(self, config: VisionConfig, dim: int) -> None:
        super().__init__()
        self.vision_model = _VisionModel(config)
        self.visual_projection = nn.Linear(config.hidden_size, dim, bias=False)
        self.logit_scale = nn.Parameter(torch.empty(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns embeddings [b, dim], float32, of norm exp(logit_scale).

        Args:
            x: [b, 3, rows, columns], or [b, 3, t, rows, columns].
        """
        x = x.to(self.visual_projection.weight.dtype)
        x = x[:, :, None] if x.ndim == 4 else x
        each = self.vision_model(x.transpose(1, 2).flatten(0, 1))
        pooled = each.unflatten(0, (len(x), -1)).mean(dim=1)
        projected = self.visual_projection(pooled).float()
        return F.normalize(projected, dim=-1) * self.logit_scale.float().exp()


class _TextEmbeddings(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)


class _TextModel(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.embeddings = _TextEmbeddings(config)
        self.encoder = _Encoder(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        table = self.embeddings.position_embedding.weight
        x = self.embeddings.token_embedding(ids) + table[: ids.shape[1]]
        x = self.final_layer_norm(self.encoder(x, causal=True))
        # the end of the text has the highest id; after it comes nothing but the same
        return x[torch.arange(len(ids), device=ids.device), ids.argmax(dim=-1)]


class TextTower(nn.Module):
    """The text tower and its projection."""

    def __init__(self, config: TextConfig, dim: int) -> None:
        super().__init__()
        self.text_model = _TextModel(config)
        self.text_projection = nn.Linear(config.hidden_size, dim, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Returns embeddings [b, dim], float32, of norm 1, of ids [b, context]."""
        return F.normalize(self.text_projection(self.text_model(ids)).float(), dim=-1)
