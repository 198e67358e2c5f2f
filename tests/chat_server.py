"""A chat server on this machine that misbehaves on request."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

Answer = Callable[[dict[str, Any]], str]


class JudgeServer:
    """An OpenAI-compatible endpoint.

    `faults` are used up first, one a request: a status (429), (status, headers, body), a number
    of seconds to sleep ("slow", 3), "reset", "cut", "garbage", "text", "no choices", a function of
    the request's handler, or a string that is the reply's text. After them `draw`, if it is set,
    gives each request's fault (None for none), and every other reply is what `answer` makes of the
    request, billed as `usage` says.
    """

    def __init__(self, handler: type[BaseHTTPRequestHandler] | None = None) -> None:
        self.faults: deque[Any] = deque()
        self.draw: Callable[[], Any] | None = None
        self.answer: Answer = lambda request: "8 6\nfine"
        self.usage: Callable[[dict[str, Any]], tuple[int, int]] = lambda request: (100, 10)
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.times: list[float] = []
        self.most_at_a_time = 0
        self._now = 0
        self.lock = threading.Lock()
        self._http = _Server(("127.0.0.1", 0), type("Own", (handler or Handler,), {"judge": self}))
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}/v1"
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    def next_fault(self, request: dict[str, Any], headers: dict[str, str]) -> Any:
        with self.lock:
            self.requests.append(request)
            self.headers.append(headers)
            self.times.append(time.monotonic())
            if self.faults:
                return self.faults.popleft()
            return self.draw() if self.draw is not None else None

    def enter(self, step: int) -> None:
        with self.lock:
            self._now += step
            self.most_at_a_time = max(self.most_at_a_time, self._now)

    def completion(self, request: dict[str, Any], text: str) -> dict[str, Any]:
        prompt, completion = self.usage(request)
        return {
            "id": "chatcmpl-1",
            "object": "chat.completion",
            "created": 1700000000,
            "model": f"{request['model']}-0314",
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": text},
                    "finish_reason": "stop",
                }
            ],
            "usage": {
                "prompt_tokens": prompt,
                "completion_tokens": completion,
                "total_tokens": prompt + completion,
            },
        }


class _Server(ThreadingHTTPServer):
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, ConnectionError):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    judge: JudgeServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path != "/v1/chat/completions":
            self.send(404, json.dumps({"error": {"message": f"no {self.path}"}}))
            return
        request = json.loads(body)
        self.judge.enter(1)
        try:
            headers = {name.lower(): value for name, value in self.headers.items()}
            self._reply(request, self.judge.next_fault(request, headers))
        finally:
            self.judge.enter(-1)

    def _reply(self, request: dict[str, Any], fault: Any) -> None:
        if isinstance(fault, tuple) and fault[0] == "slow":
            time.sleep(fault[1])
            fault = None
        if isinstance(fault, int):
            fault = (fault, {}, json.dumps({"error": {"message": f"status {fault}"}}))
        if callable(fault):
            self.close_connection = True
            with suppress(ConnectionError):
                fault(self)
        elif isinstance(fault, tuple):
            self.send(fault[0], fault[2], fault[1])
        elif fault == "reset":
            self.close_connection = True
        elif fault == "cut":
            text = json.dumps(self.judge.completion(request, "8 6"))
            self.send(200, text[: len(text) // 2], {"Content-Length": str(len(text))})
            self.close_connection = True
        elif fault == "garbage":
            self.send(200, '{"choices": [{"mess')
        elif fault == "text":
            self.send(200, "<html>proxy login</html>", {"Content-Type": "text/html"})
        elif fault == "no choices":
            self.send(200, json.dumps({**self.judge.completion(request, ""), "choices": []}))
        else:
            text = fault if isinstance(fault, str) else self.judge.answer(request)
            self.send(200, json.dumps(self.judge.completion(request, text)))

    def send(self, status: int, body: str | bytes, headers: dict[str, str] | None = None) -> None:
        data = body if isinstance(body, bytes) else body.encode()
        wanted = {"Content-Type": "application/json", "Content-Length": str(len(data))}
        wanted.update(headers or {})
        self.send_response(status)
        for name, value in wanted.items():
            self.send_header(name, value)
        try:
            self.end_headers()
            self.wfile.write(data)
        except ConnectionError:
            self.close_connection = True  # whoever asked has gone (a time-out, a kill)


@pytest.fixture
def judge_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[JudgeServer]:
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    monkeypatch.setenv("CHATBIND_REVIEW_CACHE", "off")  # what tests count are requests
    server = JudgeServer()
    yield server
    server.close()


@pytest.fixture
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client's own pauses before another attempt, fifty times shorter."""
    import openai._base_client

    monkeypatch.setattr(openai._base_client, "INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.setattr(openai._base_client, "MAX_RETRY_DELAY", 0.16)
