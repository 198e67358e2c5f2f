"""When the next request may go out: limits a minute, and how many at a time.

The limits that the user names are kept from the start. Beside them the pace adapts to the server:
when it says "too many", everybody waits as long as it asks and half as many requests go at a
time; with every reply the number creeps up again (additive increase, multiplicative decrease).
Lives in one event loop. Knows nothing of what is asked.
"""

from __future__ import annotations

import asyncio

from chatbind_cli.review.judges import Stopped

_BURST_S = 1.0
"""A second's worth of a limit may go at once; servers count in windows that are longer."""


class _Bucket:
    """So many units a minute (the generic cell rate algorithm; Source: ITU-T I.371)."""

    def __init__(self, per_minute: float | None) -> None:
        self._gap_s = 0.0 if per_minute is None else 60.0 / per_minute
        self._due = 0.0

    def wait_s(self, now: float) -> float:
        return self._due - now - _BURST_S

    def take(self, now: float, units: float) -> None:
        self._due = max(self._due, now) + units * self._gap_s

    def give_back(self, units: float) -> None:
        self._due -= units * self._gap_s


class Pace:
    """Lets requests through.

    Args:
        requests_per_minute: None for no limit.
        tokens_per_minute: tokens sent and received, None for no limit.
        most_at_a_time: requests under way at the same time.
    """

    def __init__(
        self,
        *,
        requests_per_minute: float | None = None,
        tokens_per_minute: float | None = None,
        most_at_a_time: int = 1,
    ) -> None:
        self._requests = _Bucket(requests_per_minute)
        self._tokens = _Bucket(tokens_per_minute)
        self._most = most_at_a_time
        self._window = float(most_at_a_time)
        self._under_way = 0
        self._not_before = 0.0
        self._narrowed_at = 0.0
        self._stopped = False
        self._changed = asyncio.Event()

    @property
    def at_a_time(self) -> int:
        """How many requests may be under way now."""
        return max(1, int(self._window))

    async def enter(self, tokens: int) -> float:
        """Waits until a request may go.

        Args:
            tokens: the most that it may cost.

        Returns:
            The time at which it goes, for `too_many`.

        Raises:
            Stopped: no more requests are to go.
        """
        clock = asyncio.get_running_loop().time
        while True:
            if self._stopped:
                raise Stopped
            now = clock()
            wait = max(self._not_before - now, self._requests.wait_s(now), self._tokens.wait_s(now))
            if wait <= 0 and self._under_way < self.at_a_time:
                break
            await self._wait(wait if wait > 0 else None)
        self._under_way += 1
        self._requests.take(now, 1)
        self._tokens.take(now, tokens)
        return now

    def leave(self, *, unused_tokens: int = 0, good: bool = False) -> None:
        """Says that a request is over.

        Args:
            unused_tokens: what it cost less than `enter` was told.
            good: whether a reply came, which lets more go at a time.
        """
        self._under_way -= 1
        self._tokens.give_back(unused_tokens)
        if good:
            self._window = min(self._most, self._window + 1 / self._window)
        self._wake()

    def too_many(self, entered_at: float, wait_s: float) -> None:
        """The server wants fewer requests, and none for a while."""
        now = asyncio.get_running_loop().time()
        self._not_before = max(self._not_before, now + wait_s)
        # Requests that were under way at the last cut tell nothing new.
        if entered_at >= self._narrowed_at:
            self._window = max(1.0, self._window / 2)
            self._narrowed_at = now

    async def rest(self, seconds: float) -> None:
        """Sleeps; a stop ends it.

        Raises:
            Stopped: no more requests are to go.
        """
        clock = asyncio.get_running_loop().time
        until = clock() + seconds
        while not self._stopped and clock() < until:
            await self._wait(until - clock())
        if self._stopped:
            raise Stopped

    def stop(self) -> None:
        """Lets no more requests through."""
        self._stopped = True
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _wait(self, seconds: float | None) -> None:
        try:
            await asyncio.wait_for(self._changed.wait(), seconds)
        except TimeoutError:
            return
