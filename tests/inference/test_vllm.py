"""The same answers from a real vLLM: `make test-vllm`, where CHATBIND_VLLM names its environment.

CHATBIND_VLLM=/path/to/venv make test-vllm
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
import urllib.request
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from chatbind_cli.errors import EngineError
from chatbind_cli.inference.answerer import Answerer
from chatbind_cli.inference.front import load_front
from chatbind_cli.inference.generation_settings import GenerationSettings
from chatbind_cli.inference.loaded_model import load_model
from chatbind_cli.inference.questions import Question
from chatbind_cli.inference.remote_engine import RemoteEngine
from chatbind_cli.inference.stream import Stream
from chatbind_cli.media.medium import Medium
from chatbind_cli.model.loading import load_chatbind
from chatbind_cli.model.whole import language_model
from tests.inference.world import inbox_of, make_world, questions
from tests.model.tiny import save_chatbind

VLLM = os.environ.get("CHATBIND_VLLM", "")
START_S = 240
GREEDY = GenerationSettings(max_new_tokens=40)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(START_S + 120),
    pytest.mark.skipif(not VLLM, reason="CHATBIND_VLLM names no environment with vLLM"),
]


@pytest.fixture(scope="module")
def vllm_world(tmp_path_factory):
    """The tiny world with heads as wide as vLLM's kernels want them."""
    world = make_world(tmp_path_factory.mktemp("world"), head_dim=32)
    language_model(world.model, world.folder / "lm")
    return world


@pytest.fixture(scope="module", params=["--enable-prefix-caching", "--no-enable-prefix-caching"])
def url(vllm_world, request):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = vllm_world.folder
    words = ["-m", "vllm.entrypoints.openai.api_server", "--model", str(folder / "lm")]
    words += ["--dtype", "float32", "--max-model-len", "512", "--enforce-eager", request.param]
    # 0.32 on a CPU dies over a seed where a prompt is read in pieces, so none is
    words += ["--max-num-batched-tokens", "16384"]
    words += ["--enable-prompt-embeds", "--host", "127.0.0.1", "--port", str(port)]
    own = ("PYTHONPATH", "CUDA_VISIBLE_DEVICES")
    environment = {name: value for name, value in os.environ.items() if name not in own}
    environment |= {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with (folder / "vllm.log").open("wb") as log:
        server = subprocess.Popen(
            [f"{VLLM}/bin/python", *words],
            stdout=log,
            stderr=log,
            env=environment,
            start_new_session=True,
        )
    try:
        url = f"http://127.0.0.1:{port}/v1"
        wait_for(url, server, folder / "vllm.log")
        yield url
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def wait_for(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(START_S):
        try:
            urllib.request.urlopen(f"{url}/models", timeout=2).close()
            return
        except OSError:
            assert server.poll() is None, log.read_text()[-3000:]
            time.sleep(1)
    pytest.fail(f"vLLM did not start: {log.read_text()[-3000:]}")


@pytest.fixture(scope="module")
def local(vllm_world):
    loaded = load_model(vllm_world.model, encoders=[vllm_world.encoder], dtype="float32")
    return Answerer(loaded)


@pytest.fixture(scope="module")
def asked(local, vllm_world):
    def media(record):
        kinds = [kind for kind in ("image", "audio") if kind in record]
        return tuple(Medium(kind, vllm_world.media / record[kind]) for kind in kinds)

    return local.prepare(
        [Question(r["text"], media(r), id=r["question_id"]) for r in questions(24)]
    )


@pytest.fixture
def engine(url, vllm_world):
    front = load_front(vllm_world.model, encoders=[vllm_world.encoder], dtype="float32")
    with RemoteEngine(front, [url]) as engine:
        yield engine


def run(engine, asked, settings):
    return {question.id: outcome for question, outcome in engine.run(inbox_of(asked), settings)}


def test_answers_equal_the_local_ones(engine, local, asked):
    expected = {q.id: local.generate([q], GREEDY)[0] for q in asked}
    assert engine.longest_context == 512
    assert run(engine, asked, GREEDY) == expected
    assert run(engine, asked[::-1], GREEDY) == expected  # the prefix cache has all of them now
    stream = Stream(engine, asked[0], GREEDY)
    assert "".join(stream) == expected[0].text
    assert stream.result == expected[0]
    told = run(engine, asked[:4], replace(GREEDY, logprobs=True))
    for question in asked[:4]:
        here = local.generate([question], replace(GREEDY, logprobs=True))[0]
        assert told[question.id].tokens == here.tokens
        assert told[question.id].logprobs == pytest.approx(here.logprobs, abs=1e-3)
    stopped = replace(GREEDY, stop=("an", "s"))
    assert run(engine, asked, stopped) == {q.id: local.generate([q], stopped)[0] for q in asked}


def test_draws_can_be_repeated_and_no_media_token_is_drawn(engine, asked):
    settings = GenerationSettings(
        max_new_tokens=30, temperature=1.5, samples=3, top_k=400, min_p=1e-6, top_p=0.999
    )
    first = run(engine, asked, settings)
    assert run(engine, asked[3:5], settings) == {q.id: first[q.id] for q in asked[3:5]}
    assert all(len({s.text for s in answer.samples}) == 3 for answer in first.values())
    never = set(engine._never)
    body, _ = engine._request(asked[0], replace(settings, samples=64, temperature=2.0))
    answers = engine._submit(engine._replicas.ask(lambda r: r.answers(body))).result()
    assert not any(never & set(answer.ids) for answer in answers)


def test_another_model_is_told_from_it(url, vllm_world, tmp_path):
    bundle = load_chatbind(vllm_world.model, dtype=torch.float32)
    with torch.no_grad():
        bundle.model.language_model.model.layers[1].mlp.down_proj.weight.mul_(0.8)
    save_chatbind(bundle, tmp_path / "model")
    language_model(tmp_path / "model", tmp_path / "lm")
    with pytest.raises(EngineError, match="serves another model"):
        RemoteEngine(load_front(tmp_path / "model"), [url])
