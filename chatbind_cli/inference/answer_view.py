"""Where an answer is shown while it grows: as plain text, or as Markdown on a terminal."""

from __future__ import annotations

import os
from typing import IO, Protocol

from chatbind_cli.console import printable


class View(Protocol):
    """Takes an answer piece by piece."""

    def show(self, text: str) -> None:
        """Shows more of the answer at once."""

    def end(self) -> None:
        """Ends the answer; another may follow."""


def view_of(out: IO[str], *, plain: bool = False) -> View:
    """Markdown is rendered on a terminal alone: elsewhere an answer is the text that it is."""
    dumb = os.environ.get("TERM", "").lower() in ("", "dumb", "unknown")
    if plain or dumb or not out.isatty():
        return PlainView(out)
    from chatbind_cli.inference.markdown_view import MarkdownView  # noqa: PLC0415  brings rich

    return MarkdownView(out)


class PlainView:
    """The text as it is; on a terminal without what that would obey."""

    def __init__(self, out: IO[str]) -> None:
        self._out = out
        self._clean = printable if out.isatty() else str

    def show(self, text: str) -> None:
        """Writes the text and hands it to the operating system."""
        self._out.write(self._clean(text))
        self._out.flush()

    def end(self) -> None:
        """Ends the line."""
        self._out.write("\n")
        self._out.flush()
