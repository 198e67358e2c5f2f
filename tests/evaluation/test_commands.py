"""`chatbind review` and `chatbind summarize` as a person or a script runs them."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, cast
from unittest import mock

import pytest

from chatbind_cli.console import Progress
from tests.program import Pipe
from tests.program import chatbind as _chatbind
from tests.waiting import wait_until

KEYS = [
    "category",
    "n",
    "mean_1",
    "mean_2",
    "relative",
    "ci95",
    "win",
    "tie",
    "lose",
    "consistency",
    "failed",
]


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """Four questions about two modalities, right answers, and a model that is half right."""
    questions, right, said, contexts = [], [], [], []
    for i in range(4):
        modality = "image" if i < 2 else "audio"
        category = "conv" if i < 3 else "detail"
        question = {"question_id": i, "text": f"Which digit {i}?", modality: f"{i}.x"}
        answer = f"The digit is {i}."
        questions.append({**question, "category": category, "answer": answer})
        right.append({"question_id": i, "text": answer, "model_id": "reference"})
        text = f"The digit is {i if i % 2 == 0 else 9}."
        said.append({"question_id": i, "text": text, "model_id": "toy", "answer_id": f"a{i}"})
        contexts.append({modality: f"{i}.x", "captions": [f"caption {i}"]})
    for name, records in (("q", questions), ("ref", right), ("said", said), ("ctx", contexts)):
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (tmp_path / f"{name}.jsonl").write_text(lines)
    return tmp_path


def _records(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


RULE = ["review", "--question", "q.jsonl", "--answer-list", "ref.jsonl"]


def test_the_rule_judge_works_on_the_words_of_the_seed(world: Path) -> None:
    done = _chatbind(*RULE, "said.jsonl", "--output", "review.json", cwd=world)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert "chatbind: judge: rule" in done.stderr
    records = _records((world / "review.json").read_text())
    assert [record["question_id"] for record in records] == [0, 1, 2, 3]
    assert [record["tuple"] for record in records] == [[10, 10], [10, 1], [10, 10], [10, 1]]
    assert records[1]["answer2_id"] == "a1"
    assert records[1]["metadata"]["correct"] == [True, False]
    # "digit is 9" against "digit is 1": two of three words each
    assert records[1]["metadata"]["f1"] == [1.0, 0.6667]


@pytest.mark.parametrize("more", [["--judge", "rule"], []])
def test_without_a_right_answer_the_rule_judge_asks_for_one(world: Path, more: list[str]) -> None:
    questions = _records((world / "q.jsonl").read_text())
    bare = [{key: q[key] for key in ("question_id", "text")} for q in questions]
    (world / "q.jsonl").write_text("".join(json.dumps(question) + "\n" for question in bare))
    done = _chatbind(*RULE, "said.jsonl", *more, "-o", "r.jsonl", cwd=world)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "no question has an `answer`; give --reference FILE" in line
    assert not (world / "r.jsonl").exists()
    done = _chatbind(*RULE, "said.jsonl", *more, "--reference", "ref.jsonl", cwd=world)
    assert done.returncode == 0, done.stderr
    assert [record["tuple"][1] for record in _records(done.stdout)] == [10, 1, 10, 1]


@pytest.mark.parametrize("words", [["-", "--judge", "rule"], []])
def test_answers_from_a_pipe_are_the_second_side(world: Path, words: list[str]) -> None:
    done = _chatbind(*RULE, *words, cwd=world, stdin=(world / "said.jsonl").read_text())
    assert done.returncode == 0, done.stderr
    summary = _chatbind("summarize", cwd=world, stdin=done.stdout)
    assert summary.returncode == 0, summary.stderr
    rows = {row["category"]: row for row in _records(summary.stdout)}
    assert list(rows) == ["conv", "detail", "all"]
    assert list(rows["all"])[: len(KEYS)] == KEYS
    assert (rows["all"]["n"], rows["all"]["accuracy_2"], rows["all"]["relative"]) == (4, 0.5, 55)


def test_records_come_one_at_a_time_and_a_closed_pipe_ends_quietly(world: Path) -> None:
    command = [sys.executable, "-m", "chatbind_cli", *RULE, "-"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=world, text=True, **pipes) as process:  # type: ignore[call-overload]
        lines = (world / "said.jsonl").read_text().splitlines(keepends=True)
        process.stdin.write(lines[0])
        process.stdin.flush()
        assert json.loads(process.stdout.readline())["question_id"] == 0
        process.stdout.close()
        with suppress(BrokenPipeError):  # it may be gone already, which is what is wanted
            process.stdin.write("".join(lines[1:]))
            process.stdin.close()
        assert process.wait(10) in (0, 141)
        assert "Traceback" not in process.stderr.read()


def test_missing_doubled_and_unasked_answers_are_told_and_end_with_3(world: Path) -> None:
    lines = (world / "said.jsonl").read_text().splitlines(keepends=True)
    stranger = json.dumps({"question_id": 77, "text": "x"}) + "\n"
    (world / "said.jsonl").write_text("".join([*lines[:3], lines[0], stranger]))
    done = _chatbind(*RULE, "said.jsonl", cwd=world)
    assert done.returncode == 3
    assert "said.jsonl: more than once, the first one counts: question 0" in done.stderr
    assert "said.jsonl: answers what was not asked: question 77" in done.stderr
    assert "said.jsonl: no answer to question 3" in done.stderr
    failed = [record for record in _records(done.stdout) if "error" in record]
    assert [(r["question_id"], r["tuple"], r["error"]) for r in failed] == [
        (3, None, "no answer in said.jsonl")
    ]
    summary = _chatbind("summarize", cwd=world, stdin=done.stdout)
    assert summary.returncode == 0
    assert _records(summary.stdout)[1]["failed"] == 1
    assert "stdin: 1 failed, in no mean: no answer in said.jsonl" in summary.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-", "-"], "at most one of them from stdin"),
        (["nowhere.jsonl"], "'nowhere.jsonl' does not exist"),
        (["said.jsonl", "--judge", "openai"], "no API key in OPENAI_API_KEY"),
        (["said.jsonl", "--judge-url", "http://127.0.0.1:1/v1", "--rule", "q.jsonl"], "rule file"),
    ],
)
def test_wrong_calls_get_one_line(world: Path, words: Sequence[str], message: str) -> None:
    done = _chatbind(*RULE, *words, cwd=world, env={"OPENAI_API_KEY": ""})
    assert done.returncode in (1, 2)
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_a_chat_model_judges_with_rules_contexts_and_both_orders(
    world: Path, judge_server: Any
) -> None:
    judge_server.faults.append((429, {"Retry-After": "0"}, "{}"))
    judge_server.answer = lambda request: (
        "7 9" if "9." in request["messages"][1]["content"].split("[Assistant 2]")[0] else "9 8\nok"
    )
    rule = {name: {"role": "Assistant", "prompt": f"RULE {name}"} for name in ("conv", "detail")}
    (world / "rule.json").write_text(json.dumps(rule))
    words = [*RULE, "said.jsonl", "--context", "ctx.jsonl", "--rule", "rule.json"]
    words += ["--judge-url", judge_server.url, "--judge-model", "m", "-o", "r.jsonl"]
    done = _chatbind(*words, cwd=world, env={"OPENAI_API_KEY": "sk-secret-1234567890"})
    assert done.returncode == 0, done.stderr
    assert "sk-secret" not in done.stderr + (world / "r.jsonl").read_text()
    assert "800 tokens sent, 80 received" in done.stderr
    records = _records((world / "r.jsonl").read_text())
    assert [(r["question_id"], r["metadata"]["order"]) for r in records] == [
        (i, order) for i in range(4) for order in ([1, 2], [2, 1])
    ]
    # Where the wrong 9 stood first, the judge said "7 9"; that is 9 for the first answer file.
    assert [r["tuple"] for r in records[:4]] == [[9, 8], [8, 9], [9, 8], [9, 7]]
    users = [request["messages"][1]["content"] for request in judge_server.requests]
    assert any("[Context]\ncaption 3\n" in user and "RULE detail" in user for user in users)

    again = _chatbind(*words, cwd=world, env={"OPENAI_API_KEY": "sk-secret-1234567890"})
    assert again.returncode == 0
    assert "0 reviews made, 8 were there already" in again.stderr
    assert len(judge_server.requests) == 9
    rows = _records(_chatbind("summarize", "r.jsonl", cwd=world).stdout)
    assert rows[-1]["category"] == "all"
    assert rows[-1]["consistency"] == 0.5


def test_the_seeds_command_line_asks_the_chat_model(world: Path, judge_server: Any) -> None:
    """`OPENAI_API_KEY=... review --question --context --answer-list A B --rule --output`."""
    rule = {"default": {"role": "Assistant", "prompt": "Score."}}
    (world / "rule.json").write_text(json.dumps(rule))
    words = "review --question q.jsonl --context ctx.jsonl --answer-list ref.jsonl said.jsonl"
    words += " --rule rule.json --output r.json"
    env = {"OPENAI_API_KEY": "sk-secret", "OPENAI_BASE_URL": judge_server.url}
    done = _chatbind(*words.split(), cwd=world, env=env)
    assert done.returncode == 0, done.stderr
    assert {request["model"] for request in judge_server.requests} == {"gpt-4o"}
    assert "judge: gpt-4o" in done.stderr


def test_a_wrong_key_ends_with_1_and_one_line(world: Path, judge_server: Any) -> None:
    judge_server.faults.extend([401] * 50)
    words = [*RULE, "said.jsonl", "--judge-url", judge_server.url]
    done = _chatbind(*words, cwd=world, env={"OPENAI_API_KEY": "sk-secret-1234567890"})
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if "error" in line]
    assert line.endswith("check the key in OPENAI_API_KEY")


def test_unreadable_reviews_end_with_3_and_the_rest_is_summarized(
    world: Path, judge_server: Any
) -> None:
    judge_server.answer = lambda request: (
        "no idea" if "Which digit 2" in request["messages"][1]["content"] else "8 6"
    )
    words = [*RULE, "said.jsonl", "--judge-url", judge_server.url, "--orders", "as-given"]
    done = _chatbind(*words, cwd=world)
    assert done.returncode == 3
    assert "chatbind: error: 1 review failed" in done.stderr
    row = _records(_chatbind("summarize", cwd=world, stdin=done.stdout).stdout)[-1]
    assert (row["n"], row["failed"], row["relative"]) == (3, 1, 75.0)


def test_a_killed_review_goes_on_where_it_was(world: Path, judge_server: Any) -> None:
    words = [*RULE, "said.jsonl", "--judge-url", judge_server.url, "--concurrency", "2"]
    whole = _chatbind(*words, "-o", "whole.jsonl", cwd=world)
    assert whole.returncode == 0, whole.stderr
    n_whole = len(judge_server.requests)
    assert n_whole == 8

    judge_server.answer = lambda request: time.sleep(0.15) or "8 6\nfine"  # type: ignore[func-returns-value]
    command = [sys.executable, "-m", "chatbind_cli", *words, "-o", "cut.jsonl"]
    with subprocess.Popen(command, cwd=world, stderr=subprocess.DEVNULL) as process:
        cut = world / "cut.jsonl"
        wait_until(lambda: cut.exists() and cut.read_text().count("\n") >= 3)
        process.send_signal(signal.SIGKILL)
    kept = cut.read_text().count("\n")
    assert 3 <= kept < 8
    judge_server.answer = lambda request: "8 6\nfine"
    before = len(judge_server.requests)
    again = _chatbind(*words, "-o", "cut.jsonl", cwd=world)
    assert again.returncode == 0, again.stderr
    assert len(judge_server.requests) - before == 8 - kept
    assert cut.read_bytes() == (world / "whole.jsonl").read_bytes()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_was_asked_before_ctrl_c_is_on_disk_and_not_asked_again(
    world: Path, judge_server: Any, number: int
) -> None:
    answered = threading.Event()
    judge_server.answer = lambda request: answered.wait(30) and "8 6\nfine"  # type: ignore[func-returns-value]
    words = [*RULE, "said.jsonl", "--judge-url", judge_server.url, "--concurrency", "3"]
    words += ["-o", "r.jsonl"]
    command = [sys.executable, "-m", "chatbind_cli", *words]
    with subprocess.Popen(command, cwd=world, stderr=subprocess.PIPE, text=True) as process:
        wait_until(lambda: len(judge_server.requests) == 3)
        process.send_signal(number)
        errors = ""
        for line in process.stderr:
            errors += line
            if "ending: " in line:
                answered.set()
    assert process.returncode == 130
    assert "ending: up to 15 s for 3 judgements under way (Ctrl-C drops them)" in errors
    assert "Traceback" not in errors
    assert len(_records((world / "r.jsonl").read_text())) == len(judge_server.requests) == 3
    judge_server.answer = lambda request: "8 6\nfine"
    assert _chatbind(*words, cwd=world).returncode == 0
    assert len(judge_server.requests) == 8


def test_a_dry_run_counts_and_asks_nobody(world: Path, judge_server: Any) -> None:
    words = [*RULE, "said.jsonl", "--judge-url", judge_server.url, "--judge-model", "gpt-4o"]
    words += ["-o", "r.jsonl", "--max-tokens", "300"]
    done = _chatbind(*words, "--dry-run", cwd=world, env={"OPENAI_API_KEY": ""})
    assert done.returncode == 0, done.stderr
    (plan,) = _records(done.stdout)
    assert (plan["judgements"], plan["done"], plan["requests"]) == (8, 0, 8)
    assert plan["completion_tokens_at_most"] == 2400
    assert plan["cost_usd_at_most"] == pytest.approx(
        plan["prompt_tokens"] * 2.5e-6 + 2400 * 10e-6, abs=1e-6
    )
    assert "from our own table as of " in plan["price"]
    assert "--prices" in plan["price"]
    assert not (world / "r.jsonl").exists()
    assert judge_server.requests == []

    assert _chatbind(*words, cwd=world).returncode == 0
    (plan,) = _records(_chatbind(*words, "--dry-run", cwd=world).stdout)
    assert (plan["done"], plan["requests"], plan["cost_usd"]) == (8, 0, 0.0)
    # The server says 100 tokens a prompt, and the estimate is what `--dry-run` has.
    rows = _records(_chatbind("summarize", "r.jsonl", cwd=world).stdout)
    assert rows[-1]["cost_usd"] == pytest.approx(8 * (100 * 2.5e-6 + 10 * 10e-6))


def test_a_person_reads_the_plan_line_by_line(world: Path) -> None:
    words = [*RULE, "said.jsonl", "--judge-model", "mine", "--dry-run"]
    with mock.patch.object(Pipe, "isatty", return_value=True):
        lines = _chatbind(*words, cwd=world).stdout.splitlines()
    assert lines[:2] == ["judge: mine", "judgements: 8"]
    assert "cost usd: unknown, see --prices" in lines


def test_a_dry_run_of_files_that_do_not_fit_ends_as_the_run_would(world: Path) -> None:
    lines = (world / "said.jsonl").read_text().splitlines(keepends=True)
    (world / "short.jsonl").write_text("".join(lines[1:]))
    words = [*RULE, "short.jsonl", "--judge", "rule"]
    plan = _chatbind(*words, "--dry-run", cwd=world)
    assert plan.returncode == 3
    assert len(_records(plan.stdout)) == 1
    for done in (plan, _chatbind(*words, "-o", "short-r.jsonl", cwd=world)):
        assert "short.jsonl: no answer to question" in done.stderr
        assert done.returncode == 3


def test_a_cost_limit_ends_the_run_and_a_higher_one_goes_on(world: Path, judge_server: Any) -> None:
    (world / "p.toml").write_text("[m]\ninput = 1000\noutput = 1000\n")
    words = [*RULE, "said.jsonl", "--judge-url", judge_server.url, "--judge-model", "m"]
    words += ["--max-tokens", "10", "--prices", "p.toml", "-o", "r.jsonl", "--max-cost"]
    judge_server.usage = lambda request: (1500, 10)  # 1.51 USD
    done = _chatbind(*words, "9", cwd=world)
    assert done.returncode == 1
    assert "stopped before the cost limit of 9 USD" in done.stderr
    made = len(_records((world / "r.jsonl").read_text()))
    assert 0 < made == len(judge_server.requests) < 8
    again = _chatbind(*words, "9", cwd=world)
    assert again.returncode == 1, "what the file cost before counts"
    assert len(judge_server.requests) == made
    assert _chatbind(*words, "99", cwd=world).returncode == 0
    assert len(judge_server.requests) == 8


def test_money_for_reviews_that_are_made_again_stays_on_the_bill(
    world: Path, judge_server: Any
) -> None:
    (world / "p.toml").write_text("[m]\ninput = 1000\noutput = 1000\n")
    words = [*RULE, "said.jsonl", "--judge-url", judge_server.url, "--judge-model", "m"]
    words += ["--max-tokens", "10", "--prices", "p.toml", "-o", "r.jsonl", "--orders", "as-given"]
    judge_server.answer = lambda request: "no idea"
    for _ in range(3):  # four reviews, each asked twice: 8 x 0.11 USD
        assert _chatbind(*words, cwd=world).returncode == 3
    paid = [r["metadata"] for r in _records((world / "r.jsonl").read_text())]
    assert sum(m["cost_usd"] + m["earlier_usd"] for m in paid) == pytest.approx(3 * 8 * 0.11)
    asked = len(judge_server.requests)
    for _ in range(2):
        done = _chatbind(*words, "--max-cost", "2.7", cwd=world)
        assert done.returncode == 1
        assert "2.6400 USD are spent" in done.stderr
        assert "price: 1000 USD a million tokens sent" in done.stderr
    assert len(judge_server.requests) == asked


def test_failures_stay_counted_when_another_judge_or_a_stopped_run_continues_the_file(
    world: Path, judge_server: Any
) -> None:
    words = [*RULE, "said.jsonl", "--judge-url", judge_server.url, "-o", "r.jsonl"]
    judge_server.answer = lambda request: "no idea" if request["model"] == "bad" else "8 6"
    assert _chatbind(*words, "--judge-model", "bad", cwd=world).returncode == 3
    failed = (world / "r.jsonl").read_text()
    assert _chatbind(*words, "--judge-model", "good", cwd=world).returncode == 0
    assert (world / "r.jsonl").read_text().startswith(failed)
    judge_server.faults.extend([401] * 50)
    assert _chatbind(*words, "--judge-model", "bad", cwd=world).returncode == 1
    records = _records((world / "r.jsonl").read_text())
    assert sum("error" in record for record in records) == len(records) / 2 == 8


def test_a_cost_limit_without_a_price_is_refused(world: Path, judge_server: Any) -> None:
    words = [*RULE, "said.jsonl", "--judge-url", judge_server.url, "--judge-model", "m"]
    done = _chatbind(*words, "--max-cost", "1", cwd=world)
    assert done.returncode == 2
    assert "the price of 'm' is not known" in done.stderr


def test_three_answer_files_make_two_pairs_with_figures_of_their_own(world: Path) -> None:
    (world / "more.jsonl").write_text((world / "ref.jsonl").read_text().replace("reference", "x"))
    done = _chatbind(*RULE, "said.jsonl", "more.jsonl", "-o", "r.jsonl", cwd=world)
    assert done.returncode == 0, done.stderr
    assert len(_records((world / "r.jsonl").read_text())) == 8
    rows = _records(_chatbind("summarize", "r.jsonl", cwd=world).stdout)
    assert {(r["review"], r["n"], r["relative"]) for r in rows if r["category"] == "all"} == {
        ("r: toy", 4, 55.0),
        ("r: x", 4, 100.0),
    }


def test_a_file_that_is_added_costs_its_own_pairs_alone(world: Path, judge_server: Any) -> None:
    for name in ("third", "fourth"):
        text = (world / "said.jsonl").read_text().replace("digit", name)
        (world / f"{name}.jsonl").write_text(text)
    words = ["--judge-url", judge_server.url, "--pairs", "all", "-o", "r.jsonl"]
    for names, pairs in ((["said"], 1), (["said", "third"], 3), (["said", "third", "fourth"], 6)):
        files = [f"{name}.jsonl" for name in names]
        (plan,) = _records(_chatbind(*RULE, *files, *words, "--dry-run", cwd=world).stdout)
        assert (plan["judgements"], plan["done"]) == (8 * pairs, len(judge_server.requests))
        done = _chatbind(*RULE, *files, *words, cwd=world)
        assert done.returncode == 0, done.stderr
        assert len(judge_server.requests) == 8 * pairs
    records = _records((world / "r.jsonl").read_text())
    assert len({record["review_id"] for record in records}) == len(records) == 48
    found = {(*r["metadata"]["models"], *r["metadata"].get("pair", ())) for r in records}
    assert found == {
        ("reference", "toy"),
        ("reference", "toy (third)", 1, 3),
        ("toy", "toy (third)", 2, 3),
        ("reference", "toy (fourth)", 1, 4),
        ("toy", "toy (fourth)", 2, 4),
        ("toy (third)", "toy (fourth)", 3, 4),
    }


def test_answers_are_judged_alone_by_a_chat_model(world: Path, judge_server: Any) -> None:
    judge_server.answer = lambda request: (
        "Rating: [[2]]" if "9." in request["messages"][1]["content"] else '{"score": 9}'
    )
    words = ["review", "-q", "q.jsonl", "--mode", "single", "--judge-url", judge_server.url]
    words += ["--concurrency", "1"]  # the requests in the order of the questions
    words += ["--context", "ctx.jsonl", "-o", "r.jsonl", "--answer-list", "said.jsonl"]
    assert _chatbind(*words, cwd=world).returncode == 0
    assert len(judge_server.requests) == 4
    (form,) = {json.dumps(r["response_format"]["json_schema"]) for r in judge_server.requests}
    assert json.loads(form)["schema"]["required"] == ["score", "explanation"]
    user = judge_server.requests[0]["messages"][1]["content"]
    assert "\nThe digit is 0.\n" in user.split("[Reference]")[1].split("[Assistant]")[0]
    (plan,) = _records(_chatbind(*words, "ref.jsonl", "--dry-run", cwd=world).stdout)
    assert (plan["judgements"], plan["done"], plan["requests"]) == (8, 4, 4)
    done = _chatbind(*words, "ref.jsonl", cwd=world)
    assert done.returncode == 0, done.stderr
    assert len(judge_server.requests) == 8
    records = _records((world / "r.jsonl").read_text())
    assert [(r["question_id"], r["metadata"]["models"], r["tuple"]) for r in records[:4]] == [
        (0, ["toy"], [9]),
        (0, ["reference"], [9]),
        (1, ["toy"], [2]),
        (1, ["reference"], [9]),
    ]
    assert records[2]["answer1_id"] == "a1"
    assert "answer2_id" not in records[2]
    metadata = records[2]["metadata"]
    assert (metadata["mode"], metadata["pair"], metadata["lengths"]) == ("single", [1], [15])
    assert "order" not in metadata


def test_answers_are_judged_alone_by_the_rule_as_they_come(world: Path) -> None:
    said = (world / "said.jsonl").read_text()
    for words in ([], ["--answer-list", "-"], ["--answer-list", "ref.jsonl", "-"]):
        words = ["review", "-q", "q.jsonl", "--mode", "single", *words]
        done = _chatbind(*words, cwd=world, stdin=said)
        assert done.returncode == 0, done.stderr
        toy = [r for r in _records(done.stdout) if r["metadata"]["models"] == ["toy"]]
        assert [r["tuple"] for r in toy] == [[10], [1], [10], [1]]
        assert [r["content"].splitlines()[0] for r in toy] == ["10", "1", "10", "1"]


@pytest.mark.parametrize("words", [["--orders", "both"], ["--pairs", "all"]])
def test_what_means_nothing_to_one_answer_is_refused(world: Path, words: list[str]) -> None:
    done = _chatbind(*RULE, "--mode", "single", *words, cwd=world)
    assert done.returncode == 2
    assert "have no meaning where each answer is judged alone" in done.stderr


@pytest.mark.parametrize(("words", "total"), [([], 8), (["--pairs", "all"], 12)])
def test_progress_goes_to_the_number_of_reviews(
    world: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], total: int
) -> None:
    counted: list[Counted] = []

    class Counted(Progress):
        def __enter__(self) -> Counted:
            counted.append(self)
            return cast(Counted, super().__enter__())

    monkeypatch.setattr("chatbind_cli.evaluation.review.Progress", Counted)
    (world / "x.jsonl").write_text((world / "said.jsonl").read_text())
    assert _chatbind(*RULE, "said.jsonl", "x.jsonl", *words, cwd=world).returncode == 0
    assert [(progress.total, progress.n) for progress in counted] == [(total, total)]


def test_ctrl_c_while_waiting_for_a_pipe_ends_with_130(world: Path) -> None:
    command = [sys.executable, "-m", "chatbind_cli", *RULE, "-", "-o", "r.jsonl"]
    with subprocess.Popen(
        command, cwd=world, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        process.stdin.write((world / "said.jsonl").read_text().splitlines(keepends=True)[0])
        process.stdin.flush()
        wait_until(lambda: (world / "r.jsonl").exists() and (world / "r.jsonl").read_text())
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        assert "Traceback" not in process.stderr.read()
    assert len(_records((world / "r.jsonl").read_text())) == 1


def test_one_bad_line_in_each_file_of_a_review_is_one_failure(world: Path) -> None:
    for name in ("q", "ref", "said"):
        with (world / f"{name}.jsonl").open("ab") as file:
            file.write(b'{"question_id": \xff}\n')
    done = _chatbind(*RULE, "said.jsonl", "-o", "r.jsonl", cwd=world)
    assert done.returncode == 3
    assert "Traceback" not in done.stderr
    records = _records((world / "r.jsonl").read_text())
    assert [record["question_id"] for record in records] == [0, 1, 2, 3, None]
    assert (records[4]["line"], records[4]["tuple"]) == (5, None)
    assert "said.jsonl: cannot be used: line 5: " in done.stderr
    piped = _chatbind(*RULE, "-", cwd=world, stdin="nonsense\n")
    assert piped.returncode == 3
    assert "stdin: " in piped.stderr
    assert "Traceback" not in piped.stderr


def test_help_and_usage_errors_load_nothing_heavy(world: Path) -> None:
    code = (
        "import sys\nfrom chatbind_cli.cli import run\n"
        "for words in (['review', '--help'], ['summarize', '--help'], ['review']):\n"
        "    run(words)\n"
        "heavy = {'torch', 'transformers', 'openai', 'httpx', 'numpy', 'rich', 'asyncio'}\n"
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=world, capture_output=True, text=True)
    assert done.stderr.splitlines()[-1] == "[]"
    assert "--judge-url" in done.stdout


def test_answers_may_come_from_a_pipe_with_a_name(tmp_path):
    """`--answer-list <(head ...) b.jsonl`: what the shell names is no regular file."""
    (tmp_path / "q.jsonl").write_text('{"question_id": 1, "text": "Which?", "answer": "Two."}\n')
    (tmp_path / "a.jsonl").write_text('{"question_id": 1, "text": "Two."}\n')
    line = (
        f"{sys.executable} -m chatbind_cli review --question q.jsonl --judge rule "
        "--answer-list <(cat a.jsonl) a.jsonl"
    )
    done = subprocess.run(
        ["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["tuple"] == [10.0, 10.0]
