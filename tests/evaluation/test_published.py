"""FastChat's and AlpacaEval's published forms, through the doors that reviews and labels have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from chatbind_cli.evaluation import ranking
from chatbind_cli.evaluation.files import Mismatches, read_reviews
from chatbind_cli.evaluation.labels import with_people
from chatbind_cli.evaluation.published import as_reviews, winner_share
from chatbind_cli.evaluation.ranking import ranking_of
from chatbind_cli.evaluation.scores import scores_of
from chatbind_cli.evaluation.summary import Summary, summarize
from chatbind_cli.evaluation.tables import agreement_lines

# Lines as FastChat's `gen_judgment.py` writes them, prompts and replies shortened.
PAIR = (
    '{"question_id": 81, "model_1": "alpaca-13b", "model_2": "gpt-3.5-turbo", '
    '"g1_winner": "model_2", "g2_winner": "tie", "judge": ["gpt-4", "pair-v2"], '
    '"g1_user_prompt": "[User Question]\\n...", "g1_judgment": "Assistant B ... [[B]]", '
    '"g2_user_prompt": "[User Question]\\n...", "g2_judgment": "Both ... [[C]]", "turn": 1, '
    '"tstamp": 1687222818.1}'
)
SINGLE = (
    '{"question_id": 81, "model": "alpaca-13b", "judge": ["gpt-4", "single-v1"], "user_prompt": '
    '"[Instruction]\\n...", "judgment": "... Rating: [[7]]", "score": 7, "turn": 1, '
    '"tstamp": 1687222818.1}'
)
VOTE = (
    '{"question_id": 81, "model_a": "gpt-3.5-turbo", "model_b": "alpaca-13b", "winner": "model_a", '
    '"judge": "expert_17", "conversation_a": [], "conversation_b": [], "turn": 1}'
)
ANNOTATIONS = """[
  {"instruction": "Who made the penny?", "output_1": "A mint.", "generator_1": "gpt4_1106_preview",
   "dataset": "helpful_base", "output_2": "The royal mint.", "generator_2": "toy", "annotator":
   "weighted_alpaca_eval_gpt4_turbo", "preference": 1.27, "price_per_example": 0.01},
  {"instruction": "And the cent?", "output_1": "Nobody.", "generator_1": "gpt4_1106_preview",
   "dataset": "koala", "output_2": "?", "generator_2": "toy", "annotator":
   "weighted_alpaca_eval_gpt4_turbo", "preference": 1.75, "price_per_example": 0.01}
]"""


@pytest.fixture(autouse=True)
def _few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranking, "_RESAMPLES", 200)


def _changed(line: str, **changes: Any) -> str:
    return json.dumps({**json.loads(line), **changes})


def _read(tmp_path: Path, *lines: str) -> list[Summary]:
    path = tmp_path / "published.jsonl"
    path.write_text("\n".join(lines))
    return summarize(read_reviews(str(path)))


def test_mt_benchs_pairs_are_two_orders_of_a_question(tmp_path: Path) -> None:
    lines = [
        PAIR,
        _changed(PAIR, question_id=82, g1_winner="model_1", g2_winner="model_2"),
        _changed(PAIR, question_id=83, g1_winner="error"),
        _changed(PAIR, turn=2, judge=["gpt-4", "pair-v2-multi-turn"]),
        _changed(PAIR, model_1="claude-v1", g1_winner="tie", g2_winner="model_1"),
        PAIR,  # a rerun's: the last one counts
    ]
    first, second = _read(tmp_path, *lines)
    assert first.models == (["alpaca-13b"], ["gpt-3.5-turbo"])
    total = first.total
    assert (total["n"], total["win"], total["tie"], total["lose"]) == (2, 1, 1, 0)
    assert (total["failed"], total["one_order"], total["consistency"]) == (1, 1, 0)
    assert total["judges"] == ["gpt-4 pair-v2", "gpt-4 pair-v2-multi-turn"]
    assert agreement_lines([first]) == [], "judges of two turns judge two things"
    assert (second.total["n"], second.total["lose"]) == (1, 1)
    ranks = ranking_of([first, second]).ranks
    assert [rank.model for rank in ranks] == ["claude-v1", "gpt-3.5-turbo", "alpaca-13b"]


def test_mt_benchs_single_scores_rank_the_models(tmp_path: Path) -> None:
    lines = [
        SINGLE,
        _changed(SINGLE, turn=2, score=4.5),
        _changed(SINGLE, question_id=82, score=-1),  # what FastChat could not read
        _changed(SINGLE, model="vicuna-13b", score=9),
    ]
    alpaca, _ = summaries = _read(tmp_path, *lines)
    assert (alpaca.total["n"], alpaca.total["mean_1"], alpaca.total["failed"]) == (1, 5.75, 1)
    assert [(r.model, r.points) for r in ranking_of(summaries).ranks] == [
        ("vicuna-13b", 9.0),
        ("alpaca-13b", 5.75),
    ]


def test_alpaca_evals_preferences_keep_their_weight_and_tell_lengths(tmp_path: Path) -> None:
    (summary,) = _read(tmp_path, ANNOTATIONS)
    total = summary.total
    assert total["win_rate"] == 0.51  # the mean of 0.27 and 0.75, as its leaderboard has it
    assert (total["win"], total["lose"]) == (1, 1)
    assert (total["length_1"], total["length_2"]) == (7, 8)
    assert [row["category"] for row in summary.rows] == ["helpful_base", "koala", "all"]
    records = json.loads(ANNOTATIONS)
    for preference, scores in ((0, (0.5, 0.5)), (1.5, (0.5, 0.5)), (2, (0, 1)), (1, (1, 0))):
        (review,) = as_reviews({**records[0], "preference": preference})
        assert scores_of(review) == scores
    for preference in (2.5, -1, None, "2", True):
        (review,) = as_reviews({**records[0], "preference": preference})
        assert (scores_of(review), review["error"]) == (None, "names no winner")


def test_votes_are_labels_and_so_are_annotations(tmp_path: Path) -> None:
    votes = [
        VOTE,
        _changed(VOTE, judge="author_2", winner="tie (inconsistent)"),
        VOTE,
        _changed(VOTE, question_id=99),
        _changed(VOTE, question_id=82, winner="the second"),
        _changed(VOTE, model_a="claude-v1"),
    ]
    judged = _read(tmp_path, PAIR, _changed(PAIR, question_id=82))
    path = tmp_path / "votes.jsonl"
    path.write_text("\n".join(votes))
    mismatches = Mismatches()
    (summary,) = with_people(judged, path, mismatches)
    assert (summary.total["labels"], summary.total["agreement"]) == (1, 1.0)
    assert [line.partition(": ")[2] for line in mismatches.lines()] == [
        "more than once, the first one counts: question 81",
        "labelled, but not judged: question 99, 81",
        "no winner, or not said of which models: question 82",
    ]
    path.write_text(ANNOTATIONS)
    (summary,) = with_people(_read(tmp_path, ANNOTATIONS), path, Mismatches())
    assert (summary.total["labels"], summary.total["agreement"]) == (2, 1.0)


def test_our_own_reviews_and_what_is_none_pass_as_they_are() -> None:
    for record in (
        {"question_id": 1, "tuple": [8, 7], "metadata": {"models": ["a", "b"]}},
        {"question_id": 1, "score": [9.0, 8.5], "text": "9 8.5"},
        {"question_id": 1, "error": "x", "model": "m", "score": 1},
        {"model_1": "a"},
        {},
    ):
        assert list(as_reviews(record)) == [record]


@pytest.mark.parametrize(
    ("winner", "share"),
    [
        *(("b", 1), ("a", 0), (1, 0), ("2", 1), ("model_b", 1)),
        *(("tie", 0.5), ("tie (bothbad)", 0.5)),
        *(("c", None), (None, None), (3, None), ([], None)),
    ],
)
def test_a_winner_is_a_name_or_a_place(winner: object, share: float | None) -> None:
    assert winner_share(winner, ["a", "b"]) == share


def test_what_is_of_a_wrong_kind_fails_one_record(tmp_path: Path) -> None:
    nasty: list[Any] = [None, [], {}, [[]], -1, 1e300, "\x1b[2J", True]
    keys = ("question_id", "model_1", "g1_winner", "judge", "turn")
    lines = [_changed(PAIR, **{key: value}) for key in keys for value in nasty]
    lines += [_changed(SINGLE, **{k: v}) for k in ("model", "judge", "score") for v in nasty]
    lines += [
        json.dumps({**json.loads(ANNOTATIONS)[0], key: value})
        for key in ("generator_2", "output_1", "preference", "instruction", "annotator")
        for value in nasty
    ]
    summaries = _read(tmp_path, *lines)
    assert sum(len(summary.reviews) for summary in summaries) > 50
    assert ranking_of(summaries).ranks
