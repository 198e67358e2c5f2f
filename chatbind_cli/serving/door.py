"""The door of the server: who may come in, what is told of each request, and what never goes out.

A browser on the same machine runs pages of strangers, who may have a server on localhost asked
through it: with a form (which needs nobody's consent), or under a name of theirs that points to
127.0.0.1 (DNS rebinding). So a server without a key answers only to names that no stranger can
give it, and no page but its own. With a key there is nothing to gain: pages do not have it, and
without CORS headers no browser lets them send one.
"""

from __future__ import annotations

import hmac
import ipaddress
import socket
import time
from collections.abc import Sequence
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.routing import BaseRoute, Route, Router
from starlette.types import Message, Receive, Scope, Send

from chatbind_cli.inference.openai_chat import RequestError
from chatbind_cli.serving.metrics import Metrics
from chatbind_cli.serving.replies import failure, json_reply, log

_OPEN = {"/", "/health"}
"""What needs no key: the page, which asks for it, and what load balancers look at."""

_SHOWN = 100  # characters of a path


class Door:
    """The ASGI application: what answers at some addresses, for those who may come in.

    Args:
        routes: the addresses. What goes wrong there is told here, in OpenAI's form.
        key: what clients must show; None: nothing.
        host: the name or address that the server was told to listen at.
        metrics: what counts requests; by path, where that has no parameter.
    """

    def __init__(
        self, routes: Sequence[BaseRoute], *, key: str | None, host: str, metrics: Metrics
    ) -> None:
        self._router = Router(routes, redirect_slashes=False)
        paths = (route.path for route in routes if isinstance(route, Route))
        self._counted = {path for path in paths if "{" not in path}
        self._key = None if key is None else f"Bearer {key}".encode()
        self._names = {"localhost", host.lower(), socket.gethostname().lower()}
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Lets a request in, or refuses it, and tells what became of it."""
        begun = time.monotonic()
        status = 0

        async def heard(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            self._check(scope["path"], Headers(scope=scope))
            # with an application in the scope, the router raises errors in place of text of its own
            scope["app"] = self
            await self._router(scope, receive, heard)
        except Exception as error:
            code, record, headers = failure(error)
            if not status:
                await json_reply(record, code, headers)(scope, receive, heard)
        finally:
            self._tell(scope, status, time.monotonic() - begun)

    def _check(self, path: str, headers: Headers) -> None:
        if self._key is not None:
            shown = headers.get("authorization", "").encode("latin-1")
            if path not in _OPEN and not hmac.compare_digest(shown, self._key):
                said = "is wrong" if shown else "is missing"
                raise RequestError(f"the API key {said}", status=401, code="invalid_api_key")
            return
        host = headers.get("host", "").lower()
        if host and not self._is_ours(host):
            raise RequestError(
                "this server does not go by that name",
                hint="ask it by address or as localhost, or start it with --api-key",
                status=403,
            )
        origin = headers.get("origin")
        if origin is not None and origin.lower().rpartition("://")[2] != host:
            what = "another site's page may not ask this server"
            raise RequestError(what, hint="start it with --api-key", status=403)

    def _is_ours(self, host: str) -> bool:
        """Whether no stranger's page can be behind a `Host` header: addresses are not rebound."""
        try:
            name = (urlsplit(f"//{host}").hostname or "").rstrip(".")
        except ValueError:
            return False
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return name in self._names or name.endswith(".localhost")
        return True

    def _tell(self, scope: Scope, status: int, seconds: float) -> None:
        path = scope["path"]
        route = path if path in self._counted else "other"
        self._metrics.requests.labels(route, str(status)).inc()
        self._metrics.request_seconds.labels(route).observe(seconds)
        tokens = scope.get("state", {}).get("tokens")
        said = f", {tokens[0]}+{tokens[1]} tokens" if tokens else ""
        log(f"{scope['method'][:10]} {path[:_SHOWN]} {status} {seconds:.3f} s{said}")
