"""Answers by transformers' own `generate`, in batches that end when their longest answer does.

For beam search, and for language models whose keys and values cannot be taken apart by rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from chatbind_cli.errors import RecordError
from chatbind_cli.inference.asks import Ask, hashed
from chatbind_cli.inference.decoding import Generated
from chatbind_cli.inference.sampling import NOT_FINITE, NextToken, needs_text
from chatbind_cli.model.chatbind import media_inputs


class FixedBatches:
    """A ChatBind model that answers prompts together, padded on the left.

    Args:
        model: its own generation settings are those of `ChatBindConfig.generation`.
        pad_id: what rows are padded with.
    """

    def __init__(self, model: Any, pad_id: int) -> None:
        self._model = model
        self._pad_id = pad_id

    def groups(self, asks: Sequence[Ask], size: int, *, alone: bool) -> Iterator[list[Ask]]:
        """What can be answered together without one changing another's answer.

        Args:
            asks: in any order.
            size: most at once.
            alone: whether the model lets none stand beside another.
        """

        def kind(ask: Ask) -> tuple[str, int]:
            # an answer that may reach the end of the context would cut others short
            single = ask.room < ask.settings.max_new_tokens or alone
            single |= ask.settings.sampled or needs_text(ask.settings)
            return (repr(ask.settings), id(ask) if single else 0)

        for _, alike in groupby(sorted(asks, key=kind), kind):
            group = sorted(alike, key=lambda ask: len(ask.prompt.input_ids))
            for start in range(0, len(group), size):
                yield group[start : start + size]

    @torch.inference_mode()
    def answers(self, asks: Sequence[Ask]) -> list[Generated]:
        """The answers of a group; who listens hears them grow, unless by beam search.

        Raises:
            Exception: whatever the library raises; RecordError: a score was not finite.
        """
        device = self._model.device
        for ask in asks:
            ask.restart()  # what was heard of it before the batch was halved
        rows = [torch.tensor(ask.prompt.input_ids) for ask in asks]
        # on the left, so that the next token of every row stands at the same position
        padded = pad_sequence(rows, True, self._pad_id, padding_side="left")
        mask = pad_sequence([torch.ones_like(row) for row in rows], True, padding_side="left")
        length = padded.shape[1]
        media = [medium for ask in asks for medium in ask.prompt.media]
        with _seeded(asks[0], device):
            output = self._model.generate(
                input_ids=padded.to(device),
                attention_mask=mask.to(device),
                **media_inputs(media, device),
                generation_config=self._config(asks[0]),
                logits_processor=LogitsProcessorList([_Finite()]),
                stopping_criteria=StoppingCriteriaList([AnswerEnds(asks, length)]),
            )
        answers = output.sequences[:, length:].tolist()
        told = [None] * len(asks) if output.logits is None else _logprobs(output.logits, answers)
        return [
            ask.decoder.finished(ids, own)
            for ask, ids, own in zip(asks, answers, told, strict=True)
        ]

    def _config(self, ask: Ask) -> GenerationConfig:
        """The library's own words for how an answer, and all of its group, is made."""
        settings, own = ask.settings, self._model.generation_config
        values: dict[str, Any] = {
            "max_new_tokens": ask.room,
            "num_beams": settings.num_beams,
            "do_sample": settings.sampled,
            "pad_token_id": self._pad_id,
            "eos_token_id": own.eos_token_id,
            "suppress_tokens": own.suppress_tokens,
            "repetition_penalty": settings.repetition_penalty,
            "no_repeat_ngram_size": settings.no_repeat_ngram_size,
            "return_dict_in_generate": True,
            "output_logits": settings.logprobs,
        }
        if settings.num_beams > 1:
            values |= {"length_penalty": settings.length_penalty}
        if settings.sampled:
            # top_k 0: all tokens are drawn from; the library's own default would be 50
            values |= {"temperature": settings.temperature, "top_p": settings.top_p}
            values |= {"top_k": settings.top_k, "min_p": settings.min_p or None}
        return GenerationConfig(**values)


class AnswerEnds(StoppingCriteria):
    """Ends a row of a batch when a stop text has come, or when nobody waits for the rest.

    Called for each token; so it is here that who listens hears of it, unless by beam search.

    Args:
        asks: the answers of the batch, which may have several rows (beams) each.
        prompt_length: tokens before the answers, padding included.
    """

    def __init__(self, asks: Sequence[Ask], prompt_length: int) -> None:
        self._asks = asks
        self._heard = any(ask.question.listener for ask in asks)
        self._prompt_length = prompt_length

    def __call__(
        self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any
    ) -> torch.BoolTensor:
        """Whether each row is finished, bool [rows]."""
        beams = len(input_ids) // len(self._asks)
        if self._heard and beams == 1:
            for ask, token in zip(self._asks, input_ids[:, -1].tolist(), strict=True):
                ask.take(NextToken(token))
                ask.tell()
        gone = [ask.question.given_up is not None for ask in self._asks]
        ended = [one for one in gone for _ in range(beams)]
        decoder = self._asks[0].decoder
        if decoder.stops and not all(gone):
            start = max(self._prompt_length, input_ids.shape[1] - decoder.longest_stop_tokens)
            tails = zip(input_ids[:, start:].tolist(), ended, strict=True)
            ended = [one or decoder.has_stop(tail) for tail, one in tails]
        return torch.tensor(ended, device=input_ids.device)  # type: ignore[return-value]


class _Finite(LogitsProcessor):
    """Refuses scores that are not finite: the likeliest of them would be an empty answer."""

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """The scores as they are.

        Raises:
            RecordError: one is NaN or infinite (minus infinity says "never").
        """
        if not bool((scores < float("inf")).all()):
            raise RecordError(NOT_FINITE)
        return scores


def _logprobs(
    logits: Sequence[torch.Tensor], answers: Sequence[Sequence[int]]
) -> list[list[float]]:
    """Of each answer's tokens [rows, steps], from the scores [rows, vocabulary] of each step."""
    every = torch.stack([step.float().log_softmax(dim=-1) for step in logits], dim=1)
    chosen = torch.tensor(answers, device=every.device).unsqueeze(-1)
    return every.gather(2, chosen).squeeze(-1).tolist()


@contextmanager
def _seeded(ask: Ask, device: torch.device) -> Iterator[None]:
    """Seeds what sampling draws from, and leaves the program's own random state as it was."""
    if not ask.settings.sampled:
        yield
        return
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(hashed(ask.salt, 63))
        yield
