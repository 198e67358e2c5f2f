"""Means, relative score and the bootstrap interval, against numpy and scipy."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import scipy.stats

from chatbind_cli.review.statistics import mean_pair, outcome, relative_interval, relative_score


def _pairs(n: int, seed: int = 3) -> list[tuple[float, float]]:
    rng = np.random.default_rng(seed)
    values = rng.integers(2, 21, size=(n, 2)) / 2
    return [(float(a), float(b)) for a, b in values]


def test_means_and_relative_scores_are_those_of_the_reference(golden: Path) -> None:
    """All reviews, with the two failed ones as the -1 that the reference makes of them."""
    expected = json.loads((golden / "review" / "summarize_golden.json").read_text())["parsed"]
    groups: dict[str, list[tuple[float, float]]] = {}
    for line in (golden / "review" / "gpt4_text_synth.jsonl").read_text().splitlines():
        review = json.loads(line)
        for key in (review["category"], "all"):
            groups.setdefault(key, []).append(tuple(review["tuple"]))
    assert list(groups) == list(expected)
    for key, pairs in groups.items():
        means = mean_pair(pairs)
        assert means is not None
        assert list(means) == expected[key]["mean"]
        assert relative_score(means) == expected[key]["relative_percent"]


def test_means_are_rounded_before_they_are_divided() -> None:
    # 100 * 0.0015 / 0.0004 is 375; of the rounded means 0.002 and 0 nothing can be said.
    assert relative_score(mean_pair([(0.0004, 0.0015)])) is None
    assert relative_score(mean_pair([(3.0, 1.0), (3.0, 1.0), (3.0, 1.001)])) == 33.3


def test_a_zero_baseline_has_no_relative_score() -> None:
    """The reference divides by zero here."""
    assert relative_score((0.0, 5.0)) is None
    assert relative_interval([(0.0, 5.0), (0.0, 4.0)]) is None
    assert relative_score(mean_pair([])) is None


@pytest.mark.parametrize("n", [12, 90])
def test_the_interval_agrees_with_scipys_bootstrap(n: int) -> None:
    pairs = _pairs(n)
    values = np.asarray(pairs)

    def ratio(first: np.ndarray, second: np.ndarray, axis: int = -1) -> np.ndarray:
        return 100 * second.sum(axis=axis) / first.sum(axis=axis)

    theirs = scipy.stats.bootstrap(
        (values[:, 0], values[:, 1]),
        ratio,
        paired=True,
        vectorized=True,
        n_resamples=20_000,
        confidence_level=0.95,
        method="percentile",
        rng=np.random.default_rng(11),
    ).confidence_interval
    ours = relative_interval(pairs)
    assert ours is not None
    width = theirs.high - theirs.low
    # Two independent sets of 10,000 and 20,000 resamples: each end has a standard error of
    # about 0.6 % of the width; five of them, plus the rounding to 0.1.
    assert ours == pytest.approx((theirs.low, theirs.high), abs=0.03 * width + 0.05)


def test_the_interval_is_the_same_at_every_call_and_holds_the_score() -> None:
    pairs = _pairs(40)
    first = relative_interval(pairs)
    assert first == relative_interval(list(pairs))
    assert first is not None
    score = relative_score(mean_pair(pairs))
    assert score is not None
    assert first[0] < score < first[1]


def test_one_question_has_no_interval_and_equal_answers_have_no_width() -> None:
    assert relative_interval([(5.0, 4.0)]) is None
    assert relative_interval([(5.0, 4.0)] * 3) == (80.0, 80.0)


def test_many_questions_need_no_more_memory_than_few() -> None:
    import tracemalloc

    pairs = _pairs(20_000)
    tracemalloc.start()
    relative_interval(pairs, resamples=500)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # All weights at once would be 20,000 x 500 x 8 bytes = 80 MB.
    assert peak < 30e6


def test_outcomes() -> None:
    assert [outcome(pair) for pair in [(1.0, 2.0), (2.0, 2.0), (3.0, 2.0)]] == [1, 0, -1]
