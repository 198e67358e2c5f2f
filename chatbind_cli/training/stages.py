"""What each stage trains: the one place that decides it, and says it.

`pretrain`: the projector, and the embeddings of the media tokens. `finetune`: projector and
language model. Knows nothing of data and optimizers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from chatbind_cli.model.chatbind import ChatBindForConditionalGeneration
from chatbind_cli.training.settings import Stage


class RowEmbedding(nn.Module):
    """Word embeddings of which only a few rows train.

    A gradient for the whole matrix would cost as much memory as the matrix, and weight decay
    would move rows that never had one; so the rows are parameters of their own that stand before
    the frozen ones.

    Args:
        base: the frozen embeddings.
        ids: the tokens whose rows train.

    Shapes:
        [batch, length] -> [batch, length, width].
    """

    def __init__(self, base: nn.Embedding, ids: list[int]) -> None:
        super().__init__()
        self.base = base
        weight = base.weight
        # float32 even where the frozen weights are not: small steps would be lost in bfloat16
        rows = weight.detach()[ids].to(torch.float32)
        self.rows = nn.Parameter(rows.clone())
        place = torch.full((weight.shape[0],), -1, dtype=torch.long, device=weight.device)
        place[ids] = torch.arange(len(ids), device=weight.device)
        self.place: torch.Tensor
        self.register_buffer("place", place, persistent=False)
        self.ids = ids
        # Gemma's embeddings, among others, multiply what they have looked up
        self.scale = getattr(base, "embed_scale", 1.0)

    @property
    def embedding_dim(self) -> int:
        """Width of an embedding."""
        return self.base.embedding_dim

    @property
    def num_embeddings(self) -> int:
        """Number of tokens."""
        return self.base.num_embeddings

    @property
    def weight(self) -> torch.Tensor:
        """The frozen matrix, as libraries ask for it."""
        return self.base.weight

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """The embeddings of tokens; every call has the rows in its graph."""
        words = self.base(input_ids)
        place = self.place[input_ids]
        rows = (self.rows * self.scale).to(words.dtype)[place.clamp(min=0)]
        return torch.where((place >= 0).unsqueeze(-1), rows, words)

    @torch.no_grad()
    def folded(self) -> nn.Embedding:
        """The plain embeddings, with the trained rows in their places."""
        self.base.weight[self.ids] = self.rows.to(self.base.weight)
        return self.base


@dataclass(frozen=True)
class Trainable:
    """What trains.

    Attributes:
        names: the parameters' names.
        report: the same in words.
    """

    names: tuple[str, ...]
    report: str


def select_trainable(
    model: ChatBindForConditionalGeneration, stage: Stage, *, freeze_backbone: bool = False
) -> Trainable:
    """Freezes what the stage leaves alone, and frees what it trains.

    Args:
        model: changed in place: in stage `pretrain` its word embeddings are wrapped in
            `RowEmbedding` (undone by `fold_rows`).
        stage: the stage.
        freeze_backbone: in stage `finetune`, train the projector and leave the language model.
    """
    model.requires_grad_(False)
    model.projector.requires_grad_(True)
    parts = ["the projector"]
    if stage == "pretrain" or freeze_backbone:
        # parameters that train are kept in float32; the frozen ones may be half as large
        model.projector.float()
        tokens = _media_tokens(model)
        if tokens:
            base = model.get_input_embeddings()
            assert isinstance(base, nn.Embedding)
            model.set_input_embeddings(RowEmbedding(base, list(tokens.values())))
            parts.append(f"the embeddings of {', '.join(tokens)}")
    else:
        model.language_model.requires_grad_(True)
        parts.append("the language model")
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    total = sum(p.numel() for p in model.parameters())
    share = sum(trained.values()) / total
    report = (
        f"{stage} trains {' and '.join(parts)}: {sum(trained.values()):,} of {total:,} "
        f"parameters ({share:.1%})"
    )
    return Trainable(tuple(trained), report)


def fold_rows(model: ChatBindForConditionalGeneration) -> None:
    """Puts trained rows back into the word embeddings, and the plain embeddings into the model."""
    embeddings = model.get_input_embeddings()
    if isinstance(embeddings, RowEmbedding):
        model.set_input_embeddings(embeddings.folded())


def _media_tokens(model: ChatBindForConditionalGeneration) -> dict[str, int]:
    config = model.config
    if not config.use_start_end:
        return {}
    ids = {"<im_start>": config.im_start_id, "<im_end>": config.im_end_id}
    return {name: token for name, token in ids.items() if token is not None}
