"""The ranking of all models, against the likelihood maximized by hand."""

from __future__ import annotations

import io
import json
import math
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from scipy import optimize

from chatbind_cli.errors import UsageError
from chatbind_cli.evaluation import ranking
from chatbind_cli.evaluation.ranking import (
    BRADLEY_TERRY,
    MEAN_SCORE,
    Rank,
    has_several,
    ranking_of,
)
from chatbind_cli.evaluation.statistics import win_rate
from chatbind_cli.evaluation.summary import renamed, summarize
from chatbind_cli.evaluation.tables import markdown_table, write

Reviews = list[dict[str, Any]]


@pytest.fixture(autouse=True)
def _few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranking, "_RESAMPLES", 300)


def _review(question: object, scores: list[float] | None, *models: str, **more: Any) -> Any:
    metadata = {"models": list(models), **more.pop("metadata", {})}
    return {"question_id": question, "tuple": scores, "reviewer_id": "j", "metadata": metadata} | (
        {} if scores else {"error": "none"}
    )


def _ranked(reviews: Reviews) -> tuple[dict[str, Rank], list[str]]:
    ranks, notes = ranking_of(summarize(reviews))
    return {rank.model: rank for rank in ranks}, notes


def _games(strengths: dict[str, float], n: int, seed: int, ties: float = 0.2) -> Reviews:
    """Of each question and pair who wins, by Bradley-Terry, or a tie."""
    rng = np.random.default_rng(seed)
    found = []
    for a, b in combinations(strengths, 2):
        p = 1 / (1 + math.exp(strengths[a] - strengths[b]))
        for question in range(n):
            scores = [7, 7] if rng.random() < ties else [5, 8] if rng.random() < p else [8, 5]
            found.append(_review(question, scores, a, b))
    return found


def _by_hand(reviews: Reviews, models: list[str]) -> np.ndarray:
    """Elo's points by maximizing the likelihood, with ties as half a win each way."""

    first, second = (
        np.array([models.index(review["metadata"]["models"][side]) for review in reviews])
        for side in (0, 1)
    )
    scores = np.array([review["tuple"] for review in reviews])
    share = (1 + np.sign(scores[:, 1] - scores[:, 0])) / 2

    def loss(theta: np.ndarray) -> float:
        gap = theta[first] - theta[second]
        each = share * np.logaddexp(0, gap) + (1 - share) * np.logaddexp(0, -gap)
        return float(each.sum() + 1e-6 * theta.sum() ** 2)

    found = optimize.minimize(loss, np.zeros(len(models)), method="BFGS").x
    return 1000 + 400 / math.log(10) * (found - found.mean())


def test_points_are_those_of_the_likelihood_maximized_by_hand() -> None:
    strengths = {"a": 0.8, "b": 0.0, "c": -0.3, "d": 1.5}
    reviews = _games(strengths, 40, seed=3)
    ranks, notes = _ranked(reviews)
    assert notes == []
    expected = _by_hand(reviews, list(strengths))
    for model, points in zip(strengths, expected, strict=True):
        assert ranks[model].points == pytest.approx(points, abs=0.6)  # the penalty, and rounding
    assert [rank.place for rank in ranks.values()] == [1, 2, 3, 4]
    assert sorted(ranks, key=lambda model: -expected[list(strengths).index(model)]) == list(ranks)
    assert {rank.n for rank in ranks.values()} == {120}
    low, high = ranks["a"].ci95 or (0, 0)
    assert low < ranks["a"].points < high


def test_intervals_are_those_of_questions_drawn_with_all_their_pairs() -> None:
    """Answers of c to half of the questions are bad ones, whoever it meets: drawn pair by pair the
    interval would be too narrow."""
    rng = np.random.default_rng(5)
    reviews = []
    for question in range(40):
        good = question % 2
        for other in ("a", "b", "d"):
            wins = rng.random() < (0.9 if good else 0.1)
            reviews.append(_review(question, [5, 8] if wins else [8, 5], other, "c"))
    ranks, _ = _ranked(reviews)
    drawn = []
    for _ in range(400):
        chosen = rng.integers(40, size=40)
        some = [
            review for question in chosen for review in reviews[3 * question : 3 * question + 3]
        ]
        drawn.append(_by_hand(some, ["a", "b", "d", "c"])[3])
    low, high = np.percentile(drawn, [2.5, 97.5])
    assert ranks["c"].ci95 == pytest.approx((low, high), abs=0.12 * (high - low))


def test_two_models_have_points_that_say_their_win_rate() -> None:
    reviews = [
        _review(q, [5, 8] if q < 12 else [7, 7] if q < 16 else [8, 5], "a", "b") for q in range(40)
    ]
    (summary,) = summarize(reviews)
    ranks, _ = _ranked(reviews)
    rate = 1 / (1 + 10 ** ((ranks["a"].points - ranks["b"].points) / 400))
    assert summary.total["win_rate"] == ranks["b"].win_rate == 14 / 40
    assert rate == pytest.approx(14 / 40, abs=0.001)
    assert not has_several([summary])


def test_both_orders_and_all_judges_make_one_outcome_of_a_question() -> None:
    """As given b wins by one, swapped a by three: a has the higher mean."""
    reviews = []
    for question in range(6):
        for order, scores in (([1, 2], [7, 8]), ([2, 1], [9, 6])):
            metadata = {"order": order, "slot": f"{question} {order}"}
            reviews.append(_review(question, scores, "a", "b", metadata=metadata))
    ranks, _ = _ranked(reviews)
    assert (ranks["a"].win_rate, ranks["a"].n) == (1, 6)


def test_who_always_wins_is_above_the_others_at_a_bounded_distance_that_is_said() -> None:
    reviews = [_review(q, [9, 2], "best", "a") for q in range(50)]
    reviews += [_review(q, [9, 2], "best", "b") for q in range(50)]
    reviews += [_review(q, [5, 6] if q % 3 else [6, 5], "a", "b") for q in range(50)]
    ranks, notes = _ranked(reviews)
    assert list(ranks) == ["best", "b", "a"]
    assert ranks["best"].ci95 is None
    assert 1400 < ranks["best"].points < 4000
    # The others' mean is what the points are about, so they are as if it had not played.
    alone, _ = _ranked(reviews[100:])
    for model in "ab":
        assert ranks[model].points == pytest.approx(alone[model].points, abs=0.2)
        assert ranks[model].ci95 is not None
    assert len(notes) == 1
    assert "ranking: best > b, a: wins between these go one way only" in notes[0]


def test_models_that_were_never_compared_are_ranked_apart() -> None:
    reviews = _games({"a": 1.0, "b": 0.0}, 30, seed=1) + _games({"x": 0.0, "y": 2.0}, 30, seed=2)
    ranks, notes = _ranked(reviews)
    assert [(r.model, r.group, r.place) for r in ranks.values()] == [
        ("a", 1, 1),
        ("b", 1, 2),
        ("y", 2, 1),
        ("x", 2, 2),
    ]
    assert notes == ["ranking: never compared with each other, so ranked apart: a, b; y, x"]
    for group in (("a", "b"), ("x", "y")):
        assert sum(ranks[name].points for name in group) == pytest.approx(2000, abs=0.2)


def test_who_gave_the_answers_must_be_known() -> None:
    unnamed = [{"question_id": q, "score": [8, 7]} for q in range(5)]
    assert _ranked(unnamed) == (
        {},
        ["reviews: not ranked, as its answerers have no names, or the same (--names)"],
    )
    (named,) = renamed(summarize(unnamed), ["a", "b"])
    assert [rank.model for rank in ranking_of([named]).ranks] == ["a", "b"]
    failed = [_review(1, None, "a", "b")]
    assert _ranked(failed) == ({}, [])


def _graded() -> Reviews:
    grades = {"a": [4, 5, 6, 7], "b": [8, 8, 9, 7], "c": [1, 1, 2, 1]}
    found = [
        _review(question, [score], model, metadata={"lengths": [100 * question]})
        for model, scores in grades.items()
        for question, score in enumerate(scores)
    ]
    return [*found, _review(9, None, "a")]


def test_answers_that_were_graded_alone_are_ranked_by_their_mean_score() -> None:
    summaries = summarize(_graded(), name="r")
    assert [summary.name for summary in summaries] == ["r: a", "r: b", "r: c"]
    total = summaries[0].total
    assert (total["n"], total["mean_1"], total["failed"], total["length_1"]) == (4, 5.5, 1, 150)
    two_sided = ("mean_2", "relative", "ci95", "win", "tie", "lose", "win_rate", "length_2")
    assert {total[key] for key in two_sided} == {None}
    assert has_several(summaries)
    ranks, notes = ranking_of(summaries)
    assert [(r.ranking, r.place, r.model, r.points, r.n) for r in ranks] == [
        (MEAN_SCORE, 1, "b", 8, 4),
        (MEAN_SCORE, 2, "a", 5.5, 4),
        (MEAN_SCORE, 3, "c", 1.25, 4),
    ]
    assert notes == []
    low, high = ranks[1].ci95 or (0, 0)
    assert 4 <= low < 5.5 < high <= 7
    assert "not balanced" not in markdown_table(summaries), "nothing stood in any place"
    assert [s.models for s in renamed(summaries, ["u", "v", "w"])] == [
        (["u"], []),
        (["v"], []),
        (["w"], []),
    ]


def test_pairs_of_all_models_are_told_apart() -> None:
    summaries = summarize(_games({"a": 0.0, "b": 1.0, "c": 2.0}, 5, seed=0))
    assert [summary.name for summary in summaries] == ["a, b", "a, c", "b, c"]
    with pytest.raises(UsageError, match="the same first answerer"):
        renamed(summaries, ["x", "y", "z"])


def test_the_ranking_is_shown_in_every_form() -> None:
    summaries = summarize(_games({"a": 0.0, "b|x": 1.0, "c": 2.0}, 9, seed=0) + _graded())
    found = ranking_of(summaries)

    def shown(form: str) -> str:
        out = io.StringIO()
        write(summaries, form, out, found)
        return out.getvalue()

    markdown = shown("markdown")
    assert "| ranking by bradley-terry | points | 95 % | win rate | n |" in markdown
    assert "| 2. b\\|x | " in markdown
    assert "| 1. b | 8 | 7.25 to 8.75 | 4 | 150 |" in markdown
    records = [json.loads(line) for line in shown("json").splitlines()]
    ranked = [record for record in records if "ranking" in record]
    assert [record["place"] for record in ranked] == [1, 2, 3, 1, 2, 3]
    assert list(ranked[0]) == list(Rank._fields)
    lines = shown("csv").splitlines()
    assert lines[0] == "ranking,group,place,model,points,n,win_rate,length,ci95_low,ci95_high"
    assert len(lines) == 7
    assert "ranking by mean score" in shown("table")
    assert f"ranking by {BRADLEY_TERRY}" in shown("table")


@pytest.mark.parametrize("shares", [[1.0] * 10, [0.0] * 3, [0.5] * 6, [1, 0.5, 0, 1]])
def test_a_win_rate_lies_in_its_interval_which_is_never_empty(shares: list[float]) -> None:
    rate, (low, high) = win_rate(shares) or (0, (0, 0))
    assert 0 <= low <= rate <= high <= 1
    assert high - low > 0.1
    assert win_rate([]) is None


def test_the_interval_of_a_win_rate_without_ties_is_agresti_and_coulls() -> None:
    """Their own form: n' = n + z^2 and p' = (wins + z^2 / 2) / n', here with z^2 as 4."""
    rate, ends = win_rate([1.0] * 30 + [0.0] * 10) or (0, (0, 0))
    p = 32 / 44
    half = 1.959964 * math.sqrt(p * (1 - p) / 44)
    assert rate == 0.75
    assert ends == pytest.approx((p - half, p + half), abs=1e-4)
