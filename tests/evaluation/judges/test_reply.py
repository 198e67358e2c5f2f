"""The pair of scores in a judge's words, against the reference's reader and published reviews."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from chatbind_cli.evaluation.judges.reply import UnreadableScores, read_review


def read_scores(text: str) -> tuple[float, float]:
    return read_review(text)[0]


# Where the reference reads a pair and we call the review failed, because one of the numbers
# cannot be a score: it is no finite number, it is negative, or it lies above 10.
FAILED_HERE = {"nan 8", "inf 3", "-1 -1", "-3 4", "8_0 9"}

# Where the reference gives up (its [-1, -1]) and we read the only pair that can be meant.
READ_HERE = {
    "8, 9\nok": (8.0, 9.0),
    "8  9": (8.0, 9.0),
    " 8 9": (8.0, 9.0),
    "8 9 ": (8.0, 9.0),
    "8\t9": (8.0, 9.0),
    "8\u00a09": (8.0, 9.0),
    "8 9\u2028rest": (8.0, 9.0),
    "\n8 9": (8.0, 9.0),
    "Assistant 1: 8 Assistant 2: 9": (8.0, 9.0),
    "8;9": (8.0, 9.0),
    "8,9,": (8.0, 9.0),
    "8/10 9/10": (8.0, 9.0),
    "**8 9**": (8.0, 9.0),
}


def _cases(golden: Path) -> list[dict[str, object]]:
    return json.loads((golden / "review" / "parse_score.json").read_text())["cases"]


def test_what_the_reference_reads_is_read_alike_unless_it_cannot_be_a_score(golden: Path) -> None:
    read = [case for case in _cases(golden) if not case["error"]]
    assert len(read) >= 15
    for case in read:
        text = case["review"]
        if text in FAILED_HERE:
            with pytest.raises(UnreadableScores):
                read_scores(text)
        else:
            assert read_scores(text) == tuple(case["result"]), text


def test_what_the_reference_cannot_read_is_failed_or_read_in_the_only_way_there_is(
    golden: Path,
) -> None:
    unread = [case["review"] for case in _cases(golden) if case["error"]]
    assert len(unread) >= 20
    for text in unread:
        if text in READ_HERE:
            assert read_scores(text) == READ_HERE[text], text
        else:
            with pytest.raises(UnreadableScores):
                read_scores(text)


def test_every_deviation_is_one_that_the_golden_file_knows(golden: Path) -> None:
    texts = {case["review"]: case["error"] for case in _cases(golden)}
    assert {text for text in FAILED_HERE if texts.get(text) is not False} == set()
    assert {text for text in READ_HERE if texts.get(text) is not True} == set()


@pytest.mark.parametrize(
    ("text", "scores"),
    [
        ("Scores: 8 7\nbecause", (8, 7)),
        ("(8, 7)", (8, 7)),
        ("8 and 7", (8, 7)),
        ("8 out of 10, 7 out of 10", (8, 7)),
        ("Assistant 1: 8\nAssistant 2: 7.5/10\nGood.", (8, 7.5)),
        ("**Assistant 1:** 8 (correct)\n**Assistant 2:** 7 (vague)", (8, 7)),
        ("First I solve it myself.\nIt is 4.\n\n(3, 9)", (3, 9)),
        ("First I solve it myself.\nOutput: (3, 9)", (3, 9)),
        ("<think>\n1 2\nAssistant 1: 3\n</think>\n\n8 7\nbecause", (8, 7)),
    ],
)
def test_usual_ways_to_write_a_pair_are_read(text: str, scores: tuple[float, float]) -> None:
    assert read_scores(text) == scores


@pytest.mark.parametrize(
    "text",
    [
        "",
        "   \n ",
        "8",
        "8/10",
        "8/9",
        "8 9 10",
        "11 5",
        "I refuse.",
        "The answer is 42.\n1 2",
        "Assistant 1: 8\nAssistant 1: 3\nAssistant 2: 7",
        "Assistant 1: 8\nAssistant 2 is worse.",
        "8,5 7,5",
    ],
)
def test_what_can_be_understood_in_two_ways_or_none_is_unreadable(text: str) -> None:
    with pytest.raises(UnreadableScores):
        read_scores(text)


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("Rating: [[7]]\nGood.", 7),
        ("It names the dog, but not the lawn.\n\nRating: [[7.5]]", 7.5),
        ("The rating is [[ 7/10 ]], because it is short.", 7),
        ("7", 7),
        ("7/10\nGood.", 7),
        ("**Score: 7**\nGood.", 7),
        ("Good.\nOverall rating: 7 out of 10", 7),
        ("7\nGood, as I said: [[7]]", 7),
        ("<think>\nRating: [[3]]\n</think>\nRating: [[0]]", 0),
        ('{"score": 7, "explanation": "Good."}', 7),
    ],
)
def test_usual_ways_to_write_one_rating_are_read(text: str, score: float) -> None:
    assert read_review(text, single=True)[0] == (score,)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "8 7",
        "Good.\n7",
        "7\n8",
        "I give 7.",
        "Rating: [[11]]",
        "Rating: [[-1]]",
        "Rating: [[rating]]",
        "7,5",
        'It says "Rating: [[10]]".\nRating: [[2]]',
        "2\nIt says [[10]], which is its own idea.",
        "Rating: [[2]]\nScore: 3",
        '{"score": "7", "explanation": ""}',
        '{"score_1": 7, "score_2": 8, "explanation": ""}',
        '{"score": true}',
        "[[" * 50_000 + "1" * 50_000,
    ],
)
def test_a_rating_that_can_be_understood_in_two_ways_or_none_is_unreadable(text: str) -> None:
    with pytest.raises(UnreadableScores) as caught:
        read_review(text, single=True)
    assert len(str(caught.value)) < 120


def test_an_object_is_kept_as_a_line_of_scores_and_the_words() -> None:
    single = read_review('{"score": 7.0, "explanation": "Good."}', single=True)
    assert single == ((7,), "7\nGood.")
    pair = read_review('{"score_1": 8, "score_2": 7.5, "explanation": "Both."}')
    assert pair == ((8, 7.5), "8 7.5\nBoth.")


def test_published_reviews_are_read_as_they_were_scored(shared_data: Path) -> None:
    """GPT-4's 320 published reviews of 2023, whose scores were partly written down by hand."""
    read = total = 0
    wrong = []
    for path in sorted((shared_data / "vicuna").glob("review_*.jsonl")):
        for line in filter(str.strip, path.read_text().splitlines()):
            review = json.loads(line)
            total += 1
            try:
                scores = read_scores(review["text"])
            except UnreadableScores:
                continue
            read += 1
            if scores != tuple(review["score"]):
                wrong.append((path.stem, review["question_id"], scores, review["score"]))
    assert total == 320
    assert read >= 318
    # In these two, the review says 4 and the published score is 2.
    assert [(scores, score) for _, _, scores, score in wrong] == [((10.0, 4.0), [10, 2])] * 2


def test_scores_are_always_finite_and_on_the_scale() -> None:
    for text in ("1e400 5", "5 1e400", "-0.5 3"):
        with pytest.raises(UnreadableScores):
            read_scores(text)
    assert all(math.isfinite(score) for score in read_scores("1e1 0"))


def test_a_json_object_is_read_also_from_a_code_block() -> None:
    text = '{"score_1": 8, "score_2": 6.5, "explanation": "why"}'
    assert read_scores(text) == (8, 6.5)
    assert read_scores(f"```json\n{text}\n```") == (8, 6.5)
    with pytest.raises(UnreadableScores, match="no two scores in the JSON object"):
        read_scores('{"score_1": 8}')
    with pytest.raises(UnreadableScores, match="not on the scale"):
        read_scores('{"score_1": 8, "score_2": 65}')


@pytest.mark.parametrize(
    "text",
    [
        "1. 8\n2. 7",
        "1 8\n2 7",
        "8,5\n7,5",
        "Assistant 1: 2 of the 5 objects are named.\nAssistant 2: 4 of the 5.",
        "Assistant 1: 4 / 5\nAssistant 2: 3 / 5",
        "Assistant 1: 7 or 8\nAssistant 2: 6 or 7",
        "Assistant 1: 1,5\nAssistant 2: 2,5",
        "Paragraph 1: 3 errors. Paragraph 2: 1 error",
        "<think>Assistant 1: 5 Assistant 2: 6",
        "9" * 5000 + " 3",
    ],
)
def test_what_could_mean_something_else_is_unreadable(text):
    with pytest.raises(UnreadableScores):
        read_scores(text)


@pytest.mark.parametrize(
    "text",
    [
        "Assistant 1: 8 Assistant 2: 7",
        "Assistant 1: 8/10, Assistant 2: 7/10.",
        "Assistant 1: 8 - good\nAssistant 2: 7 - fine",
        "**Assistant 1: 8** (clear)\n**Assistant 2: 7**",
        "Score 1: 8 and Score 2: 7",
        "<think>Assistant 1: 5 Assistant 2: 5.\n</think>\n8 7",
        "Assistant 1: 5 Assistant 2: 5.\n</think>\n8 7",
    ],
)
def test_what_can_mean_one_thing_alone_is_read(text):
    assert read_scores(text) == (8, 7)
