"""A hosted model that answers from captions and boxes: the real program, a server over HTTP."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.inference.world import read_jsonl, write_jsonl
from tests.program import chatbind

CONTEXT = {
    "image": "dog.jpg",
    "captions": ["A dog.", "A brown dog on grass."],
    "instances": [{"category": "dog", "bbox": [0.1, 0.2, 0.5, 0.9]}],
}
QUESTIONS: list[dict[str, Any]] = [
    {"question_id": 1, "text": "What is it?", "image": "dog.jpg", "category": "conv"},
    {"question_id": 2, "text": "What is that sound?", "audio": "bark.wav"},
    {"question_id": 3, "text": "What is 1 + 1?"},
    {"question_id": 4, "text": "And this?", "image": "cat.jpg"},
]


@pytest.fixture
def folder(tmp_path: Path, judge_server: Any, quick_retries: None) -> Path:
    """Questions, what is known of two of the media, and a price of 1 USD a thousand tokens."""
    write_jsonl(tmp_path / "q.jsonl", QUESTIONS)
    write_jsonl(tmp_path / "ctx.jsonl", [CONTEXT, {"audio": "bark.wav", "captions": ["A bark."]}])
    (tmp_path / "p.toml").write_text("[m]\ninput = 1000\noutput = 1000\n")
    judge_server.answer = lambda request: f"said: {request['messages'][-1]['content'][-60:]}"
    return tmp_path


def words(server: Any, *more: object) -> list[str]:
    line = ["vqa", "--answerer", "openai", "--answerer-model", "m", "--answerer-url", server.url]
    return [*line, *map(str, more)]


def answer(folder: Path, server: Any, *more: object, **how: Any) -> Any:
    more = ("--context", "ctx.jsonl", "-q", "q.jsonl", *more)
    return chatbind(*words(server, *more), cwd=folder, **how)


def test_questions_are_answered_in_order_from_what_is_known_of_their_media(
    folder: Path, judge_server: Any
) -> None:
    done = answer(folder, judge_server, "-o", "a.jsonl", "--prices", "p.toml")
    assert done.returncode == 3
    assert "1 of 4 questions failed" in done.stderr
    first, _, _, fourth = read_jsonl(folder / "a.jsonl")
    assert [first["question_id"], first["category"], first["image"]] == [1, "conv", "dog.jpg"]
    assert first["prompt"] == "What is it?"
    assert first["model_id"] == "m"
    assert first["text"].endswith("What is it?\n[image 1]")
    metadata = first["metadata"]
    assert metadata["model"] == "m-0314"
    assert metadata["prompt_tokens"] == 100
    assert metadata["n_tokens"] == metadata["completion_tokens"] == 10
    assert metadata["cost_usd"] == pytest.approx(0.11)
    assert [metadata["temperature"], metadata["max_new_tokens"]] == [0.0, 512]
    assert fourth["error"].endswith("q.jsonl:4: no context for image cat.jpg")
    assert fourth["text"] == ""

    sent = {request["messages"][-1]["content"]: request for request in judge_server.requests}
    image = (
        "[image 1]\nA dog.\nA brown dog on grass.\n\ndog: [0.1, 0.2, 0.5, 0.9]\n\n"
        "What is it?\n[image 1]"
    )
    audio = "[audio 1]\nA bark.\n\nWhat is that sound?\n[audio 1]"
    assert set(sent) == {image, audio, "What is 1 + 1?"}
    assert [m["role"] for m in sent[image]["messages"]] == ["system", "user"]
    assert [m["role"] for m in sent["What is 1 + 1?"]["messages"]] == ["user"]
    assert sent[image]["temperature"] == 0
    assert "seed" not in sent[image]


def test_dialogues_and_settings_of_a_record_are_kept(folder: Path, judge_server: Any) -> None:
    said = [
        {"from": "human", "value": "<image>\nWhat is it?"},
        {"from": "gpt", "value": "A dog."},
    ]
    question = {"question_id": 1, "text": "Is <audio> its voice?", "conversations": said}
    question |= {"image": "dog.jpg", "audio": "bark.wav", "system": "Be brief."}
    question["generation"] = {"temperature": 0.5, "seed": 7, "stop": ["."]}
    odd = {"question_id": 2, "text": "?", "generation": {"top_k": 3}}
    mixed = {"question_id": 3, "text": "?", "image": "dog.jpg", "weights": 0.5}
    write_jsonl(folder / "q.jsonl", [question, odd, mixed])
    done = answer(folder, judge_server)
    assert done.returncode == 3
    first, second, third = map(json.loads, done.stdout.splitlines())
    assert "no top_k" in second["error"]
    assert "weights" in third["error"]
    assert first["metadata"]["generation"] == question["generation"]
    (sent,) = judge_server.requests
    assert [m["role"] for m in sent["messages"]] == ["system", "user", "assistant", "user"]
    assert sent["messages"][0]["content"] == "Be brief."
    assert sent["messages"][1]["content"].endswith("0.9]\n\n[image 1]\nWhat is it?")
    assert sent["messages"][3]["content"] == "[audio 2]\nA bark.\n\nIs [audio 2] its voice?"
    assert [sent[name] for name in ("temperature", "seed", "stop", "top_p")] == [0.5, 7, ["."], 1.0]


def test_a_stream_comes_out_in_its_order_and_a_slow_one_waits_for_nobody(
    folder: Path, judge_server: Any
) -> None:
    def slow(request: dict[str, Any]) -> str:
        number = int(re.findall(r"\d+", request["messages"][0]["content"])[0])
        time.sleep(0.2 if number % 4 == 0 else 0.0)
        return str(number)

    judge_server.answer = slow
    lines = [json.dumps({"question_id": i, "text": f"{i}?"}) for i in range(24)]
    done = chatbind(*words(judge_server), cwd=folder, stdin="\n".join(lines))
    assert done.returncode == 0
    assert [json.loads(line)["text"] for line in done.stdout.splitlines()] == [
        str(i) for i in range(24)
    ]
    assert 2 <= judge_server.most_at_a_time <= 8


def test_a_cost_limit_ends_the_run_and_a_higher_one_goes_on(
    folder: Path, judge_server: Any
) -> None:
    write_jsonl(folder / "q.jsonl", [{"question_id": i, "text": "?" * 50} for i in range(20)])
    judge_server.usage = lambda request: (100, 20)  # 0.12 USD; 0.2 USD may be
    more = ["-o", "a.jsonl", "--prices", "p.toml", "--max-new-tokens", 50, "--max-cost"]
    done = answer(folder, judge_server, *more, 1)
    assert done.returncode == 1
    assert "stopped before the cost limit of 1 USD" in done.stderr
    assert "what is answered is on disk" in done.stderr
    made = len(judge_server.requests)
    assert made == len(read_jsonl(folder / "a.jsonl"))
    assert 0.8 < 0.12 * made <= 1
    plan = answer(folder, judge_server, *more, 1, "--dry-run")
    assert json.loads(plan.stdout)["done"] == made
    assert answer(folder, judge_server, *more, 1).returncode == 1
    assert len(judge_server.requests) == made, "what the file has cost counts"
    assert answer(folder, judge_server, *more, 9).returncode == 0
    assert [a["question_id"] for a in read_jsonl(folder / "a.jsonl")] == list(range(20))
    assert len(judge_server.requests) == 20


def test_a_plan_tells_what_it_would_take_and_asks_nobody(folder: Path, judge_server: Any) -> None:
    done = answer(folder, judge_server, "--prices", "p.toml", "--dry-run", "--limit", 3)
    plan = json.loads(done.stdout)
    assert list(plan)[:2] == ["answerer", "questions"]
    assert [plan["questions"], plan["requests"], plan["failing"]] == [3, 3, 0]
    assert plan["completion_tokens_at_most"] == 3 * 512
    assert plan["cost_usd"] == pytest.approx((plan["prompt_tokens"] + 300) / 1000)
    assert not judge_server.requests
    plan = json.loads(answer(folder, judge_server, "--dry-run").stdout)
    assert [plan["failing"], plan["cost_usd"]] == [1, None]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["-m", "model"], "--model goes without --answerer"),
        (["--store", "."], "--store goes without --answerer"),
        (["--media-root", "."], "--media-root goes without --answerer"),
        (["--device", "cpu"], "--device goes without --answerer"),
        (["--num-processes", "2"], "--num-processes goes without --answerer"),
        (["--choices"], "--choices goes without --answerer"),
        (["--output-format", "openai-batch"], "--answerer goes without openai-batch"),
        (["--num-beams", "2"], "a hosted model takes no num_beams"),
        (["--max-cost", "1", "--answerer-model", "?"], "the price of '?' is not known"),
        (["-o", "q.jsonl"], "the output is the input q.jsonl"),
        (["-o", "ctx.jsonl"], "the output is the input ctx.jsonl"),
    ],
)
def test_what_has_no_meaning_here_is_refused(
    folder: Path, judge_server: Any, more: list[str], said: str
) -> None:
    done = answer(folder, judge_server, *more)
    assert done.returncode == 2
    assert said in done.stderr
    assert not judge_server.requests


def test_its_options_go_with_it_alone(folder: Path) -> None:
    done = chatbind("vqa", "-m", "model", "--max-cost", "1", cwd=folder)
    assert (done.returncode, "--max-cost goes with --answerer" in done.stderr) == (2, True)
    done = chatbind("vqa", "-q", "q.jsonl", cwd=folder)
    assert "Missing option '-m' / '--model', or '--answerer'" in done.stderr
    done = chatbind("vqa", "--answerer", "openai", "-q", "q.jsonl", cwd=folder)
    assert "--answerer needs the model's name" in done.stderr
    done = chatbind(*["vqa", "--answerer=openai", "--answerer-model=m", "-qq.jsonl"], cwd=folder)
    assert done.returncode == 1
    assert "no API key in OPENAI_API_KEY; set OPENAI_API_KEY, or give --answerer-url" in done.stderr


def test_one_question_fails_alone_and_a_dead_server_ends_the_run(
    folder: Path, judge_server: Any
) -> None:
    write_jsonl(folder / "q.jsonl", [{"question_id": i, "text": "?"} for i in range(30)])
    judge_server.faults.extend([(400, {}, '{"error": {"message": "too long"}}')])
    done = answer(folder, judge_server, "-o", "a.jsonl", "--retries", 0, "--limit", 3)
    assert done.returncode == 3
    assert sum("too long" in a.get("error", "") for a in read_jsonl(folder / "a.jsonl")) == 1
    judge_server.faults.extend([500] * 99)
    done = answer(folder, judge_server, "-o", "a.jsonl", "--retries", 0)
    assert done.returncode == 1
    assert "8 requests in a row failed" in done.stderr
    assert "what is answered is on disk" in done.stderr
    judge_server.faults.clear()
    judge_server.faults.append(401)
    done = answer(folder, judge_server, "-o", "a.jsonl")
    assert (done.returncode, "check the key in OPENAI_API_KEY" in done.stderr) == (1, True)
    assert answer(folder, judge_server, "-o", "a.jsonl").returncode == 0
    assert len(read_jsonl(folder / "a.jsonl")) == 30


def test_a_fatal_error_ends_a_run_that_waits_for_its_pipe(folder: Path, judge_server: Any) -> None:
    judge_server.faults.append(401)
    line = [sys.executable, "-m", "chatbind_cli", *words(judge_server)]
    with subprocess.Popen(
        line, cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdin is not None
        process.stdin.write(b'{"question_id": 1, "text": "?"}\n')
        process.stdin.flush()
        assert process.wait(timeout=60) == 1


def test_other_contexts_do_not_continue_a_file(folder: Path, judge_server: Any) -> None:
    assert answer(folder, judge_server, "-o", "a.jsonl").returncode == 3
    write_jsonl(folder / "ctx.jsonl", [CONTEXT])
    done = answer(folder, judge_server, "-o", "a.jsonl")
    assert done.returncode == 1
    assert "its answers were made with contexts" in done.stderr


def test_a_kill_and_an_interrupt_lose_nothing_that_is_written(
    folder: Path, judge_server: Any
) -> None:
    write_jsonl(folder / "q.jsonl", [{"question_id": i, "text": f"{i}?"} for i in range(40)])
    judge_server.answer = lambda request: time.sleep(0.05) or "yes"  # type: ignore[func-returns-value]
    line = [sys.executable, "-m", "chatbind_cli", *words(judge_server)]
    line += ["--context", "ctx.jsonl", "-q", "q.jsonl", "-o", "a.jsonl", "--concurrency", "2"]
    for end in (signal.SIGKILL, signal.SIGINT):
        before = len(judge_server.requests)
        with subprocess.Popen(line, cwd=folder, stderr=subprocess.PIPE) as process:
            while len(judge_server.requests) < before + 8:
                time.sleep(0.01)
            process.send_signal(end)
            assert process.wait(timeout=60) == (130 if end == signal.SIGINT else -end)
    assert answer(folder, judge_server, "-o", "a.jsonl").returncode == 0
    assert len(judge_server.requests) <= 40 + 2 * 2, "what was under way alone is asked again"
    assert answer(folder, judge_server, "-o", "b.jsonl").returncode == 0
    assert (folder / "a.jsonl").read_bytes() == (folder / "b.jsonl").read_bytes()


def test_llava_s_text_only_baseline_runs_on_its_own_files(
    folder: Path, judge_server: Any, shared_data: Path
) -> None:
    data = shared_data / "llava"
    more = ["-q", data / "qa90_questions.jsonl", "-o", "a.jsonl"]
    more += ["--context", data / "caps_boxes_coco2014_val_80.jsonl"]
    done = chatbind(*words(judge_server, *more), cwd=folder)
    assert done.returncode == 0, done.stderr
    theirs = read_jsonl(data / "qa90_gpt4_answer.jsonl")
    ours = read_jsonl(folder / "a.jsonl")
    assert [a["question_id"] for a in ours] == [a["question_id"] for a in theirs]
    assert all(set(theirs[0]) <= set(a) for a in ours)
    assert all("[image 1]\n" in r["messages"][1]["content"] for r in judge_server.requests)


def test_help_and_a_local_answer_bring_no_client() -> None:
    program = (
        "import sys, chatbind_cli.__main__, chatbind_cli.commands.vqa, chatbind_cli.inference.vqa\n"
        "assert not {'openai', 'httpx'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", program], check=True, env=os.environ)
