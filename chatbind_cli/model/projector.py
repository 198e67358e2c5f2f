"""The projector: an embedding of the encoder becomes soft tokens of the language model.

It knows widths and counts only; normalising embeddings and placing soft tokens is the business of
the model around it.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import nn
from transformers import initialization as init

# second moment of gelu(z) for a standard normal z; the first layer of the two-layer projector is
# set up so that its outputs are about that
_GELU_SECOND_MOMENT = 0.425


class Projector(nn.Module):
    """Maps embeddings to soft tokens.

    Args:
        embedding_dim: width of an embedding.
        hidden_size: width of the language model's token embeddings.
        kind: `linear`, or `mlp2x_gelu` (linear, GELU, linear).
        tokens: soft tokens that one embedding becomes.
        layout: `split`: all of them are the projector's own outputs; `repeat`: one, repeated.

    Shapes:
        [media, embedding_dim] -> [media, tokens, hidden_size].

    Source:
        "Visual Instruction Tuning" (Liu et al., 2023), section 4.1: a single linear layer;
        "Improved Baselines with Visual Instruction Tuning" (2023), section 3.3: the two-layer one.
    """

    def __init__(
        self,
        embedding_dim: int,
        hidden_size: int,
        *,
        kind: str = "linear",
        tokens: int = 1,
        layout: str = "split",
    ) -> None:
        super().__init__()
        self.tokens = tokens
        self.layout = layout
        self.hidden_size = hidden_size
        width = hidden_size * (tokens if layout == "split" else 1)
        self.layers = nn.Sequential(nn.Linear(embedding_dim, width))
        if kind == "mlp2x_gelu":
            self.layers = nn.Sequential(
                nn.Linear(embedding_dim, hidden_size), nn.GELU(), nn.Linear(hidden_size, width)
            )
        self.reset_parameters()

    @property
    def dtype(self) -> torch.dtype:
        """The type of its weights."""
        return cast(nn.Linear, self.layers[0]).weight.dtype

    def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Projects embeddings [media, embedding_dim] to [media, tokens, hidden_size]."""
        projected = self.layers(embeddings.to(self.dtype))
        if self.layout == "repeat":
            return projected.unsqueeze(1).expand(-1, self.tokens, -1)
        return projected.view(-1, self.tokens, self.hidden_size)

    @torch.no_grad()
    def reset_parameters(self, std: float = 0.02) -> None:
        """Starts anew, so that a soft token is about as large as a word.

        An embedding of norm 1 times weights of standard deviation `std` has entries of standard
        deviation `std`: with that of the language model's word embeddings, attention sees tokens
        of a size that it knows from the first step, however wide the encoder is.
        """
        first, last = cast(nn.Linear, self.layers[0]), cast(nn.Linear, self.layers[-1])
        if first is not last:
            init.normal_(first.weight, std=1.0)
            init.zeros_(first.bias)
            std = std / math.sqrt(_GELU_SECOND_MOMENT * last.in_features)
        init.normal_(last.weight, std=std)
        init.zeros_(last.bias)
