"""Where requests wait for the one engine, and hear from it: between the server's loop and threads.

All that is asked goes into one inbox of `Answerer.run`, so that strangers' questions are answered
together.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import TYPE_CHECKING, Final, Literal

from chatbind_cli.errors import ChatBindError, EngineError, debugging, reason
from chatbind_cli.inbox import Inbox
from chatbind_cli.inference.decoding import Outcome
from chatbind_cli.inference.generation_settings import GenerationSettings
from chatbind_cli.inference.media_encoder import MediaEncoder
from chatbind_cli.inference.questions import Question
from chatbind_cli.media.medium import Medium
from chatbind_cli.serving.ticket import Bell, Ticket

if TYPE_CHECKING:
    from chatbind_cli.inference.answerer import Answerer

State = Literal["starting", "ready", "engine gone", "draining", "failed"]

_WHY: Final[dict[State, str]] = {
    "starting": "the model is not loaded yet",
    "draining": "the server is about to end",
    "failed": "nothing can be answered any more",
}
_RETRY_S = 5
"""Between two looks for an engine; and to come back in, while no rate is known."""
_LONGEST_RETRY_S = 60
_MEASURED = 64
"""Last answers whose rate is measured."""
_LAST_TOKEN_S = 5.0
_GLANCE_S = 0.02


class BusyError(ChatBindError):
    """As many wait as may; `retry_after_s` is when a place may be free."""

    def __init__(self, what: str, retry_after_s: int = _RETRY_S) -> None:
        super().__init__(what)
        self.retry_after_s = retry_after_s


class Desk:
    """Takes questions in an event loop, and has one engine, in a thread of its own, answer them.

    An engine elsewhere may go, and come back: those who wait for it hear of that at once,
    and it is looked for every few seconds. Nothing else comes back: then the desk has failed.

    Args:
        open_answerer: yields what answers, after connecting to its engine; called in the desk's
            thread, and again when an engine elsewhere has gone.
        settings: how answers are generated where a question does not say.
        most_waiting: questions that may wait for their first token.

    Attributes:
        state: `draining`: it takes no more questions.
        failure: why nothing can be answered any more, once it has `failed`.
    """

    def __init__(
        self,
        open_answerer: Callable[[], AbstractContextManager[Answerer]],
        settings: GenerationSettings,
        *,
        most_waiting: int,
    ) -> None:
        self.state: State = "starting"
        self.failure: Exception | None = None
        self._open_answerer = open_answerer
        self._settings = settings
        self._most_waiting = most_waiting
        self._tickets: dict[Ticket, Question] = {}
        self._inbox: Inbox[Question] = Inbox(most_waiting)
        self._media_encoder: MediaEncoder | None = None
        self._bell: Bell | None = None
        self._changing = threading.Lock()
        """Held where a question is taken in, and where all are sent away: none falls in between."""
        self._over = threading.Event()
        self._answered_at: deque[float] = deque(maxlen=_MEASURED)
        # a daemon: it may be loading a model when the program ends
        self._thread = threading.Thread(target=self._work, name="desk", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Questions that wait for their first token."""
        return sum(not ticket.begun for ticket in tuple(self._tickets))

    @property
    def under_way(self) -> int:
        """Questions whose answers are being made."""
        return sum(ticket.begun for ticket in tuple(self._tickets))

    def ask(self, question: Question) -> Ticket:
        """Lets a question wait for its answer; to be called in an event loop.

        Raises:
            BusyError: as many wait as may.
            EngineError: the engine is gone, or not there yet, or the desk is about to close.
        """
        with self._changing:
            self._check_ready()
            waiting = self.waiting
            if waiting >= self._most_waiting:
                raise BusyError(f"{waiting} questions wait already", self._retry_after(waiting))
            if self._bell is None:
                self._bell = Bell(asyncio.get_running_loop())
            ticket = Ticket(self._bell, self._left)
            question = replace(question, listener=ticket)
            self._tickets[ticket] = question
            self._inbox.put(question)
            return ticket

    async def embed(self, media: Sequence[Medium]) -> list[Medium | ChatBindError]:
        """Media and texts (of the modality `text`) with their embeddings, or why there is none.

        Raises:
            EngineError: the model is not there yet.
            ChatBindError: the encoder cannot be used.
        """
        if self._media_encoder is None:
            raise EngineError(_WHY["starting"])
        return await asyncio.to_thread(self._media_encoder.embed, media)

    async def drain(self, grace_s: float) -> None:
        """Takes no more questions, and waits for the answers to those that are there.

        What is not answered in `grace_s` seconds is given up.
        """
        with self._changing:
            if self.state != "failed":
                self.state = "draining"
        await _until(lambda: not self._tickets, grace_s)
        self._send_away(EngineError("the server ends before the answer is whole"))
        self._inbox.close()
        self._over.set()
        await _until(lambda: not self._thread.is_alive(), _LAST_TOKEN_S)

    def _check_ready(self) -> None:
        if self.state == "ready":
            return
        if self.state == "engine gone":
            assert self.failure is not None
            raise _engine_error(self.failure)
        raise EngineError(_WHY[self.state])

    def _retry_after(self, waiting: int) -> int:
        """Seconds until so many have had their answers, at the rate of the last ones."""
        times = self._answered_at
        if len(times) < 2 or times[-1] == times[0]:
            return _RETRY_S
        rate = (len(times) - 1) / (times[-1] - times[0])
        return max(1, min(_LONGEST_RETRY_S, math.ceil(waiting / rate)))

    def _left(self, ticket: Ticket) -> None:
        """Drops the question of a ticket, if the engine does not have it yet."""
        question = self._tickets.get(ticket)
        if question is not None and self._inbox.withdraw(question):
            self._end(ticket, ChatBindError("given up"))

    def _end(self, ticket: Ticket, outcome: Outcome) -> None:
        if self._tickets.pop(ticket, None) is not None:
            ticket.end(outcome)

    def _send_away(self, told: Exception) -> None:
        """Fails all that wait, each with an error of its own."""
        for ticket in tuple(self._tickets):
            self._end(ticket, _engine_error(told))
            ticket.gone = True

    def _work(self) -> None:
        """What the desk's thread does."""
        while self._goes_on() and not self._over.wait(_RETRY_S):
            pass

    def _goes_on(self) -> bool:
        """Answers questions until they end, or the engine does; True: that may come back."""
        try:
            with self._open_answerer() as answerer:
                self._begin(answerer)
                for question, outcome in answerer.run(self._inbox, self._settings):
                    self._hand_out(question, outcome)
            return False
        except Exception as error:
            return self._lose(error)

    def _begin(self, answerer: Answerer) -> None:
        assert isinstance(answerer.media_encoder, MediaEncoder)
        self._media_encoder = answerer.media_encoder
        _ = self._media_encoder.encoder  # opened now: the first medium is too late to miss it
        with self._changing:
            if self.state != "draining":
                self.state = "ready"

    def _hand_out(self, question: Question, outcome: Outcome) -> None:
        ticket = question.listener
        assert isinstance(ticket, Ticket)
        if not ticket.gone:
            self._answered_at.append(time.monotonic())
        self._end(ticket, outcome)

    def _lose(self, error: Exception) -> bool:
        """Fails whoever waits; whether the engine is one that may come back."""
        may_return = isinstance(error, EngineError) and self._media_encoder is not None
        if debugging():
            traceback.print_exception(error)
        with self._changing:
            self.failure = error
            if self.state != "draining":
                self.state = "engine gone" if may_return else "failed"
            self._inbox = Inbox(self._most_waiting)
            self._send_away(error)
        return may_return


def _engine_error(error: Exception) -> EngineError:
    """A new one that says the same: each who hears of it raises their own."""
    if isinstance(error, ChatBindError):
        return EngineError(error.what, where=error.where)
    return EngineError(f"nothing can be answered any more ({reason(error)})")


async def _until(true: Callable[[], bool], seconds: float) -> None:
    """Waits for something to become true, but no longer than that."""
    until = time.monotonic() + seconds
    while not true() and time.monotonic() < until:
        await asyncio.sleep(_GLANCE_S)
