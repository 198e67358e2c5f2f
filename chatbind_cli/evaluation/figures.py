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
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any, NamedTuple

from chatbind_cli.evaluation.scores import (
    RULE_JUDGE,
    Item,
    is_swapped,
    item_of,
    judge_name,
    judge_of,
    metadata_of,
    paid_usd,
    scores_of,
)
from chatbind_cli.evaluation.statistics import (
    Pair,
    average,
    cohens_kappa,
    mean_pair,
    outcome,
    relative_interval,
    relative_score,
)
from chatbind_cli.jsonl import Record

_LAST_TIME = 253_402_300_800
"""The end of the year 9999, in seconds: what is later is no time."""

_OF_BOTH_SIDES = ("mean", "place", "accuracy", "exact", "f1")
_OF_BASELINE = ("baseline", "n_both", "difference", "difference_ci95", "p_value")
_FIGURES = (
    *("category", "n", "mean_1", "mean_2", "relative", "ci95"),
    *("win", "tie", "lose", "consistency", "failed"),
)

Judged = dict[str, dict[bool, list[Pair]]]
"""The scores of one question by judge, and by whether the second answer was shown first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """The figures of one category.

    Records have the same names; a figure of both sides stands there as `NAME_1`, of the first
    answers, and `NAME_2`, of the second ones.
    """

    category: str
    """Its name (the modality's, the judge's: whatever makes a line), or `all`."""
    n: int
    """Questions that count, see the module's docstring."""
    mean: Pair | None
    """Mean scores of both sides' answers over these questions."""
    relative: float | None
    """100 x second / first mean, in percent; None where the first is zero."""
    ci95: Pair | None
    """95 % bootstrap interval of `relative`, drawn by question."""
    win: int
    """Questions where the second answer is better."""
    tie: int
    lose: int
    consistency: float | None
    """Share of the questions judged in both orders where both have the same winner."""
    failed: int
    """Reviews without scores."""
    one_order: int = 0
    """Questions judged in one order only, and left out for it."""
    place: Pair | None = None
    """Mean scores in the first and in the second place, over the questions judged in both orders
    (every answer stood in both places)."""
    accuracy: Pair | None = None
    """Shares of right answers; None where the judge did not compare with right answers."""
    exact: Pair | None = None
    """Shares of the answers that say exactly what a reference answer says."""
    f1: Pair | None = None
    """Mean F1 of the answers' words against the reference's."""
    kappa: float | None = None
    """Agreement of the judges on who is better: Cohen's, the mean over pairs of judges."""
    review: str = ""
    """Which file or stream the reviews come from."""
    judges: tuple[str, ...] = ()
    dates: tuple[str, str] | None = None
    """The first and the last day of judging, as far as the reviews say."""
    prompt_tokens: int = 0
    """What the reviews took, as the judges counted it."""
    completion_tokens: int = 0
    cost_usd: float | None = None
    """What was paid at most, as far as prices were known; see `scores.paid_usd`."""
    baseline: str | None = None
    """The run that this one is compared with, on the questions that both have."""
    n_both: int | None = None
    difference: float | None = None
    """This run's relative score on them minus the baseline's, in points."""
    difference_ci95: Pair | None = None
    p_value: float | None = None
    """Of a paired permutation test: how often chance gives at least this difference; of one of
    several categories, corrected for their number (see `statistics.holm`)."""

    def record(self) -> Record:
        """All that is known; what belongs to a baseline only where there is one."""
        record: Record = {}
        for key, value in asdict(self).items():
            if key in _OF_BOTH_SIDES:
                record[f"{key}_1"], record[f"{key}_2"] = value or (None, None)
            elif key not in _OF_BASELINE or self.baseline is not None:
                record[key] = list(value) if isinstance(value, tuple) else value
        return record

    def figures(self, *, several: bool = False) -> Record:
        """The figures alone, for `--json`, and the comparison with a baseline if there is one.

        Args:
            several: say which run they are of.
        """
        keys = [*(("review",) if several else ()), *_FIGURES, *_OF_BASELINE]
        record = self.record()
        return {key: record[key] for key in keys if key in record}


def by_question(reviews: Iterable[Record]) -> dict[Item, Judged]:
    """The scores of each question; failed reviews have none."""
    found: dict[Item, Judged] = {}
    for review in reviews:
        scores = scores_of(review)
        if scores is not None:
            orders = found.setdefault(item_of(review), {}).setdefault(judge_name(review), {})
            orders.setdefault(is_swapped(review), []).append(scores)
    return found


def judges_of_both_orders(questions: Mapping[Item, Judged]) -> set[str]:
    """The judges who saw any question in both orders."""
    judged = questions.values()
    return {judge for found in judged for judge, orders in found.items() if len(orders) == 2}


def one_order_only(questions: Mapping[Item, Judged]) -> tuple[int, int]:
    """How often other judges saw a question as given, and swapped; without the rule judge."""
    others = judges_of_both_orders(questions) | {RULE_JUDGE}
    seen = [
        swapped
        for judged in questions.values()
        for judge, orders in judged.items()
        if judge not in others
        for swapped in orders
    ]
    return seen.count(False), seen.count(True)


def mean_scores(questions: Mapping[Item, Judged], balanced: Collection[str]) -> dict[Item, Pair]:
    """The mean scores of the questions that count; of `balanced` judges only complete pairs."""
    found = {}
    for item, judged in questions.items():
        means = [
            average([average(samples) for samples in orders.values()])
            for judge, orders in judged.items()
            if len(orders) == 2 or judge not in balanced
        ]
        if means:
            found[item] = average(means)
    return found


def in_both_orders(questions: Mapping[Item, Judged]) -> list[list[tuple[Pair, Pair]]]:
    """Of each question the mean scores as given and swapped, for each judge who saw both."""
    return [
        [
            (average(orders[False]), average(orders[True]))
            for orders in judged.values()
            if len(orders) == 2
        ]
        for judged in questions.values()
    ]


def order_outcomes(questions: Mapping[Item, Judged]) -> list[tuple[int, int]]:
    """Who won as given and who swapped, of each question and judge with both orders."""
    return [
        (outcome(given), outcome(swapped))
        for pairs in in_both_orders(questions)
        for given, swapped in pairs
    ]


def row_of(
    reviews: Sequence[Record],
    questions: Mapping[Item, Judged],
    balanced: Collection[str],
    *,
    category: str,
    run: str,
) -> Row:
    """The figures of some reviews.

    Args:
        reviews: failed ones too.
        questions: the same, by question.
        balanced: judges of whom only complete pairs count.
        category: what the reviews are of.
        run: the name of the set that they belong to.
    """
    pairs = list(mean_scores(questions, balanced).values())
    outcomes = [outcome(pair) for pair in pairs]
    checked = [given == swapped for given, swapped in order_outcomes(questions)]
    # What stood first, and what second: question by question, as each counts once.
    places = [
        average([average([given, swapped[::-1]]) for given, swapped in seen])
        for seen in in_both_orders(questions)
        if seen
    ]
    kappas = [found.kappa for found in agreements(reviews) if found.kappa is not None]
    return Row(
        category=category,
        n=len(pairs),
        mean=mean_pair(pairs),
        relative=relative_score(mean_pair(pairs)),
        ci95=relative_interval(pairs),
        win=outcomes.count(1),
        tie=outcomes.count(0),
        lose=outcomes.count(-1),
        consistency=round(sum(checked) / len(checked), 4) if checked else None,
        failed=sum(scores_of(review) is None for review in reviews),
        one_order=len(questions) - len(pairs),
        place=mean_pair(places),
        accuracy=_share(reviews, "correct"),
        exact=_share(reviews, "exact"),
        f1=_share(reviews, "f1"),
        kappa=round(sum(kappas) / len(kappas), 4) if kappas else None,
        review=run,
        **_circumstances(reviews),
    )


def _share(reviews: Iterable[Record], check: str) -> Pair | None:
    """The means of what the rule judge found of both answers, a question counting once."""
    found = {}
    for review in reviews:
        value = metadata_of(review).get(check)
        if (
            scores_of(review) is not None
            and isinstance(value, list)
            and len(value) == 2
            and all(isinstance(share, int | float) and 0 <= share <= 1 for share in value)
        ):
            found[item_of(review)] = (float(value[0]), float(value[1]))
    if not found:
        return None
    first, second = average(list(found.values()))
    return round(first, 4), round(second, 4)


def _circumstances(reviews: Sequence[Record]) -> dict[str, Any]:
    """Who judged, when, and what it took."""
    known = [metadata_of(review) for review in reviews]
    costs = [paid for metadata in known if (paid := paid_usd(metadata)) is not None]
    times = [
        time
        for metadata in known
        if isinstance(time := metadata.get("created"), int | float) and 0 <= time < _LAST_TIME
    ]
    return {
        "judges": tuple(dict.fromkeys(filter(None, map(judge_of, reviews)))),
        "dates": (_day(min(times)), _day(max(times))) if times else None,
        "prompt_tokens": _sum(known, "prompt_tokens"),
        "completion_tokens": _sum(known, "completion_tokens"),
        "cost_usd": round(sum(costs), 6) if costs else None,
    }


def _sum(known: Iterable[Record], key: str) -> int:
    return sum(value for metadata in known if isinstance(value := metadata.get(key), int))


def _day(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).date().isoformat()


class Agreement(NamedTuple):
    """How two judges, who saw the same answers, agree on who is better (first, tie, second)."""

    judges: tuple[str, str]
    n: int
    """Questions that both have judged."""
    same: float
    """Share of them with the same outcome."""
    kappa: float | None
    """Cohen's kappa; None where chance alone explains all."""


def agreements(reviews: Iterable[Record]) -> list[Agreement]:
    """Every pair of judges that have questions in common.

    Args:
        reviews: of any number of files; failed ones count for nothing.
    """
    scores: dict[str, dict[tuple[Item, str], list[Pair]]] = {}
    for review in reviews:
        pair = scores_of(review)
        if pair is not None and review.get("reviewer_id"):
            # A question with other answers is another thing that was judged.
            ids = [review.get("answer1_id"), review.get("answer2_id")]
            about = item_of(review), str(metadata_of(review).get("answers") or ids)
            scores.setdefault(judge_name(review), {}).setdefault(about, []).append(pair)
    outcomes = {
        judge: {about: outcome(average(pairs)) for about, pairs in judged.items()}
        for judge, judged in scores.items()
    }
    found = []
    for names in combinations(outcomes, 2):
        shared = [about for about in outcomes[names[0]] if about in outcomes[names[1]]]
        if shared:
            found.append(
                _agreement(names, *([outcomes[n][about] for about in shared] for n in names))
            )
    return found


def _agreement(judges: tuple[str, str], first: Sequence[int], second: Sequence[int]) -> Agreement:
    same = sum(a == b for a, b in zip(first, second, strict=True)) / len(first)
    kappa = cohens_kappa(first, second)
    return Agreement(judges, len(first), round(same, 4), None if kappa is None else round(kappa, 4))
