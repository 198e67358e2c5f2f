"""What is said in the toy world: captions of a digit, questions about it and their right answers.

Every question kind has several wordings and one right answer a digit, so that an exact comparison
judges an answer. Every answer names the digit: a guess is right once in ten times, whatever is
asked. Knows nothing of media, tokens or file formats.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from chatbind_cli.toy.digits import NAMES

Category = Literal["conv", "detail", "complex"]

_COUNTED = (
    *NAMES,
    *("ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen"),
    "eighteen",
)

CAPTION_REQUESTS = (
    "Describe this briefly.",
    "Give a short caption.",
    "Write a caption for this.",
    "Summarize what you perceive.",
    "What is shown here?",
    "Say in a few words what this is.",
)

_CAPTIONS = (
    "{A} {digit}.",
    "This is {a} {digit}.",
    "The digit {digit}.",
    "Here is {a} {digit}.",
    "{A} {digit}, the figure {figure}.",
)


@dataclass(frozen=True)
class Question:
    """One thing that can be asked about a digit.

    Attributes:
        kind: a short name, unique among the questions.
        category: LLaVA's category.
        wordings: ways to ask; the first is the one that the question files use.
        answer: the right answer for a digit from 0 to 9.
    """

    kind: str
    category: Category
    wordings: tuple[str, ...]
    answer: Callable[[int], str]


def captions(digit: int) -> list[str]:
    """All captions of a digit, the plainest first."""
    article = _article(digit)
    words = {
        "A": article.capitalize(),
        "a": article,
        "digit": NAMES[digit],
        "figure": digit,
    }
    return [caption.format(**words) for caption in _CAPTIONS]


def spoken_of(digit: int) -> list[str]:
    """How a text without media refers to a digit that it goes on to talk about."""
    name = NAMES[digit]
    return [
        name,
        name,
        name.capitalize(),
        f"{_article(digit)} {name}",
        f"the digit {name}",
        str(digit),
    ]


def _article(digit: int) -> str:
    return "an" if NAMES[digit].startswith("e") else "a"


def _which(digit: int) -> str:
    return f"This is {_article(digit)} {NAMES[digit]}."


def _figure(digit: int) -> str:
    return f"It is written {digit}."


def _parity(digit: int) -> str:
    return f"{NAMES[digit].capitalize()} is {'odd' if digit % 2 else 'even'}."


def _after(digit: int) -> str:
    return f"After {NAMES[digit]} comes {_COUNTED[digit + 1]}."


def _before(digit: int) -> str:
    return (
        f"Before {NAMES[digit]} comes {NAMES[digit - 1]}."
        if digit
        else "Nothing comes before zero."
    )


def _twice(digit: int) -> str:
    return f"Twice {NAMES[digit]} is {_COUNTED[2 * digit]}."


def _larger(digit: int) -> str:
    name = NAMES[digit]
    return (
        f"Yes, {name} is larger than four." if digit > 4 else f"No, {name} is not larger than four."
    )


def _detail(digit: int) -> str:
    return f"{_which(digit)} {_figure(digit)} {_parity(digit)} {_before(digit)} {_after(digit)}"


QUESTIONS = (
    Question(
        "which",
        "conv",
        ("Which digit is this?", "What digit do you perceive?", "Name the digit.", "What is it?"),
        _which,
    ),
    Question(
        "figure",
        "conv",
        ("How is it written as a figure?", "Write it as a figure.", "Which key do I press for it?"),
        _figure,
    ),
    Question(
        "larger",
        "conv",
        ("Is it larger than four?", "Is this more than four?"),
        _larger,
    ),
    Question(
        "describe",
        "detail",
        ("Describe it in detail.", "Tell me all that you know about this digit."),
        _detail,
    ),
    Question(
        "after",
        "complex",
        ("What comes after it?", "Count one further.", "Which number follows?"),
        _after,
    ),
    Question(
        "before",
        "complex",
        ("What comes before it?", "Count one back."),
        _before,
    ),
    Question(
        "parity",
        "complex",
        ("Is it even or odd?", "Even or odd?", "Can it be halved without a rest?"),
        _parity,
    ),
    Question(
        "twice",
        "complex",
        ("How much is twice as many?", "Double it.", "What is it plus itself?"),
        _twice,
    ),
)


def question(kind: str) -> Question:
    """The question of that kind."""
    return next(item for item in QUESTIONS if item.kind == kind)
