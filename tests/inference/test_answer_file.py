"""The file of answers: continued by id, in the order of the questions, never mixed."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from chatbind_cli.errors import RecordError
from chatbind_cli.inference.answer_file import AnswerFile
from chatbind_cli.inference.answer_record import AnswerRecords
from chatbind_cli.inference.decoding import Generated
from chatbind_cli.inference.question_record import read_question
from chatbind_cli.inference.questions import Question
from chatbind_cli.jsonl import Line
from tests.inference.world import read_jsonl, write_jsonl


def opened(path: Path, **options: Any) -> AnswerFile:
    return AnswerFile(path, AnswerRecords("m", {"seed": 1}), **options)


def question(identity: int, line: int = 0) -> Question:
    return read_question(Line({"question_id": identity, "text": "?"}, f"q:{line or identity}", 0))


def generated(identity: int) -> Generated:
    return Generated(f"a{identity}", 1, "stop")


def answer(identity: int, **more: Any) -> dict[str, Any]:
    form = AnswerRecords("m", {"seed": 1})
    return form.answer(question(identity), generated(identity)) | more


def run(path: Path, identities: list[int], **options: Any) -> list[int]:
    """Answers what is missing; returns which those were."""
    written = []
    with closing(opened(path, **options)) as file:
        for identity in identities:
            asked = question(identity)
            if file.wants(asked):
                file.write(asked, generated(identity))
                written.append(identity)
        file.finish()
    return written


def test_a_question_that_failed_before_ends_up_in_its_place(tmp_path: Path) -> None:
    undisturbed, path = tmp_path / "undisturbed.jsonl", tmp_path / "a.jsonl"
    run(undisturbed, [3, 1, 2, 4])
    write_jsonl(path, [answer(3), {"question_id": 1, "error": "gone", "model_id": "m"}, answer(2)])
    assert run(path, [3, 1, 2, 4]) == [1, 4]
    assert path.read_bytes() == undisturbed.read_bytes()


def test_a_half_written_line_is_written_again(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [answer(1), answer(2)])
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    assert run(path, [1, 2]) == [2]
    assert path.read_bytes() == whole


def test_answers_to_other_questions_stay_behind(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [answer(9), answer(2)])
    run(path, [1, 2])
    assert [record["question_id"] for record in read_jsonl(path)] == [1, 2, 9]


def test_nothing_is_lost_when_the_run_ends_early(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [answer(2)])
    with closing(opened(path)) as file:
        file.wants(question(1))
        file.write(question(1), generated(1))
    assert [record["question_id"] for record in read_jsonl(path)] == [2, 1]
    assert run(path, [1, 2]) == []
    assert [record["question_id"] for record in read_jsonl(path)] == [1, 2]


def test_another_models_file_is_not_continued(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [answer(1, model_id="other")])
    with pytest.raises(RecordError, match="has model_id 'other', but this run has 'm'"):
        opened(path)


@pytest.mark.parametrize(
    ("there", "message"),
    [
        ({"seed": 2}, "made with seed 2, this run has 1"),
        ({"seed": 1, "top_p": 0.5}, "made with top_p 0.5, this run has None"),
    ],
)
def test_a_file_made_with_other_settings_is_not_continued(
    tmp_path: Path, there: dict[str, Any], message: str
) -> None:
    records = [{"question_id": 0, "error": "x"}, answer(1, metadata={"n_tokens": 3, **there})]
    path = write_jsonl(tmp_path / "a.jsonl", records)
    with pytest.raises(RecordError, match=f"{message}.*--overwrite"):
        opened(path)
    assert run(path, [1], overwrite=True) == [1]


def test_a_file_without_metadata_is_continued(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [answer(1, metadata=None)])
    assert run(path, [1, 2]) == [2]
    assert json.loads(path.read_text().splitlines()[1])["question_id"] == 2


def test_the_first_place_of_an_id_is_remembered(tmp_path: Path) -> None:
    with closing(opened(tmp_path / "a.jsonl", on_error="fail")) as file:
        assert file.wants(question(1))
        with pytest.raises(RecordError, match="^q:7: question 1 stands at q:1 already"):
            file.wants(question(1, line=7))


def test_a_person_reads_question_and_answer():
    in_words = AnswerRecords("m", {}).in_words
    answer = {"question_id": 7, "prompt": "What is it?", "text": "A dog.\x1b[2J"}
    assert in_words(answer) == "7  What is it?\n    A dog.[2J"
    assert in_words({"question_id": 7, "error": "no such file"}) == "7\n    error: no such file"
