"""Token ids of an answer -> its text: where it ends, and how much of it is safe to show already.

Everybody decodes the whole answer in one way, so that a streamed answer is the same text as one
that is printed at its end.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any, Literal

from chatbind_cli.errors import ChatBindError

FinishReason = Literal["stop", "length"]

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# a token may add no visible character (a byte of a longer one, a special token)
_SILENT_TOKENS = 8
_STRETCH = 16
"""Tokens of a growing answer that are decoded anew for each further one: up to twice as many."""
_MOST_UNREAD = 64
"""Tokens after which no more is waited for the rest of a character."""


@dataclass(frozen=True, slots=True)
class ScoredChoice:
    """One of the answers that a question leaves to choose from, and how likely it is.

    Attributes:
        text: the answer.
        logprob: log-probability of this answer and no other: the sum over its tokens and what ends
            it.
        n_tokens: how many these are.
    """

    text: str
    logprob: float
    n_tokens: int


@dataclass(frozen=True, slots=True)
class Generated:
    """An answer.

    Attributes:
        text: without stop text and white space around it.
        n_tokens: tokens that were generated, the end token not counted.
        finish_reason: `stop`: the model ended it; `length`: `max_new_tokens` or the model's
            longest context did.
        tokens: the text of each token by itself, where log-probabilities are asked for.
        logprobs: natural logarithm of the model's probability of each token, before temperature
            and all else that changes it.
        samples: all answers that were drawn, where there are several; this is the first.
        choices: those that the question leaves, where it does; this is the likeliest.
        about: what else its record's metadata say, of it alone.
        n_prompt: tokens that were read for it, as `Answerer.run` counts them.
    """

    text: str
    n_tokens: int
    finish_reason: FinishReason
    tokens: tuple[str, ...] | None = None
    logprobs: tuple[float, ...] | None = None
    samples: tuple[Generated, ...] = ()
    choices: tuple[ScoredChoice, ...] = ()
    about: Mapping[str, Any] = field(default_factory=dict, hash=False)
    n_prompt: int = 0

    @property
    def each(self) -> tuple[Generated, ...]:
        """The several, or itself."""
        return self.samples or (self,)


Outcome = Generated | ChatBindError
"""What becomes of a question: its answer, or why there is none."""


class AnswerDecoder:
    """Decodes answers of one model, which end with one of `end_ids` or before one of `stops`."""

    def __init__(self, tokenizer: Any, end_ids: Sequence[int], stops: Sequence[str]) -> None:
        self.end_ids = frozenset(end_ids)
        self.stops = tuple(stops)
        self._tokenizer = tokenizer

    def finished(self, ids: Sequence[int], logprobs: Sequence[float] | None = None) -> Generated:
        """The answer that complete generation gave, and what it says of its tokens if asked for."""
        words, ended = self._words(ids)
        text, stopped = self._until_stop(self._text(words))
        if stopped:
            # what a batch generated while other rows went on is not part of the answer
            words = words[: self._shortest_with_stop(words)]
        reason: FinishReason = "stop" if ended or stopped else "length"
        if logprobs is None:
            return Generated(text.strip(), len(words), reason)
        tokens = tuple(self._tokenizer.decode([token]) for token in words)
        return Generated(text.strip(), len(words), reason, tokens, tuple(logprobs[: len(words)]))

    def has_stop(self, ids: Sequence[int]) -> bool:
        """Whether a stop text stands in the answer's last tokens."""
        return self._until_stop(self._text(ids))[1]

    @property
    def longest_stop_tokens(self) -> int:
        """Most tokens that a stop text and the silent tokens in it can take."""
        return max((len(stop.encode()) for stop in self.stops), default=0) + _SILENT_TOKENS

    def _words(self, ids: Sequence[int]) -> tuple[list[int], bool]:
        """The ids before the first end token, and whether there was one."""
        words = list(takewhile(lambda token: token not in self.end_ids, ids))
        return words, len(words) < len(ids)

    def _shortest_with_stop(self, words: Sequence[int]) -> int:
        """How many tokens it takes until a stop text is there."""
        lengths = range(1, len(words) + 1)
        return 1 + bisect_left(lengths, True, key=lambda length: self.has_stop(words[:length]))

    def _text(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(
            list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def _until_stop(self, text: str) -> tuple[str, bool]:
        starts = [start for stop in self.stops if (start := text.find(stop)) >= 0]
        return (text[: min(starts)], True) if starts else (text, False)


class GrowingText:
    """The text of an answer that grows, at the same cost for its thousandth token as for its first.

    Only the last tokens are decoded, behind a stretch of those before them, whose text is known: in
    many vocabularies a word at the beginning of a text has no space before it.
    """

    def __init__(self, decoder: AnswerDecoder) -> None:
        self._decoder = decoder
        self._text = ""
        self._known = self._start = 0
        """Tokens that are in the text; and those before the stretch that came last."""
        self._skip = 0
        """Characters of that stretch alone."""

    def safe(self, ids: Sequence[int]) -> str:
        """The beginning of the answer that no later token can change.

        Held back: white space at the end, half a character of several bytes, and what may be the
        beginning of a stop text.

        Args:
            ids: all its tokens so far; what was there the last time is the same.
        """
        decoder = self._decoder
        words = decoder._words(ids[self._start :])[0]
        now = decoder._text(words)
        text = self._text + now[self._skip :]
        fresh = self._start + len(words) - self._known
        whole = len(now) > self._skip and not now.endswith(_REPLACEMENT)
        if (whole and fresh >= _STRETCH) or fresh > _MOST_UNREAD:
            self._text, self._start, self._known = text, self._known, self._known + fresh
            self._skip = len(decoder._text(words[-fresh:]))
        text, stopped = decoder._until_stop(text)
        if not stopped:
            text = text.rstrip(_REPLACEMENT)
            held = max((_overlap(text, stop) for stop in decoder.stops), default=0)
            text = text[: len(text) - held]
        return text.strip()


def _overlap(text: str, stop: str) -> int:
    """Length of the longest beginning of `stop` that `text` ends with."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
