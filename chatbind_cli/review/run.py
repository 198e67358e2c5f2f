"""Runs a review: cases in, judgements out, each on disk as soon as it is there.

The caller's thread reads the cases (it may wait for a pipe, and Ctrl-C must reach it there);
an event loop in a second thread talks to the judge and writes what comes back. However a run
ends, judgements under way get a moment to finish, because they are paid for. Knows nothing of what
a judge is.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from chatbind_cli.console import note
from chatbind_cli.errors import ChatBindError, JudgeError, contained
from chatbind_cli.jsonl import RecordWriter
from chatbind_cli.review.cases import Case, digest
from chatbind_cli.review.judges import Judge, Stopped, Verdict
from chatbind_cli.review.records import Task, review_record
from chatbind_cli.review.scores import paid_usd

Orders = Literal["as-given", "both", "random"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """How often and in which order each case is judged.

    Attributes:
        orders: show the answers as given, in both orders (two reviews), or in an order drawn
            from the question's hash.
        samples: reviews a case and order.
        concurrency: judgements under way at the same time.
        on_error: write failed reviews, leave them out, or stop at the first.
        grace_s: longest wait for judgements under way when the run ends early.
        earlier_usd: what earlier reviews cost, by slot; it is said in those that replace them.
    """

    orders: Orders = "as-given"
    samples: int = 1
    concurrency: int = 8
    on_error: Literal["record", "skip", "fail"] = "record"
    grace_s: float = 15.0
    earlier_usd: Mapping[str, float] = field(default_factory=dict)


@dataclass(slots=True)
class Outcome:
    """What a run did.

    Attributes:
        judged: reviews made now.
        reused: reviews that were already in the output.
        failed: reviews without scores.
        tasks: `(review_id, slot)` of all of them, in the order of the cases.
        tokens: prompt and completion tokens that the judge says it used now.
        cost_usd: what they cost at most, as far as prices are known.
        lost_usd: what of that would be for replies that never came.
    """

    judged: int = 0
    reused: int = 0
    failed: int = 0
    tasks: list[tuple[str, str]] = field(default_factory=list)
    tokens: list[int] = field(default_factory=lambda: [0, 0])
    cost_usd: float = 0.0
    lost_usd: float = 0.0

    def text(self) -> str:
        """What was done, in one line."""
        parts = [f"{count_of(self.judged)} made"]
        if self.reused:
            parts.append(f"{self.reused:,} were there already")
        if self.tokens[0]:
            parts.append(f"{self.tokens[0]:,} tokens sent, {self.tokens[1]:,} received")
        if self.cost_usd:
            lost = f" ({self.lost_usd:.4f} of it for replies that never came)"
            parts.append(f"{self.cost_usd:.4f} USD{lost if self.lost_usd else ''}")
        if self.failed:
            parts.append(f"{self.failed:,} failed")
        return ", ".join(parts)


def count_of(reviews: int) -> str:
    """So many reviews, in words."""
    return f"{reviews:,} {'review' if reviews == 1 else 'reviews'}"


def tasks_of(case: Case, judge: Judge, options: RunOptions) -> Iterator[Task]:
    """The judgements that one case needs; one failed task if it cannot be judged."""
    fingerprint = ""
    if case.problem is None:
        try:
            fingerprint = judge.fingerprint(case)
        except Exception as error:
            what = contained(error, where=f"question {case.question_id}")
            case = replace(case, problem=str(what))
    if options.orders == "random":
        swaps: tuple[bool, ...] = (int(digest(case.question, case.texts)[:2], 16) % 2 == 1,)
    else:
        swaps = (False, True) if options.orders == "both" and case.line is None else (False,)
    for sample in range(options.samples):
        for swapped in swaps:
            yield Task(
                case=case,
                swapped=swapped,
                sample=sample,
                judge=judge.name,
                fingerprint=fingerprint,
            )
        if case.problem is not None:
            # It fails in the same way in every sample.
            return


def run_reviews(
    cases: Iterable[Case],
    judge: Judge,
    writer: RecordWriter,
    options: RunOptions,
    *,
    on_done: Callable[[], None] = lambda: None,
) -> Outcome:
    """Judges all cases and writes a record for each judgement.

    Args:
        cases: what is to be judged; read as fast as the judge can follow.
        judge: the judge.
        writer: where the records go; what it has `done` is not judged again.
        options: how often, in which order, how many at a time.
        on_done: called after each judgement.

    Raises:
        JudgeError: the judge cannot work at all, or a review failed and `on_error` is `fail`.
    """
    run = _Run(judge, writer, options, on_done)
    with _event_loop(judge) as loop:
        try:
            run.feed(cases, loop)
        finally:
            run.wind_down(loop)
    if run.stop:
        raise run.stop[0]
    return run.outcome


class _Run:
    """The state of one run; `feed` is in the caller's thread, the rest in the loop's."""

    def __init__(
        self,
        judge: Judge,
        writer: RecordWriter,
        options: RunOptions,
        on_done: Callable[[], None],
    ) -> None:
        self.outcome = Outcome()
        self.stop: list[BaseException] = []
        self._judge = judge
        self._writer = writer
        self._options = options
        self._on_done = on_done
        # As many again wait in the loop, so that no judge waits for the other thread.
        self._n_seats = 2 * options.concurrency
        self._seats = threading.BoundedSemaphore(self._n_seats)
        self._places = asyncio.Semaphore(options.concurrency)
        self._ending = False
        self._n_judging = 0
        self._under_way: set[Future[None]] = set()
        self._lock = threading.Lock()

    def feed(self, cases: Iterable[Case], loop: asyncio.AbstractEventLoop) -> None:
        """Hands every judgement that is not there yet to the loop, and waits for the last."""
        for case in cases:
            for task in tasks_of(case, self._judge, self._options):
                self.outcome.tasks.append((task.review_id, task.slot))
                if task.review_id in self._writer.done:
                    self.outcome.reused += 1
                    self._on_done()
                elif self._take_seat():
                    self._start(self._work(task), loop)
            if self.stop:
                return
        for _ in range(self._n_seats):
            self._take_seat()

    def wind_down(self, loop: asyncio.AbstractEventLoop) -> None:
        """Starts nothing new, and gives what is under way its time to finish and be written."""
        self._ending = True
        with self._lock:
            under_way = set(self._under_way)
        if not under_way:
            return
        loop.call_soon_threadsafe(self._judge.stop)
        if self._n_judging:
            note(
                f"ending: up to {self._options.grace_s:g} s for {self._n_judging} judgements under "
                "way (Ctrl-C drops them)"
            )
        wait(under_way, self._options.grace_s)

    def _start(self, work: Coroutine[Any, Any, None], loop: asyncio.AbstractEventLoop) -> None:
        future = asyncio.run_coroutine_threadsafe(work, loop)
        with self._lock:
            self._under_way.add(future)
        future.add_done_callback(self._leave_seat)

    def _take_seat(self) -> bool:
        """Waits for a free seat; False if the run is to stop."""
        while not self.stop:
            if self._seats.acquire(timeout=0.2):
                return not self.stop
        return False

    def _leave_seat(self, future: Future[None]) -> None:
        with self._lock:
            self._under_way.discard(future)
        error = None if future.cancelled() else future.exception()
        if error is not None and not isinstance(error, Stopped):
            self.stop.append(error)
        self._seats.release()

    async def _work(self, task: Task) -> None:
        async with self._places:
            if self.stop or self._ending:
                return
            self._n_judging += 1
            good = False
            try:
                self._finish(task, await self._verdict(task))
                good = True
            finally:
                self._n_judging -= 1
                # Nothing may start between a failure and the moment when `feed` hears of it.
                self._ending = self._ending or not good
        self._on_done()

    async def _verdict(self, task: Task) -> Verdict:
        case = task.case
        if case.problem is not None:
            return Verdict(error=case.problem)
        try:
            return await self._judge.judge(case, swapped=task.swapped, sample=task.sample)
        except (ChatBindError, Stopped):
            raise  # it is not about this case
        except Exception as error:
            return Verdict(error=str(contained(error, where=f"question {case.question_id}")))

    def _finish(self, task: Task, verdict: Verdict) -> None:
        """Counts and writes one judgement; nothing awaits in between, so lines never mix."""
        earlier = self._options.earlier_usd.get(task.slot, 0.0)
        record = review_record(task, verdict, earlier_usd=earlier)
        self.outcome.tokens[0] += verdict.metadata.get("prompt_tokens", 0)
        self.outcome.tokens[1] += verdict.metadata.get("completion_tokens", 0)
        self.outcome.cost_usd += paid_usd(verdict.metadata) or 0.0
        self.outcome.lost_usd += verdict.metadata.get("lost_usd", 0.0)
        if verdict.scores is not None:
            self.outcome.judged += 1
            self._writer.write(record)
            return
        self.outcome.failed += 1
        if self._options.on_error == "fail":
            case = task.case
            where = f"question {case.question_id}" if case.line is None else None
            raise JudgeError(record["error"], where=where)
        if self._options.on_error == "record":
            self._writer.write(record)


@contextmanager
def _event_loop(judge: Judge) -> Iterator[asyncio.AbstractEventLoop]:
    """An event loop in a thread of its own; what is still under way at the end is dropped."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="judge", daemon=True)
    thread.start()

    async def wind_up() -> None:
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await judge.close()

    try:
        yield loop
    finally:
        try:
            asyncio.run_coroutine_threadsafe(wind_up(), loop).result(timeout=10)
        finally:
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.close()
