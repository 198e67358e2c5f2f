"""The toy world as tasks of lmms-eval; the files in `tasks/` name these functions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from chatbind_cli.evaluation.accuracy import is_correct
from chatbind_cli.evaluation.cases import references_of
from chatbind_cli.jsonl import Record
from chatbind_cli.media.medium import media_of_record
from chatbind_cli.media.root import MediaRoot


def messages(record: Record) -> list[dict[str, Any]]:
    """A question record as chat messages: its words, and its media below the folder `media`.

    A part has the modality as its type, and a path as its `url`.

    Raises:
        MediaError: a medium is not there.
    """
    root = MediaRoot(Path("media"))
    content = [{"type": "text", "text": record["text"]}]
    for medium in media_of_record(record):
        content.append({"type": medium.modality, "url": str(root.find(medium.name))})
    return [{"role": "user", "content": content}]


def accuracy(record: Record, answers: list[str]) -> dict[str, float]:
    """Whether the answer is right, as the judge `rule` of `review` sees it."""
    return {"accuracy": float(is_correct(answers[0], references_of(record), record))}
