"""From review records to figures: one row a category, and one for all.

Failed reviews are counted and are in no mean: the reference averages its -1 for an
unreadable review in, which is the one place where the numbers differ on purpose. Knows nothing
of how a table looks (`tables`).
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from chatbind_cli.jsonl import Record
from chatbind_cli.review.agreement import agreements
from chatbind_cli.review.reading import (
    Unit,
    failure_of,
    judge_name,
    judge_of,
    latest,
    metadata_of,
    models_of,
    order_of,
    paid_usd,
    scores_of,
    unit_of,
)
from chatbind_cli.review.statistics import (
    Pair,
    average,
    mean_pair,
    outcome,
    relative_interval,
    relative_score,
)

ALL = "all"
_LAST_TIME = 253_402_300_800
"""The end of the year 9999, in seconds: what is later is no time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """The figures of one category; records have these names.

    Attributes:
        category: the category's name (the modality's, the judge's: whatever makes a line), or
            `all`.
        n: questions with at least one review that counts.
        mean_1: mean score of the first answers; a question's reviews are averaged before.
        mean_2: the same of the second answers.
        relative: 100 x mean_2 / mean_1, in percent; None where mean_1 is zero.
        ci95: 95 % bootstrap interval of `relative`, drawn by question.
        win: questions where the second answer is better.
        tie: questions where both are equal.
        lose: questions where the second answer is worse.
        consistency: share of the questions judged in both orders where both orders have the same
            winner; None where no question was judged in both.
        failed: reviews without scores.
        exact_1: share of the first answers that say exactly what the reference answer says; None
            where the judge did not compare.
        exact_2: the same of the second answers.
        label_1: share of the first answers that contain the question's label.
        label_2: the same of the second answers.
        kappa: agreement of the judges on who is better, Cohen's kappa (the mean over pairs of
            judges); None for one judge.
        review: which file or stream the reviews come from.
        judges: who judged.
        dates: the first and the last day of judging, as far as the reviews say.
        prompt_tokens: what the reviews took, as the judges counted it.
        completion_tokens: the same of what they wrote.
        cost_usd: what was paid at most, as far as prices were known; see `reading.paid_usd`.
        baseline: the run that this one is compared with.
        n_both: questions that both runs have.
        difference: this run's relative score on them minus the baseline's, in points.
        difference_ci95: its 95 % bootstrap interval, drawn by question.
        p_value: of a paired permutation test: how often chance gives at least this difference.
    """

    category: str
    n: int
    mean_1: float | None
    mean_2: float | None
    relative: float | None
    ci95: Pair | None
    win: int
    tie: int
    lose: int
    consistency: float | None
    failed: int
    exact_1: float | None = None
    exact_2: float | None = None
    label_1: float | None = None
    label_2: float | None = None
    kappa: float | None = None
    review: str = ""
    judges: tuple[str, ...] = ()
    dates: tuple[str, str] | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost_usd: float | None = None
    baseline: str | None = None
    n_both: int | None = None
    difference: float | None = None
    difference_ci95: Pair | None = None
    p_value: float | None = None

    def record(self) -> Record:
        """All that is known; what belongs to a baseline only where there is one."""
        record = asdict(self)
        if self.baseline is None:
            for key in _OF_BASELINE:
                del record[key]
        return {
            key: list(value) if isinstance(value, tuple) else value for key, value in record.items()
        }

    def figures(self, *, several: bool = False) -> Record:
        """The figures alone, for `--json`: the keys from `category` to `failed`.

        Args:
            several: say which run they are of.

        With a baseline, the comparison comes after them.
        """
        keys = ["review", *_FIGURES] if several else list(_FIGURES)
        record = self.record()
        return {key: record[key] for key in [*keys, *_OF_BASELINE] if key in record}


_FIGURES = (
    *("category", "n", "mean_1", "mean_2", "relative", "ci95"),
    *("win", "tie", "lose", "consistency", "failed"),
)
_OF_BASELINE = ("baseline", "n_both", "difference", "difference_ci95", "p_value")


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
    by: str = "category"


@dataclass(slots=True)
class _Question:
    """All reviews of one question (of the same pair of answerers)."""

    scores: list[Pair] = field(default_factory=list)
    by_order: dict[tuple[str, str], list[Pair]] = field(default_factory=dict)
    checks: dict[str, Pair] = field(default_factory=dict)

    def add(self, review: Record, scores: Pair) -> None:
        self.scores.append(scores)
        self.by_order.setdefault((judge_name(review), order_of(review)), []).append(scores)
        for name in ("exact", "label"):
            value = metadata_of(review).get(name)
            if isinstance(value, list) and len(value) == 2:
                self.checks[name] = (float(bool(value[0])), float(bool(value[1])))

    def winners(self) -> list[tuple[int, int]]:
        """Who won as given and who swapped, for each judge who saw both orders."""
        found = []
        for judge in dict.fromkeys(judge for judge, _ in self.by_order):
            given = self.by_order.get((judge, "[1, 2]"))
            swapped = self.by_order.get((judge, "[2, 1]"))
            if given and swapped:
                found.append((outcome(average(given)), outcome(average(swapped))))
        return found


class _Group:
    """The reviews of one category."""

    def __init__(self) -> None:
        self.questions: dict[Unit, _Question] = {}
        self.reviews: list[Record] = []
        self.failed = 0

    def add(self, review: Record) -> None:
        self.reviews.append(review)
        scores = scores_of(review)
        if scores is None:
            self.failed += 1
        else:
            self.questions.setdefault(unit_of(review), _Question()).add(review, scores)

    def results(self) -> dict[Unit, Pair]:
        return {unit: average(question.scores) for unit, question in self.questions.items()}

    def orders(self) -> list[tuple[int, int]]:
        return [pair for question in self.questions.values() for pair in question.winners()]

    def row(self, category: str, name: str, resamples: int | None) -> Row:
        pairs = list(self.results().values())
        means = mean_pair(pairs)
        outcomes = [outcome(pair) for pair in pairs]
        checked = [given == swapped for given, swapped in self.orders()]
        return Row(
            category=category,
            n=len(pairs),
            mean_1=means[0] if means else None,
            mean_2=means[1] if means else None,
            relative=relative_score(means),
            ci95=relative_interval(pairs, resamples=resamples),
            win=outcomes.count(1),
            tie=outcomes.count(0),
            lose=outcomes.count(-1),
            consistency=round(sum(checked) / len(checked), 4) if checked else None,
            failed=self.failed,
            kappa=self._kappa(),
            review=name,
            **self._shares(),
            **self._circumstances(),
        )

    def _shares(self) -> dict[str, Any]:
        shares: dict[str, float | None] = {}
        for name in ("exact", "label"):
            known = [q.checks[name] for q in self.questions.values() if name in q.checks]
            for side in (0, 1):
                share = round(sum(pair[side] for pair in known) / len(known), 4) if known else None
                shares[f"{name}_{side + 1}"] = share
        return shares

    def _kappa(self) -> float | None:
        kappas = [a.kappa for a in agreements(self.reviews) if a.kappa is not None]
        return round(sum(kappas) / len(kappas), 4) if kappas else None

    def _circumstances(self) -> dict[str, Any]:
        """Who judged, when, and what it took."""
        known = [metadata_of(review) for review in self.reviews]
        costs = [paid for metadata in known if (paid := paid_usd(metadata)) is not None]
        times = [
            time
            for metadata in known
            if isinstance(time := metadata.get("created"), int | float) and 0 <= time < _LAST_TIME
        ]
        return {
            "judges": tuple(dict.fromkeys(filter(None, map(judge_of, self.reviews)))),
            "dates": (_day(min(times)), _day(max(times))) if times else None,
            "prompt_tokens": _sum(known, "prompt_tokens"),
            "completion_tokens": _sum(known, "completion_tokens"),
            "cost_usd": round(sum(costs), 6) if costs else None,
        }


def summarize(
    records: Iterable[Record],
    *,
    name: str = "",
    by: str = "category",
    ignore: Sequence[str] = (),
    resamples: int | None = None,
) -> Summary:
    """The figures of one set of reviews, as one pair of answerers.

    Args:
        records: review records.
        name: what to call the set.
        by: what to group by: `category`, `modality` or `judge`.
        ignore: ids of questions to leave out.
        resamples: bootstrap resamples, see `statistics.relative_interval`.
    """
    left_out = set(ignore)
    kept = (record for record in records if str(record.get("question_id")) not in left_out)
    return _summary(latest(kept, with_words=True), name, by, resamples)


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
    reviews_left = latest(kept, with_words=with_words)
    apart = _answered_twice(reviews_left)
    for review in reviews_left:
        pair = str(metadata_of(review).get("pair") or [1, 2])
        key = f"{pair} {models_of(review)}" if pair in apart else pair
        pairs.setdefault(key, []).append(review)
    summaries = []
    for reviews in pairs.values() or [[]]:
        summary = _summary(reviews, name, by, None)
        if len(pairs) > 1:
            second = " + ".join(summary.models[1]) or "unknown"
            summary = _renamed(summary, f"{name}: {second}" if name else second)
        summaries.append(summary)
    return summaries


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
        if seen.setdefault((pair, question), models) != models:
            apart.add(pair)
    return apart


def _summary(reviews: list[Record], name: str, by: str, resamples: int | None) -> Summary:
    groups: dict[str, _Group] = {}
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
            groups.setdefault(key, _Group()).add(review)
    if ALL in groups:
        groups[ALL] = groups.pop(ALL)
    return Summary(
        name=name,
        rows=[group.row(key, name, resamples) for key, group in groups.items()],
        judges=list(judges),
        models=(list(models[0]), list(models[1])),
        reviews=reviews,
        failures=failures,
        results={key: group.results() for key, group in groups.items()},
        orders=groups[ALL].orders() if ALL in groups else [],
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


def _sum(known: Iterable[Record], key: str) -> int:
    return sum(value for metadata in known if isinstance(value := metadata.get(key), int))


def _day(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).date().isoformat()
