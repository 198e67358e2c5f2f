"""Summaries as a table for a terminal, as plain text, Markdown or CSV.

Knows nothing of how the figures came about (`summary`).
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import IO, TYPE_CHECKING

from chatbind_cli.review.summary import ALL, Row, Summary

if TYPE_CHECKING:
    from rich.table import Table

_MISSING = "–"


def headings(rows: Sequence[Row], *, several: bool) -> list[str]:
    """The columns that these rows have something to say in."""
    columns = ["review"] if several else []
    columns += ["category", "n", "first", "second", "relative", "95 %", "win/tie/lose"]
    if any(row.consistency is not None for row in rows):
        columns.append("same in both orders")
    if any(row.exact_2 is not None for row in rows):
        columns.append("exact")
    if any(row.label_2 is not None for row in rows):
        columns.append("label")
    return [*columns, "failed"]


def cells(row: Row, columns: Sequence[str]) -> list[str]:
    """A row's figures as text, in the order of the columns."""
    texts = {
        "review": row.review,
        "category": row.category,
        "n": str(row.n),
        "first": _number(row.mean_1),
        "second": _number(row.mean_2),
        "relative": _MISSING if row.relative is None else f"{row.relative:.1f}",
        "95 %": _MISSING if row.ci95 is None else f"{row.ci95[0]:.1f} to {row.ci95[1]:.1f}",
        "win/tie/lose": f"{row.win}/{row.tie}/{row.lose}",
        "same in both orders": _percent(row.consistency),
        "exact": f"{_percent(row.exact_1)} / {_percent(row.exact_2)}",
        "label": f"{_percent(row.label_1)} / {_percent(row.label_2)}",
        "failed": str(row.failed),
    }
    return [texts[column] for column in columns]


def description(summary: Summary) -> str:
    """One line: who was judged by whom."""
    sides = [" + ".join(side) for side in summary.models]
    parts = [summary.name] if summary.name else []
    if any(sides):
        parts.append(f"first: {sides[0] or 'unknown'}, second: {sides[1] or 'unknown'}")
    if summary.judges:
        parts.append(f"judge: {', '.join(summary.judges)}")
    return "; ".join(parts)


def rich_table(summaries: Sequence[Summary]) -> Table:
    """The table that a person sees on a terminal."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    rows = [row for summary in summaries for row in summary.rows]
    several = len(summaries) > 1
    columns = headings(rows, several=several)
    caption = "\n".join(filter(None, map(description, summaries)))
    table = Table(box=box.SIMPLE_HEAD, caption=Text(caption), caption_justify="left")
    for column in columns:
        left = column in ("review", "category")
        table.add_column(Text(column), justify="left" if left else "right", no_wrap=left)
    for summary in summaries:
        for row in summary.rows:
            # A name from a file is text, never markup.
            texts = [Text(cell) for cell in cells(row, columns)]
            table.add_row(*texts, style="bold" if row.category == ALL else None)
        table.add_section()
    return table


def markdown_table(summaries: Sequence[Summary]) -> str:
    """The table in Markdown, with a line a summary on who judged whom."""
    rows = [row for summary in summaries for row in summary.rows]
    columns = headings(rows, several=len(summaries) > 1)
    marks = ["---" if column in ("review", "category") else "---:" for column in columns]
    lines = [_markdown_line(columns), _markdown_line(marks)]
    lines += [_markdown_line(cells(row, columns)) for row in rows]
    notes = [line for summary in summaries if (line := description(summary))]
    return "\n".join([*lines, *(["", *notes] if notes else [])]) + "\n"


def csv_table(summaries: Sequence[Summary]) -> str:
    """All figures as CSV, under the names that `--json` uses; the interval in two columns."""
    rows = [row for summary in summaries for row in summary.rows]
    text = io.StringIO()
    writer: csv.DictWriter[str] | None = None
    for row in rows:
        record = row.record()
        low, high = record.pop("ci95") or (None, None)
        record.update(ci95_low=low, ci95_high=high)
        if writer is None:
            writer = csv.DictWriter(text, list(record), lineterminator="\n")
            writer.writeheader()
        writer.writerow(record)
    return text.getvalue()


def print_table(summaries: Sequence[Summary], out: IO[str]) -> None:
    """Writes the terminal's table; without colours and as wide as it needs where it is no tty."""
    from rich.console import Console

    width = None if out.isatty() else 200
    Console(file=out, width=width, highlight=False, soft_wrap=False).print(rich_table(summaries))


def _number(value: float | None) -> str:
    return _MISSING if value is None else f"{value:.3f}".rstrip("0").rstrip(".")


def _percent(share: float | None) -> str:
    return _MISSING if share is None else f"{100 * share:.1f} %"


def _markdown_line(texts: Sequence[str]) -> str:
    escaped = [" ".join(text.replace("|", "\\|").split()) for text in texts]
    return f"| {' | '.join(escaped)} |"
