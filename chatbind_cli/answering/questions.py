"""Question records -> questions, and answers -> answer records.

How answers come about, and where records go, is not known here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from chatbind_cli.answering.generation import Generated
from chatbind_cli.answering.session import Asked
from chatbind_cli.data.conversations import media_of_record
from chatbind_cli.errors import RecordError
from chatbind_cli.jsonl import Record, dumps, record_id

# what an answer record says itself, and what only says how the question was asked
_NOT_CARRIED = (
    *("question_id", "id", "text", "prompt"),
    *("answer_id", "model_id", "metadata", "error", "line"),
)


@dataclass(frozen=True, slots=True)
class Question:
    """A question record that was understood.

    Attributes:
        id: its `question_id` (or `id`).
        asked: the question itself.
        record: as it was read.
    """

    id: str | int
    asked: Asked
    record: Record


def identity_of(record: Record, where: str) -> str | int:
    """The id of a question record.

    Raises:
        RecordError: it has none, so its answer could not be told from others.
    """
    try:
        return record_id(record)
    except RecordError as error:
        raise RecordError(error.what, where=where) from error


def read_question(record: Record, where: str) -> Question:
    """The question in a record.

    Args:
        record: `{"question_id", "text", "image" | "audio" | ..., ...}`; a media key holds a name or
            a list of names, and a placeholder such as `<image>` in the text says where it goes.
        where: file and line, for error messages.

    Raises:
        RecordError: a key is missing, or of the wrong type.
    """
    identity = identity_of(record, where)
    place = f"{where} (question {identity})"
    text = record.get("text")
    if not isinstance(text, str) or not text.strip():
        raise RecordError("a question has no text", where=place)
    media = media_of_record(record, where=place)
    return Question(identity, Asked(text, media, where=place), record)


def answer_record(
    question: Question, generated: Generated, *, model_id: str, making: Mapping[str, Any]
) -> Record:
    """The record of an answer; the same question and answer give the same record.

    Args:
        question: what was asked.
        generated: the answer.
        model_id: whose answer it is.
        making: how answers are made in this run: part of the metadata, and of the answer's id.
    """
    asked = question.asked
    media = [[medium.modality, medium.name] for medium in asked.media]
    return {
        "question_id": question.id,
        "prompt": asked.text,
        "text": generated.text,
        "answer_id": short_digest(question.id, asked.text, media, generated.text, model_id, making),
        "model_id": model_id,
        **_carried(question.record),
        "metadata": {
            "n_tokens": generated.n_tokens,
            "finish_reason": generated.finish_reason,
            **making,
        },
    }


def failed_record(
    record: Record,
    identity: str | int | None,
    error: Exception,
    model_id: str,
    line: int | None = None,
) -> Record:
    """The record that takes the place of an answer that could not be given.

    Args:
        record: the question, or what could be read of it.
        identity: its id, if it has one.
        error: the reason.
        model_id: whose answer it is not.
        line: where it stands, if that line is no question.
    """
    return {
        **({} if line is None else {"line": line}),
        **({} if identity is None else {"question_id": identity}),
        **({} if line is not None and "text" not in record else {"prompt": record.get("text")}),
        "error": str(error),
        "model_id": model_id,
        **_carried(record),
    }


def _carried(record: Record) -> Record:
    """The question's other keys (category, media names, reference, ...); no media content."""
    return {
        key: value
        for key, value in record.items()
        if key not in _NOT_CARRIED and not _is_content(value)
    }


def _is_content(value: object) -> bool:
    values: Sequence[object] = value if isinstance(value, list) else [value]
    return any(isinstance(item, str) and item.startswith("data:") for item in values)


def short_digest(*parts: object) -> str:
    """A short hash of JSON values, the same in every run."""
    return hashlib.sha256(dumps({"of": list(parts)}).encode()).hexdigest()[:22]
