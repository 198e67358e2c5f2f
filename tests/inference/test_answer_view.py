"""How answers look while they grow: plain, and as Markdown on a terminal."""

from __future__ import annotations

import io
import re
import sys

import pytest

from chatbind_cli.inference.answer_view import PlainView, view_of
from chatbind_cli.inference.markdown_view import MarkdownView
from tests.terminal import on_a_terminal

ANSWER = """# A dog

It is **brown**
and <image> &amp; a [link](http://a.b/c).

1. one
2. two

3. three

```python
x = 1

y = 2
```

| a | b |
|---|---|
| 1 | 22222 |

""" + "\n".join(f"- item {n}" for n in range(60))

SHOWN = """\
It is brown
and <image> & a link (http://a.b/c).

 1 one
 2 two
 3 three

 x = 1

 y = 2

 a  b
 ────────
 1  22222
"""


class Tty(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(answer: str, size: int) -> str:
    """What stays on a page that is no terminal, where nothing is drawn over."""
    page = io.StringIO()
    view = MarkdownView(page)
    view._console.width = 60
    for start in range(0, len(answer), size):
        view.show(answer[start : start + size])
    view.end()
    return "".join(f"{line.rstrip()}\n" for line in page.getvalue().splitlines())


@pytest.mark.parametrize("size", [1, 7, 100_000])
def test_markdown_is_the_same_in_whatever_pieces_it_comes(size: int) -> None:
    page = shown(ANSWER, size)
    heading, _, rest = page.partition("\n\n")
    assert heading.strip() == "A dog"
    assert rest.startswith(SHOWN)
    assert re.findall(r"item \d+", rest) == [f"item {n}" for n in range(60)]


def test_what_a_terminal_would_obey_does_not_reach_it() -> None:
    evil = "a\x1b[31mb `c\x1b]8;;http://x\x07d` &#x202e;e [f](javascript:x) \x9bm ![g](h)\n\n"
    for text in (shown(evil, 3), shown(f"```\x1b[2J\n{evil}", 3)):
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e]", text)
    out = Tty()
    PlainView(out).show(evil)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", out.getvalue())


def test_elsewhere_an_answer_is_the_text_that_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    page = io.StringIO()
    view = view_of(page)
    view.show("**a**\x1b")
    view.end()
    assert page.getvalue() == "**a**\x1b\n"
    assert isinstance(view_of(Tty()), MarkdownView)
    assert isinstance(view_of(Tty(), plain=True), PlainView)
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(view_of(Tty()), PlainView)


def test_an_answer_stands_on_a_terminal_once() -> None:
    draw = (
        "import sys\n"
        "from chatbind_cli.inference import markdown_view\n"
        "from chatbind_cli.inference.answer_view import view_of\n"
        "markdown_view._SECONDS_BETWEEN = 0.0\n"
        "view = view_of(sys.stdout)\n"
        f"answer = {ANSWER!r}\n"
        "for start in range(0, len(answer), 12): view.show(answer[start : start + 12])\n"
        "view.end()\n"
        "view.show('Another.')\n"
        "view.end()\n"
        "view.end()\n"
    )
    code, raw = on_a_terminal([sys.executable, "-c", draw])
    assert code == 0
    page = after_drawing(raw.decode())
    assert [line for line in page if line.startswith(" • item")] == [
        f" • item {n}" for n in range(60)
    ]
    assert page.count("It is brown") == 1
    assert page[-2:] == ["Another.", ""]
    assert raw.count(b"item 50") > 5  # it was seen while the list grew beyond the screen
    assert raw.count(b"\x1b[?25l") == raw.count(b"\x1b[?25h")


def after_drawing(raw: str) -> list[str]:
    """The lines on a terminal's page: of its commands those that are used here."""
    lines, row, column = [""], 0, 0
    for command, number, text in re.findall(r"(?:\x1b\[\??(\d*)([A-Za-z]))|(.)", raw, re.DOTALL):
        if number == "A":
            row -= int(command or 1)
        elif number == "K":
            lines[row] = "" if command == "2" else lines[row][:column]
        elif text == "\r":
            column = 0
        elif text == "\n":
            row += 1
            lines += [""] * (row == len(lines))
        elif text:
            lines[row] = lines[row][:column].ljust(column) + text + lines[row][column + 1 :]
            column += 1
    return [line.rstrip() for line in lines][:-1]
