"""Bodies that are too long, too slow or broken, and connections that hang."""

from __future__ import annotations

import http.client
import json
import random
import socket
import threading
import time
from contextlib import closing

import httpx
import pytest

from chatbind_cli.serving import incoming
from tests.serving.conftest import serving
from tests.waiting import wait_until

BODY = {"messages": [{"role": "user", "content": "What about the dog?"}], "max_tokens": 2}
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def strict(answerer):
    """A server that is short of everything."""
    limits = {"body_bytes": 1 << 20, "bodies": 2, "body_s": 0.3, "idle_s": 0.3, "stalled_s": 1.0}
    with serving(answerer, **limits) as server:
        yield server


def send(server, *parts, wait=0.0):
    """What a server says to bytes that come in parts; all of it until it hangs up."""
    with closing(socket.create_connection(server.address, timeout=20)) as line:
        for number, part in enumerate(parts):
            if number:
                time.sleep(wait)
            try:
                line.sendall(part)
            except ConnectionError:
                break
        said = b""
        try:
            while part := line.recv(1 << 16):
                said += part
        except ConnectionError:
            pass
        return said


def head(**headers):
    lines = [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([f"POST {CHAT} HTTP/1.1", "Host: localhost", *lines, "", ""]).encode()


def test_a_body_may_come_in_pieces_of_unknown_number(running):
    parts = (part.encode() for part in (json.dumps(BODY)[:20], json.dumps(BODY)[20:]))
    assert running.post(CHAT, content=parts).status_code == 200


@pytest.mark.parametrize("way", ["said", "chunked"])
def test_a_body_that_is_too_long_is_a_413(strict, way):
    long = json.dumps({**BODY, "user": "x" * (5 << 20)}).encode()
    content = (
        long if way == "said" else (long[at : at + 65536] for at in range(0, len(long), 65536))
    )
    reply = strict.post(CHAT, content=content)
    assert reply.status_code == 413
    assert "1 MiB" in reply.json()["error"]["message"]
    assert strict.post(CHAT, json=BODY).status_code == 200


def test_a_body_of_too_many_values_is_not_even_parsed(running):
    # an empty object takes 22 times the memory of its text
    reply = running.post(CHAT, content=b'{"metadata": [' + b"{}," * 1_000_000 + b"1]}")
    assert reply.status_code == 413 and "1,000,000 values" in reply.json()["error"]["message"]


def test_who_asks_first_need_not_send_it(strict):
    begun = time.monotonic()
    said = send(strict, head(Content_Length=1 << 30, Expect="100-continue"))
    assert b" 413 " in said and b"100 Continue" not in said
    assert time.monotonic() - begun < 2


def test_a_body_without_end_is_cut_off(strict, monkeypatch):
    monkeypatch.setattr(incoming, "_MOST_DRAINED_S", 0.3)
    with closing(socket.create_connection(strict.address, timeout=20)) as line:
        line.sendall(head(Transfer_Encoding="chunked"))
        chunk = b"10000\r\n" + b"x" * 65536 + b"\r\n"
        begun, sent = time.monotonic(), 0
        with pytest.raises(OSError):
            while time.monotonic() - begun < 15:
                line.sendall(chunk)
                sent += 65536
        assert time.monotonic() - begun < 10


def test_a_slow_body_is_a_408(strict):
    said = send(strict, head(Content_Length=100), *[b"{"] * 20, wait=0.05)
    assert b" 408 " in said and b"too slowly" in said


def test_a_body_shorter_than_it_says_is_a_408_and_leaves_nothing(strict):
    said = send(strict, head(Content_Length=1000) + json.dumps(BODY).encode())
    assert b" 408 " in said


def test_slow_heads_and_idle_connections_are_dropped(strict):
    assert send(strict) == b""
    assert send(strict, *(bytes([c]) for c in head()[:40]), wait=0.05) == b""
    # a byte of the next head does not buy another while
    with closing(socket.create_connection(strict.address, timeout=20)) as line:
        line.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert b" 200 " in line.recv(1 << 16)
        for _ in range(60):
            time.sleep(0.05)
            try:
                line.sendall(b"G")
            except ConnectionError:
                break
        else:
            pytest.fail("it may sit there for ever")


def test_a_client_that_asks_on_and_on_is_not_dropped(strict):
    with closing(http.client.HTTPConnection(*strict.address, timeout=20)) as line:
        for _ in range(10):
            line.request("GET", "/health")
            line.auto_open = 0  # on the one connection that there is
            assert line.getresponse().read()
            time.sleep(0.1)


def test_what_is_no_http_is_told_so(running, capfd):
    said = send(running, b"\x16\x03\x01\x02\x00 hello\r\n\r\n")
    assert b" 400 " in said and json.loads(said.partition(b"\r\n\r\n")[2])["error"]
    assert b" 400 " in send(running, b"GET /" + b"x" * 100_000 + b" HTTP/1.1\r\n\r\n")
    asked = head(Content_Length=len(json.dumps(BODY))) + json.dumps(BODY).encode()
    send(running, asked + b"\x00garbage\r\n\r\n")
    assert "Traceback" not in capfd.readouterr().err


def test_bodies_together_have_bounded_room(strict):
    long = head(Content_Length=1 << 20) + b'{"user": "' + b"x" * ((1 << 20) - 50)
    body = {**BODY, "user": "x" * 100}
    lines = [socket.create_connection(strict.address) for _ in range(2)]
    try:
        for line in lines:
            line.sendall(long)
        wait_until(lambda: strict.post(CHAT, json=body).status_code == 429)
        assert int(strict.post(CHAT, json=body).headers["retry-after"]) > 0
    finally:
        for line in lines:
            line.close()
    wait_until(lambda: strict.post(CHAT, json=body).status_code == 200)


def test_too_many_connections(answerer):
    with serving(answerer, connections=3) as server:
        lines = [socket.create_connection(server.address) for _ in range(3)]
        wait_until(lambda: server.server.connections == 3)
        reply = server.get("/health")
        assert reply.status_code == 503 and "too many" in reply.json()["error"]["message"]
        for line in lines:
            line.close()
        wait_until(lambda: server.get("/health").status_code == 200)


def broken_bodies(count):
    """Bodies that are wrong in a thousand ways, drawn from a seed."""
    drawn = random.Random(0)
    whole = {**BODY, "temperature": 1.0, "stop": ["x"], "stream": True, "model": "model"}
    whole["messages"] = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": [{"type": "text", "text": "q"}]},
    ]
    odd = [
        None,
        0,
        -1,
        1e308,
        10**400,
        "",
        "\ud800",
        [],
        {},
        [[]],
        True,
        "x" * 2000,
        [None],
        {"a": 1},
    ]

    def spoil(value):
        if isinstance(value, dict) and value and drawn.random() < 0.8:
            key = drawn.choice(list(value))
            return {**value, key: spoil(value[key])}
        if isinstance(value, list) and value and drawn.random() < 0.8:
            at = drawn.randrange(len(value))
            return [*value[:at], spoil(value[at]), *value[at + 1 :]]
        return drawn.choice(odd)

    fixed = [b"", b"[]", b"null", b"{", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 5000, b"1" * 10_000]
    yield from fixed
    for number in range(count - len(fixed)):
        text = json.dumps(spoil(whole)).encode()
        if number % 4 == 0:
            at = drawn.randrange(len(text))
            text = text[:at] + bytes([drawn.randrange(256)]) + text[at + drawn.randrange(3) :]
        yield text


def test_a_thousand_broken_requests_leave_the_server_as_it_was(running, capfd):
    statuses = set()
    with httpx.Client(base_url=running.url, timeout=60) as client:
        for body in broken_bodies(1000):
            path = "/v1/embeddings" if len(body) % 5 == 0 else CHAT
            reply = client.post(path, content=body)
            statuses.add(reply.status_code)
            if reply.status_code != 200:
                assert "\n" not in reply.json()["error"]["message"], body
    assert statuses <= {200, 400, 404} and 400 in statuses, statuses
    told = capfd.readouterr().err
    assert "Traceback" not in told and "internal" not in told
    assert running.get("/health").json() == {"status": "ready", "waiting": 0, "under_way": 0}
    assert threading.active_count() < 40
