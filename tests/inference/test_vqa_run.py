"""The run of `vqa` without a model: order, resume, failures."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import islice
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest

from chatbind_cli.data.work_queue import Worker, work_queue
from chatbind_cli.errors import MediaError, RecordError, SomeRecordsFailed
from chatbind_cli.inbox import Inbox
from chatbind_cli.inference.answer_file import AnswerFile
from chatbind_cli.inference.answer_record import AnswerRecords
from chatbind_cli.inference.decoding import Generated, Outcome
from chatbind_cli.inference.question_record import read_question
from chatbind_cli.inference.questions import Question
from chatbind_cli.inference.vqa import answer_all
from chatbind_cli.jsonl import Line, dumps, read_lines
from chatbind_cli.worker_pool import WorkerPool
from tests.inference.world import read_jsonl

METADATA = {"seed": 1}


class Fake:
    """Answers, the last of those that are there first; some questions fail.

    Attributes:
        asked: the questions that came, in turn.
    """

    def __init__(self, fails: Sequence[int] = (), *, at_once: int = 4) -> None:
        self.fails = fails
        self.asked: list[Any] = []
        self._at_once = at_once

    def work(self, inbox: Inbox[Question]) -> Iterator[tuple[Question, Outcome]]:
        while batch := list(islice(iter(inbox.take, None), self._at_once)):
            self.asked += [question.id for question in batch]
            for question in reversed(batch):
                # the engine gives out what it has made of a question
                yield replace(question, turn=None), self._one(question)

    def _one(self, question: Question) -> Outcome:
        if question.problem is not None:
            return question.problem
        if question.id in self.fails:
            return MediaError("no such file", where=f"{question.id}.png")
        return Generated(f"answer {question.id}", 3, "stop")


def questions(*ids: int) -> Iterator[Line]:
    for line, identity in enumerate(ids, start=1):
        record = {"question_id": identity, "text": f"What is {identity}?", "category": "conv"}
        yield Line(record, f"q.jsonl:{line}", line)


def run(
    path: Path | str,
    ids: Sequence[int],
    work: Fake,
    *,
    on_error: str = "record",
    stop_after: int | None = None,
) -> None:
    answer_lines(questions(*ids), path, work, on_error, stop_after)


def answer_lines(
    lines: Iterable[Line],
    output: Path | str,
    work: Fake,
    on_error: str = "record",
    stop_after: int | None = None,
) -> None:
    done = 0

    def count() -> None:
        nonlocal done
        done += 1
        if done == stop_after:
            raise KeyboardInterrupt

    file = AnswerFile(output, AnswerRecords("m", METADATA), on_error=on_error)
    with (
        closing(file),
        work_queue(WorkerPool(), lambda: Worker(work.work, 1), attrgetter("key")) as queue,
    ):
        answer_all(map(read_question, lines), file, queue, count)


IDS = [10, 3, 7, 1, 8, 2, 6, 5, 4, 9]


def test_answers_come_in_the_order_of_the_questions(tmp_path: Path) -> None:
    work = Fake()
    run(tmp_path / "a.jsonl", IDS, work)
    records = read_jsonl(tmp_path / "a.jsonl")
    assert [record["question_id"] for record in records] == IDS
    assert work.asked == IDS
    assert records[1] == {
        "question_id": 3,
        "prompt": "What is 3?",
        "text": "answer 3",
        "answer_id": records[1]["answer_id"],
        "model_id": "m",
        "category": "conv",
        "metadata": {"n_tokens": 3, "finish_reason": "stop", "seed": 1},
    }
    assert len({record["answer_id"] for record in records}) == len(IDS)


@pytest.mark.parametrize("kept_lines", [1, 3, 4, 6, 9])
def test_a_continued_run_answers_what_is_missing(tmp_path: Path, kept_lines: int) -> None:
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    run(whole, IDS, Fake())
    # as answers were done, which is in no order
    lines = sorted(whole.read_bytes().splitlines(keepends=True))
    cut.write_bytes(b"".join(lines[:kept_lines]) + lines[kept_lines][:20])
    there = {json.loads(line)["question_id"] for line in lines[:kept_lines]}
    work = Fake()
    run(cut, IDS, work)
    assert cut.read_bytes() == whole.read_bytes()
    assert work.asked == [one for one in IDS if one not in there]


def test_standard_output_has_the_order_of_the_questions(
    capsys: pytest.CaptureFixture[str],
) -> None:
    run("-", IDS, Fake())
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [record["question_id"] for record in records] == IDS


def test_a_file_has_each_answer_as_soon_as_it_is_there(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with pytest.raises(KeyboardInterrupt):
        run(path, IDS, Fake(), stop_after=6)
    assert [record["question_id"] for record in read_jsonl(path)] == [1, 7, 3, 10, 5, 6]


def test_an_interrupted_run_leaves_whole_records(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with pytest.raises(KeyboardInterrupt):
        run(path, IDS, Fake(), stop_after=4)
    assert {record["question_id"] for record in read_jsonl(path)} == set(IDS[:4])


def test_a_failed_question_is_recorded_and_tried_again_in_its_place(tmp_path: Path) -> None:
    path, whole = tmp_path / "a.jsonl", tmp_path / "whole.jsonl"
    with pytest.raises(SomeRecordsFailed, match=r"2 of 10 questions failed; the first: 3.png"):
        run(path, IDS, Fake(fails=[3, 4]))
    records = read_jsonl(path)
    assert [record["question_id"] for record in records] == IDS
    assert records[1] == {
        "question_id": 3,
        "prompt": "What is 3?",
        "text": "",
        "error": "3.png: no such file",
        "answer_id": records[1]["answer_id"],
        "model_id": "m",
        "category": "conv",
        "metadata": {},
    }
    before = path.read_bytes()
    with pytest.raises(SomeRecordsFailed):
        run(path, IDS, Fake(fails=[3, 4]))
    assert path.read_bytes() == before
    run(path, IDS, Fake())
    run(whole, IDS, Fake())
    assert path.read_bytes() == whole.read_bytes()


def test_failures_can_be_left_out(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with pytest.raises(SomeRecordsFailed, match="1 of 10"):
        run(path, IDS, Fake(fails=[3]), on_error="skip")
    assert [record["question_id"] for record in read_jsonl(path)] == [i for i in IDS if i != 3]


def test_the_first_failure_can_end_the_run(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with pytest.raises(MediaError, match="7.png: no such file"):
        run(path, IDS, Fake(fails=[7], at_once=1), on_error="fail")
    assert [record["question_id"] for record in read_jsonl(path)] == [10, 3]


def test_of_two_questions_with_one_id_the_first_is_answered(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.jsonl"
    for _ in range(2):
        with pytest.raises(SomeRecordsFailed, match="1 of 3"):
            run(path, [1, 2, 1], Fake())
        assert [record["question_id"] for record in read_jsonl(path)] == [1, 2]
    noted = capsys.readouterr().err
    assert "left out: 1 questions whose id stands before: 1\n" in noted


def test_many_doubled_questions_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SomeRecordsFailed, match="100 of 105 questions failed"):
        run(tmp_path / "a.jsonl", [*range(5), *[3] * 100], Fake())
    assert capsys.readouterr().err == (
        "chatbind: left out: 100 questions whose id stands before: 3\n"
    )


def mixed_lines(path: Path) -> list[dict[str, Any]]:
    """Ten lines, of which the even ones are good; what is to be written of them."""
    bad = [
        b"not json",
        b'{"question_id": null, "text": "a"}',
        b'{"question_id": [1], "text": "b"}',
        b'{"question_id": 4, "text": "c", "weight": NaN}',
        b'{"text": "d", "line": 7, "error": "e"}',
    ]
    good = [dumps(line.record).encode() for line in questions(*range(5))]
    path.write_bytes(b"\n".join(one for pair in zip(bad, good, strict=True) for one in pair))
    return [
        {"line": 1, "error": f"{path}:1: is not JSON (Expecting value)"},
        {"line": 3, "error": f"{path}:3: question_id must be text or a whole number, not None"},
        {"line": 5, "error": f"{path}:5: question_id must be text or a whole number, not [1]"},
        {"line": 7, "question_id": 4, "error": f"{path}:7: has a number that is too large, or NaN"},
        {"line": 9, "error": f"{path}:9: a record has no question_id or id"},
    ]


def test_a_line_that_is_no_question_is_a_failed_record_in_its_place(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    failed = mixed_lines(tmp_path / "q.jsonl")
    with pytest.raises(SomeRecordsFailed, match="5 of 10"):
        answer_lines(read_lines(tmp_path / "q.jsonl"), path, Fake())
    first = path.read_bytes()
    records = read_jsonl(path)
    assert [{key: r[key] for key in f} for r, f in zip(records[::2], failed, strict=True)] == failed
    assert [record["question_id"] for record in records[1::2]] == [0, 1, 2, 3, 4]
    assert records[0] == {
        **failed[0],
        "question_id": None,
        "prompt": "",
        "text": "",
        "answer_id": records[0]["answer_id"],
        "model_id": "m",
        "metadata": {},
    }
    work = Fake()
    with pytest.raises(SomeRecordsFailed, match="5 of 10"):
        answer_lines(read_lines(tmp_path / "q.jsonl"), path, work)
    assert path.read_bytes() == first


def test_lines_that_are_no_questions_can_be_left_out_or_end_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mixed_lines(tmp_path / "q.jsonl")
    with pytest.raises(SomeRecordsFailed, match="5 of 10"):
        answer_lines(read_lines(tmp_path / "q.jsonl"), tmp_path / "skipped.jsonl", Fake(), "skip")
    assert [r["question_id"] for r in read_jsonl(tmp_path / "skipped.jsonl")] == [0, 1, 2, 3, 4]
    assert capsys.readouterr().err.count("chatbind: left out: ") == 5
    (tmp_path / "one.jsonl").write_bytes(
        b"".join(dumps(line.record).encode() + b"\n" for line in questions(8, 9)) + b"?"
    )
    with pytest.raises(RecordError, match="one.jsonl:3: is not JSON"):
        answer_lines(
            read_lines(tmp_path / "one.jsonl"), tmp_path / "failed.jsonl", Fake(at_once=1), "fail"
        )
    assert [r["question_id"] for r in read_jsonl(tmp_path / "failed.jsonl")] == [8, 9]


def test_no_questions_are_a_note(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path / "a.jsonl", [], Fake())
    assert capsys.readouterr().err == "chatbind: there are no questions\n"
