"""Right or wrong, by the kind of the reference: what the field's evaluators recognise."""

from __future__ import annotations

import time

import pytest

from chatbind_cli.evaluation.accuracy import chose_right, is_correct, options_of

ON_LINES = {"text": "What is it?\nA. cat\nB. dog\nAnswer with the option's letter."}
IN_A_ROW = {"text": "Context: N/A\nOptions: (A) West Virginia (B) Louisiana (C) cat and dog"}
LISTED = {"text": "What is it?", "options": ["cat", "dog"]}

RIGHT = [
    *[(said, "A", {}) for said in ("A", "a", "(A)", "A.", "**A**", "Ａ", "The answer is A.")],
    *[(said, "B", {}) for said in ("Answer: B", "answer: b", "I think it is B", "Option B is it")],
    *[(said, "B", {}) for said in ("not A but B", "B, not A", "The best choice is (B).")],
    ("The answer is A because B is wrong.", "A", {}),
    ("A. It shows no B.", "A", ON_LINES),
    *[(said, "A", {}) for said in ("答案是A", "选A。", "\\boxed{A}", "<think>B?</think>A")],
    *[("cat", "A", question) for question in (ON_LINES, LISTED)],
    *[(said, "A", ON_LINES) for said in ("A cat", "A. cat", "a) cat", "It's a cat.", "(A) cat")],
    *[("A", reference, ON_LINES) for reference in ("cat", "A. cat", "(A)", "a")],
    ("It is in Louisiana.", "B", IN_A_ROW),
    ("cat and dog", "C", IN_A_ROW),
    *[(said, "yes", {}) for said in ("Yes.", "yes, there is no doubt", "The answer is yes.")],
    *[(said, "no", {}) for said in ("No", "No, it is not.", "There is no dog.", "false")],
    *[(said, "3", {}) for said in ("3", "three", "3.0", "３", "3 apples", "2 + 1 = 3", "有3个")],
    ("There are three apples. 2 are red.", "3", {}),
    *[("1,000", "1000", {}), ("twenty-one birds", "21", {}), ("none", "0", {}), ("3", "three", {})],
    *[(said, "Paris", {}) for said in ("Paris", "PARIS!", "It is Paris, not London.", "the Paris")],
    ("It is not Paris but London", "London", {}),
    ("A cat, rather than a dog", "cat", {}),
    ("The sign says no parking.", "no parking", {}),
    ("He lives in St. Louis.", "St. Louis", {}),
    ("A man in the park, holding a frisbee and wearing a hat", "frisbee", {}),
    *[("这是一只猫。", "猫", {}), ("これは猫です。", "猫", {})],
    ("this is a 2", "This is a two.", {}),
]
WRONG = [
    *[(said, "A", {}) for said in ("", ".", "The", "B", "A or B", "A and B", "A B", "It is not A")],
    *[(said, "A", ON_LINES) for said in ("A dog", "B. dog", "cat or dog", "neither", "C", "")],
    *[("B", "cat", ON_LINES), ("a cat", "A", {}), ("C", "A, C", {})],
    *[(said, "yes", {}) for said in ("No", "yes and no", "Yes or no", "yes/no", "", "It is a dog")],
    *[("It is not true.", "true", {}), ("No, yes", "no", {}), ("not sure", "no", {})],
    *[(said, "3", {}) for said in ("4", "13", "-3", "3.5", "3rd", "3 or 4", "3 and 4", "not 3")],
    *[
        (said, "Paris", {})
        for said in ("It is not Paris but London", "Parisian", "Paris or London")
    ],
    *[(said, "Paris", {}) for said in ("Paris and London", "I don't think it is Paris", "")],
    *[(said, "Paris", {}) for said in ("Paris is not the capital", "Paris or London", "Rome?")],
    *[("这不是猫", "猫", {}), ("これは猫ではない。", "猫", {})],
    *[(said, "This is a two.", {}) for said in ("two", "This is a three.", "This is a two or")],
    *[("", "", {}), (".", "!", {}), ("The", "A", {})],
]


@pytest.mark.parametrize(("answer", "reference", "question"), RIGHT)
def test_right_answers(answer: str, reference: str, question: dict[str, object]) -> None:
    assert is_correct(answer, [reference], question)


@pytest.mark.parametrize(("answer", "reference", "question"), WRONG)
def test_wrong_answers(answer: str, reference: str, question: dict[str, object]) -> None:
    assert not is_correct(answer, [reference], question)


@pytest.mark.parametrize(
    ("chosen", "choices", "reference", "question", "right"),
    [
        ("dog", ["dog", "dog house"], "dog", {}, True),
        # words in words are not the same choice, nor is what is denied another
        ("dog house", ["dog", "dog house"], "dog", {}, False),
        ("not a dog", ["dog", "not a dog"], "B", {}, True),
        ("no", ["yes", "no"], "Yes", {}, False),
        ("dog", ["cat", "dog"], "B", LISTED, True),
        ("cat", ["cat", "dog"], "(B)", LISTED, False),
        ("B", ["A", "B"], "dog", ON_LINES, True),
        ("A", ["A", "B"], "dog", ON_LINES, False),
        ("B", ["A", "B"], "B", ON_LINES, True),
        ("A", ["A", "B"], "B. dog", ON_LINES, False),
        ("A", ["B", "A"], "A", {}, True),
        ("dog", ["cat", "dog"], "bird", LISTED, None),
        ("dog", ["cat", "dog"], "1", LISTED, None),
        ("dog", ["cat", "dog"], "C", LISTED, None),
    ],
)
def test_a_choice_is_the_right_one_or_not(
    chosen: str, choices: list[str], reference: str, question: dict[str, object], right: bool | None
) -> None:
    assert chose_right(chosen, choices, [reference], question) is right


def test_of_several_references_one_is_enough() -> None:
    ten = ["net"] * 7 + ["netting", "mesh", "racket"]
    assert is_correct("a mesh", ten, {})
    assert not is_correct("a ball", ten, {})
    assert not is_correct("net", [], {})


def test_options_are_read_from_the_record_or_the_words_of_the_question() -> None:
    assert options_of(ON_LINES) == options_of(LISTED) == {"A": "cat", "B": "dog"}
    assert options_of(IN_A_ROW) == {"A": "West Virginia", "B": "Louisiana", "C": "cat and dog"}
    assert options_of({"options": {"a": "cat"}}) == {"A": "cat"}
    assert options_of({"text": "Is plan A. good?"}) == {}
    assert options_of({}) == {}


@pytest.mark.parametrize("piece", ["paris ", "A. ", "answer is ", "((", "no ", "1,", "-", "="])
def test_a_long_answer_takes_no_longer_than_its_length(piece: str) -> None:
    start = time.monotonic()
    for reference in ("Paris", "A", "yes", "3"):
        is_correct(piece * 5_000, [reference], ON_LINES)
    assert time.monotonic() - start < 10  # what is quadratic takes minutes
