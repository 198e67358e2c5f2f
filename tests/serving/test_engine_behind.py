"""A server whose language model answers elsewhere, and goes."""

from __future__ import annotations

from contextlib import contextmanager

import pytest

from chatbind_cli.cli import run
from chatbind_cli.inference.answerer import Answerer
from chatbind_cli.inference.front import load_front
from chatbind_cli.inference.media_encoder import MediaEncoder
from chatbind_cli.inference.remote_engine import RemoteEngine
from chatbind_cli.model.whole import language_model
from chatbind_cli.serving import desk
from tests.inference.engine_server import EngineServer, Served
from tests.inference.world import make_world
from tests.serving.conftest import serving_from
from tests.waiting import wait_until

BODY = {"messages": [{"role": "user", "content": "What about the dog?"}]}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("with-engine"))


@pytest.fixture(scope="module")
def served(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("served") / "lm"
    language_model(world.model, folder)
    return Served(folder)


def test_an_engine_that_is_killed_is_told_and_looked_for_again(world, served, monkeypatch, capfd):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(desk, "_RETRY_S", 0.1)
    engines = [EngineServer(served)]
    front = load_front(world.model, device="cpu")
    encoder = MediaEncoder(front)

    @contextmanager
    def there():
        with RemoteEngine(front, [engines[-1].url], in_flight=4) as engine:
            yield Answerer(front, encoder, engine=engine, batch_size=4)

    def asked(**more):
        return running.post("/v1/chat/completions", json=BODY | more)

    with serving_from(there) as running:
        before = asked()
        assert before.status_code == 200
        # what the engine cannot do is the request's fault, and not the server's
        assert asked(repetition_penalty=1.2).status_code == 400
        engines[0].close()
        reply = asked()
        assert reply.status_code == 503 and int(reply.headers["retry-after"]) > 0
        assert reply.json()["error"]["type"] == "server_error"
        assert "127.0.0.1" not in reply.text, "where the engine is, is nobody's business"
        wait_until(lambda: running.get("/health").json()["status"] == "engine gone")
        assert running.get("/health").status_code == 503
        engines.append(EngineServer(served))
        wait_until(lambda: asked().status_code == 200)
        assert asked().json()["choices"] == before.json()["choices"]
        engines[1].close()
    assert "Traceback" not in capfd.readouterr().err


def test_an_engine_that_was_never_there_ends_the_server(world, served, capfd):
    words = ["-m", str(world.model), "--engine", "http://127.0.0.1:1/v1", "--device", "cpu"]
    code, message = run(["serve", *words, "--port", "0"])
    assert code == 1
    assert "127.0.0.1:1" in message and "\n" not in message
    assert capfd.readouterr().out == ""
