"""What each stage trains, and what it leaves behind: the one place that decides it, and says it.

`pretrain`: the projector, and the embeddings of the media tokens. `finetune`: projector and
language model; or, with adapters in the latter, what stage 1 trains and the adapters.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace
from pathlib import Path
from typing import Final

import torch
from torch import nn
from transformers import PreTrainedConfig

from chatbind_cli.checkpoints.projector_file import ProjectorFile, write_projector
from chatbind_cli.files import sha256_file
from chatbind_cli.model.adapters import adapter_parameters, adapters_of
from chatbind_cli.model.chatbind import ChatBindForConditionalGeneration, word_embeddings
from chatbind_cli.model.loading import PROJECTOR_NAME, ChatBind, projector_of
from chatbind_cli.model.tokenizer import media_rows
from chatbind_cli.training.saved import check_weights
from chatbind_cli.training.settings import Stage

MADE: Final = {"pretrain": "checkpoint", "finetune": "model"}
"""The kind of artefact that each stage makes."""

CONFIG_NAME: Final = "config.json"


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


def select_trainable(
    model: ChatBindForConditionalGeneration, stage: Stage, *, freeze_backbone: bool = False
) -> str:
    """Freezes what the stage leaves alone, frees what it trains, and says what that is.

    Args:
        model: changed in place: where the language model stays as it is, its word embeddings are
            wrapped in `RowEmbedding` (undone by `fold_rows`).
        stage: decides it.
        freeze_backbone: in stage `finetune`, train the projector and leave the language model.
    """
    language_model = model.language_model
    adapted = adapters_of(language_model)
    model.requires_grad_(False)
    model.projector.requires_grad_(True)
    parts = ["the projector"]
    if stage == "pretrain" or freeze_backbone or adapted is not None:
        # parameters that train are kept in float32; the frozen ones may be half as large
        model.projector.float()
        # of <im_patch> no embedding is ever read
        rows = {f"<{name}>": row for name, row in media_rows(model.config).items()}
        rows.pop("<im_patch>", None)
        if rows:
            base = word_embeddings(model)
            model.set_input_embeddings(RowEmbedding(base, list(rows.values())))
            parts.append(f"the embeddings of {', '.join(rows)}")
    if adapted is not None:
        for _, parameter in adapter_parameters(language_model):
            parameter.requires_grad_(True)
        parts.append(f"adapters of rank {adapted.r} beside the language model's matrices")
    elif stage == "finetune" and not freeze_backbone:
        model.language_model.requires_grad_(True)
        parts.append("the language model")
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    return (
        f"{stage} trains {' and '.join(parts)}: {trained:,} of {total:,} parameters "
        f"({trained / total:.1%})"
    )


def fold_rows(model: ChatBindForConditionalGeneration) -> None:
    """Puts trained rows back into the word embeddings, and the plain embeddings into the model."""
    embeddings = model.get_input_embeddings()
    if isinstance(embeddings, RowEmbedding):
        model.set_input_embeddings(embeddings.folded())


def _trained_projector(bundle: ChatBind) -> ProjectorFile:
    """The projector of a model in training, with the trained embeddings of the media tokens.

    The command line stays out of it (config.json has it), so that the same training gives the same
    file wherever its output goes.
    """
    projector = projector_of(bundle.model)
    provenance = {k: v for k, v in projector.info.provenance.items() if k != "command"}
    words = dict(projector.token_embeddings)
    embeddings = bundle.model.get_input_embeddings()
    if isinstance(embeddings, RowEmbedding):
        rows = dict(zip(embeddings.ids, embeddings.rows.detach().cpu(), strict=True))
        for name, token in media_rows(bundle.config).items():
            if token in rows:
                words[name] = rows[token].clone()
    return ProjectorFile(replace(projector.info, provenance=provenance), projector.tensors, words)


def write_stage_1(bundle: ChatBind, folder: Path) -> None:
    """Writes what stage 1 makes: projector, configuration and tokenizer, no frozen weights."""
    projector = _trained_projector(bundle)
    write_projector(folder / PROJECTOR_NAME, projector)
    check_weights(folder / PROJECTOR_NAME, projector.named())
    bundle.config.save_pretrained(folder)
    bundle.tokenizer.save_pretrained(folder)


def write_model(
    bundle: ChatBind, folder: Path, state: dict[str, torch.Tensor], dtype: torch.dtype
) -> float:
    """Writes a model into an existing folder, for `from_pretrained`.

    Args:
        bundle: the trained model.
        folder: where to.
        state: its weights, gathered from wherever they were sharded.
        dtype: in which they are saved.

    Returns:
        What rounding to `dtype` has changed, as a share of the weights (Euclidean norms).
    """
    lost = whole = 0.0
    converted: dict[int, torch.Tensor] = {}
    weights = {}
    for name, tensor in state.items():
        # tied weights are one tensor under two names, and are to stay one
        same = converted.get(tensor.data_ptr())
        if same is None or same.shape != tensor.shape:
            same = tensor.to("cpu", dtype if tensor.is_floating_point() else tensor.dtype)
            if same.dtype.itemsize < tensor.dtype.itemsize:
                lost += float((same.to(tensor) - tensor).square().sum())
                whole += float(tensor.square().sum())
            converted[tensor.data_ptr()] = same
        weights[name] = same
    bundle.model.save_pretrained(folder, state_dict=dict(weights))  # it empties what it gets
    check_weights(folder, weights)
    # saving notes the dtype that the model was trained in; the next reader wants the file's
    text_config = bundle.config.text_config
    assert isinstance(text_config, PreTrainedConfig)
    bundle.config.dtype = text_config.dtype = dtype
    bundle.config.save_pretrained(folder)
    bundle.tokenizer.save_pretrained(folder)
    return math.sqrt(lost / whole) if whole else 0.0


def weights_sha256(folder: Path) -> str:
    """SHA-256 of a folder's weights file; of several, of the list of their hashes."""
    files = sorted(folder.glob("*.safetensors"))
    hashes = [sha256_file(file) for file in files]
    if len(hashes) == 1:
        return hashes[0]
    listing = "".join(f"{h}  {f.name}\n" for h, f in zip(hashes, files, strict=True))
    return hashlib.sha256(listing.encode()).hexdigest()
