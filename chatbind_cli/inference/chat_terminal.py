"""The lines of a dialogue from a terminal: an editor with history, completion and several lines.

Imported where a person talks, and nowhere else: it brings prompt_toolkit.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document
from prompt_toolkit.enums import DEFAULT_BUFFER
from prompt_toolkit.filters import has_focus
from prompt_toolkit.history import FileHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import create_output
from prompt_toolkit.shortcuts import CompleteStyle

from chatbind_cli.console import note
from chatbind_cli.inference.chat_input import at_home, command_of, last_word, quoted, unfinished

_MOST_LISTED = 10_000  # names of a folder that are looked at


def terminal_lines(
    prompt: Callable[[], str], words: Collection[str], with_files: Collection[str]
) -> Iterator[str]:
    """What a person types, until Ctrl-D, or Ctrl-C twice where nothing is typed.

    Args:
        prompt: what stands before a line.
        words: the commands, for completion.
        with_files: those that file names follow.
    """
    session: PromptSession[str] = PromptSession(
        history=LineHistory(history_file()),
        completer=_Completer(words, with_files),
        complete_while_typing=False,
        complete_style=CompleteStyle.READLINE_LIKE,
        key_bindings=_keys(),
        multiline=True,
        prompt_continuation="... ",
        enable_suspend=True,
        # where one of them goes to a file, the other is the terminal
        output=create_output(always_prefer_tty=True),
    )
    leaving = False
    while True:
        try:
            line = session.prompt(prompt())
        except EOFError:
            return
        except KeyboardInterrupt:
            if leaving:
                return
            # what was said so far is worth more than one key
            note("Ctrl-C again or Ctrl-D leaves")
            leaving = True
            continue
        leaving = False
        yield line


def history_file() -> Path:
    """Where lines are kept: in the user's folder for state, by the XDG rules."""
    base = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(base) / "chatbind" / "history"


class LineHistory(FileHistory):
    """The lines of this and of earlier dialogues, for their user alone.

    A file that cannot be read or written is no reason to fail: there is then no history.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            path.touch(mode=0o600)

    def load_history_strings(self) -> Iterable[str]:
        """The lines, newest first."""
        with suppress(OSError):
            return super().load_history_strings()
        return ()

    def store_string(self, string: str) -> None:
        """Adds a line."""
        with suppress(OSError):
            super().store_string(string)


class _Completer(Completer):
    """Commands at the start of a line, and file names behind those that take them."""

    def __init__(self, words: Collection[str], with_files: Collection[str]) -> None:
        self._words = words
        self._with_files = with_files

    def get_completions(self, document: Document, event: CompleteEvent) -> Iterable[Completion]:
        """See `Completer`."""
        typed = document.text_before_cursor.lstrip()
        word, _ = command_of(typed)
        if typed.startswith("/") and not any(c.isspace() for c in typed):
            found = [name for name in self._words if name.startswith(typed)]
            yield from (Completion(f"{name} ", -len(typed), display=name) for name in found)
        elif word in self._with_files:
            start, value = last_word(typed)
            yield from _files(value, typed[start:])


def _files(value: str, raw: str) -> Iterator[Completion]:
    """The files whose names begin as `value` does, which stands as `raw` on the line."""
    folder, slash, begin = value.rpartition("/")
    place = at_home(f"{folder}{slash}") or "."
    with suppress(OSError, ValueError), os.scandir(place) as entries:
        found = []
        for entry in islice(entries, _MOST_LISTED):
            hidden = entry.name.startswith(".") and not begin.startswith(".")
            if entry.name.startswith(begin) and not hidden:
                found.append(entry.name + "/" * entry.is_dir())
        for name in sorted(found):
            text = quoted(f"{folder}{slash}{name}", raw)
            yield Completion(text, -len(raw), display=name)


def _keys() -> KeyBindings:
    """Enter sends a line, unless more is to follow; Alt-Enter begins another."""
    keys = KeyBindings()

    typing = has_focus(DEFAULT_BUFFER)  # and not searching

    @keys.add("enter", filter=typing)
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        text = buffer.document.text
        if buffer.document.is_cursor_at_the_end and text.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        elif unfinished(text):
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter", filter=typing)
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @keys.add("c-c", filter=typing)
    @keys.add("<sigint>")
    def _(event: KeyPressEvent) -> None:
        if event.current_buffer.text:
            event.current_buffer.reset()
        else:
            event.app.exit(exception=KeyboardInterrupt())

    return keys
