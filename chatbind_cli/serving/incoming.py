"""Requests on their way in: bodies in bounded memory and time, and clients that may leave."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request

from chatbind_cli.inference.openai_chat import RequestError
from chatbind_cli.json_text import Record, parse_line
from chatbind_cli.serving.desk import BusyError
from chatbind_cli.serving.limits import Limits

T = TypeVar("T")

_MOST_DRAINED_S = 3.0
_LONG = 1 << 20  # bytes of JSON that are read apart from the loop


class Bodies:
    """Reads bodies; those of all requests together take bounded memory."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._held = 0
        self._parser = ThreadPoolExecutor(1, "parser")

    @asynccontextmanager
    async def content(self, request: Request) -> AsyncIterator[bytes]:
        """Yields a request's body, which has its room until the block ends.

        Raises:
            RequestError: it is too long or too slow.
            BusyError: there is no room for it now.
            ClientDisconnect: the client left.
        """
        mine = 0

        def take(count: int) -> None:
            nonlocal mine
            if self._held + count > self._limits.bodies * self._limits.body_bytes:
                raise BusyError("the requests under way are too large together")
            self._held += count
            mine += count

        try:
            yield await self._body(request, take)
        finally:
            self._held -= mine

    async def record(self, content: bytes) -> Record:
        """The JSON object that a body is. It may take many times the memory: hold on to no more of
        it than is needed.

        Raises:
            RequestError: it has too many values.
            RecordError: it is no JSON object.
        """
        if content.count(b",") >= self._limits.values:
            raise RequestError(f"the body has more than {self._limits.values:,} values", status=413)
        if len(content) < _LONG:
            line = parse_line(content, "the body")
        else:
            loop = asyncio.get_running_loop()
            line = await loop.run_in_executor(self._parser, parse_line, content, "the body")
        if line.problem is not None:
            raise line.problem
        return line.record

    async def _body(self, request: Request, take: Callable[[int], None]) -> bytes:
        limits = self._limits
        said = request.headers.get("content-length", "")
        if said.isdecimal() and int(said) > limits.body_bytes:
            raise await self._too_long(request)
        body, begun = bytearray(), asyncio.get_running_loop().time()
        while True:
            due = begun + limits.body_s + len(body) / limits.body_rate
            try:
                async with asyncio.timeout_at(due):
                    message = await request.receive()
            except TimeoutError:
                raise RequestError("the body comes too slowly", status=408) from None
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            part = message.get("body", b"")
            if len(body) + len(part) > limits.body_bytes:
                body.clear()
                raise await self._too_long(request)
            take(len(part))
            body += part
            if not message.get("more_body", False):
                return bytes(body)

    async def _too_long(self, request: Request) -> RequestError:
        """Reads on for a while, since many clients hear a reply only when all is sent."""
        if request.headers.get("expect", "").lower() != "100-continue":
            with suppress(TimeoutError):  # then it hears of it in the middle
                async with asyncio.timeout(_MOST_DRAINED_S):
                    while (await request.receive()).get("more_body", False):
                        pass
        most = self._limits.body_bytes >> 20
        return RequestError(
            f"the body is longer than {most} MiB",
            hint="give large media by a path below the server's --media-root",
            status=413,
        )


async def attended(request: Request, work: Coroutine[Any, Any, T], deadline: float) -> T:
    """The result of some work, unless the client leaves before it is there.

    Args:
        request: whose body has been read.
        work: what is to be done; it is cancelled where it is not waited for.
        deadline: when it must be done, on the loop's clock.

    Raises:
        ClientDisconnect: the client left.
        RequestError: time is over.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_left(request))
    both = {working, leaving}
    try:
        left = deadline - asyncio.get_running_loop().time()
        await asyncio.wait(both, timeout=max(left, 0.0), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        if leaving.done():
            raise ClientDisconnect
        raise RequestError("the answer took longer than this server allows", status=504)
    finally:
        for task in both:
            task.cancel()
        await asyncio.gather(*both, return_exceptions=True)


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
