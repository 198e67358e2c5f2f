"""From review records to figures: one row a category, and one for all.

Failed reviews are counted and are in no mean: the reference averages its -1 for an
unreadable review in, which is one place where the numbers differ on purpose. The other: a question
that was judged in one order only is in no mean of a judge of both; `figures` has the formula.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from chatbind_cli.errors import RecordError, UsageError
from chatbind_cli.evaluation.figures import (
    Row,
    by_question,
    judges_of_both_orders,
    mean_scores,
    one_order_only,
    order_outcomes,
    row_of,
)
from chatbind_cli.evaluation.scores import (
    Item,
    failure_of,
    item_of,
    judge_name,
    metadata_of,
    models_of,
    scores_of,
)
from chatbind_cli.evaluation.statistics import Pair, average, holm, paired_difference
from chatbind_cli.jsonl import Record

ALL = "all"
_WORDS = ("content", "text")


@dataclass(slots=True)
class Summary:
    """The figures of one pair of answer files, and who judged whom.

    Attributes:
        name: the file's name, or `stdin`; of several pairs in it with the second answerer's.
        rows: the categories in order of first appearance, `all` last.
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
    models: tuple[list[str], list[str]]
    reviews: list[Record]
    failures: dict[str, int]
    results: dict[str, dict[Item, Pair]]
    orders: list[tuple[int, int]]
    unbalanced: tuple[int, int]
    by: str

    @property
    def total(self) -> Row | None:
        """The row of all categories; None without reviews."""
        return next((row for row in self.rows if row.category == ALL), None)

    def renamed(self, name: str) -> Summary:
        """The same figures under another name."""
        return replace(self, name=name, rows=[replace(row, review=name) for row in self.rows])


def summarize(
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
        by: what to group by: `category`, `modality` or `judge`.
        ignore: ids of questions to leave out.
        with_words: keep what the judges wrote, for a report.
    """
    left_out = set(ignore)
    kept = (record for record in records if str(record.get("question_id")) not in left_out)
    pairs = _by_pair(latest(kept, with_words=with_words))
    summaries = [_summary(reviews, name, by) for reviews in pairs or [[]]]
    if len(summaries) == 1:
        return summaries
    seconds = [" + ".join(summary.models[1]) or "unknown" for summary in summaries]
    names = [f"{name}: {second}" if name else second for second in seconds]
    return [summary.renamed(of) for summary, of in zip(summaries, names, strict=True)]


def renamed(summaries: Sequence[Summary], names: Sequence[str]) -> list[Summary]:
    """The summaries with other names for the answerers.

    Args:
        summaries: the figures of one or more pairs of answerers.
        names: of the first answerer, and of the second one of each pair, which then also names it.
    """
    if len(names) != len(summaries) + 1:
        raise UsageError(
            f"--names needs {len(summaries) + 1} names here, not {len(names)}",
            hint="the first answerer's, and the second one's of each pair",
        )
    several = len(summaries) > 1
    return [
        replace(summary.renamed(second) if several else summary, models=([names[0]], [second]))
        for summary, second in zip(summaries, names[1:], strict=True)
    ]


def compared(summaries: Sequence[Summary], baselines: Sequence[Summary]) -> list[Summary]:
    """Each run beside its baseline: the only one, or the one at its place among as many.

    Rows are compared with the baseline's on the questions that both have. The test of `all` is
    the one that was wanted; looking at each category as well is several, so their p values are
    corrected for their number.

    Raises:
        RecordError: a run and its baseline have no question in common.
    """
    if len(baselines) == 1:
        baselines = [baselines[0]] * len(summaries)
    if len(baselines) != len(summaries):
        raise UsageError(
            f"the baseline has {len(baselines)} pairs of answer files, the reviews {len(summaries)}"
        )
    found = []
    for summary, baseline in zip(summaries, baselines, strict=True):
        rows = [_beside(row, summary, baseline) for row in summary.rows]
        tested = {row.category: row.p_value for row in rows if row.p_value is not None}
        total = tested.pop(ALL, None)
        p_values = dict(zip(tested, holm(list(tested.values())), strict=True)) | {ALL: total}
        rows = [replace(row, p_value=p_values.get(row.category)) for row in rows]
        found.append(replace(summary, rows=rows))
    return found


def _beside(row: Row, summary: Summary, baseline: Summary) -> Row:
    results = [of.results.get(row.category, {}) for of in (summary, baseline)]
    # Records of the reference do not say what a question is about.
    told = all(modality != "None" for found in results for _, modality, _ in found)
    ours, theirs = (_by_question(found, with_modality=told) for found in results)
    shared = [question for question in ours if question in theirs]
    if row.category == ALL and not shared:
        raise RecordError("shares no question with the baseline", where=summary.name)
    row = replace(row, baseline=baseline.name, n_both=len(shared))
    found = paired_difference([ours[q] for q in shared], [theirs[q] for q in shared])
    if found is None:
        return row
    difference, ci95, p_value = found
    return replace(row, difference=difference, difference_ci95=ci95, p_value=p_value)


def _by_question(results: dict[Item, Pair], *, with_modality: bool) -> dict[tuple[str, str], Pair]:
    """Results without the answerers' names, which are what differs between two runs."""
    pairs: dict[tuple[str, str], list[Pair]] = {}
    for (question, modality, _), pair in results.items():
        pairs.setdefault((question, modality if with_modality else ""), []).append(pair)
    return {question: average(found) for question, found in pairs.items()}


def _summary(reviews: list[Record], name: str, by: str) -> Summary:
    groups: dict[str, list[Record]] = {}
    models: tuple[dict[str, None], dict[str, None]] = ({}, {})
    for review in reviews:
        for side, model in zip(models, models_of(review), strict=False):
            if model:
                side[model] = None
        category = _category(review, by)
        if category != ALL:
            groups.setdefault(category, []).append(review)
    if reviews:
        groups[ALL] = reviews
    everything = by_question(reviews)
    balanced = judges_of_both_orders(everything)
    questions = {key: by_question(group) for key, group in groups.items()}
    failed = (failure_of(review) for review in reviews if scores_of(review) is None)
    return Summary(
        name=name,
        rows=[
            row_of(group, questions[key], balanced, category=key, run=name)
            for key, group in groups.items()
        ],
        models=(list(models[0]), list(models[1])),
        reviews=reviews,
        failures=dict(Counter(failed)),
        results={key: mean_scores(found, balanced) for key, found in questions.items()},
        orders=order_outcomes(everything),
        unbalanced=one_order_only(everything),
        by=by,
    )


def _category(review: Record, by: str) -> str:
    """What makes the review's line of the table; without a category it is in `all` alone."""
    values = {
        "category": review.get("category"),
        "modality": metadata_of(review).get("modality", "text"),
        "judge": review.get("reviewer_id"),
    }
    return ALL if values[by] in (None, "") else str(values[by])


def _by_pair(reviews: Sequence[Record]) -> list[list[Record]]:
    """The reviews of each pair of answer files.

    A pair in which a question was answered by several models in turn is two runs in one file:
    their reviews are of different things, and no mean is of both.
    """
    pairs = [str(metadata_of(review).get("pair") or [1, 2]) for review in reviews]
    seen: dict[tuple[str, str], list[str]] = {}
    in_turn = set()
    for pair, review in zip(pairs, reviews, strict=True):
        models = models_of(review)
        if models and seen.setdefault((pair, item_of(review)[0]), models) != models:
            in_turn.add(pair)
    found: dict[str, list[Record]] = {}
    strays: list[Record] = []
    for pair, review in zip(pairs, reviews, strict=True):
        if not metadata_of(review) and scores_of(review) is None:
            strays.append(review)  # it says nothing of who answered, and has no scores to mix
            continue
        key = f"{pair} {models_of(review)}" if pair in in_turn else pair
        found.setdefault(key, []).append(review)
    if strays:
        found.setdefault(next(iter(found), ""), []).extend(strays)
    return list(found.values())


def latest(records: Iterable[Record], *, with_words: bool) -> list[Record]:
    """The reviews that still hold: of several with one key the last one, and none of old words.

    Where an answer or its question changed, or a judge's rule, a later run may make fewer reviews
    than the one before it (one order instead of both). The old ones of the others are left out.

    Args:
        records: review records, in the order in which they were made.
        with_words: keep what the judges wrote; figures do without, in a fraction of the memory.
    """
    found: dict[Any, Record] = {}
    inputs: dict[tuple[str, str], Any] = {}
    judges: dict[tuple[tuple[str, str], str], Any] = {}
    for number, record in enumerate(records):
        kept = record
        if not with_words:
            kept = {key: value for key, value in record.items() if key not in _WORDS}
        metadata = metadata_of(record)
        found[str(metadata.get("slot") or number)] = kept
        about = _about(record)
        inputs[about] = metadata.get("subject")
        judges[about, judge_name(record)] = metadata.get("basis")
    return [
        record
        for record in found.values()
        if metadata_of(record).get("subject") == inputs[_about(record)]
        and metadata_of(record).get("basis") == judges[_about(record), judge_name(record)]
    ]


def _about(review: Record) -> tuple[str, str]:
    """The question and the pair of answerers: a question whose medium changed is the same one."""
    question, _, models = item_of(review)
    return question, models
