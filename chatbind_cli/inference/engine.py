"""What answers prepared questions: the language model here, or one that runs elsewhere."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

from chatbind_cli.errors import RecordError
from chatbind_cli.inbox import Inbox
from chatbind_cli.inference.decoding import Generated, Outcome
from chatbind_cli.inference.generation_settings import GenerationSettings
from chatbind_cli.inference.questions import Question
from chatbind_cli.model.config import ChatBindConfig

# Long runs of blanks or dashes are single tokens in some vocabularies; text is far below this.
_MOST_CHARACTERS_A_TOKEN = 256

Show = Callable[[str], None]
"""Takes the beginning of an answer, as far as no later token can change it."""


class Engine(Protocol):
    """A language model that answers.

    Attributes:
        longest_context: tokens of prompt and answer together that it was made for, if known.
    """

    longest_context: int | None

    def run(
        self, questions: Inbox[Question], settings: GenerationSettings
    ) -> Iterator[tuple[Question, Outcome]]:
        """Answers prepared questions, in any order, each as soon as it is done.

        What a question says itself (`Question.settings`) goes before `settings`. The failure of a
        question is its outcome; one with a `problem` comes straight out with it.

        Raises:
            ChatBindError: the error that the questions ended with, once all others are answered;
                or the engine itself cannot go on.
        """

    def stream(self, question: Question, settings: GenerationSettings) -> Stream:
        """Answers one prepared question piece by piece.

        Raises:
            ChatBindError: its `problem`.
        """

    def identity(self) -> dict[str, Any]:
        """What the metadata of answers say of it."""


class Stream:
    """An answer that grows: iterate over its pieces, then read `result`, which is the whole.

    The work is done in a thread of its own. Leaving the loop early, by an interrupt too, cancels
    it: the answer ends after the token at hand.

    Args:
        work: makes the answer. It calls `show` with more and more of it, and looks at times
            whether it is cancelled.
    """

    def __init__(self, work: Callable[[Show, threading.Event], Generated]) -> None:
        self.result: Generated | None = None
        self._work = work
        self._pieces: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._cancelled = threading.Event()
        self._shown = ""

    def __iter__(self) -> Iterator[str]:
        """Yields the pieces of the answer.

        Raises:
            ChatBindError: whatever went wrong while generating.
        """
        with ThreadPoolExecutor(max_workers=1) as pool:
            future = pool.submit(self._answer)
            try:
                while (piece := self._pieces.get()) is not None:
                    yield piece
                self.result = future.result()
            finally:
                self._cancelled.set()

    def _answer(self) -> Generated:
        try:
            generated = self._work(self._show, self._cancelled)
            self._show(generated.text)
            return generated
        finally:
            self._pieces.put(None)

    def _show(self, text: str) -> None:
        # should a tokenizer take back what it had shown, nothing more is shown than is right
        if text.startswith(self._shown) and len(text) > len(self._shown):
            piece = text[len(self._shown) :]
            self._shown = text
            self._pieces.put(piece)


def context_length(config: ChatBindConfig) -> int | None:
    """Tokens of prompt and answer together that a language model was made for, if it says so."""
    longest = getattr(config.text_config, "max_position_embeddings", None)
    return longest if isinstance(longest, int) and longest > 0 else None


def room_for_answer(settings: GenerationSettings, length: int, longest_context: int | None) -> int:
    """Most tokens of the answer to a prompt of so many: what is wanted, as far as there is room."""
    if longest_context is None:
        return settings.max_new_tokens
    return max(1, min(settings.max_new_tokens, longest_context - length))


def check_text(text: str, longest_context: int | None) -> None:
    """Refuses a question that cannot fit, before a tokenizer takes gigabytes to find that out.

    Raises:
        RecordError: it has more characters than any tokenizer packs into the model's context.
    """
    if longest_context is not None and len(text) > longest_context * _MOST_CHARACTERS_A_TOKEN:
        raise RecordError(
            f"the question has {len(text):,} characters, and the model reads {longest_context} "
            "tokens at most",
            hint="shorten the question",
        )


def check_length(length: int, longest_context: int | None) -> None:
    """Makes sure that there is room for an answer to a prompt of so many tokens.

    Raises:
        RecordError: it fills the model's context.
    """
    if longest_context is not None and length >= longest_context:
        raise RecordError(
            f"the prompt has {length} tokens, and the model reads {longest_context} at most, "
            "the answer included",
            hint="shorten the question",
        )
