"""A queue of work: items are read ahead, worked on here or in several processes, and come out done.

Who leads reads the items and gets the results; who works gets an item whenever there is room for
one, so that nobody waits for anybody. A worker that dies is named, and replaced if it had got as
far as to work. What it had goes to others, each item alone, since one of them may be what killed
it: an item that two workers have died of has failed.
"""

from __future__ import annotations

import os
import signal
import threading
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import wait
from types import FrameType
from typing import Any, Generic, TypeVar, cast

from chatbind_cli import worker_pool
from chatbind_cli.console import note
from chatbind_cli.data.read_ahead import ReadAhead
from chatbind_cli.errors import ChatBindError, LaunchError, debugging, reason
from chatbind_cli.inbox import Inbox
from chatbind_cli.worker_pool import WorkerPool, WorkerProcess

Item = TypeVar("Item")
Result = TypeVar("Result")

Work = Callable[[Inbox[Item]], Iterator[tuple[Item, Result]]]
"""Takes items until they end, and gives each out with its result, in any order."""

Key = Callable[[Item], Hashable]
"""Tells an item from the others that are under way, and is the same for what work makes of it."""

Found = Generator[tuple[int, Item, Result | ChatBindError], None, None]
"""Items by the order in which they were read, and what became of them."""

_MORE_LOSSES = 2
"""Workers that may die one after the other, beyond each once, with nothing done in between."""

_LEAVING_S = 2.0
"""How long a worker without a leader may take to leave what it is opening."""


@dataclass(frozen=True)
class Worker(Generic[Item, Result]):
    """Somebody who works.

    Attributes:
        work: what is done with items.
        room: for how many of them, where they come from another process.
        said: what whoever leads has to know; the same in every process.
    """

    work: Work[Item, Result]
    room: int
    said: dict[str, Any] = field(default_factory=dict)


@contextmanager
def work_queue(
    pool: WorkerPool, begin: Callable[[], Worker[Item, Result]], key: Key[Item]
) -> Iterator[WorkQueue[Item, Result]]:
    """A queue that a pool works on, to be called where `pool.follows` is not set.

    Args:
        pool: who works.
        begin: gets ready to work; called here where nobody else works.
        key: see `Key`.
    """
    if pool.size == 1:
        yield _Here(begin(), key)
        return
    led: _Led[Item, Result] = _Led(pool, key)
    with led:
        yield led


class WorkQueue(ABC, Generic[Item, Result]):
    """Gives out the results of items."""

    def __init__(self, key: Key[Item]) -> None:
        self._key = key

    @property
    @abstractmethod
    def said(self) -> dict[str, Any]:
        """What those who work say of themselves; waits until one of them is ready.

        Raises:
            ChatBindError: none can work.
        """

    def results(
        self, items: Iterable[Item], *, in_order: bool = False
    ) -> Generator[tuple[Item, Result | ChatBindError], None, None]:
        """Each item with its result, or with what its workers died of. To be called once.

        Args:
            items: are read in a thread of their own, ahead of the work, but not far.
            in_order: hold results back until it is their turn; else each comes when it is there.

        Raises:
            Exception: whatever reading the items raised, after the results of those before it.
            ChatBindError: the work itself cannot go on.
        """
        reader = ReadAhead(items, self._key, self._ring)
        try:
            with closing(self._found(reader)) as found:
                for item, result in _in_turn(found) if in_order else _at_once(found):
                    reader.pass_one()
                    yield item, result
            if reader.error is not None:
                raise reader.error
        finally:
            reader.leave()

    @abstractmethod
    def _found(self, reader: ReadAhead[Item]) -> Found[Item, Result]:
        """Everything that is read, in any order."""

    def _ring(self) -> None:
        """Called from the reader's thread when there is an item, or the end."""


def _at_once(found: Found[Item, Result]) -> Iterator[tuple[Item, Result | ChatBindError]]:
    return ((item, result) for _, item, result in found)


def _in_turn(found: Found[Item, Result]) -> Iterator[tuple[Item, Result | ChatBindError]]:
    held: dict[int, tuple[Item, Result | ChatBindError]] = {}
    turn = 0
    for number, item, result in found:
        held[number] = item, result
        while turn in held:
            yield held.pop(turn)
            turn += 1


class _Here(WorkQueue[Item, Result]):
    """This process does the work."""

    def __init__(self, worker: Worker[Item, Result], key: Key[Item]) -> None:
        super().__init__(key)
        self._worker = worker

    @property
    def said(self) -> dict[str, Any]:
        return self._worker.said

    def _found(self, reader: ReadAhead[Item]) -> Found[Item, Result]:
        with closing(cast(Any, self._worker.work(reader.inbox))) as done:
            for item, result in done:
                yield *reader.number(item), result


class _Led(WorkQueue[Item, Result]):
    """Workers do it, and this process leads them."""

    def __init__(self, pool: WorkerPool, key: Key[Item]) -> None:
        super().__init__(key)
        self._pool = pool
        self._workers: list[WorkerProcess] = []
        self._said: dict[str, Any] | None = None
        self._suspects: dict[int, Item] = {}
        """What was with a worker that died, and has no result yet."""
        self._again: list[int] = []
        """Which of them wait for another worker."""
        self._losses = 0
        """Workers that have died since the last result."""
        self._bell, self._rope = Pipe(duplex=False)
        self._rung = False

    def __enter__(self) -> _Led[Item, Result]:
        try:
            for rank in range(1 if self._pool.door else self._pool.size):
                self._workers.append(WorkerProcess.started(self._pool, rank))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.line.close()  # so that all of them end at once
        for worker in self._workers:
            worker.kill()
        self._rope.close()
        self._bell.close()
        if self._pool.door:
            self._pool.door.close()

    @property
    def said(self) -> dict[str, Any]:
        while self._said is None:
            for _ in self._hear():
                pass
        return self._said

    def _ring(self) -> None:
        if not self._rung:
            self._rung = True
            with suppress(OSError):  # nobody listens any more
                self._rope.send_bytes(b"")

    def _found(self, reader: ReadAhead[Item]) -> Found[Item, Result]:
        self._hand_out(reader)
        while self._again or any(w.held for w in self._workers) or not reader.inbox.ended:
            yield from self._hear()
            self._hand_out(reader)

    def _hand_out(self, reader: ReadAhead[Item]) -> None:
        """Gives out what there is room for: to each worker a suspect alone, or what is new."""
        while self._again:
            idle = [worker for worker in self._workers if worker.room and not worker.held]
            if not idle:
                return
            number = self._again.pop(0)
            idle[0].give(number, self._suspects[number])
        while True:
            free = [w for w in self._workers if w.room > len(w.held) and not self._suspects_of(w)]
            item = reader.inbox.take(wait=False) if free else None
            if item is None:
                return
            min(free, key=lambda worker: len(worker.held)).give(*reader.number(item))

    def _suspects_of(self, worker: WorkerProcess) -> set[int]:
        return self._suspects.keys() & worker.held.keys()

    def _hear(self) -> Found[Item, Result]:
        """Waits for news, and gives out the results among them."""
        lines = {worker.line: worker for worker in self._workers}
        door = self._pool.door
        for line in wait([self._bell, *([door.socket] if door else []), *lines]):
            if line is self._bell:
                self._bell.recv_bytes()
                self._rung = False
                continue
            if door and line is door.socket:
                with suppress(EOFError, OSError):  # it was gone before it was in
                    self._workers.append(WorkerProcess.come(door))
                continue
            worker = lines[cast(Any, line)]
            try:
                kind, *words = worker_pool.hear(worker.line)
            except (EOFError, OSError):
                yield from self._lose(worker, worker.end())
                continue
            if kind == "done":
                number, result = words
                self._losses = 0
                self._suspects.pop(number, None)
                yield number, worker.held.pop(number), result
            elif kind == "ready":
                self._welcome(worker, *words)
            elif kind == "lost":
                worker.kill()
                yield from self._lose(worker, f"lost process {worker.rank}: {words[0]}")
            else:
                raise words[0]

    def _welcome(self, worker: WorkerProcess, room: int, said: dict[str, Any]) -> None:
        if self._said not in (None, said):
            raise LaunchError(
                f"process {worker.rank} does not find what the others have found",
                hint="has the model's folder changed meanwhile? The same command goes on",
            )
        worker.room, self._said = room, said

    def _lose(self, worker: WorkerProcess, cause: str) -> Found[Item, Result]:
        """Goes on without a worker that is gone."""
        self._workers.remove(worker)
        self._losses += 1
        again = worker.room and worker.process is not None
        if again and self._losses <= self._pool.size + _MORE_LOSSES:
            self._workers.append(WorkerProcess.started(self._pool, worker.rank))
        if not self._workers:
            raise LaunchError(cause)
        n = len(worker.held)
        note(cause + (f" (others take what it had: {n})" if n else ""))
        for number, item in sorted(worker.held.items()):
            if self._suspects.pop(number, None) is None:
                self._suspects[number] = item
                self._again.append(number)
            else:
                yield number, item, LaunchError(f"two processes have died with it; {cause}")


class _LeaderGone(BaseException):
    """Nobody needs what this worker is opening."""


def follow(begin: Callable[[], Worker[Item, Result]], key: Key[Item]) -> None:
    """What a worker does, until its leader has enough.

    Args:
        begin: gets ready to work.
        key: see `Key`.
    """
    line = worker_pool.line_to_leader()
    inbox: Inbox[Item] = Inbox(1 << 30)  # the leader keeps to the room there is
    numbers: dict[Hashable, int] = {}
    begun = threading.Event()

    def leave(number: int, frame: FrameType | None) -> None:
        raise _LeaderGone

    def listen() -> None:
        with suppress(EOFError, OSError):
            while True:
                number, item = worker_pool.hear(line)
                numbers[key(item)] = number
                inbox.put(item)
        if not begun.is_set():  # a model is opened by way of temporary folders, which are to go
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR2)
            time.sleep(_LEAVING_S)
        os._exit(0)

    def say(*words: Any) -> None:
        begun.set()  # or failed to: nothing is said before
        with suppress(OSError):  # `listen` hears of it
            worker_pool.say(line, words)

    signal.signal(signal.SIGUSR2, leave)
    try:
        threading.Thread(target=listen, daemon=True).start()
        try:
            worker = begin()
            say("ready", worker.room, worker.said)
            for item, result in worker.work(inbox):
                say("done", numbers.pop(key(item)), result)
        except ChatBindError as error:
            say("failed", error)
        except Exception as error:  # of this process alone, as far as one can tell
            if debugging():
                traceback.print_exc()
            say("lost", f"{type(error).__name__}: {reason(error)}")
    except _LeaderGone:
        os._exit(0)
