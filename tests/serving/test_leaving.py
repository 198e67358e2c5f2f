"""Clients that leave, read slowly, come in numbers or wait too long, and a server that ends."""

from __future__ import annotations

import json
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import httpx
import openai
import pytest

from chatbind_cli.inference.answerer import Answerer
from chatbind_cli.inference.loaded_model import load_model
from chatbind_cli.inference.media_encoder import MediaEncoder
from chatbind_cli.media.source import open_source
from tests.serving.conftest import serving
from tests.waiting import wait_until

LONG = 400  # tokens of an answer that is under way for a second
CHAT = "/v1/chat/completions"


class SlowDisk:
    """A disk on which one file is found only once somebody lets it."""

    def __init__(self, folder):
        self._folder = folder
        self.asked, self.found = threading.Event(), threading.Event()

    def open(self, ref):
        if ref == "slow.png":
            self.asked.set()
            assert self.found.wait(30)
            ref = "0.png"
        return open_source(self._folder / ref)


@pytest.fixture
def disk(world):
    disk = SlowDisk(world.media)
    yield disk
    disk.found.set()


@pytest.fixture
def slow(world, disk):
    """What answers, from that disk."""
    loaded = load_model(world.model, device="cpu")
    return Answerer(loaded, MediaEncoder(loaded, open_media=disk.open), readers=2)


def body(words="What about the dog?", medium=None, **more):
    parts = [{"type": "text", "text": words}]
    parts += [{"type": "media", "url": medium}] if medium else []
    return {"messages": [{"role": "user", "content": parts}], **more}


def request(**more):
    content = json.dumps(body(**more)).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}\r\n\r\n"
    return head.encode() + content


def idle(server):
    return server.desk.waiting + server.desk.under_way == 0


def test_who_leaves_while_waiting_waits_no_more(slow, disk):
    with serving(slow) as server:
        with closing(socket.create_connection(server.address)) as line:
            line.sendall(request(medium="slow.png"))
            assert disk.asked.wait(20)
            line.sendall(request())  # pipelined, it changes nothing
        wait_until(lambda: "499" in server.get("/metrics").text)
        disk.found.set()
        wait_until(lambda: idle(server))
        assert server.post(CHAT, json=body()).status_code == 200


@pytest.mark.parametrize("stream", [True, False])
def test_who_leaves_an_answer_under_way_takes_its_row_out_of_the_batch(running, reads, stream):
    with closing(socket.create_connection(running.address)) as line:
        line.sendall(request(max_tokens=LONG, stream=stream))
        wait_until(lambda: len(reads) > 5)
    begun = len(reads)
    wait_until(lambda: idle(running))
    assert len(reads) < begun + 200, "the answer was made to its end"


def test_a_slow_reader_keeps_nobody_waiting_and_is_dropped(answerer):
    with serving(answerer, stalled_s=0.5) as server, socket.socket() as line:
        # little room in the kernel, which would take megabytes for a reader that is about to come
        [listening] = server.server.servers[0].sockets
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        line.connect(server.address)
        line.sendall(request(max_tokens=LONG, n=4, temperature=1.0, stream=True))
        wait_until(lambda: server.desk.under_way)
        assert server.post(CHAT, json=body()).status_code == 200
        wait_until(lambda: idle(server) and not server.server.connections)


def test_an_answer_that_takes_too_long_is_a_504(slow, disk):
    with serving(slow, request_s=0.3) as server:
        for stream in (False, True):
            reply = server.post(CHAT, json=body(medium="slow.png", stream=stream))
            assert reply.status_code == 504
            assert reply.json()["error"]["type"] == "server_error"
        disk.found.set()


def test_a_stream_that_takes_too_long_ends_with_the_error(answerer):
    with serving(answerer, request_s=0.2) as server:
        asked = {"model": "model", "max_tokens": LONG, "stream": True}
        stream = server.client.chat.completions.create(messages=body()["messages"], **asked)
        with pytest.raises(openai.APIError, match="longer than this server allows"):
            list(stream)
        reply = server.post(CHAT, json=body(max_tokens=LONG, stream=True))
        assert "[DONE]" not in reply.text
        wait_until(lambda: idle(server))


def test_who_comes_when_all_places_are_taken_may_come_again(slow, disk, monkeypatch):
    monkeypatch.setattr("chatbind_cli.serving.desk._RETRY_S", 1)
    with serving(slow, waiting=3) as server, ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(server.post, CHAT, json=body(medium="slow.png")) for _ in range(3)]
        wait_until(lambda: server.desk.waiting == 3)
        reply = server.post(CHAT, json=body())
        assert reply.status_code == 429 and int(reply.headers["retry-after"]) > 0
        assert reply.json()["error"]["type"] == "rate_limit_error"
        # OpenAI's client does as it is told
        patient = server.client.with_options(max_retries=3).chat.completions
        later = pool.submit(patient.create, model="model", messages=body()["messages"])
        disk.found.set()
        assert later.result().choices[0].message.content
        assert [one.result().status_code for one in waiting] == [200] * 3


def test_a_server_that_ends_finishes_what_it_has_and_takes_nothing_new(slow, disk):
    with serving(slow, grace_s=20) as server, ThreadPoolExecutor(2) as pool:
        whole = pool.submit(server.post, CHAT, json=body(medium="slow.png"))
        assert disk.asked.wait(20)
        server.loop.call_soon_threadsafe(server.server.stop, 15)
        wait_until(lambda: server.get("/health").status_code == 503)
        assert server.get("/health").json()["status"] == "draining"
        reply = server.post(CHAT, json=body())
        assert reply.status_code == 503 and "about to end" in reply.json()["error"]["message"]
        disk.found.set()
        assert whole.result().status_code == 200
        with pytest.raises(httpx.TransportError):  # refused, or shut while it waited to be let in
            wait_until(lambda: server.get("/health") is None)


def test_a_server_that_ends_waits_no_longer_than_it_is_given(slow, disk):
    with serving(slow, grace_s=0.3) as server, ThreadPoolExecutor(1) as pool:
        whole = pool.submit(server.post, CHAT, json=body(medium="slow.png"))
        assert disk.asked.wait(20)
        server.loop.call_soon_threadsafe(server.server.stop, 15)
        reply = whole.result()
        assert reply.status_code == 503
        disk.found.set()
