"""Making what is missing: concurrency, order, resuming, failing. With judges made for the test."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from chatbind_cli.errors import JudgeError
from chatbind_cli.evaluation.cases import Case, Judgement
from chatbind_cli.evaluation.judges.judge import Judge, Verdict
from chatbind_cli.evaluation.judging import Outcome, ReviewOptions, judgements_of, make_missing
from chatbind_cli.evaluation.records import in_words, tidy
from chatbind_cli.evaluation.summary import latest
from chatbind_cli.jsonl import RecordWriter


class FakeJudge(Judge):
    """Scores by the length of the answers; slow for even questions."""

    name = "fake"

    def __init__(self, rule: str = "r1") -> None:
        self.rule = rule
        self.calls: list[tuple[Any, bool]] = []
        self.now = self.most = 0
        self.broken: set[object] = set()
        self.stops_at: object = None
        self.closed = False

    def judge_hash(self, case: Case) -> str:
        return self.rule

    async def judge(self, judgement: Judgement) -> Verdict:
        case = judgement.case
        self.calls.append((case.question_id, judgement.swapped))
        self.now += 1
        self.most = max(self.most, self.now)
        await asyncio.sleep(0.02 if int(case.question_id) % 2 == 0 else 0.001)
        self.now -= 1
        if case.question_id == self.stops_at:
            raise JudgeError("the server is gone")
        if case.question_id in self.broken:
            return Verdict(content="hm", error="the scores cannot be read")
        first, second = (float(len(text)) for text in case.texts)
        return Verdict(scores=(first, second), content=f"{first} {second}")

    async def close(self) -> None:
        self.closed = True


def _case(number: int, text: str = "abc", **more: Any) -> Case:
    question = {"question_id": number, "text": "q", "category": "conv"}
    answers = ({"text": "ab", "answer_id": f"a{number}"}, {"text": text, "model_id": "m"})
    return Case(question=question, answers=answers, models=("a", "m"), **more)


def _make(path: Path, cases: Any, judge: Any, *, orders: Any = "as-given", **how: Any) -> Outcome:
    options = ReviewOptions(orders=orders, **how)
    with RecordWriter(path, key="review_id", keep_failed=True) as writer:
        return make_missing(judgements_of(cases, judge, options), judge, writer, options)


def _run(path: Path, cases: Any, judge: Any, **how: Any) -> Outcome:
    outcome = _make(path, cases, judge, **how)
    tidy(path, outcome.judgements)
    return outcome


def _records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_record_has_the_keys_of_the_design(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    _run(path, [_case(1)], FakeJudge())
    (record,) = _records(path)
    assert list(record) == [
        "review_id",
        "question_id",
        "answer1_id",
        "answer2_id",
        "category",
        "content",
        "tuple",
        "reviewer_id",
        "metadata",
    ]
    assert record["tuple"] == [2.0, 3.0]
    assert record["answer1_id"] == "a1"
    assert record["reviewer_id"] == "fake"
    assert record["metadata"]["order"] == [1, 2]
    assert record["metadata"]["models"] == ["a", "m"]
    assert record["metadata"]["lengths"] == [2, 3]


def test_many_are_judged_at_a_time_and_the_file_is_in_the_order_of_the_questions(
    tmp_path: Path,
) -> None:
    path = tmp_path / "r.jsonl"
    judge = FakeJudge()
    outcome = _run(path, [_case(i) for i in range(40)], judge, concurrency=4)
    assert judge.most == 4
    assert judge.closed
    assert outcome.judged == 40
    assert [record["question_id"] for record in _records(path)] == list(range(40))


def test_every_judgement_is_on_disk_while_others_are_still_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    seen: list[int] = []

    def cases() -> Iterator[Case]:
        for number in (1, 3, 5):
            yield _case(number)
            if number != 5:
                for _ in range(200):
                    if len(path.read_text().splitlines()) > len(seen):
                        break
                    threading.Event().wait(0.01)
            seen.append(len(path.read_text().splitlines()))

    _run(path, cases(), FakeJudge(), concurrency=4)
    assert seen[:2] == [1, 2]


def test_both_orders_and_samples_make_a_record_each(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    judge = FakeJudge()
    _run(path, [_case(1)], judge, orders="both", samples=2)
    assert sorted(judge.calls) == [(1, False), (1, False), (1, True), (1, True)]
    records = _records(path)
    assert [(r["metadata"]["order"], r["metadata"]["sample"]) for r in records] == [
        ([1, 2], 0),
        ([2, 1], 0),
        ([1, 2], 1),
        ([2, 1], 1),
    ]
    assert len({record["review_id"] for record in records}) == 4
    assert all(record["tuple"] == [2.0, 3.0] for record in records)


def test_a_random_order_is_fair_and_the_same_in_every_run(tmp_path: Path) -> None:
    judge, again = FakeJudge(), FakeJudge()
    _run(tmp_path / "r.jsonl", [_case(i) for i in range(60)], judge, orders="random")
    _run(tmp_path / "s.jsonl", [_case(i) for i in range(60)], again, orders="random")
    assert sorted(judge.calls) == sorted(again.calls)
    # 60 fair coins: outside 15..45 once in 20,000 seeds, and the seed is the question
    assert 15 < sum(swapped for _, swapped in judge.calls) < 45


def test_what_is_judged_is_not_judged_again(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    _run(path, [_case(i) for i in range(5)], FakeJudge())
    before = path.read_bytes()
    judge = FakeJudge()
    outcome = _run(path, [_case(i) for i in range(7)], judge)
    assert [call[0] for call in sorted(judge.calls)] == [5, 6]
    assert (outcome.reused, outcome.judged) == (5, 2)
    assert path.read_bytes().startswith(before)


def test_a_cut_file_is_continued_to_the_same_bytes(tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    cases = [_case(i) for i in range(8)]
    _run(whole, cases, FakeJudge(), orders="both")
    data = whole.read_bytes()
    for place in (0, 1, len(data) // 3, len(data) // 2, len(data) - 1):
        cut.write_bytes(data[:place])
        _run(cut, cases, FakeJudge(), orders="both")
        assert cut.read_bytes() == data


def test_a_changed_answer_is_judged_anew_and_replaces_its_old_review(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    _run(path, [_case(1), _case(2), _case(3)], FakeJudge())
    judge = FakeJudge()
    _run(path, [_case(1), _case(2, "changed"), _case(3)], judge)
    assert [call[0] for call in judge.calls] == [2]
    assert [(r["question_id"], r["tuple"]) for r in _records(path)] == [
        (1, [2.0, 3.0]),
        (2, [2.0, 7.0]),
        (3, [2.0, 3.0]),
    ]


def test_old_reviews_of_slots_that_a_later_run_does_not_fill_are_in_no_mean(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    _run(path, [_case(1), _case(2)], FakeJudge(), orders="both", samples=2)
    _run(path, [_case(1), _case(2, "changed")], FakeJudge(), orders="as-given")
    kept = latest(_records(path), with_words=True)
    assert [(r["question_id"], r["tuple"]) for r in kept if r["question_id"] == 2] == [
        (2, [2.0, 7.0])
    ]
    assert len([r for r in kept if r["question_id"] == 1]) == 4
    _run(path, [_case(1), _case(2, "changed")], FakeJudge("other rule"), orders="as-given")
    kept = latest(_records(path), with_words=True)
    assert [r["question_id"] for r in kept] == [1, 2]


def test_a_reworded_question_replaces_its_old_review(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    _run(path, [_case(1)], FakeJudge())
    case = _case(1)
    case.question["text"] = "What is it, really?"
    judge = FakeJudge()
    _run(path, [case], judge)
    assert len(judge.calls) == len(_records(path)) == 1


def test_another_rule_or_judge_judges_anew_and_only_the_rule_replaces(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    _run(path, [_case(1)], FakeJudge("r1"))
    _run(path, [_case(1)], FakeJudge("r2"))
    assert len(_records(path)) == 1
    other = FakeJudge("r2")
    other.name = "other"
    _run(path, [_case(1)], other)
    assert [record["reviewer_id"] for record in _records(path)] == ["fake", "other"]


def test_a_failed_review_is_kept_with_its_text_and_made_again_next_time(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    judge = FakeJudge()
    judge.broken = {2}
    outcome = _run(path, [_case(1), _case(2), _case(3)], judge)
    assert (outcome.judged, outcome.failed) == (2, 1)
    failed = _records(path)[1]
    assert failed["error"] == "the scores cannot be read"
    assert failed["tuple"] is None
    assert failed["content"] == "hm"
    judge.broken = set()
    outcome = _run(path, [_case(1), _case(2), _case(3)], judge)
    assert (outcome.judged, outcome.reused, outcome.failed) == (1, 2, 0)
    assert [record["question_id"] for record in _records(path)] == [1, 2, 3]
    assert not any("error" in record for record in _records(path))


def test_failed_reviews_of_an_earlier_run_do_not_outdate_what_is_newer(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    judge = FakeJudge()
    judge.broken = {1}
    _run(path, [_case(1)], judge, orders="both")
    assert len(_records(path)) == 2
    _make(path, [_case(1, "changed")], FakeJudge())  # it is killed after the first order
    tidy(path)
    assert ["error" in record for record in _records(path)] == [True, True, False]
    assert [r["tuple"] for r in latest(_records(path), with_words=True)] == [[2.0, 7.0]]


def test_a_run_that_is_killed_loses_no_failed_review(tmp_path: Path) -> None:
    def told() -> list[tuple[int, bool]]:
        return [(record["question_id"], "error" in record) for record in _records(path)]

    path = tmp_path / "r.jsonl"
    judge = FakeJudge()
    judge.broken = {1, 2}
    _run(path, [_case(1), _case(2)], judge)
    _make(path, [], FakeJudge())  # it is killed at once
    assert told() == [(1, True), (2, True)]
    _make(path, [_case(1)], FakeJudge())  # or after the first question
    assert told() == [(1, True), (2, True), (1, False)]
    outcome = _run(path, [_case(1)], FakeJudge())
    assert outcome.reused == 1
    assert told() == [(2, True), (1, False)]


def test_what_failed_before_and_is_left_out_now_stays_in_its_place(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    judge = FakeJudge()
    judge.broken = {2}
    cases = [_case(i) for i in range(4)]
    _run(path, cases[1:3], judge)
    outcome = _make(path, cases, judge, on_error="skip")
    tidy(path, outcome.judgements)
    assert [(r["question_id"], "error" in r) for r in _records(path)] == [
        (0, False),
        (1, False),
        (2, True),
        (3, False),
    ]


def test_failed_reviews_can_be_left_out_or_stop_the_run(tmp_path: Path) -> None:
    judge = FakeJudge()
    judge.broken = {2}
    path = tmp_path / "skip.jsonl"
    outcome = _run(path, [_case(1), _case(2)], judge, on_error="skip")
    assert outcome.failed == 1
    assert [record["question_id"] for record in _records(path)] == [1]
    with pytest.raises(JudgeError, match="question 2: the scores cannot be read"):
        _run(tmp_path / "f.jsonl", [_case(i) for i in range(9)], judge, on_error="fail")


def test_a_case_with_a_problem_is_a_failed_review_without_asking_the_judge(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    judge = FakeJudge()
    outcome = _run(path, [_case(1, problem="no answer in b.jsonl")], judge, samples=3)
    assert judge.calls == []
    assert outcome.failed == 1
    assert _records(path)[0]["error"] == "no answer in b.jsonl"


def test_whatever_a_judge_raises_about_one_case_is_one_failure(tmp_path: Path) -> None:
    class Odd(FakeJudge):
        def judge_hash(self, case: Case) -> str:
            if case.question_id == 1:
                raise RecursionError("too deep")
            return "f"

        async def judge(self, judgement: Judgement) -> Verdict:
            if judgement.case.question_id == 2:
                raise KeyError("x")
            return await super().judge(judgement)

    path = tmp_path / "r.jsonl"
    outcome = _run(path, [_case(i) for i in range(4)], Odd())
    assert (outcome.judged, outcome.failed) == (2, 2)
    errors = {r["question_id"]: r["error"] for r in _records(path) if "error" in r}
    assert errors == {
        1: "question 1: cannot be used (RecursionError: too deep)",
        2: "question 2: cannot be used (KeyError: 'x')",
    }


def test_lines_that_are_no_questions_fail_once_each_and_are_made_again(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    cases = [_case(1), *(Case(question={}, problem="q: is not JSON", line=n) for n in (2, 3))]
    for _ in range(2):
        outcome = _run(path, cases, FakeJudge(), orders="both")
        assert outcome.failed == 2
        records = _records(path)
        assert [(r.get("line"), r["question_id"]) for r in records] == [
            *[(None, 1), (None, 1)],
            *[(2, None), (3, None)],
        ]
    assert len(latest(records, with_words=False)) == 4


def test_a_judge_that_stops_leaves_what_is_finished_on_disk(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    judge = FakeJudge()
    judge.stops_at = 5
    with pytest.raises(JudgeError, match="the server is gone"):
        _run(path, (_case(i) for i in range(1000)), judge, concurrency=1)
    assert [record["question_id"] for record in _records(path)] == [0, 1, 2, 3, 4]
    assert judge.closed


def test_ctrl_c_while_reading_stops_the_judge_and_leaves_its_thread(tmp_path: Path) -> None:
    def cases() -> Iterator[Case]:
        yield _case(1)
        raise KeyboardInterrupt

    judge = FakeJudge()
    with pytest.raises(KeyboardInterrupt):
        _run(tmp_path / "r.jsonl", cases(), judge)
    assert judge.closed
    assert "judge" not in {thread.name for thread in threading.enumerate()}


def _wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


class SlowJudge(FakeJudge):
    """Takes a moment for each case, or waits for its turn for ever."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds
        self.sending: set[Any] = set()
        self.waiting: set[object] = set()

    async def judge(self, judgement: Judgement) -> Verdict:
        case = judgement.case
        self.calls.append((case.question_id, judgement.swapped))
        if case.question_id in self.waiting:
            await asyncio.sleep(60)
        self.sending.add(asyncio.current_task())
        await asyncio.sleep(self.seconds)
        return Verdict(scores=(1.0, 2.0), content="1 2")


def test_what_is_under_way_at_ctrl_c_is_finished_and_on_disk(tmp_path: Path) -> None:
    judge = SlowJudge(0.2)
    judge.waiting = {2}

    def cases() -> Iterator[Case]:
        for number in range(3):
            yield _case(number)
        _wait_for(lambda: len(judge.calls) == 3)
        raise KeyboardInterrupt

    path = tmp_path / "r.jsonl"
    with pytest.raises(KeyboardInterrupt):
        _run(path, cases(), judge, concurrency=3)
    # Two were under way; the third had its turn before it, and is not waited for.
    assert sorted(record["question_id"] for record in _records(path)) == [0, 1]
    assert judge.closed


def test_the_grace_ends(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    judge = SlowJudge(30.0)

    def cases() -> Iterator[Case]:
        yield _case(1)
        _wait_for(lambda: bool(judge.calls))
        raise KeyboardInterrupt

    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        _run(tmp_path / "r.jsonl", cases(), judge, grace_s=0.2)
    assert time.monotonic() - start < 15
    assert "up to 0.2 s for 1 judgements under way" in capsys.readouterr().err
    assert (tmp_path / "r.jsonl").read_text() == ""


def test_what_is_under_way_when_the_judge_gives_up_is_on_disk_too(tmp_path: Path) -> None:
    class Broken(SlowJudge):
        async def judge(self, judgement: Judgement) -> Verdict:
            if judgement.case.question_id == 3:
                await asyncio.sleep(0.05)
                raise JudgeError("the server is gone")
            return await super().judge(judgement)

    path = tmp_path / "r.jsonl"
    with pytest.raises(JudgeError, match="the server is gone"):
        _run(path, [_case(i) for i in range(50)], Broken(0.2), concurrency=4)
    assert [record["question_id"] for record in _records(path)] == [0, 1, 2]


def test_pairs_of_several_files_are_marked_and_keep_their_place_when_a_file_is_added(
    tmp_path: Path,
) -> None:
    path = tmp_path / "r.jsonl"
    alone = _case(1)
    _run(path, [alone], FakeJudge())
    judge = FakeJudge()
    pair = replace(alone, pair=(1, 2))
    other = replace(_case(1, "other"), models=("a", "n"), pair=(1, 3))
    outcome = _run(path, [pair, other], judge)
    # The first pair has been paid for already.
    assert (outcome.reused, outcome.judged) == (1, 1)
    assert [record["metadata"].get("pair") for record in _records(path)] == [None, [1, 3]]


def test_a_person_reads_a_review_in_a_line():
    review = {
        "question_id": 3,
        "category": "conv",
        "tuple": [8, 7.5],
        "metadata": {"order": [2, 1]},
    }
    assert in_words(review) == "3  conv  8 : 7.5 (swapped)"
    failed = {"question_id": 3, "category": "conv", "tuple": None, "error": "429\x1b[1m"}
    assert in_words(failed) == "3  conv  failed: 429[1m"
