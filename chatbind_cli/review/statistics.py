"""Means, the relative score, and how sure one can be of it.

Plain numbers in, plain numbers out; knows nothing of records or categories.
"""

from __future__ import annotations

from collections.abc import Sequence

Pair = tuple[float, float]

# The ends of the interval then have a standard error of about 0.8 % of its width; with very many
# questions the interval is narrow, and fewer resamples (2 % of the width) keep the wait short.
RESAMPLES = 10_000
_RESAMPLES_AT_LEAST = 2_000
_DRAWS = 10_000_000
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
    n = len(pairs)
    if resamples is None:
        resamples = max(_RESAMPLES_AT_LEAST, min(RESAMPLES, _DRAWS // n))
    generator = np.random.default_rng(_SEED)
    chunk = max(1, _WEIGHTS_AT_A_TIME // n)
    ratios = []
    for start in range(0, resamples, chunk):
        size = min(chunk, resamples - start)
        # How often each question is drawn, instead of which one is drawn at each place.
        weights = generator.multinomial(n, np.full(n, 1 / n), size=size)  # [size, questions]
        sums = weights @ values  # [size, 2]
        if (sums[:, 0] == 0).any():
            return None
        ratios.append(100 * sums[:, 1] / sums[:, 0])
    low, high = np.percentile(np.concatenate(ratios), [2.5, 97.5])
    return round(float(low), 1), round(float(high), 1)


def outcome(pair: Pair) -> int:
    """1 if the second is better, -1 if it is worse, 0 for a tie."""
    return (pair[1] > pair[0]) - (pair[1] < pair[0])
