"""Summaries as a table for a terminal, as Markdown or CSV, and in words."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import IO

from chatbind_cli.console import printable
from chatbind_cli.evaluation.figures import agreements
from chatbind_cli.evaluation.ranking import MEAN_SCORE, Rank, Ranking
from chatbind_cli.evaluation.scores import failure_of, scores_of
from chatbind_cli.evaluation.statistics import cohens_kappa, position_bias
from chatbind_cli.evaluation.summary import ALL, Summary
from chatbind_cli.jsonl import Record, dumps

_MISSING = "–"
_SIGNIFICANT = 0.05
_REASONS_SHOWN = 8
_WIDE = 200
_GAP = 3  # characters between two columns

_FIGURES = (
    *("category", "n", "mean_1", "mean_2", "relative", "ci95"),
    *("win", "tie", "lose", "consistency", "failed"),
    *("baseline", "n_both", "difference", "difference_ci95", "p_value"),
    *("labels", "agreement", "label_kappa", "true_win_rate", "true_win_rate_ci95"),
    *("lc_n", "lc_win_rate", "lc_win_rate_ci95"),
)


def text_of(row: Record, key: str, form: str) -> str:
    """One figure, or both ends of an interval, in a format of Python's; of a share in percent."""
    value = row.get(key)
    if value is None:
        return _MISSING
    if isinstance(value, tuple):
        return " to ".join(format(end, form) for end in value)
    return format(value, form).replace("%", " %")


def _with_interval(row: Record, key: str) -> str:
    """A share, and its interval in brackets."""
    figure, ends = text_of(row, key, ".1%"), text_of(row, f"{key}_ci95", ".1%")
    return figure if ends == _MISSING else f"{figure} ({ends.replace('%', '')})"


def of_both(row: Record, name: str, form: str = ".1%") -> str:
    """A figure of both sides."""
    sides = [text_of(row, f"{name}_{side}", form) for side in (1, 2)]
    return _MISSING if sides[0] == _MISSING else " / ".join(s for s in sides if s != _MISSING)


def _equally_long(row: Record) -> str:
    text, known = _with_interval(row, "lc_win_rate"), row.get("lc_n", row["n"])
    told = known == row["n"] or row["win_rate"] is None
    return text if told else f"{text}, of {known:,}"


_COLUMNS: dict[str, Callable[[Record], str]] = {
    "n": lambda row: str(row["n"]),
    "accuracy": lambda row: of_both(row, "accuracy"),
    "exact": lambda row: of_both(row, "exact"),
    "F1": lambda row: of_both(row, "f1"),
    "first": lambda row: text_of(row, "mean_1", ".7g"),
    "second": lambda row: text_of(row, "mean_2", ".7g"),
    "relative": lambda row: text_of(row, "relative", ".1f"),
    "95 %": lambda row: text_of(row, "ci95", ".1f"),
    "win/tie/lose": lambda row: (
        _MISSING if row["win"] is None else f"{row['win']}/{row['tie']}/{row['lose']}"
    ),
    "win rate (95 %)": lambda row: _with_interval(row, "win_rate"),
    "at equal length (95 %)": _equally_long,
    "labels": lambda row: text_of(row, "labels", ","),
    "people agree": lambda row: text_of(row, "agreement", ".1%"),
    "their kappa": lambda row: text_of(row, "label_kappa", ".2f"),
    "win rate by people (95 %)": lambda row: _with_interval(row, "true_win_rate"),
    "characters": lambda row: of_both(row, "length", ".0f"),
    "same in both orders": lambda row: text_of(row, "consistency", ".1%"),
    "judges' kappa": lambda row: text_of(row, "kappa", ".2f"),
    "failed": lambda row: str(row["failed"]),
    "one order": lambda row: str(row["one_order"] or _MISSING),
    "USD": lambda row: text_of(row, "cost_usd", ".4f") if row["cost_usd"] else _MISSING,
    "difference": lambda row: text_of(row, "difference", "+.1f"),
    "its 95 %": lambda row: text_of(row, "difference_ci95", ".1f"),
    "p": lambda row: text_of(row, "p_value", ".4f"),
}


def grid(summaries: Sequence[Summary], *, named: bool) -> list[list[str]]:
    """A line of titles, and a line of texts a row, in the columns that any row has a figure for.

    Where they are `named`, a column in front says which summary a row is of.
    """
    rows = [row for summary in summaries for row in summary.rows]
    columns = [["review", *(row["review"] for row in rows)]] if named else []
    columns.append([summaries[0].by, *(row["category"] for row in rows)])
    for title, cell in _COLUMNS.items():
        texts = [cell(row) for row in rows]
        if any(text != _MISSING for text in texts):
            corrected = title == "p" and _tested(rows) > 1
            columns.append(["p (Holm)" if corrected else title, *texts])
    return [list(line) for line in zip(*columns, strict=True)]


def rank_grids(ranks: Sequence[Rank]) -> list[list[list[str]]]:
    """A table a kind of ranking: lines of texts as in `grid`."""
    found = []
    for kind in dict.fromkeys(rank.ranking for rank in ranks):
        rows = [rank._asdict() for rank in ranks if rank.ranking == kind]
        points, form = ("mean score", ".7g") if kind == MEAN_SCORE else ("points", ".1f")
        columns = [
            [f"ranking by {kind}", *(f"{row['place']}. {row['model']}" for row in rows)],
            ["group", *(str(row["group"]) if rows[-1]["group"] > 1 else _MISSING for row in rows)],
            [points, *(text_of(row, "points", form) for row in rows)],
            ["95 %", *(text_of(row, "ci95", form) for row in rows)],
            ["win rate", *(text_of(row, "win_rate", ".1%") for row in rows)],
            ["n", *(str(row["n"]) for row in rows)],
            ["characters", *(text_of(row, "length", ".0f") for row in rows)],
        ]
        told = [column for column in columns if set(column[1:]) != {_MISSING}]
        found.append([list(line) for line in zip(*told, strict=True)])
    return found


def _tested(rows: Sequence[Record]) -> int:
    """How many categories were tested, whose p values are corrected for it."""
    return sum(row.get("p_value") is not None and row["category"] != ALL for row in rows)


def description(summary: Summary) -> str:
    """One line: who was judged by whom, when, and what it took."""
    sides = [name or "unknown" for name in summary.names]
    said = f"answers: {sides[0]}" if summary.single else f"first: {sides[0]}, second: {sides[1]}"
    parts = [said] if any(summary.models) else []
    total = summary.total
    if total["judges"]:
        days = " to ".join(dict.fromkeys(total["dates"] or ()))
        judges = ", ".join(total["judges"])
        parts.append(f"judge: {judges}, {days}" if days else f"judge: {judges}")
    if total["prompt_tokens"]:
        parts.append(
            tokens(total) + (f", {total['cost_usd']:.4f} USD" if total["cost_usd"] else "")
        )
    return "; ".join(parts)


def tokens(row: Record) -> str:
    """What the judges took and gave, as they count it."""
    return f"{row['prompt_tokens']:,} tokens sent, {row['completion_tokens']:,} received"


def remarks(summaries: Sequence[Summary], ranking: Ranking | None = None) -> list[str]:
    """What stands beside the columns: between orders, between judges, against a baseline."""
    lines = [line for summary in summaries for line in order_lines(summary)]
    lines += agreement_lines(summaries)
    lines += [line for summary in summaries for line in comparison_lines(summary)]
    return lines + (ranking.notes if ranking else [])


def order_lines(summary: Summary) -> list[str]:
    """Whether the judge prefers a place, and what was judged in one order only."""
    name, total = summary.name or "reviews", summary.total
    lines = []
    if summary.orders:
        n = len(summary.orders)
        same = sum(given == swapped for given, swapped in summary.orders)
        first, last = position_bias(summary.orders)
        lines.append(
            f"{name}: both orders name the same winner in {100 * same / n:.1f} % of {n:,} "
            f"questions; the answer shown first won both times in {first:,}, the one shown last in "
            f"{last:,}; mean score {text_of(total, 'place_1', '.7g')} in the first place, "
            f"{text_of(total, 'place_2', '.7g')} in the second"
        )
    if total["one_order"]:
        lines.append(
            f"{name}: the means are of {total['n']:,} of {total['n'] + total['one_order']:,} "
            f"questions; left out, as judged in one order only: {total['one_order']:,}"
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
    lines = []
    found = agreements(review for summary in summaries for review in summary.reviews)
    for judges, outcomes in found.items():
        same, kappa = sum(a == b for a, b in outcomes), cohens_kappa(outcomes)
        lines.append(
            f"{' and '.join(judges)} agree on {100 * same / len(outcomes):.1f} % of "
            f"{len(outcomes)} questions (Cohen's kappa "
            f"{'undefined' if kappa is None else f'{kappa:.2f}'})"
        )
    return lines


def comparison_lines(summary: Summary) -> list[str]:
    """A run against its baseline: whether chance alone would explain the difference."""
    total = summary.total
    if "baseline" not in total:
        return []
    review, baseline, p_value = total["review"], total["baseline"], total["p_value"]
    if p_value is None:
        return [f"{review} cannot be compared with {baseline}"]
    verdict = "distinguishable" if p_value < _SIGNIFICANT else "not distinguishable"
    lines = [
        f"{review} against {baseline} on {total['n_both']} shared questions: "
        f"{total['difference']:+.1f} points of relative score "
        f"(95 % {text_of(total, 'difference_ci95', '.1f')}, p = {p_value:.4f}, paired permutation "
        f"test): {verdict}"
    ]
    n = _tested(summary.rows)
    if n > 1:
        lines.append(f"p of the {n} lines above {ALL}: corrected for testing {n} (Holm)")
    return lines


def failure_lines(summary: Summary) -> list[str]:
    """Why reviews failed, with how often."""
    reasons = Counter(failure_of(review) for review in summary.reviews if scores_of(review) is None)
    shown = reasons.most_common(_REASONS_SHOWN)
    lines = [f"{count} failed, in no mean: {reason}" for reason, count in shown]
    rest = reasons.total() - sum(count for _, count in shown)
    return [*lines, f"{rest} more failed, in no mean, for other reasons"] if rest else lines


def write(
    summaries: Sequence[Summary], form: str, out: IO[str], ranking: Ranking | None = None
) -> None:
    """Writes the figures, and the ranking after them; in CSV, which is one table, in their place.

    The form is `table`, `markdown`, `csv`, `json` (all that is known, a record a row) or `figures`
    (records of the figures alone).
    """
    rows = [row for summary in summaries for row in summary.rows]
    ranks = [rank._asdict() for rank in ranking.ranks] if ranking else []
    if form == "table":
        print_table(summaries, out, ranking)
    elif form == "markdown":
        out.write(markdown_table(summaries, ranking))
    elif form == "csv":
        write_csv(ranks or rows, out)
    else:
        keys = ("review", *_FIGURES) if len(summaries) > 1 else _FIGURES
        for row in rows:
            kept = {key: row[key] for key in keys if key in row} if form == "figures" else row
            out.write(dumps(kept) + "\n")
        for rank in ranks:
            out.write(dumps(rank) + "\n")


def _grids(
    summaries: Sequence[Summary], ranking: Ranking | None
) -> Iterator[tuple[list[list[str]], int]]:
    """All tables, each with the number of its columns in front that are names."""
    several = len(summaries) > 1
    yield grid(summaries, named=several), 2 if several else 1
    for lines in rank_grids(ranking.ranks if ranking else []):
        yield lines, 1


def markdown_table(summaries: Sequence[Summary], ranking: Ranking | None = None) -> str:
    """The tables in Markdown, with a line a summary on who judged whom."""
    found = []
    for (titles, *texts), names in _grids(summaries, ranking):
        marks = ["---"] * names + ["---:"] * (len(titles) - names)
        lines = [f"| {' | '.join(map(_markdown, line))} |" for line in (titles, marks, *texts)]
        found.append("\n".join(lines))
    # A line each: Markdown joins lines that follow each other.
    notes = [f"- {_markdown(line)}" for line in _notes(summaries, ranking)]
    return "\n\n".join([*found, *(["\n".join(notes)] if notes else [])]) + "\n"


def _notes(summaries: Sequence[Summary], ranking: Ranking | None) -> list[str]:
    lines = ["; ".join(filter(None, [of.name, description(of)])) for of in summaries]
    return [*filter(None, lines), *remarks(summaries, ranking)]


def _markdown(text: str) -> str:
    # Names come from files: they are to make neither columns nor tags.
    for mark in "\\|[":
        text = text.replace(mark, f"\\{mark}")
    return " ".join(printable(text).replace("<", "&lt;").split())


def write_csv(rows: Sequence[Record], out: IO[str]) -> None:
    """All figures as CSV, under the names that records have; intervals in two columns."""
    records = []
    for row in rows:
        record = row | ({"judges": " + ".join(row["judges"])} if "judges" in row else {})
        for key in [key for key in record if key == "dates" or key.endswith("ci95")]:
            names = ("first_date", "last_date") if key == "dates" else (f"{key}_low", f"{key}_high")
            record.update(zip(names, record.pop(key) or (None, None), strict=True))
        records.append(record)
    writer = csv.DictWriter(out, list(records[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)


def print_table(summaries: Sequence[Summary], out: IO[str], ranking: Ranking | None = None) -> None:
    """Writes the terminal's tables; without colours and as wide as it needs where it is no tty.

    On a narrow terminal one becomes several below each other: a figure that is cut off is worse
    than none.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    width = None if out.isatty() else _WIDE
    console = Console(file=out, width=width, highlight=False, soft_wrap=False)
    for lines, names in _grids(summaries, ranking):
        for columns in _parts(lines, names, console.width):
            titles, *rows = [[line[number] for number in columns] for line in lines]
            table = Table(box=box.SIMPLE_HEAD)
            for title in titles[:names]:
                table.add_column(title, overflow="fold")
            for title in titles[names:]:
                table.add_column(title, justify="right", no_wrap=True, overflow="fold")
            for row in rows:
                last = row[names - 1] == ALL
                # A name from a file is text, never markup.
                cells = [Text(printable(text)) for text in row]
                table.add_row(*cells, style="bold" if last else None, end_section=last)
            console.print(table)
    for note in _notes(summaries, ranking):
        console.print(Text(printable(note), style="italic"))


def _parts(lines: Sequence[Sequence[str]], names: int, width: int) -> list[list[int]]:
    """The columns of as many tables as it takes for none to be cut off; each has the names."""
    widths = [max(map(len, column)) + _GAP for column in zip(*lines, strict=True)]
    parts: list[list[int]] = []
    left = 0
    for number in range(names, len(widths)):
        if not parts or widths[number] > left:
            parts.append(list(range(names)))
            left = width - _GAP - sum(widths[:names])
        parts[-1].append(number)
        left -= widths[number]
    return parts
