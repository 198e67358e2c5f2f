"""Dialogues: instructions, memory, failures, interrupts."""

from __future__ import annotations

import io
from collections.abc import Iterator

import pytest

from chatbind_cli.inference.answerer import Answerer
from chatbind_cli.inference.chat import Chat
from chatbind_cli.inference.generation_settings import GenerationSettings
from chatbind_cli.inference.questions import Question
from chatbind_cli.media.medium import Medium
from chatbind_cli.model.turns import answer as turn_of
from tests.inference.world import World

SHORT = GenerationSettings(max_new_tokens=8)


@pytest.fixture(scope="module")
def answerer(world: World) -> Answerer:
    return Answerer.from_pretrained(world.model, device="cpu")


class Kept(io.StringIO):
    """Keeps the answers, each as one text; a line end that comes alone ends one."""

    def __init__(self) -> None:
        super().__init__()
        self.answers: list[str] = []

    def write(self, text: str) -> int:
        if text == "\n":
            self.answers.append(self.getvalue())
            self.seek(0)
            self.truncate()
            return 1
        return super().write(text)


class InterruptedOnce(Kept):
    """As if the user pressed Ctrl-C at the first piece of the first answer."""

    def write(self, text: str) -> int:
        length = super().write(text)
        if not self.answers:
            raise KeyboardInterrupt
        return length


def chat(answerer: Answerer, *lines: str, out: Kept | None = None) -> list[str]:
    out = out or Kept()
    Chat(answerer, SHORT, model_id="m", out=out).run(iter(lines))
    return out.answers


def test_a_dialogue_remembers_what_was_said(world: World, answerer: Answerer) -> None:
    image = world.media / "2.png"
    first, second = chat(answerer, f"/attach {image}", "What is this?", "And the dog?")
    assert first == answerer.answer("What is this?", [image], settings=SHORT)
    [with_image] = answerer.prepare([Question("What is this?", (Medium(None, image),))])
    assert with_image.turn
    history = [with_image.turn, turn_of(first)]
    assert second == answerer.answer("And the dog?", history=history, settings=SHORT)
    assert second != answerer.answer("And the dog?", settings=SHORT)


def test_reset_forgets_and_quit_ends(world: World, answerer: Answerer) -> None:
    lines = ["What is this?", "/attach nowhere.png", "/reset", "", "And the dog?", "/quit", "More?"]
    answers = chat(answerer, *lines)
    assert len(answers) == 2
    assert answers[1] == answerer.answer("And the dog?", settings=SHORT)


def test_a_line_that_fails_leaves_a_note_and_the_dialogue_goes_on(
    answerer: Answerer, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ["/attach nowhere.png", "What is this?", "/dance", "And the dog?"]
    answers = chat(answerer, *lines)
    assert answers == chat(answerer, "What is this?", "And the dog?")
    noted = capsys.readouterr().err.splitlines()
    assert "nowhere.png: no such file" in noted[0]
    assert "/dance is no instruction" in noted[1]
    assert "/attach FILE" in noted[1]


def test_an_interrupt_ends_the_answer_and_not_the_dialogue(answerer: Answerer) -> None:
    lines = ["What is this brown dog?", "And the dog?"]
    first, second = chat(answerer, *lines, out=InterruptedOnce())
    whole = answerer.answer("What is this brown dog?", settings=SHORT)
    assert whole.startswith(first)
    assert first != whole
    [asked] = answerer.prepare([Question("What is this brown dog?")])
    assert asked.turn
    history = [asked.turn, turn_of(first)]
    assert second == answerer.answer("And the dog?", history=history, settings=SHORT)


def test_what_content_does_not_tell_can_be_said(world: World, answerer: Answerer) -> None:
    image = world.media / "2.png"
    [answer] = chat(answerer, f"/thermal {image}@0.5", "What is this?")
    warm = Medium("thermal", str(image), 0.5)
    assert answer == answerer.answer("What is this?", [warm], settings=SHORT)


def test_an_interrupt_between_questions_ends_the_dialogue(answerer: Answerer) -> None:
    def lines() -> Iterator[str]:
        yield "What is this?"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Chat(answerer, SHORT, model_id="m", out=io.StringIO()).run(lines())
