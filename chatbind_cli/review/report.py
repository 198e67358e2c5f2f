"""The report as one HTML file that needs nothing else: no network, no framework.

All text from models and files goes through the template's escaping. Beside it, a content policy
lets only the page's own script run, named by its hash, so that nothing in an answer could run
even if it got past the escaping. Knows nothing of how the figures came about (`summary`).
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

from chatbind_cli.jsonl import Record
from chatbind_cli.review import charts
from chatbind_cli.review.cases import MODALITIES
from chatbind_cli.review.exhibits import Cabinet, Exhibit
from chatbind_cli.review.reading import (
    Unit,
    failure_of,
    judge_of,
    metadata_of,
    order_of,
    scores_of,
    unit_of,
)
from chatbind_cli.review.statistics import Pair, average, outcome
from chatbind_cli.review.summary import ALL, Summary
from chatbind_cli.review.tables import (
    agreement_lines,
    cells,
    comparison,
    description,
    headings,
    titles,
)

_WINNERS = {1: "second", 0: "tie", -1: "first"}
_SWAPPED = "[2, 1]"
_GIVEN = "[1, 2]"


@dataclass(slots=True)
class Entry:
    """One question of the report with everything that is known of it.

    Attributes:
        anchor: the name that a link to it ends in; the same in every report on these questions.
        models: who gave the answers.
        verdicts: the reviews, each with `scores`, `order`, `judge`, `content` and `error`.
        winner: `first`, `second`, `tie` or `failed`.
        disagreement: whether the order of the answers changed the winner.
        mean: the mean scores, None if every review failed.
        outcomes: who won as given and who won swapped, where both were judged.
    """

    anchor: str
    question_id: str
    category: str
    modality: str
    run: str
    models: tuple[str, str]
    question: str = ""
    exhibits: list[Exhibit] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)
    verdicts: list[dict[str, Any]] = field(default_factory=list)
    winner: str = "failed"
    disagreement: bool = False
    mean: Pair | None = None
    outcomes: tuple[int, int] | None = None


def render_report(
    summaries: Sequence[Summary],
    *,
    questions: Mapping[str, Record] | None = None,
    answers: Sequence[Mapping[str, Record]] = (),
    cabinet: Cabinet | None = None,
) -> Iterator[str]:
    """The whole page, in pieces.

    Args:
        summaries: the figures of each file of reviews, with the judges' words.
        questions: question records by id, to show what was asked.
        answers: answer records by id, one mapping an answer file, to show what was answered.
        cabinet: where the questions' media come from; None: they are named, not shown.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_part),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    script, style = _part("report_script.j2"), _part("report_style.j2")
    entries = _Entries(questions or {}, answers, cabinet or Cabinet())
    sections = [_section(summary, entries.of(summary)) for summary in summaries]
    everything = [entry for section in sections for entry in section["entries"]]
    return environment.get_template("report.html").generate(
        sections=sections,
        agreements=agreement_lines(summaries),
        runs=[summary.name for summary in summaries],
        categories=_sorted(entry.category for entry in everything),
        modalities=_sorted(entry.modality for entry in everything),
        n_entries=len(everything),
        blocks=entries.cabinet.blocks,
        policy="default-src 'none'; img-src data:; media-src data:; base-uri 'none'; "
        f"form-action 'none'; style-src {_hash(style)}; script-src {_hash(script)}",
        script=script,
        style=style,
        width=charts.WIDTH,
        side=charts.SIDE,
    )


def _part(name: str) -> str:
    return resources.files("chatbind_cli.review").joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _sorted(values: Iterator[str]) -> list[str]:
    return sorted(set(values))


def _section(summary: Summary, entries: list[Entry]) -> dict[str, Any]:
    """What the template needs to know of one file of reviews."""
    columns = headings(summary.rows, several=False)
    outcomes = [entry.outcomes for entry in entries if entry.outcomes is not None]
    return {
        "name": summary.name,
        "description": description(summary, named=False),
        "columns": titles(columns, summary.by),
        "rows": [(row.category == ALL, cells(row, columns)) for row in summary.rows],
        "comparison": next(
            (comparison(row) for row in summary.rows if row.category == ALL and row.baseline), ""
        ),
        "relative": charts.relative_chart(summary.rows),
        "scores": charts.score_chart(summary.results),
        "dots": charts.scatter(entry.mean for entry in entries if entry.mean is not None),
        "orders": charts.order_table(outcomes),
        "n_orders": len(outcomes),
        "bias": charts.position_bias(outcomes),
        "failures": summary.failures,
        "entries": entries,
    }


class _Entries:
    """Makes the entries of one file after the other, with anchors that no other entry has."""

    def __init__(
        self,
        questions: Mapping[str, Record],
        answers: Sequence[Mapping[str, Record]],
        cabinet: Cabinet,
    ) -> None:
        self.cabinet = cabinet
        self._questions = questions
        self._answers = answers
        self._anchors: set[str] = set()

    def of(self, summary: Summary) -> list[Entry]:
        found: dict[Unit, Entry] = {}
        scores: dict[Unit, dict[str, list[Pair]]] = {}
        for review in summary.reviews:
            unit = unit_of(review)
            if unit not in found:
                found[unit] = self._entry(review, summary.name)
            pair = scores_of(review)
            found[unit].verdicts.append(_verdict(review, pair))
            if pair is not None:
                scores.setdefault(unit, {}).setdefault(order_of(review), []).append(pair)
        for unit, entry in found.items():
            _decide(entry, scores.get(unit, {}))
        return list(found.values())

    def _entry(self, review: Record, run: str) -> Entry:
        metadata = metadata_of(review)
        question_id = str(review.get("question_id", ""))
        question = self._questions.get(question_id, {})
        modality = str(metadata.get("modality") or _modality_of(question))
        media = (question.get(modality) or []) if modality in MODALITIES else []
        names = [str(name) for name in (media if isinstance(media, list) else [media])]
        models = [str(model) for model in metadata.get("models") or ()]
        pair = [number - 1 for number in metadata.get("pair") or (1, 2)]
        return Entry(
            anchor=self._anchor(question_id),
            question_id=question_id,
            category=str(review.get("category") or "default"),
            modality=modality,
            run=run,
            models=(models[0], models[1]) if len(models) == 2 else ("", ""),
            question=str(question.get("text", "")),
            exhibits=self.cabinet.show(modality, names),
            answers=[
                _answer_text(self._answers[number].get(question_id))
                for number in pair
                if number < len(self._answers)
            ],
        )

    def _anchor(self, question_id: str) -> str:
        plain = "q-" + (re.sub(r"[^A-Za-z0-9_.-]+", "-", question_id) or "none")
        anchor, number = plain, 1
        while anchor in self._anchors:
            number += 1
            anchor = f"{plain}--{number}"
        self._anchors.add(anchor)
        return anchor


def _modality_of(question: Record) -> str:
    return next((name for name in MODALITIES if question.get(name)), "text")


def _answer_text(answer: Record | None) -> str:
    if answer is None:
        return "(no answer)"
    return str(answer.get("text", answer.get("error", "")))


def _verdict(review: Record, pair: Pair | None) -> dict[str, Any]:
    return {
        "scores": None if pair is None else [f"{score:g}" for score in pair],
        "swapped": order_of(review) == _SWAPPED,
        "judge": judge_of(review),
        "content": str(review.get("content") or review.get("text") or ""),
        "error": "" if pair is not None else failure_of(review),
    }


def _decide(entry: Entry, by_order: Mapping[str, list[Pair]]) -> None:
    """Fills in who won, and whether both orders say so."""
    if not by_order:
        return
    entry.mean = average([pair for pairs in by_order.values() for pair in pairs])
    entry.winner = _WINNERS[outcome(entry.mean)]
    winners = {order: outcome(average(pairs)) for order, pairs in by_order.items()}
    entry.disagreement = len(set(winners.values())) > 1
    if _GIVEN in winners and _SWAPPED in winners:
        entry.outcomes = winners[_GIVEN], winners[_SWAPPED]
