"""What was paid is known, whatever becomes of the reviews."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from chatbind_cli.review.paid import PaidLog


def test_payments_add_up_over_half_lines_and_start_anew_when_told(tmp_path: Path) -> None:
    log = PaidLog(tmp_path / "r.jsonl")
    assert log.total_usd() == 0
    for usd in (0.5, 0.0, 0.25):
        log.add(usd)
    with log.path.open("a") as file:
        file.write('{"usd": 9')
    assert log.total_usd() == pytest.approx(0.75)
    log.forget()
    assert log.total_usd() == 0


@pytest.mark.parametrize("how", ["skip", "record"])
def test_the_limit_counts_replies_whose_reviews_are_not_in_the_file(
    tmp_path: Path, judge_server: Any, how: str
) -> None:
    (tmp_path / "q.jsonl").write_text('{"question_id": 1, "text": "?", "category": "conv"}\n')
    for name in ("a", "b"):
        answer = json.dumps({"question_id": 1, "text": name, "model_id": name})
        (tmp_path / f"{name}.jsonl").write_text(answer + "\n")
    (tmp_path / "p.toml").write_text("[m]\ninput = 1000\noutput = 1000\n")
    judge_server.answer = lambda request: "I cannot say."
    judge_server.usage = lambda request: (300, 10)  # 0.31 USD each
    words = ["review", "--question", "q.jsonl", "--answer-list", "a.jsonl", "b.jsonl"]
    words += ["--judge-url", judge_server.url, "--judge-model", "m", "--prices", "p.toml"]
    words += ["-o", "r.jsonl", "--on-error", how, "--orders", "as-given", "--max-tokens", "10"]
    for _ in range(4):
        done = subprocess.run(
            [sys.executable, "-m", "chatbind_cli", *words, "--max-cost", "8"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode in (1, 3), done.stderr
    paid = PaidLog(tmp_path / "r.jsonl").total_usd()
    assert paid == pytest.approx(0.31 * len(judge_server.requests))
    assert paid <= 8
