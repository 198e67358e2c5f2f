"""Means, the relative score, and how sure one can be of it.

Plain numbers in, plain numbers out; knows nothing of records or categories.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

Pair = tuple[float, float]

# The ends of the interval then have a standard error of about 0.8 % of its width; with very many
# questions the interval is narrow, and fewer resamples (2 % of the width) keep the wait short.
RESAMPLES = 10_000
_RESAMPLES_AT_LEAST = 2_000
_DRAWS = 10_000_000
_ALIKE = 1e-9
_SEED = 0
_WEIGHTS_AT_A_TIME = 1 << 20  # 8 MiB of integers, whatever the number of questions


def average(pairs: Sequence[Pair]) -> Pair:
    """The mean of each side of at least one pair."""
    n = len(pairs)
    return sum(first for first, _ in pairs) / n, sum(second for _, second in pairs) / n


def mean_pair(pairs: Sequence[Pair]) -> Pair | None:
    """The mean of each side, rounded to 3 decimals as published tables are; None without pairs."""
    if not pairs:
        return None
    first, second = average(pairs)
    return round(first, 3), round(second, 3)


def relative_score(means: Pair | None) -> float | None:
    """100 x second / first of the rounded means, to 1 decimal; None where the first is zero."""
    if means is None or means[0] == 0:
        return None
    return round(means[1] / means[0] * 100, 1)


def relative_interval(pairs: Sequence[Pair], *, resamples: int | None = None) -> Pair | None:
    """The 95 % percentile bootstrap interval of the relative score, in percent.

    Args:
        pairs: one pair a question. Reviews of the same question are averaged before, so the
            question is what is drawn (a bootstrap clustered by question).
        resamples: how many times all questions are drawn anew; default: 10,000, and fewer for
            more than 1,000 questions.

    Returns:
        Both ends to 1 decimal; the same numbers for the same pairs at every call. None for
        fewer than two questions, and where a resample may have nothing to divide by.

    Source: Efron & Tibshirani, An Introduction to the Bootstrap (1993), chapter 13.
    """
    import numpy as np

    if len(pairs) < 2:
        return None
    values = np.asarray(pairs, dtype=np.float64)  # [questions, 2]
    if not (values[:, 0] > 0).any():
        return None
    ratios = []
    for sums in _resampled_sums(values, resamples):
        if (sums[:, 0] == 0).any():
            return None
        ratios.append(100 * sums[:, 1] / sums[:, 0])
    return _interval(np.concatenate(ratios))


def mean_intervals(pairs: Sequence[Pair]) -> tuple[Pair, Pair] | None:
    """The 95 % percentile bootstrap intervals of both sides' means; None for fewer than two."""
    import numpy as np

    if len(pairs) < 2:
        return None
    sums = np.concatenate(list(_resampled_sums(np.asarray(pairs, dtype=np.float64), None)))
    first, second = np.percentile(sums / len(pairs), [2.5, 97.5], axis=0).T
    return (float(first[0]), float(first[1])), (float(second[0]), float(second[1]))


def _resampled_sums(
    values: npt.NDArray[np.float64], resamples: int | None
) -> Iterator[npt.NDArray[np.float64]]:
    """Sums over questions drawn with replacement, [resamples, columns], in bounded pieces."""
    import numpy as np

    # The draws are to be the same in whatever order the questions came.
    values = values[np.lexsort(values.T)]
    n = len(values)
    if resamples is None:
        resamples = max(_RESAMPLES_AT_LEAST, min(RESAMPLES, _DRAWS // n))
    generator = np.random.default_rng(_SEED)
    chunk = max(1, _WEIGHTS_AT_A_TIME // n)
    for start in range(0, resamples, chunk):
        size = min(chunk, resamples - start)
        # How often each question is drawn, instead of which one is drawn at each place.
        weights = generator.multinomial(n, np.full(n, 1 / n), size=size)  # [size, questions]
        yield weights @ values


def _interval(values: npt.NDArray[np.float64]) -> Pair:
    import numpy as np

    low, high = np.percentile(values, [2.5, 97.5])
    return round(float(low), 1), round(float(high), 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """How much two runs differ on the same questions.

    Attributes:
        n: questions that both runs have.
        difference: the relative score of the one minus that of the other, in percentage points.
        ci95: its 95 % bootstrap interval, drawn by question; None for fewer than two.
        p_value: how often chance alone gives a difference at least as large.
    """

    n: int
    difference: float
    ci95: Pair | None
    p_value: float


def paired_difference(ours: Sequence[Pair], theirs: Sequence[Pair]) -> Difference | None:
    """Compares two runs question by question.

    The test is a permutation test: if the runs were alike, each question's two results could as
    well be exchanged. All exchanges are tried for up to 12 questions, 10,000 drawn ones for more.

    Args:
        ours: a question's mean scores in the one run.
        theirs: the same questions' in the other.

    Returns:
        None where there is no question, or nothing to divide by.

    Source: Good, Permutation, Parametric and Bootstrap Tests of Hypotheses (2005), chapter 3.
    """
    import numpy as np

    n = len(ours)
    if n == 0:
        return None
    values = np.asarray([(*a, *b) for a, b in zip(ours, theirs, strict=True)], dtype=np.float64)
    values = values[np.lexsort(values.T)]
    total = values.sum(axis=0, keepdims=True)
    if total[0, 0] == 0 or total[0, 2] == 0:
        return None
    observed = float(_gaps(total)[0])
    more, tried = 0, 0
    for keep in _exchanges(n):
        mine = keep @ values[:, :2] + (1 - keep) @ values[:, 2:]
        other = values[:, :2].sum(axis=0) + values[:, 2:].sum(axis=0) - mine
        gaps = _gaps(np.concatenate([mine, other], axis=1))
        # A gap that cannot be computed speaks for chance. The margin is for rounding.
        more += int((~(np.abs(gaps) < abs(observed) - 1e-9)).sum())
        tried += len(keep)
    exact = tried == 2**n
    ci95 = None
    if n > 1:
        gaps = np.concatenate([_gaps(sums) for sums in _resampled_sums(values, None)])
        ci95 = _interval(gaps) if np.isfinite(gaps).all() else None
    return Difference(
        n=n,
        difference=round(observed, 1),
        ci95=ci95,
        # The observed order is one of the draws, so p is never zero (Phipson & Smyth 2010).
        p_value=round(more / tried if exact else (more + 1) / (tried + 1), 4),
    )


_EXACT_UP_TO = 12


def _exchanges(n: int) -> Iterator[npt.NDArray[np.float64]]:
    """Which questions keep their order, [tries, n] of 0 and 1, in bounded pieces."""
    import numpy as np

    if n <= _EXACT_UP_TO:
        numbers = np.arange(2**n)[:, None]
        yield ((numbers >> np.arange(n)) & 1).astype(np.float64)
        return
    generator = np.random.default_rng(_SEED)
    chunk = max(1, _WEIGHTS_AT_A_TIME // n)
    for start in range(0, RESAMPLES, chunk):
        size = (min(chunk, RESAMPLES - start), n)
        yield generator.integers(0, 2, size=size).astype(np.float64)


def _gaps(sums: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """[tries, 4] (first and second of both runs) -> differences of the relative scores."""
    import numpy as np

    with np.errstate(divide="ignore", invalid="ignore"):
        gaps: npt.NDArray[np.float64] = 100 * (sums[:, 1] / sums[:, 0] - sums[:, 3] / sums[:, 2])
    return gaps


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


def cohens_kappa(first: Sequence[int], second: Sequence[int]) -> float | None:
    """How much two judges agree beyond chance, 1 at most; None where chance alone explains all.

    Source: Cohen, A coefficient of agreement for nominal scales (1960).
    """
    n = len(first)
    if n == 0:
        return None
    agree = sum(a == b for a, b in zip(first, second, strict=True)) / n
    counts = Counter(first), Counter(second)
    chance = sum(counts[0][key] * counts[1][key] for key in counts[0]) / n**2
    return None if chance == 1 else (agree - chance) / (1 - chance)


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
