"""Questions that somebody elsewhere answers, many at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future
from typing import Any

from chatbind_cli.errors import contained
from chatbind_cli.inbox import Inbox
from chatbind_cli.inference.decoding import Outcome
from chatbind_cli.inference.questions import Question, where_of
from chatbind_cli.loop_thread import cancel_others


def answered_together(
    questions: Inbox[Question],
    start: Callable[[Question], Coroutine[Any, Any, Outcome]],
    submit: Callable[[Coroutine[Any, Any, Any]], Future[Any]],
    *,
    at_a_time: int,
    fatal: type[Exception],
) -> Iterator[tuple[Question, Outcome]]:
    """Answers questions as they come, each as soon as it is done, in any order.

    Args:
        questions: taken when there is room for one.
        start: called in a thread; what it, or its coroutine, raises is one question's failure.
        submit: hands a coroutine to the event loop.
        at_a_time: how many are under way.
        fatal: what no question gets past.

    Raises:
        Exception: a fatal one, or the questions' own; those under way come out before it.
    """
    done: Inbox[tuple[Question, Outcome]] = Inbox(at_a_time)
    seats, errors = threading.Semaphore(at_a_time), list[Exception]()

    async def finish(question: Question, outcome: Coroutine[Any, Any, Outcome]) -> None:
        try:
            done.put((question, await outcome))
        except fatal as error:
            errors.append(error)
            questions.close()  # the thread below may sit in a wait for more
            seats.release()
        except Exception as error:
            done.put((question, contained(error, where=where_of(question))))

    def start_all() -> None:
        try:
            while (question := questions.take()) is not None:
                seats.acquire()
                if errors:
                    seats.release()
                    break
                submit(finish(question, _started(question, start)))
        except Exception as error:  # the questions' own
            errors.append(error)
        for _ in range(at_a_time):
            seats.acquire()
        done.close(errors[0] if errors else None)

    starting = threading.Thread(target=start_all, daemon=True)  # it may wait for ever for one
    starting.start()
    try:
        while (item := done.take()) is not None:
            seats.release()
            yield item
    finally:
        errors.append(EOFError())
        questions.leave()
        questions.close()
        seats.release(2 * at_a_time + 1)
        starting.join()
        submit(cancel_others()).result()


def _started(
    question: Question, start: Callable[[Question], Coroutine[Any, Any, Outcome]]
) -> Coroutine[Any, Any, Outcome]:
    async def fail(error: Exception) -> Outcome:
        return contained(error, where=where_of(question))

    try:
        return start(question)
    except Exception as error:
        return fail(error)
