"""The report as one HTML file that needs nothing else: no network, no framework.

All text from models and files goes through the template's escaping. Beside it, a content policy
lets only the page's own script run, named by its hash, so that nothing in an answer could run
even if it got past the escaping. Knows nothing of how the figures came about (`summary`).
"""

from __future__ import annotations

import base64
import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

from chatbind_cli.jsonl import Record
from chatbind_cli.review.statistics import Pair, average, outcome
from chatbind_cli.review.summary import ALL, Row, Summary, scores_of
from chatbind_cli.review.tables import cells, description, headings

_OUTCOMES = {1: "second", 0: "tie", -1: "first", None: "failed"}
_PLOT_WIDTH = 420.0  # of the interval chart's axis, in SVG units
_SCATTER = 260.0
_TOP_SCORE = 10.0


@dataclass(frozen=True, slots=True)
class Bar:
    """A category's line in the interval chart, in SVG units from the axis' left end."""

    label: str
    value: float
    low: float | None
    high: float | None
    text: str


@dataclass(frozen=True, slots=True)
class Dot:
    """Questions with the same pair of scores, in the scatter chart."""

    x: float
    y: float
    radius: float
    text: str


@dataclass(slots=True)
class Entry:
    """One question of the report with everything that is known of it.

    Attributes:
        anchor: the name that a link to it ends in.
        verdicts: the reviews, each with `scores`, `order`, `judge`, `content` and `error`.
        winner: `first`, `second`, `tie` or `failed`.
        disagreement: whether the order of the answers changed the winner.
    """

    anchor: str
    question_id: str
    category: str
    modality: str
    question: str = ""
    media: str = ""
    answers: list[str] = field(default_factory=list)
    verdicts: list[dict[str, Any]] = field(default_factory=list)
    winner: str = "failed"
    disagreement: bool = False
    mean: Pair | None = None


def render_report(
    summaries: Sequence[Summary],
    *,
    questions: Mapping[str, Record] | None = None,
    answers: Sequence[Mapping[str, Record]] = (),
) -> str:
    """The whole page.

    Args:
        summaries: the figures of each file of reviews.
        questions: question records by id, to show what was asked.
        answers: answer records by id, one mapping a side, to show what was answered.
    """
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    script, style = _part("report_script.j2"), _part("report_style.j2")
    sections = [
        _section(number, summary, questions or {}, answers)
        for number, summary in enumerate(summaries)
    ]
    entries = [entry for section in sections for entry in section["entries"]]
    return environment.from_string(_part("report.html")).render(
        sections=sections,
        categories=sorted({entry.category for entry in entries}),
        n_entries=len(entries),
        policy=f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}",
        script=script,
        style=style,
    )


def _part(name: str) -> str:
    return resources.files("chatbind_cli.review").joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _section(
    number: int,
    summary: Summary,
    questions: Mapping[str, Record],
    answers: Sequence[Mapping[str, Record]],
) -> dict[str, Any]:
    """What the template needs to know of one file of reviews."""
    entries = _entries(number, summary.reviews, questions, answers)
    columns = headings(summary.rows, several=False)
    bars, ticks = _bars(summary.rows)
    return {
        "name": summary.name,
        "description": description(summary),
        "columns": columns,
        "rows": [(row.category == ALL, cells(row, columns)) for row in summary.rows],
        "bars": bars,
        "ticks": ticks,
        "plot_width": _PLOT_WIDTH,
        "dots": _dots(entries),
        "scatter": _SCATTER,
        "failures": summary.failures,
        "entries": entries,
    }


def _entries(
    number: int,
    records: Sequence[Record],
    questions: Mapping[str, Record],
    answers: Sequence[Mapping[str, Record]],
) -> list[Entry]:
    found: dict[tuple[str, str, str], Entry] = {}
    scores: dict[str, list[tuple[str, Pair]]] = {}
    for record in records:
        metadata = record.get("metadata") or {}
        question_id = str(record.get("question_id", ""))
        modality = str(metadata.get("modality", "text"))
        key = (question_id, modality, str(metadata.get("models")))
        if key not in found:
            found[key] = _entry(f"r{number}-{len(found) + 1}", record, modality, questions, answers)
        entry = found[key]
        pair = scores_of(record)
        order = str(metadata.get("order", [1, 2]))
        if pair is not None:
            scores.setdefault(entry.anchor, []).append((order, pair))
        entry.verdicts.append(
            {
                "scores": None if pair is None else f"{pair[0]:g} : {pair[1]:g}",
                "order": "second answer shown first" if order == "[2, 1]" else "",
                "judge": str(record.get("reviewer_id") or ""),
                "content": str(record.get("content") or record.get("text") or ""),
                "error": "" if pair is not None else str(record.get("error") or "no two scores"),
            }
        )
    for entry in found.values():
        _decide(entry, scores.get(entry.anchor, []))
    return list(found.values())


def _entry(
    anchor: str,
    record: Record,
    modality: str,
    questions: Mapping[str, Record],
    answers: Sequence[Mapping[str, Record]],
) -> Entry:
    question_id = str(record.get("question_id", ""))
    question = questions.get(question_id, {})
    media = question.get(modality, "")
    return Entry(
        anchor=anchor,
        question_id=question_id,
        category=str(record.get("category") or "default"),
        modality=modality,
        question=str(question.get("text", "")),
        media=", ".join(map(str, media)) if isinstance(media, list) else str(media),
        answers=[
            str(side[question_id].get("text", side[question_id].get("error", "")))
            if question_id in side
            else "(no answer)"
            for side in answers
        ],
    )


def _decide(entry: Entry, scores: Sequence[tuple[str, Pair]]) -> None:
    """Fills in who won, and whether both orders say so."""
    if not scores:
        return
    entry.mean = average([pair for _, pair in scores])
    entry.winner = _OUTCOMES[outcome(entry.mean)]
    orders = {order for order, _ in scores}
    winners = {outcome(average([p for o, p in scores if o == order])) for order in orders}
    entry.disagreement = len(winners) > 1


def _bars(rows: Sequence[Row]) -> tuple[list[Bar], list[tuple[float, str]]]:
    """The interval chart's lines and its axis' marks."""
    shown = [row for row in rows if row.relative is not None]
    highest = max([100.0, *(row.ci95[1] if row.ci95 else row.relative or 0.0 for row in shown)])
    step = 25 if highest <= 200 else 50 * (1 + int(highest // 500))
    end = step * (int(highest // step) + 1)

    def place(percent: float) -> float:
        return round(percent / end * _PLOT_WIDTH, 1)

    bars = []
    for row in shown:
        value = row.relative or 0.0
        low, high = (None, None) if row.ci95 is None else map(place, row.ci95)
        text = f"{row.category}: {value:.1f} %"
        if row.ci95 is not None:
            text += f" ({row.ci95[0]:.1f} to {row.ci95[1]:.1f})"
        bars.append(Bar(row.category, place(value), low, high, text))
    return bars, [(place(mark), str(mark)) for mark in range(0, end + 1, step)]


def _dots(entries: Sequence[Entry]) -> list[Dot]:
    """One dot for each pair of scores, its area the number of questions."""
    counts = Counter(entry.mean for entry in entries if entry.mean is not None)
    dots = []
    for (first, second), count in sorted(counts.items(), key=lambda item: -item[1]):
        top = max(_TOP_SCORE, first, second)
        text = f"first {first:g}, second {second:g}: {count} questions"
        x, y = first / top * _SCATTER, (1 - second / top) * _SCATTER
        dots.append(Dot(round(x, 1), round(y, 1), round(min(3 + count**0.5, 14), 1), text))
    return dots
