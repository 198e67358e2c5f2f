"""One ranking of all models in any number of reviews: who would win how often against whom.

Pairs are ranked by Bradley-Terry: a wins over b with probability 1 / (1 + 10^((b - a) / 400)) of
their points. These are Elo's: 400 more are ten wins for one, and 1000 is the mean of the models
that were compared with each other. Each question counts once for each pair of models (see
`figures`), a tie as half a win each way. Answers that were graded alone are ranked by their mean
score: who would have won a pair is not derived, as two good answers mostly have the same grade.

Models that no chain of comparisons connects are ranked apart. Where wins go one way only between
some models and others, the likelihood has no maximum (Ford, Solution of a ranking problem from
binary comparisons, 1957): a weak ridge penalty then holds the points in bounds, which is said.

Source: Bradley & Terry, Rank analysis of incomplete block designs (1952); as logistic regression,
with the bootstrap, Chiang et al., Chatbot Arena (2024).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

from chatbind_cli.evaluation.statistics import Pair, average, averages, fitted, mean_intervals
from chatbind_cli.evaluation.summary import ALL, Summary

BRADLEY_TERRY, MEAN_SCORE = "bradley-terry", "mean score"
_MEAN, _SCALE = 1000.0, 400 / math.log(10)
_RESAMPLES, _RESAMPLES_AT_LEAST = 1_000, 200
_FITTED = 100_000  # models, over all resamples: with many models the wait is bounded


class Rank(NamedTuple):
    """A model's place among those that it was compared with."""

    ranking: str  # by what: BRADLEY_TERRY or MEAN_SCORE
    group: int  # from 1, of the models that were compared with each other; others rank apart
    place: int  # in the group, from 1
    model: str
    points: float  # or the mean score
    ci95: Pair | None  # their bootstrap interval, drawn by question; None: nothing can be said
    n: int  # questions, once for each other model
    win_rate: float | None  # over all others that it met, ties half
    length: float | None  # of its answers, mean characters


class Ranking(NamedTuple):
    """All models, best first within each group, and what must be said beside it."""

    ranks: list[Rank]
    notes: list[str]


def has_several(summaries: Sequence[Summary]) -> bool:
    """Whether more models were compared than the two of a table, or more than one graded alone."""
    pairs = {name for of in summaries if not of.single for name in of.names}
    return len(pairs) > 2 or len({of.names[0] for of in summaries if of.single}) > 1


def ranking_of(summaries: Sequence[Summary]) -> Ranking:
    """Ranks all models that the reviews name."""
    single = [of for of in summaries if of.single and of.results[ALL]]
    pairs = [of for of in summaries if not of.single and of.results[ALL]]
    known = [all(names) and names[0] != names[1] for names in (of.names for of in pairs)]
    ranks, notes = _by_wins([of for of, told in zip(pairs, known, strict=True) if told])
    notes += [
        f"{of.name or 'reviews'}: not ranked, as its answerers have no names, or the same (--names)"
        for of, told in zip(pairs, known, strict=True)
        if not told
    ]
    return Ranking(ranks + _by_score(single), notes)


def _lengths(summaries: Sequence[Summary]) -> dict[str, float]:
    """Of each model the mean over what it was compared in."""
    found = averages(
        (name, (length, length))
        for of in summaries
        for name, side in zip(of.names, "12", strict=True)
        if (length := of.total[f"length_{side}"]) is not None
    )
    return {name: round(length, 1) for name, (length, _) in found.items()}


def _by_score(summaries: Sequence[Summary]) -> list[Rank]:
    scores: dict[str, list[Pair]] = {}
    for of in summaries:
        scores.setdefault(of.names[0], []).extend(of.results[ALL].values())
    means = {name: round(average(graded)[0], 3) for name, graded in scores.items()}
    lengths, found = _lengths(summaries), []
    for place, name in enumerate(sorted(means, key=lambda name: -means[name]), start=1):
        ends, n = mean_intervals(scores[name]), len(scores[name])
        rank = (MEAN_SCORE, 1, place, name, means[name], ends and ends[0], n, None)
        found.append(Rank(*rank, lengths.get(name)))
    return found


def _by_wins(summaries: Sequence[Summary]) -> tuple[list[Rank], list[str]]:
    import numpy as np
    from scipy.sparse.csgraph import connected_components

    if not summaries:
        return [], []
    names = list(dict.fromkeys(name for of in summaries for name in of.names))
    sides = np.array([[names.index(name) for name in of.names] for of in summaries])
    questions = sorted({item[:2] for of in summaries for item in of.shares[ALL]})
    row = {question: number for number, question in enumerate(questions)}
    wins = np.zeros((len(questions), len(summaries), 2))  # of which side of which pair
    for pair, of in enumerate(summaries):
        for item, share in of.shares[ALL].items():
            wins[row[item[:2]], pair] += (1 - share, share)
    table = np.zeros((len(names), len(names)))  # of whom over whom
    np.add.at(table, (sides, sides[:, ::-1]), wins.sum(axis=0))
    _, groups = connected_components(table, directed=False)
    _, strong = connected_components(table, connection="strong")
    told = np.bincount(strong)[strong] > 1  # wins go both ways between it and some other one
    fits = _fits(np.eye(len(names))[sides[:, 0]] - np.eye(len(names))[sides[:, 1]], wins)
    for group in range(groups.max() + 1):
        members = groups == group
        known = members & told if (members & told).any() else members
        fits[:, members] += _MEAN - fits[:, known].mean(axis=1, keepdims=True)
    low, high = np.percentile(fits[1:], (2.5, 97.5), axis=0).round(1).tolist()
    points, lengths, places = fits[0].round(1).tolist(), _lengths(summaries), Counter[int]()
    ranks = []
    for i in sorted(range(len(names)), key=lambda i: (groups[i], -points[i])):
        places[group := int(groups[i]) + 1] += 1
        ends = (low[i], high[i]) if told[i] and len(questions) > 1 else None
        won, n = float(table[i].sum()), float(table[i].sum() + table[:, i].sum())
        rank = (BRADLEY_TERRY, group, places[group], names[i], points[i], ends, round(n))
        ranks.append(Rank(*rank, round(won / n, 4), lengths.get(names[i])))
    return ranks, _notes(ranks, dict(zip(names, strong.tolist(), strict=True)))


def _fits(over: Any, wins: Any) -> Any:
    """The points [1 + resample, model] about a mean of 0: of all questions, then of each resample.

    Args:
        over: 1 for the first and -1 for the second model of each pair, [pair, model].
        wins: how much of a win each question gives to which side, [q, pair, 2].
    """
    import numpy as np

    rng, n = np.random.default_rng(0), len(wins)
    found = []
    for number in range(1 + max(_RESAMPLES_AT_LEAST, min(_RESAMPLES, _FITTED // over.shape[1]))):
        # A question is drawn with all its pairs.
        drawn = np.bincount(rng.integers(n, size=n), minlength=n) if number else np.ones(n)
        found.append(fitted(over, *(drawn @ wins.reshape(n, -1)).reshape(-1, 2).T))
    return _SCALE * np.array(found)


def _notes(ranks: Sequence[Rank], strong: Mapping[str, int]) -> list[str]:
    """What is not known: between whom nobody was compared, and between whom wins go one way."""
    apart: dict[int, dict[int, list[str]]] = {}
    for rank in ranks:
        apart.setdefault(rank.group, {}).setdefault(strong[rank.model], []).append(rank.model)
    notes = []
    if len(apart) > 1:
        groups = "; ".join(", ".join(chain(*of.values())) for of in apart.values())
        notes.append(f"ranking: never compared with each other, so ranked apart: {groups}")
    return notes + [
        f"ranking: {' > '.join(map(', '.join, of.values()))}: wins between these go one way only, "
        "so how far apart they are cannot be told; a weak penalty holds their points in bounds"
        for of in apart.values()
        if len(of) > 1
    ]
