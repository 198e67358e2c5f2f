"""Tables on a terminal, none of whose columns is cut off."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Literal

from chatbind_cli.console import printable
from chatbind_cli.evaluation.summary import ALL

if TYPE_CHECKING:
    from rich.console import Console

_GAP = 3
"""Characters between two columns."""


def print_grid(
    grid: Sequence[Sequence[str]], names: int, ends: Collection[int], console: Console
) -> None:
    """Writes a line of titles and others, in several tables where the terminal is too narrow.

    Each has as many columns in front as there are `names`; after the lines whose numbers, from 1,
    are in `ends`, a rule is drawn.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    titles, *lines = grid
    for columns in _parts(grid, names, console.width):
        table = Table(box=box.SIMPLE_HEAD)
        for number in columns:
            name = number < names
            justify: Literal["left", "right"] = "left" if name else "right"
            table.add_column(titles[number], justify=justify, no_wrap=not name, overflow="fold")
        for count, line in enumerate(lines, start=1):
            # A name from a file is text, never markup.
            cells = [Text(printable(line[number])) for number in columns]
            style = "bold" if line[names - 1] == ALL else None
            table.add_row(*cells, style=style, end_section=count in ends)
        console.print(table)


def _parts(lines: Sequence[Sequence[str]], names: int, width: int) -> list[list[int]]:
    """The columns of as many tables as it takes for none to be cut off; each has the names."""
    widths = [max(map(len, column)) + _GAP for column in zip(*lines, strict=True)]
    front = list(range(names))
    parts, room = [list(front)], width - _GAP - sum(widths[:names])
    left = room
    for number in range(names, len(widths)):
        if len(parts[-1]) > names and widths[number] > left:
            parts.append(list(front))
            left = room
        parts[-1].append(number)
        left -= widths[number]
    return parts
