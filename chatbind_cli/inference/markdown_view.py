"""An answer as rendered Markdown, block by block while it grows."""

from __future__ import annotations

import re
import time
from itertools import pairwise
from typing import IO

from markdown_it import MarkdownIt
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.markdown import Markdown
from rich.segment import Segment

from chatbind_cli.console import printable

_SECONDS_BETWEEN = 0.08
_LINES_BELOW = 2  # of the screen that what grows leaves free


class MarkdownView:
    """Markdown, rendered.

    A block (a paragraph, a list, a table) is drawn again and again while it grows, and written for
    good once the next has begun: from then on nothing can change it, and it may scroll away.
    """

    def __init__(self, out: IO[str]) -> None:
        self._console = Console(file=out, highlight=False)
        # tags as text: they would be dropped, and `<image>` is a word here
        self._parser = MarkdownIt("commonmark", {"html": False}).enable(["table", "strikethrough"])
        self._live: Live | None = None
        self._text = ""
        self._written = False
        self._drawn = 0.0

    def show(self, text: str) -> None:
        """Draws what the text adds, but not more often than an eye can see."""
        self._text += printable(text)
        if "\n" in text:
            end = self._text.rfind("\n") + 1
            *done, growing = self._blocks(self._text[:end])
            self._text = growing + self._text[end:]
            self._write(done)
        now = time.monotonic()
        if now - self._drawn >= _SECONDS_BETWEEN:
            self._draw()
            self._drawn = now

    def end(self) -> None:
        """Writes the rest for good."""
        if self._live is not None:
            self._live.stop()
            self._live = None
        self._write(self._blocks(self._text))
        if not self._written:
            self._console.print()
        self._text, self._written, self._drawn = "", False, 0.0

    def _write(self, blocks: list[str]) -> None:
        for text in filter(str.strip, blocks):
            if self._written:
                self._console.print()
            self._console.print(_Lines(self._rendered(text)))
            self._written = True

    def _draw(self) -> None:
        if self._live is None:
            # others' output is not led around: it may be meant for a file
            self._live = Live(
                console=self._console,
                auto_refresh=False,
                transient=True,
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self._live.start()
        room = max(self._console.height - _LINES_BELOW, 1)
        self._live.update(_Lines(self._rendered(self._text), room), refresh=True)

    def _blocks(self, text: str) -> list[str]:
        """The blocks of a text, at least one; what follows whole lines changes but the last."""
        tokens = self._parser.parse(text)
        starts = [token.map[0] for token in tokens if token.level == 0 and token.map]
        lines = re.split(r"(?<=\n)", text)
        bounds = pairwise([0, *starts[1:], len(lines)])
        return ["".join(lines[start:end]) for start, end in bounds]

    def _rendered(self, text: str) -> Markdown:
        """The text for a console; with its line ends, as people and models mean them."""
        # a link's own address is shown: what it is called may be another
        markdown = Markdown("", hyperlinks=False)
        markdown.parsed = self._parser.parse(text)
        for token in markdown.parsed:
            for inner in token.children or ():
                # `&#x202e;` has become a character by now
                inner.content = printable(inner.content)
                if inner.type == "softbreak":
                    inner.type = "hardbreak"
        return markdown


class _Lines:
    """What is drawn without the empty lines around it; the last `room` lines, if that is said."""

    def __init__(self, content: Markdown, room: int = 0) -> None:
        self._content = content
        self._room = room

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = console.render_lines(self._content, options.update(height=None), pad=False)
        full = [n for n, line in enumerate(lines) if any(part.text.strip() for part in line)]
        lines = lines[full[0] : full[-1] + 1] if full else []
        for line in lines[-self._room :]:
            yield from line
            yield Segment.line()
