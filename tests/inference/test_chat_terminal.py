"""Lines typed on a real terminal: editing, history, completion, several lines, Ctrl-C."""

from __future__ import annotations

import json
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from chatbind_cli.inference.chat_input import file_words, last_word, quoted
from chatbind_cli.inference.chat_terminal import LineHistory, history_file
from tests.terminal import Terminal

# each line as it was taken, or how the dialogue ended
TYPED = """
import json
import sys
from chatbind_cli.inference.chat_terminal import terminal_lines
words = ["/attach", "/audio", "/media", "/save"]
for line in terminal_lines(lambda: "say>", words, ["/attach", "/save"]):
    print("taken", json.dumps(line), flush=True)
print("left")
"""
ENTER, ALT_ENTER, TAB, UP, HOME = "\r", "\x1b\r", "\t", "\x1b[A", "\x01"
CTRL_C, CTRL_D = "\x03", "\x04"


@pytest.fixture
def terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Terminal]:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("HOME", str(tmp_path))
    with started(tmp_path) as terminal:
        yield terminal


def started(folder: Path) -> Terminal:
    terminal = Terminal([sys.executable, "-c", TYPED], cwd=folder)
    terminal.read_until("say>")
    return terminal


def taken(terminal: Terminal, *keys: str) -> str:
    """The line that the keys type."""
    for key in keys:
        terminal.write(key)
    terminal.write(ENTER)
    terminal.read_until("taken ")
    line = json.loads(terminal.read_until("\r\n"))
    terminal.read_until("say>")  # until then the kernel itself takes Ctrl-C and Ctrl-D
    return line


def test_lines_are_edited_and_may_have_several_lines(terminal: Terminal) -> None:
    assert taken(terminal, "is this?", HOME, "What ") == "What is this?"
    assert taken(terminal, "one", ALT_ENTER, "two") == "one\ntwo"
    assert taken(terminal, "one\\", ENTER, "two\\", ENTER, "three") == "one\ntwo\nthree"
    assert taken(terminal, '"""', ENTER, "one", ENTER, 'two"""') == '"""\none\ntwo"""'
    assert taken(terminal, '/system """one', ENTER, 'two"""') == '/system """one\ntwo"""'
    assert taken(terminal, "\x1b[200~pasted\nlines\x1b[201~") == "pasted\nlines"
    assert taken(terminal, 'said """so"""') == 'said """so"""'


def test_lines_are_kept_for_the_next_dialogue_and_for_the_user_alone(
    terminal: Terminal, tmp_path: Path
) -> None:
    taken(terminal, "first\x1b\rof two")
    taken(terminal, "second")
    terminal.write(CTRL_D)
    terminal.read_until("left")
    assert terminal.wait() == 0
    file = history_file()
    assert file.is_relative_to(tmp_path / "state")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    with started(tmp_path) as again:
        assert taken(again, UP) == "second"
        assert taken(again, "\x12fir", ENTER) == "first\nof two"


def test_commands_and_file_names_are_completed(terminal: Terminal, tmp_path: Path) -> None:
    (tmp_path / "media" / "deep").mkdir(parents=True)
    for name in ("my dog.png", "tone.wav", "deep/it's.png", ".hidden"):
        (tmp_path / "media" / name).touch()
    assert taken(terminal, "/at", TAB, "me", TAB, "to", TAB, "@0.5") == "/attach media/tone.wav@0.5"
    assert taken(terminal, "/attach media/m", TAB, " x") == "/attach media/my\\ dog.png x"
    assert taken(terminal, "/attach 'media/m", TAB) == "/attach 'media/my dog.png'"
    assert taken(terminal, '/save "media/de', TAB, "it", TAB) == '/save "media/deep/it\'s.png"'
    assert taken(terminal, "/attach --thermal ~/me", TAB, "t", TAB).endswith("~/media/tone.wav")
    assert taken(terminal, "/media m", TAB) == "/media m"
    # several: they are shown, and what they share is typed
    terminal.write("/attach media/" + TAB + TAB)
    shown = terminal.read_until("tone.wav")
    assert "my dog.png" in shown
    assert ".hidden" not in shown
    assert taken(terminal) == "/attach media/"
    terminal.write("/m" + TAB + TAB)
    assert taken(terminal) == "/media "


def test_ctrl_c_clears_a_line_and_asks_once_more_at_an_empty_one(terminal: Terminal) -> None:
    terminal.write("half a line" + CTRL_C)
    assert taken(terminal, "whole") == "whole"
    terminal.write(CTRL_C)
    terminal.read_until("Ctrl-C again or Ctrl-D leaves")
    terminal.read_until("say>")
    # one that does not follow at once does not leave
    assert taken(terminal, "more") == "more"
    terminal.write(CTRL_C)
    terminal.read_until("Ctrl-C again or Ctrl-D leaves")
    terminal.read_until("say>")
    terminal.write(CTRL_C)
    terminal.read_until("left")
    assert terminal.wait() == 0


def test_what_goes_to_a_file_is_kept_from_the_editor(terminal: Terminal, tmp_path: Path) -> None:
    file = tmp_path / "out.txt"
    line = ["/bin/sh", "-c", 'exec "$0" -c "$1" > "$2"', sys.executable, TYPED, str(file)]
    with Terminal(line, cwd=tmp_path) as piped:
        piped.read_until("say>")
        piped.write(f"What?{ENTER}")
        piped.read_until("say>")
        piped.write(CTRL_D)
        assert piped.wait() == 0
    assert file.read_text() == 'taken "What?"\nleft\n'


def test_a_dialogue_does_without_a_history_that_cannot_be_kept(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    nowhere = LineHistory(tmp_path / "file" / "no" / "folder")
    nowhere.store_string("x")
    assert list(nowhere.load_history_strings()) == []
    folder = LineHistory(tmp_path)
    folder.store_string("x")
    assert list(folder.load_history_strings()) == []


@pytest.mark.parametrize("name", ["plain.png", "my dog.png", "it's.png", 'a"b\\c.png', "a$b;c.png"])
@pytest.mark.parametrize("like", ["", "'", '"'])
def test_what_is_completed_is_read_as_that_name(name: str, like: str) -> None:
    text = quoted(name, like)
    assert file_words(f"before.png {text}") == ["before.png", name]
    start, value = last_word(f"before.png {text}")
    assert (start, value) == (len("before.png "), name)
    begun = text[: len(text) // 2]
    assert name.startswith(last_word(begun)[1])


def test_history_is_where_the_rules_of_xdg_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    assert history_file() == Path("/home/me/.local/state/chatbind/history")
