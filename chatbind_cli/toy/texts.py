"""What is said in the toy world, and its files: captions, conversations, questions, answers.

The files are in LLaVA's formats, with media named relative to the media folder.

Every question kind has several wordings and one right answer a digit, so that an exact comparison
judges an answer. Every answer names the digit: a guess is right once in ten times, whatever is
asked. The toy language model learns from talk in which the digit stands as a word, where a medium
will stand later.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Literal

from chatbind_cli.files import replace_file
from chatbind_cli.jsonl import Record, dumps
from chatbind_cli.model.turns import HUMAN, Turn, answer
from chatbind_cli.toy.digits import NAMES, Item
from chatbind_cli.toy.media import SUFFIXES, relative_path

Category = Literal["conv", "detail", "complex"]

_COUNTED = (
    *NAMES,
    *("ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen"),
    "eighteen",
)
_CAPTION_SHARE = 0.25
_MOST_TURNS = 3

# How often each kind is asked: of every n-th held-out item.
_ASKED_EVERY = {"which": 1, "describe": 5, "after": 10, "parity": 10, "twice": 10}

_CATEGORY_WEIGHTS = {"conv": 3, "detail": 1, "complex": 2}

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


def write_records(
    train: Sequence[Item], heldout: Sequence[Item], folder: Path, *, seed: int
) -> None:
    """Writes `train/` and `eval/` below a world's folder; `eval/contexts.jsonl` comes last."""
    rng = Random(seed)  # noqa: S311 - wordings, not secrets
    _write_json(folder / "train/captions.json", [_caption(item, rng) for item in train])
    _write_json(folder / "train/instructions.json", [_instruction(item, rng) for item in train])
    for modality in SUFFIXES:
        asked = list(_questions(heldout, modality))
        _write_lines(folder / f"eval/questions-{modality}.jsonl", asked)
        answers = [_reference_answer(record) for record in asked]
        _write_lines(folder / f"eval/answers-reference-{modality}.jsonl", answers)
    _write_lines(folder / "eval/pairs.jsonl", list(_pairs(heldout)))
    _write_lines(folder / "eval/contexts.jsonl", [_context(item) for item in heldout])


def record_names() -> Iterator[str]:
    """The files that `write_records` writes, below the world's folder."""
    yield from ("train/captions.json", "train/instructions.json", "eval/contexts.jsonl")
    yield "eval/pairs.jsonl"
    for modality in SUFFIXES:
        yield f"eval/questions-{modality}.jsonl"
        yield f"eval/answers-reference-{modality}.jsonl"


def _caption(item: Item, rng: Random) -> Record:
    said = [(rng.choice(CAPTION_REQUESTS), rng.choice(captions(item.digit)))]
    return _conversation(item, said, rng)


def _instruction(item: Item, rng: Random) -> Record:
    """A conversation of one category; in `conv` and `complex` it may have several turns."""
    category = rng.choices(list(_CATEGORY_WEIGHTS), list(_CATEGORY_WEIGHTS.values()))[0]
    kinds = [asked for asked in QUESTIONS if asked.category == category]
    chosen = rng.sample(kinds, rng.randint(1, min(len(kinds), _MOST_TURNS)))
    said = [(rng.choice(asked.wordings), asked.answer(item.digit)) for asked in chosen]
    return {**_conversation(item, said, rng), "category": category}


def _conversation(item: Item, said: Sequence[tuple[str, str]], rng: Random) -> Record:
    """An image, in the first question before or after its words, and what is said about it."""
    first = ["<image>", said[0][0]]
    rng.shuffle(first)
    asked = ["\n".join(first), *(text for text, _ in said[1:])]
    turns: list[Record] = []
    for text, (_, reply) in zip(asked, said, strict=True):
        turns.append({"from": "human", "value": text})
        turns.append({"from": "gpt", "value": reply})
    return {"id": item.stem, "image": relative_path(item, "image"), "conversations": turns}


def _questions(items: Sequence[Item], modality: str) -> Iterator[Record]:
    for kind, every in _ASKED_EVERY.items():
        asked: Question = question(kind)
        for item in items[::every]:
            yield {
                "question_id": f"{modality}-{item.number:04d}-{kind}",
                modality: relative_path(item, modality),
                "text": asked.wordings[0],
                "category": asked.category,
                "answer": asked.answer(item.digit),
            }


def _reference_answer(asked: Record) -> Record:
    digest = hashlib.sha256(f"reference {asked['question_id']}".encode()).hexdigest()
    return {
        "question_id": asked["question_id"],
        "prompt": asked["text"],
        "text": asked["answer"],
        "answer_id": digest[:22],
        "model_id": "reference",
        "metadata": {},
        "category": asked["category"],
    }


def _context(item: Item) -> Record:
    """One for all modalities: it is found under the name of each of the item's files."""
    return {
        "id": item.stem,
        **{modality: relative_path(item, modality) for modality in SUFFIXES},
        "captions": captions(item.digit),
        "instances": [{"category": NAMES[item.digit], "bbox": [0.1, 0.1, 0.9, 0.9]}],
    }


def _pairs(items: Sequence[Item]) -> Iterator[Record]:
    """Each picture beside each other medium of the same digit."""
    for modality in SUFFIXES:
        for item in items if modality != "image" else ():
            image = {"image": relative_path(item, "image")}
            yield {**image, modality: relative_path(item, modality), "class": NAMES[item.digit]}


def _write_json(path: Path, records: Sequence[Record]) -> None:
    with replace_file(path) as temporary:
        temporary.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")


def _write_lines(path: Path, records: Sequence[Record]) -> None:
    with replace_file(path) as temporary:
        temporary.write_text("".join(dumps(record) + "\n" for record in records), encoding="utf-8")
