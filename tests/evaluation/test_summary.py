"""From review records to figures, against the reference's printed summary and plain loops."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chatbind_cli.errors import RecordError
from chatbind_cli.evaluation.figures import agreements
from chatbind_cli.evaluation.scores import scores_of
from chatbind_cli.evaluation.statistics import paired_difference
from chatbind_cli.evaluation.summary import Summary, compared, renamed, summarize
from chatbind_cli.evaluation.tables import (
    agreement_lines,
    failure_lines,
    markdown_table,
    print_table,
    write,
)
from tests.evaluation.sample import one_summary


def _review(question: object, pair: Any, category: str = "conv", **more: Any) -> dict[str, Any]:
    metadata = {"models": ["a", "b"], **more.pop("metadata", {})}
    record = {"question_id": question, "category": category, "tuple": pair, "reviewer_id": "j"}
    return {**record, "metadata": metadata, **more}


def _compare(summary: Summary, baseline: Summary) -> Summary:
    (found,) = compared([summary], [baseline])
    return found


def _rows(records: list[dict[str, Any]], **options: Any) -> dict[str, dict[str, Any]]:
    return {row["category"]: row for row in one_summary(records, **options).rows}


def _both(row: dict[str, Any], figure: str) -> tuple[Any, Any]:
    return row[f"{figure}_1"], row[f"{figure}_2"]


def _csv(summary: Summary) -> str:
    out = io.StringIO()
    write([summary], "csv", out)
    return out.getvalue()


def _synth(golden: Path) -> list[dict[str, Any]]:
    lines = (golden / "review" / "gpt4_text_synth.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_figures_equal_the_reference_where_no_review_failed(golden: Path) -> None:
    expected = json.loads((golden / "review" / "summarize_golden.json").read_text())["parsed"]
    rows = _rows(_synth(golden))
    assert list(rows) == ["conv", "detail", "complex", "all"]
    assert set(rows) == set(expected)
    assert rows["complex"]["failed"] == 0
    assert _both(rows["complex"], "mean") == tuple(expected["complex"]["mean"])
    assert rows["complex"]["relative"] == expected["complex"]["relative_percent"]


def test_failed_reviews_are_counted_and_in_no_mean_unlike_in_the_reference(golden: Path) -> None:
    """The reference averages its two [-1, -1] in; these are the means without them."""
    expected = json.loads((golden / "review" / "summarize_golden.json").read_text())["parsed"]
    reviews = _synth(golden)
    rows = _rows(reviews)
    assert {key: row["failed"] for key, row in rows.items()} == {
        "conv": 1,
        "all": 2,
        "detail": 1,
        "complex": 0,
    }
    for key in ("conv", "detail", "all"):
        good = [r["tuple"] for r in reviews if key in ("all", r["category"]) and r["tuple"][0] >= 0]
        means = tuple(round(sum(pair[i] for pair in good) / len(good), 3) for i in (0, 1))
        assert _both(rows[key], "mean") == means
        assert rows[key]["relative"] == round(means[1] / means[0] * 100, 1)
        assert rows[key]["relative"] != expected[key]["relative_percent"]
        assert rows[key]["n"] == len(good)


def test_vicunas_published_reviews_are_read_as_they_are(shared_data: Path) -> None:
    """Without a category there is one line, as the reference prints it."""
    lines = (shared_data / "vicuna" / "review_gpt35_vicuna-13b.jsonl").read_text().splitlines()
    reviews = [json.loads(line) for line in lines if line.strip()]
    summary = one_summary(reviews)
    (row,) = summary.rows
    assert (row["category"], row["n"], row["failed"]) == ("all", 80, 0)
    # Sums of the published scores: 693 and 638 of 80 reviews; 92 % is what was published.
    assert row["mean_1"] == round(sum(review["score"][0] for review in reviews) / 80, 3)
    assert (_both(row, "mean"), row["relative"]) == ((8.662, 7.975), 92.1)
    assert row["win"] + row["tie"] + row["lose"] == 80
    assert row["judges"][0].startswith("gpt-4-0328-generic")


@pytest.mark.parametrize(
    "value",
    [
        [-1, -1],
        [8, -1],
        [float("nan"), 8],
        [float("inf"), 3],
        [8],
        [8, 7, 6],
        "8 7",
        None,
        [True, 1],
    ],
)
def test_what_is_no_pair_of_scores_is_a_failure(value: Any) -> None:
    assert scores_of({"tuple": value}) is None


def test_an_error_outweighs_scores_and_zero_is_a_score() -> None:
    assert scores_of({"tuple": [8, 7], "error": "cut off"}) is None
    assert scores_of({"tuple": [0, 7]}) == (0, 7)
    assert scores_of({"score": [9.0, 8.5]}) == (9, 8.5)


def test_a_zero_baseline_has_no_relative_score_and_no_traceback() -> None:
    """The reference ends with a ZeroDivisionError here."""
    rows = _rows([_review(1, [0, 5]), _review(2, [0, 6])])
    assert (_both(rows["all"], "mean"), rows["all"]["relative"]) == ((0, 5.5), None)
    assert rows["all"]["ci95"] is None


def test_both_orders_of_a_question_are_averaged_first_and_compared() -> None:
    reviews = [
        _review(1, [8, 6], metadata={"order": [1, 2], "slot": "a"}),
        _review(1, [7, 9], metadata={"order": [2, 1], "slot": "b"}),
        _review(2, [5, 9], metadata={"order": [1, 2], "slot": "c"}),
        _review(2, [6, 7], metadata={"order": [2, 1], "slot": "d"}),
        _review(3, [4, 4], metadata={"order": [1, 2], "slot": "e"}),
    ]
    row = _rows(reviews)["all"]
    # Question 3 was shown in one order and is in no mean.
    assert (row["n"], row["one_order"]) == (2, 1)
    assert row["mean_1"] == (7.5 + 5.5) / 2
    assert row["mean_2"] == (7.5 + 8) / 2
    assert (row["win"], row["tie"], row["lose"]) == (1, 1, 0)
    # Question 1 changes its winner with the order, question 2 does not.
    assert row["consistency"] == 0.5
    # In the first place stood 8 and 9, 5 and 7; in the second 6 and 7, 9 and 6.
    assert _both(row, "place") == (29 / 4, 28 / 4)
    # As given the first won question 1, swapped the second did: always the one shown first.
    assert markdown_table([one_summary(reviews, name="run")]).splitlines()[-2:] == [
        "- run: both orders name the same winner in 50.0 % of 2 questions; the answer shown first "
        "won both times in 1, the one shown last in 0; mean score 7.25 in the first place, 7 in "
        "the second",
        "- run: the means are of 2 of 3 questions; left out, as judged in one order only: 1",
    ]


def _place_lover(seed: int, *, gain: float = 1.5) -> tuple[list[dict[str, Any]], np.ndarray]:
    """Both orders of 90 questions from a judge who adds to the first place, and the scores."""
    rng = np.random.default_rng(seed)
    plain = rng.integers(3, 8, size=(90, 2)).astype(float)
    reviews = []
    for i, (first, second) in enumerate(plain.tolist()):
        for order, pair in (([1, 2], [first + gain, second]), ([2, 1], [first, second + gain])):
            metadata = {"order": order, "slot": f"{i} {order}"}
            reviews.append(_review(i, pair, metadata=metadata))
    return reviews, plain


@pytest.mark.parametrize("seed", range(3))
def test_a_missing_order_does_not_shift_the_score_of_a_judge_who_prefers_a_place(seed: int) -> None:
    reviews, plain = _place_lover(seed)
    whole = one_summary(reviews)
    assert whole.rows[-1]["relative"] == pytest.approx(
        100 * (plain[:, 1] + 0.75).sum() / (plain[:, 0] + 0.75).sum(), abs=0.06
    )
    # Drop the swapped review of every second question.
    kept = [r for r in reviews if r["metadata"]["order"] == [1, 2] or r["question_id"] % 2]
    half = one_summary(kept, name="half")
    row = half.rows[-1]
    assert (row["n"], row["one_order"]) == (45, 45)
    odd = plain[1::2] + 0.75
    assert row["relative"] == pytest.approx(100 * odd[:, 1].sum() / odd[:, 0].sum(), abs=0.06)
    assert _compare(half, whole).rows[-1]["difference"] == 0.0
    both = one_summary(reviews).rows[-1]
    assert both["place_1"] - both["place_2"] == pytest.approx(1.5, abs=1e-9)
    assert "half: the means are of 45 of 90 questions; left out, as" in markdown_table([half])


def test_questions_that_were_all_judged_in_one_order_count_and_are_said_to_be_unbalanced() -> None:
    reviews, plain = _place_lover(0)
    given = [review for review in reviews if review["metadata"]["order"] == [1, 2]]
    summary = one_summary(given, name="run")
    row = summary.rows[-1]
    assert (row["n"], row["one_order"], row["place_1"]) == (90, 0, None)
    assert row["mean_1"] == round(plain[:, 0].mean() + 1.5, 3)
    said = "run: not balanced, 90 judged as given only and 0 swapped only: a judge who"
    assert said in markdown_table([summary])
    drawn = [r for r in reviews if (r["metadata"]["order"] == [2, 1]) == (r["question_id"] % 3 < 1)]
    assert "60 judged as given only and 30 swapped" in markdown_table([one_summary(drawn)])
    rule = [{**review, "reviewer_id": "rule"} for review in given]
    assert "not balanced" not in markdown_table([one_summary(rule)])


def test_a_judge_who_saw_one_order_does_not_count_beside_one_who_saw_both() -> None:
    def seen(judge: str, question: int, order: list[int], pair: list[float]) -> dict[str, Any]:
        metadata = {"order": order, "slot": f"{judge} {question} {order}"}
        return {**_review(question, pair, metadata=metadata), "reviewer_id": judge}

    reviews = [
        *[seen("x", 1, [1, 2], [8, 4]), seen("x", 1, [2, 1], [6, 6])],
        *[seen("y", 1, [1, 2], [10, 0])],
        *[seen("y", 2, [1, 2], [3, 1]), seen("y", 2, [2, 1], [1, 3])],
        *[seen("rule", 1, [1, 2], [10, 1]), seen("rule", 2, [1, 2], [1, 1])],
    ]
    row = _rows(reviews)["all"]
    assert (row["n"], row["one_order"]) == (2, 0)
    # question 1: x says 7 and 5, the rule 10 and 1; question 2: y says 2 and 2, the rule 1 and 1
    assert _both(row, "mean") == ((8.5 + 1.5) / 2, (3 + 1.5) / 2)


def test_one_failed_order_leaves_the_other_to_speak() -> None:
    reviews = [
        _review(1, [8, 6], metadata={"order": [1, 2], "slot": "a"}),
        _review(1, None, error="x", metadata={"order": [2, 1], "slot": "b"}),
    ]
    row = _rows(reviews)["all"]
    assert (row["n"], row["failed"], row["mean_1"], row["consistency"]) == (1, 1, 8, None)


def test_the_later_review_in_a_slot_counts() -> None:
    reviews = [
        _review(1, [8, 6], metadata={"slot": "a"}),
        _review(2, [5, 5], metadata={"slot": "b"}),
        _review(1, [2, 4], metadata={"slot": "a"}),
    ]
    summary = one_summary(reviews)
    assert len(summary.reviews) == 2
    assert summary.rows[0]["mean_1"] == 3.5


def test_the_same_question_of_two_modalities_is_two_questions() -> None:
    reviews = [
        _review(1, [8, 6], metadata={"modality": "image"}),
        _review(1, [8, 4], metadata={"modality": "audio"}),
        _review(2, [8, 2], metadata={"modality": "audio", "models": ["a", "c"]}),
    ]
    assert _rows(reviews)["all"]["n"] == 3
    rows = _rows(reviews, by="modality")
    assert {key: row["n"] for key, row in rows.items()} == {"image": 1, "all": 3, "audio": 2}


def test_exact_matches_become_shares_where_the_judge_compared() -> None:
    reviews = [
        _review(1, [10, 10], metadata={**_checks(True, True), "f1": [1.0, 1.0]}),
        _review(2, [10, 10], metadata={**_checks(True, False), "f1": [1.0, 0.5]}),
        _review(3, [10, 1], metadata={**_checks(False, False), "f1": [1.0, 0.25]}),
        _review(4, [8, 8], "chat", metadata={"f1": ["x", 10**400]}),
    ]
    rows = _rows(reviews)
    row = rows["conv"]
    assert _both(row, "accuracy") == (1.0, 0.6667)
    assert (*_both(row, "exact"), row["f1_2"]) == (1.0, 0.3333, 0.5833)
    assert rows["chat"]["accuracy_1"] is rows["chat"]["f1_1"] is None
    heads = markdown_table([one_summary(reviews)]).splitlines()[0]
    assert heads.startswith("| category | n | accuracy | exact | F1 | first | second | relative |")


def _checks(correct: bool, exact: bool) -> dict[str, Any]:
    return {"correct": [True, correct], "exact": [True, exact]}


def test_answerers_can_be_given_other_names() -> None:
    reviews = [_review(n, [8, 6], metadata={"models": ["model", "model"]}) for n in range(2)]
    (summary,) = renamed([one_summary(reviews, name="run")], ["old", "new"])
    assert (summary.name, summary.models) == ("run", (["old"], ["new"]))
    assert "first: old, second: new" in markdown_table([summary])
    two = renamed([one_summary(reviews, name=name) for name in "xy"], ["ref", "a", "b"])
    assert [(s.name, s.models, s.rows[0]["review"]) for s in two] == [
        ("a", (["ref"], ["a"]), "a"),
        ("b", (["ref"], ["b"]), "b"),
    ]


def test_ignored_questions_and_all_failed_reviews() -> None:
    reviews = [_review(1, [8, 6]), _review("2", None, error="no reply")]
    assert _rows(reviews, ignore=["2"])["all"]["failed"] == 0
    summary = one_summary(reviews, ignore=["1"])
    assert failure_lines(summary) == ["1 failed, in no mean: no reply"]
    row = summary.rows[0]
    assert (row["n"], row["failed"]) == (0, 1)
    assert [row[key] for key in ("mean_1", "mean_2", "relative", "ci95")] == [None] * 4


def _table(summaries: list[Summary]) -> str:
    out = io.StringIO()
    print_table(summaries, out)
    return out.getvalue()


def test_tables_say_the_same_in_every_form() -> None:
    reviews = [_review(1, [8, 6]), _review(2, [8, 9], "detail"), _review(3, None, error="x")]
    summary = one_summary(reviews, name="run")
    for text in (_table([summary]), markdown_table([summary])):
        for word in ("conv", "detail", "all", "93.8", "1/0/1", "first: a, second: b", "judge: j"):
            assert word in text
        assert "same in both orders" not in text
    lines = _csv(summary).splitlines()
    assert lines[0].startswith("category,n,mean_1,mean_2,relative,win,")
    assert lines[3].startswith("all,2,8.0,7.5,93.8,1,0,1,")
    assert len(lines) == 4


@pytest.fixture(scope="module")
def with_every_column() -> Summary:
    reviews = []
    for i in range(200):
        for order in ([1, 2], [2, 1]):
            metadata = {"order": order, "slot": f"{i} {order}", "cost_usd": 0.01, "correct": [0, 1]}
            scores = [5 + i % 4, 6.123]
            reviews.append(_review(i, scores, "a long category", metadata=metadata))
    return _compare(one_summary(reviews, name="new"), one_summary(reviews, name="old"))


@pytest.mark.parametrize("width", [60, 80, 100, 200])
def test_no_figure_is_cut_off_on_a_narrow_terminal(
    width: int, with_every_column: Summary, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    out = io.StringIO()
    out.isatty = lambda: True  # type: ignore[method-assign]
    print_table([with_every_column], out)
    text = out.getvalue()
    assert "…" not in text
    assert max(map(len, re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines())) <= width
    for word in (
        "6.123",
        "100/0/100",
        "same in both orders",
        "4.0000",
        "1.0000",
        "0.0 % / 100.0 %",
    ):
        assert word in text


def test_names_from_files_are_text_and_never_markup() -> None:
    summary = one_summary([_review(1, [8, 6], "[red]a|b[/red]")])
    assert "[red]a|b[/red]" in _table([summary])
    assert "\\|" in markdown_table([summary])


def _judged(question: int, pair: Any, judge: str, **more: Any) -> dict[str, Any]:
    return {**_review(question, pair, **more), "reviewer_id": judge}


def test_judges_who_saw_the_same_answers_are_compared_by_kappa() -> None:
    # winners: a says 2 2 1 1, b says 2 1 1 1; they agree on 3 of 4, chance 0.5*0.25 + 0.5*0.75
    wins = {"a": [2, 2, 1, 1], "b": [2, 1, 1, 1]}
    reviews = [
        _judged(i, [5, 6] if winner == 2 else [6, 5], judge)
        for judge, winners in wins.items()
        for i, winner in enumerate(winners)
    ]
    assert agreements(reviews) == {("a", "b"): [(1, 1), (1, -1), (-1, -1), (-1, -1)]}
    assert (
        "a and b agree on 75.0 % of 4 questions (Cohen's kappa 0.50)"
        in agreement_lines([one_summary(reviews)])[0]
    )
    summary = one_summary(reviews)
    assert [row["kappa"] for row in summary.rows] == [0.5, 0.5]
    assert "judges' kappa" in markdown_table([summary])
    assert "- a and b agree on 75.0 %" in markdown_table([summary])


def test_judges_in_files_of_their_own_are_compared_too() -> None:
    files = [[_judged(i, [5, 6 - i], judge) for i in range(3)] for judge in "ab"]
    summaries = [one_summary(reviews, name=name) for name, reviews in zip("xy", files, strict=True)]
    assert [row["kappa"] for row in summaries[0].rows] == [None, None]
    assert "a and b agree on 100.0 % of 3 questions" in markdown_table(summaries)


def test_judges_of_other_answers_are_not_compared() -> None:
    ours = [_judged(i, [5, 6], "a", answer2_id=f"x{i}") for i in range(3)]
    theirs = [_judged(i, [5, 6], "b", answer2_id=f"y{i}") for i in range(3)]
    assert agreements([*ours, *theirs]) == {}
    same = [_judged(i, [5, 6 - i], "b", answer2_id=f"x{i}") for i in range(3)]
    assert [len(found) for found in agreements([*ours, *same]).values()] == [3]


def test_failed_reviews_count_for_no_agreement() -> None:
    reviews = [_judged(1, [5, 6], "a"), _judged(1, None, "b", error="x")]
    assert agreements(reviews) == {}


def test_pairs_of_several_answer_files_have_figures_of_their_own() -> None:
    reviews = []
    for i in range(3):
        for number, model in ((2, "m"), (3, "n")):
            metadata = {"models": ["ref", model], "pair": [1, number]}
            reviews.append(_review(i, [8, 8 - number], metadata=metadata))
    first, second = summarize(reviews, name="run")
    assert (first.name, second.name) == ("run: m", "run: n")
    assert [(row["review"], row["n"], row["mean_2"]) for row in second.rows] == [
        ("run: n", 3, 5.0),
        ("run: n", 3, 5.0),
    ]
    assert [summary.name for summary in summarize([], name="run")] == ["run"]


def test_a_run_is_compared_with_its_baseline_on_the_questions_of_both() -> None:
    ours = [_review(i, [8, 7], metadata={"models": ["ref", "new"]}) for i in range(2, 14)]
    theirs = [_review(i, [8, 5], metadata={"models": ["ref", "old"]}) for i in range(12)]
    beside = _compare(one_summary(ours, name="new"), one_summary(theirs, name="old"))
    row = beside.rows[-1]
    assert (row["category"], row["baseline"], row["n_both"]) == ("all", "old", 10)
    # all ten questions differ in the same direction: 2 of 2^10 exchanges are as extreme
    assert row["p_value"] == round(2 / 1024, 4)
    assert row["difference_ci95"] == (25.0, 25.0)
    text = markdown_table([beside])
    assert "+25.0 points of relative score" in text
    assert "paired permutation test): distinguishable" in text
    assert row["difference"] == 25.0
    assert "difference" not in one_summary(ours).rows[0]
    assert "difference_ci95_low" in _csv(beside)


def test_the_p_values_of_several_categories_are_corrected_and_that_of_all_is_not() -> None:
    rng = np.random.default_rng(4)
    reviews, others = [], []
    for i in range(60):
        category = ("conv", "detail", "complex")[i % 3]
        gain = 0.4 * (2 - i % 3)
        reviews.append(_review(i, [8, 6 + gain + rng.normal()], category))
        others.append(_review(i, [8, 6 + rng.normal()], category))
    summary, baseline = one_summary(reviews, name="a"), one_summary(others, name="b")
    raw = {}
    for row in summary.rows:
        sides = [list(of.results[row["category"]].values()) for of in (summary, baseline)]
        found = paired_difference(*sides)
        assert found is not None
        raw[row["category"]] = found[2]
    beside = _compare(summary, baseline)
    ordered = sorted(["conv", "detail", "complex"], key=raw.__getitem__)
    expected = [min(1, raw[ordered[0]] * 3)]
    expected.append(min(1, max(expected[0], raw[ordered[1]] * 2)))
    expected.append(min(1, max(expected[1], raw[ordered[2]])))
    found = {row["category"]: row["p_value"] for row in beside.rows}
    assert [found[key] for key in ordered] == pytest.approx(expected)
    assert found["all"] == raw["all"]
    assert "p (Holm)" in markdown_table([beside])


def test_equal_runs_are_not_distinguishable_and_other_questions_no_baseline() -> None:
    ours = [_review(i, [8, 7]) for i in range(5)]
    same = _compare(one_summary(ours, name="a"), one_summary(ours, name="b"))
    assert "not distinguishable" in markdown_table([same])
    other = [_review(i, [8, 7]) for i in range(50, 55)]
    with pytest.raises(RecordError, match="shares no question with the baseline"):
        _compare(one_summary(ours, name="a"), one_summary(other, name="b"))


def test_the_judge_the_dates_and_the_bill_are_in_the_summary() -> None:
    def metadata(created: int) -> dict[str, Any]:
        tokens = {"prompt_tokens": 1000, "completion_tokens": 50, "cost_usd": 0.25}
        return {"created": created, "model": "j-0613", **tokens}

    reviews = [
        _review(1, [8, 6], metadata=metadata(1_700_000_000)),
        _review(2, [8, 6], metadata=metadata(1_700_200_000)),
        _review(3, None, error="x", metadata=metadata(1_700_200_000)),
    ]
    row = one_summary(reviews).rows[-1]
    assert row["judges"] == ["j (j-0613)"]
    assert row["dates"] == ("2023-11-14", "2023-11-17")
    assert (row["prompt_tokens"], row["completion_tokens"], row["cost_usd"]) == (3000, 150, 0.75)
    text = markdown_table([one_summary(reviews)])
    assert "judge: j (j-0613), 2023-11-14 to 2023-11-17" in text
    assert "3,000 tokens sent, 150 received, 0.7500 USD" in text


def test_figures_keep_no_words_unless_a_report_wants_them() -> None:
    review = _review(1, [8, 6], content="many words", text="more")
    (lean,) = summarize([review])
    (full,) = summarize([review], with_words=True)
    assert "content" not in lean.reviews[0]
    assert "text" not in lean.reviews[0]
    assert full.reviews[0]["content"] == "many words"
    assert lean.rows == full.rows


def test_two_runs_in_one_file_are_two_summaries() -> None:
    reviews = [_review(n, [8, 6], metadata={"models": ["a", "v1"]}) for n in range(3)]
    reviews += [_review(n, [8, 9], metadata={"models": ["a", "v2"]}) for n in range(3)]
    first, second = summarize(reviews, name="r")
    assert [row["n"] for row in (first.rows[-1], second.rows[-1])] == [3, 3]
    assert first.rows[-1]["mean_2"] == 6 and second.rows[-1]["mean_2"] == 9
    # Models that share the questions between them are one run.
    shared = [_review(n, [8, 6], metadata={"models": ["a", f"v{n % 2}"]}) for n in range(4)]
    (together,) = summarize(shared, name="r")
    assert together.rows[-1]["n"] == 4


def test_a_question_about_another_medium_replaces_the_one_before() -> None:
    old = {"modality": "image", "slot": "s1", "subject": "old", "basis": "b"}
    new = {"modality": "audio", "slot": "s2", "subject": "new", "basis": "b"}
    reviews = [_review(1, [2, 2], metadata=old), _review(1, [8, 8], metadata=new)]
    (summary,) = summarize(reviews)
    assert summary.rows[-1]["n"] == 1
    assert summary.rows[-1]["mean_1"] == 8


def test_judges_that_flip_against_each_other_are_not_consistent() -> None:
    def seen(judge: str, order: list[int], pair: list[int]) -> dict[str, Any]:
        return {**_review(1, pair, metadata={"order": order}), "reviewer_id": judge}

    reviews = [
        seen("x", [1, 2], [9, 1]),
        seen("x", [2, 1], [1, 9]),
        seen("y", [1, 2], [1, 9]),
        seen("y", [2, 1], [9, 1]),
    ]
    assert _rows(reviews)["all"]["consistency"] == 0.0


def test_equal_means_are_a_tie_whatever_their_last_bits() -> None:
    reviews = [
        {**_review(1, pair), "reviewer_id": f"j{n}"}
        for n, pair in enumerate(([8.1, 8.3], [8.2, 8.2], [8.3, 8.1]))
    ]
    row = _rows(reviews)["all"]
    assert (row["win"], row["tie"], row["lose"]) == (0, 1, 0)


def test_a_baseline_of_the_reference_is_matched_by_id() -> None:
    ours = one_summary([_review(n, [8, 7], metadata={"modality": "image"}) for n in range(3)])
    seeds = [{"question_id": n, "category": "conv", "tuple": [8, 6]} for n in range(3)]
    assert _compare(ours, one_summary(seeds)).rows[-1]["n_both"] == 3


@pytest.mark.parametrize(
    "odd",
    [
        {"tuple": [10**400, 5]},
        {"tuple": [1e308, 1e308]},
        {"metadata": {"cost_usd": 1e308, "lost_usd": 10**400, "order": {"x": 1}}},
        {"metadata": {"correct": "x", "exact": [[], {}], "f1": [-1, 2]}, "reviewer_id": ["j"]},
        {"metadata": {"models": 5}},
        {"metadata": {"slot": [1]}},
        {"metadata": {"created": 1e30}},
        {"metadata": {"prompt_tokens": "x"}},
        {"metadata": {"pair": ["a", 2]}},
    ],
)
def test_records_of_others_may_say_anything(odd: dict[str, Any]) -> None:
    from chatbind_cli.evaluation.report.page import render_report

    reviews = [_review(1, [8, 7]), {"question_id": 2, "category": "c", "tuple": [1, 2], **odd}]
    summaries = summarize(reviews, with_words=True)
    assert sum(summary.total["n"] + summary.total["failed"] for summary in summaries) == 2
    assert "</html>" in "".join(render_report(summaries)).lower()


def test_names_make_no_columns_and_no_pictures_in_markdown() -> None:
    table = markdown_table([one_summary([_review(1, [8, 7], "a\\|b ![p](http://h)")])])
    assert "![p]" not in table
    assert "\\\\\\|" in table


def test_an_unknown_first_answerer_leaves_the_second_in_its_place() -> None:
    summary = one_summary([_review(1, [8, 7], metadata={"models": [None, "b"]})])
    assert summary.models == ([], ["b"])
