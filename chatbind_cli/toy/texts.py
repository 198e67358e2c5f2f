"""What is said in the toy world: captions of a digit, questions about it and their right answers.

Every question kind has several wordings and one right answer a digit, so that an exact comparison
judges an answer. Every answer names the digit: a guess is right once in ten times, whatever is
asked. The toy language model learns from talk in which the digit stands as a word, where a medium
will stand later.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from typing import Literal

from chatbind_cli.model.turns import HUMAN, Turn, answer
from chatbind_cli.toy.digits import NAMES

Category = Literal["conv", "detail", "complex"]

_COUNTED = (
    *NAMES,
    *("ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen"),
    "eighteen",
)
_CAPTION_SHARE = 0.25
_MOST_TURNS = 3

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
_SPOKEN = ("{digit}", "{digit}", "{Digit}", "{a} {digit}", "the digit {digit}", "{figure}")


@dataclass(frozen=True)
class Question:
    """One thing that can be asked about a digit.

    Attributes:
        kind: a short name, unique among the questions.
        category: LLaVA's category.
        wordings: ways to ask; the first is the one that the question files use.
        right: the right answer, with `_words` in braces.
    """

    kind: str
    category: Category
    wordings: tuple[str, ...]
    right: str

    def answer(self, digit: int) -> str:
        """The right answer for a digit from 0 to 9."""
        return self.right.format(**_words(digit))


_WHICH = "This is {a} {digit}."
_FIGURE = "It is written {figure}."
_PARITY = "{Digit} is {parity}."
_AFTER = "After {digit} comes {next}."

QUESTIONS = (
    Question(
        "which",
        "conv",
        ("Which digit is this?", "What digit do you perceive?", "Name the digit.", "What is it?"),
        _WHICH,
    ),
    Question(
        "figure",
        "conv",
        ("How is it written as a figure?", "Write it as a figure.", "Which key do I press for it?"),
        _FIGURE,
    ),
    Question("larger", "conv", ("Is it larger than four?", "Is this more than four?"), "{larger}"),
    Question(
        "describe",
        "detail",
        ("Describe it in detail.", "Tell me all that you know about this digit."),
        f"{_WHICH} {_FIGURE} {_PARITY} {{before}} {_AFTER}",
    ),
    Question(
        "after",
        "complex",
        ("What comes after it?", "Count one further.", "Which number follows?"),
        _AFTER,
    ),
    Question("before", "complex", ("What comes before it?", "Count one back."), "{before}"),
    Question(
        "parity",
        "complex",
        ("Is it even or odd?", "Even or odd?", "Can it be halved without a rest?"),
        _PARITY,
    ),
    Question(
        "twice",
        "complex",
        ("How much is twice as many?", "Double it.", "What is it plus itself?"),
        "Twice {digit} is {double}.",
    ),
)


def question(kind: str) -> Question:
    """The question of that kind."""
    return next(item for item in QUESTIONS if item.kind == kind)


def _words(digit: int) -> dict[str, str]:
    """What the texts say of a digit."""
    name = NAMES[digit]
    article = "an" if name.startswith("e") else "a"
    before = f"Before {name} comes {NAMES[digit - 1]}." if digit else "Nothing comes before zero."
    larger = f"Yes, {name} is" if digit > 4 else f"No, {name} is not"
    return {
        "a": article,
        "A": article.capitalize(),
        "digit": name,
        "Digit": name.capitalize(),
        "figure": str(digit),
        "parity": "odd" if digit % 2 else "even",
        "before": before,
        "next": _COUNTED[digit + 1],
        "double": _COUNTED[2 * digit],
        "larger": f"{larger} larger than four.",
    }


def captions(digit: int) -> list[str]:
    """All captions of a digit, the plainest first."""
    return [caption.format(**_words(digit)) for caption in _CAPTIONS]


def spoken_of(digit: int) -> list[str]:
    """How a text without media refers to a digit that it goes on to talk about."""
    return [words.format(**_words(digit)) for words in _SPOKEN]


def conversations(rng: Random) -> Iterator[tuple[Turn, ...]]:
    """Conversations about digits that are named in the first question, without end."""
    while True:
        digit = rng.randrange(len(NAMES))
        if rng.random() < _CAPTION_SHARE:
            said = [(rng.choice(CAPTION_REQUESTS), rng.choice(captions(digit)))]
        else:
            asked = rng.sample(QUESTIONS, rng.randint(1, _MOST_TURNS))
            said = [(rng.choice(q.wordings), q.answer(digit)) for q in asked]
        first = [rng.choice(spoken_of(digit)), said[0][0]]
        rng.shuffle(first)
        said[0] = ("\n".join(first), said[0][1])
        yield tuple(
            turn for question, reply in said for turn in (Turn(HUMAN, (question,)), answer(reply))
        )


def passages(rng: Random) -> Iterator[str]:
    """Plain prose about digits, without end."""
    while True:
        digit = rng.randrange(len(NAMES))
        facts = [question.answer(digit) for question in rng.sample(QUESTIONS, 2)]
        yield " ".join([rng.choice(captions(digit)), *facts])
