"""The toy world's text files: captions, instructions, questions, reference answers, contexts.

In LLaVA's formats, with media named relative to the media folder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random

from chatbind_cli.files import replace_file
from chatbind_cli.jsonl import Record, dumps
from chatbind_cli.toy.digits import NAMES, Item
from chatbind_cli.toy.media import SUFFIXES, relative_path
from chatbind_cli.toy.texts import CAPTION_REQUESTS, QUESTIONS, Question, captions, question

# How often each kind is asked: of every n-th held-out item.
_ASKED_EVERY = {"which": 1, "describe": 5, "after": 10, "parity": 10, "twice": 10}

_CATEGORY_WEIGHTS = {"conv": 3, "detail": 1, "complex": 2}
_MOST_TURNS = 3


def write_records(
    train: Sequence[Item], heldout: Sequence[Item], folder: Path, *, seed: int
) -> None:
    """Writes `train/` and `eval/` below a folder.

    Args:
        train: the items whose images are trained on.
        heldout: the items that are asked about, in every modality.
        folder: the world's folder.
        seed: chooses wordings.
    """
    rng = Random(seed)  # noqa: S311 - wordings, not secrets
    _write_json(folder / "train/captions.json", [_caption(item, rng) for item in train])
    _write_json(folder / "train/instructions.json", [_instruction(item, rng) for item in train])
    for modality in SUFFIXES:
        asked = list(_questions(heldout, modality))
        _write_lines(folder / f"eval/questions-{modality}.jsonl", asked)
        answers = [_reference_answer(record) for record in asked]
        _write_lines(folder / f"eval/answers-reference-{modality}.jsonl", answers)
    _write_lines(folder / "eval/contexts.jsonl", [_context(item) for item in heldout])


def record_names() -> Iterator[str]:
    """The files that `write_records` writes, below the world's folder."""
    yield from ("train/captions.json", "train/instructions.json", "eval/contexts.jsonl")
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


def _write_json(path: Path, records: Sequence[Record]) -> None:
    with replace_file(path) as temporary:
        temporary.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")


def _write_lines(path: Path, records: Sequence[Record]) -> None:
    with replace_file(path) as temporary:
        temporary.write_text("".join(dumps(record) + "\n" for record in records), encoding="utf-8")
