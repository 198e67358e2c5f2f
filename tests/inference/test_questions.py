"""Question records: what they may hold, what answers carry on."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from chatbind_cli.errors import MediaError, RecordError
from chatbind_cli.inference.answer_record import AnswerRecords
from chatbind_cli.inference.decoding import Generated
from chatbind_cli.inference.question_record import read_question
from chatbind_cli.jsonl import Line
from chatbind_cli.media.medium import Medium
from chatbind_cli.media.root import MediaRoot


def test_a_record_names_several_media_of_several_kinds() -> None:
    record = {
        "question_id": "q1",
        "audio": "a.wav",
        "text": "<image>, <audio>, <image>?",
        "image": ["x.png", "y.png"],
    }
    question = read_question(Line(record, "q:1", 1))
    assert question.media == (
        Medium("audio", "a.wav"),
        Medium("image", "x.png"),
        Medium("image", "y.png"),
    )


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"question_id": 1}, "q:1: a question has no text"),
        ({"question_id": 1, "text": " "}, "a question has no text"),
        ({"question_id": 1, "text": "?", "image": 7}, "image must be a file name"),
        ({"text": "?"}, "q:1: a record has no question_id or id"),
    ],
)
def test_a_record_that_cannot_be_asked_says_why(record: dict[str, object], message: str) -> None:
    problem = read_question(Line(record, "q:1", 1)).problem
    assert isinstance(problem, RecordError)
    assert re.search(message, str(problem))


def test_an_answer_carries_on_what_the_question_says_of_itself() -> None:
    record = {
        "question_id": 4,
        "text": "What?",
        "category": "conv",
        "image": "x.png",
        "audio": "data:audio/wav;base64,AAAA",
        "reference": "a dog",
        "metadata": {"of": "the question"},
    }
    question = read_question(Line(record, "q:1", 1))
    generated = Generated("A cat.", 3, "stop")
    form = AnswerRecords("m", {"a": 1})
    answer = form.answer(question, generated)
    carried = {key: answer.get(key) for key in ("category", "image", "reference", "audio", "text")}
    assert carried == {
        "category": "conv",
        "image": "x.png",
        "reference": "a dog",
        "audio": None,
        "text": "A cat.",
    }
    assert answer["metadata"] == {"n_tokens": 3, "finish_reason": "stop", "a": 1}
    failed = form.failure(question, MediaError("no such file", where="x.png"))
    assert failed["error"] == "x.png: no such file"
    assert failed["text"] == ""
    # for readers that know no errors
    assert answer.keys() < failed.keys()


def test_the_id_of_an_answer_depends_on_all_that_made_it() -> None:
    def identity(text: str = "A.", model: str = "m", image: str = "x", seed: int = 0) -> str:
        record = {"question_id": 1, "text": "?", "image": image}
        question, metadata = read_question(Line(record, "q:1", 1)), {"seed": seed}
        made = AnswerRecords(model, metadata).answer(question, Generated(text, 1, "stop"))
        return str(made["answer_id"])

    different = [identity(), identity("B."), identity(model="n"), identity(image="y")]
    assert len({*different, identity(seed=1)}) == 5
    assert identity() == identity()


def test_media_stay_in_their_root(tmp_path: Path) -> None:
    folder = tmp_path / "val2014"
    folder.mkdir()
    (folder / "COCO_val2014_7.jpg").write_bytes(b"x")
    (tmp_path / "secret.jpg").write_bytes(b"x")
    root = MediaRoot(folder)
    assert root.open("7.jpg").path == folder / "COCO_val2014_7.jpg"
    for name in ("../secret.jpg", str(tmp_path / "secret.jpg"), "file:///etc/passwd"):
        with pytest.raises(MediaError):
            root.open(name)
    assert MediaRoot(folder, allow_outside=True).open("../secret.jpg").size == 1
    assert root.open("data:image/png;base64,AAAA").size == 3
