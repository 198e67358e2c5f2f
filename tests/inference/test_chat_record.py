"""Dialogues that are written down and taken up again."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

from chatbind_cli.data.conversations import parse_conversation
from chatbind_cli.inference.answer_view import PlainView
from chatbind_cli.inference.answerer import Answerer
from chatbind_cli.inference.chat import Chat
from chatbind_cli.inference.chat_commands import Repl
from chatbind_cli.inference.generation_settings import GenerationSettings
from chatbind_cli.inference.questions import Question
from tests.inference.world import World

SHORT = GenerationSettings(max_new_tokens=8)


@pytest.fixture(scope="module")
def answerer(world: World) -> Answerer:
    return Answerer.from_pretrained(world.model, device="cpu")


def dialogue(answerer: Answerer, *lines: str, mix: bool = False) -> Repl:
    talk = Repl(Chat(answerer, SHORT, model_id="m", view=PlainView(io.StringIO()), mix=mix))
    talk.run(lines)
    return talk


def prompt(talk: Repl) -> tuple[list[int], list[Any]]:
    """The next prompt's ids, and the embeddings and weights in it."""
    [asked] = talk.chat.prepare([Question("Now?")])
    sample = talk.chat._in_dialogue(asked).prompt
    assert sample is not None
    media = [(m.weight, m.embedding.tolist()) for m in sample.media if m.embedding is not None]
    return sample.input_ids, media


def talked(world: World, answerer: Answerer) -> Repl:
    media = world.media
    return dialogue(
        answerer,
        "/system A red car.",
        f"/attach {media}/2.png@0.5",
        f"/attach {media}/tone.wav",
        f"/attach --thermal {media}/4.png",
        "What is <audio> here?",
        "And\tnow?",
        f"/attach {media}/0.png@3",
        "And this?",
    )


def test_a_dialogue_is_taken_up_where_it_was_left(
    world: World, answerer: Answerer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "talk.jsonl"
    talk = talked(world, answerer)
    talk.run([f"/save {file}"])
    [record] = map(json.loads, file.read_text().splitlines())
    # a conversation as training reads it
    conversation = parse_conversation(record, "f:1")
    assert [turn.role for turn in conversation.turns] == ["human", "gpt"] * 3
    assert [m.modality for m in conversation.media] == ["audio", "image", "thermal", "image"]
    again = dialogue(answerer, "Something else?", f"/load {file}")
    assert prompt(again) == prompt(talk)
    assert again.chat.system == "A red car."
    again.run(["/undo", "/undo", "Now?"])
    talk.run(["/undo", "/undo", "Now?"])
    assert again.chat.exchanges[-1].answer == talk.chat.exchanges[-1].answer
    assert capsys.readouterr().err.count("goes on after 3 questions and answers") == 1
    again.run([f"/load {file}", f"/save {tmp_path / 'twice.jsonl'}"])
    assert (tmp_path / "twice.jsonl").read_bytes() == file.read_bytes()


def test_a_file_of_ones_own_is_replaced_and_anothers_is_not(
    world: World, answerer: Answerer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine, theirs = tmp_path / "mine.jsonl", tmp_path / "theirs.jsonl"
    theirs.write_text(json.dumps({"id": 1, "conversations": []}) + "\n")
    dialogue(answerer, "One?", f"/save {mine}", "Two?", f"/save {mine}", f"/save {theirs}")
    assert len(json.loads(mine.read_text())["conversations"]) == 4
    assert len(theirs.read_text()) < 50
    noted = capsys.readouterr().err.splitlines()
    assert "theirs.jsonl: is there already, and is not a file of records" in noted[-1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.jsonl", "theirs.jsonl"]
    dialogue(answerer, "One?", f"/save {tmp_path / 'mine.jsonl' / 'x.jsonl'}")
    assert "cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"image": ["gone.png", "gone.png"]}, "gone.png: no such file"),
        ({"weights": [1.0]}, "1 weights for 4 media"),
        ({"weights": ["1", 1, 1, 1]}, "weights must be a finite number"),
        ({"system": 3}, "system must be text"),
        ({"mix": "yes"}, "mix true or false"),
        ({"left_out": 4}, "left_out is not a number of its 3 questions"),
        ({"left_out": True}, "left_out is not a number of its 3 questions"),
        ({"image": None}, "placeholder(s) in the questions, but 0 under the key image"),
        ({"conversations": [{"from": "gpt", "value": "x"}]}, "under the key"),
    ],
)
def test_a_record_that_cannot_be_taken_up_leaves_the_chat_as_it_was(
    world: World,
    answerer: Answerer,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: dict[str, Any],
    said: str,
) -> None:
    file = tmp_path / "talk.jsonl"
    talked(world, answerer).run([f"/save {file}"])
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}) + "\n")
    talk = dialogue(answerer, "/system Be.", "Something else?")
    before = prompt(talk), list(talk.chat.exchanges)
    talk.run([f"/load {file}"])
    assert said in capsys.readouterr().err
    assert (prompt(talk), talk.chat.exchanges) == before
    assert talk.chat.system == "Be."


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "No such file"),
        ("", "has no record"),
        ("{}\n", "has neither conversations"),
        ('{"conversations": [{"from": "gpt", "value": "x"}]}\n' * 2, "has several records"),
        ('{"conversations": [{"from": "gpt", "value": "x"}]}\n', "begins with an answer"),
        ("what?\n", "talk.jsonl:1"),
    ],
)
def test_a_file_without_a_dialogue_says_what_it_is(
    answerer: Answerer,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    text: str | None,
    said: str,
) -> None:
    file = tmp_path / "talk.jsonl"
    if text is not None:
        file.write_text(text)
    dialogue(answerer, f"/load {file}")
    [noted] = capsys.readouterr().err.splitlines()
    assert said in noted
    assert str(file) in noted


def test_a_dialogue_that_mixes_media_is_taken_up_as_such(
    world: World, answerer: Answerer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "talk.jsonl"
    lines = [f"/attach {world.media}/2.png@-0.5", "What?", f"/save {file}"]
    talk = dialogue(answerer, *lines, mix=True)
    again = dialogue(answerer, f"/load {file}")
    assert prompt(again) == prompt(talk)
    assert again.chat.mix
    file.unlink()
    lines.insert(1, f"/attach {world.media}/tone.wav")
    capsys.readouterr()
    dialogue(answerer, *lines, mix=True)
    assert "what was mixed of several" in capsys.readouterr().err
    assert not file.exists()


def test_a_placeholder_that_is_but_a_word_is_not_written_as_a_medium(
    world: World, answerer: Answerer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "talk.jsonl"
    lines = ["What is <image>?", f"/attach {world.media}/2.png", "And?", f"/save {file}"]
    dialogue(answerer, *lines)
    assert "cannot tell which of the placeholders" in capsys.readouterr().err
    assert not file.exists()


def test_what_a_full_context_left_out_stays_left_out(
    world: World, answerer: Answerer, tmp_path: Path
) -> None:
    file = tmp_path / "talk.jsonl"
    long = "What about the brown dog? " * 15
    talk = dialogue(answerer, *[long] * 6, f"/save {file}")
    assert talk.chat.left_out > 0
    again = dialogue(answerer, f"/load {file}")
    assert len(again.chat.exchanges) == 6
    assert again.chat.left_out == talk.chat.left_out
    assert prompt(again) == prompt(talk)
