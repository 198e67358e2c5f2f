"""What transformers' `generate` asks after each token: where an answer ends, and who listens."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from transformers import StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from chatbind_cli.inference.decoding import AnswerDecoder


class AnswerEnds(StoppingCriteria):
    """Ends a row of a batch when a stop text has come, and every row once it is cancelled.

    Args:
        decoder: knows the stop texts.
        prompt_length: tokens before the answers, padding included.
        cancelled: set when nobody waits for the rest any more.
    """

    def __init__(
        self, decoder: AnswerDecoder, prompt_length: int, cancelled: threading.Event
    ) -> None:
        self._decoder = decoder
        self._prompt_length = prompt_length
        self._cancelled = cancelled

    def __call__(
        self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any
    ) -> torch.BoolTensor:
        """Whether each row is finished, bool [rows]."""
        ended = [self._cancelled.is_set()] * len(input_ids)
        if self._decoder.stops and not self._cancelled.is_set():
            window = self._decoder.longest_stop_tokens
            start = max(self._prompt_length, input_ids.shape[1] - window)
            ended = [self._decoder.has_stop(tail) for tail in input_ids[:, start:].tolist()]
        return torch.tensor(ended, device=input_ids.device)  # type: ignore[return-value]


class TextStreamer(BaseStreamer):
    """Shows the answer so far, as far as no later token can change it."""

    def __init__(self, decoder: AnswerDecoder, show: Callable[[str], None]) -> None:
        self._decoder = decoder
        self._show = show
        self._ids: list[int] | None = None

    def put(self, value: torch.Tensor) -> None:
        """Takes the prompt, which comes first and is left out, then one token at a time."""
        if self._ids is None:
            self._ids = []
            return
        self._ids += value.flatten().tolist()
        self._show(self._decoder.safe(self._ids))

    def end(self) -> None:
        """Called by the library when the last token is there."""
