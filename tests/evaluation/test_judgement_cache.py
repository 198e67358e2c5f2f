"""What another run has judged is not asked for again, and is never taken for something else."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from chatbind_cli import cli
from chatbind_cli.evaluation.cases import Case
from chatbind_cli.evaluation.judgement_cache import JudgementCache
from chatbind_cli.evaluation.judges.chat import ChatJudge
from chatbind_cli.evaluation.judges.judge import JudgeSettings, RuleJudge, Verdict
from tests.evaluation.sample import judgement

CASE = Case(
    question={"question_id": 1, "text": "What is it?", "category": "conv"},
    answers=({"text": "A dog."}, {"text": "A cat."}),
    models=("a", "b"),
)
VERDICT = Verdict(scores=(8.0, 6.0), content="8 6\nfine", metadata={"model": "m", "cost_usd": 1.0})


def _write(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Six questions and the answers of `a` and `b`; the same under other names in `other`."""
    (tmp_path / "other").mkdir()
    for i, folder in ((0, tmp_path), (100, tmp_path / "other")):
        for name in ("q", "a", "b"):
            records = [{"question_id": i + n, "text": f"{name} {n}"} for n in range(6)]
            _write(folder / f"{name}.jsonl", records)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _review(server: Any, output: str, *words: str, folder: str = ".", sides: str = "ab") -> int:
    prices = Path("p.toml")
    prices.write_text("[m]\ninput = 1000\noutput = 1000\n")
    line = ["review", "-q", f"{folder}/q.jsonl", "--answer-list"]
    line += [f"{folder}/{side}.jsonl" for side in sides]
    line += ["--judge-url", server.url, "--judge-model", "m", "--prices", "p.toml"]
    return cli.run([*line, "--cache", "cache", "-o", output, *words])[0]


def _records(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_the_same_answers_under_other_names_cost_nothing(
    files: Path, judge_server: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _review(judge_server, "r.jsonl") == 0
    assert len(judge_server.requests) == 12
    capsys.readouterr()
    assert _review(judge_server, "o.jsonl", "--dry-run", folder="other") == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["judgements"], plan["done"], plan["requests"]) == (12, 12, 0)
    assert _review(judge_server, "o.jsonl", "--max-cost", "0", folder="other") == 0
    assert "12 reviews made (12 of them from the cache)\n" in capsys.readouterr().err
    assert len(judge_server.requests) == 12
    first, second = _records("r.jsonl"), _records("o.jsonl")
    assert [r["question_id"] for r in second] == [100 + r["question_id"] for r in first]
    for paid, free in zip(first, second, strict=True):
        costs = {"cost_usd", "prompt_tokens", "completion_tokens"}
        assert paid["metadata"].keys() - free["metadata"].keys() == costs
        assert free["metadata"]["cached"] is True
        assert "cached" not in paid["metadata"]
        for key in ("tuple", "content", "reviewer_id"):
            assert paid[key] == free[key]
        for key in ("order", "model", "created", "rule", "basis"):
            assert paid["metadata"][key] == free["metadata"][key]
    assert cli.run(["summarize", "o.jsonl"])[0] == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["cost_usd"] is None


def test_answers_shown_in_the_same_order_are_one_judgement_whoever_comes_first(
    files: Path, judge_server: Any
) -> None:
    judge_server.answer = lambda request: f"9 {6 + len(judge_server.requests) % 3}\nfine"
    assert _review(judge_server, "r.jsonl", "--orders", "as-given") == 0
    assert _review(judge_server, "s.jsonl", sides="ba") == 0
    assert len(judge_server.requests) == 12, "six in each order"
    given, both = _records("r.jsonl"), _records("s.jsonl")
    assert [r["metadata"].get("cached", False) for r in both] == [False, True] * 6
    assert [r["tuple"][::-1] for r in both if r["metadata"]["order"] == [2, 1]] == [
        r["tuple"] for r in given
    ]
    assert _review(judge_server, "t.jsonl") == 0
    assert len(judge_server.requests) == 12
    assert [r["tuple"] for r in _records("t.jsonl")[::2]] == [r["tuple"] for r in given]


def test_what_several_models_say_alike_is_asked_for_once(
    files: Path, judge_server: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    judge_server.answer = lambda request: time.sleep(0.02) or "8 6"  # type: ignore[func-returns-value]
    for name in ("c", "d"):
        Path(f"{name}.jsonl").write_text(Path("b.jsonl").read_text())
    words = ["--pairs", "all"]
    assert _review(judge_server, "r.jsonl", *words, "--dry-run", sides="abcd") == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["judgements"], plan["requests"]) == (72, 18)
    assert _review(judge_server, "r.jsonl", *words, sides="abcd") == 0
    # a against the words of b, c and d in two orders; these against each other in one
    assert len(judge_server.requests) == 18
    assert len(_records("r.jsonl")) == 72


@pytest.mark.parametrize(
    "change",
    [
        lambda case: replace(case, question={**case.question, "text": "What is that?"}),
        lambda case: replace(case, question={**case.question, "category": "detail"}),
        lambda case: replace(case, question={**case.question, "image": "x.jpg"}),
        lambda case: replace(case, context={"captions": ["a dog"]}),
        lambda case: replace(case, answers=(case.answers[0], {"text": "A cow."})),
        lambda case: replace(case, answers=case.answers[::-1]),
        lambda case: replace(case, answers=case.answers[:1], single=True),
    ],
)
def test_other_words_are_anotherjudgement(change: Callable[[Case], Case]) -> None:
    judge = ChatJudge(JudgeSettings(model="m", url="http://x/v1"))
    other = judge.cache_key(judgement(change(CASE)))
    assert other != judge.cache_key(judgement(CASE))
    alone = replace(CASE, answers=CASE.answers[:1], single=True)
    keys = {judge.cache_key(judgement(c)) for c in (alone, change(alone))}
    with_reference = replace(alone, references=("A wolf.",))
    assert judge.cache_key(judgement(with_reference)) not in keys


def test_another_judge_or_way_of_asking_is_anotherjudgement(tmp_path: Path) -> None:
    (tmp_path / "rule.json").write_text('{"default": {"prompt": "Score."}}')
    ways: list[dict[str, Any]] = [
        {},
        {"model": "n"},
        {"url": "http://y/v1"},
        {"temperature": 0.5},
        {"max_tokens": 7},
        {"structured": "off"},
        {"rules": tmp_path / "rule.json"},
    ]
    judges = [ChatJudge(JudgeSettings(**{"model": "m", "url": "http://x/v1", **w})) for w in ways]
    keys = {judge.cache_key(judgement(CASE)) for judge in judges}
    keys |= {judges[0].cache_key(judgement(CASE, swapped=True))}
    keys |= {judges[0].cache_key(judgement(CASE, sample=1))}
    assert len(keys) == len(ways) + 2


def test_names_and_numbers_are_no_part_of_it() -> None:
    judge = ChatJudge(JudgeSettings(model="m", url="http://x/v1", requests_per_minute=5))
    question = {"question_id": "other", "text": "What is it?", "category": "conv", "x": 1}
    answers = tuple({**answer, "model_id": "z", "answer_id": "y"} for answer in CASE.answers)
    case = Case(question=question, answers=answers, models=("c", "d"), pair=(3, 7))
    key = judge.cache_key(judgement(CASE))
    assert judge.cache_key(judgement(case)) == key
    turned = replace(case, answers=answers[::-1])
    assert judge.cache_key(judgement(turned, swapped=True)) == key


def test_failures_and_the_rule_judge_s_are_not_kept(tmp_path: Path, judge_server: Any) -> None:
    cache = JudgementCache(tmp_path)
    cache.keep("0" * 64, judgement(CASE), Verdict(error="no scores", content="hm"))
    assert cache.find("0" * 64, judgement(CASE)) is None
    assert cache.key(RuleJudge(), judgement(CASE)) is None
    assert cache.key(ChatJudge(JudgeSettings()), judgement(replace(CASE, problem="x"))) is None
    assert list(tmp_path.iterdir()) == []


def test_what_is_broken_or_made_up_is_said_once_and_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key = "ab" * 32
    path = tmp_path / "ab" / f"{key}.json"
    JudgementCache(tmp_path).keep(key, judgement(CASE), VERDICT)
    good = path.read_text()
    found = JudgementCache(tmp_path).find(key, judgement(CASE))
    assert found is not None
    assert (found.scores, found.content) == ((8.0, 6.0), "8 6\nfine")
    assert found.metadata == {"model": "m", "cached": True}

    def changed(**keys: Any) -> str:
        return json.dumps({**json.loads(good), **keys})

    bad = [
        *(good[:n] for n in (0, 1, 20, len(good) - 1)),
        "[" * 100_000,
        good.replace("[8.0", "[NaN"),
        good.replace("[8.0", "[1e999"),
        good.replace("[8.0", "[" + "9" * 10_000),
        changed(key="cd" * 32),
        changed(scores=[8]),
        changed(scores=[11, 6]),
        changed(scores=[-1, -1]),
        changed(scores=[True, 6]),
        changed(scores=["8", "6"]),
        changed(scores=None),
        changed(content=5),
        changed(content="\ud800"),
        changed(metadata=[]),
        good + " " * 100_000,
    ]
    for text in bad:
        path.write_text(text)
        cache = JudgementCache(tmp_path)
        assert [cache.find(key, judgement(CASE)) for _ in range(2)] == [None, None], text[:99]
        assert capsys.readouterr().err.count("the cache of judgements") == 1, text[:99]
    JudgementCache(tmp_path).keep(key, judgement(CASE), VERDICT)
    assert path.read_text() == good
    path.write_text(changed(metadata={"model": ["m"], "cost_usd": 5, "cached": False}))
    found = JudgementCache(tmp_path).find(key, judgement(CASE))
    assert found is not None
    assert found.metadata == {"cached": True}
    path.unlink()
    os.mkfifo(path)
    assert JudgementCache(tmp_path).find(key, judgement(CASE)) is None


def test_a_cache_that_cannot_be_written_keeps_nobody_from_judging(
    files: Path, judge_server: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("cache").write_text("a file")
    assert _review(judge_server, "r.jsonl") == 0
    assert len(_records("r.jsonl")) == len(judge_server.requests) == 12
    assert capsys.readouterr().err.count("the cache of judgements") == 1
    assert Path("cache").read_text() == "a file"


def test_a_full_disk_is_said_once_and_leaves_nothing_half_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = JudgementCache(tmp_path)
    cache.keep("00" * 32, judgement(CASE), VERDICT)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, before[1]))
    try:
        for name in ("11", "22"):
            cache.keep(name * 32, judgement(CASE), VERDICT)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert capsys.readouterr().err.count("the cache of judgements") == 1
    assert [path.stem for path in tmp_path.glob("*/*")] == ["00" * 32]
    assert cache.find("00" * 32, judgement(CASE)) is not None
    cache.keep("33" * 32, judgement(CASE), VERDICT)
    assert not (tmp_path / "33").exists(), "it is not tried again and again"


def test_of_too_many_the_oldest_go_and_nothing_that_is_not_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("chatbind_cli.evaluation.judgement_cache._MOST_IN_A_FOLDER", 3)
    (tmp_path / "ab").mkdir()
    foreign = tmp_path / "ab" / "thesis.json"
    foreign.write_text("years of work")
    left = tmp_path / "ab" / f".ab{'f' * 62}.json.x1.tmp"  # of a run that was killed
    left.write_text("{")
    for path in (foreign, left):
        os.utime(path, (1, 1))
    keys = [f"ab{n:062x}" for n in range(5)]
    for n, key in enumerate(keys):
        JudgementCache(tmp_path).keep(key, judgement(CASE), VERDICT)
        os.utime(tmp_path / "ab" / f"{key}.json", (n + 2, n + 2))
    kept = {path.stem for path in (tmp_path / "ab").iterdir()}
    assert kept == {"thesis", *keys[2:]}
    JudgementCache(tmp_path).keep(keys[0], judgement(CASE), replace(VERDICT, content="x" * 70_000))
    assert not (tmp_path / "ab" / f"{keys[0]}.json").exists(), "it is too large"


@contextlib.contextmanager
def _process(server: Any, output: str) -> Iterator[subprocess.Popen[bytes]]:
    words = ["review", "-q", "q.jsonl", "--answer-list", "a.jsonl", "b.jsonl", "--judge-url"]
    words += [server.url, "--judge-model", "m", "--cache", "cache", "--concurrency", "4"]
    command = [sys.executable, "-m", "chatbind_cli", *words, "-o", output]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        yield process


def test_two_runs_share_a_cache_and_one_of_them_may_be_killed(
    files: Path, judge_server: Any
) -> None:
    for name in ("q", "a", "b"):
        records = [{"question_id": n, "text": f"{name} {n}"} for n in range(40)]
        _write(files / f"{name}.jsonl", records)
    judge_server.answer = lambda request: time.sleep(0.02) or "8 6\nfine"  # type: ignore[func-returns-value]
    with _process(judge_server, "r.jsonl") as first, _process(judge_server, "s.jsonl") as second:
        deadline = time.monotonic() + 30
        while len(judge_server.requests) < 30:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        first.send_signal(signal.SIGKILL)
        assert second.wait(30) == 0
    assert first.returncode == -signal.SIGKILL
    asked = len(judge_server.requests)
    with _process(judge_server, "r.jsonl") as again, _process(judge_server, "t.jsonl") as third:
        assert again.wait(30) == third.wait(30) == 0
    assert len(judge_server.requests) == asked, "all is in the second's output"
    for output in ("r.jsonl", "s.jsonl", "t.jsonl"):
        records = _records(output)
        assert [r["question_id"] for r in records] == [n for n in range(40) for _ in range(2)]
        assert {tuple(r["tuple"]) for r in records} == {(8, 6), (6, 8)}
