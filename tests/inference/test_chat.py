"""Dialogues: commands, memory, failures, interrupts."""

from __future__ import annotations

import io
import json
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from chatbind_cli.errors import CheckpointError
from chatbind_cli.inference.answer_view import PlainView
from chatbind_cli.inference.answerer import Answerer
from chatbind_cli.inference.chat import Chat
from chatbind_cli.inference.chat_commands import COMMANDS, Repl
from chatbind_cli.inference.generation_settings import GenerationSettings
from chatbind_cli.inference.loaded_model import load_model
from chatbind_cli.inference.questions import Question
from chatbind_cli.media.medium import Medium
from chatbind_cli.model.turns import answer as turn_of
from tests.inference.world import World
from tests.model.tiny import CHATML

SHORT = GenerationSettings(max_new_tokens=8)
DRAWN = replace(SHORT, temperature=2.0, seed=7)


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


def dialogue(
    answerer: Answerer,
    out: io.StringIO | None = None,
    *,
    settings: GenerationSettings = SHORT,
    **more: Any,
) -> Repl:
    view = None if out is None else PlainView(out)
    return Repl(Chat(answerer, settings, model_id="m", view=view, **more))


def chat(answerer: Answerer, *lines: str, out: Kept | None = None) -> list[str]:
    out = out or Kept()
    dialogue(answerer, out).run(lines)
    return out.answers


def prompts(talk: Repl, answerer: Answerer, question: str) -> list[int]:
    """The token ids of the prompt that a further question would be."""
    [asked] = talk.chat.prepare([Question(question)])
    prompt = talk.chat._in_dialogue(asked).prompt
    assert prompt is not None
    return prompt.input_ids


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
    assert noted[1] == "chatbind: /dance is no command; /help lists what there is"


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


@pytest.mark.parametrize("word", ["/thermal", "/attach --thermal"])
def test_what_content_does_not_tell_can_be_said(
    world: World, answerer: Answerer, word: str
) -> None:
    image = world.media / "2.png"
    [answer] = chat(answerer, f"{word} {image}@0.5", "What is this?")
    warm = Medium("thermal", str(image), 0.5)
    assert answer == answerer.answer("What is this?", [warm], settings=SHORT)


def test_file_names_are_written_as_in_a_shell_or_as_they_are(
    world: World, answerer: Answerer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "it's 2.png").write_bytes((world.media / "2.png").read_bytes())
    monkeypatch.chdir(tmp_path)
    talk = dialogue(answerer, Kept())
    spellings = ["it's 2.png", "~/it's 2.png@0.5", '"it\'s 2.png"', "it\\'s\\ 2.png@2"]
    talk.run([f"/attach {name}" for name in spellings])
    talk.run([f"/attach --thermal {world.media}/0.png --depth {world.media}/1.png@3"])
    name = "it's 2.png"
    assert talk.chat.waiting == [
        Medium(None, name),
        Medium(None, str(tmp_path / name), 0.5),
        Medium(None, name),
        Medium(None, name, 2.0),
        Medium("thermal", f"{world.media}/0.png"),
        Medium("depth", f"{world.media}/1.png", 3.0),
    ]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("/attach", "no file to attach; write /attach FILE or /attach FILE@0.5"),
        ("/attach 'a.png", "a quote is not closed in 'a.png"),
        ("/attach --colour a.png", "there is no --colour; there are --image, --video"),
        ("/attach -", "-: no such file"),
        ("/attachh a.png", "/attachh is no command; did you mean /attach?"),
        ("/drop", "nothing waits for a question"),
        ("/undo", "nothing was asked yet"),
        ("/retry", "nothing was asked yet"),
        ("/save a.jsonl", "nothing was said yet"),
        ("/save", "/save takes one file name"),
        ("/load a.jsonl b.jsonl", "/load takes one file name"),
        ("What\udcff?", "the question is not UTF-8 text"),
    ],
)
def test_a_line_that_cannot_be_done_says_why(
    answerer: Answerer, capsys: pytest.CaptureFixture[str], line: str, said: str
) -> None:
    assert chat(answerer, line) == []
    assert said in capsys.readouterr().err


def test_all_files_of_a_line_are_attached_or_none(world: World, answerer: Answerer) -> None:
    talk = dialogue(answerer, Kept())
    talk.run([f"/attach {world.media}/0.png nowhere.png"])
    assert talk.chat.waiting == []


def test_a_path_at_the_start_of_a_question_is_no_command(answerer: Answerer) -> None:
    assert len(chat(answerer, "/usr/share is what?", "/1 and /2?")) == 2


def test_media_and_drop_tell_and_let_go(
    world: World, answerer: Answerer, capsys: pytest.CaptureFixture[str]
) -> None:
    image, sound = world.media / "2.png", world.media / "tone.wav"
    out = Kept()
    talk = dialogue(answerer, out)
    talk.run([f"/attach {image}@0.5", "What is\nthis?", "And?", f"/attach {sound}", "/media"])
    assert capsys.readouterr().err.splitlines() == [
        "1. 2.png@0.5: What is this?",
        "waiting: tone.wav",
    ]
    assert talk.prompt == "[tone.wav] > "
    talk.run(["/drop"])
    assert talk.prompt == "> "
    without = prompts(talk, answerer, "Now?")
    again = dialogue(answerer, Kept())
    again.run([f"/attach {image}@0.5", "What is\nthis?", "And?"])
    assert without == prompts(again, answerer, "Now?")


def test_a_system_text_is_set_shown_and_given_up(
    answerer: Answerer, capsys: pytest.CaptureFixture[str]
) -> None:
    out = Kept()
    lines = ["/system A red car.", "/system", "What?", "/reset", "What?", "/system -", "/reset"]
    dialogue(answerer, out).run([*lines, "/system", "What?"])
    told = Question("What?", system="A red car.")
    [answer] = answerer.generate(answerer.prepare([told]), SHORT)
    plain = answerer.answer("What?", settings=SHORT)
    assert out.answers == [answer.text, answer.text, plain]
    assert plain != answer.text
    assert capsys.readouterr().err.splitlines() == ["A red car.", "the model's own"]


def test_a_model_that_takes_no_system_text_says_so_at_once(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded = load_model(world.model, device="cpu")
    takes_none = CHATML.replace("in messages", "in messages if m.role != 'system'")
    loaded.bundle.tokenizer.chat_template = takes_none
    answerer = Answerer(loaded, style="chat")
    out = Kept()
    dialogue(answerer, out).run(["/system Be brief.", "/system", "What?"])
    noted = capsys.readouterr().err.splitlines()
    assert "the tokenizer's chat template takes no system text" in noted[0]
    assert noted[1] == "the model's own"
    assert len(out.answers) == 1
    with pytest.raises(CheckpointError):
        dialogue(answerer, out).chat.system = "Be brief."


def test_undo_forgets_the_last_question_alone(answerer: Answerer) -> None:
    first, _, second = chat(answerer, "What is this?", "A bird?", "/undo", "And the dog?")
    assert [first, second] == chat(answerer, "What is this?", "And the dog?")


def test_retry_asks_again_about_the_same(
    world: World, answerer: Answerer, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ["A bird?", f"/attach {world.media / '2.png'}", "What is this?", "/retry", "And?"]
    _, first, again, after = chat(answerer, *lines)
    assert first == again
    assert "without --temperature the same question has the same answer" in capsys.readouterr().err
    lines.remove("/retry")
    assert chat(answerer, *lines)[-1] == after


def test_retry_draws_with_another_seed(
    answerer: Answerer, capsys: pytest.CaptureFixture[str]
) -> None:
    dialogue(answerer, settings=DRAWN).run(["What is this?", "/retry", "/retry", "And?"])
    told = capsys.readouterr()
    assert told.err == ""
    records = [json.loads(line) for line in told.out.splitlines()]
    assert [record["metadata"]["seed"] for record in records] == [7, 8, 9, 7]
    assert len({record["text"] for record in records[:3]}) == 3
    dialogue(answerer, settings=replace(DRAWN, seed=8)).run(["What is this?"])
    assert json.loads(capsys.readouterr().out)["text"] == records[1]["text"]


def test_records_tell_the_seconds_of_the_answer_alone(
    answerer: Answerer, capsys: pytest.CaptureFixture[str]
) -> None:
    def lines() -> Iterator[str]:
        yield "/system A red car."
        time.sleep(1.0)
        yield "What?"

    start = time.monotonic()
    dialogue(answerer).run(lines())
    took = time.monotonic() - start
    record = json.loads(capsys.readouterr().out)
    assert record["metadata"]["seconds"] <= took - 1.0
    assert record["metadata"]["system"] == "A red car."


def test_verbose_tells_tokens_and_time(
    answerer: Answerer, capsys: pytest.CaptureFixture[str]
) -> None:
    out = Kept()
    talk = dialogue(answerer, out, verbose=True)
    length = len(prompts(talk, answerer, "What?"))
    talk.run(["What?"])
    [told] = capsys.readouterr().err.splitlines()
    found = re.fullmatch(
        r"chatbind: 8 tokens, ([\d.]+) tokens/s, the first after ([\d.]+) s; "
        rf"{length} tokens in the prompt",
        told,
    )
    assert found
    assert float(found[1]) > 0
    # tokens without a word: all of them are those of a stop text
    stopped = replace(SHORT, stop=(out.answers[0][:15],))
    dialogue(answerer, out, settings=stopped, verbose=True).run(["What?"])
    assert out.answers[1] == ""
    assert re.match(r"chatbind: [2-8] tokens, ", capsys.readouterr().err)


def test_a_full_context_leaves_the_oldest_out_and_says_so(
    world: World, answerer: Answerer, capsys: pytest.CaptureFixture[str]
) -> None:
    long = "What about the brown dog? " * 15  # a fifth of the context
    out = Kept()
    talk = dialogue(answerer, out)
    talk.run([f"/attach {world.media / '2.png'}", *[f"{n} {long}" for n in range(9)], "/media"])
    assert len(out.answers) == 9
    told = capsys.readouterr().err.splitlines()
    noted = [line for line in told if "the context is full" in line]
    assert noted
    left_out = talk.chat.left_out
    assert noted[-1].endswith(
        f"the model does not know the first {left_out} of 8 questions and their answers"
    )
    assert told[-1].startswith("1. 2.png (no longer read): 0 What")
    assert len(noted) < left_out  # several at once: the turns between read what is new alone
    # the last answer is that of what is left, for which there is room, but not for much more
    history = [
        turn
        for said in talk.chat.exchanges[:8]
        for turn in (said.question.turn, turn_of(said.answer))
    ]
    longest = answerer.engine.longest_context
    assert longest is not None
    [last] = answerer.prepare([Question(f"8 {long}".strip())])
    sizes = [
        len(answerer.prompts.prompt([*history[2 * n :], last.turn]).input_ids)
        for n in (left_out - 2, left_out)
    ]
    assert sizes[0] + 8 > longest >= sizes[1] + 8
    wanted = answerer.answer(f"8 {long}".strip(), history=history[2 * left_out :], settings=SHORT)
    assert out.answers[-1] == wanted
    too_long = "What about the brown dog? " * 200
    talk.run([too_long])
    assert "and the model reads 512 at most" in capsys.readouterr().err
    assert talk.chat.left_out == left_out
    talk.run(["/undo"] * 9)
    talk.run(["What is this?", "And the dog?"])
    assert out.answers[-2:] == chat(answerer, "What is this?", "And the dog?")


def test_an_accident_ends_a_line_and_not_the_dialogue(
    world: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    answerer = Answerer.from_pretrained(world.model, device="cpu")
    out = Kept()
    talk = dialogue(answerer, out)
    talk.run(["What?"])
    before = list(talk.chat.exchanges)

    def out_of_memory(*_: Any) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as broken:
        broken.setattr(answerer.engine, "answer", out_of_memory)
        talk.run(["And?", "/retry"])
    noted = capsys.readouterr().err.splitlines()
    assert [line for line in noted if "RuntimeError: out of memory" in line] == noted[::2]
    assert talk.chat.exchanges == before
    assert len(out.answers) == 1  # of what failed before its first word no line is there to end
    talk.run(["And?"])
    assert len(talk.chat.exchanges) == 2


def test_nobody_who_reads_on_ends_the_dialogue(answerer: Answerer) -> None:
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        dialogue(answerer, Closed()).run(["What?", "And?"])


def test_help_names_every_command(answerer: Answerer, capsys: pytest.CaptureFixture[str]) -> None:
    chat(answerer, "/help")
    told = capsys.readouterr().err
    assert {word for word, command in COMMANDS.items() if command.help} <= set(told.split())
    assert max(map(len, told.splitlines())) <= 120


def test_a_text_in_triple_quotes_has_its_lines(answerer: Answerer) -> None:
    talk = dialogue(answerer, Kept())
    talk.run(['"""\nWhat?\nNow?\n"""', '/system """A\ncar."""'])
    assert talk.chat.exchanges[0].question.text == "What?\nNow?"
    assert talk.chat.system == "A\ncar."


def test_an_interrupt_before_the_answer_keeps_what_waits(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(media: Sequence[Medium]) -> None:
        raise KeyboardInterrupt

    answerer = Answerer.from_pretrained(world.model, device="cpu")
    talk = dialogue(answerer, Kept())
    with monkeypatch.context() as slow:
        slow.setattr(answerer.media_encoder, "read", interrupted)
        talk.run([f"/attach {world.media / '2.png'}", "What is this?"])
    assert talk.chat.exchanges == []
    assert talk.chat.waiting == [Medium(None, str(world.media / "2.png"))]


def test_an_interrupt_between_questions_ends_the_dialogue(answerer: Answerer) -> None:
    def lines() -> Iterator[str]:
        yield "What is this?"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        dialogue(answerer, io.StringIO()).run(lines())
