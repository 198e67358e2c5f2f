"""The same figures from a real lmms-eval: `make test-harness`.

CHATBIND_HARNESS names its virtual environment, see docs/harnesses.md.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from statistics import mean

import pytest

from chatbind_cli.harness import TASKS

HARNESS = Path(os.environ.get("CHATBIND_HARNESS", "")).absolute()
MODALITIES = ("depth", "thermal", "imu", "image")
START_S = 120

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(
        "CHATBIND_HARNESS" not in os.environ,
        reason="CHATBIND_HARNESS names no environment with lmms-eval",
    ),
]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    own = {"HF_HOME": str(folder), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    own |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "200"}
    # the program that stands beside lmms-eval, not the one of these tests
    return {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | own


@pytest.fixture(scope="module")
def toy(tmp_path_factory, home):
    """A toy world whose models have learned something; two minutes."""
    folder = tmp_path_factory.mktemp("toy")
    chatbind(home, folder, "toy", ".")
    return folder


@pytest.fixture(scope="module")
def right(toy, home):
    """Which answers are right, by modality, as `vqa` and `review` find it."""
    found = {}
    for modality in (*MODALITIES, "audio"):
        questions, answers = f"eval/questions-{modality}.jsonl", f"answers-{modality}.jsonl"
        asked = ["-m", "model", "-q", questions, "--media-root", "media"]
        chatbind(home, toy, "vqa", *asked, "--max-new-tokens", "64", "-o", answers)
        pair = [f"eval/answers-reference-{modality}.jsonl", answers]
        judged = ["--question", questions, "--judge", "rule", "--answer-list", *pair]
        reviews = chatbind(home, toy, "review", *judged)
        found[modality] = [json.loads(line)["tuple"][1] == 10 for line in reviews.splitlines()]
    assert all(mean(each) > 0.9 for each in found.values())
    return found


def chatbind(home, folder, *words):
    words = [sys.executable, "-m", "chatbind_cli", *words]
    environment = {**home, "PYTHONPATH": os.environ.get("PYTHONPATH", "")}
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def evaluate(home, folder, model_args, *words, model="chatbind", tasks, launcher=()):
    """The figures that lmms-eval writes for tasks, and what it says."""
    line = [*(launcher or [HARNESS / "bin" / "lmms-eval"]), "--include_path", TASKS]
    line += ["--model", model, "--model_args", model_args, "--tasks", ",".join(tasks)]
    line += ["--output_path", folder / "results", "--log_samples", *words]
    done = subprocess.run(
        list(map(str, line)), cwd=folder, env=home, text=True, stdout=-1, stderr=subprocess.STDOUT
    )
    print(done.stdout[-3000:])
    [table] = (folder / "results").rglob("*_results.json")
    figures = json.loads(table.read_text())["results"]
    table.unlink()
    return {name: figures[name]["accuracy,none"] for name in tasks}, done.stdout


def test_its_own_tasks_give_the_figures_of_vqa_and_review(toy, home, right):
    wanted = {f"chatbind_{modality}": mean(right[modality]) for modality in MODALITIES}
    figures, _ = evaluate(home, toy, "pretrained=model", "--batch_size", "16", tasks=[*wanted])
    assert figures == pytest.approx(wanted)


def test_several_processes_share_the_work(toy, home, right):
    launcher = [HARNESS / "bin" / "accelerate", "launch", "--cpu", "--num_processes", "2"]
    launcher += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    launcher += ["-m", "lmms_eval"]
    figures, _ = evaluate(home, toy, "pretrained=model", tasks=["chatbind_imu"], launcher=launcher)
    assert figures == pytest.approx({"chatbind_imu": mean(right["imu"])})


def test_a_broken_medium_is_one_wrong_answer(toy, home, tmp_path, right):
    lines = (toy / "eval" / "questions-depth.jsonl").read_text().splitlines()[:8]
    lines[2] = re.sub(r"depth/[^\"]*", "depth/nowhere.png", lines[2])
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "questions-depth.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "media").symlink_to(toy / "media")
    figures, said = evaluate(
        home, tmp_path, f"pretrained={toy / 'model'}", tasks=["chatbind_depth"]
    )
    assert right["depth"][2]
    assert figures == pytest.approx({"chatbind_depth": (sum(right["depth"][:8]) - 1) / 8})
    assert "chatbind_depth/test/2: " in said
    assert "1 of 8 questions failed" in said


OWN_TASK = """\
task: own
include: {tasks}/_digits.yaml
dataset_kwargs: {{data_files: {{test: {toy}/eval/questions-{modality}.jsonl}}}}
doc_to_messages: !function own.messages
"""
OWN_CODE = """\
from PIL import Image
from scipy.io import wavfile


def messages(doc):
    if "image" in doc:
        part = {"type": "image", "url": Image.open(f"media/{doc['image']}")}
    else:
        rate, wave = wavfile.read(f"media/{doc['audio']}")
        part = {"type": "audio", "url": {"array": wave / 32768, "sampling_rate": rate}}
    return [{"role": "user", "content": [{"type": "text", "text": doc["text"]}, part]}]
"""


@pytest.mark.parametrize("modality", ["image", "audio"])
def test_a_task_of_ones_own_with_media_in_memory(toy, home, tmp_path, modality, right):
    own = OWN_TASK.format(tasks=TASKS, toy=toy, modality=modality)
    (tmp_path / "own.yaml").write_text(own)
    (tmp_path / "own.py").write_text(OWN_CODE)
    figures, _ = evaluate(home, toy, "pretrained=model", "--include_path", tmp_path, tasks=["own"])
    assert figures["own"] == pytest.approx(mean(right[modality]))


@pytest.fixture
def address(toy, home):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [sys.executable, "-m", "chatbind_cli", "serve", "-m", "model", "--port", str(port)]
    environment = {**home, "PYTHONPATH": os.environ.get("PYTHONPATH", "")}
    with (toy / "serve.log").open("wb") as log:
        server = subprocess.Popen(words, cwd=toy, env=environment, stdout=log, stderr=log)
    try:
        wait_for(f"http://127.0.0.1:{port}/health", server, toy / "serve.log")
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.send_signal(signal.SIGTERM)
        assert server.wait(timeout=30) == 0


def wait_for(url, server, log):
    for _ in range(START_S):
        try:
            urllib.request.urlopen(url, timeout=2).close()
            return
        except OSError:
            assert server.poll() is None, log.read_text()[-3000:]
            time.sleep(1)
    pytest.fail(f"the server did not start: {log.read_text()[-3000:]}")


def test_async_openai_drives_the_server(toy, home, right, address):
    asked = f"model=model,base_url={address},api_key=none,num_cpus=16"
    figures, said = evaluate(home, toy, asked, model="async_openai", tasks=["chatbind_image"])
    assert figures == pytest.approx({"chatbind_image": mean(right["image"])})
    assert "LMMS_EVAL_REQUEST_FAILED" not in said
