"""One question that waits for its answer, between the engine's thread and the server's loop."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress

from chatbind_cli.errors import ChatBindError
from chatbind_cli.inference.decoding import Generated, Outcome


class Ticket:
    """One question that waits for its answer, in the event loop that it was asked in.

    It is the question's `Listener`: the engine's thread leaves the newest text here and goes on.
    However slowly a client reads, no more is kept than the answer itself.

    Attributes:
        begun: whether the engine has begun with the answer.
        gone: whether nobody waits any more.
    """

    def __init__(self, bell: Bell, on_leave: Callable[[Ticket], None]) -> None:
        self.begun = False
        self.gone = False
        self._bell = bell
        self._on_leave = on_leave
        self._texts: dict[int, str] = {}
        self._outcome: Outcome | None = None
        self._news, self._ended = asyncio.Event(), asyncio.Event()
        self._rung = False

    async def pieces(self) -> AsyncGenerator[tuple[int, str], None]:
        """Yields what comes to the answers, until they are whole: the number of one, and text.

        To be called once.

        Raises:
            ChatBindError: what became of the question.
        """
        shown: dict[int, str] = {}
        ended = False
        while not ended:
            await self._news.wait()
            self._news.clear()
            ended = self._outcome is not None
            if isinstance(self._outcome, Generated):
                texts = {n: one.text for n, one in enumerate(self._outcome.each)}
            else:
                texts = dict(self._texts)
            for sample, text in sorted(texts.items()):
                before = shown.get(sample, "")
                # should a tokenizer take back what it had shown, no more is shown than is right
                if text.startswith(before) and text != before:
                    shown[sample] = text
                    yield sample, text[len(before) :]
        await self.answer()

    async def answer(self) -> Generated:
        """The whole answer.

        Raises:
            ChatBindError: what became of the question: an `EngineError` if the engine is gone.
        """
        await self._ended.wait()
        assert self._outcome is not None
        if isinstance(self._outcome, ChatBindError):
            raise self._outcome
        return self._outcome

    def leave(self) -> None:
        """Says that nobody waits any more; after the answer it means nothing."""
        if not self.gone:
            self.gone = True
            self._on_leave(self)

    def grown(self, sample: int, text: str) -> None:
        """Takes the newest text of an answer, from the engine's thread."""
        self.begun = True
        self._texts[sample] = text
        self._wake()

    def end(self, outcome: Outcome) -> None:
        """Takes what became of the question, from any thread."""
        self._outcome = outcome
        self._wake()

    def look(self) -> None:
        """Hears the bell, in the loop."""
        self._rung = False  # first: what comes from now on rings again
        self._news.set()
        if self._outcome is not None:
            self._ended.set()

    def _wake(self) -> None:
        if not self._rung:
            self._rung = True
            self._bell.ring(self)


class Bell:
    """Wakes an event loop for all tickets that have news, once until it has looked after them."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._tickets: deque[Ticket] = deque()
        self._rung = False

    def ring(self, ticket: Ticket) -> None:
        """Says that a ticket has news, from any thread."""
        self._tickets.append(ticket)
        if not self._rung:
            self._rung = True
            with suppress(RuntimeError):  # the loop is closed, and nobody waits
                self._loop.call_soon_threadsafe(self._look)

    def _look(self) -> None:
        self._rung = False  # first: what comes from now on rings again
        for _ in range(len(self._tickets)):
            self._tickets.popleft().look()
