"""What a line of a dialogue says: its words, and file names as people and shells write them."""

from __future__ import annotations

import shlex
from pathlib import Path

from chatbind_cli.errors import UsageError
from chatbind_cli.media.medium import is_there

QUOTES = '"""'
"""Stands around a text of several lines."""


def check_utf8(words: str, what: str = "the question") -> None:
    """Refuses bytes that are no text; Python carries them as halves of surrogate pairs.

    Raises:
        UsageError: there are some.
    """
    try:
        words.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"{what} is not UTF-8 text") from error


def command_of(line: str) -> tuple[str, str]:
    """The `/word` that a line begins with, or nothing, and the rest of the line.

    A path is no command, so that a question may begin with one.
    """
    word, _, rest = line.strip().partition(" ")
    if not word.startswith("/") or "/" in word[1:] or not word[1:2].isalpha():
        return "", line.strip()
    return word, rest.strip()


def file_words(text: str) -> list[str]:
    """The file names behind a command, with `~` for the home folder, and quotes as in a shell.

    The name of one file needs no quotes, whatever is in it.

    Raises:
        UsageError: a quote is not closed.
    """
    alone = at_home(text)
    before_weight = alone.rpartition("@")[0]
    if text and (is_there(alone) or (before_weight and is_there(before_weight))):
        return [alone]
    try:
        return [at_home(word) for word in shlex.split(text)]
    except ValueError as error:
        raise UsageError(
            f"a quote is not closed in {text}", hint="write /attach 'my dog.jpg'"
        ) from error


def at_home(name: str) -> str:
    """A file name with the user's folder in place of `~`."""
    try:
        return str(Path(name).expanduser()) if name.startswith("~") else name
    except RuntimeError:  # there is no such user
        return name


def last_word(text: str) -> tuple[int, str]:
    """Where the last word of what is being typed begins, and what it says without its quotes."""
    start, value, quote, escaped = 0, "", "", False
    for place, letter in enumerate(text):
        if escaped:
            value, escaped = value + letter, False
        elif letter == "\\" and quote != "'":
            escaped = True
        elif quote:
            quote = "" if letter == quote else quote
            value += letter if quote else ""
        elif letter in "'\"":
            quote = letter
        elif letter.isspace():
            start, value = place + 1, ""
        else:
            value += letter
    return start, value


def quoted(name: str, like: str) -> str:
    """A file name as the user has begun to quote it: in the quotes of `like`, or with backslashes.

    The name of a folder is left open, so that more of it can follow.
    """
    mark = like[:1] if like[:1] in ("'", '"') else ""
    if mark == "'" and "'" not in name:
        return f"'{name}" if name.endswith("/") else f"'{name}'"
    if mark == '"':
        name = "".join(f"\\{c}" if c in '"\\' else c for c in name)
        return f'"{name}' if name.endswith("/") else f'"{name}"'
    return "".join(c if c.isalnum() or c in "@%+=:,./~-_" else f"\\{c}" for c in name)


def unfinished(text: str) -> bool:
    """Whether more lines are to follow: the quotes of a text of several lines are not closed."""
    _, rest = command_of(text)
    return rest.startswith(QUOTES) and rest.count(QUOTES) == 1


def whole_text(text: str) -> str:
    """A text without the quotes of several lines around it."""
    inside = text.removeprefix(QUOTES).removesuffix(QUOTES)
    return inside.strip() if len(text) == len(inside) + 2 * len(QUOTES) else text
