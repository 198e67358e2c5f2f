"""Means, relative score, intervals and paired tests, against plain loops."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy import optimize

from chatbind_cli.evaluation.statistics import (
    RIDGE,
    Pair,
    cohens_kappa,
    fitted,
    holm,
    mean_intervals,
    mean_pair,
    outcome,
    paired_difference,
    relative_interval,
    relative_score,
)


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


def _drawn(rows: np.ndarray, statistic: Callable[[np.ndarray], float]) -> np.ndarray:
    """Both ends of a percentile bootstrap interval, one resample after the other."""
    rng = np.random.default_rng(11)
    n = len(rows)
    found = [statistic(rows[rng.integers(0, n, n)].sum(axis=0)) for _ in range(10_000)]
    return np.percentile(found, [2.5, 97.5])


def _agree(ours: Pair | None, theirs: np.ndarray, rounded: float) -> None:
    """Two independent sets of 10,000 resamples: each end has a standard error of about 0.8 % of
    the width; five of them and the rounding are allowed."""
    margin = 0.04 * (theirs[1] - theirs[0]) + rounded
    assert ours == pytest.approx(tuple(theirs), abs=margin)


@pytest.mark.parametrize("n", [12, 90])
def test_intervals_agree_with_a_plain_bootstrap(n: int) -> None:
    pairs = _pairs(n)
    rows = np.asarray(pairs)
    _agree(relative_interval(pairs), _drawn(rows, lambda sums: 100 * sums[1] / sums[0]), 0.05)
    means = mean_intervals(pairs)
    assert means is not None
    for side in (0, 1):
        _agree(means[side], _drawn(rows[:, side], lambda total: total / n), 0)
    assert mean_intervals(pairs[:1]) is None


def test_the_interval_is_the_same_at_every_call_and_holds_the_score() -> None:
    pairs = _pairs(40)
    first = relative_interval(pairs)
    assert first == relative_interval(pairs[::-1]), "records come in any order"
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
    relative_interval(pairs)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # All weights at once would be 20,000 x 2,000 x 8 bytes = 320 MB.
    assert peak < 30e6


def test_a_logistic_fit_is_the_maximum_also_where_weights_differ_by_thousands() -> None:
    x = np.array([[1.0, -1, 0], [0, 1, -1], [1, 0, -1]])
    for won, lost in (
        ([90_000.0, 3, 0], [10_000.0, 5, 0]),
        ([1e6, 2, 1], [0.0, 3, 1]),  # the first pair has no maximum but for the penalty
    ):
        w, v = np.array(won), np.array(lost)

        def slope(theta: np.ndarray, w: np.ndarray = w, v: np.ndarray = v) -> np.ndarray:
            return x.T @ ((w + v) / (1 + np.exp(-x @ theta)) - w) + theta / RIDGE

        found = fitted(x, w, v)
        assert np.abs(slope(found)).max() < 1e-4
        assert found == pytest.approx(optimize.root(slope, found + 0.1).x, abs=1e-4)


def test_outcomes() -> None:
    assert [outcome(pair) for pair in [(1.0, 2.0), (2.0, 2.0), (3.0, 2.0)]] == [1, 0, -1]


def _runs(n: int, shift: float = 0.0) -> tuple[list[Pair], list[Pair]]:
    rng = np.random.default_rng(n)
    first = rng.integers(6, 10, size=n).astype(float)
    ours = rng.integers(4, 10, size=n) + shift
    theirs = ours - shift + rng.integers(-1, 2, size=n)
    return list(zip(first, ours, strict=True)), list(zip(first + 0.5, theirs, strict=True))


def _gap(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(
        100 * (ours[:, 1].sum() / ours[:, 0].sum() - theirs[:, 1].sum() / theirs[:, 0].sum())
    )


@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_the_paired_test_agrees_with_plain_exchanges(shift: float) -> None:
    ours, theirs = (np.asarray(run) for run in _runs(60, shift))
    found = paired_difference(*_runs(60, shift))
    assert found is not None
    assert found[0] == pytest.approx(_gap(ours, theirs), abs=0.051)
    rng = np.random.default_rng(5)
    as_large = 0
    for _ in range(5000):
        keep = rng.random((60, 1)) < 0.5
        mine, other = np.where(keep, ours, theirs), np.where(keep, theirs, ours)
        as_large += abs(_gap(mine, other)) >= abs(_gap(ours, theirs))
    # each has a standard error of 0.7 % at most
    assert found[2] == pytest.approx(as_large / 5000, abs=0.03)


def test_the_exact_paired_test_counts_every_exchange() -> None:
    ours, theirs = _runs(6, 0.7)
    found = paired_difference(ours, theirs)
    assert found is not None
    observed = abs(_gap(np.asarray(ours), np.asarray(theirs)))
    as_large = 0
    for keep in itertools.product([True, False], repeat=6):
        mine = [a if k else b for a, b, k in zip(ours, theirs, keep, strict=True)]
        other = [b if k else a for a, b, k in zip(ours, theirs, keep, strict=True)]
        as_large += abs(_gap(np.asarray(mine), np.asarray(other))) >= observed - 1e-9
    assert found[2] == round(as_large / 64, 4)


def test_the_interval_of_a_difference_agrees_with_a_plain_bootstrap() -> None:
    ours, theirs = _runs(60, 0.5)
    found = paired_difference(ours, theirs)
    assert found is not None

    def gap(sums: np.ndarray) -> float:
        return 100 * (sums[1] / sums[0] - sums[3] / sums[2])

    _agree(found[1], _drawn(np.hstack([ours, theirs]), gap), 0.05)


def test_the_paired_test_is_the_same_in_whatever_order_the_questions_come() -> None:
    ours, theirs = _pairs(30), _pairs(31)[1:]
    assert paired_difference(ours, theirs) == paired_difference(ours[::-1], theirs[::-1])


def test_equal_runs_differ_by_nothing_and_nothing_cannot_be_compared() -> None:
    pairs = _pairs(30)
    found = paired_difference(pairs, pairs)
    assert found is not None
    assert found == (0.0, (0.0, 0.0), 1.0)
    assert paired_difference([], []) is None
    assert paired_difference([(8.0, 6.0)], [(8.0, 7.0)]) == (-12.5, None, 1.0)
    assert paired_difference([(0.0, 5.0)], [(5.0, 5.0)]) is None


@pytest.mark.parametrize("seed", range(4))
def test_kappa_agrees_with_scikit_learns(seed: int) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(seed)
    first = rng.integers(-1, 2, size=80)
    second = np.where(rng.random(80) < 0.6, first, rng.integers(-1, 2, size=80))
    expected = metrics.cohen_kappa_score(first, second)
    assert cohens_kappa(list(zip(first, second, strict=True))) == pytest.approx(expected, abs=1e-12)


def test_kappa_of_judges_who_always_say_the_same_is_undefined() -> None:
    assert cohens_kappa([(1, 1), (1, 1)]) is None
    assert cohens_kappa([(1, -1), (-1, 1)]) == pytest.approx(-1.0)


def test_holms_correction_is_that_of_the_definition() -> None:
    assert holm([]) == []
    assert holm([0.03]) == [0.03]
    # Holm's procedure: 0.01 x 4, then 0.02 x 3 = 0.06, then 0.03 x 2 = 0.06, then 0.2
    assert holm([0.03, 0.01, 0.2, 0.02]) == pytest.approx([0.06, 0.04, 0.2, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    # At level a, what is at most a is what the step-down procedure rejects.
    rng = np.random.default_rng(1)
    for _ in range(50):
        values = rng.random(6).round(4) ** 3
        corrected = holm(values.tolist())
        for level in (0.01, 0.05, 0.3):
            rejected: set[int] = set()
            for rank, place in enumerate(np.argsort(values)):
                if values[place] > level / (6 - rank):
                    break
                rejected.add(int(place))
            assert {i for i, p in enumerate(corrected) if p <= level + 5e-5} >= rejected
            assert {i for i, p in enumerate(corrected) if p <= level - 5e-5} <= rejected
