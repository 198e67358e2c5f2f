"""`chatbind serve` as a program: where it is, how it ends, what it refuses."""

from __future__ import annotations

import json
import signal
import socket
from contextlib import contextmanager

import httpx
import openai
import pytest

from chatbind_cli.cli import run
from tests.inference.world import start

MESSAGES = [{"role": "user", "content": "What about the dog?"}]


@contextmanager
def served(world, *words, **env):
    """The program, and the address that its first line of output says."""
    process = start("serve", "-m", world.model, "--port", "0", *words, env=env)
    try:
        first = process.stdout.readline()
        yield process, json.loads(first)["serving"] if first else None
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def long(world):
    """Words of an answer that is under way for a while."""
    return {"model": "model", "messages": MESSAGES, "max_tokens": 450, "stream": True}


@pytest.mark.parametrize(
    ("number", "code", "host"), [(signal.SIGTERM, 0, "127.0.0.1"), (signal.SIGINT, 130, "0.0.0.0")]
)
def test_a_signal_in_the_middle_lets_answers_finish(world, long, number, code, host):
    environment = {"CHATBIND_SERVE_MAX_NEW_TOKENS": "5"}
    if code == 0:
        environment["CHATBIND_SERVE_API_KEY"] = "sesame"
    with served(world, "--host", host, **environment) as (process, url):
        with openai.OpenAI(base_url=url, api_key="sesame", max_retries=0) as client:
            reply = client.chat.completions.create(model="model", messages=MESSAGES)
            assert reply.usage.completion_tokens == 5
            with client.chat.completions.create(**long) as stream:
                chunks = [next(stream)]
                process.send_signal(number)
                chunks += list(stream)
        assert chunks[-1].choices[0].finish_reason in ("stop", "length")
        assert process.wait(20) == code
        said = process.stderr.read().decode()
        assert "stopping: 1 answers" in said and "Traceback" not in said
        assert ("interrupted" in said) == (code == 130)
        assert ("--api-key asks for a key" in said) == (host == "0.0.0.0")
        assert "sesame" not in said


def test_a_second_signal_ends_it_at_once(world, long):
    with served(world) as (process, url), httpx.Client(timeout=20) as client:
        body = long | {"n": 64, "temperature": 1.0}
        asked = client.stream("POST", f"{url}/chat/completions", json=body)
        with pytest.raises(httpx.TransportError), asked as reply:
            lines = reply.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            assert b"stopping" in process.stderr.readline()
            process.send_signal(signal.SIGTERM)
            list(lines)
        assert process.wait(5) == 128 + signal.SIGTERM
        assert process.stderr.read() == b""


def test_a_port_that_is_taken_is_told_before_the_model_is_loaded(world):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, message = run(["serve", "-m", str(world.folder / "nothing"), "--port", str(port)])
    assert code == 1
    assert "\n" not in message and f"127.0.0.1:{port}: cannot listen" in message


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--api-key", ""], "--api-key"),
        (["--api-key", "cl\xe9"], "--api-key"),
        (["--max-body", "0"], "--max-body"),
        (["--host", "no.such.host.invalid"], "cannot listen"),
        (["-m", "nothing"], "nothing"),
    ],
)
def test_what_cannot_be_served_is_one_line(world, words, says):
    code, message = run(["serve", "-m", str(world.model), "--port", "0", *words])
    assert code in (1, 2) and says in message and "Traceback" not in message
