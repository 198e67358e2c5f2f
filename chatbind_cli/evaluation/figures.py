"""The figures of some reviews: what a row of a summary says.

Failed reviews are counted and are in no mean: the reference averages its -1 for an unreadable
review in, which is one place where the numbers differ on purpose. The other: the mean of a
question q is drawn from complete pairs, from the judges j who scored it in both orders, each
order's samples averaged first,

    s(q) = mean over j of (mean of the scores as given + mean of the scores swapped) / 2,

so that what a judge adds to a place is added to both answers. A judge who saw a question in one
order only, and others in both, does not count for it; where no judge is left, the question is in
no mean and is counted in `one_order`. The questions of a judge who never saw one in both orders
all count, and a summary says so (`Summary.unbalanced`).

A row is the record that `summarize --format json` writes; `docs/formats.md` says what it holds.
"""

from __future__ import annotations

import datetime
import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import combinations

from chatbind_cli.evaluation.scores import (
    Item,
    is_single,
    is_swapped,
    item_of,
    judge_name,
    judge_of,
    lengths_of,
    metadata_of,
    paid_usd,
    scores_of,
)
from chatbind_cli.evaluation.statistics import (
    Pair,
    average,
    averages,
    cohens_kappa,
    mean_pair,
    outcome,
    relative_interval,
    relative_score,
    win_rate,
)
from chatbind_cli.jsonl import Record

_LAST_TIME = 253_402_300_800
"""The end of the year 9999, in seconds: what is later is no time."""

_OF_TWO = (
    *("mean_2", "relative", "ci95", "win", "tie", "lose", "place_2", "accuracy_2", "exact_2"),
    *("f1_2", "win_rate", "win_rate_ci95", "length_2"),
)
"""Figures that an answer that was graded alone does not have."""

Seen = dict[tuple[Item, str, bool], Pair]
"""Mean scores of each question, by judge and by whether the second answer was shown first."""


def scores_by_order(reviews: Iterable[Record]) -> Seen:
    """The scores of the reviews that have any, each judge's samples of an order averaged."""
    return averages(
        ((item_of(review), judge_name(review), is_swapped(review)), scores)
        for review in reviews
        if (scores := scores_of(review)) is not None
    )


def in_both_orders(seen: Seen) -> dict[tuple[Item, str], tuple[Pair, Pair]]:
    """The scores as given and swapped, of each question and judge who saw it in both orders."""
    return {
        (item, judge): (pair, seen[item, judge, True])
        for (item, judge, swapped), pair in seen.items()
        if not swapped and (item, judge, True) in seen
    }


def mean_scores(seen: Seen, balanced: Collection[str]) -> dict[Item, Pair]:
    """The mean scores of the questions that count; of `balanced` judges only complete pairs."""
    both = in_both_orders(seen)
    by_judge = averages(
        ((item, judge), pair)
        for (item, judge, _), pair in seen.items()
        if judge not in balanced or (item, judge) in both
    )
    return averages((item, pair) for (item, _), pair in by_judge.items())


def win_shares(reviews: Iterable[Record], results: Mapping[Item, Pair]) -> dict[Item, float]:
    """How much of a win each question gives to the second answer: 1, 1/2 for a tie, or 0.

    A published preference (AlpacaEval's 1.27, of 1 to 2) remains the share that it is.
    """
    told = {item_of(review) for review in reviews if "preference" in metadata_of(review)}
    return {
        item: pair[1] if item in told and math.isclose(sum(pair), 1) else (1 + outcome(pair)) / 2
        for item, pair in results.items()
    }


def answer_lengths(reviews: Iterable[Record]) -> dict[Item, Pair]:
    """How many characters the answers to each question have, where reviews say so."""
    return averages(
        (item_of(review), lengths)
        for review in reviews
        if (lengths := lengths_of(review)) is not None
    )


def figures_of(
    reviews: Sequence[Record],
    seen: Seen,
    results: Mapping[Item, Pair],
    shares: Mapping[Item, float],
    lengths: Mapping[Item, Pair],
) -> Record:
    """What a row says of some reviews, their scores, and the questions among them that count."""
    pairs, both = list(results.values()), in_both_orders(seen)
    rate, rate_ci95 = win_rate(list(shares.values())) or (None, None)
    means, wins = mean_pair(pairs), Counter(map(outcome, pairs))
    same = [outcome(given) == outcome(swapped) for given, swapped in both.values()]
    # What stood first, and what second: question by question, as each counts once.
    places = averages(
        (item, average([given, swapped[::-1]])) for (item, _), (given, swapped) in both.items()
    )
    kappas = [
        kappa
        for outcomes in agreements(reviews).values()
        if (kappa := cohens_kappa(outcomes)) is not None
    ]
    row: Record = {
        "n": len(pairs),
        **_sides("mean", means),
        "relative": relative_score(means),
        "ci95": relative_interval(pairs),
        "win": wins[1],
        "tie": wins[0],
        "lose": wins[-1],
        "consistency": round(sum(same) / len(same), 4) if same else None,
        "failed": sum(scores_of(review) is None for review in reviews),
        "one_order": len({item for item, _, _ in seen}) - len(pairs),
        **_sides("place", mean_pair(list(places.values()))),
        **_sides("accuracy", _share(reviews, "correct")),
        **_sides("exact", _share(reviews, "exact")),
        **_sides("f1", _share(reviews, "f1")),
        "kappa": round(sum(kappas) / len(kappas), 4) if kappas else None,
        "win_rate": rate,
        "win_rate_ci95": rate_ci95,
        **_sides("length", mean_pair([lengths[item] for item in results if item in lengths], 1)),
    }
    return row | dict.fromkeys(_OF_TWO) if any(map(is_single, reviews)) else row


def _sides(name: str, pair: Pair | None) -> Record:
    first, second = pair or (None, None)
    return {f"{name}_1": first, f"{name}_2": second}


def _share(reviews: Iterable[Record], check: str) -> Pair | None:
    """The means of what the rule judge found of both answers, a question counting once."""
    found = {}
    for review in reviews:
        value = metadata_of(review).get(check)
        if (
            scores_of(review) is not None
            and isinstance(value, list)
            and len(value) in (1, 2)
            and all(isinstance(share, int | float) and 0 <= share <= 1 for share in value)
        ):
            found[item_of(review)] = (float(value[0]), float(value[-1]))
    return mean_pair(list(found.values()), digits=4)


def circumstances_of(reviews: Sequence[Record]) -> Record:
    """Who judged, when, and what it took."""
    known = [metadata_of(review) for review in reviews]
    costs = [paid for metadata in known if (paid := paid_usd(metadata)) is not None]
    times = [
        time
        for metadata in known
        if isinstance(time := metadata.get("created"), int | float) and 0 <= time < _LAST_TIME
    ]
    return {
        "judges": list(dict.fromkeys(filter(None, map(judge_of, reviews)))),
        "dates": (_day(min(times)), _day(max(times))) if times else None,
        "prompt_tokens": _sum(known, "prompt_tokens"),
        "completion_tokens": _sum(known, "completion_tokens"),
        "cost_usd": round(sum(costs), 6) if costs else None,
    }


def _sum(known: Iterable[Record], key: str) -> int:
    return sum(value for metadata in known if isinstance(value := metadata.get(key), int))


def _day(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).date().isoformat()


def agreements(reviews: Iterable[Record]) -> dict[tuple[str, str], list[tuple[int, int]]]:
    """What two judges say of each question on whose answers both have judged.

    Args:
        reviews: of any number of files; failed ones count for nothing.

    Returns:
        For each pair of judges with questions in common, whom both call better: -1 the first
        answer, 0 none, 1 the second.
    """
    scores = averages(
        # A question with other answers is another thing that was judged.
        ((judge_name(review), (item_of(review), _answers(review))), pair)
        for review in reviews
        if review.get("reviewer_id")
        and not is_single(review)
        and (pair := scores_of(review)) is not None
    )
    outcomes: dict[str, dict[tuple[Item, str], int]] = {}
    for (judge, about), pair in scores.items():
        outcomes.setdefault(judge, {})[about] = outcome(pair)
    found = {}
    for judges in combinations(outcomes, 2):
        first, second = (outcomes[judge] for judge in judges)
        shared = [(first[about], second[about]) for about in first if about in second]
        if shared:
            found[judges] = shared
    return found


def _answers(review: Record) -> str:
    ids = [review.get("answer1_id"), review.get("answer2_id")]
    return str(metadata_of(review).get("answers") or ids)
