"""What answers prepared questions: the language model here, or one that runs elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

from chatbind_cli.errors import RecordError
from chatbind_cli.inbox import Inbox
from chatbind_cli.inference.decoding import Generated, Outcome
from chatbind_cli.inference.generation_settings import GenerationSettings
from chatbind_cli.inference.questions import Question
from chatbind_cli.model.config import ChatBindConfig

# Long runs of blanks or dashes are single tokens in some vocabularies; text is far below this.
_MOST_CHARACTERS_A_TOKEN = 256


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

    def answer(self, question: Question, settings: GenerationSettings) -> Generated:
        """Answers one prepared question, alone, so that it may go on where the last one ended.

        Raises:
            ChatBindError: its `problem`, or what became of it.
        """

    def identity(self) -> dict[str, Any]:
        """What the metadata of answers say of it."""


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
