"""When requests go out: limits a minute, and what "too many" does."""

from __future__ import annotations

import asyncio
import time

import pytest

from chatbind_cli.review.judges import Stopped
from chatbind_cli.review.pace import Pace


def _times(pace: Pace, n: int, tokens: int = 0) -> list[float]:
    async def go() -> list[float]:
        start = time.monotonic()
        times = []
        for _ in range(n):
            await pace.enter(tokens)
            times.append(time.monotonic() - start)
            pace.leave(good=True)
        return times

    return asyncio.run(go())


def test_requests_a_minute_are_kept_after_one_seconds_worth() -> None:
    # 600 a minute: 10 at once or a little more, then one every 0.1 s
    times = _times(Pace(requests_per_minute=600), 15)
    assert times[9] < 0.35, "ten at once"
    assert 0.35 <= times[14] < 3


def test_tokens_a_minute_are_kept_and_unused_ones_are_given_back() -> None:
    # 60,000 a minute: 1,000 a second
    slow = _times(Pace(tokens_per_minute=60_000), 4, tokens=500)
    assert 0.45 <= slow[3] < 3

    async def refunded() -> float:
        pace = Pace(tokens_per_minute=60_000)
        start = time.monotonic()
        for _ in range(4):
            await pace.enter(900)
            pace.leave(unused_tokens=890, good=True)
        return time.monotonic() - start

    assert asyncio.run(refunded()) < 1  # all of them paid for: 1.7 s


def test_without_limits_only_the_number_at_a_time_counts() -> None:
    async def go() -> None:
        pace = Pace(most_at_a_time=2)
        await pace.enter(0)
        await pace.enter(0)
        third = asyncio.create_task(pace.enter(0))
        await asyncio.sleep(0.02)
        assert not third.done()
        pace.leave(good=True)
        await asyncio.wait_for(third, 1)

    asyncio.run(go())


def test_too_many_halves_what_goes_at_a_time_and_replies_raise_it_again() -> None:
    async def go() -> None:
        pace = Pace(most_at_a_time=8)
        entered = [await pace.enter(0) for _ in range(8)]
        # Eight refusals of one volley are one piece of news.
        for at in entered:
            pace.too_many(at, 0.0)
            pace.leave()
        assert pace.at_a_time == 4
        pace.too_many(await pace.enter(0), 0.0)
        pace.leave()
        assert pace.at_a_time == 2
        for _ in range(60):
            await pace.enter(0)
            pace.leave(good=True)
        assert pace.at_a_time == 8

    asyncio.run(go())


def test_everybody_waits_as_long_as_the_server_asks() -> None:
    async def go() -> float:
        pace = Pace(most_at_a_time=4)
        pace.too_many(await pace.enter(0), 0.3)
        pace.leave()
        start = time.monotonic()
        await asyncio.gather(pace.enter(0), pace.enter(0))
        return time.monotonic() - start

    assert 0.28 <= asyncio.run(go()) < 3


def test_a_stop_ends_waiting_and_resting() -> None:
    async def go() -> None:
        pace = Pace(requests_per_minute=1, most_at_a_time=4)
        for _ in range(2):  # what is left of the first second's worth
            first = asyncio.create_task(pace.enter(0))
            await asyncio.sleep(0)
        resting = asyncio.create_task(pace.rest(60))
        await asyncio.sleep(0.01)
        pace.stop()
        for task in (first, resting):
            with pytest.raises(Stopped):
                await asyncio.wait_for(task, 1)
        with pytest.raises(Stopped):
            await pace.enter(0)

    asyncio.run(go())
