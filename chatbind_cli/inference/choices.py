"""Multiple choice: how likely the model is to give each of several answers, and no other.

The prompt is computed once, and every choice behind its keys and values.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from chatbind_cli.data.tokens import TokenizedSample
from chatbind_cli.errors import RecordError
from chatbind_cli.inference.decoding import Generated, ScoredChoice
from chatbind_cli.inference.questions import Question
from chatbind_cli.inference.sampling import NOT_FINITE
from chatbind_cli.model.chatbind import media_inputs
from chatbind_cli.model.label_loss import IGNORE_INDEX

_MOST_HELD = 1 << 14
"""Positions whose keys and values are held at once, the prompt's repeated for each choice."""
_MOST_COMPUTED = 1 << 10
"""Positions that are computed at once: of each there is a number a word of the vocabulary."""


def likeliest(model: Any, question: Question) -> Generated:
    """The likeliest of the choices that a prepared question leaves; of equals the first.

    Raises:
        RecordError: the model's numbers are not finite.
    """
    assert question.prompt is not None, "the question was not prepared"
    scores = score_choices(model, question.prompt, question.choice_ids)
    choices = tuple(
        ScoredChoice(text, score, len(ids))
        for text, score, ids in zip(question.choices, scores, question.choice_ids, strict=True)
    )
    best = max(choices, key=lambda choice: choice.logprob)
    return Generated(best.text, best.n_tokens, "stop", choices=choices)


def score_choices(
    model: Any, prompt: TokenizedSample, choices: Sequence[Sequence[int]]
) -> list[float]:
    """The log-probability of each choice behind a prompt, summed over its tokens.

    In float32 they are those of the plain computation, each choice behind the whole prompt.

    Args:
        model: a ChatBind model.
        prompt: with embedded media.
        choices: token ids, at least one each, see `PromptEncoder.answer`.

    Raises:
        RecordError: the model's numbers are not finite.
    """
    rest = sorted({tuple(choice) for choice in choices}, key=len)
    scores: dict[tuple[int, ...], float] = {}
    with torch.inference_mode():
        cache, first = _read(model, prompt)
        most = len(rest)
        while rest:
            some = rest[: min(most, _fitting(rest, len(prompt.input_ids)))]
            try:
                found = _behind(model, cache, first, len(prompt.input_ids), some)
            except torch.OutOfMemoryError:
                if len(some) == 1:
                    raise
                most = len(some) // 2
                continue
            scores.update(zip(some, found.tolist(), strict=True))
            rest = rest[len(some) :]
    if not torch.tensor(list(scores.values())).isfinite().all():
        raise RecordError(NOT_FINITE)
    return [scores[tuple(choice)] for choice in choices]


def _fitting(choices: Sequence[Sequence[int]], prompt_length: int) -> int:
    """How many of the first choices, sorted by length, are computed at once."""
    n = 1
    while n < len(choices):
        held = (n + 1) * (prompt_length + len(choices[n]))
        if held > _MOST_HELD or (n + 1) * len(choices[n]) > _MOST_COMPUTED:
            break
        n += 1
    return n


def _read(model: Any, prompt: TokenizedSample) -> tuple[Any, torch.Tensor]:
    """The prompt's keys and values, and the log-probabilities [vocabulary] of what follows."""
    device = model.device
    output = model(
        input_ids=torch.tensor([prompt.input_ids], device=device),
        **media_inputs(prompt.media, device),
        use_cache=True,
        logits_to_keep=1,
    )
    # of a model on several devices the scores come from the last
    return output.past_key_values, output.logits[0, -1].float().log_softmax(dim=-1).to(device)


def _behind(
    model: Any,
    cache: Any,
    first: torch.Tensor,
    prompt_length: int,
    choices: Sequence[Sequence[int]],
) -> torch.Tensor:
    """The log-probability [choices] of token ids behind a prompt."""
    # padded on the right: what stands behind a row's last token does not change the row
    rows = [torch.tensor(choice) for choice in choices]
    ids = pad_sequence(rows, batch_first=True, padding_value=IGNORE_INDEX).to(first.device)
    total = first[ids[:, 0]]
    read, wanted = ids[:, :-1].clamp(min=0), ids[:, 1:]
    if not read.numel():
        return total
    cache = copy.deepcopy(cache)
    # once for each choice: layers that keep more than keys and values know no other way
    cache.reorder_cache(torch.zeros(len(rows), dtype=torch.long, device=first.device))
    positions = torch.arange(prompt_length, prompt_length + read.shape[1], device=first.device)
    output = model(
        input_ids=read,
        position_ids=positions.expand_as(read),
        past_key_values=cache,
        use_cache=True,
    )
    logits = output.logits.float().flatten(0, 1)
    lost = functional.cross_entropy(logits, wanted.flatten().to(logits.device), reduction="none")
    return total - lost.view_as(wanted).sum(dim=1).to(first.device)
