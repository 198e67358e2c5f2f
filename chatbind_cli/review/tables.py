"""Summaries as a table for a terminal, as plain text, Markdown or CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import IO, TYPE_CHECKING

from chatbind_cli.console import printable
from chatbind_cli.review.agreement import agreements
from chatbind_cli.review.groups import Row
from chatbind_cli.review.statistics import Pair, position_bias
from chatbind_cli.review.summary import ALL, Summary

if TYPE_CHECKING:
    from rich.table import Table

_MISSING = "–"
_NAMES = ("review", "category")
_SIGNIFICANT = 0.05
_WIDE = 200
_GAP = 3
"""Characters between two columns of the terminal's table."""
_PAIRS = {
    "ci95": ("ci95_low", "ci95_high"),
    "difference_ci95": ("difference_ci95_low", "difference_ci95_high"),
    "dates": ("first_date", "last_date"),
}


def headings(rows: Sequence[Row], *, several: bool) -> list[str]:
    """The columns that these rows have something to say in; `cells` goes by these names."""
    columns = ["review"] if several else []
    columns += ["category", "n"]
    if any(row.accuracy_2 is not None for row in rows):
        columns += ["accuracy", "exact", "F1"]
    columns += ["first", "second", "relative", "95 %", "win/tie/lose"]
    if any(row.consistency is not None for row in rows):
        columns.append("same in both orders")
    if any(row.kappa is not None for row in rows):
        columns.append("judges' kappa")
    columns.append("failed")
    if any(row.one_order for row in rows):
        columns.append("one order")
    if any(row.cost_usd for row in rows):
        columns.append("USD")
    if any(row.baseline for row in rows):
        columns += ["difference", "its 95 %", "p (Holm)" if _tested(rows) > 1 else "p"]
    return columns


def _tested(rows: Sequence[Row]) -> int:
    """How many categories were tested, whose p values are corrected for it."""
    return sum(row.p_value is not None and row.category != ALL for row in rows)


def titles(columns: Sequence[str], by: str) -> list[str]:
    """The columns as a person reads them: a line may be a category, a modality or a judge."""
    return [by if column == "category" else column for column in columns]


def cells(row: Row, columns: Sequence[str]) -> list[str]:
    """A row's figures as text, in the order of the columns."""
    texts = {
        "review": row.review,
        "category": row.category,
        "n": str(row.n),
        "first": _number(row.mean_1),
        "second": _number(row.mean_2),
        "relative": _MISSING if row.relative is None else f"{row.relative:.1f}",
        "95 %": interval(row.ci95),
        "win/tie/lose": f"{row.win}/{row.tie}/{row.lose}",
        "same in both orders": _percent(row.consistency),
        "accuracy": percents(row.accuracy_1, row.accuracy_2),
        "exact": percents(row.exact_1, row.exact_2),
        "F1": percents(row.f1_1, row.f1_2),
        "judges' kappa": _MISSING if row.kappa is None else f"{row.kappa:.2f}",
        "failed": str(row.failed),
        "one order": str(row.one_order),
        "USD": _MISSING if row.cost_usd is None else f"{row.cost_usd:.4f}",
        "difference": _MISSING if row.difference is None else f"{row.difference:+.1f}",
        "its 95 %": interval(row.difference_ci95),
        "p": _MISSING if row.p_value is None else f"{row.p_value:.4f}",
    }
    return [texts[column.removesuffix(" (Holm)")] for column in columns]


def description(summary: Summary, *, named: bool = True) -> str:
    """One line: who was judged by whom, when, and what it took."""
    sides = [" + ".join(side) for side in summary.models]
    parts = [summary.name] if named and summary.name else []
    if any(sides):
        parts.append(f"first: {sides[0] or 'unknown'}, second: {sides[1] or 'unknown'}")
    total = next((row for row in summary.rows if row.category == ALL), None)
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
    total = next((row for row in summary.rows if row.category == ALL), None)
    lines = []
    if summary.orders and total is not None:
        n = len(summary.orders)
        same = sum(given == swapped for given, swapped in summary.orders)
        first, last = position_bias(summary.orders)
        lines.append(
            f"{name}: both orders name the same winner in {100 * same / n:.1f} % of {n:,} "
            f"questions; the answer shown first won both times in {first:,}, the one shown last in "
            f"{last:,}; mean score {_number(total.place_1)} in the first place, "
            f"{_number(total.place_2)} in the second"
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
    return [agreement.text() for agreement in found]


def comparison_lines(summary: Summary) -> list[str]:
    """A run against its baseline: whether chance alone would explain the difference."""
    total = next((row for row in summary.rows if row.category == ALL and row.baseline), None)
    if total is None:
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


def column_groups(columns: Sequence[str], widths: Mapping[str, int], width: int) -> list[list[str]]:
    """The columns of as many tables as it takes for none to be cut off; each has the names.

    Args:
        columns: all columns.
        widths: how many characters each needs.
        width: how many there are.
    """
    names = [column for column in columns if column in _NAMES]
    groups, used = [list(names)], 0
    room = width - sum(widths[name] + _GAP for name in names) - _GAP
    for column in columns:
        if column in _NAMES:
            continue
        if used and used + widths[column] + _GAP > room:
            groups.append(list(names))
            used = 0
        groups[-1].append(column)
        used += widths[column] + _GAP
    return groups


def _rich_table(summaries: Sequence[Summary], columns: Sequence[str]) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD)
    for column, title in zip(columns, titles(columns, _made_by(summaries)), strict=True):
        left = column in _NAMES
        table.add_column(
            Text(title),
            justify="left" if left else "right",
            no_wrap=not left,
            overflow="fold",
        )
    for summary in summaries:
        for row in summary.rows:
            # A name from a file is text, never markup.
            texts = [Text(printable(cell)) for cell in cells(row, columns)]
            table.add_row(*texts, style="bold" if row.category == ALL else None)
        table.add_section()
    return table


def _made_by(summaries: Sequence[Summary]) -> str:
    """What makes a line of the table."""
    return summaries[0].by if summaries else "category"


def markdown_table(summaries: Sequence[Summary]) -> str:
    """The table in Markdown, with a line a summary on who judged whom."""
    rows = [row for summary in summaries for row in summary.rows]
    columns = headings(rows, several=len(summaries) > 1)
    marks = ["---" if column in _NAMES else "---:" for column in columns]
    heads = titles(columns, _made_by(summaries))
    lines = [_markdown_line(heads), _markdown_line(marks)]
    lines += [_markdown_line(cells(row, columns)) for row in rows]
    notes = [line for summary in summaries if (line := description(summary))]
    # A line each: Markdown joins lines that follow each other.
    notes = [f"- {_markdown_text(line)}" for line in [*notes, *remarks(summaries)]]
    return "\n".join([*lines, *(["", *notes] if notes else [])]) + "\n"


def csv_table(summaries: Sequence[Summary]) -> str:
    """All figures as CSV, under the names that records have; pairs in two columns."""
    rows = [row for summary in summaries for row in summary.rows]
    text = io.StringIO()
    writer: csv.DictWriter[str] | None = None
    for row in rows:
        record = row.record()
        record["judges"] = " + ".join(row.judges)
        for key, names in _PAIRS.items():
            if key in record:
                ends = record.pop(key) or (None, None)
                record.update(zip(names, ends, strict=True))
        if writer is None:
            writer = csv.DictWriter(text, list(record), lineterminator="\n")
            writer.writeheader()
        writer.writerow(record)
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
    rows = [row for summary in summaries for row in summary.rows]
    columns = headings(rows, several=len(summaries) > 1)
    heads = titles(columns, _made_by(summaries))
    texts = [heads, *(cells(row, columns) for row in rows)]
    widths = {
        column: max(len(line[number]) for line in texts) for number, column in enumerate(columns)
    }
    for group in column_groups(columns, widths, console.width):
        console.print(_rich_table(summaries, group))
    for line in [*filter(None, map(description, summaries)), *remarks(summaries)]:
        console.print(Text(printable(line), style="italic"))


def interval(ends: Pair | None) -> str:
    """Both ends in words."""
    return _MISSING if ends is None else f"{ends[0]:.1f} to {ends[1]:.1f}"


def percents(first: float | None, second: float | None) -> str:
    """The shares of both sides in words."""
    return f"{_percent(first)} / {_percent(second)}"


def _number(value: float | None) -> str:
    return _MISSING if value is None else f"{value:.3f}".rstrip("0").rstrip(".")


def _percent(share: float | None) -> str:
    return _MISSING if share is None else f"{100 * share:.1f} %"


def _markdown_line(texts: Sequence[str]) -> str:
    return f"| {' | '.join(map(_markdown_text, texts))} |"


def _markdown_text(text: str) -> str:
    # Names come from files: they are to make neither columns nor tags.
    for mark in "\\|[":
        text = text.replace(mark, f"\\{mark}")
    return " ".join(printable(text).replace("<", "&lt;").split())
