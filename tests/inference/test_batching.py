"""Records into batches: a fixed grid from a file, prompt batches from a pipe that pauses."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator

import pytest

from chatbind_cli.errors import RecordError
from chatbind_cli.inference.batching import gather
from chatbind_cli.jsonl import Line


def items(count: int) -> Iterator[Line]:
    return (Line({"question_id": i}, f"q:{i}", i) for i in range(count))


def ids(batch: list[Line]) -> list[int]:
    return [line.record["question_id"] for line in batch]


@pytest.mark.parametrize("idle", [None, 5.0])
def test_batches_lie_on_a_grid(idle: float | None) -> None:
    batches = [ids(batch) for batch in gather(items(7), 3, idle_seconds=idle)]
    assert batches == [[0, 1, 2], [3, 4, 5], [6]]


@pytest.mark.parametrize("idle", [None, 5.0])
def test_what_came_before_an_error_is_still_given_out(idle: float | None) -> None:
    def broken() -> Iterator[Line]:
        yield from items(4)
        raise RecordError("is not JSON", where="q:5")

    batches = gather(broken(), 3, idle_seconds=idle)
    assert [ids(next(batches)), ids(next(batches))] == [[0, 1, 2], [3]]
    with pytest.raises(RecordError, match="q:5: is not JSON"):
        next(batches)


def test_a_pause_closes_the_batch_and_the_next_record_opens_another() -> None:
    line: queue.Queue[int | None] = queue.Queue()
    arriving = iter(lambda: line.get(), None)
    records = (Line({"question_id": i}, f"q:{i}", i) for i in arriving)
    batches = gather(records, 10, idle_seconds=0.2)
    line.put(1)
    line.put(2)
    assert ids(next(batches)) == [1, 2]
    threading.Timer(0.5, line.put, [3]).start()
    # the pause goes on: nothing is said twice, and nothing is lost
    assert ids(next(batches)) == [3]
    line.put(None)
    assert list(batches) == []


def test_a_pause_between_full_batches_is_told() -> None:
    line: queue.Queue[int | None] = queue.Queue()
    records = (Line({"question_id": i}, "", i) for i in iter(lambda: line.get(), None))
    batches = gather(records, 1, idle_seconds=0.1)
    line.put(1)
    assert ids(next(batches)) == [1]
    assert next(batches) == []
    line.put(None)
    assert list(batches) == []


def test_a_fast_source_is_not_read_to_its_end_in_advance() -> None:
    read = 0

    def endless() -> Iterator[Line]:
        nonlocal read
        while True:
            read += 1
            yield Line({"question_id": read}, "", read)

    batches = gather(endless(), 2, idle_seconds=1.0)
    next(batches)
    time.sleep(0.1)
    assert read < 1000
