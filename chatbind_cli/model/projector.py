"""The projector: an embedding of the encoder becomes soft tokens of the language model.

It knows widths and counts only; normalising embeddings and placing soft tokens is the business of
the model around it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import nn
from transformers import initialization as init

# second moment of gelu(z) for a standard normal z; the first layer of the two-layer projector is
# set up so that its outputs are about that
_GELU_SECOND_MOMENT = 0.425


class Projector(nn.Module):
    """Maps embeddings to soft tokens.

    For several encoders side by side it has a part for each, a whole projector with weights and
    biases of its own. An embedding of one of them is zero but for what that one made, and goes
    through its part alone. Of one with something from several, the parts' tokens are added up.

    Args:
        widths: of the embeddings of each encoder; an embedding has them side by side.
        hidden_size: width of the language model's token embeddings.
        kind: `linear`, or `mlp2x_gelu` (linear, GELU, linear).
        tokens: soft tokens that one embedding becomes.
        layout: `split`: all of them are the projector's own outputs; `repeat`: one, repeated.

    Shapes:
        [media, sum of widths] -> [media, tokens, hidden_size].

    Source:
        "Visual Instruction Tuning" (Liu et al., 2023), section 4.1: a single linear layer;
        "Improved Baselines with Visual Instruction Tuning" (2023), section 3.3: the two-layer one.
    """

    def __init__(
        self,
        widths: Sequence[int],
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
        self.widths = list(widths)
        if len(self.widths) > 1:
            self.parts = nn.ModuleList(
                Projector([own], hidden_size, kind=kind, tokens=tokens, layout=layout)
                for own in widths
            )
            return
        width = hidden_size * (tokens if layout == "split" else 1)
        self.layers = nn.Sequential(nn.Linear(self.widths[0], width))
        if kind == "mlp2x_gelu":
            self.layers = nn.Sequential(
                nn.Linear(self.widths[0], hidden_size), nn.GELU(), nn.Linear(hidden_size, width)
            )
        self.reset_parameters()

    @property
    def dtype(self) -> torch.dtype:
        """The type of its weights."""
        return next(self.parameters()).dtype

    def forward(
        self, embeddings: torch.Tensor, weights: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Projects embeddings [media, sum of widths] to [media, tokens, hidden_size].

        Args:
            embeddings: what also says which part each goes through.
            weights: [media], what each is multiplied by; 0 leaves the bias of its part.
        """
        if len(self.widths) > 1:
            found = torch.zeros((), dtype=self.dtype, device=embeddings.device)
            for part, own in zip(self.parts, embeddings.split(self.widths, dim=-1), strict=True):
                # every part sees every row: shapes do not depend on the media, and training on
                # several processes, which waits for all gradients, gets them
                mine = own.any(dim=-1).view(-1, 1, 1)
                found = found + torch.where(mine, part(own, weights), 0.0)
            return found
        if weights is not None:
            embeddings = embeddings * weights.unsqueeze(-1)
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
        if len(self.widths) > 1:
            for part in self.parts:
                cast(Projector, part).reset_parameters(std)
            return
        first, last = cast(nn.Linear, self.layers[0]), cast(nn.Linear, self.layers[-1])
        if first is not last:
            init.normal_(first.weight, std=1.0)
            init.zeros_(first.bias)
            std = std / math.sqrt(_GELU_SECOND_MOMENT * last.in_features)
        init.normal_(last.weight, std=std)
        init.zeros_(last.bias)
