"""Words, exact match and token F1."""

from __future__ import annotations

import pytest

from chatbind_cli.evaluation.texts import exact_match, token_f1, words


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The digit is SEVEN.", ["digit", "is", "7"]),
        ("  It's  a dog!! ", ["its", "dog"]),
        ("ﬁve", ["5"]),
        ("3.50 km, 1,000 m, .5 s, −5 °C", ["3.5", "km", "1000", "m", "0.5", "s", "-5", "c"]),
        ("twenty-one, thirty two, twenty. One", ["21", "32", "20", "1"]),
        ("3kg of the 3rd", ["3", "kg", "of", "3rd"]),
        ("A", ["a"]),
        ("The answer is A.", ["answer", "is", "a"]),
        ("A, C", ["a", "c"]),
        ("The", ["the"]),
        ("这是猫", ["这", "是", "猫"]),
        ("कि की ।", ["कि", "की"]),
        ("", []),
        ("...", []),
    ],
)
def test_words_drop_what_does_not_count(text: str, expected: list[str]) -> None:
    assert words(text) == expected


def test_exact_match_is_deaf_to_case_articles_punctuation_and_number_words() -> None:
    assert exact_match("the digit is seven", ["This is 8.", "Digit is 7."])
    assert exact_match("cafe\u0301", ["Café."])
    assert not exact_match("Digit is 8.", ["Digit is 7."])
    assert not exact_match("7 is digit", ["digit is 7"])
    assert not exact_match("-5", ["5"])


@pytest.mark.parametrize("answer", ["", " ", ".", "The", "a", "!"])
def test_nothing_said_is_no_match(answer: str) -> None:
    assert not exact_match(answer, ["B", "the cat", "?", ""])


def test_token_f1_is_the_hand_computed_number() -> None:
    # said: red big dog (3); wanted: big red cat house (4); shared 2 -> P 2/3, R 2/4, F1 4/7
    assert token_f1("a red big dog", ["big red cat house"]) == pytest.approx(4 / 7)
    assert token_f1("dog dog dog", ["dog"]) == pytest.approx(2 * (1 / 3) / (1 / 3 + 1))
    assert token_f1("", ["dog"]) == token_f1("", [""]) == 0
    assert token_f1("dog", ["cat", "dog"]) == 1
    assert token_f1("dog", []) == 0
