"""The queue of work with real processes: who does what, who dies of it, and what comes out."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from chatbind_cli import worker_pool
from chatbind_cli.data import read_ahead
from chatbind_cli.data.work_queue import Worker, work_queue
from chatbind_cli.errors import ChatBindError, LaunchError, MediaError, RecordError
from chatbind_cli.inbox import Inbox
from chatbind_cli.worker_pool import WorkerPool
from tests.waiting import gone, wait_until

ROOT = Path(__file__).resolve().parents[2]

# what items tell it: a number is doubled after a moment, other words are obeyed
WORKER = """
import os, signal, sys, time
from chatbind_cli.data.work_queue import Worker, follow
from chatbind_cli.errors import MediaError

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def obey(item):
    if item == "die once":
        if not os.path.exists("died"):
            open("died", "w").close()
            die()
    elif str(item).startswith("die"):
        die()
    if item == "fail":
        raise MediaError("no encoder", where="x")
    if item == "break":
        raise ValueError("odd")

def work(inbox):
    while (first := inbox.take()) is not None:
        time.sleep(0.02)
        # together, as a model answers, and so they die together
        batch = [first]
        while (item := inbox.take(wait=False)) is not None:
            batch.append(item)
        for item in batch:
            obey(item)
        for item in batch:
            yield item, (item, int(os.environ["RANK"]), os.getpid())

def begin():
    {begin}
    return Worker(work, 4, {"model": "m"})

follow(begin, lambda item: item)
"""

Results = list[tuple[Any, Any]]


@pytest.fixture(autouse=True)
def _place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def pool(size: int, begin: str = "") -> WorkerPool:
    code = WORKER.replace("{begin}", begin)
    return WorkerPool(size, (sys.executable, "-c", code))


def run(size: int, items: Any, begin: str = "", *, in_order: bool = True) -> Results:
    with work_queue(pool(size, begin), nobody, key) as queue:
        assert queue.said == {"model": "m"}
        return list(queue.results(items, in_order=in_order))


def nobody() -> Worker[Any, Any]:
    raise AssertionError("the leader does no work")


def key(item: Any) -> Any:
    return item


def test_workers_share_out_the_items_and_end() -> None:
    done = run(2, range(40))
    assert [item for item, _ in done] == list(range(40))
    assert all(result[0] == item for item, result in done)
    assert {result[1] for _, result in done} == {0, 1}
    wait_until(lambda: all(gone(result[2]) for _, result in done))


def test_a_worker_that_is_killed_is_named_and_others_take_what_it_had(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with work_queue(pool(2), nobody, key) as queue:
        done: Results = []
        for item, result in queue.results(range(60)):
            done.append((item, result))
            if len(done) == 10:
                os.kill(result[2], signal.SIGKILL)
    assert sorted(item for item, _ in done) == list(range(60))
    assert all(result[0] == item for item, result in done)
    told = capsys.readouterr().err
    assert told.startswith(f"chatbind: lost process {done[9][1][1]} on ")
    assert "killed by signal 9 (SIGKILL)" in told
    assert told.count("lost process") == 1


@pytest.mark.parametrize("size", [2, 3])
def test_an_item_that_kills_its_workers_fails_alone(size: int) -> None:
    done = run(size, [0, 1, "die", *range(2, 20), "die once"])
    failed = [(item, result) for item, result in done if isinstance(result, ChatBindError)]
    assert [item for item, _ in failed] == ["die"]
    assert "two processes have died with it" in str(failed[0][1])
    assert [item for item, _ in done] == [0, 1, "die", *range(2, 20), "die once"]


def test_several_killers_are_as_many_failures_and_no_neighbour_of_theirs() -> None:
    killers = [f"die {n}" for n in range(4)]
    items = [item for n in range(4) for item in (3 * n, 3 * n + 1, killers[n], 3 * n + 2)]
    done = run(2, items, in_order=False)
    assert sorted(str(item) for item, _ in done) == sorted(map(str, items))
    assert sorted(str(i) for i, result in done if isinstance(result, ChatBindError)) == killers


def test_where_every_item_kills_it_comes_to_an_end() -> None:
    with (
        work_queue(pool(2), nobody, key) as queue,
        pytest.raises(LaunchError, match="lost process"),
    ):
        for _ in queue.results(f"die {n}" for n in range(100)):
            pass


def test_workers_that_cannot_begin_are_the_end() -> None:
    with pytest.raises(LaunchError, match=r"lost process [01].*SIGKILL"):
        run(2, range(3), "die()")
    with pytest.raises(MediaError, match="m: no model"):
        run(2, range(3), "raise MediaError('no model', where='m')")
    with pytest.raises(LaunchError, match="lost process [01]: ValueError: odd"):
        run(2, range(3), "raise ValueError('odd')")


def test_one_that_cannot_begin_leaves_the_work_to_others() -> None:
    done = run(2, range(12), "if os.environ['RANK'] == '0': die()")
    assert [item for item, _ in done] == list(range(12))
    assert {result[1] for _, result in done} == {1}


def test_what_every_item_needs_and_is_not_there_ends_the_run() -> None:
    with pytest.raises(MediaError, match="x: no encoder"):
        run(2, [1, "fail", *range(2, 9)])


def test_what_breaks_a_worker_is_an_item_s_failure_in_the_end() -> None:
    done = run(2, [1, "break", *range(2, 9)])
    [(item, error)] = [(i, r) for i, r in done if isinstance(r, ChatBindError)]
    assert item == "break"
    assert "ValueError: odd" in str(error)


def test_workers_that_find_different_models_do_not_work_together() -> None:
    begin = 'return Worker(work, 4, {"model": os.environ["RANK"]})'
    with (
        work_queue(pool(2, begin), nobody, key) as queue,
        pytest.raises(LaunchError, match="does not find what the others have found"),
    ):
        list(queue.results(range(200)))


def broken(n: int) -> Iterator[int]:
    yield from range(n)
    raise RecordError("is not JSON", where="list:4")


@pytest.mark.parametrize("size", [1, 2])
def test_a_list_that_breaks_off_is_an_error_after_what_came_before(size: int) -> None:
    done = []
    with work_queue(one_or(size), begin_here, key) as queue, pytest.raises(RecordError):
        for item, _ in queue.results(broken(7), in_order=True):
            done.append(item)
    assert done == list(range(7))


@pytest.mark.parametrize("size", [1, 2])
def test_what_has_come_is_done_before_there_is_more(size: int) -> None:
    seen = threading.Semaphore(0)

    def slow() -> Iterator[int]:
        for item in range(6):
            yield item
            assert seen.acquire(timeout=20), "one waited for the next"

    with work_queue(one_or(size), begin_here, key) as queue:
        for _ in queue.results(slow()):
            seen.release()


@pytest.mark.parametrize("size", [1, 2])
def test_reading_does_not_run_away_from_one_that_takes_long(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read_ahead, "_AHEAD", 20)
    read = 0

    def items() -> Iterator[int]:
        nonlocal read
        while read < 150:
            yield read
            read += 1

    with work_queue(one_or(size), begin_here, key) as queue:
        for item, _ in queue.results(items(), in_order=True):
            if item in (0, 80):
                time.sleep(0.2)
            assert read <= item + 21
    assert read == 150


@pytest.mark.parametrize("size", [1, 2])
def test_whoever_has_enough_leaves_nothing_behind(size: int) -> None:
    before = threading.active_count()
    with (
        work_queue(one_or(size), begin_here, key) as queue,
        closing(queue.results(itertools.count(), in_order=True)) as results,
    ):
        _, result = next(results)
    wait_until(lambda: threading.active_count() == before)
    if size == 2:
        wait_until(lambda: gone(result[2]))


def one_or(size: int) -> WorkerPool:
    return WorkerPool() if size == 1 else pool(size)


def begin_here() -> Worker[int, int]:
    def work(inbox: Inbox[int]) -> Iterator[tuple[int, int]]:
        while (item := inbox.take()) is not None:
            yield item, 2 * item

    return Worker(work, 4)


LEADER = """
import sys, time
from chatbind_cli.worker_pool import WorkerPool
from chatbind_cli.data.work_queue import work_queue

def slow():
    for item in range(6):
        yield item
    time.sleep(60)

pool = WorkerPool(2, (sys.executable, "-c", sys.argv[1]))
with work_queue(pool, None, lambda item: item) as queue:
    for item, result in queue.results(slow()):
        print(result[2], flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_workers_end_with_their_leader(number: signal.Signals) -> None:
    # one is still getting ready, and has nothing to do with the leader yet
    begin = "if os.environ['RANK'] == '1': open(f'busy-{os.getpid()}', 'w'); time.sleep(60)"
    leader = subprocess.Popen(
        [sys.executable, "-c", LEADER, WORKER.replace("{begin}", begin)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert leader.stdout is not None
    pids = {int(leader.stdout.readline()) for _ in range(6)}
    wait_until(lambda: len(list(Path().glob("busy-*"))) == 1)
    pids |= {int(path.name.removeprefix("busy-")) for path in Path().glob("busy-*")}
    leader.send_signal(number)
    leader.communicate(timeout=20)
    assert len(pids) == 2
    wait_until(lambda: all(map(gone, pids)))


def test_a_worker_that_is_not_needed_takes_its_temporary_folders_away() -> None:
    # one is still getting ready when the other has done everything
    begin = "import tempfile\n    if os.environ['RANK'] == '1':\n"
    begin += "        with tempfile.TemporaryDirectory(dir='.', prefix='opening-'): time.sleep(60)"

    def once_it_opens() -> Iterator[int]:
        wait_until(lambda: len(list(Path().glob("opening-*"))) == 1)
        yield 1

    assert len(run(2, once_it_opens(), begin)) == 1
    assert not list(Path().glob("opening-*"))


def test_a_worker_whose_leader_is_gone_before_it_listens_says_nothing() -> None:
    workers = pool(2, "time.sleep(60)")
    for _ in range(5):
        ours, theirs = worker_pool.Pipe()
        ours.close()
        with theirs:
            done = subprocess.run(
                workers.line,
                env={**os.environ, "CHATBIND_LINE": str(theirs.fileno()), "RANK": "1"},
                pass_fds=[theirs.fileno()],
                capture_output=True,
                check=False,
                timeout=20,
            )
        assert (done.returncode, done.stderr) == (0, b"")


def test_a_tensor_travels_whole() -> None:
    torch = pytest.importorskip("torch")
    here, there = worker_pool.Pipe()
    with here, there:
        worker_pool.say(here, torch.arange(3.0))
        here.close()
        assert worker_pool.hear(there).tolist() == [0.0, 1.0, 2.0]
