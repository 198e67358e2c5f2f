"""Means, the relative score, and how sure one can be of it: plain numbers in, plain numbers out."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, TypeVar

Pair = tuple[float, float]
Key = TypeVar("Key", bound=Hashable)

# The ends of an interval then have a standard error of about 0.8 % of its width; with very many
# questions the interval is narrow, and fewer resamples (2 % of the width) keep the wait short.
_RESAMPLES, _RESAMPLES_AT_LEAST = 10_000, 2_000
_DRAWS = 10_000_000
_DRAWS_AT_A_TIME = 250_000  # 2 MiB of integers, whatever the number of questions
_ALIKE = 1e-9
_SEED = 0
RIDGE = 100.0
"""scikit-learn's C: it bounds what has no bound, and moves 90 wins of 100 by less than a point."""
Z = 1.959964
"""The normal distribution's end of 95 %."""


def average(pairs: Sequence[Pair]) -> Pair:
    """The mean of each side of at least one pair."""
    n = len(pairs)
    return sum(first for first, _ in pairs) / n, sum(second for _, second in pairs) / n


def averages(pairs: Iterable[tuple[Key, Pair]]) -> dict[Key, Pair]:
    """The mean of the pairs of each key."""
    found: dict[Key, list[Pair]] = {}
    for key, pair in pairs:
        found.setdefault(key, []).append(pair)
    return {key: average(of) for key, of in found.items()}


def mean_pair(pairs: Sequence[Pair], digits: int = 3) -> Pair | None:
    """The mean of each side, rounded as published tables are; None without pairs."""
    if not pairs:
        return None
    first, second = average(pairs)
    return round(first, digits), round(second, digits)


def relative_score(means: Pair | None) -> float | None:
    """100 x second / first of the rounded means, to 1 decimal; None where the first is zero."""
    if means is None or means[0] == 0:
        return None
    return round(means[1] / means[0] * 100, 1)


def relative_interval(pairs: Sequence[Pair]) -> Pair | None:
    """The 95 % bootstrap interval of the relative score, in percent to 1 decimal.

    Args:
        pairs: one pair a question. Reviews of the same question are averaged before, so the
            question is what is drawn (a bootstrap clustered by question).
    """
    return _interval(pairs, _relative, digits=1)


def mean_intervals(pairs: Sequence[Pair]) -> tuple[Pair, Pair] | None:
    """The 95 % bootstrap intervals of both sides' means; None for fewer than two questions."""
    n = len(pairs)
    first, second = (
        _interval([(pair[side],) for pair in pairs], lambda total: total / n, digits=3)
        for side in (0, 1)
    )
    return None if first is None or second is None else (first, second)


def _interval(
    rows: Sequence[tuple[float, ...]], statistic: Callable[..., Any], digits: int
) -> Pair | None:
    """The 95 % percentile bootstrap interval of a statistic of columns' sums.

    Args:
        rows: of each question what is drawn together.
        statistic: takes the sum of each column.
        digits: decimals of the ends.

    Returns:
        The same numbers for the same rows at every call. None for fewer than two questions, and
        where a resample has nothing to divide by.

    Source: Efron & Tibshirani, An Introduction to the Bootstrap (1993), chapter 13.
    """
    import numpy as np
    from scipy import stats

    n = len(rows)
    if n < 2:
        return None
    # Sorted, as the draws are to be the same in whatever order the questions came.
    columns = np.asarray(sorted(rows), dtype=np.float64).T
    with np.errstate(divide="ignore", invalid="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)  # told apart below
        found = stats.bootstrap(
            tuple(columns),
            lambda *drawn, axis: statistic(*(column.sum(axis) for column in drawn)),
            paired=True,
            vectorized=True,
            method="percentile",
            n_resamples=_resamples(n),
            batch=max(1, _DRAWS_AT_A_TIME // n),
            rng=np.random.default_rng(_SEED),
        )
    if not np.isfinite(found.bootstrap_distribution).all():
        return None
    low, high = found.confidence_interval
    return round(float(low), digits), round(float(high), digits)


def _resamples(n: int) -> int:
    return max(_RESAMPLES_AT_LEAST, min(_RESAMPLES, _DRAWS // n))


def _relative(first: Any, second: Any) -> Any:
    return 100 * second / first


def _gap(first: Any, second: Any, other_first: Any, other_second: Any) -> Any:
    """Relative score of one run minus that of another, in percentage points."""
    return _relative(first, second) - _relative(other_first, other_second)


def paired_difference(
    ours: Sequence[Pair], theirs: Sequence[Pair]
) -> tuple[float, Pair | None, float] | None:
    """Compares two runs question by question.

    The test is a permutation test: if the runs were alike, each question's two results could as
    well be exchanged. All exchanges are tried for up to 13 questions, else 10,000 drawn ones, and
    fewer of more than 1,000 questions.

    Args:
        ours: a question's mean scores in the one run.
        theirs: the same questions' in the other.

    Returns:
        The relative score of the one minus that of the other in percentage points, its 95 %
        bootstrap interval, and p: how often chance alone gives a difference at least as large.
        None where there is no question, or nothing to divide by.

    Source: Good, Permutation, Parametric and Bootstrap Tests of Hypotheses (2005), chapter 3.
    """
    import numpy as np
    from scipy import stats

    rows = sorted((*one, *other) for one, other in zip(ours, theirs, strict=True))
    n = len(rows)
    values = np.asarray(rows, dtype=np.float64).reshape(n, 4)
    total = values.sum(axis=0)
    if total[0] == 0 or total[2] == 0:
        return None
    middle, half = (total[:2] + total[2:]) / 2, (values[:, :2] - values[:, 2:]) / 2

    def distance(kept: Any, axis: int = -1) -> Any:
        """How far the runs are apart if each question's results are kept (1) or exchanged (-1)."""
        moved = kept @ half  # [..., 2]
        sums = np.concatenate([middle + moved, middle - moved], axis=-1)
        # A gap that cannot be computed speaks for chance; rounding apart, equal ones are equal.
        return np.nan_to_num(abs(_gap(*np.moveaxis(sums, -1, 0))).round(9), nan=np.inf)

    p_value = 1.0  # of one question: exchanged, it is as far apart
    if n > 1:
        with np.errstate(divide="ignore", invalid="ignore"):
            p_value = stats.permutation_test(
                (np.ones(n),),
                distance,
                permutation_type="samples",  # of one sample: the signs are flipped
                vectorized=True,
                alternative="greater",
                n_resamples=_resamples(n),
                batch=max(1, 4 * _DRAWS_AT_A_TIME // n),
                rng=np.random.default_rng(_SEED),
            ).pvalue
    difference = round(float(_gap(*total)), 1)
    return difference, _interval(rows, _gap, digits=1), round(float(p_value), 4)


def holm(p_values: Sequence[float]) -> list[float]:
    """The p values of several tests at once, each as it is against all of them.

    In the order of size, the k-th smallest of n is multiplied by n - k + 1, and none gets smaller
    than the one before it. The chance of any false alarm is then at most the level of the test.

    Source: Holm, A simple sequentially rejective multiple test procedure (1979).
    """
    corrected = list(p_values)
    largest = 0.0
    for rank, place in enumerate(sorted(range(len(corrected)), key=corrected.__getitem__)):
        largest = max(largest, corrected[place] * (len(corrected) - rank))
        corrected[place] = min(1.0, round(largest, 4))
    return corrected


def cohens_kappa(outcomes: Sequence[tuple[int, int]]) -> float | None:
    """How much two judges agree beyond chance, 1 at most; None where chance alone explains all.

    Args:
        outcomes: what both say of a question; at least one.

    Source: Cohen, A coefficient of agreement for nominal scales (1960).
    """
    n = len(outcomes)
    agree = sum(a == b for a, b in outcomes) / n
    first, second = (Counter(said) for said in zip(*outcomes, strict=True))
    chance = sum(first[key] * second[key] for key in first) / n**2
    return None if chance == 1 else (agree - chance) / (1 - chance)


def win_rate(shares: Sequence[float]) -> tuple[float, Pair] | None:
    """How often the second wins, from 0 to 1, and the 95 % interval; None without questions.

    Two wins and two losses more than were seen keep the interval open where all shares are alike:
    ten wins of ten are no certainty. The variance is that of the shares, so ties make it smaller.

    Args:
        shares: of each question how much of a win is the second's: 0, 1/2, 1 or between.

    Source: Agresti & Coull, Approximate is better than "exact" for interval estimation of binomial
    proportions (1998).
    """
    if not shares:
        return None
    rate, n = sum(shares) / len(shares), len(shares) + 4
    middle = (sum(shares) + 2) / n
    half = Z * math.sqrt(((sum(share**2 for share in shares) + 2) / n - middle**2) / n)
    return round(rate, 4), span(rate, middle - half, middle + half)


def prediction_powered(
    labelled: Sequence[Pair], unlabelled: Sequence[float]
) -> tuple[float, Pair] | None:
    """The win rate by people and its 95 % interval; None for fewer than two labels.

    It is people's, moved by a weight times what the judge says of the other questions minus what
    it says of theirs: its errors cancel out, whatever they are. The weight is that of the
    narrowest interval; two errors each way more than were seen keep that open.

    Args:
        labelled: of questions drawn by chance: the judge's share of a win, and people's.
        unlabelled: the judge's share of all others.

    Source: Angelopoulos et al., Prediction-powered inference (Science, 2023), of a mean; the weight
    from Angelopoulos, Duchi & Zrnic, PPI++ (2023).
    """
    import numpy as np

    n, rest = len(labelled), len(unlabelled)
    if n < 2:
        return None
    judged, said = np.array(labelled).T
    others, weight = np.array(unlabelled), 0.0
    if rest and (spread := np.var(np.r_[judged, others])):
        weight = float(np.mean((judged - judged.mean()) * said) / (1 + n / rest) / spread)
        weight = min(1.0, max(0.0, weight))
    errors = said - weight * judged
    variance = (n * np.var(errors) + (1 + weight) ** 2) / (n + 4) / n
    rate = float(errors.mean())
    if weight:
        rate += weight * float(others.mean())
        variance += weight**2 * np.var(others) / rest
    rate, half = min(1.0, max(0.0, rate)), Z * math.sqrt(variance)
    return round(rate, 4), span(rate, rate - half, rate + half)


def fitted(x: Any, won: Any, lost: Any) -> Any:
    """The coefficients [k] of a logistic regression without intercept.

    Args:
        x: a line a comparison, [n, k].
        won: how much of each was won, [n].
        lost: and how much was lost.
    """
    import numpy as np
    from sklearn import config_context
    from sklearn.linear_model import LogisticRegression

    # The tolerance is of the mean gradient: a pair with few questions must count beside many.
    settings = {"solver": "newton-cholesky", "tol": 1e-12}
    model = LogisticRegression(C=RIDGE, fit_intercept=False, **settings)
    with config_context(assume_finite=True, skip_parameter_validation=True):
        model.fit(np.vstack([x, x]), np.repeat([1, 0], len(x)), np.r_[won, lost])
    return model.coef_[0]


def span(rate: float, low: float, high: float) -> Pair:
    """An interval that holds its rate and lies between 0 and 1, to 4 decimals."""
    return round(max(0.0, min(rate, low)), 4), round(min(1.0, max(rate, high)), 4)


def outcome(pair: Pair) -> int:
    """1 if the second is better, -1 if it is worse, 0 for a tie."""
    if abs(pair[1] - pair[0]) < _ALIKE:
        return 0  # means of the same scores in another order differ in their last bits
    return 1 if pair[1] > pair[0] else -1


def position_bias(outcomes: Iterable[tuple[int, int]]) -> tuple[int, int]:
    """How often the answer shown first won in both orders, and the answer shown last.

    Args:
        outcomes: who won as given and who won swapped: -1 first, 0 tie, 1 second.
    """
    counts = Counter(outcomes)
    return counts[-1, 1], counts[1, -1]
