"""What each row of a batch says next, from the model's scores: the likeliest token, or a draw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from chatbind_cli.inference.generation_settings import GenerationSettings

if TYPE_CHECKING:
    from chatbind_cli.inference.asks import Ask

NOT_FINITE = "the model's numbers for this question are not finite"


@dataclass(frozen=True)
class NextToken:
    """What a row says next.

    Attributes:
        token: its id; None: the model's numbers were not finite.
        logprob: natural logarithm of the model's own probability of it, if the row asks for it.
    """

    token: int | None
    logprob: float | None = None


@torch.inference_mode()
def choose(
    logits: torch.Tensor, rows: Sequence[Ask], never: torch.Tensor | None
) -> list[NextToken]:
    """The next token of each row.

    Args:
        logits: [rows, vocabulary], float32.
        rows: as many.
        never: int64 [n], tokens that no row says.
    """
    # minus infinity says "never"
    finite = (logits < float("inf")).all(dim=-1)
    scores = logits
    if never is not None:
        scores = logits.index_fill(1, never.to(logits.device), -float("inf"))
    tokens = scores.argmax(dim=-1)
    for settings, group in _alike(rows).items():
        tokens[group] = _chosen(scores[group], [rows[row] for row in group], settings)
    wanted = [i for i, row in enumerate(rows) if row.settings.logprobs]
    logprobs: dict[int, float] = {}
    if wanted:
        own = logits[wanted].log_softmax(dim=-1).gather(1, tokens[wanted].unsqueeze(1))
        logprobs = dict(zip(wanted, own.squeeze(1).tolist(), strict=True))
    # one transfer from the device for all rows
    found = torch.where(finite, tokens, -1).tolist()
    return [
        NextToken(None if token < 0 else token, logprobs.get(row))
        for row, token in enumerate(found)
    ]


def _alike(rows: Sequence[Ask]) -> dict[GenerationSettings, list[int]]:
    """The rows for which the likeliest token will not do, by their settings."""
    groups: dict[GenerationSettings, list[int]] = {}
    for index, row in enumerate(rows):
        if row.settings.sampled or needs_text(row.settings):
            groups.setdefault(row.settings, []).append(index)
    return groups


def needs_text(settings: GenerationSettings) -> bool:
    """Whether the choice depends on the tokens before, beside the model's scores."""
    return settings.repetition_penalty != 1.0 or settings.no_repeat_ngram_size > 0


def _chosen(
    scores: torch.Tensor, rows: Sequence[Ask], settings: GenerationSettings
) -> torch.Tensor:
    """A token for each row [rows], all of one kind of settings."""
    of_text, of_scores = _processors(settings)
    if of_text:
        # each alone: padding would be a token that it has, too
        for index, row in enumerate(rows):
            read: Any = torch.tensor([row.read], device=scores.device)
            scores[index] = of_text(read, scores[[index]])[0]
    if not settings.sampled:
        return scores.argmax(dim=-1)
    text: Any = None  # these do not look at it
    chances: torch.Tensor = of_scores(text, scores)
    # one number decides a draw, and not one for each word of the vocabulary: in double precision
    # the rounding of neighbours does not reach it. Not every accelerator has that.
    place = chances if chances.is_cuda else chances.cpu()
    below = place.double().softmax(dim=-1).cumsum(dim=-1)
    drawn = torch.tensor([[row.draw()] for row in rows], dtype=below.dtype, device=below.device)
    found = torch.searchsorted(below, drawn * below[:, -1:], right=True)
    return found.squeeze(1).clamp(max=scores.shape[1] - 1).to(scores.device)


@lru_cache(maxsize=256)
def _processors(settings: GenerationSettings) -> tuple[LogitsProcessorList, LogitsProcessorList]:
    """The library's own, in its order: those that look at the text, then those of sampling."""
    of_text: list[LogitsProcessor] = []
    if settings.repetition_penalty != 1.0:
        of_text.append(RepetitionPenaltyLogitsProcessor(settings.repetition_penalty))
    if settings.no_repeat_ngram_size > 0:
        of_text.append(NoRepeatNGramLogitsProcessor(settings.no_repeat_ngram_size))
    of_scores: list[LogitsProcessor] = []
    if settings.sampled:
        if settings.temperature != 1.0:
            of_scores.append(TemperatureLogitsWarper(settings.temperature))
        if settings.top_k > 0:
            of_scores.append(TopKLogitsWarper(settings.top_k))
        if settings.top_p < 1.0:
            of_scores.append(TopPLogitsWarper(settings.top_p))
        if settings.min_p > 0.0:
            of_scores.append(MinPLogitsWarper(settings.min_p))
    return LogitsProcessorList(of_text), LogitsProcessorList(of_scores)
