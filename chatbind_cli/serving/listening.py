"""The server's sockets: connections that are dropped when they hang, and the end on a signal."""

from __future__ import annotations

import asyncio
import math
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from chatbind_cli.errors import ChatBindError
from chatbind_cli.inference.openai_reply import error_record
from chatbind_cli.jsonl import dumps
from chatbind_cli.serving.desk import Desk
from chatbind_cli.serving.limits import Limits
from chatbind_cli.serving.replies import log

_SWEEP_TICKS = 2  # of uvicorn's, which has ten a second
_FLUSH_S = 5  # for what is left of replies when all answers are there


def bind(host: str, port: int) -> socket.socket:
    """A socket at an address, which nobody can connect to yet.

    Raises:
        ChatBindError: there is no such address, or somebody listens there.
    """
    try:
        family, kind, number, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        made = socket.socket(family, kind, number)
        try:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            made.bind(address)
        except OSError:
            made.close()
            raise
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise ChatBindError(
            f"cannot listen ({why})", where=f"{host}:{port}", hint="--host and --port say where"
        ) from error
    return made


def address_of(listening: socket.socket) -> str:
    """`http://HOST:PORT` of a socket."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Connection(H11Protocol):
    """One client, as uvicorn serves it, and what it is busy with."""

    most: int
    _busy_with: tuple[object, ...] = ()
    _since = 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Takes a client, or sends it away where there are too many."""
        super().connection_made(transport)
        if len(self.connections) > self.most:
            self._refuse(503, "Service Unavailable", "too many connections")

    def send_400_response(self, msg: str) -> None:
        """Answers what is no HTTP, unless it comes in the middle of an answer."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.transport.abort()
        else:
            self._refuse(400, "Bad Request", "this is no HTTP request")

    def _refuse(self, status: int, phrase: str, message: str) -> None:
        kind = "server_error" if status >= 500 else "invalid_request_error"
        body = dumps(error_record(message, kind)).encode()
        head = f"HTTP/1.1 {status} {phrase}\r\ncontent-type: application/json\r\n"
        head += f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        self.transport.write(head.encode() + body)
        self.transport.close()

    def sweep(self, now: float, limits: Limits) -> None:
        """Drops the client if for too long it has sent no request, or read nothing of its reply."""
        unsent = self.transport.get_write_buffer_size()
        busy_with: tuple[object, ...]
        if unsent or self.transport.is_closing():
            busy_with, patience = ("reading", unsent), limits.stalled_s
        elif self.cycle is None or self.cycle.response_complete:
            busy_with, patience = ("asking", self.cycle), limits.idle_s
        else:
            self._busy_with = ()  # it waits for us
            return
        if busy_with != self._busy_with:
            self._busy_with, self._since = busy_with, now
        elif now - self._since > patience:
            self.transport.abort()


class Server(uvicorn.Server):
    """Uvicorn's server, which lets answers finish when it is told to stop.

    Args:
        app: the ASGI application.
        desk: where its questions wait.
        limits: what clients may do.
        on_ready: called once, when the desk takes questions.

    Attributes:
        told: the signal that ended it.
    """

    def __init__(self, app: Any, desk: Desk, limits: Limits, on_ready: Callable[[], None]) -> None:
        limited = type("Limited", (Connection,), {"most": limits.connections})
        super().__init__(
            uvicorn.Config(
                app,
                http=limited,
                ws="none",
                lifespan="off",
                log_config=None,
                log_level="critical",
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=math.ceil(limits.idle_s),
                timeout_graceful_shutdown=_FLUSH_S,
            )
        )
        self.told: int | None = None
        self._desk = desk
        self._limits = limits
        self._on_ready: Callable[[], None] | None = on_ready
        self._draining: asyncio.Task[None] | None = None

    @property
    def connections(self) -> int:
        """How many clients are connected."""
        return len(self.server_state.connections)

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Hears signals in the loop, where this is the main thread of a program."""
        loop = asyncio.get_running_loop()
        main = threading.current_thread() is threading.main_thread()
        numbers = (signal.SIGINT, signal.SIGTERM) if main else ()
        # a shell's background job is not to hear Ctrl-C
        heard = [n for n in numbers if signal.getsignal(n) != signal.SIG_IGN]
        for number in heard:
            loop.add_signal_handler(number, self._hear, number)
        try:
            yield
        finally:
            for number in heard:
                loop.remove_signal_handler(number)

    def _hear(self, number: int) -> None:
        if self.told is not None:
            os._exit(128 + number)
        self.stop(number)
        # Python would wait for every thread, and one may read a film for somebody who has left
        longest = self._limits.grace_s + 2 * _FLUSH_S
        code = 0 if number == signal.SIGTERM else 128 + number
        last = threading.Timer(longest, os._exit, [code])
        last.daemon = True
        last.start()

    def stop(self, number: int) -> None:
        """Begins to end on a signal."""
        self.told = number
        log(f"stopping: {self._desk.under_way} answers are under way; a second signal: at once")
        self._draining = asyncio.get_running_loop().create_task(self._drain())

    async def _drain(self) -> None:
        await self._desk.drain(self._limits.grace_s)
        self.should_exit = True

    async def on_tick(self, counter: int) -> bool:
        """Looks after connections and the desk; whether it is time to end."""
        if counter % _SWEEP_TICKS == 0:
            now = time.monotonic()
            for connection in list(self.server_state.connections):
                if isinstance(connection, Connection):
                    connection.sweep(now, self._limits)
        if self._on_ready is not None and self._desk.state == "ready":
            self._on_ready()
            self._on_ready = None
        return await super().on_tick(counter) or self._desk.state == "failed"
