"""Training records: what is read, and what is refused by name."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from chatbind_cli.data.conversations import (
    Conversations,
    Media,
    media_of_record,
    parse_conversation,
)
from chatbind_cli.errors import RecordError
from chatbind_cli.jsonl import read_records
from chatbind_cli.media.medium import Medium


def record(*said: str, **keys: Any) -> dict[str, Any]:
    roles = ("human", "gpt")
    turns = [{"from": roles[i % 2], "value": text} for i, text in enumerate(said)]
    return {"id": "r1", "conversations": turns, **keys}


def read(*records: dict[str, Any]) -> Conversations:
    return Conversations((record, f"train.jsonl:{n}") for n, record in enumerate(records, 1))


def read_file(source: Path) -> Conversations:
    return Conversations(read_records(source))


def test_a_llava_array_is_read(tmp_path: Path) -> None:
    path = tmp_path / "train.json"
    path.write_text(json.dumps([record("<image>\nWhat?", "A dog.", image="a.jpg")] * 2, indent=1))
    first, second = read_file(path)
    assert first.media == (Medium("image", "a.jpg"),)
    assert [t.text for t in first.turns] == ["<image>\nWhat?", "A dog."]
    assert first.where != second.where


def test_media_stand_in_the_order_of_their_placeholders() -> None:
    (one,) = read(
        record(
            "Is <audio> from <image>?", "No.", "And <image>?", "Yes.",
            image=["a.jpg", "b.jpg"], audio="x.wav",
        )
    )  # fmt: skip
    assert [m.ref for m in one.media] == ["x.wav", "a.jpg", "b.jpg"]
    assert one.turns[2].media == (Medium("image", "b.jpg"),)


def test_alpaca_rows_and_text_only_records_are_read() -> None:
    alpaca = {"instruction": "Add.", "input": "1 2", "output": "3"}
    bare = {"instruction": "Sing.", "input": "", "output": "La."}
    rows = read(alpaca, bare, record("Hi", "Hello"))
    assert [c.turns[0].text for c in rows] == ["Add.\n1 2", "Sing.", "Hi"]
    assert [c.turns[1].text for c in rows] == ["3", "La.", "Hello"]
    assert all(c.media == () for c in rows)


def test_a_placeholder_in_an_answer_is_text() -> None:
    (one,) = read(record("How do I embed sound?", "Use <audio>."))
    assert one.turns[1].content == ("Use <audio>.",)


def test_a_record_may_begin_with_an_answer() -> None:
    turns = [{"from": "gpt", "value": "Welcome!"}, *record("Hi", "Hello")["conversations"]]
    (one,) = read({"id": 3, "conversations": turns})
    assert [t.role for t in one.turns] == ["gpt", "human", "gpt"]
    assert one.id == 3


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (record("<image> a", "b"), r"1 <image> placeholder\(s\).*but 0 under the key image"),
        (record("a", "b", image="x"), r"0 <image> placeholder\(s\).*but 1 under the key image"),
        (record("<image> <image>", "b", image="x"), "2 <image>.*but 1"),
        (record("<image>", "b", audio="x"), "1 <image>.*but 0"),
        (record("<image>", "b", image=7), "image must be a file name or a list"),
        (record("<image>", "b", image=[""]), "image must be a file name or a list"),
        (record("a"), "the last turn is not an answer"),
        ({"id": "r1", "conversations": []}, "at least one turn"),
        ({"id": "r1", "conversations": "x"}, "must be a list"),
        ({"id": "r1", "conversations": [{"from": "gpt"}]}, "turn 1 has no text under value"),
        ({"id": "r1", "conversations": ["x"]}, "turn 1 has no text under value"),
        (
            {"id": "r1", "conversations": [{"from": "system", "value": "x"}]},
            "turn 1 is from 'system'; the roles are human and gpt",
        ),
        (
            {"id": "r1", "conversations": [{"from": "human", "value": "x"}] * 2},
            "turns 1 and 2 are both from human",
        ),
        ({"id": "r1"}, "neither conversations nor instruction"),
        ({"id": "r1", "instruction": "x"}, "has no output"),
        ({"id": "r1", "instruction": "x", "output": 3}, "output must be text"),
        ({"id": ["r1"], "instruction": "x", "output": "y"}, "id must be text or a number"),
    ],
)
def test_a_record_that_cannot_be_used_is_named(broken: dict[str, Any], message: str) -> None:
    with pytest.raises(RecordError, match=message) as caught:
        read(record("Hi", "Hello"), broken)
    assert str(caught.value).startswith("train.jsonl:2")
    if isinstance(broken.get("id"), str):
        assert "id r1" in str(caught.value)


def test_the_media_of_a_question_record_are_its_modality_keys() -> None:
    question = {"question_id": 1, "text": "?", "audio": ["a.wav", "b.wav"], "image": None}
    assert [m.ref for m in media_of_record(question)] == ["a.wav", "b.wav"]


def test_many_are_held_like_a_list() -> None:
    rows = read(*(record(f"question {i}", f"answer {i}") for i in range(5)))
    assert len(rows) == 5
    assert rows[4].turns[0].text == "question 4"
    assert [c.turns[1].text for c in rows][1:3] == ["answer 1", "answer 2"]
    assert list(pickle.loads(pickle.dumps(rows))) == list(rows)
    with pytest.raises(IndexError):
        rows[5]


def test_half_an_emoji_survives() -> None:
    one = record("\ud83d", "ok")
    assert Conversations([(one, "f:1")])[0] == parse_conversation(one, "f:1")


def test_what_goes_in_comes_out_whole() -> None:
    one = record("a <video> b\n<imu>", "“naïve”\u2028", video="v", imu="i")
    assert Conversations([(one, "f:1")])[0] == parse_conversation(one, "f:1")


def test_those_that_name_a_medium_can_be_left_out() -> None:
    rows = read(record("a", "b"), record("<image>", "c", image="x"), record("d", "e"))
    assert [c.turns[1].text for c in rows.without({Medium("image", "x")})] == ["b", "e"]


def test_a_conversation_is_seen_once_with_each_encoder_that_knows_its_media() -> None:
    rows = read(
        record("a", "b"),
        record("<image>", "c", image="x"),
        record("<imu> <image>", "d", imu="m", image="y"),
        record("<imu>", "e", imu="m"),
        record("<audio>", "f", audio="s"),
    )
    seen = rows.viewed([{"image", "video"}, {"image", "imu"}])

    def said(some: Conversations) -> list[tuple[str, int]]:
        return [(one.turns[1].text, some.view(number)) for number, one in enumerate(some)]

    # what nobody knows is seen once, for somebody to complain about
    assert said(seen) == [("b", 0), ("c", 0), ("c", 1), ("d", 0), ("d", 1), ("e", 1), ("f", 0)]
    assert list(seen.sizes()) == [rows.sizes()[n] for n in (0, 1, 1, 2, 2, 3, 4)]
    assert list(Media(seen)) == list(Media(rows))
    assert said(pickle.loads(pickle.dumps(seen))) == said(seen)
    assert said(seen.without({Medium("image", "y")})) == [
        ("b", 0), ("c", 0), ("c", 1), ("e", 1), ("f", 0),
    ]  # fmt: skip
    # of one encoder nothing changes, and after a draw everything is seen as often
    assert said(rows.viewed([{"image"}])) == said(rows)
    assert len(rows.seen([2], 0).viewed([{"image", "video"}, {"image", "imu"}])) == 2 * len(seen)
    with pytest.raises(IndexError):
        seen.view(7)


def test_a_record_costs_little_more_than_its_text() -> None:
    some = [
        record("<image>\nRender a clear and concise summary of the photo.", "a dog", image="x")
        for _ in range(1000)
    ]
    before = pa.total_allocated_bytes()
    rows = Conversations((one, f":{i}") for i, one in enumerate(some))
    held = pa.total_allocated_bytes() - before
    assert held / len(rows) < 300  # bytes; as Python objects it takes about 1,000
