"""Who may come in, what is told of the server, and errors that come before any question."""

from __future__ import annotations

import http.client
import json
import re
import sys
from contextlib import closing, suppress
from pathlib import Path

import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.serving.conftest import serving
from tests.waiting import wait_until

BODY = {"messages": [{"role": "user", "content": "What about the dog?"}]}


@pytest.fixture(scope="module")
def locked(answerer):
    with serving(answerer, key="open sesame") as server:
        yield server


@pytest.mark.parametrize("shown", [None, "Bearer wrong", "open sesame", "Bearer \xe9"])
def test_without_the_key_nothing_is_answered(locked, shown, capfd):
    headers = {} if shown is None else {"Authorization": shown.encode("latin-1")}
    for reply in (
        locked.post("/v1/chat/completions", json=BODY, headers=headers),
        locked.get("/v1/models", headers=headers),
        locked.get("/metrics", headers=headers),
        locked.get("/nowhere", headers=headers),
    ):
        assert reply.status_code == 401
        assert reply.json()["error"]["code"] == "invalid_api_key"
        assert "sesame" not in reply.text
    assert "sesame" not in capfd.readouterr().err


def test_with_the_key_it_is_as_without_one(locked, running):
    assert locked.client.models.list().data[0].id == "model"
    assert locked.get("/health").status_code == 200
    # no page has the key, so that names and origins tell nothing
    headers = {"Authorization": "Bearer open sesame", "Host": "x.example", "Origin": "http://y"}
    assert locked.get("/v1/models", headers=headers).status_code == 200
    with pytest.raises(openai.AuthenticationError):
        locked.client.with_options(api_key="other").models.list()


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "rebound.example"}, 403),
        ({"Host": "rebound.example:8000"}, 403),
        ({"Host": "127.0.0.1.rebound.example"}, 403),
        ({"Host": "[::1"}, 403),
        ({"Host": "localhost:8000"}, 200),
        ({"Host": "LOCALHOST"}, 200),
        ({"Host": "a.localhost."}, 200),
        ({"Host": "192.168.1.7:8000"}, 200),
        ({"Host": "[::1]:8000"}, 200),
        ({"Host": "localhost:8000", "Origin": "https://stranger.example"}, 403),
        ({"Host": "localhost:8000", "Origin": "null"}, 403),
        ({"Host": "localhost:8000", "Origin": "http://localhost:9000"}, 403),
        ({"Host": "localhost:8000", "Origin": "http://localhost:8000"}, 200),
    ],
)
def test_pages_of_strangers_have_no_server_on_localhost(running, headers, status):
    reply = running.get("/v1/models", headers=headers)
    assert reply.status_code == status
    assert not any(name.startswith("access-control") for name in reply.headers)
    if status == 403:
        assert "--api-key" in reply.json()["error"]["message"]


def test_models(running):
    assert [model.id for model in running.client.models.list()] == ["model"]
    assert running.client.models.retrieve("model").owned_by == "chatbind"
    with pytest.raises(openai.NotFoundError):
        running.client.models.retrieve("a/b")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/nowhere", 404), ("GET", "/v1/chat/completions", 405), ("POST", "/health", 405)],
)
def test_errors_have_openai_s_form_everywhere(running, method, path, status):
    reply = (running.get if method == "GET" else running.post)(path)
    assert reply.status_code == status
    assert set(reply.json()["error"]) == {"message", "type", "param", "code"}
    assert status != 405 or "allow" in reply.headers


def test_an_error_nobody_expected_tells_nothing_outside_and_a_line_inside(
    running, monkeypatch, capfd
):
    def broken(question):
        raise ZeroDivisionError("secret of the inside")

    monkeypatch.setattr(running.desk, "ask", broken)
    reply = running.post("/v1/chat/completions", json=BODY)
    assert reply.status_code == 500 and reply.json()["error"]["type"] == "server_error"
    assert "secret" not in reply.text
    told = capfd.readouterr().err
    assert "internal error: ZeroDivisionError: secret of the inside" in told
    assert "Traceback" not in told


def test_health(running):
    reply = running.get("/health")
    assert reply.json() == {"status": "ready", "waiting": 0, "under_way": 0}
    assert reply.status_code == 200


def numbers(server):
    text = server.get("/metrics").text
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_metrics_count_what_was_done(answerer):
    with serving(answerer) as server:
        usage = server.client.chat.completions.create(model="model", **BODY).usage
        list(server.client.chat.completions.create(model="model", **BODY, stream=True))
        server.get("/wp-admin")
        told = numbers(server)
    assert told["chatbind_requests_total", "/v1/chat/completions", "200"] == 2
    assert told["chatbind_requests_total", "other", "404"] == 1
    assert told["chatbind_prompt_tokens_total",] == 2 * usage.prompt_tokens
    assert told["chatbind_generated_tokens_total",] == 2 * usage.completion_tokens
    assert told["chatbind_time_to_first_token_seconds_count",] == 1
    assert told["chatbind_request_seconds_count", "/v1/chat/completions"] == 2
    assert told["chatbind_waiting",] == told["chatbind_under_way",] == 0
    assert told["chatbind_connections",] >= 1
    assert told["process_resident_memory_bytes",] > 0


def test_a_request_is_one_line_of_the_log(running, capfd, monkeypatch):
    usage = running.client.chat.completions.create(model="model", **BODY).usage
    running.get("/x%0ay%1b[31m" + "z" * 500)
    told = ""

    def both():
        nonlocal told
        told += capfd.readouterr().err
        return told.count("\n") == 2

    wait_until(both)
    asked, odd = told.splitlines()
    tokens = rf"{usage.prompt_tokens}\+{usage.completion_tokens} tokens"
    assert re.fullmatch(rf"chatbind: POST /v1/chat/completions 200 \d\.\d{{3}} s, {tokens}", asked)
    assert re.fullmatch(r"chatbind: GET /x y\[31mz{80,100} 404 \d\.\d{3} s", odd)
    monkeypatch.setenv("CHATBIND_QUIET", "1")
    running.get("/health")
    assert capfd.readouterr().err == ""


def test_a_log_on_a_full_disk_costs_nobody_an_answer(running, monkeypatch):
    full = Path("/dev/full")
    statuses = []
    with suppress(OSError), full.open("w", encoding="utf-8") as log, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", log)
        with closing(http.client.HTTPConnection(*running.address, timeout=60)) as line:
            for path in ("/v1/chat/completions", "/nowhere", "/v1/chat/completions"):
                line.request("POST", path, json.dumps(BODY))
                line.auto_open = 0  # on the one connection that there is
                reply = line.getresponse()
                statuses.append((reply.status, bool(reply.read())))
    assert statuses == [(200, True), (404, True), (200, True)]
