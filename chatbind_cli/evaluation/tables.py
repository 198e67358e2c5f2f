"""Summaries as a table for a terminal, as Markdown or CSV, and in words."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from itertools import islice
from typing import IO, TYPE_CHECKING, Literal

from chatbind_cli.console import printable
from chatbind_cli.evaluation.figures import Row, agreements
from chatbind_cli.evaluation.statistics import Pair, position_bias
from chatbind_cli.evaluation.summary import ALL, Summary
from chatbind_cli.jsonl import dumps

if TYPE_CHECKING:
    from rich.table import Table

_MISSING = "–"
_SIGNIFICANT = 0.05
_REASONS_SHOWN = 8
_WIDE = 200
_GAP = 3
"""Characters between two columns of the terminal's table."""
_ENDS = {
    "ci95": ("ci95_low", "ci95_high"),
    "difference_ci95": ("difference_ci95_low", "difference_ci95_high"),
    "dates": ("first_date", "last_date"),
}


def _always(row: Row) -> bool:
    return True


def _number(value: float | None) -> str:
    return _MISSING if value is None else f"{value:.3f}".rstrip("0").rstrip(".")


def _percent(share: float | None) -> str:
    return _MISSING if share is None else f"{100 * share:.1f} %"


def _fixed(value: float | None, form: str) -> str:
    return _MISSING if value is None else format(value, form)


def interval(ends: Pair | None) -> str:
    """Both ends in words."""
    return _MISSING if ends is None else f"{ends[0]:.1f} to {ends[1]:.1f}"


def percents(shares: Pair | None) -> str:
    """The shares of both sides in words."""
    first, second = shares or (None, None)
    return f"{_percent(first)} / {_percent(second)}"


_Column = tuple[str, Callable[[Row], str], Callable[[Row], object]]
"""A title, what a cell says, and whether a row has something to say there."""

_COLUMNS: list[_Column] = [
    ("n", lambda row: str(row.n), _always),
    ("accuracy", lambda row: percents(row.accuracy), lambda row: row.accuracy),
    ("exact", lambda row: percents(row.exact), lambda row: row.accuracy),
    ("F1", lambda row: percents(row.f1), lambda row: row.accuracy),
    ("first", lambda row: _number(row.mean and row.mean[0]), _always),
    ("second", lambda row: _number(row.mean and row.mean[1]), _always),
    ("relative", lambda row: _fixed(row.relative, ".1f"), _always),
    ("95 %", lambda row: interval(row.ci95), _always),
    ("win/tie/lose", lambda row: f"{row.win}/{row.tie}/{row.lose}", _always),
    (
        "same in both orders",
        lambda row: _percent(row.consistency),
        lambda row: row.consistency is not None,
    ),
    ("judges' kappa", lambda row: _fixed(row.kappa, ".2f"), lambda row: row.kappa is not None),
    ("failed", lambda row: str(row.failed), _always),
    ("one order", lambda row: str(row.one_order), lambda row: row.one_order),
    ("USD", lambda row: _fixed(row.cost_usd, ".4f"), lambda row: row.cost_usd),
    ("difference", lambda row: _fixed(row.difference, "+.1f"), lambda row: row.baseline),
    ("its 95 %", lambda row: interval(row.difference_ci95), lambda row: row.baseline),
    ("p", lambda row: _fixed(row.p_value, ".4f"), lambda row: row.baseline),
]


def grid(summaries: Sequence[Summary], *, named: bool) -> list[list[str]]:
    """A line of titles, and a line of texts a row, in the columns that any row has a figure for.

    Args:
        summaries: whose rows.
        named: whether a column in front says which summary a row is of.
    """
    rows = [row for summary in summaries for row in summary.rows]
    columns: list[_Column] = [("review", lambda row: row.review, _always)] if named else []
    columns.append((summaries[0].by, lambda row: row.category, _always))
    columns += [column for column in _COLUMNS if any(map(column[2], rows))]
    titles = [title for title, _, _ in columns]
    if _tested(rows) > 1:
        titles[-1] = "p (Holm)"
    return [titles, *([text(row) for _, text, _ in columns] for row in rows)]


def _tested(rows: Sequence[Row]) -> int:
    """How many categories were tested, whose p values are corrected for it."""
    return sum(row.p_value is not None and row.category != ALL for row in rows)


def description(summary: Summary, *, named: bool = True) -> str:
    """One line: who was judged by whom, when, and what it took."""
    sides = [" + ".join(side) for side in summary.models]
    parts = [summary.name] if named and summary.name else []
    if any(sides):
        parts.append(f"first: {sides[0] or 'unknown'}, second: {sides[1] or 'unknown'}")
    total = summary.total
    if total is None or not total.judges:
        return "; ".join(parts)
    judge = f"judge: {', '.join(total.judges)}"
    if total.dates is not None:
        first, last = total.dates
        judge += f", {first}" if first == last else f", {first} to {last}"
    parts.append(judge)
    if total.prompt_tokens:
        bill = f"{total.prompt_tokens:,} tokens sent, {total.completion_tokens:,} received"
        parts.append(bill + (f", {total.cost_usd:.4f} USD" if total.cost_usd else ""))
    return "; ".join(parts)


def remarks(summaries: Sequence[Summary]) -> list[str]:
    """What stands beside the columns: between orders, between judges, against a baseline."""
    lines = [line for summary in summaries for line in order_lines(summary)]
    lines += agreement_lines(summaries)
    return lines + [line for summary in summaries for line in comparison_lines(summary)]


def order_lines(summary: Summary) -> list[str]:
    """Whether the judge prefers a place, and what was judged in one order only."""
    name = summary.name or "reviews"
    total = summary.total
    lines = []
    if total is not None and total.place is not None:
        n = len(summary.orders)
        same = sum(given == swapped for given, swapped in summary.orders)
        first, last = position_bias(summary.orders)
        lines.append(
            f"{name}: both orders name the same winner in {100 * same / n:.1f} % of {n:,} "
            f"questions; the answer shown first won both times in {first:,}, the one shown last in "
            f"{last:,}; mean score {_number(total.place[0])} in the first place, "
            f"{_number(total.place[1])} in the second"
        )
    if total is not None and total.one_order:
        lines.append(
            f"{name}: the means are of {total.n:,} of {total.n + total.one_order:,} questions; "
            f"left out, as judged in one order only: {total.one_order:,}"
        )
    if any(summary.unbalanced):
        given, swapped = summary.unbalanced
        lines.append(
            f"{name}: not balanced, {given:,} judged as given only and {swapped:,} swapped only: "
            "a judge who prefers a place shifts the means"
        )
    return lines


def agreement_lines(summaries: Sequence[Summary]) -> list[str]:
    """How much the judges of all these reviews agree, a line a pair of judges."""
    found = agreements(review for summary in summaries for review in summary.reviews)
    return [
        f"{' and '.join(judges)} agree on {100 * same:.1f} % of {n} questions (Cohen's kappa "
        f"{'undefined' if kappa is None else f'{kappa:.2f}'})"
        for judges, n, same, kappa in found
    ]


def comparison_lines(summary: Summary) -> list[str]:
    """A run against its baseline: whether chance alone would explain the difference."""
    total = summary.total
    if total is None or not total.baseline:
        return []
    if total.difference is None or total.p_value is None:
        return [f"{total.review} cannot be compared with {total.baseline}"]
    verdict = "distinguishable" if total.p_value < _SIGNIFICANT else "not distinguishable"
    lines = [
        f"{total.review} against {total.baseline} on {total.n_both} shared questions: "
        f"{total.difference:+.1f} points of relative score "
        f"(95 % {interval(total.difference_ci95)}, p = {total.p_value:.4f}, paired permutation "
        f"test): {verdict}"
    ]
    n = _tested(summary.rows)
    if n > 1:
        lines.append(f"p of the {n} lines above {ALL}: corrected for testing {n} (Holm)")
    return lines


def failure_lines(summary: Summary) -> list[str]:
    """Why reviews failed, with how often."""
    reasons = list(summary.failures.items())
    lines = [f"{count} failed, in no mean: {reason}" for reason, count in reasons[:_REASONS_SHOWN]]
    rest = sum(count for _, count in reasons[_REASONS_SHOWN:])
    return [*lines, f"{rest} more failed, in no mean, for other reasons"] if rest else lines


def write(summaries: Sequence[Summary], form: str, out: IO[str]) -> None:
    """Writes the figures.

    Args:
        summaries: whose.
        form: `table`, `markdown`, `csv`, `json` (all that is known, a record a row) or `figures`
            (records of the figures alone).
        out: where to.
    """
    if form == "table":
        print_table(summaries, out)
    elif form == "markdown":
        out.write(markdown_table(summaries))
    elif form == "csv":
        out.write(csv_table(summaries))
    else:
        several = len(summaries) > 1
        for row in (row for summary in summaries for row in summary.rows):
            record = row.figures(several=several) if form == "figures" else row.record()
            out.write(dumps(record) + "\n")


def markdown_table(summaries: Sequence[Summary]) -> str:
    """The table in Markdown, with a line a summary on who judged whom."""
    several = len(summaries) > 1
    titles, *texts = grid(summaries, named=several)
    names = 2 if several else 1
    marks = ["---"] * names + ["---:"] * (len(titles) - names)
    lines = [f"| {' | '.join(map(_markdown, line))} |" for line in (titles, marks, *texts)]
    notes = [line for summary in summaries if (line := description(summary))]
    # A line each: Markdown joins lines that follow each other.
    notes = [f"- {_markdown(line)}" for line in [*notes, *remarks(summaries)]]
    return "\n".join([*lines, *(["", *notes] if notes else [])]) + "\n"


def _markdown(text: str) -> str:
    # Names come from files: they are to make neither columns nor tags.
    for mark in "\\|[":
        text = text.replace(mark, f"\\{mark}")
    return " ".join(printable(text).replace("<", "&lt;").split())


def csv_table(summaries: Sequence[Summary]) -> str:
    """All figures as CSV, under the names that records have; intervals in two columns."""
    records = [row.record() for summary in summaries for row in summary.rows]
    for record in records:
        record["judges"] = " + ".join(record["judges"])
        for key, names in _ENDS.items():
            if key in record:
                record.update(zip(names, record.pop(key) or (None, None), strict=True))
    text = io.StringIO()
    writer = csv.DictWriter(text, list(records[0]) if records else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()


def print_table(summaries: Sequence[Summary], out: IO[str]) -> None:
    """Writes the terminal's table; without colours and as wide as it needs where it is no tty.

    On a narrow terminal it becomes several tables below each other: a figure that is cut off is
    worse than none.
    """
    from rich.console import Console
    from rich.text import Text

    width = None if out.isatty() else _WIDE
    console = Console(file=out, width=width, highlight=False, soft_wrap=False)
    several = len(summaries) > 1
    lines = grid(summaries, named=several)
    names = 2 if several else 1
    for columns in _parts(lines, names, console.width):
        part = [[line[number] for number in columns] for line in lines]
        console.print(_rich_table(part, names, [len(summary.rows) for summary in summaries]))
    for line in [*filter(None, map(description, summaries)), *remarks(summaries)]:
        console.print(Text(printable(line), style="italic"))


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


def _rich_table(lines: Sequence[Sequence[str]], names: int, sections: Sequence[int]) -> Table:
    """A table of which `sections` says how many lines belong together."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD)
    titles, *rest = lines
    for number, title in enumerate(titles):
        left = number < names
        justify: Literal["left", "right"] = "left" if left else "right"
        table.add_column(Text(title), justify=justify, no_wrap=not left, overflow="fold")
    texts = iter(rest)
    for count in sections:
        for line in islice(texts, count):
            # A name from a file is text, never markup.
            style = "bold" if line[names - 1] == ALL else None
            table.add_row(*(Text(printable(cell)) for cell in line), style=style)
        table.add_section()
    return table
