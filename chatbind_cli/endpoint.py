"""An OpenAI-compatible endpoint that may be full, slow, or hostile: judges and engines.

The `openai` client tries again what can pass (a full server, a broken connection, a cut-off reply)
and waits as long as a server asks (`Retry-After`). Each of its attempts keeps the limits a minute,
ends in time, and reads no more than a reply may have. The key appears in no message.
"""

from __future__ import annotations

import asyncio
import json
import zlib
from collections.abc import AsyncIterator, Callable
from typing import Any, cast

import httpx
import openai
from aiolimiter import AsyncLimiter

from chatbind_cli.errors import reason
from chatbind_cli.jsonl import Record
from chatbind_cli.urls import public_url

# A key that is shorter is a word (`none`, `EMPTY`) that local servers are given.
_SECRET_AT_LEAST = 12
_EVENTS = "text/event-stream"
_FILE = "application/binary"
_LARGEST_FILE = 512 << 20


class Endpoint:
    """Sends JSON and receives JSON.

    Args:
        url: the address that paths are put behind; None for OpenAI's own.
        key: what the server wants to see; empty where it wants none.
        timeout_s: longest wait for one reply; for the next piece of one that comes in pieces.
        retries: further attempts a request.
        requests_per_minute: the endpoint's limit, None if there is none.
        largest_reply: bytes of a reply, as sent and as unpacked.
        refuse: raises a ValueError over a JSON value that is no reply; one more try, then.

    Attributes:
        sending: the tasks whose request is out, and not waiting for its turn or for another try.
        url: the address as messages may show it.
    """

    def __init__(
        self,
        url: str | None,
        *,
        key: str,
        timeout_s: float,
        retries: int,
        requests_per_minute: float | None = None,
        largest_reply: int = 4 << 20,
        refuse: Callable[[Any], None] = lambda value: None,
    ) -> None:
        self._secret = key
        self._timeout_s = timeout_s
        http_client = _BoundedClient(timeout_s, requests_per_minute, largest_reply, refuse)
        self.sending = http_client.sending
        self._client = openai.AsyncOpenAI(
            http_client=cast(Any, http_client),  # declared as a fork of httpx from 3.0 on
            # A local server needs no key, but the client wants one.
            api_key=key or "none",
            base_url=url,
            timeout=timeout_s,
            max_retries=retries,
        )
        self.url = public_url(str(self._client.base_url))

    async def get(self, path: str) -> Any:
        """What lies at a path, as JSON.

        Raises:
            openai.APIError: it cannot be had.
        """
        # as bytes: the client's own models take 200 times the memory
        return json.loads((await self._client.get(path, cast_to=httpx.Response)).content)

    async def post(self, path: str, body: Record, *, once: bool = False) -> Any:
        """The reply to a request, as JSON.

        Args:
            path: where it goes.
            body: what it says.
            once: make no further attempt: what is asked for may be done already.

        Raises:
            openai.APIError: there is none, after all attempts or at once.
        """
        options: Any = {"max_retries": 0} if once else {}
        reply = await self._client.post(path, cast_to=httpx.Response, body=body, options=options)
        return json.loads(reply.content)

    async def upload(self, path: str, data: bytes, **fields: str) -> Any:
        """The reply to a file, as JSON.

        Raises:
            openai.APIError: there is none.
        """
        headers = {"Content-Type": "multipart/form-data"}
        reply = await self._client.post(
            path,
            cast_to=httpx.Response,
            body=fields,
            files={"file": ("requests.jsonl", data)},
            options={"headers": headers},
        )
        return json.loads(reply.content)

    async def download(self, path: str) -> bytes:
        """A file, of at most 512 MiB.

        Raises:
            openai.APIError: it cannot be had, or is larger.
        """
        options: Any = {"headers": {"Accept": _FILE}}
        return (await self._client.get(path, cast_to=httpx.Response, options=options)).content

    async def stream(self, path: str, body: Record) -> AsyncIterator[Any]:
        """The pieces of a reply as they come, each as JSON.

        Raises:
            openai.APIError: there is none, or the server says so in the middle.
            httpx.HTTPError: it breaks off, or cannot be read.
        """
        events = await self._client.post(
            path,
            cast_to=object,
            body={**body, "stream": True},
            options={"headers": {"Accept": _EVENTS}},
            stream=True,
            stream_cls=openai.AsyncStream[object],
        )
        try:
            async with events:
                async for event in events:
                    yield event
        except (ValueError, RecursionError, zlib.error) as error:
            raise httpx.DecodingError(str(error)) from error

    async def close(self) -> None:
        """Closes the connections."""
        await self._client.close()

    def in_words(self, error: Exception) -> str:
        """An error on one short line, without the key."""
        text, cause = str(error), error.__cause__
        if isinstance(error, (openai.APITimeoutError, httpx.TimeoutException)):
            text = f"no reply within {self._timeout_s:g} s"
        elif isinstance(cause, httpx.DecodingError):
            text = f"a reply that cannot be read ({cause})"
        elif isinstance(error, (openai.APIConnectionError, httpx.HTTPError)):
            text = f"no connection ({cause or reason(error)})"
        elif isinstance(error, openai.APIStatusError) and " - " not in text:
            text += f" {error.response.text}"  # words in a form that is not OpenAI's
        return reason(Exception(self.without_key(text)))

    def without_key(self, text: str) -> str:
        """The server's words; it may repeat what it was sent."""
        long = len(self._secret) >= _SECRET_AT_LEAST
        return text.replace(self._secret, "[key]") if long else text


class _BoundedClient(httpx.AsyncClient):
    """Every attempt in its turn and within its time, every reply as it is and of a bounded size."""

    def __init__(
        self,
        timeout_s: float,
        requests_per_minute: float | None,
        largest_reply: int,
        refuse: Callable[[Any], None],
    ) -> None:
        super().__init__(
            headers={"Accept-Encoding": "identity"},
            follow_redirects=True,
            event_hooks={"response": [self._read_bounded]},
            limits=httpx.Limits(max_connections=None),  # whoever asks says how many
        )
        self.sending: set[asyncio.Task[Any]] = set()
        self._timeout_s = timeout_s
        self._turns = RateLimit(requests_per_minute)
        self._largest_reply = largest_reply
        self._refuse = refuse

    async def send(self, request: httpx.Request, **options: Any) -> httpx.Response:
        """Sends one request."""
        task = cast(asyncio.Task[Any], asyncio.current_task())
        await self._turns.acquire(1)
        self.sending.add(task)
        try:
            # httpx's own limit is on each piece of a reply
            async with asyncio.timeout(self._timeout_s):
                return await super().send(request, **options)
        except TimeoutError as error:
            raise httpx.ReadTimeout("the reply took too long", request=request) from error
        finally:
            self.sending.discard(task)

    async def _read_bounded(self, response: httpx.Response) -> None:
        """Reads the body before the client does, unpacked no further than it may go.

        Raises:
            DecodingError: it is too large, packed in a way that was not asked for, or no reply.
        """
        wanted = response.request.headers.get("accept")
        stream = _Bounded(response, _LARGEST_FILE if wanted == _FILE else self._largest_reply)
        if response.is_success and wanted == _EVENTS:
            response.stream = stream  # read as it comes
            return
        try:
            body = b"".join([chunk async for chunk in stream])
            await stream.aclose()
            if response.is_success and wanted != _FILE:
                self._refuse(_parsed(body))
        except (ValueError, zlib.error) as error:
            raise httpx.DecodingError(str(error), request=response.request) from error
        response.stream = httpx.ByteStream(body)


class _Bounded(httpx.AsyncByteStream):
    """The body of a reply, unpacked, up to a size."""

    def __init__(self, response: httpx.Response, largest: int) -> None:
        self._stream = cast(httpx.AsyncByteStream, response.stream)
        self._coding = response.headers.pop("content-encoding", "identity")
        self._largest = largest

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """Yields its pieces.

        Raises:
            ValueError: it is too large, or packed in a way that was not asked for.
            zlib.error: it cannot be unpacked.
        """
        if self._coding not in ("identity", "gzip"):
            raise ValueError("it is compressed, which was not asked for")
        gzip = zlib.decompressobj(wbits=31) if self._coding == "gzip" else None
        size = 0
        async for chunk in self._stream:
            room = self._largest + 1 - size
            piece = chunk[:room] if gzip is None else gzip.decompress(chunk, room)
            size += len(piece)
            if size > self._largest:
                raise ValueError(f"it has more than {self._largest >> 20} MiB")
            yield piece

    async def aclose(self) -> None:
        """Gives the connection back."""
        await self._stream.aclose()


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


def _parsed(body: bytes) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ValueError("the reply is not JSON") from error
