"""`review --batch` against a server that speaks the Batch API, with kills between its steps."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from chatbind_cli import batch_api, endpoint
from tests.batch_server import BatchServer
from tests.program import chatbind

KEY = "sk-secret-1234567890"


@pytest.fixture
def server(
    monkeypatch: pytest.MonkeyPatch, quick_retries: None, judge_server: Any
) -> Iterator[BatchServer]:
    monkeypatch.setattr(batch_api, "_FIRST_PAUSE_S", 0.01)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    found = BatchServer()
    found.answer = lambda request: f"8 6\nseen {len(request['messages'][1]['content'])}"
    yield found
    found.close()


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """Four questions with two answers each, and a price of 1 USD a thousand tokens."""
    for name in ("q", "one", "two"):
        records = [{"question_id": i, "text": f"{name} {i}"} for i in range(4)]
        (tmp_path / f"{name}.jsonl").write_text("".join(f"{json.dumps(r)}\n" for r in records))
    (tmp_path / "p.toml").write_text("[m]\ninput = 1000\noutput = 1000\n")
    return tmp_path


def words(server: BatchServer, *more: object) -> list[str]:
    line = ["review", "-q", "q.jsonl", "--answer-list", "one.jsonl", "two.jsonl"]
    line += ["--judge-url", server.url, "--judge-model", "m", "--prices", "p.toml"]
    return [*line, *map(str, more)]


def review(world: Path, server: BatchServer, *more: object, output: str = "r.jsonl") -> Any:
    return chatbind(*words(server, "-o", output, *more), cwd=world)


def records(world: Path, name: str = "r.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (world / name).read_text().splitlines()]


def test_a_batch_gives_the_reviews_of_a_live_run_at_half_the_price(
    world: Path, server: BatchServer
) -> None:
    done = review(world, server, "--batch")
    assert done.returncode == 0, done.stderr
    assert not server.requests
    assert (len(server.batches), len(server.asked)) == (1, 8)
    assert "batch batch_0: 8 requests, to be answered within a day" in done.stderr
    assert "8 reviews made" in done.stderr
    assert "0.4400 USD" in done.stderr
    made = records(world)
    assert {r["metadata"]["batch"] for r in made} == {"batch_0"}
    assert {r["metadata"]["cost_usd"] for r in made} == {0.055}
    assert sorted(path.name for path in world.iterdir()) == [
        *("one.jsonl", "p.toml", "q.jsonl", "r.jsonl", "two.jsonl")
    ]
    assert review(world, server, output="live.jsonl").returncode == 0
    for one, other in zip(made, records(world, "live.jsonl"), strict=True):
        assert one["metadata"].pop("batch")
        assert 2 * one["metadata"].pop("cost_usd") == other["metadata"].pop("cost_usd")
        assert one == other
    assert review(world, server, "--batch").returncode == 0
    assert len(server.batches) == 1, "nothing was missing"


def test_whoever_leaves_is_told_to_come_again(world: Path, server: BatchServer) -> None:
    for _ in range(2):
        done = review(world, server, "--batch", "leave")
        assert done.returncode == 75
        assert "batches are not over yet; the same command takes what is done" in done.stderr
        assert records(world) == []
        server.looks = 3
    assert review(world, server, "--batch", "leave").returncode == 0
    assert (len(records(world)), len(server.batches)) == (8, 1)


def test_old_reviews_stay_until_new_ones_take_their_place(world: Path, server: BatchServer) -> None:
    assert review(world, server, "--batch").returncode == 0
    old = (world / "r.jsonl").read_bytes()
    two = (world / "two.jsonl").read_text().replace("two", "other words")
    (world / "two.jsonl").write_text(two)
    server.looks = 9
    assert review(world, server, "--batch", "leave").returncode == 75
    assert (world / "r.jsonl").read_bytes() == old
    assert review(world, server, "--batch").returncode == 0
    assert {r["metadata"]["batch"] for r in records(world)} == {"batch_1"}
    assert len(records(world)) == 8


def test_of_several_batches_those_that_are_over_are_taken(
    world: Path, server: BatchServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_api, "_MOST_REQUESTS", 3)
    assert review(world, server, "--batch", "leave").returncode == 75
    assert [b["request_counts"]["total"] for b in server.batches.values()] == [3, 3, 2]
    server.looks = 4
    server.batches["batch_1"]["looks"] = 5
    assert review(world, server, "--batch", "leave").returncode == 75
    assert [r["metadata"]["batch"] for r in records(world)] == ["batch_1"] * 3
    assert review(world, server, "--batch").returncode == 0
    assert (len(records(world)), len(server.batches)) == (8, 3)
    assert [r["question_id"] for r in records(world)] == [0, 0, 1, 1, 2, 2, 3, 3]


def test_large_files_are_cut_where_an_endpoint_would_refuse_them(
    world: Path, server: BatchServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_api, "_MOST_BYTES", 9000)
    assert review(world, server, "--batch").returncode == 0
    assert len(server.batches) > 1
    assert max(len(server.files[b["input_file_id"]]) for b in server.batches.values()) <= 9000
    assert len(server.asked) == 8


STEPS = [
    "POST /v1/files",
    "GET /v1/batches",
    "POST /v1/batches",
    "GET /v1/batches/batch_N",
    "GET /v1/files/file-N/content",
]


PROGRAMS = """
import json, os, sys
import chatbind_cli.__main__, chatbind_cli.evaluation.batched, chatbind_cli.evaluation.review
from chatbind_cli.cli import run
for line in sys.stdin:
    folder, words = json.loads(line)
    program = os.fork()
    if program == 0:
        os.chdir(folder)
        os._exit(run(words)[0])
    print(program, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(program, 0)[1]), flush=True)
"""
"""Runs the program as often as it is told, each time in a process that can be killed."""


@pytest.fixture(scope="module")
def programs() -> Iterator[subprocess.Popen[str]]:
    line = [sys.executable, "-c", PROGRAMS]
    with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as found:
        yield found


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("step", STEPS)
def test_a_kill_at_any_step_costs_nothing_twice(
    world: Path, server: BatchServer, programs: Any, step: str, before: bool
) -> None:
    server.looks = 1
    program = start(programs, world, server)

    def kill(now: str, early: bool) -> None:
        if (now, early) == (step, before):
            os.kill(program, signal.SIGKILL)

    server.on = kill
    assert int(programs.stdout.readline()) == -signal.SIGKILL
    server.on = lambda step, before: None
    done = review(world, server, "--batch")
    assert done.returncode == 0, done.stderr
    assert (len(server.batches), len(server.asked), len(records(world))) == (1, 8, 8)
    assert not (world / "r.jsonl.batches").exists()


def test_a_kill_between_the_reviews_and_their_batch_costs_nothing(
    world: Path, server: BatchServer
) -> None:
    assert review(world, server, "--batch", "leave").returncode == 75
    state = (world / "r.jsonl.batches").read_bytes()
    assert review(world, server, "--batch").returncode == 0
    whole = (world / "r.jsonl").read_bytes()
    (world / "r.jsonl.batches").write_bytes(state)
    assert review(world, server, "--batch").returncode == 0
    assert (world / "r.jsonl").read_bytes() == whole
    (world / "r.jsonl").write_bytes(whole[: len(whole) // 2])
    (world / "r.jsonl.batches").write_bytes(state)
    assert review(world, server, "--batch").returncode == 0
    assert len(server.batches) == 1
    assert (world / "r.jsonl").read_bytes() == whole
    assert not (world / "r.jsonl.batches").exists()


@pytest.mark.parametrize("status", ["reset", 500, 503])
def test_an_order_whose_receipt_is_lost_is_not_given_twice(
    world: Path, server: BatchServer, status: Any
) -> None:
    server.batches |= {f"other_{i}": {"id": f"other_{i}", "input_file_id": "x"} for i in range(5)}
    server.on = lambda step, before: (
        status if (step, before) == ("POST /v1/batches", False) else None
    )
    done = review(world, server, "--batch")
    assert done.returncode == 0, done.stderr
    assert server.steps.count("POST /v1/batches") == 1
    assert len(records(world)) == 8


def test_an_order_that_never_came_is_given_by_the_next_run(
    world: Path, server: BatchServer
) -> None:
    server.on = lambda step, before: 500 if step == "POST /v1/batches" else None
    done = review(world, server, "--batch")
    assert done.returncode == 1
    assert "what was ordered is kept: the same command goes on" in done.stderr
    server.on = lambda step, before: None
    assert review(world, server, "--batch").returncode == 0
    assert server.steps.count("POST /v1/files") == 1
    assert len(server.batches) == 1


def test_what_cannot_be_read_is_asked_once_more_at_once(world: Path, server: BatchServer) -> None:
    server.one = lambda body: "no idea" if "q 2" in body["messages"][1]["content"] else "7 7"
    done = review(world, server, "--batch")
    assert done.returncode == 0, done.stderr
    again = [r for r in records(world) if r["metadata"].get("asked_again")]
    assert [r["question_id"] for r in again] == [2, 2]
    assert all(r["metadata"]["cost_usd"] == pytest.approx(0.165) for r in again)
    assert [len(request["messages"]) for request in server.requests] == [4, 4]


def test_parameters_that_a_model_refuses_are_changed_in_a_further_batch(
    world: Path, server: BatchServer
) -> None:
    def picky(body: dict[str, Any]) -> Any:
        for name, said in (
            ("max_tokens", "use 'max_completion_tokens' instead"),
            ("temperature", "'temperature' does not support 0"),
        ):
            if name in body:
                return 400, {"error": {"message": said}}
        return "8 6"

    server.one = picky
    assert review(world, server, "--batch", "leave").returncode == 75
    done = review(world, server, "--batch")
    assert done.returncode == 0, done.stderr
    assert len(server.batches) == 3
    assert server.asked[-1]["max_completion_tokens"] == 1024
    assert {r["metadata"]["cost_usd"] for r in records(world)} == {0.055}


def test_one_refusal_a_late_one_and_a_forgotten_one_are_failed_reviews(
    world: Path, server: BatchServer
) -> None:
    def one(body: dict[str, Any]) -> Any:
        text = body["messages"][1]["content"]
        if "q 1" in text:
            return 400, {"error": {"message": f"bad words, {KEY}"}}
        return None if "q 2" in text else "8 6"

    server.one, server.ends = one, "expired"
    server.on = lambda step, before: server.forgotten.update(
        json.loads(line)["custom_id"]
        for data in server.files.values()
        for line in data.splitlines()
        if b"q 3" in line and b'"method"' in line
    )
    done = review(world, server, "--batch")
    assert done.returncode == 3
    assert "batch batch_0 is expired" in done.stderr
    errors = {r["question_id"]: r.get("error") for r in records(world)}
    assert errors == {
        0: None,
        1: 'the batch has no reply to this: 400 {"message": "bad words, [key]"}',
        2: 'the batch has no reply to this: not sent {"code": "batch_expired", "message": "late"}',
        3: "the batch has no reply to this",
    }
    server.on, server.one, server.ends = lambda step, before: None, lambda body: "8 6", "completed"
    server.forgotten.clear()
    assert review(world, server, "--batch").returncode == 0
    assert [b["request_counts"]["total"] for b in server.batches.values()] == [8, 6]


def test_a_batch_that_is_refused_as_a_whole_is_told_and_forgotten(
    world: Path, server: BatchServer
) -> None:
    server.ends = "failed"
    server.errors = {"data": [{"code": "token_limit_exceeded", "message": f"too many, {KEY}"}]}
    done = review(world, server, "--batch")
    assert done.returncode == 1
    assert "batch batch_0 was refused (too many, [key])" in done.stderr
    server.ends, server.errors = "completed", None
    assert review(world, server, "--batch").returncode == 0
    assert len(server.batches) == 2


def test_a_cancelled_batch_gives_what_it_has(world: Path, server: BatchServer) -> None:
    server.ends = "cancelled"
    assert review(world, server, "--batch").returncode == 0
    assert len(records(world)) == 8


def test_only_what_the_limit_has_room_for_is_ordered(world: Path, server: BatchServer) -> None:
    more = ["--batch", "--max-tokens", 20, "--max-cost"]
    done = review(world, server, *more, 4)  # about 1.2 USD may each cost, and 0.055 does
    assert done.returncode == 1
    assert "stopped before the cost limit of 4 USD" in done.stderr
    n = len(records(world))
    assert 1 <= n < 8
    assert len(server.asked) == n
    assert review(world, server, *more, 0.05).returncode == 1
    assert len(server.asked) == n
    while review(world, server, *more, 4).returncode == 1:
        n = len(records(world))
        assert len(server.asked) == n
    assert len(records(world)) == len(server.asked) == 8


def test_a_reply_is_on_the_bill_once(world: Path, server: BatchServer) -> None:
    server.one = lambda body: "no idea" if "q 3" in body["messages"][1]["content"] else "7 7"
    server.usage = lambda request: (1400, 10)  # 8 x 0.705 USD, and 2 x 1.41 for what is asked again
    done = review(world, server, "--batch", "--max-tokens", 20, "--max-cost", 9.9)
    assert done.returncode == 0, done.stderr
    assert "8.4600 USD" in done.stderr


def test_what_batches_under_way_may_cost_is_not_spent_on_asking_again(
    world: Path, server: BatchServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_api, "_MOST_REQUESTS", 4)
    server.answer = lambda request: "no idea"
    more = ["--batch", "leave", "--max-tokens", 20, "--max-cost", 6]
    assert review(world, server, *more).returncode == 75  # 0.6 USD may each of 8 cost
    server.usage = lambda request: (1400, 10)
    server.batches["batch_1"]["looks"] = -9
    done = review(world, server, *more)
    assert done.returncode == 1
    assert "stopped before the cost limit of 6 USD" in done.stderr
    assert not server.requests


def test_a_plan_costs_half(world: Path, server: BatchServer) -> None:
    live, batch = (
        json.loads(review(world, server, *more, "--dry-run").stdout) for more in ([], ["--batch"])
    )
    assert batch["cost_usd"] == pytest.approx(live["cost_usd"] / 2)
    assert batch["cost_usd_at_most"] == pytest.approx(live["cost_usd_at_most"] / 2)
    assert not server.steps


def test_samples_of_one_request_have_a_reply_each(world: Path, server: BatchServer) -> None:
    numbers = iter(range(99))
    server.one = lambda body: f"8 6\nreply {next(numbers)}"
    assert review(world, server, "--batch", "--samples", 3, "--temperature", 1).returncode == 0
    assert len({r["content"] for r in records(world)}) == len(records(world)) == 24


def test_what_the_cache_has_is_not_ordered(world: Path, server: BatchServer) -> None:
    cache = ["--cache", "cache"]
    assert review(world, server, *cache, "--orders", "as-given", output="l.jsonl").returncode == 0
    done = review(world, server, "--batch", *cache)
    assert done.returncode == 0, done.stderr
    assert len(server.asked) == 4
    assert review(world, server, "--batch", *cache, output="again.jsonl").returncode == 0
    assert len(server.asked) == 4


def start(programs: Any, world: Path, server: BatchServer) -> int:
    """Starts the program in a process of its own."""
    line = words(server, "--batch", "-o", "r.jsonl", "--cache", "off")
    programs.stdin.write(f"{json.dumps([str(world), line])}\n")
    programs.stdin.flush()
    return int(programs.stdout.readline())


def test_two_runs_at_once_and_a_run_of_another_judge_are_refused(
    world: Path, server: BatchServer, programs: Any
) -> None:
    assert review(world, server, "--batch", "leave").returncode == 75
    done = review(world, server, "--batch", "--judge-model", "other")
    assert done.returncode == 1
    assert "has batches of m at http" in done.stderr
    server.looks = 10**6
    looked = len(server.steps)
    program = start(programs, world, server)
    while len(server.steps) == looked:
        time.sleep(0.01)
    done = review(world, server, "--batch")
    assert (done.returncode, "another process is writing it" in done.stderr) == (1, True)
    os.kill(program, signal.SIGINT)
    assert int(programs.stdout.readline()) == 130
    server.looks = 1
    assert review(world, server, "--batch").returncode == 0
    assert (len(records(world)), len(server.batches)) == (8, 1)


def test_a_refused_batch_takes_no_other_with_it(
    world: Path, server: BatchServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_api, "_MOST_REQUESTS", 4)
    assert review(world, server, "--batch", "leave").returncode == 75
    server.batches["batch_1"] |= {"status": "failed", "looks": 9}
    done = review(world, server, "--batch")
    assert (done.returncode, "batch_1 was refused" in done.stderr) == (1, True)
    assert review(world, server, "--batch").returncode == 0
    assert [b["request_counts"]["total"] for b in server.batches.values()] == [4, 4, 4]


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"batches_of": "m", "orders": [{"file": 1}]}', '{"orders": 3}']
)
def test_a_file_beside_the_output_that_is_not_ours_is_left_alone(
    world: Path, server: BatchServer, text: str
) -> None:
    (world / "r.jsonl.batches").write_text(text)
    done = review(world, server, "--batch")
    assert done.returncode == 1
    assert "r.jsonl.batches: is no file of the batches of a review" in done.stderr
    assert (world / "r.jsonl.batches").read_text() == text
    assert not server.batches


@pytest.mark.parametrize(
    ("step", "reply"),
    [
        ("POST /v1/files", {"no": "id"}),
        ("POST /v1/files", {"id": ["x"]}),
        ("POST /v1/batches", {"id": "a\nb"}),
        ("GET /v1/batches/batch_N", {"status": 3}),
        ("GET /v1/batches/batch_N", []),
        ("GET /v1/batches/batch_N", {"status": "completed", "output_file_id": "../../x"}),
        ("GET /v1/files/file-N/content", b"\xff\xfe junk\n[1, 2]\n" + b"{" * 9000 + b"\n"),
        ("GET /v1/files/file-N/content", b'{"custom_id": "x"}\n' * 99 + b'{"custom_id": 4}'),
    ],
)
def test_replies_that_nobody_understands_are_one_line_or_failed_reviews(
    world: Path, server: BatchServer, step: str, reply: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    done_as_it_is = server.done

    def strange(now: str, *how: Any) -> Any:
        answer = done_as_it_is(now, *how)
        return reply if now == step and (now != STEPS[3] or answer["looks"] > 1) else answer

    monkeypatch.setattr(server, "done", strange)
    limit = ["--retries", 0, "--timeout", 1]
    result = review(world, server, "--batch", *limit)
    assert result.returncode in (1, 3), result.stderr
    assert "Traceback" not in result.stderr
    assert "internal error" not in result.stderr
    assert all("error" in record for record in records(world))


def test_a_file_of_replies_without_measure_ends_the_run_and_loses_nothing(
    world: Path, server: BatchServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoint, "_LARGEST_FILE", 1000)
    done = review(world, server, "--batch")
    assert done.returncode == 1
    assert "batch batch_0: a reply that cannot be read" in done.stderr
    monkeypatch.undo()
    os.environ["OPENAI_API_KEY"] = KEY
    try:
        assert review(world, server, "--batch", "--cache", "off").returncode == 0
    finally:
        del os.environ["OPENAI_API_KEY"]
    assert len(server.batches) == 1


def test_the_key_is_sent_and_never_shown(world: Path, server: BatchServer) -> None:
    server.on = lambda step, before: 401 if step == "POST /v1/batches" else None
    done = review(world, server, "--batch")
    assert done.returncode == 1
    assert KEY not in done.stderr
    assert not re.search(KEY, (world / "r.jsonl.batches").read_text())


@pytest.mark.parametrize("more", [["--judge", "rule"], ["-o", "-"], ["-o", "/dev/null"]])
def test_batches_need_a_chat_model_and_a_file(
    world: Path, server: BatchServer, more: list[str]
) -> None:
    (world / "q.jsonl").write_text('{"question_id": 1, "text": "?", "answer": "x"}\n')
    done = review(world, server, "--batch", *more)
    assert done.returncode == 2
    assert "--batch goes with a chat model as the judge, and --output FILE" in done.stderr
