"""From review records to figures: one row a category, and one for all.

Failed reviews are counted and are in no mean: the reference averages its -1 for an
unreadable review in, which is one place where the numbers differ on purpose. The other: a question
that was judged in one order only is in no mean of a judge of both; `groups` has the formula.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from chatbind_cli.jsonl import Record
from chatbind_cli.review.groups import Group, Row
from chatbind_cli.review.scores import (
    Unit,
    failure_of,
    judge_name,
    metadata_of,
    models_of,
    scores_of,
    unit_of,
)
from chatbind_cli.review.statistics import Pair

ALL = "all"
_WORDS = ("content", "text")


@dataclass(slots=True)
class Summary:
    """The figures of one file of reviews, and who judged whom.

    Attributes:
        name: the file's name, or `stdin`.
        rows: the categories in order of first appearance, `all` last.
        judges: the reviewers' names.
        models: the first and the second answerer, as far as the reviews say.
        reviews: the records behind the figures: failed ones too, replaced ones not.
        failures: why reviews failed, with how often.
        results: the mean scores of each question, by category.
        orders: of each question that was judged in both orders, who won as given and who swapped:
            -1 first, 0 tie, 1 second.
        unbalanced: how often judges who never saw both orders of a question saw one as given, and
            swapped.
        by: what makes a row: `category`, `modality` or `judge`.
    """

    name: str
    rows: list[Row]
    judges: list[str]
    models: tuple[list[str], list[str]]
    reviews: list[Record]
    failures: dict[str, int]
    results: dict[str, dict[Unit, Pair]]
    orders: list[tuple[int, int]] = field(default_factory=list)
    unbalanced: tuple[int, int] = (0, 0)
    by: str = "category"


def summarize(
    records: Iterable[Record],
    *,
    name: str = "",
    by: str = "category",
    ignore: Sequence[str] = (),
) -> Summary:
    """The figures of one set of reviews, as one pair of answerers.

    Args:
        records: review records.
        name: what to call the set.
        by: what to group by: `category`, `modality` or `judge`.
        ignore: ids of questions to leave out.
    """
    left_out = set(ignore)
    kept = (record for record in records if str(record.get("question_id")) not in left_out)
    return _summary(_latest(kept, with_words=True), name, by)


def summarize_pairs(
    records: Iterable[Record],
    *,
    name: str = "",
    by: str = "category",
    ignore: Sequence[str] = (),
    with_words: bool = False,
) -> list[Summary]:
    """The figures of one file of reviews, apart for each pair of answer files in it.

    Args:
        records: review records.
        name: what to call the file.
        by: what to group by.
        ignore: ids of questions to leave out.
        with_words: keep what the judges wrote, for a report.
    """
    left_out = set(ignore)
    kept = (record for record in records if str(record.get("question_id")) not in left_out)
    pairs: dict[str, list[Record]] = {}
    strays: list[Record] = []
    reviews_left = _latest(kept, with_words=with_words)
    apart = _answered_twice(reviews_left)
    for review in reviews_left:
        if not metadata_of(review) and scores_of(review) is None:
            strays.append(review)  # it says nothing of who answered, and has no scores to mix
            continue
        pair = str(metadata_of(review).get("pair") or [1, 2])
        key = f"{pair} {models_of(review)}" if pair in apart else pair
        pairs.setdefault(key, []).append(review)
    if strays:
        pairs.setdefault(next(iter(pairs), ""), []).extend(strays)
    summaries = []
    for reviews in pairs.values() or [[]]:
        summary = _summary(reviews, name, by)
        if len(pairs) > 1:
            second = " + ".join(summary.models[1]) or "unknown"
            summary = _renamed(summary, f"{name}: {second}" if name else second)
        summaries.append(summary)
    return summaries


def renamed(summaries: Sequence[Summary], names: Sequence[str]) -> list[Summary]:
    """The summaries with other names for the answerers.

    Args:
        summaries: the figures of one or more pairs of answerers.
        names: of the first answerer, and of the second one of each pair, which then also names it.
    """
    several = len(summaries) > 1
    return [
        replace(_renamed(summary, second) if several else summary, models=([names[0]], [second]))
        for summary, second in zip(summaries, names[1:], strict=True)
    ]


def _answered_twice(reviews: Iterable[Record]) -> set[str]:
    """The pairs of answer files in which a question was answered by several models in turn.

    That is two runs in one file: their reviews are of different things, and no mean is of both.
    """
    seen: dict[tuple[str, str], list[str]] = {}
    apart = set()
    for review in reviews:
        pair = str(metadata_of(review).get("pair") or [1, 2])
        question = str(review.get("question_id", review.get("review_id")))
        models = models_of(review)
        if models and seen.setdefault((pair, question), models) != models:
            apart.add(pair)
    return apart


def _summary(reviews: list[Record], name: str, by: str) -> Summary:
    groups: dict[str, Group] = {}
    judges: dict[str, None] = {}
    models: tuple[dict[str, None], dict[str, None]] = ({}, {})
    failures: dict[str, int] = {}
    for review in reviews:
        if review.get("reviewer_id"):
            judges[str(review["reviewer_id"])] = None
        for side, model in zip(models, models_of(review), strict=False):
            if model:
                side[model] = None
        if scores_of(review) is None:
            reason = failure_of(review)
            failures[reason] = failures.get(reason, 0) + 1
        for key in _keys(review, by):
            groups.setdefault(key, Group()).add(review)
    everything = groups.pop(ALL, Group())
    if reviews:
        groups[ALL] = everything
    balanced = everything.balanced()
    return Summary(
        name=name,
        rows=[group.row(key, name, balanced) for key, group in groups.items()],
        judges=list(judges),
        models=(list(models[0]), list(models[1])),
        reviews=reviews,
        failures=failures,
        results={key: group.results(balanced) for key, group in groups.items()},
        orders=everything.orders(),
        unbalanced=everything.unbalanced(),
        by=by,
    )


def _renamed(summary: Summary, name: str) -> Summary:
    return replace(summary, name=name, rows=[replace(row, review=name) for row in summary.rows])


def _keys(review: Record, by: str) -> list[str]:
    """The groups that a review belongs to. Without a category it is in `all` alone."""
    values = {
        "category": review.get("category"),
        "modality": metadata_of(review).get("modality", "text"),
        "judge": review.get("reviewer_id"),
    }
    value = values[by]
    return [ALL] if value in (None, "", ALL) else [str(value), ALL]


def _latest(records: Iterable[Record], *, with_words: bool) -> list[Record]:
    """The reviews that still hold: of several in the same slot the last one, and none of old words.

    Where an answer or its question changed, or a judge's rule, a later run may fill fewer slots
    than the one before it (one order instead of both). The old reviews of the others are left out.

    Args:
        records: review records, in the order in which they were made.
        with_words: keep what the judges wrote; figures do without, in a fraction of the memory.
    """
    found: dict[Any, Record] = {}
    subjects: dict[tuple[str, str], Any] = {}
    bases: dict[tuple[tuple[str, str], str], Any] = {}
    for number, record in enumerate(records):
        kept = record
        if not with_words:
            kept = {key: value for key, value in record.items() if key not in _WORDS}
        metadata = metadata_of(record)
        found[str(metadata.get("slot") or number)] = kept
        about = _about(record)
        subjects[about] = metadata.get("subject")
        bases[about, judge_name(record)] = metadata.get("basis")
    return [
        record
        for record in found.values()
        if metadata_of(record).get("subject") == subjects[_about(record)]
        and metadata_of(record).get("basis") == bases[_about(record), judge_name(record)]
    ]


def _about(review: Record) -> tuple[str, str]:
    """The question and the pair of answerers: a question whose medium changed is the same one."""
    question, _, models = unit_of(review)
    return question, models
