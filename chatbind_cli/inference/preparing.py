"""Questions made ready while others are answered: media read side by side, embedded together."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import count

from chatbind_cli.data.decoders import Loaded
from chatbind_cli.inbox import Inbox
from chatbind_cli.inference.questions import Question

Read = tuple[Question, list[Loaded]]
"""A question, and what was read of its media."""

_PATIENCE_S = 1.0
"""For readers at the end; one that waits for a network is left behind."""


class Preparation:
    """Prepares questions as they come; each comes out as soon as it is ready.

    So a medium that is slow to come holds up none but its own question, as long as not all readers
    wait for such. The price is that questions overtake each other, by as many places as there are
    readers, and that so many more decoded media are held in memory.

    A context manager, which yields where they come out.

    Args:
        questions: as they come.
        read: reads and decodes the media of one, in a thread of its own.
        prepare: embeds what was read for several, and puts their prompts together.
        readers: threads that read.
        together: most questions that are embedded together, where so many wait.
        room: most prepared questions that wait.
    """

    def __init__(
        self,
        questions: Inbox[Question],
        *,
        read: Callable[[Question], list[Loaded]],
        prepare: Callable[[Sequence[Read]], list[Question]],
        readers: int,
        together: int,
        room: int,
    ) -> None:
        self._questions = questions
        self._read = read
        self._prepare = prepare
        self._together = together
        self._found: Inbox[Read | Exception] = Inbox(together)
        self._ready: Inbox[Question] = Inbox(room)
        self._turn = threading.Lock()
        self._left = count(readers - 1, -1)
        # daemons: one may wait for a network when the program ends
        self._readers = [
            threading.Thread(target=self._read_on, name="reader", daemon=True)
            for _ in range(readers)
        ]
        self._preparing = threading.Thread(target=self._prepare_on, name="preparing")

    def __enter__(self) -> Inbox[Question]:
        for thread in (self._preparing, *self._readers):
            thread.start()
        return self._ready

    def __exit__(self, *error: object) -> None:
        """Nobody wants more."""
        for inbox in (self._ready, self._found, self._questions):
            inbox.leave()
        for inbox in (self._found, self._questions):
            inbox.close()  # one may sit in a wait for more
        until = time.monotonic() + _PATIENCE_S
        # Python may end the generator that this stands in in any thread
        for thread in {self._preparing, *self._readers} - {threading.current_thread()}:
            patience = None if thread is self._preparing else max(0.0, until - time.monotonic())
            thread.join(patience)

    def _read_on(self) -> None:
        end: Exception | None = None
        try:
            while (question := self._next()) is not None:
                if not self._found.put(self._read_one(question)):
                    return
        except Exception as error:  # what the questions ended with
            end = error
        if next(self._left) == 0:
            self._found.close(end)

    def _next(self) -> Question | None:
        with self._turn:  # one waits for the next question, and the others for their turn
            return self._questions.take()

    def _read_one(self, question: Question) -> Read | Exception:
        try:
            return question, self._read(question)
        except Exception as error:  # no medium can be read, and nobody goes on
            return error

    def _prepare_on(self) -> None:
        """Prepares what was read, several together where so many wait."""
        try:
            while (first := self._found.take()) is not None:
                group = [first]
                with suppress(Exception):  # what they ended with comes again
                    while len(group) < self._together and (more := self._found.take(wait=False)):
                        group.append(more)
                read: list[Read] = []
                for one in group:
                    if isinstance(one, Exception):
                        raise one
                    read.append(one)
                if not all(map(self._ready.put, self._prepare(read))):
                    return
            self._ready.close()
        except Exception as error:  # raised again in the thread that reads
            self._ready.close(error)
        finally:
            self._found.leave()
