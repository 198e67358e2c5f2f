"""Many judgements at a time.

The caller's thread reads what is to be judged (it may wait for a pipe, and Ctrl-C must reach it
there); an event loop in a second thread talks to the judge and hands over what comes back. However
it ends, judgements under way get a moment to finish, because they are paid for.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterable
from concurrent.futures import Future, wait
from typing import Any, TypeVar

from chatbind_cli.console import note
from chatbind_cli.errors import ChatBindError, contained
from chatbind_cli.evaluation.judges.judge import Judge, Verdict
from chatbind_cli.evaluation.records import Judgement

T = TypeVar("T")


def judge_all(
    judgements: Iterable[Judgement],
    judge: Judge,
    finish: Callable[[Judgement, Verdict], None],
    *,
    concurrency: int,
    grace_s: float,
) -> None:
    """Makes judgements, as fast as the judge can follow.

    Args:
        judgements: what is to be judged.
        judge: who judges.
        finish: called with each verdict, one at a time; what it raises ends the run.
        concurrency: judgements under way at the same time.
        grace_s: longest wait for those under way when the run ends early.

    Raises:
        JudgeError: the judge cannot work at all.
    """
    run = _Run(judge, finish, concurrency)
    try:
        run.feed(judgements)
    finally:
        try:
            run.wind_down(grace_s)
        finally:
            run.close()
    if run.errors:
        raise run.errors[0]


class _Run:
    """The state of one run; `feed`, `wind_down` and `close` are called by the caller's thread."""

    def __init__(
        self, judge: Judge, finish: Callable[[Judgement, Verdict], None], concurrency: int
    ) -> None:
        self.errors: list[BaseException] = []
        self._judge = judge
        self._finish = finish
        self._concurrency = concurrency
        self._seats = threading.Semaphore(concurrency)
        self._ending = False
        self._under_way: set[Future[None]] = set()
        self._tasks: set[asyncio.Task[Any] | None] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="judge", daemon=True)
        self._thread.start()

    def feed(self, judgements: Iterable[Judgement]) -> None:
        """Hands every judgement to the loop when there is room, and waits for the last."""
        for judgement in judgements:
            self._seats.acquire()
            if self.errors:
                return
            future = self._submit(self._work(judgement))
            self._under_way.add(future)
            future.add_done_callback(self._leave)
        for _ in range(self._concurrency):
            self._seats.acquire()
            if self.errors:
                return

    def wind_down(self, grace_s: float) -> None:
        """Starts nothing new, and gives what is under way its time to finish and be written."""
        if self._under_way:
            n_sent = self._submit(self._stop()).result()
            if n_sent:
                note(
                    f"ending: up to {grace_s:g} s for {n_sent} judgements under way "
                    "(Ctrl-C drops them)"
                )
            wait(self._under_way.copy(), grace_s)

    def close(self) -> None:
        """Drops what is still under way, and ends the thread."""
        try:
            self._submit(self._drop()).result(timeout=10)
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def _submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def _leave(self, future: Future[None]) -> None:
        self._under_way.discard(future)
        error = None if future.cancelled() else future.exception()
        if error is not None:
            self.errors.append(error)
        self._seats.release()

    async def _work(self, judgement: Judgement) -> None:
        if self._ending:
            return
        task = asyncio.current_task()
        self._tasks.add(task)
        try:
            self._finish(judgement, await self._verdict(judgement))
        except BaseException:
            # Nothing may start between a failure and the moment when `feed` hears of it.
            self._ending = True
            raise
        finally:
            self._tasks.discard(task)

    async def _verdict(self, judgement: Judgement) -> Verdict:
        case = judgement.case
        if case.problem is not None:
            return Verdict(error=case.problem)
        try:
            return await self._judge.judge(case, swapped=judgement.swapped)
        except ChatBindError:
            raise  # it is not about this case
        except Exception as error:
            return Verdict(error=str(contained(error, where=f"question {case.question_id}")))

    async def _stop(self) -> int:
        """Cancels what has sent nothing yet; returns how many others there are."""
        self._ending = True
        for task in self._tasks - self._judge.sending:
            if task is not None:
                task.cancel()
        return len(self._tasks & self._judge.sending)

    async def _drop(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self._judge.close()
