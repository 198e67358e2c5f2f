"""Which answers are made together: rows end one by one, and waiting questions take their place."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace

import torch

from chatbind_cli.data.encoding import GPU_FAILED
from chatbind_cli.errors import ChatBindError, RecordError, contained
from chatbind_cli.inbox import Inbox
from chatbind_cli.inference.asks import Ask
from chatbind_cli.inference.decoding import Generated, Outcome
from chatbind_cli.inference.prefill import Prefill
from chatbind_cli.inference.questions import Question, where_of
from chatbind_cli.inference.rows import Rows
from chatbind_cli.inference.sampling import NOT_FINITE, NextToken, choose

WINDOW = 4
"""Batches that are taken from the inbox at a time, and sorted by length."""

_FEW = 4
"""Prompts that are read together where so many wait; a quarter of a batch if that is less."""

Outcomes = Iterator[tuple[Question, Outcome]]


class Schedule:
    """One run of an engine: questions in, answers out as they are done.

    A batch that fails is halved, for want of memory or whatever else: the others restart later,
    and a question that fails alone is a failed question.

    Args:
        questions: prepared ones.
        asks: the answers wanted to a question, one a sample.
        by_rows: which can be made in rows that come and go.
        others: makes those that cannot.
        prefill: reads prompts.
        never: int64 [n], tokens that are in no answer.
        batch_size: most rows.
    """

    def __init__(
        self,
        questions: Inbox[Question],
        *,
        asks: Callable[[Question], Sequence[Ask]],
        by_rows: Callable[[Ask], bool],
        others: Callable[[Sequence[Ask]], Iterator[tuple[Ask, Outcome]]],
        prefill: Prefill,
        never: torch.Tensor | None,
        batch_size: int,
    ) -> None:
        self._questions = questions
        self._asks = asks
        self._by_rows = by_rows
        self._others = others
        self._prefill = prefill
        self._never = never
        self._batch_size = self._limit = batch_size
        self._waiting: deque[Ask] = deque()
        self._under_way: list[Ask] = []
        self._rows = prefill.rows()
        self._since_failure = 0
        self._error: Exception | None = None

    def outcomes(self) -> Outcomes:
        """Yields each question with what became of it.

        Raises:
            Exception: what the questions ended with, once all others are answered.
        """
        while True:
            yield from self._take()
            if not (self._waiting or self._under_way):
                if self._error is not None:
                    raise self._error
                if self._questions.ended:
                    return
            yield from self._give_up()
            yield from self._begin()
            yield from self._give_up()
            yield from self._step()

    @property
    def _few(self) -> int:
        return max(1, min(_FEW, self._limit // 4))

    def _take(self) -> Outcomes:
        """Takes what waits, a window of it at most; waits only if nothing else is to be done."""
        if len(self._waiting) >= self._few:
            return
        fresh: list[Ask] = []
        while len(fresh) < WINDOW * self._batch_size:
            question = self._next(wait=not (fresh or self._waiting or self._under_way))
            if question is None:
                break
            try:
                fresh += self._asks(question)
            except Exception as error:
                yield question, contained(error, where=where_of(question))
        rows = [ask for ask in fresh if self._by_rows(ask)]
        if rows:
            self._prefill.learn([ask.prompt for ask in rows if ask.sample == 0])
            self._waiting += sorted(rows, key=lambda ask: -len(ask.prompt.input_ids))
        others = [ask for ask in fresh if not self._by_rows(ask)]
        for ask, outcome in self._others(others):
            yield from self._done(ask, outcome)

    def _give_up(self) -> Outcomes:
        """Drops the answers that nobody waits for: those that wait, and those under way."""
        every = (*self._under_way, *self._waiting)
        gone = {id(ask): error for ask in every if (error := ask.question.given_up)}
        if not gone:
            return
        rows = {row for row, ask in enumerate(self._under_way) if id(ask) in gone}
        if rows:
            self._under_way = [self._under_way[row] for row in self._rows.drop(rows)]
        self._waiting = deque(ask for ask in self._waiting if id(ask) not in gone)
        for ask in every:
            if id(ask) in gone:
                yield from self._done(ask, gone[id(ask)])

    def _next(self, *, wait: bool) -> Question | None:
        if self._error is not None:
            return None
        try:
            return self._questions.take(wait=wait)
        except Exception as error:  # raised when the answers under way are out
            self._error = error
            return None

    def _begin(self) -> Outcomes:
        """Lets waiting questions take the free places."""
        free, waiting = self._limit - len(self._under_way), len(self._waiting)
        if not waiting or free <= 0 or (self._under_way and free < min(self._few, waiting)):
            return
        group = [self._waiting.popleft() for _ in range(min(free, waiting))]
        try:
            rows, logits = self._prefill.begin([ask.prompt for ask in group])
            chosen = choose(logits, group, self._never)
        except Exception as error:
            yield from self._failed(error, group)
            return
        going_on = yield from self._advance(rows, group, chosen)
        try:
            self._rows.join(rows)
        except Exception as error:
            yield from self._failed(error, going_on)
            return
        self._under_way += going_on

    def _step(self) -> Outcomes:
        """Goes on with every row by a token."""
        if not self._under_way:
            return
        try:
            logits = self._rows.read([[ask.ids[-1]] for ask in self._under_way])
            chosen = choose(logits, self._under_way, self._never)
        except Exception as error:
            self._rows.rewind()
            yield from self._failed(error, self._under_way)
            return
        self._under_way = yield from self._advance(self._rows, self._under_way, chosen)

    def _advance(
        self, rows: Rows, asks: Sequence[Ask], chosen: Sequence[NextToken]
    ) -> Generator[tuple[Question, Outcome], None, list[Ask]]:
        """Adds a token to each answer; rows whose answers have ended leave.

        Returns:
            The answers that go on, in the order of the rows.
        """
        ended: dict[int, Outcome] = {}
        for row, (ask, following) in enumerate(zip(asks, chosen, strict=True)):
            if following.token is None:
                ended[row] = RecordError(NOT_FINITE, where=ask.where)
                continue
            ask.take(following)
            ask.tell()
            if ask.ended:
                ended[row] = ask.generated()
        order = rows.drop(set(ended)) if ended else range(len(asks))
        for row, outcome in ended.items():
            yield from self._done(asks[row], outcome)
        return [asks[row] for row in order]

    def _failed(self, error: Exception, group: Sequence[Ask]) -> Outcomes:
        """Halves what has failed; alone, it is a failed question.

        Raises:
            Exception: the GPU is out of order.
        """
        memory = out_of_memory(error)
        if isinstance(error, GPU_FAILED) and not memory:
            raise error
        under_way = group is self._under_way
        others = 0 if under_way else len(self._under_way)
        self._since_failure = 0
        if len(group) == 1 and not (memory and others):
            self._limit = self._batch_size
            if under_way:
                self._under_way, self._rows = [], self._prefill.rows()
            yield from self._done(group[0], failure(error, group[0]))
            return
        # what is computed stays in memory as long as the error says where it came from
        error.__traceback__ = None
        back = list(group)
        if under_way:
            kept = len(group) // 2
            self._rows.drop(set(range(kept, len(group))))
            self._under_way, back = back[:kept], back[kept:]
        self._limit = max(1, others, (others + len(group)) // 2)
        for ask in reversed(back):
            ask.restart()
            self._waiting.appendleft(ask)
        if memory and torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _done(self, ask: Ask, outcome: Outcome) -> Outcomes:
        """Yields the question of an answer, if it was the last one to it."""
        self._since_failure += 1
        if self._since_failure % (WINDOW * self._batch_size) == 0:
            # what was too much may have been one long question
            self._limit = min(self._batch_size, 2 * self._limit)
        ask.outcomes[ask.sample] = outcome
        if len(ask.outcomes) == ask.settings.samples:
            yield ask.question, _together([ask.outcomes[n] for n in sorted(ask.outcomes)])


def _together(outcomes: Sequence[Outcome]) -> Outcome:
    """What becomes of a question: of its one answer, or of all its samples."""
    samples: list[Generated] = []
    for outcome in outcomes:
        if isinstance(outcome, ChatBindError):
            return outcome
        samples.append(outcome)
    return samples[0] if len(samples) == 1 else replace(samples[0], samples=tuple(samples))


def out_of_memory(error: Exception) -> bool:
    """Whether a computation failed for want of memory."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    # what the allocator of a CPU says
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


def failure(error: Exception, ask: Ask) -> ChatBindError:
    """What a question alone failed with."""
    if out_of_memory(error):
        return RecordError(
            "does not fit in memory, even alone", where=ask.where, hint="shorten the question"
        )
    return contained(error, where=ask.where)
