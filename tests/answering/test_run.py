"""The run of `vqa` without a model: order, resume, failures, rounds of several processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from chatbind_cli.answering.answer_file import AnswerFile
from chatbind_cli.answering.crew import Alone
from chatbind_cli.answering.generation import Generated
from chatbind_cli.answering.run import Entry, Job, Outcome, Run
from chatbind_cli.errors import MediaError, RecordError, SomeRecordsFailed
from tests.answering.world import read_jsonl

MAKING = {"seed": 1}


class Fake:
    """Answers that depend on the batch, as floating-point numbers do; some questions fail."""

    def __init__(self, fails: Sequence[int] = ()) -> None:
        self.fails = fails
        self.batches: list[list[Any]] = []

    def __call__(self, batch: list[Entry]) -> list[Outcome]:
        self.batches.append([entry.id for entry in batch])
        return [self._one(entry, len(batch)) for entry in batch]

    def _one(self, entry: Entry, size: int) -> Outcome:
        if entry.problem is not None:
            return entry.problem
        if entry.id in self.fails:
            return MediaError("no such file", where=f"{entry.id}.png")
        return Generated(f"answer {entry.id} in a batch of {size}", 3, "stop")


class Two(Alone):
    """Two processes, as far as the run can see."""

    size = 2

    def __init__(self) -> None:
        self.rounds: list[int] = []

    def results(
        self, rounds: Iterable[Sequence[Any]], work: Callable[[Any], Any]
    ) -> Iterator[tuple[Any, Any]]:
        for batches in rounds:
            self.rounds.append(len(batches))
            for batch in batches:
                yield batch, work(batch)


def questions(*ids: int) -> Iterator[tuple[dict[str, Any], str]]:
    for line, identity in enumerate(ids, start=1):
        record = {"question_id": identity, "text": f"What is {identity}?", "category": "conv"}
        yield record, f"q.jsonl:{line}"


def run(
    path: Path | str,
    ids: Sequence[int],
    work: Fake,
    *,
    crew: Any = None,
    on_error: str = "record",
    stop_after: int | None = None,
) -> None:
    job = Job(model_id="m", making=MAKING, batch_size=4, on_error=on_error)
    with AnswerFile(path, model_id="m", making=MAKING) as output:
        done = 0

        def count(n: int) -> None:
            nonlocal done
            done += n
            if stop_after is not None and done >= stop_after:
                raise KeyboardInterrupt

        Run(output, crew or Alone(), work, job, count).answer(questions(*ids))


IDS = [10, 3, 7, 1, 8, 2, 6, 5, 4, 9]


def test_answers_come_in_the_order_of_the_questions(tmp_path: Path) -> None:
    work = Fake()
    run(tmp_path / "a.jsonl", IDS, work)
    records = read_jsonl(tmp_path / "a.jsonl")
    assert [record["question_id"] for record in records] == IDS
    assert work.batches == [IDS[:4], IDS[4:8], IDS[8:]]
    assert records[1] == {
        "question_id": 3,
        "prompt": "What is 3?",
        "text": "answer 3 in a batch of 4",
        "answer_id": records[1]["answer_id"],
        "model_id": "m",
        "category": "conv",
        "metadata": {"n_tokens": 3, "finish_reason": "stop", "seed": 1},
    }
    assert len({record["answer_id"] for record in records}) == len(IDS)


@pytest.mark.parametrize("kept_lines", [1, 3, 4, 6, 9])
def test_a_continued_run_computes_whole_batches_and_writes_what_is_missing(
    tmp_path: Path, kept_lines: int
) -> None:
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    run(whole, IDS, Fake())
    lines = whole.read_bytes().splitlines(keepends=True)
    cut.write_bytes(b"".join(lines[:kept_lines]) + lines[kept_lines][:20])
    work = Fake()
    run(cut, IDS, work)
    assert cut.read_bytes() == whole.read_bytes()
    # batches that were done are not computed again, the one in the middle is whole
    assert work.batches == [IDS[:4], IDS[4:8], IDS[8:]][kept_lines // 4 :]


def test_an_interrupted_run_leaves_whole_records(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with pytest.raises(KeyboardInterrupt):
        run(path, IDS, Fake(), stop_after=4)
    assert [record["question_id"] for record in read_jsonl(path)] == IDS[:4]


def test_a_failed_question_is_recorded_and_tried_again_in_its_place(tmp_path: Path) -> None:
    path, whole = tmp_path / "a.jsonl", tmp_path / "whole.jsonl"
    with pytest.raises(SomeRecordsFailed, match=r"2 of 10 questions failed; the first: 3.png"):
        run(path, IDS, Fake(fails=[3, 4]))
    records = read_jsonl(path)
    assert [record["question_id"] for record in records] == IDS
    assert records[1] == {
        "question_id": 3,
        "prompt": "What is 3?",
        "error": "3.png: no such file",
        "model_id": "m",
        "category": "conv",
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
        run(path, IDS, Fake(fails=[7]), on_error="fail")
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
    assert "left out: q.jsonl:3: question 1 stands at q.jsonl:1 already" in noted


def test_a_record_without_an_id_ends_the_run_after_what_came_before(tmp_path: Path) -> None:
    def records() -> Iterator[tuple[dict[str, Any], str]]:
        yield from questions(*IDS[:4])
        yield {"text": "Who am I?"}, "q.jsonl:5"

    path = tmp_path / "a.jsonl"
    job = Job(model_id="m", making=MAKING, batch_size=4)
    with (
        AnswerFile(path, model_id="m", making=MAKING) as output,
        pytest.raises(RecordError, match="q.jsonl:5: a record has no question_id"),
    ):
        Run(output, Alone(), Fake(), job).answer(records())
    assert len(read_jsonl(path)) == 4


def test_several_processes_get_the_same_batches(tmp_path: Path) -> None:
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    alone, together, crew = Fake(), Fake(), Two()
    run(one, IDS, alone)
    run(two, IDS, together, crew=crew)
    assert together.batches == alone.batches
    assert crew.rounds == [2, 1]
    assert two.read_bytes() == one.read_bytes()
