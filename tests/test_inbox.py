"""Items between threads: order, room, ends and errors."""

from __future__ import annotations

import threading

import pytest

from chatbind_cli.inbox import Inbox


def test_items_come_in_order_and_end() -> None:
    inbox: Inbox[int] = Inbox(3)
    assert inbox.take(wait=False) is None and not inbox.ended
    assert [inbox.put(n) for n in range(3)] == [True] * 3
    inbox.close()
    assert not inbox.ended
    assert [inbox.take() for _ in range(4)] == [0, 1, 2, None]
    assert inbox.ended


def test_a_writer_waits_for_room_and_a_reader_for_items() -> None:
    inbox: Inbox[int] = Inbox(2)
    seen: list[int] = []

    def write() -> None:
        for number in range(100):
            inbox.put(number)
            seen.append(number)
        inbox.close()

    writer = threading.Thread(target=write)
    writer.start()
    taken = []
    while (item := inbox.take()) is not None:
        assert len(seen) <= item + 4  # two wait, one is taken, one is on its way
        taken.append(item)
    writer.join()
    assert taken == list(range(100))


def test_an_error_comes_after_the_items_before_it() -> None:
    inbox: Inbox[int] = Inbox(2)
    inbox.put(1)
    inbox.close(OSError("the disk is gone"))
    inbox.close()  # what comes later does not hide it
    assert inbox.take() == 1
    for _ in range(2):
        with pytest.raises(OSError, match="the disk is gone"):
            inbox.take()


def test_a_writer_hears_that_nobody_reads() -> None:
    inbox: Inbox[int] = Inbox(1)
    inbox.put(1)
    told: list[bool] = []
    writer = threading.Thread(target=lambda: told.append(inbox.put(2)))
    writer.start()
    inbox.leave()
    writer.join(timeout=10)
    assert told == [False]
    assert inbox.put(3) is False


def test_what_was_not_taken_can_be_taken_back_and_makes_room() -> None:
    inbox: Inbox[str] = Inbox(2)
    inbox.put("a")
    inbox.put("b")
    assert inbox.withdraw("a")
    assert not inbox.withdraw("a")
    assert inbox.put("c")
    assert [inbox.take(), inbox.take(wait=False)] == ["b", "c"]
    assert not inbox.withdraw("b")
