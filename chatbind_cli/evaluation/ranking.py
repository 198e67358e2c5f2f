"""One ranking of all models in any number of reviews: who would win how often against whom.

Pairs of answers are ranked by Bradley-Terry,

    P(a wins over b) = 1 / (1 + 10^((points of b - points of a) / 400)),

a tie being half a win each way, and a question counting once for each pair of models (the mean
over judges and both orders, see `figures`). Points are Elo's: 400 more is ten wins for one, and the
mean of the models that were compared with each other is 1000. Answers that were graded alone are
ranked by their mean score; who would have won a pair is not derived from it, as most grades of two
good answers are the same.

Models that no chain of comparisons connects are ranked apart. Where wins go one way only between
some models and others, no points are right (the likelihood has no maximum: Ford, Solution of a
ranking problem from binary comparisons, 1957); a weak ridge penalty then holds them in bounds.

Source: Bradley & Terry, Rank analysis of incomplete block designs (1952); as logistic regression,
with the bootstrap, Chiang et al., Chatbot Arena (2024).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

from chatbind_cli.evaluation.statistics import (
    Pair,
    average,
    averages,
    fitted,
    mean_intervals,
)
from chatbind_cli.evaluation.summary import ALL, Summary

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Floats = npt.NDArray[np.float64]

BRADLEY_TERRY, MEAN_SCORE = "bradley-terry", "mean score"
_MEAN, _SCALE = 1000.0, 400 / math.log(10)
_RESAMPLES, _RESAMPLES_AT_LEAST = 1_000, 200
_FITTED = 100_000  # models, over all resamples: more wait for fewer of them


class Rank(NamedTuple):
    """A model's place among those that it was compared with.

    Attributes:
        ranking: by what, `BRADLEY_TERRY` or `MEAN_SCORE`.
        group: the models that were compared with each other, from 1; others are ranked apart.
        place: in the group, from 1.
        model: its name.
        points: Elo's, or the mean score.
        ci95: their 95 % bootstrap interval, drawn by question; None where nothing can be said.
        n: judged questions, once for each other model.
        win_rate: against all others that it met, ties half; None by mean score.
        length: its answers' mean length in characters, where known.
    """

    ranking: str
    group: int
    place: int
    model: str
    points: float
    ci95: Pair | None
    n: int
    win_rate: float | None
    length: float | None


class Ranking(NamedTuple):
    """All models, best first within each group, and what must be said beside it."""

    ranks: list[Rank]
    notes: list[str]


def has_several(summaries: Sequence[Summary]) -> bool:
    """Whether more models were compared than the two of a table, or more than one graded alone."""
    pairs = {name for of in summaries if not of.single for name in _names(of)}
    return len(pairs) > 2 or len({_names(of)[0] for of in summaries if of.single}) > 1


def ranking_of(summaries: Sequence[Summary]) -> Ranking:
    """Ranks all models that the reviews name."""
    pairs = [of for of in summaries if not of.single]
    known = [of for of in pairs if all(of.models) and of.models[0] != of.models[1]]
    judged = [of for of in known if of.shares[ALL]]
    ranks, notes = _by_wins(judged) if judged else ([], [])
    notes += [
        f"{of.name or 'reviews'}: not ranked, as its answerers have no names, or the same (--names)"
        for of in pairs
        if of not in known
    ]
    return Ranking(ranks + _by_score([of for of in summaries if of.single]), notes)


def _names(summary: Summary) -> list[str]:
    return [" + ".join(side) for side in summary.models]


def _lengths(summaries: Iterable[Summary]) -> dict[str, float]:
    """The mean length of each model's answers."""
    found = averages(
        ((name, item[:2]), (pair[side], 0.0))
        for of in summaries
        for item, pair in of.lengths.items()
        for side, name in enumerate(_names(of)[: 1 if of.single else 2])
    )
    by_model = averages((name, length) for (name, _), length in found.items())
    return {name: round(length, 1) for name, (length, _) in by_model.items()}


def _by_score(summaries: Sequence[Summary]) -> list[Rank]:
    graded = averages(
        ((_names(of)[0], item[:2]), pair)
        for of in summaries
        for item, pair in of.results[ALL].items()
    )
    scores: dict[str, list[Pair]] = {}
    for (name, _), pair in graded.items():
        scores.setdefault(name, []).append(pair)
    lengths = _lengths(summaries)
    ranked = sorted(scores, key=lambda name: -average(scores[name])[0])
    found = []
    for place, name in enumerate(ranked, start=1):
        mean, ends = round(average(scores[name])[0], 3), mean_intervals(scores[name])
        n, length = len(scores[name]), lengths.get(name)
        found.append(Rank(MEAN_SCORE, 1, place, name, mean, ends and ends[0], n, None, length))
    return found


def _by_wins(summaries: Sequence[Summary]) -> tuple[list[Rank], list[str]]:
    import numpy as np
    from scipy.sparse.csgraph import connected_components

    names = list(dict.fromkeys(name for of in summaries for name in _names(of)))
    sides = np.array([[names.index(name) for name in _names(of)] for of in summaries])
    questions = sorted({item[:2] for of in summaries for item in of.shares[ALL]})
    row = {question: number for number, question in enumerate(questions)}
    wins = np.zeros((len(questions), len(summaries), 2))
    for pair, of in enumerate(summaries):
        for item, share in of.shares[ALL].items():
            wins[row[item[:2]], pair] += (1 - share, share)
    table = np.zeros((len(names), len(names)))  # of whom over whom
    np.add.at(table, (sides, sides[:, ::-1]), wins.sum(axis=0))
    _, groups = connected_components(table, directed=False)
    _, strong = connected_components(table, connection="strong")
    fits = _fits(sides, wins, len(names))
    told = np.bincount(strong)[strong] > 1
    for group in range(groups.max() + 1):
        members = groups == group
        known = members & told if (members & told).any() else members
        fits[:, members] += _MEAN - fits[:, known].mean(axis=1, keepdims=True)
    low, high = np.percentile(fits[1:], (2.5, 97.5), axis=0).round(1).tolist()
    points, lengths = fits[0].round(1).tolist(), _lengths(summaries)
    places: Counter[int] = Counter()
    ranks = []
    for i in sorted(range(len(names)), key=lambda i: (groups[i], -points[i])):
        places[group := int(groups[i]) + 1] += 1
        ends = (low[i], high[i]) if told[i] and len(questions) > 1 else None
        won, n = table[i].sum(), table[i].sum() + table[:, i].sum()
        rank = (BRADLEY_TERRY, group, places[group], names[i], points[i], ends, round(n))
        ranks.append(Rank(*rank, round(float(won / n), 4), lengths.get(names[i])))
    return ranks, _notes(ranks, dict(zip(names, strong.tolist(), strict=True)))


def _fits(sides: npt.NDArray[np.int64], wins: Floats, models: int) -> Floats:
    """The points of each model, about a mean of 0: of all questions, then of each resample of them.

    Args:
        sides: of each pair the numbers of the first and the second model, [pair, 2].
        wins: of each question how much of a win it gives to which side, [q, pair, 2].
        models: how many there are.

    Returns:
        [1 + resample, model]
    """
    import numpy as np

    rng, n = np.random.default_rng(0), len(wins)
    over = np.eye(models)[sides[:, 0]] - np.eye(models)[sides[:, 1]]
    found = []
    for number in range(1 + max(_RESAMPLES_AT_LEAST, min(_RESAMPLES, _FITTED // models))):
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
    for of in apart.values():
        if len(of) > 1:
            names = " > ".join(", ".join(models) for models in of.values())
            notes.append(
                f"ranking: {names}: wins between these go one way only, so how far apart they are "
                "cannot be told; a weak penalty holds their points in bounds"
            )
    return notes
