"""The parts that every ImageBind tower is built from: attention, block, trunk, head, scale.

Parameter names are those of the published checkpoint. Knows nothing of modalities.

Shapes: b batch, t tokens, d width, h heads.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

LAYER_NORM_EPS = 1e-6  # the stems of audio, depth, thermal and IMU use torch's 1e-5 instead


class Attention(nn.Module):
    """Multi-head self-attention; optionally one learned key/value pair is appended.

    Args:
        width: d.
        heads: h; divides d.
        bias_kv: append the pair (the towers of audio, depth, thermal and IMU have one), so that
            a token can attend to nothing in the input.
    """

    def __init__(self, width: int, heads: int, *, bias_kv: bool) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        if bias_kv:
            self.bias_k = nn.Parameter(torch.empty(1, 1, width))
            self.bias_v = nn.Parameter(torch.empty(1, 1, width))
        else:
            self.register_parameter("bias_k", None)
            self.register_parameter("bias_v", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws fresh weights: Xavier per projection, the appended pair like a projected token."""
        for projection in self.in_proj_weight.chunk(3):
            nn.init.xavier_uniform_(projection)
        for pair in (self.bias_k, self.bias_v):
            if pair is not None:
                nn.init.xavier_normal_(pair)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Returns [b, t, d].

        Args:
            x: [b, t, d].
            mask: added to the scores, [t, t]; never together with the appended pair.
        """
        q, k, v = F.linear(x, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self.bias_k.expand(len(k), -1, -1)], dim=1)  # [b, t + 1, d]
            v = torch.cat([v, self.bias_v.expand(len(v), -1, -1)], dim=1)
        q, k, v = (rearrange(part, "b t (h c) -> b h t c", h=self.heads) for part in (q, k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out_proj(rearrange(mixed, "b h t c -> b t (h c)"))


class DropPath(nn.Module):
    """Skips a residual branch for some samples of a batch, and enlarges it for the others.

    Training only. Ours, because importing timm's costs more than a second at every start.

    Args:
        rate: the share of samples for which the branch is skipped.

    Source: Huang et al. 2016, "Deep networks with stochastic depth".
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns x [b, ...] with whole samples set to 0, so that its mean stays."""
        if not self.training:
            return x
        kept = x.new_empty(len(x), *[1] * (x.ndim - 1)).bernoulli_(1 - self.rate)
        return x * kept / (1 - self.rate)


class Mlp(nn.Module):
    """Linear, GELU, linear: [b, t, d] -> [b, t, d], four times as wide in between."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns [b, t, d] for x [b, t, d]."""
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """A pre-norm transformer block with a GELU MLP of four times the width."""

    def __init__(self, width: int, heads: int, *, bias_kv: bool, drop_path: float) -> None:
        super().__init__()
        self.attn = Attention(width, heads, bias_kv=bias_kv)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.norm_1 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.mlp = Mlp(width)
        self.norm_2 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Returns [b, t, d] for x [b, t, d]."""
        x = x + self.drop_path(self.attn(self.norm_1(x), mask))
        return x + self.drop_path(self.mlp(self.norm_2(x)))


class Trunk(nn.Module):
    """A tower's transformer.

    Args:
        width: d.
        depth: number of blocks.
        heads: h.
        bias_kv: see `Attention`.
        drop_path: stochastic-depth rate of the last block; earlier blocks get proportionally less;
            see `DropPath`.
        pre_norm: a LayerNorm before the first block (the vision tower has one).
    """

    def __init__(
        self,
        width: int,
        depth: int,
        heads: int,
        *,
        bias_kv: bool,
        drop_path: float = 0.0,
        pre_norm: bool = False,
    ) -> None:
        super().__init__()
        self.pre_transformer_layer = nn.Sequential(
            *([nn.LayerNorm(width, eps=LAYER_NORM_EPS)] if pre_norm else [])
        )
        self.blocks = nn.ModuleList(
            Block(
                width,
                heads,
                bias_kv=bias_kv,
                drop_path=drop_path * index / max(depth - 1, 1),
            )
            for index in range(depth)
        )

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Returns [b, t, d] for x [b, t, d]; mask [t, t] is added to the attention scores."""
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

    @property
    def scale(self) -> torch.Tensor:
        """The factor, a scalar tensor."""
        scale = self.log_logit_scale.exp()
        return scale if self.maximum is None else scale.clamp(max=self.maximum)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the scaled x."""
        return x * self.scale
