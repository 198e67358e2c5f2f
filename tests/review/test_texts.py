"""Exact match and token F1."""

from __future__ import annotations

import pytest

from chatbind_cli.review.texts import contains_words, exact_match, token_f1, words


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The digit is SEVEN.", ["digit", "is", "7"]),
        ("  It's  a dog!! ", ["it's", "dog"]),
        ("ﬁve", ["5"]),
        ("3.5 km, 1,000 m", ["3.5", "km", "1,000", "m"]),
        ("", []),
        ("...", []),
    ],
)
def test_words_drop_what_does_not_count(text: str, expected: list[str]) -> None:
    assert words(text) == expected


def test_exact_match_is_deaf_to_case_articles_punctuation_and_number_words() -> None:
    assert exact_match("the digit is seven", ["This is 8.", "Digit is 7."])
    assert not exact_match("Digit is 8.", ["Digit is 7."])
    assert not exact_match("7 is digit", ["digit is 7"])


def test_token_f1_is_the_hand_computed_number() -> None:
    # said: red big dog (3); wanted: big red cat house (4); shared 2 -> P 2/3, R 2/4, F1 4/7
    assert token_f1("a red big dog", ["big red cat house"]) == pytest.approx(4 / 7)
    assert token_f1("dog dog dog", ["dog"]) == pytest.approx(2 * (1 / 3) / (1 / 3 + 1))
    assert token_f1("", ["dog"]) == 0
    assert token_f1("", [""]) == 1
    assert token_f1("dog", ["cat", "dog"]) == 1
    assert token_f1("dog", []) == 0


def test_a_label_counts_as_a_word_not_as_letters() -> None:
    assert contains_words("It is the number seven.", ["7"])
    assert contains_words("a New York street", ["new york"])
    assert not contains_words("17 of them", ["7"])
    assert not contains_words("anything", [""])
