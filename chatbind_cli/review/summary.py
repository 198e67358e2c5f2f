"""From review records to figures: one row a category, and one for all.

Reads our own reviews, the reference's (`tuple`, `category`) and Vicuna's published ones (`score`,
`text`). Failed reviews are counted and are in no mean: the reference averages its -1 for an
unreadable review in, which is the one place where the numbers differ on purpose. Knows nothing
of how a table looks (`tables`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from chatbind_cli.jsonl import Record
from chatbind_cli.review.statistics import (
    Pair,
    average,
    mean_pair,
    outcome,
    relative_interval,
    relative_score,
)

ALL = "all"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """The figures of one category; `summarize --json` prints these names.

    Attributes:
        category: the category's name, or `all`.
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
        review: which file or stream the reviews come from.
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
    review: str = ""

    def record(self) -> Record:
        """The row as a record for `--json`."""
        record = asdict(self)
        if self.ci95 is not None:
            record["ci95"] = list(self.ci95)
        return record


@dataclass(slots=True)
class Summary:
    """The figures of one file of reviews, and who judged whom.

    Attributes:
        name: the file's name, or `stdin`.
        rows: the categories in order of first appearance, `all` after the first one.
        judges: the reviewers' names.
        models: the first and the second answerer, as far as the reviews say.
        reviews: the records behind the figures: failed ones too, replaced ones not.
        failures: why reviews failed, with how often.
    """

    name: str
    rows: list[Row]
    judges: list[str]
    models: tuple[list[str], list[str]]
    reviews: list[Record]
    failures: dict[str, int]


@dataclass(slots=True)
class _Unit:
    """All reviews of one question (of the same pair of answerers)."""

    scores: list[Pair] = field(default_factory=list)
    by_order: dict[str, list[Pair]] = field(default_factory=dict)
    checks: dict[str, Pair] = field(default_factory=dict)

    def mean(self) -> Pair:
        return average(self.scores)

    def consistent(self) -> bool | None:
        if len(self.by_order) < 2:
            return None
        winners = {outcome(average(pairs)) for pairs in self.by_order.values()}
        return len(winners) == 1


@dataclass(slots=True)
class _Group:
    units: dict[Any, _Unit] = field(default_factory=dict)
    failed: int = 0

    def row(self, category: str, review: str, resamples: int | None) -> Row:
        units = list(self.units.values())
        pairs = [unit.mean() for unit in units]
        means = mean_pair(pairs)
        outcomes = [outcome(pair) for pair in pairs]
        checked = [agree for unit in units if (agree := unit.consistent()) is not None]
        shares: dict[str, float | None] = {}
        for name in ("exact", "label"):
            known = [unit.checks[name] for unit in units if name in unit.checks]
            for side in (0, 1):
                share = round(sum(pair[side] for pair in known) / len(known), 4) if known else None
                shares[f"{name}_{side + 1}"] = share
        return Row(
            category=category,
            n=len(units),
            mean_1=means[0] if means else None,
            mean_2=means[1] if means else None,
            relative=relative_score(means),
            ci95=relative_interval(pairs, resamples=resamples),
            win=outcomes.count(1),
            tie=outcomes.count(0),
            lose=outcomes.count(-1),
            consistency=round(sum(checked) / len(checked), 4) if checked else None,
            failed=self.failed,
            review=review,
            **shares,
        )


def summarize(
    records: Iterable[Record],
    *,
    name: str = "",
    by: str = "category",
    ignore: Sequence[str] = (),
    resamples: int | None = None,
) -> Summary:
    """The figures of one set of reviews.

    Args:
        records: review records.
        name: what to call the set.
        by: what to group by: `category`, `modality` or `judge`.
        ignore: ids of questions to leave out.
        resamples: bootstrap resamples, see `statistics.relative_interval`.
    """
    left_out = set(ignore)
    kept = [record for record in records if str(record.get("question_id")) not in left_out]
    reviews = _latest(kept)
    groups: dict[str, _Group] = {}
    judges: dict[str, None] = {}
    models: tuple[dict[str, None], dict[str, None]] = ({}, {})
    failures: dict[str, int] = {}
    for review in reviews:
        metadata = review.get("metadata") or {}
        if review.get("reviewer_id"):
            judges[str(review["reviewer_id"])] = None
        for side, model in zip(models, metadata.get("models") or (), strict=False):
            if model:
                side[str(model)] = None
        scores = scores_of(review)
        if scores is None:
            reason = str(review.get("error", "no two scores of at least 0"))
            failures[reason] = failures.get(reason, 0) + 1
        for key in _keys(review, metadata, by):
            group = groups.setdefault(key, _Group())
            if scores is None:
                group.failed += 1
            else:
                _add(group.units.setdefault(_unit_of(review, metadata), _Unit()), scores, metadata)
    rows = [group.row(key, name, resamples) for key, group in groups.items()]
    return Summary(name, rows, list(judges), (list(models[0]), list(models[1])), reviews, failures)


def scores_of(review: Record) -> Pair | None:
    """The scores of a review, None if it failed.

    The reference writes [-1, -1] for a review that it could not read; such a pair, and whatever
    else is not two finite numbers of at least 0, is a failure.
    """
    if "error" in review:
        return None
    value = review.get("tuple", review.get("score"))
    if not isinstance(value, list | tuple) or len(value) != 2:
        return None
    for score in value:
        if isinstance(score, bool) or not isinstance(score, int | float):
            return None
        if not math.isfinite(score) or score < 0:
            return None
    return float(value[0]), float(value[1])


def _latest(records: Iterable[Record]) -> list[Record]:
    """Of several reviews in the same slot the last one, in the place of the first."""
    found: dict[str, Record] = {}
    for number, record in enumerate(records):
        metadata = record.get("metadata") or {}
        found[str(metadata.get("slot") or f"line {number}")] = record
    return list(found.values())


def _keys(review: Record, metadata: Record, by: str) -> list[str]:
    """The groups that a review belongs to. Without a category it is in `all` alone."""
    values = {
        "category": review.get("category"),
        "modality": metadata.get("modality", "text"),
        "judge": review.get("reviewer_id"),
    }
    value = values[by]
    return [ALL] if value in (None, "", ALL) else [str(value), ALL]


def _unit_of(review: Record, metadata: Record) -> tuple[Any, ...]:
    """What is drawn by the bootstrap: a question, apart for each pair of answerers.

    A file of the reference may name a question twice only if it was reviewed twice.
    """
    question = review.get("question_id", review.get("review_id"))
    return str(question), metadata.get("modality"), str(metadata.get("models"))


def _add(unit: _Unit, scores: Pair, metadata: Record) -> None:
    unit.scores.append(scores)
    unit.by_order.setdefault(str(metadata.get("order", [1, 2])), []).append(scores)
    for name in ("exact", "label"):
        value = metadata.get(name)
        if isinstance(value, list) and len(value) == 2:
            unit.checks[name] = (float(bool(value[0])), float(bool(value[1])))
