"""What transformers' `generate` asks after each token: where an answer ends, and who listens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from chatbind_cli.inference.decoding import AnswerDecoder, GrowingText


class AnswerEnds(StoppingCriteria):
    """Ends a row of a batch when a stop text has come, or when nobody waits for the rest.

    Args:
        decoder: knows the stop texts.
        prompt_length: tokens before the answers, padding included.
        gone: of each answer, which may have several rows (beams), whether nobody waits for it.
    """

    def __init__(
        self, decoder: AnswerDecoder, prompt_length: int, gone: Callable[[], Sequence[bool]]
    ) -> None:
        self._decoder = decoder
        self._prompt_length = prompt_length
        self._gone = gone

    def __call__(
        self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any
    ) -> torch.BoolTensor:
        """Whether each row is finished, bool [rows]."""
        gone = self._gone()
        beams = len(input_ids) // len(gone)
        ended = [one for one in gone for _ in range(beams)]
        if self._decoder.stops and not all(gone):
            window = self._decoder.longest_stop_tokens
            start = max(self._prompt_length, input_ids.shape[1] - window)
            tails = zip(input_ids[:, start:].tolist(), ended, strict=True)
            ended = [one or self._decoder.has_stop(tail) for tail, one in tails]
        return torch.tensor(ended, device=input_ids.device)  # type: ignore[return-value]


class TextStreamer(BaseStreamer):
    """Shows the answers of a batch so far, as far as no later token can change them.

    Args:
        decoder: of all of them.
        shows: of each, what takes its text; None: nobody does.
    """

    def __init__(
        self, decoder: AnswerDecoder, shows: Sequence[Callable[[str], None] | None]
    ) -> None:
        self._shows = shows
        self._ids: list[list[int]] = [[] for _ in shows]
        self._growing = [GrowingText(decoder) for _ in shows]
        self._begun = False

    def put(self, value: torch.Tensor) -> None:
        """Takes the prompts, which come first and are left out, then a token of each at a time."""
        if not self._begun:
            self._begun = True
            return
        every = zip(self._shows, self._ids, self._growing, value.tolist(), strict=True)
        for show, ids, growing, token in every:
            if show is not None:
                ids.append(token)
                show(growing.safe(ids))

    def end(self) -> None:
        """Called by the library when the last token is there."""
