from __future__ import annotations

import io
import threading
import time

import pytest

from chatbind_cli.errors import MediaError
from chatbind_cli.media import guard
from chatbind_cli.media.guard import ALL_BYTES, ONE_BYTES, Timed, check_time, decoding


def test_more_than_one_medium_may_take_is_refused_and_says_how_much() -> None:
    with (
        pytest.raises(MediaError, match=r"a\.png: would take 1,280 MiB of memory .* than 640 MiB"),
        decoding(2 * ONE_BYTES, "a.png"),
    ):
        pytest.fail("it was let in")
    with decoding(ONE_BYTES, "a.png"):
        pass


def test_many_threads_never_take_more_than_all_may_and_all_get_their_turn() -> None:
    held, most, done = 0, 0, []
    lock = threading.Lock()

    def decode(number: int) -> None:
        nonlocal held, most
        cost = (ONE_BYTES, (ALL_BYTES - ONE_BYTES) // 2, 1)[number % 3]
        for turn in range(5):
            try:
                with decoding(cost, str(number)):
                    with lock:
                        held += cost
                        most = max(most, held)
                    time.sleep(0.001)
                    with lock:
                        held -= cost
                    if turn % 2:
                        raise ValueError("broken")
            except ValueError:
                pass
        done.append(number)

    threads = [threading.Thread(target=decode, args=(i,)) for i in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert sorted(done) == list(range(12))
    assert ONE_BYTES < most <= ALL_BYTES


def test_a_large_medium_is_not_overtaken_for_ever_by_small_ones() -> None:
    order: list[str] = []
    release = threading.Event()

    def hold() -> None:
        with decoding(ALL_BYTES // 2, "first"):
            release.wait(10)

    def enter(name: str, cost: int) -> None:
        with decoding(cost, name):
            order.append(name)

    first = [threading.Thread(target=hold) for _ in range(2)]
    large = threading.Thread(target=enter, args=("large", ONE_BYTES))
    small = threading.Thread(target=enter, args=("small", ONE_BYTES))
    for thread in (*first, large, small):
        thread.start()
        time.sleep(0.05)
    assert order == []
    release.set()
    for thread in (*first, large, small):
        thread.join(10)
    assert sorted(order) == ["large", "small"]


def test_a_decode_inside_a_decode_is_a_bug_and_not_a_deadlock() -> None:
    with decoding(1, "outer"), pytest.raises(RuntimeError), decoding(1, "inner"):
        pytest.fail("it was let in")
    with decoding(1, "after"):
        pass


def test_the_clock_stops_a_decode_that_takes_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    check_time()  # outside of a decode there is no clock
    monkeypatch.setattr(guard, "ONE_SECONDS", 0.01)
    with decoding(1, "slow.gif"):
        stream = Timed(io.BytesIO(b"content"))
        assert stream.read(3) == b"con"
        time.sleep(0.02)
        with pytest.raises(MediaError, match=r"slow\.gif: takes more than 0\.01 s to decode"):
            stream.read(3)
    check_time()


def test_a_header_is_read_no_further_than_its_limit() -> None:
    stream = Timed(io.BytesIO(bytes(100)), left=50)
    assert len(stream.read(50)) == 50
    with pytest.raises(ValueError, match="header"):
        stream.read()
