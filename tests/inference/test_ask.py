"""`chatbind ask`: where the question comes from, what it is about, how the answer is shown."""

from __future__ import annotations

import contextlib
import io
import json
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from chatbind_cli import cli
from chatbind_cli.inference.answerer import Answerer
from chatbind_cli.inference.generation_settings import GenerationSettings
from chatbind_cli.inference.questions import Question
from chatbind_cli.media.medium import Medium
from tests.inference.world import World, start
from tests.terminal import Terminal

TAB, CTRL_C = "\t", "\x03"
SHORT = GenerationSettings(max_new_tokens=8)


@pytest.fixture(scope="module")
def answerer(world: World) -> Answerer:
    return Answerer.from_pretrained(world.model, device="cpu")


class Tty(io.StringIO):
    """A page that is a terminal."""

    def isatty(self) -> bool:
        return True


def words(world: World, *more: str | Path) -> list[str]:
    fixed = ["ask", "-m", world.model, "--device", "cpu", "--max-new-tokens", "8"]
    return [*map(str, fixed), *map(str, more)]


def ask(world: World, *more: str | Path, stdin: str | bytes | None = None) -> Result:
    return CliRunner().invoke(cli.app, words(world, *more), input=stdin)


@pytest.mark.parametrize("way", ["argument", "--query", "stdin", "-"])
def test_a_question_is_an_argument_an_option_or_standard_input(
    world: World, answerer: Answerer, way: str
) -> None:
    image = world.media / "2.png"
    question = "What is this?"
    given: dict[str, list[str]] = {"argument": [question], "--query": ["--query", question]}
    stdin = question + "\n" if way in ("stdin", "-") else None
    line = ["--input-file", image, *given.get(way, ["-"] if way == "-" else [])]
    result = ask(world, *line, stdin=stdin)
    assert result.exception is None
    assert result.stdout == answerer.answer(question, [image], settings=SHORT) + "\n"


def test_several_media_in_the_order_of_the_options(world: World, answerer: Answerer) -> None:
    image, sound = world.media / "2.png", world.media / "tone.wav"
    question = "What is <audio> beside <image>?"
    wanted = answerer.answer(question, [image, sound], settings=SHORT)
    assert ask(world, "-a", image, "-a", sound, question).stdout == wanted + "\n"
    assert ask(world, "--image", image, "--audio", sound, question).stdout == wanted + "\n"
    wanted = answerer.answer("Both?", [sound, Medium("thermal", image)], settings=SHORT)
    assert ask(world, "-a", sound, "--thermal", image, "Both?").stdout == wanted + "\n"


def test_a_medium_may_come_from_standard_input(world: World, answerer: Answerer) -> None:
    image = world.media / "4.png"
    result = ask(world, "-a", "-", "What is this?", stdin=image.read_bytes())
    assert result.stdout == answerer.answer("What is this?", [image], settings=SHORT) + "\n"


def test_a_language_model_with_a_projector_answers(world: World) -> None:
    image = str(world.media / "4.png")
    whole = ask(world, "-a", image, "What is this?")
    line = ["ask", "-m", world.llama, "--projector", world.projector, "--device", "cpu", "-a"]
    line += [image, "What is this?", "--max-new-tokens", "8", "--prompt-style", "vicuna_v1_1"]
    parts = CliRunner().invoke(cli.app, [str(word) for word in line])
    assert parts.exception is None
    assert parts.stdout == whole.stdout


def test_json_prints_one_record_with_media_tokens_and_seconds(world: World) -> None:
    image = world.media / "2.png"
    line = ["--json", "-a", f"{image}@0.5", "--audio", world.media / "tone.wav", "What?"]
    result = ask(world, *line)
    [text] = result.stdout.splitlines()
    record: dict[str, Any] = json.loads(text)
    assert record["prompt"] == "What?"
    assert record["model_id"] == "model"
    metadata = record["metadata"]
    assert metadata["seconds"] > 0
    assert (metadata["n_tokens"], metadata["finish_reason"]) == (8, "length")
    assert [(m["modality"], m["weight"]) for m in metadata["media"]] == [
        ("image", 0.5),
        ("audio", 1.0),
    ]
    assert all(len(m["sha256"]) == 64 for m in metadata["media"])
    mixed = json.loads(ask(world, *line, "--mix").stdout)
    assert mixed["metadata"]["mix"] is True
    assert mixed["text"] != record["text"]
    assert json.loads(ask(world, *line).stdout)["answer_id"] == record["answer_id"]


def test_a_chat_reads_questions_line_by_line(world: World, answerer: Answerer) -> None:
    image = world.media / "2.png"
    stdin = f"/attach {image}\nWhat is this?\n/quit\n"
    result = ask(world, "--chat", "Describe a bird.", stdin=stdin)
    first = answerer.answer("Describe a bird.", settings=SHORT)
    assert result.exception is None
    assert result.stdout.startswith(first + "\n")
    assert len(result.stdout) > len(first) + 2


def test_a_chat_names_a_missing_file_at_once_and_goes_on(world: World, answerer: Answerer) -> None:
    result = ask(world, "--chat", stdin="/attach gone.png\nDescribe a bird.\n")
    assert "gone.png: no such file" in result.stderr
    answer = answerer.answer("Describe a bird.", settings=SHORT)
    assert result.stdout == answer + "\n"


@pytest.mark.parametrize(
    ("line", "stdin", "message"),
    [
        (["-a", "-"], "", "standard input cannot be both a medium and the question"),
        (["-a", "-", "-a", "-", "What?"], "", "both a medium and a medium"),
        (["-a", "-", "--chat"], "", "both a medium and the dialogue"),
        (["What?", "--query", "What?"], "", "the question is given twice"),
        ([], " \n", "standard input has no question"),
        ([], b"What\xff?\n", "the question is not UTF-8 text"),
        (["--system", "Be\udcff.", "What?"], "", "the system text is not UTF-8 text"),
        (["-a", "@0.5", "What?"], "", "an attachment has no file name"),
        (["--top-p", "2", "What?"], "", "2.0 is not in the range"),
    ],
)
def test_words_that_do_not_fit_together_are_usage_errors(
    world: World, line: list[str], stdin: str | bytes, message: str
) -> None:
    result = ask(world, *line, stdin=stdin)
    assert getattr(result.exception, "exit_code", result.exit_code) == 2
    assert message in f"{result.exception}{result.stderr}"


def test_a_file_that_cannot_be_read_is_one_line_and_exit_code_1(world: World) -> None:
    code, message = cli.run(words(world, "-a", world.media / "gone.png", "What?"))
    assert code == 1
    assert message.startswith("chatbind: error: ")
    assert message.endswith("gone.png: no such file")


@pytest.mark.slow
def test_the_answer_is_readable_while_it_grows_and_ctrl_c_ends_it(world: World) -> None:
    line = words(world, "-a", world.media / "2.png", "--max-new-tokens", "450", "What is this?")
    process = start(*line)
    assert process.stdout is not None
    first = process.stdout.read1(64)  # type: ignore[attr-defined]
    assert first
    assert process.poll() is None
    time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    rest, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert (first + rest).endswith(b"\n")
    assert stderr.decode().splitlines() == ["chatbind: interrupted"]


@pytest.mark.slow
def test_a_person_talks_on_a_terminal(world: World, tmp_path: Path) -> None:
    program = [sys.executable, "-m", "chatbind_cli"]
    line = [*words(world, "--chat", "--verbose", "--max-new-tokens", "450")]
    with Terminal([*program, *line], cwd=world.folder) as terminal:
        terminal.read_until(">\b")
        terminal.write(f"/attach media/2{TAB}\r")
        terminal.read_until("[2.png] >")
        terminal.write("What is this?\r")
        terminal.read_until("\x1b[?25l")  # drawn over: the answer grows
        terminal.read_until("\x1b[2K")
        terminal.write(CTRL_C)
        terminal.read_until("chatbind: the answer was interrupted")
        terminal.read_until(">\b")
        terminal.write("/media\r")
        terminal.read_until("1. 2.png: What is this?")
        terminal.read_until(">\b")
        terminal.write(f"half a line{CTRL_C}{CTRL_C}")
        terminal.read_until("chatbind: Ctrl-C again or Ctrl-D leaves")
        terminal.read_until(">\b")
        terminal.write("/retry\r")
        terminal.read_until("450 tokens, ")
        terminal.read_until(">\b")
        terminal.write(CTRL_C)
        terminal.read_until(">\b")
        terminal.write(CTRL_C)
        assert terminal.wait() == 0


def test_a_pipe_needs_neither_editor_nor_markdown(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("chat_terminal", "markdown_view"):
        monkeypatch.setitem(sys.modules, f"chatbind_cli.inference.{name}", None)
    result = ask(world, "--chat", stdin="What?\n")
    assert (result.exception, result.stderr) == (None, "")
    assert result.stdout


def test_a_system_text_changes_the_answer(world: World, answerer: Answerer) -> None:
    told = ask(world, "--system", "A red car.", "What is this?")
    [asked] = answerer.prepare([Question("What is this?", system="A red car.")])
    [wanted] = answerer.generate([asked], SHORT)
    assert told.stdout == wanted.text + "\n"
    assert told.stdout != ask(world, "What is this?").stdout


def test_verbose_and_plain_reach_the_answer(
    world: World, answerer: Answerer, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = ask(world, "--verbose", "What is this?")
    assert re.fullmatch(r"chatbind: 8 tokens, .* tokens in the prompt\n", told.stderr)
    assert ask(world, "What is this?").stderr == ""
    monkeypatch.setenv("TERM", "xterm")
    pages = {}
    for line in ([], ["--plain"]):
        pages[*line] = page = Tty()
        with contextlib.redirect_stdout(page):
            assert cli.run(words(world, *line, "What is this?")) == (0, "")
    assert pages["--plain",].getvalue() == told.stdout
    assert "\x1b[" in pages[()].getvalue()


def test_a_chat_goes_on_after_a_line_that_is_no_text(world: World) -> None:
    result = ask(world, "--chat", stdin=b"What\xff?\nDescribe a bird.\n")
    assert result.exception is None
    assert "the question is not UTF-8 text" in result.stderr
    assert result.stdout.count("\n") == 1
