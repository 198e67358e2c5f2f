"""The report as one HTML file that needs nothing else: no network, no framework.

All text from models and files goes through the template's escaping. Beside it, a content policy
lets only the page's own script run, named by its hash, so that nothing in an answer could run
even if it got past the escaping. What the template gets are plain mappings.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import resources
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from chatbind_cli.evaluation.figures import Row
from chatbind_cli.evaluation.report import charts
from chatbind_cli.evaluation.scores import (
    Item,
    failure_of,
    is_swapped,
    item_of,
    judge_name,
    judge_of,
    metadata_of,
    models_of,
    scores_of,
)
from chatbind_cli.evaluation.statistics import Pair, average, outcome, position_bias
from chatbind_cli.evaluation.summary import ALL, Summary
from chatbind_cli.evaluation.tables import (
    agreement_lines,
    comparison_lines,
    description,
    failure_lines,
    grid,
    interval,
    order_lines,
    percents,
)
from chatbind_cli.jsonl import Record
from chatbind_cli.media.modality import MODALITIES

if TYPE_CHECKING:
    from chatbind_cli.evaluation.report.previews import Previews

_WINNERS = {1: "second", 0: "tie", -1: "first"}


def render_report(
    summaries: Sequence[Summary],
    *,
    questions: Mapping[str, Record] | None = None,
    answers: Sequence[Mapping[str, Record]] = (),
    previews: Previews | None = None,
) -> Iterator[str]:
    """The whole page, in pieces.

    Args:
        summaries: the figures of each file of reviews, with the judges' words.
        questions: question records by id, to show what was asked, in their order.
        answers: answer records by id, one mapping an answer file, to show what was answered.
        previews: of the questions' media; None: they are named, not shown.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_part),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    script, style = _part("script.j2"), _part("style.j2")
    questions = questions or {}
    sections = [_section(summary, several=len(summaries) > 1) for summary in summaries]
    places = {question_id: place for place, question_id in enumerate(questions)}
    anchors: set[str] = set()
    everything = []
    for summary, section in zip(summaries, sections, strict=True):
        entries = _entries(summary, questions, answers, previews, anchors)
        section["entries"] = sorted(
            entries, key=lambda e: places.get(e["question_id"], len(places))
        )
        everything += entries
    return environment.get_template("page.html").generate(
        title=_title(summaries),
        sections=sections,
        agreements=agreement_lines(summaries),
        runs=[summary.name for summary in summaries],
        categories=sorted({entry["category"] for entry in everything}),
        modalities=sorted({entry["modality"] for entry in everything}),
        n_entries=len(everything),
        media=[] if previews is None else previews.kept,
        policy="default-src 'none'; img-src data:; media-src data:; base-uri 'none'; "
        f"form-action 'none'; style-src {_hash(style)}; script-src {_hash(script)}",
        script=script,
        style=style,
        width=charts.WIDTH,
        side=charts.SIDE,
    )


def _part(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _title(summaries: Sequence[Summary]) -> str:
    """Who is compared with whom, as far as the reviews say."""
    firsts = dict.fromkeys(" + ".join(summary.models[0]) for summary in summaries)
    seconds = dict.fromkeys(" + ".join(summary.models[1]) for summary in summaries)
    if len(firsts) == 1 and all([*firsts, *seconds]):
        return f"{', '.join(seconds)} against {next(iter(firsts))}"
    return "Review"


def _section(summary: Summary, *, several: bool) -> dict[str, Any]:
    """The figures and charts of one file of reviews; one of `several` filters by its name."""
    titles, *texts = grid([summary], named=False)
    total = summary.total
    return {
        "name": summary.name,
        "description": description(summary, named=False),
        "columns": titles,
        "rows": [(line[0] == ALL, line) for line in texts],
        "notes": [*order_lines(summary), *comparison_lines(summary)],
        "checked": total is not None and total.accuracy is not None,
        "relative": charts.relative_chart(summary.rows),
        "scores": charts.score_chart(summary.results),
        "dots": charts.scatter(summary.results.get(ALL, {}).values()),
        "orders": charts.order_table(summary.orders),
        "bias": position_bias(summary.orders),
        "by": summary.by,
        "within": f"run={quote(summary.name, safe='')}&" if several else "",
        "outcomes": charts.outcome_bars(summary.rows),
        "glances": [] if total is None else list(_glances(total, summary)),
        "failures": failure_lines(summary),
    }


def _glances(row: Row, summary: Summary) -> Iterator[tuple[str, str, str]]:
    """What one wants to know first: what it is, the figure in large letters, how sure."""
    if row.accuracy is not None:
        yield "accuracy", percents(row.accuracy), "right answers, first / second"
    if row.relative is not None:
        sure = f"95 % interval {interval(row.ci95)}" if row.ci95 else "of one question"
        yield "relative score", f"{row.relative:.1f} %", sure
    if row.n:
        counts = f"{row.win} : {row.tie} : {row.lose}"
        yield "second better : tie : first better", counts, f"{row.n:,} questions"
    if row.consistency is not None:
        first, last = position_bias(summary.orders)
        detail = f"else the answer shown first won {first:,} x, the one shown last {last:,} x"
        yield "same winner in both orders", f"{100 * row.consistency:.1f} %", detail
    if row.kappa is not None:
        yield "agreement of the judges", f"{row.kappa:.2f}", "Cohen's kappa"
    of = f"of {len(summary.reviews):,} reviews"
    yield "failed", f"{row.failed:,}", f"{of}; in no mean" if row.failed else of
    if row.cost_usd:
        tokens = f"{row.prompt_tokens:,} tokens sent, {row.completion_tokens:,} received"
        yield "paid at most", f"{row.cost_usd:.4f} USD", tokens


def _entries(
    summary: Summary,
    questions: Mapping[str, Record],
    answers: Sequence[Mapping[str, Record]],
    previews: Previews | None,
    anchors: set[str],
) -> list[dict[str, Any]]:
    """The questions of one file of reviews, each with everything that is known of it."""
    judged: dict[Item, list[Record]] = {}
    for review in summary.reviews:
        judged.setdefault(item_of(review), []).append(review)
    means = summary.results.get(ALL, {})
    entries = []
    for item, reviews in judged.items():
        review = reviews[0]
        question_id = str(review.get("question_id", ""))
        question = questions.get(question_id, {})
        media = _media(question, previews)
        modalities = [
            metadata_of(review).get("modality"),
            *(of["modality"] for of in media),
            "text",
        ]
        entries.append(
            {
                "anchor": _anchor(question_id, anchors),
                "question_id": question_id,
                "category": str(
                    review.get("category") or question.get("category") or "default"
                ).strip(),
                "modality": str(next(filter(None, modalities))),
                "run": summary.name,
                "question": str(question.get("text", "")),
                "media": media,
                "answers": _answers(review, summary, question_id, answers),
                "verdicts": _verdicts(reviews),
                **_outcome(reviews, means.get(item)),
            }
        )
    return entries


def _anchor(question_id: str, taken: set[str]) -> str:
    """The name that a link to an entry ends in; the same in every report on these questions."""
    plain = "q-" + (re.sub(r"[^A-Za-z0-9_.-]+", "-", question_id) or "none")
    anchor, number = plain, 1
    while anchor in taken:
        number += 1
        anchor = f"{plain}--{number}"
    taken.add(anchor)
    return anchor


def _media(question: Record, previews: Previews | None) -> list[dict[str, Any]]:
    """The media of a question, which may be of several modalities."""
    return [
        {
            "modality": modality,
            "name": str(name),
            "preview": previews.show(modality, str(name)) if previews else None,
        }
        for modality in MODALITIES
        if (named := question.get(modality))
        for name in (named if isinstance(named, list) else [named])
    ]


def _answers(
    review: Record, summary: Summary, question_id: str, answers: Sequence[Mapping[str, Record]]
) -> list[tuple[str, str]]:
    """Of both answers who gave them, and their words."""
    sides = summary.models
    known = all(len(side) == 1 for side in sides)
    models = [side[0] for side in sides] if known else models_of(review)
    pair = metadata_of(review).get("pair")
    if not isinstance(pair, list) or not pair or not all(isinstance(n, int) for n in pair):
        pair = [1, 2]
    found = []
    for place, number in enumerate(pair[:2]):
        if 0 < number <= len(answers):
            answer = answers[number - 1].get(question_id, {"text": "(no answer)"})
            model = models[place] if len(models) == 2 else ""
            found.append((model, str(answer.get("text", answer.get("error", "")))))
    return found


def _verdicts(reviews: Iterable[Record]) -> list[dict[str, Any]]:
    """The reviews of a question, judge by judge."""
    found = []
    for review in reviews:
        metadata, pair = metadata_of(review), scores_of(review)
        sample = metadata.get("sample")
        found.append(
            {
                "judge": judge_of(review),
                "sample": sample if isinstance(sample, int) else 0,
                "swapped": is_swapped(review),
                "scores": None if pair is None else _as_text(pair, digits=6),
                "content": str(review.get("content") or review.get("text") or ""),
                "error": "" if pair is not None else failure_of(review),
                "asked_again": metadata.get("asked_again") is True,
            }
        )
    return sorted(
        found, key=lambda verdict: (verdict["judge"], verdict["sample"], verdict["swapped"])
    )


def _as_text(pair: Pair, digits: int) -> tuple[str, str]:
    return f"{pair[0]:.{digits}g}", f"{pair[1]:.{digits}g}"


def _outcome(reviews: Iterable[Record], mean: Pair | None) -> dict[str, Any]:
    """Who won, and whether both orders and all judges say so.

    A question that is in no mean, because it was judged in one order only, shows that order's.
    """
    scored = [(review, pair) for review in reviews if (pair := scores_of(review)) is not None]
    if not scored:
        return {"winner": "failed", "order_differs": False, "judges_differ": False, "marks": None}
    mean = mean or average([pair for _, pair in scored])
    return {
        "winner": _WINNERS[outcome(mean)],
        "order_differs": _differ((str(is_swapped(review)), pair) for review, pair in scored),
        "judges_differ": _differ((judge_name(review), pair) for review, pair in scored),
        "marks": _as_text(mean, digits=3),
    }


def _differ(scores: Iterable[tuple[str, Pair]]) -> bool:
    """Whether the mean scores of each group name different winners."""
    groups: dict[str, list[Pair]] = {}
    for group, pair in scores:
        groups.setdefault(group, []).append(pair)
    return len({outcome(average(pairs)) for pairs in groups.values()}) > 1
