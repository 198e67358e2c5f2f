"""How alike two short answers are: exact match and token F1 after normalisation."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
"""Written without blanks: a character counts as a word."""

_UNITS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    *("eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen"),
    "nineteen",
)
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_NUMBERS = {word: value for value, word in enumerate(_UNITS)}
_NUMBERS |= {word: 10 * value for value, word in enumerate(_TENS, start=2)} | {"none": 0}

# Vowels and tones that stand above or below a letter belong to the word.
_MARKS = "".join(c for c in map(chr, range(0x300, 0x1100)) if unicodedata.category(c)[0] == "M")
_ARTICLE = re.compile(r"(?:an?|the)\s+(?=\w)")
_LETTERS = rf"(?:(?![{CJK}])[^\W_])(?:(?![{CJK}])[^\W_]|[{_MARKS}])*"
_WORD = re.compile(
    r"\d+(?:st|nd|rd|th)\b"
    r"|(?:(?<![\w.])-)?\d+(?:[.,]\d+)*|(?<![\w.])-?\.\d+"
    rf"|[{CJK}]|{_LETTERS}(?:'{_LETTERS})*"
)
_THOUSANDS = re.compile(r"-?\d{1,3}(?:,\d{3})+(?:\.\d+)?")
_DECIMAL = re.compile(r"(-?)(\d*)\.(\d+)")
_DECORATION = str.maketrans({"’": "'", "−": "-"} | dict.fromkeys("*_`#", ""))


class Word(NamedTuple):
    """A normalised word, and where it stands in the plain text."""

    text: str
    start: int
    end: int


def plain(text: str) -> str:
    """Unicode's compatibility form in lower case, without Markdown's marks."""
    return unicodedata.normalize("NFKC", text).casefold().translate(_DECORATION)


def words_of(text: str) -> list[Word]:
    """The words of a plain text that count: no punctuation, no articles, numbers as digits.

    An article is one only before another word: the answer "A" keeps its only word.

    Source: the normalisation of the VQA evaluation (Antol et al. 2015), made for short answers.
    """
    found: list[Word] = []
    last = ""
    for match in _WORD.finditer(text):
        word = match[0]
        if _ARTICLE.match(text, match.start()):
            continue
        start, normal = match.start(), _normal(word)
        if (
            last in _TENS
            and 0 < _NUMBERS.get(word, 0) < 10
            and text[found[-1].end : start] in (" ", "-")
        ):  # twenty-one
            normal, start = str(int(found[-1].text) + _NUMBERS[word]), found.pop().start
        found.append(Word(normal, start, match.end()))
        last = word
    return found


def words(text: str) -> list[str]:
    """The words that count in any text, see `words_of`."""
    return [word.text for word in words_of(plain(text))]


def exact_match(answer: str, references: Iterable[str]) -> bool:
    """Whether the answer says the same words in the same order as one of the references."""
    said = words(answer)
    return any(
        said == words(reference) if said else "" != answer.strip() == reference.strip()
        for reference in references
    )


def token_f1(answer: str, references: Iterable[str]) -> float:
    """The best F1 of the answer's words against one reference's words, in [0, 1].

    Source: the SQuAD evaluation (Rajpurkar et al. 2016), section 6.1.
    """
    said = Counter(words(answer))
    return max((_f1(said, Counter(words(reference))) for reference in references), default=0.0)


def _normal(word: str) -> str:
    if word in _NUMBERS:
        return str(_NUMBERS[word])
    if _THOUSANDS.fullmatch(word):
        word = word.replace(",", "")
    decimal = _DECIMAL.fullmatch(word)
    if decimal is not None:
        sign, whole, fraction = decimal.groups()
        word = f"{sign}{whole or 0}.{fraction}".rstrip("0").removesuffix(".")
    return word.replace("'", "")


def _f1(said: Counter[str], wanted: Counter[str]) -> float:
    shared = (said & wanted).total()
    return 2 * shared / (said.total() + wanted.total()) if shared else 0.0
