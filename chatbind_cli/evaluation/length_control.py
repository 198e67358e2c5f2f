"""How often the second would win if both answers were equally long."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from chatbind_cli.evaluation.statistics import RIDGE, Pair, Z, fitted, span
from chatbind_cli.evaluation.summary import Summary


def length_controlled(summaries: Sequence[Summary]) -> list[Summary]:
    """The figures with `lc_win_rate` and its interval, of the `lc_n` questions with lengths."""
    found = []
    for summary in summaries:
        rows, lengths = [], {} if summary.single else summary.lengths
        for row in summary.rows:
            shares = summary.shares[row["category"]]
            known = [(share, lengths[item]) for item, share in shares.items() if item in lengths]
            rate, ends = _equally_long(
                [share for share, _ in known], [second - first for _, (first, second) in known]
            ) or (None, None)
            rows.append(row | {"lc_n": len(known), "lc_win_rate": rate, "lc_win_rate_ci95": ends})
        found.append(replace(summary, rows=rows))
    return found


def _equally_long(shares: Sequence[float], longer: Sequence[float]) -> tuple[float, Pair] | None:
    """The win rate at no difference in length, and its 95 % interval.

    P(second wins) = 1 / (1 + exp(-(theta + phi tanh(longer / sd(longer))))) is fitted to the
    shares, and theta alone gives the rate. The variance is the "sandwich", so that ties count as
    what they are. Two wins and two losses more, at the mean length, keep the interval open, and so
    does the ridge penalty where one side is always the longer one and nothing can be told.

    The original has two terms more. Each instruction's difficulty comes from one fit to hundreds
    of models on its own 805 instructions; a pair of models cannot tell it, and a rate that is a
    mean over questions moves little without it. And phi is held near that of answers that were
    asked to be long or short on purpose, which nobody has here.

    Args:
        shares: of each question how much of a win is the second's.
        longer: by how many characters the second answer is longer.

    Source: Dubois, Galambosi, Liang & Hashimoto, Length-Controlled AlpacaEval: A Simple Way to
    Debias Automatic Evaluators (2024), section 3.
    """
    import numpy as np
    from scipy.special import expit

    if len(shares) < 2:
        return None
    gap = np.tanh(np.array(longer) / (np.std(longer, ddof=1) or 1.0))
    x, y = np.column_stack([np.ones(len(gap)), gap]), np.array(shares)
    rate = float(expit(fitted(x, y, 1 - y)[0]))
    x, y = np.vstack([x, [x.mean(axis=0)] * 4]), np.r_[y, 0, 0, 1, 1]
    coefficients, penalty = fitted(x, y, 1 - y), np.eye(2) / RIDGE
    p = expit(x @ coefficients)
    bread = np.linalg.inv((x.T * p * (1 - p)) @ x + penalty)
    meat = (x.T * (y - p) ** 2) @ x + penalty
    half = Z * np.sqrt((bread @ meat @ bread)[0, 0])
    ends = expit(coefficients[0] + np.array([-half, half]))
    return round(rate, 4), span(rate, float(ends[0]), float(ends[1]))
