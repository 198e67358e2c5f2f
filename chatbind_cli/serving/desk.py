"""Where requests wait for the one engine, and hear from it: between the server's loop and threads.

All that is asked goes into one inbox of `Answerer.run`, so that strangers' questions are answered
together.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Protocol

from chatbind_cli.errors import ChatBindError
from chatbind_cli.inference.decoding import Generated
from chatbind_cli.inference.questions import Question


class BusyError(ChatBindError):
    """As many wait as may; `retry_after_s` is when a place may be free."""

    def __init__(self, what: str, retry_after_s: int) -> None:
        super().__init__(what)
        self.retry_after_s = retry_after_s


@dataclass(frozen=True, slots=True)
class Piece:
    """What came to an answer: `text`, of the answer with the number `sample`."""

    sample: int
    text: str


@dataclass(frozen=True, slots=True)
class Answered:
    """A question, prepared, and its answer."""

    question: Question
    generated: Generated


class Ticket(Protocol):
    """One question that waits for its answer."""

    def pieces(self) -> AsyncIterator[Piece]:
        """Yields what comes to the answer, until it is whole.

        Raises:
            ChatBindError: what became of the question.
        """

    async def answer(self) -> Answered:
        """The whole answer.

        Raises:
            ChatBindError: what became of the question: an `EngineError` if the engine is gone.
        """

    def leave(self) -> None:
        """Says that nobody waits any more; after the answer it means nothing."""
