"""The report as one HTML file that needs nothing else: no network, no framework.

The templates show summaries and reviews as they are. All text from models and files goes through
their escaping. Beside it, a content policy lets only the page's own script run, named by its hash,
so that nothing in an answer could run even if it got past the escaping.
"""

from __future__ import annotations

import base64
import hashlib
import math
import re
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any, NamedTuple

from chatbind_cli.evaluation import scores, tables
from chatbind_cli.evaluation.cases import right_answers
from chatbind_cli.evaluation.contexts import Contexts, context_text
from chatbind_cli.evaluation.ranking import Ranking
from chatbind_cli.evaluation.scores import Item
from chatbind_cli.evaluation.statistics import (
    Pair,
    average,
    averages,
    mean_intervals,
    outcome,
    position_bias,
)
from chatbind_cli.evaluation.summary import ALL, Summary
from chatbind_cli.jsonl import Record
from chatbind_cli.media.modality import MODALITIES

if TYPE_CHECKING:
    import jinja2

    from chatbind_cli.evaluation.report.previews import Preview, Previews

WIDTH = 380.0
_SIDE = 240.0
"""Sizes of the charts, in SVG units."""
_TOP_SCORE = 10.0
_MOST_TICKS = 6
_WINNERS = {1: "second", 0: "tie", -1: "first"}


def render_report(
    summaries: Sequence[Summary],
    *,
    questions: Mapping[str, Record] | None = None,
    answers: Sequence[Mapping[str, Record]] = (),
    contexts: Contexts | None = None,
    references: Mapping[str, Record] | None = None,
    previews: Previews | None = None,
    ranking: Ranking | None = None,
) -> Iterator[str]:
    """The whole page, in pieces.

    Args:
        summaries: the figures of each file of reviews, with the judges' words.
        questions: question records by id, to show what was asked, in their order.
        answers: answer records by id, one mapping an answer file, to show what was answered.
        contexts: captions and boxes of the questions' media, as a judge who cannot see reads them.
        references: answers that count as right, by id; None: those that questions or answers carry.
        previews: of the questions' media; None: they are named, not shown.
        ranking: of all models.
    """
    script, style = part("report.js"), part("base.css") + part("report.css")
    anchors: Counter[str] = Counter()
    entries = [
        entry
        for summary in summaries
        for entry in _entries(summary, questions or {}, answers, previews, anchors)
    ]
    for entry in entries:
        key, media = entry["question_id"], entry["media"]
        given = [side.get(key, {}) for side in answers]
        question = (questions or {}).get(key, {})
        entry["references"] = right_answers(key, question, given, references)
        # the medium that a judge is told of
        context = contexts.of(*media[0][:2]) if contexts and media else None
        entry["context"] = "" if context is None else context_text(context)
    template = _environment().get_template("page.html")
    return template.generate(
        title=_title(summaries),
        summaries=summaries,
        several=len(summaries) > 1,
        single=all(summary.single for summary in summaries),
        ranking=ranking,
        agreements=tables.agreement_lines(summaries),
        entries=entries,
        categories=sorted({entry["category"] for entry in entries}),
        modalities=sorted({entry["modality"] for entry in entries}),
        media={} if previews is None else previews.kept,
        policy="default-src 'none'; img-src data:; media-src data:; base-uri 'none'; "
        f"form-action 'none'; style-src {hash_source(style)}; script-src {hash_source(script)}",
        script=script,
        style=style,
    )


def render_preview(modality: str, name: str, preview: Preview) -> str:
    """One medium as the report shows it."""
    macros: Any = _environment().get_template("preview.j2").module
    return str(macros.shown(modality, name, preview))


@cache
def _environment() -> jinja2.Environment:
    """Templates that escape what they show, and know what summaries and reviews say."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(part),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    for function in (position_bias, relative_chart, sample_of, score_chart):
        environment.globals[function.__name__] = function
    environment.globals |= {"tables": tables, "scores": scores}
    environment.globals |= {"counted": Counter, "width": WIDTH, "side": _SIDE}
    return environment


def part(name: str) -> str:
    """A template, style or script of the report."""
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def hash_source(text: str) -> str:
    """A text of a style or a script as a content policy names it."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _title(summaries: Sequence[Summary]) -> str:
    """Who is compared with whom, as far as the reviews say."""
    firsts, seconds = (dict.fromkeys(of.names[side] for of in summaries) for side in (0, 1))
    if len(firsts) == 1 and all([*firsts, *seconds]):
        return f"{', '.join(seconds)} against {next(iter(firsts))}"
    return "Review"


def _entries(
    summary: Summary,
    questions: Mapping[str, Record],
    answers: Sequence[Mapping[str, Record]],
    previews: Previews | None,
    anchors: Counter[str],
) -> list[Record]:
    """The questions of one summary in their order, each with everything that is known of it."""
    judged: dict[Item, list[Record]] = {}
    for review in summary.reviews:
        judged.setdefault(scores.item_of(review), []).append(review)
    entries = []
    for item, reviews in judged.items():
        review = reviews[0]
        question_id = str(review.get("question_id", ""))
        question = questions.get(question_id, {})
        category = review.get("category") or question.get("category") or "default"
        media = list(_media(question, previews))
        modalities = [
            scores.metadata_of(review).get("modality"),
            *(of for of, _, _ in media),
            "text",
        ]
        given = _answers(review, summary, question_id, answers)
        entry: Record = {
            "anchor": _anchor(question_id, anchors),
            "question_id": question_id,
            "category": str(category).strip(),
            "modality": str(next(filter(None, modalities))),
            "run": summary.name,
            "question": str(question.get("text", "")),
            "media": media,
            "answers": given,
            "lengths": _lengths(summary, item, given),
            "single": summary.single,
            "reviews": sorted(
                reviews, key=lambda r: (scores.judge_of(r), sample_of(r), scores.is_swapped(r))
            ),
        }
        entry |= _outcome(reviews, summary.results[ALL].get(item))
        if summary.single and entry["marks"]:
            entry |= {"winner": "graded", "gap": entry["marks"][0]}
        entries.append(entry)
    places = {question_id: place for place, question_id in enumerate(questions)}
    return sorted(entries, key=lambda entry: places.get(entry["question_id"], len(places)))


def _anchor(question_id: str, taken: Counter[str]) -> str:
    """The name that a link to an entry ends in; the same in every report on these questions."""
    anchor = "q-" + (re.sub(r"[^A-Za-z0-9_.-]+", "-", question_id) or "none")
    taken[anchor] += 1
    return anchor if taken[anchor] == 1 else f"{anchor}--{taken[anchor]}"


def _media(question: Record, previews: Previews | None) -> Iterator[tuple[str, str, Any]]:
    """Modality, name and preview of each medium of a question."""
    for modality in MODALITIES:
        named = question.get(modality)
        if named:
            for name in map(str, named if isinstance(named, list) else [named]):
                yield modality, name, previews.show(modality, name) if previews else None


def _answers(
    review: Record, summary: Summary, question_id: str, answers: Sequence[Mapping[str, Record]]
) -> list[tuple[str, str]]:
    """Of both answers who gave them, and their words."""
    sides = summary.models
    known = all(len(side) == 1 for side in sides)
    models = [side[0] for side in sides] if known else scores.models_of(review)
    pair = scores.metadata_of(review).get("pair")
    if not isinstance(pair, list) or not pair or not all(isinstance(n, int) for n in pair):
        pair = [1, 2]
    found = []
    for place, number in enumerate(pair[:2]):
        if 0 < number <= len(answers):
            answer = answers[number - 1].get(question_id, {"text": "(no answer)"})
            model = models[place] if place < len(models) else ""
            found.append((model, str(answer.get("error") or answer.get("text", ""))))
    return found


def _lengths(summary: Summary, item: Item, answers: Sequence[tuple[str, str]]) -> str:
    """How long the answers are: as the reviews say, else as they are."""
    known = summary.lengths.get(item) or [len(words) for _, words in answers]
    return " and ".join(f"{length:.0f}" for length in known[: 1 if summary.single else 2])


def sample_of(review: Record) -> int:
    """Which of a judge's samples it is, from 0."""
    sample = scores.metadata_of(review).get("sample")
    return sample if isinstance(sample, int) else 0


def _outcome(reviews: Sequence[Record], mean: Pair | None) -> Record:
    """Who won, and whether both orders and all judges say so.

    A question that is in no mean, because it was judged in one order only, shows that order's.
    """
    scored = [
        (review, pair) for review in reviews if (pair := scores.scores_of(review)) is not None
    ]
    mean = mean or (average([pair for _, pair in scored]) if scored else None)
    return {
        "winner": "failed" if mean is None else _WINNERS[outcome(mean)],
        "marks": mean,
        "gap": mean and mean[1] - mean[0],
        "order_differs": _differ((scores.is_swapped(review), pair) for review, pair in scored),
        "judges_differ": _differ((scores.judge_name(review), pair) for review, pair in scored),
    }


def _differ(pairs: Iterable[tuple[Hashable, Pair]]) -> bool:
    """Whether the mean scores of each key name different winners."""
    return len(set(map(outcome, averages(pairs).values()))) > 1


Line = tuple[str, list[tuple[str, float, Pair | None]]]
"""A category's name and its marks: of which side, where, and with which 95 % interval."""


class Chart(NamedTuple):
    """Marks of each category over an axis."""

    lines: list[Line]
    ticks: range

    def place(self, value: float) -> float:
        """Where a value lies, in SVG units."""
        start, stop = self.ticks[0], self.ticks[-1]
        return round((value - start) / (stop - start) * WIDTH, 1)


def relative_chart(rows: Sequence[Record]) -> Chart | None:
    """The relative score of each category; in the axis is 100 %, where both sides are alike."""
    lines: list[Line] = [
        (row["category"], [("second", row["relative"], row["ci95"])])
        for row in rows
        if row["relative"] is not None
    ]
    return Chart(lines, _axis([100.0], lines)) if lines else None


def score_chart(summary: Summary) -> Chart | None:
    """The mean scores of both sides in each category."""
    lines: list[Line] = []
    for row in summary.rows:
        if row["n"]:
            pairs = list(summary.results[row["category"]].values())
            first, second = mean_intervals(pairs) or (None, None)
            marks = [("first", row["mean_1"], first), ("second", row["mean_2"], second)]
            lines.append((row["category"], marks[: 1 if summary.single else 2]))
    return Chart(lines, _axis([0.0, _TOP_SCORE], lines)) if lines else None


def _axis(values: list[float], lines: list[Line]) -> range:
    """Whole numbers at round distances, which hold some values and all marks."""
    marks = [mark for _, of in lines for mark in of]
    values = [*values, *(end for _, value, ends in marks for end in (value, *(ends or ())))]
    low = min(values)
    high = max(*values, low + 4)
    steps = (step * 10**power for power in range(12) for step in (1, 2, 5))
    step = next(step for step in steps if (high - low) / step <= _MOST_TICKS)
    first, last = math.floor(low / step), math.ceil(high / step)
    return range(first * step, (last + 1) * step, step)
