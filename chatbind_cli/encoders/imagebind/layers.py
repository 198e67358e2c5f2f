"""The parts that every ImageBind tower is built from: block, trunk, head, scale.

Parameter names are those of the published checkpoint.

Shapes: b batch, t tokens, d width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

LAYER_NORM_EPS = 1e-6  # the stems of audio, depth, thermal and IMU use torch's 1e-5 instead


class Block(nn.Module):
    """A pre-norm transformer block with a GELU MLP of four times the width.

    Args:
        width: d.
        heads: of the attention; their number divides d.
        bias_kv: append one learned key/value pair (the towers of audio, depth, thermal and IMU
            have it), so that a token can attend to nothing in the input.
    """

    def __init__(self, width: int, heads: int, *, bias_kv: bool) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads, add_bias_kv=bias_kv)
        for projection in self.attn.in_proj_weight.chunk(3):
            # torch draws all three as one matrix, and so smaller
            nn.init.xavier_uniform_(projection)
        self.norm_1 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.mlp = nn.Sequential()
        self.mlp.add_module("fc1", nn.Linear(width, 4 * width))
        self.mlp.add_module("gelu", nn.GELU())
        self.mlp.add_module("fc2", nn.Linear(4 * width, width))
        self.norm_2 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Returns [b, t, d] for x [b, t, d]; mask [t, t] is added to the attention scores."""
        # tokens first, and in that order in memory: otherwise torch takes up to twice as long
        tokens = self.norm_1(x).transpose(0, 1).contiguous()
        mixed, _ = self.attn(tokens, tokens, tokens, attn_mask=mask, need_weights=False)
        x = x + mixed.transpose(0, 1)
        return x + self.mlp(self.norm_2(x))


class Trunk(nn.Module):
    """A tower's transformer.

    Args:
        width: d.
        depth: number of blocks.
        heads: of a block.
        bias_kv: see `Block`.
        pre_norm: a LayerNorm before the first block (the vision tower has one).
    """

    def __init__(
        self, width: int, depth: int, heads: int, *, bias_kv: bool, pre_norm: bool
    ) -> None:
        super().__init__()
        self.pre_transformer_layer = nn.Sequential(
            *([nn.LayerNorm(width, eps=LAYER_NORM_EPS)] if pre_norm else [])
        )
        self.blocks = nn.ModuleList(Block(width, heads, bias_kv=bias_kv) for _ in range(depth))

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Returns [b, t, d] for x [b, t, d]; mask as in `Block`."""
        x = self.pre_transformer_layer(x)
        for block in self.blocks:
            x = block(x, mask)
        return x


class TakeFirst(nn.Module):
    """Reads the class token: [b, t, d] -> [b, d]."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the first token."""
        return x[:, 0]


def class_token_head(width: int, out_dim: int, *, dropout: float | None = None) -> nn.Sequential:
    """Returns LayerNorm, class token, (dropout,) linear without bias: [b, t, d] -> [b, out_dim].

    The dropout's place counts: it makes the linear entry 3 of the sequence, as published for IMU.
    """
    return nn.Sequential(
        nn.LayerNorm(width, eps=LAYER_NORM_EPS),
        TakeFirst(),
        *([] if dropout is None else [nn.Dropout(dropout)]),
        nn.Linear(width, out_dim, bias=False),
    )


class TextHead(nn.Module):
    """Reads the end-of-text token: [b, t, d] -> [b, out_dim]."""

    def __init__(self, width: int, out_dim: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            nn.LayerNorm(width, eps=LAYER_NORM_EPS), nn.Linear(width, out_dim, bias=False)
        )

    def forward(self, x: torch.Tensor, end_positions: torch.Tensor) -> torch.Tensor:
        """Returns [b, out_dim] for x [b, t, d] and the position [b] to read in each row."""
        return self.proj(x[torch.arange(len(x), device=x.device), end_positions])


class Normalize(nn.Module):
    """L2 normalisation of the last axis, in at least float32."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns x with norm 1 along its last axis."""
        return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)


class LogitScale(nn.Module):
    """Multiplies by exp(log_logit_scale), at most `maximum`.

    Args:
        start: the scale of a fresh model.
        learned: a parameter rather than a buffer.
        maximum: upper bound of the scale, if any.
    """

    def __init__(
        self, start: float, *, learned: bool = False, maximum: float | None = None
    ) -> None:
        super().__init__()
        self.maximum = maximum
        log_scale = torch.tensor(math.log(start))
        if learned:
            self.log_logit_scale = nn.Parameter(log_scale)
        else:
            self.register_buffer("log_logit_scale", log_scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the scaled x."""
        scale = self.log_logit_scale.exp()
        return x * (scale if self.maximum is None else scale.clamp(max=self.maximum))
