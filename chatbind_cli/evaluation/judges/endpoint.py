"""HTTP to an endpoint that may be full, slow, or hostile, beneath the `openai` client.

The client tries again what can pass (a full server, a broken connection, a cut-off reply) and
waits as long as a server asks (`Retry-After`). Each of its attempts keeps the limits a minute, ends
in time, and reads no more than a reply may have.
"""

from __future__ import annotations

import asyncio
import json
import zlib
from typing import Any, cast

import httpx
from aiolimiter import AsyncLimiter

_LARGEST_REPLY = 4 << 20
"""Bytes of a reply, as sent and as unpacked; a long review has a few thousand."""


class BoundedClient(httpx.AsyncClient):
    """Every attempt in its turn and within its time, every reply as it is and of a bounded size.

    Args:
        timeout_s: longest wait for a whole reply; httpx's own limit is on each piece of it.
        requests_per_minute: the endpoint's limit, None if there is none.

    Attributes:
        sending: the tasks whose request is out, and not waiting for its turn or for another try.
    """

    def __init__(self, timeout_s: float, requests_per_minute: float | None) -> None:
        super().__init__(
            headers={"Accept-Encoding": "identity"},
            follow_redirects=True,
            event_hooks={"response": [_read_bounded]},
            limits=httpx.Limits(max_connections=None),  # the number of judgements says how many
        )
        self.sending: set[asyncio.Task[Any]] = set()
        self._timeout_s = timeout_s
        self._turns = RateLimit(requests_per_minute)

    async def send(self, request: httpx.Request, **options: Any) -> httpx.Response:
        """Sends one request."""
        task = cast(asyncio.Task[Any], asyncio.current_task())
        await self._turns.acquire(1)
        self.sending.add(task)
        try:
            async with asyncio.timeout(self._timeout_s):
                return await super().send(request, **options)
        except TimeoutError as error:
            raise httpx.ReadTimeout("the reply took too long", request=request) from error
        finally:
            self.sending.discard(task)


class RateLimit:
    """So much a minute, or no limit; a second's worth may go at once (servers count longer)."""

    def __init__(self, per_minute: float | None) -> None:
        self._limiter = None if per_minute is None else AsyncLimiter(per_minute / 60, 1)

    async def acquire(self, amount: float) -> None:
        """Waits until so much may go, in pieces of what may go at once."""
        while self._limiter is not None and amount > 0:
            piece = min(amount, self._limiter.max_rate)
            await self._limiter.acquire(piece)
            amount -= piece


async def _read_bounded(response: httpx.Response) -> None:
    """Reads the body before the client does, and unpacks it, if need be, no further than it may go.

    Raises:
        DecodingError: it is too large, packed in a way that was not asked for, or no completion.
    """
    try:
        coding = response.headers.pop("content-encoding", "identity")
        if coding not in ("identity", "gzip"):
            raise ValueError("it is compressed, which was not asked for")
        gzip = zlib.decompressobj(wbits=31) if coding == "gzip" else None
        body = bytearray()
        stream = cast(httpx.AsyncByteStream, response.stream)
        async for chunk in stream:
            room = _LARGEST_REPLY + 1 - len(body)
            body += chunk[:room] if gzip is None else gzip.decompress(chunk, room)
            if len(body) > _LARGEST_REPLY:
                raise ValueError(f"it has more than {_LARGEST_REPLY >> 20} MiB")
        await stream.aclose()
        if response.is_success:
            _check_completion(bytes(body))
    except (ValueError, zlib.error) as error:
        raise httpx.DecodingError(str(error), request=response.request) from error
    response.stream = httpx.ByteStream(bytes(body))


def _check_completion(body: bytes) -> None:
    try:
        value = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ValueError("the reply is not JSON") from error
    try:
        good = isinstance(value["choices"][0]["message"], dict)
    except (TypeError, LookupError):
        good = False
    if not good:
        raise ValueError("the reply is not a chat completion")
