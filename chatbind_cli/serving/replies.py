"""What goes back: JSON, errors in OpenAI's form, and events as they come."""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack, suppress

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from chatbind_cli.console import note, show
from chatbind_cli.errors import ChatBindError, debugging, reason
from chatbind_cli.inference.openai_reply import error_body, error_record
from chatbind_cli.json_text import Record
from chatbind_cli.jsonl import dumps
from chatbind_cli.serving.desk import BusyError
from chatbind_cli.serving.incoming import attended

_HEADERS = {
    401: {"WWW-Authenticate": "Bearer"},
    # the rest of the body is not waited for
    408: {"Connection": "close"},
    413: {"Connection": "close"},
    503: {"Retry-After": "10"},
}
_GONE = 499  # as nginx logs it
_LAST_WORD_S = 1.0


def log(text: str, write: Callable[[str], None] = note) -> None:
    """Tells the log; should that be full or gone, clients are answered all the same."""
    with suppress(OSError):
        write(text)


def json_reply(
    record: Record, status: int = 200, headers: dict[str, str] | None = None
) -> Response:
    """A record as JSON."""
    return Response(dumps(record), status, headers, media_type="application/json")


def failure(error: Exception) -> tuple[int, Record, dict[str, str]]:
    """The status, the body and the headers that tell a client of an error.

    What nobody expected is told on standard error, and not to the client.
    """
    match error:
        case BusyError():
            record = error_record(str(error), "rate_limit_error", code="rate_limit_exceeded")
            return 429, record, {"Retry-After": str(error.retry_after_s)}
        case HTTPException(status_code=404):
            return 404, error_record("there is no such address here", code="unknown_url"), {}
        case HTTPException():
            return error.status_code, error_record(error.detail), dict(error.headers or {})
        case ClientDisconnect():
            return _GONE, {}, {}
    if not isinstance(error, ChatBindError):
        trace = "".join(traceback.format_exception(error)) if debugging() else ""
        log(f"{trace}chatbind: internal error: {type(error).__name__}: {reason(error)}", show)
    status, record = error_body(error)
    return status, record, _HEADERS.get(status, {})


class EventStream:
    """A reply that grows: server-sent events, of which the first is there.

    Args:
        request: whose client may leave.
        first: the first of the records.
        more: the others.
        deadline: when the last must be sent, on the loop's clock.
        held: what is let go of at the end, however that comes.
    """

    def __init__(
        self,
        request: Request,
        first: Record,
        more: AsyncGenerator[Record, None],
        deadline: float,
        held: AsyncExitStack,
    ) -> None:
        self._request = request
        self._first = first
        self._more = more
        self._deadline = deadline
        self._held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends it; an error on the way is its last event."""
        kinds = [(b"content-type", b"text/event-stream"), (b"cache-control", b"no-store")]
        async with self._held:
            await send({"type": "http.response.start", "status": 200, "headers": kinds})
            try:
                await attended(self._request, self._send_all(send), self._deadline)
            except ClientDisconnect:
                pass  # nobody is there to be told
            except Exception as error:
                # one that reads nothing would not hear it
                with suppress(TimeoutError):
                    async with asyncio.timeout(_LAST_WORD_S):
                        await send(_event(dumps(failure(error)[1])))
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send_all(self, send: Send) -> None:
        await send(_event(dumps(self._first)))
        async for record in self._more:
            await send(_event(dumps(record)))
        await send(_event("[DONE]"))


def _event(data: str) -> Record:
    body = f"data: {data}\n\n".encode()
    return {"type": "http.response.body", "body": body, "more_body": True}
