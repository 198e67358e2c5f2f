"""One request in five fails, or the program is killed: nothing is lost, nothing doubled."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from chatbind_cli.evaluation.cases import Case
from chatbind_cli.evaluation.judges.chat import ChatJudge
from chatbind_cli.evaluation.judges.judge import JudgeSettings
from chatbind_cli.evaluation.judging import Outcome, ReviewOptions, judgements_of, make_missing
from chatbind_cli.evaluation.records import tidy
from chatbind_cli.jsonl import RecordWriter

pytestmark = pytest.mark.usefixtures("quick_retries")

N_CASES = 400
TIMEOUT_S = 0.5
CONCURRENCY = 32
FAULTS = [
    429,
    (429, {"Retry-After": "0.05"}, "{}"),
    500,
    503,
    ("slow", 0.7),  # longer than the time-out
    "cut",
    "garbage",
    "text",
    "no choices",
    "",
    "Both are good.",
    "9.5 out of ten, and 11",
    "reset",
]


def _cases(n: int) -> list[Case]:
    answers = ({"text": "A dog."}, {"text": "A cat.", "model_id": "m"})
    return [
        Case(
            question={"question_id": i, "text": f"What is it, {i}?", "category": "conv"},
            answers=answers,
            models=("a", "m"),
        )
        for i in range(n)
    ]


def _run(path: Path, server: Any, cases: list[Case], *, retries: int) -> Outcome:
    settings = JudgeSettings(model="m", url=server.url, timeout_s=TIMEOUT_S, retries=retries)
    options = ReviewOptions(orders="as-given", concurrency=CONCURRENCY)
    judge = ChatJudge(settings)
    with RecordWriter(path, key="review_id", keep_failed=True) as writer:
        outcome = make_missing(judgements_of(cases, judge, options), judge, writer, options)
    tidy(path, outcome.judgements)
    return outcome


def _records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_hundreds_of_judgements_under_one_fault_in_five_are_complete(
    tmp_path: Path, judge_server: Any
) -> None:
    draw = random.Random(4)
    drawn: Counter[str] = Counter()

    def fault() -> Any:
        if draw.random() >= 0.2:
            return None
        chosen = draw.choice(FAULTS)
        drawn[str(chosen)] += 1
        return chosen

    judge_server.draw = fault
    path = tmp_path / "r.jsonl"
    outcome = _run(path, judge_server, _cases(N_CASES), retries=6)
    records = _records(path)
    assert len(drawn) == len(FAULTS), "every kind of fault has happened"
    assert [record["question_id"] for record in records] == list(range(N_CASES))
    assert len({record["review_id"] for record in records}) == N_CASES
    # Unreadable twice in a row: about 400 x (0.2 x 3/13)^2 = 1 is to be expected.
    failed = [record for record in records if "error" in record]
    assert len(failed) == outcome.failed < 12
    for record in failed:
        assert record["tuple"] is None
        assert "cannot be read" in record["error"] or "attempts" in record["error"]
    assert all(r["tuple"] == [8, 6] for r in records if "error" not in r)

    judge_server.draw = None
    asked = len(judge_server.requests)
    again = _run(path, judge_server, _cases(N_CASES), retries=6)
    assert (again.judged, again.reused) == (len(failed), N_CASES - len(failed))
    assert len(judge_server.requests) - asked == len(failed)
    assert all(record["tuple"] == [8, 6] for record in _records(path))


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (500, "Error code: 500"),
        (503, "Error code: 503"),
        ("reset", "no connection"),
        ("cut", "no connection"),
        ("garbage", "a reply that cannot be read"),
        ("text", "a reply that cannot be read"),
        ("no choices", "a reply that cannot be read"),
        (("slow", 0.7), "no reply within 0.5 s"),
        ("", "the judge wrote nothing"),
        ("Both are good.", "no two scores in 'Both are good.'"),
        ((400, {}, '{"error": {"message": "too long"}}'), "too long"),
    ],
)
def test_failures_are_told_apart_in_their_records(
    tmp_path: Path, judge_server: Any, fault: Any, words: str
) -> None:
    judge_server.faults.extend([fault] * 2)
    path = tmp_path / "r.jsonl"
    assert _run(path, judge_server, _cases(1), retries=1).failed == 1
    assert words in _records(path)[0]["error"]


# A program that has openai imported and forks a review whenever it is told to, so that ten
# killed reviews do not take ten start-ups.
FORKER = """
import os, sys
import openai, openai.resources.chat, asyncio
import chatbind_cli.evaluation.judges.chat, chatbind_cli.evaluation.review
import chatbind_cli.commands.review
from chatbind_cli.cli import run
print("ready", flush=True)
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        os._exit(run(line.split())[0])
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
"""


def test_killed_at_ten_moments_the_same_file_comes_out(tmp_path: Path, judge_server: Any) -> None:
    judge_server.answer = lambda request: time.sleep(0.02) or "8 6\nfine"  # type: ignore[func-returns-value]
    for name in ("q", "a", "b"):
        records = [{"question_id": i, "text": f"{name} {i}"} for i in range(12)]
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (tmp_path / f"{name}.jsonl").write_text(lines)
    words = "review -q q.jsonl --answer-list a.jsonl b.jsonl --judge-model m --concurrency 3 "
    words += f"--judge-url {judge_server.url} -o "
    draw = random.Random(7)
    with subprocess.Popen(
        [sys.executable, "-c", FORKER],
        cwd=tmp_path,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as forker:

        def review(name: str, kill_after: int | None) -> int:
            """Kills the review a moment after its so-many-th request."""
            wanted = len(judge_server.requests) + (kill_after or 0)
            forker.stdin.write(f"{words}{name}\n")
            forker.stdin.flush()
            child = int(forker.stdout.readline())
            if kill_after is not None:
                deadline = time.monotonic() + 5
                while len(judge_server.requests) < wanted and time.monotonic() < deadline:
                    if not Path(f"/proc/{child}").exists():
                        break  # it came to its end before
                    time.sleep(0.001)
                time.sleep(draw.uniform(0, 0.04))
                with contextlib.suppress(ProcessLookupError):  # it was faster
                    os.kill(child, signal.SIGKILL)
            return int(forker.stdout.readline())

        assert forker.stdout.readline() == "ready\n"
        assert review("whole.jsonl", None) == 0
        whole = (tmp_path / "whole.jsonl").read_bytes()
        assert whole.count(b"\n") == len(judge_server.requests) == 24
        cut = tmp_path / "cut.jsonl"
        kills: list[int] = []
        while len(kills) < 10:
            # Each goes on where the one before was killed, until one comes to the end.
            status = review("cut.jsonl", draw.randint(0, 7))
            if status == signal.SIGKILL:
                kills.append(cut.read_bytes().count(b"\n") if cut.exists() else 0)
            elif cut.exists():
                assert cut.read_bytes() == whole
                cut.unlink()
        assert review("cut.jsonl", None) == 0
        forker.stdin.close()
    assert len(set(kills)) > 3, f"killed after {kills} judgements"
    assert cut.read_bytes() == whole
