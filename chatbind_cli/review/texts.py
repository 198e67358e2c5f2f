"""How alike two short answers are: exact match and token F1 after normalisation.

Knows nothing of judges or records.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable

_ARTICLES = frozenset({"a", "an", "the"})
_DIGITS = {
    word: str(value)
    for value, word in enumerate(
        ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    )
}
# A number's own point or comma stays: 3.5 is one word. So do "isn't" and "well-known".
_WORD = re.compile(r"\d+(?:[.,]\d+)*|[^\W_]+(?:['-][^\W_]+)*", re.UNICODE)


def words(text: str) -> list[str]:
    """The words that count: lower case, no punctuation, no articles, number words as digits.

    Source: the normalisation of the VQA evaluation (Antol et al. 2015), which is made for short
    answers, on Unicode's compatibility form.
    """
    plain = unicodedata.normalize("NFKC", text).casefold().replace("’", "'")
    return [_DIGITS.get(word, word) for word in _WORD.findall(plain) if word not in _ARTICLES]


def exact_match(answer: str, references: Iterable[str]) -> bool:
    """Whether the answer says the same words in the same order as one of the references."""
    return any(words(answer) == words(reference) for reference in references)


def token_f1(answer: str, references: Iterable[str]) -> float:
    """The best F1 of the answer's words against one reference's words, in [0, 1].

    Source: the SQuAD evaluation (Rajpurkar et al. 2016), section 6.1.
    """
    return max((_f1(words(answer), words(reference)) for reference in references), default=0.0)


def contains_words(answer: str, labels: Iterable[str]) -> bool:
    """Whether the words of one of the labels stand in the answer, in a row."""
    said = words(answer)
    for label in labels:
        wanted = words(label)
        starts = range(len(said) - len(wanted) + 1)
        if wanted and any(said[i : i + len(wanted)] == wanted for i in starts):
            return True
    return False


def _f1(said: list[str], wanted: list[str]) -> float:
    if not said or not wanted:
        return float(said == wanted)
    shared = sum((Counter(said) & Counter(wanted)).values())
    return 2 * shared / (len(said) + len(wanted))
