"""The reviews of one category, and the figures that they make.

The mean of a question q is drawn from complete pairs: from the judges j who scored it in both
orders, each order's samples averaged first,

    s(q) = mean over j of (mean of the scores as given + mean of the scores swapped) / 2,

so that what a judge adds to a place is added to both answers. A judge who saw a question in one
order only, and others in both, does not count for it; where no judge is left, the question is in
no mean and is counted in `one_order`. The questions of a judge who never saw one in both orders
all count, and a summary says so (`Summary.unbalanced`).
"""

from __future__ import annotations

import datetime
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from chatbind_cli.jsonl import Record
from chatbind_cli.review.agreement import agreements
from chatbind_cli.review.scores import (
    RULE_JUDGE,
    Unit,
    is_swapped,
    judge_name,
    judge_of,
    metadata_of,
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

_LAST_TIME = 253_402_300_800
"""The end of the year 9999, in seconds: what is later is no time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """The figures of one category; records have these names.

    Attributes:
        category: the category's name (the modality's, the judge's: whatever makes a line), or
            `all`.
        n: questions that count, see the module's docstring.
        mean_1: mean score of the first answers over these questions.
        mean_2: the same of the second answers.
        relative: 100 x mean_2 / mean_1, in percent; None where mean_1 is zero.
        ci95: 95 % bootstrap interval of `relative`, drawn by question.
        win: questions where the second answer is better.
        tie: questions where both are equal.
        lose: questions where the second answer is worse.
        consistency: share of the questions judged in both orders where both orders have the same
            winner; None where no question was judged in both.
        failed: reviews without scores.
        one_order: questions judged in one order only, and left out for it.
        place_1: mean score of the answers in the first place, over the questions judged in both
            orders (every answer stood in both places); None where there is none.
        place_2: the same of those in the second place.
        accuracy_1: share of the first answers that are right; None where the judge did not
            compare with right answers.
        accuracy_2: the same of the second answers.
        exact_1: share of the first answers that say exactly what a reference answer says.
        exact_2: the same of the second answers.
        f1_1: mean F1 of the first answers' words against the reference's.
        f1_2: the same of the second answers.
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
        p_value: of a paired permutation test: how often chance gives at least this difference;
            of one of several categories, corrected for their number (see `statistics.holm`).
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
    one_order: int = 0
    place_1: float | None = None
    place_2: float | None = None
    accuracy_1: float | None = None
    accuracy_2: float | None = None
    exact_1: float | None = None
    exact_2: float | None = None
    f1_1: float | None = None
    f1_2: float | None = None
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
_CHECKS = {"correct": "accuracy", "exact": "exact", "f1": "f1"}
"""What the rule judge's metadata are called in a row."""
_OF_BASELINE = ("baseline", "n_both", "difference", "difference_ci95", "p_value")


@dataclass(slots=True)
class _Question:
    """All reviews of one question (of the same pair of answerers)."""

    scores: dict[str, dict[bool, list[Pair]]] = field(default_factory=dict)
    """By judge, and by whether the second answer was shown first."""
    checks: dict[str, Pair] = field(default_factory=dict)

    def add(self, review: Record, scores: Pair) -> None:
        orders = self.scores.setdefault(judge_name(review), {})
        orders.setdefault(is_swapped(review), []).append(scores)
        for name in _CHECKS:
            value = metadata_of(review).get(name)
            if isinstance(value, list) and len(value) == 2 and all(map(_is_share, value)):
                self.checks[name] = (float(value[0]), float(value[1]))

    def mean(self, balanced: Collection[str]) -> Pair | None:
        """The mean scores; those of a `balanced` judge only if he saw both orders."""
        means = [
            average([average(samples) for samples in orders.values()])
            for judge, orders in self.scores.items()
            if len(orders) == 2 or judge not in balanced
        ]
        return average(means) if means else None

    def by_order(self) -> list[tuple[Pair, Pair]]:
        """The mean scores as given and swapped, for each judge who saw both orders."""
        both = (orders for orders in self.scores.values() if len(orders) == 2)
        return [(average(orders[False]), average(orders[True])) for orders in both]


def _is_share(value: Any) -> bool:
    return isinstance(value, int | float) and 0 <= value <= 1


class Group:
    """The reviews of one category."""

    def __init__(self) -> None:
        self.questions: dict[Unit, _Question] = {}
        self.reviews: list[Record] = []
        self.failed = 0

    def add(self, review: Record) -> None:
        """Takes a review in; one without scores is counted."""
        self.reviews.append(review)
        scores = scores_of(review)
        if scores is None:
            self.failed += 1
        else:
            self.questions.setdefault(unit_of(review), _Question()).add(review, scores)

    def balanced(self) -> set[str]:
        """The judges who saw any question in both orders."""
        scores = (question.scores for question in self.questions.values())
        return {judge for found in scores for judge, orders in found.items() if len(orders) == 2}

    def unbalanced(self) -> tuple[int, int]:
        """How often other judges saw a question as given, and swapped; without the rule judge."""
        others = self.balanced() | {RULE_JUDGE}
        seen = [
            swapped
            for question in self.questions.values()
            for judge, orders in question.scores.items()
            if judge not in others
            for swapped in orders
        ]
        return seen.count(False), seen.count(True)

    def results(self, balanced: Collection[str]) -> dict[Unit, Pair]:
        """The mean scores of the questions that count."""
        means = ((unit, question.mean(balanced)) for unit, question in self.questions.items())
        return {unit: mean for unit, mean in means if mean is not None}

    def orders(self) -> list[tuple[int, int]]:
        """Who won as given and who swapped, of each question and judge with both orders."""
        return [
            (outcome(given), outcome(swapped))
            for question in self.questions.values()
            for given, swapped in question.by_order()
        ]

    def row(self, category: str, name: str, balanced: Collection[str]) -> Row:
        """The figures.

        Args:
            category: what they are of.
            name: of the set of reviews.
            balanced: judges of whom only complete pairs count.
        """
        pairs = list(self.results(balanced).values())
        means = mean_pair(pairs)
        outcomes = [outcome(pair) for pair in pairs]
        checked = [given == swapped for given, swapped in self.orders()]
        places = mean_pair(self._places())
        return Row(
            category=category,
            n=len(pairs),
            mean_1=means[0] if means else None,
            mean_2=means[1] if means else None,
            relative=relative_score(means),
            ci95=relative_interval(pairs),
            win=outcomes.count(1),
            tie=outcomes.count(0),
            lose=outcomes.count(-1),
            consistency=round(sum(checked) / len(checked), 4) if checked else None,
            failed=self.failed,
            one_order=len(self.questions) - len(pairs),
            place_1=places[0] if places else None,
            place_2=places[1] if places else None,
            kappa=self._kappa(),
            review=name,
            **self._shares(),
            **self._circumstances(),
        )

    def _places(self) -> list[Pair]:
        """The mean scores in the first and in the second place, question by question."""
        seen = (question.by_order() for question in self.questions.values())
        return [
            average([average([given, swapped[::-1]]) for given, swapped in orders])
            for orders in seen
            if orders
        ]

    def _shares(self) -> dict[str, Any]:
        shares: dict[str, float | None] = {}
        for name, column in _CHECKS.items():
            known = [q.checks[name] for q in self.questions.values() if name in q.checks]
            for side in (0, 1):
                share = round(sum(pair[side] for pair in known) / len(known), 4) if known else None
                shares[f"{column}_{side + 1}"] = share
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


def _sum(known: Iterable[Record], key: str) -> int:
    return sum(value for metadata in known if isinstance(value := metadata.get(key), int))


def _day(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).date().isoformat()
