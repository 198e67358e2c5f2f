"""The text that the toy language model learns from: talk about digits, before it sees any.

The digit stands in the question as a word, where a medium will stand later. Knows nothing of
tokens and of how conversations are marked up for a model.
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from chatbind_cli.model.turns import HUMAN, Turn, answer
from chatbind_cli.toy.digits import NAMES
from chatbind_cli.toy.texts import CAPTION_REQUESTS, QUESTIONS, captions, spoken_of

_CAPTION_SHARE = 0.25
_MOST_TURNS = 3


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
