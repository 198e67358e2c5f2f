"""Win rates: at equal length, by people's labels, and against what is planted."""

from __future__ import annotations

import importlib
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import optimize, stats

from chatbind_cli.evaluation import ranking
from chatbind_cli.evaluation.files import Mismatches
from chatbind_cli.evaluation.labels import with_people
from chatbind_cli.evaluation.length_control import length_controlled
from chatbind_cli.evaluation.statistics import prediction_powered
from chatbind_cli.evaluation.summary import summarize
from chatbind_cli.evaluation.tables import markdown_table

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def _reviews(shares: list[float], lengths: list[tuple[int, int]] | None = None) -> list[Any]:
    scores = {0.0: [8, 6], 0.5: [7, 7], 1.0: [6, 8]}
    found = []
    for question, share in enumerate(shares):
        metadata: dict[str, Any] = {"models": ["a", "b"]}
        if lengths is not None:
            metadata["lengths"] = list(lengths[question])
        review = {"question_id": question, "tuple": scores[share], "reviewer_id": "j"}
        found.append(review | {"metadata": metadata})
    return found


def _liking_length(
    n: int, seed: int = 4, ties: float = 0.2
) -> tuple[list[float], list[tuple[int, int]]]:
    """b wins or ties the oftener the longer it is; at equal length it is as good as a."""
    rng = np.random.default_rng(seed)
    longer = rng.integers(-150, 600, n)
    wins = rng.random(n) < 1 / (1 + np.exp(-longer / 100))
    shares = np.where(rng.random(n) < ties, 0.5, wins)
    return shares.tolist(), [(700, 700 + int(more)) for more in longer]


def test_the_win_rate_at_equal_length_is_that_of_the_likelihood_maximized_by_hand() -> None:
    shares, lengths = _liking_length(150)
    (summary,) = length_controlled(summarize(_reviews(shares, lengths)))
    y, gap = np.array(shares), np.array([second - first for first, second in lengths])
    gap = np.tanh(gap / gap.std(ddof=1))

    def loss(theta: np.ndarray) -> float:
        logit = theta[0] + theta[1] * gap
        each = y * np.logaddexp(0, -logit) + (1 - y) * np.logaddexp(0, logit)
        return float(each.sum() + 0.005 * theta @ theta)  # C = 100

    theta = optimize.minimize(loss, np.zeros(2), method="BFGS").x
    total = summary.total
    assert total["lc_win_rate"] == pytest.approx(1 / (1 + math.exp(-theta[0])), abs=2e-4)
    assert total["win_rate"] > 0.65
    low, high = total["lc_win_rate_ci95"]
    assert low < total["lc_win_rate"] < high < total["win_rate"]


def test_its_interval_is_that_of_a_bootstrap() -> None:
    shares, lengths = _liking_length(300, seed=8, ties=0.7)
    reviews = _reviews(shares, lengths)
    (summary,) = length_controlled(summarize(reviews))
    rng, drawn = np.random.default_rng(1), []
    for _ in range(400):
        chosen = rng.integers(300, size=300)
        some = _reviews([shares[i] for i in chosen], [lengths[i] for i in chosen])
        y = np.array([(1 + np.sign(b - a)) / 2 for a, b in (r["tuple"] for r in some)])
        gap = np.array([lengths[i][1] - lengths[i][0] for i in chosen])
        gap = np.tanh(gap / gap.std(ddof=1))
        logits = optimize.minimize(
            lambda t, y=y, gap=gap: float(
                (np.logaddexp(0, t[0] + t[1] * gap) - y * (t[0] + t[1] * gap)).sum()
            ),
            np.zeros(2),
        ).x
        drawn.append(1 / (1 + math.exp(-logits[0])))
    low, high = np.percentile(drawn, [2.5, 97.5])
    ours = summary.total["lc_win_rate_ci95"]
    assert ours == pytest.approx((low, high), abs=0.12 * (high - low))


def test_equal_lengths_change_nothing_and_unknown_ones_are_said() -> None:
    shares = [1.0] * 12 + [0.5] * 4 + [0.0] * 14
    (same,) = length_controlled(summarize(_reviews(shares, [(90, 90)] * 30)))
    assert same.total["lc_win_rate"] == pytest.approx(same.total["win_rate"], abs=2e-4)
    ours, plain = same.total["lc_win_rate_ci95"], same.total["win_rate_ci95"]
    assert ours == pytest.approx(plain, abs=0.01)
    assert " of " not in markdown_table([same]).splitlines()[-3]
    (none,) = length_controlled(summarize(_reviews(shares)))
    assert (none.total["lc_win_rate"], none.total["lc_n"]) == (None, 0)
    assert "| –, of 0 |" in markdown_table([none])
    lying = _reviews([1.0, 0.0, 1.0, 0.0], [(-5, 5), (10**400, 1), (True, 2), (3, 4)])
    (found,) = length_controlled(summarize(lying))
    assert found.total["lc_n"] == 1


def test_a_second_that_always_wins_has_a_bounded_rate_at_equal_length() -> None:
    for lengths in ([(100, 900)] * 40, [(100, 900 + more) for more in range(40)]):
        (blind,) = length_controlled(summarize(_reviews([1.0] * 30 + [0.0] * 10, lengths)))
        low, high = blind.total["lc_win_rate_ci95"]
        assert high - low > 0.95, "always longer by as much: nothing can be told"
    lengths = [(100, 100 + more) for more in range(-20, 20)]
    (summary,) = length_controlled(summarize(_reviews([1.0] * 40, lengths)))
    low, high = summary.total["lc_win_rate_ci95"]
    assert 0.8 < low < 0.99 < summary.total["lc_win_rate"] <= high <= 1
    assert "at equal length (95 %)" in markdown_table([summary])


def _labelled(tmp_path: Path, reviews: list[Any], labels: list[Any]) -> tuple[Any, list[str]]:
    path = tmp_path / "human.jsonl"
    path.write_text("".join(f"{json.dumps(label)}\n" for label in labels))
    mismatches = Mismatches()
    (summary,) = with_people(summarize(reviews), path, mismatches)
    return summary, [line.partition(": ")[2] for line in mismatches.lines()]


def test_agreement_and_kappa_are_those_of_a_table_by_hand(tmp_path: Path) -> None:
    """Judge and people on ten questions: 4 x b, 3 x a and a tie alike, two apart."""
    judge = [1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.5, 0.5]
    people: list[Any] = ["b", 2, "2", "b", "tie", "a", "a", "1", "tie", "b"]
    labels = [{"question_id": q, "winner": winner} for q, winner in enumerate(people)]
    summary, lines = _labelled(tmp_path, _reviews(judge), labels)
    chance = (5 * 5 + 3 * 3 + 2 * 2) / 100
    total = summary.total
    assert (total["labels"], total["agreement"], lines) == (10, 0.8, [])
    assert total["label_kappa"] == pytest.approx((0.8 - chance) / (1 - chance), abs=1e-4)
    assert total["true_win_rate"] == 0.6  # all are labelled: what people say
    table = markdown_table([summary])
    assert "| labels | people agree | their kappa | win rate by people (95 %) |" in table
    assert f"| 10 | 80.0 % | {total['label_kappa']:.2f} | 60.0 % (" in table


def test_some_labels_correct_what_the_judge_says_of_the_others(tmp_path: Path) -> None:
    judge = [1.0] * 24 + [0.0] * 6 + [1.0] * 50 + [0.0] * 20
    people = [0.0] * 8 + [1.0] * 16 + [0.0] * 6
    labels = [{"question_id": q, "winner": "ab"[int(said)]} for q, said in enumerate(people)]
    summary, _ = _labelled(tmp_path, _reviews(judge), labels)
    expected = prediction_powered(list(zip(judge, people, strict=False)), judge[30:])
    assert (summary.total["true_win_rate"], summary.total["true_win_rate_ci95"]) == expected
    assert 0.4 < summary.total["true_win_rate"] < 0.55 < summary.total["win_rate"] == 0.74


def test_labels_that_do_not_fit_make_a_line_a_kind(tmp_path: Path) -> None:
    labels: list[Any] = [
        {"question_id": 0, "winner": "a"},
        {"question_id": 0, "winner": "b"},
        {"question_id": 0, "winner": "b", "judge": "another person"},
        {"question_id": 77, "winner": "a"},
        {"question_id": 1, "winner": "nobody"},
        {"question_id": 1, "winner": "c", "models": ["c", "a"]},
        {"question_id": 1, "winner": "b", "models": ["b", "a"]},
        {"question_id": 2},
        [],
    ]
    summary, lines = _labelled(tmp_path, _reviews([1.0, 1.0, 1.0]), labels)
    assert summary.total["labels"] == 2  # 0: a tie between two people; 1: b
    assert summary.total["agreement"] == 0.5
    assert lines == [
        "more than once, the first one counts: question 0",
        "labelled, but not judged: question 77, 1",
        "no winner, or not said of which models: question 1, 2",
        "cannot be used: line 9: must be a JSON object, not list",
    ]
    summary, _ = _labelled(tmp_path, _reviews([1.0]), [])
    assert (summary.total["labels"], summary.total["true_win_rate"]) == (0, None)


def test_several_pairs_need_labels_that_name_them(tmp_path: Path) -> None:
    reviews = _reviews([1.0, 0.0])
    reviews += [r | {"metadata": {"models": ["a", "c"], "pair": [1, 3]}} for r in reviews]
    path = tmp_path / "human.jsonl"
    lines = [
        {"question_id": 0, "winner": "b", "models": ["a", "b"]},
        {"question_id": 0, "winner": "a", "models": ["c", "a"]},
        {"question_id": 1, "winner": "a"},
    ]
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    mismatches = Mismatches()
    found = with_people(summarize(reviews), path, mismatches)
    assert [of.total["agreement"] for of in found] == [1.0, 0.0]
    assert len(mismatches.lines()) == 1
    assert "no winner, or not said of which models: question 1" in mismatches.lines()[0]


def test_prediction_powered_rates_are_those_of_the_formula_by_hand() -> None:
    rng = np.random.default_rng(2)
    judged = (rng.random(500) < 0.7).astype(float)
    people = np.where(rng.random(500) < 0.8, judged, rng.random(500) < 0.3)
    n, rest = 120, 380
    f, y, others = judged[:n], people[:n].astype(float), judged[n:]
    weight = np.cov(f, y, ddof=0)[0, 1] / ((1 + n / rest) * np.var(judged))
    expected = y.mean() + weight * (others.mean() - f.mean())
    variance = np.var(y - weight * f) / n + weight**2 * np.var(others) / rest
    rate, (low, high) = prediction_powered(list(zip(f, y, strict=True)), others.tolist()) or (
        0,
        (0, 0),
    )
    assert rate == pytest.approx(expected, abs=1e-4)
    half = stats.norm.ppf(0.975) * math.sqrt(variance)
    assert (low, high) == pytest.approx((expected - half, expected + half), abs=0.006)
    # Narrower than the labels alone, as the judge is worth something.
    assert high - low < 0.95 * 2 * stats.norm.ppf(0.975) * y.std() / math.sqrt(n)
    # A judge that knows nothing is not listened to.
    blind = rng.random(500)
    alone, _ = prediction_powered(list(zip(blind[:n], y, strict=True)), blind[n:].tolist()) or (
        0,
        0,
    )
    assert alone == pytest.approx(y.mean(), abs=0.01)


@pytest.mark.parametrize("n", [2, 10])
def test_perfect_agreement_on_few_labels_is_no_certainty(n: int) -> None:
    rate, (low, high) = prediction_powered([(1.0, 1.0)] * n, [1.0] * 50) or (0, (0, 0))
    assert (rate, high) == (1, 1)
    assert low < 0.85
    assert prediction_powered([(1.0, 1.0)], [1.0]) is None


@pytest.fixture
def benchmark() -> Iterator[Any]:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield importlib.import_module("judging")
    finally:
        sys.path.remove(str(BENCHMARKS))


def test_planted_rates_and_points_lie_in_their_intervals(
    benchmark: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few runs of the benchmark; a hundred hold the truth in 91 to 97."""
    monkeypatch.setattr(ranking, "_RESAMPLES", 200)
    found = {
        record["figure"]: record["held_the_truth"]
        for record in benchmark.covered(6, questions=100, labels=50)
    }
    assert len(found) == 10
    for figure, held in found.items():
        assert held <= 3 if figure.startswith("naive") else held >= 5, (figure, held)
