from __future__ import annotations

import asyncio
import gzip
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from chatbind_cli.errors import MediaError
from chatbind_cli.media import fetch
from chatbind_cli.media.source import open_source


class Handler(BaseHTTPRequestHandler):
    """What each path does is its name."""

    def do_GET(self) -> None:
        name = self.path.split("?")[0].strip("/")
        target = {
            "to-file": "file:///etc/passwd",
            "to-ftp": "ftp://127.0.0.1/x",
            "to-ok": "/ok",
            "loop": "/loop",
            "to-no-port": "http://127.0.0.1:99999/x",
            "to-half-an-address": "http://[::1",
            "to-half-a-host": "http://[",
        }.get(name)
        if target is not None:
            self.send_response(302)
            self.send_header("Location", target)
            self.end_headers()
        elif name == "missing":
            self.send_error(404)
        elif name == "silent":
            time.sleep(0.8)
        else:
            getattr(self, "body_" + name)()

    def start(self, length: int | None, **headers: str) -> None:
        self.send_response(200)
        if length is not None:
            self.send_header("Content-Length", str(length))
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()

    def body_ok(self) -> None:
        self.start(5)
        self.wfile.write(b"hello")

    def body_agent(self) -> None:
        agent = self.headers["User-Agent"].encode() + self.headers["Accept-Encoding"].encode()
        self.start(len(agent))
        self.wfile.write(agent)

    def body_empty(self) -> None:
        self.start(0)

    def body_announced(self) -> None:
        self.start(10**12)

    def body_endless(self) -> None:
        self.start(None)
        for _ in range(1000):
            self.wfile.write(bytes(10_000))

    def body_drip(self) -> None:
        self.start(1000)
        for _ in range(20):
            self.wfile.write(b"x")
            self.wfile.flush()
            time.sleep(0.1)

    def body_cut(self) -> None:
        self.start(1000)
        self.wfile.write(b"only this")

    def body_bomb(self) -> None:
        packed = gzip.compress(bytes(10_000_000))
        self.start(len(packed), Content_Encoding="gzip")
        self.wfile.write(packed)

    def handle(self) -> None:
        with suppress(BrokenPipeError, ConnectionResetError):  # the client hangs up, as it should
            super().handle()

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    thread = threading.Thread(target=http.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{http.server_port}"
    http.shutdown()
    thread.join()
    http.server_close()


@pytest.fixture(autouse=True)
def _little_patience_and_no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "CONNECT_SECONDS", 1.0)
    monkeypatch.setattr(fetch, "SILENCE_SECONDS", 0.4)
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


LIMITS = fetch.Limits(100_000, 1.0)


def test_a_url_is_fetched_and_keeps_its_name(server: str) -> None:
    source = open_source(f"{server}/to-ok")
    assert source.data == b"hello" and source.ref == f"{server}/to-ok"


def test_requests_say_who_asks_and_want_no_compression(server: str) -> None:
    data = open_source(f"{server}/agent").data
    assert data is not None and data.startswith(b"chatbind/") and data.endswith(b"identity")


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("to-file", "redirects to file:///etc/passwd; only http"),
        ("to-ftp", "redirects to ftp://127.0.0.1/x"),
        ("loop", "redirects more than 5 times"),
        ("missing", "answers 404 Not Found"),
        ("silent", "does not answer in time"),
        ("empty", "is empty"),
        ("announced", "is larger than"),
        ("endless", "is larger than"),
        ("drip", "was not complete after 1 s"),
        ("cut", "cannot be fetched"),
        ("bomb", "compressed as 'gzip'"),
        ("to-no-port", "Invalid port: 99999"),
        ("to-half-an-address", "cannot be fetched"),
        ("to-half-a-host", "cannot be fetched"),
    ],
)
def test_a_bad_server_gives_one_line_soon(server: str, name: str, what: str) -> None:
    began = time.monotonic()
    with pytest.raises(MediaError, match=what) as caught:
        open_source(f"{server}/{name}", limits=LIMITS)
    assert time.monotonic() - began < 3
    assert "\n" not in str(caught.value) and name in str(caught.value)


def test_a_closed_port_is_one_line() -> None:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with pytest.raises(MediaError, match="cannot be fetched"):
        open_source(f"http://127.0.0.1:{port}/x")


@pytest.mark.parametrize(
    "url",
    ["http://", "http://[::1", "http://a b/", "https://\u2603.\0/", "http://127.0.0.1:99999/"],
)
def test_a_broken_url_is_one_line(url: str) -> None:
    with pytest.raises(MediaError):
        open_source(url)


def test_fetching_works_inside_a_running_event_loop(server: str) -> None:
    async def notebook() -> bytes | None:
        return open_source(f"{server}/ok").data

    assert asyncio.run(notebook()) == b"hello"


@pytest.mark.parametrize(
    "target",
    ["http://127.0.0.1/", "http://169.254.169.254/meta", "http://localhost:80/", "http://[::1]/"],
)
def test_the_open_network_cannot_send_us_into_a_private_one(target: str) -> None:
    with pytest.raises(MediaError, match="private address"):
        fetch.next_address("http://example.org/a", target, "http://example.org/a")
    assert fetch.next_address("http://10.0.0.1/a", target, "x") == target


def test_relative_redirects_are_followed() -> None:
    assert fetch.next_address("https://a.org/b/c", "../d", "x") == "https://a.org/d"
