"""A question, from its record to its prompt, and the record of its answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from chatbind_cli.errors import ChatBindError, RecordError, contained
from chatbind_cli.files import sha256_text
from chatbind_cli.jsonl import Line, Record, dumps, record_id
from chatbind_cli.media.medium import Medium, media_of_record

if TYPE_CHECKING:
    from chatbind_cli.data.tokens import TokenizedSample
    from chatbind_cli.inference.decoding import Generated
    from chatbind_cli.model.turns import Turn

# what an answer record says itself, and what only says how the question was asked
_NOT_CARRIED = (
    *("question_id", "id", "text", "prompt"),
    *("answer_id", "model_id", "metadata", "error", "line"),
)


@dataclass(frozen=True, slots=True, eq=False)
class Question:
    """A question.

    Args:
        text: its words; placeholders such as `<image>` say where media go, else they follow.
        media: what it is about.
        mix: bring all media into one embedding (their weighted sum, at norm 1), which takes the
            place of the first; else each has its own.
        id: its `question_id` (or `id`), if it was a record.
        record: as it was read.
        where: what an error message calls it: file and line of a record.
        line: the number of its line, if that holds no question that goes by an id.
        problem: why it cannot be answered.
        turn: what it is in a dialogue, once its media are embedded.
        prompt: what the language model reads, from then on.
    """

    text: str = ""
    media: tuple[Medium, ...] = ()
    mix: bool = False
    id: str | int | None = None
    record: Record = field(default_factory=dict)
    where: str | None = None
    line: int | None = None
    problem: ChatBindError | None = None
    turn: Turn | None = None
    prompt: TokenizedSample | None = None

    @property
    def place(self) -> str | None:
        """Where it stands, with its id."""
        return self.where if self.id is None else f"{self.where} (question {self.id})"


def read_question(line: Line) -> Question:
    """The question in a line; one that cannot be answered has a `problem`.

    Args:
        line: its record is `{"question_id", "text", "image" | "audio" | ..., ...}`; a media key
            holds a name or a list of names, and a placeholder such as `<image>` in the text says
            where it goes.
    """
    record, where, number, problem = line
    identity: str | int | None = None
    try:
        identity = record_id(record)
    except RecordError as error:
        # without an id its answer could not be told from others
        problem = problem or RecordError(error.what, where=where)
    question = Question(id=identity, record=record, where=where, problem=problem)
    if problem is not None:
        return replace(question, line=number)
    try:
        text = record.get("text")
        if not isinstance(text, str) or not text.strip():
            raise RecordError("a question has no text", where=question.place)
        return replace(question, text=text, media=media_of_record(record, where=question.place))
    except Exception as error:
        return replace(question, problem=contained(error, where=where))


def answer_record(
    question: Question, generated: Generated, *, model_id: str, metadata: Mapping[str, Any]
) -> Record:
    """The record of an answer; the same question and answer give the same record.

    Args:
        question: what was asked.
        generated: the answer.
        model_id: whose answer it is.
        metadata: how answers are generated in this run: part of the answer's id, too.
    """
    media = [[medium.modality, medium.name] for medium in question.media]
    parts = (question.id, question.text, media, generated.text, model_id, metadata)
    return {
        "question_id": question.id,
        "prompt": question.text,
        "text": generated.text,
        "answer_id": short_digest(*parts),
        "model_id": model_id,
        **_carried(question.record),
        "metadata": {
            "n_tokens": generated.n_tokens,
            "finish_reason": generated.finish_reason,
            **metadata,
        },
    }


def failed_record(question: Question, error: Exception, *, model_id: str) -> Record:
    """The record that takes the place of an answer that could not be given.

    Args:
        question: what was asked, or what could be read of it.
        error: the reason.
        model_id: whose answer it is not.
    """
    record, line = question.record, question.line
    return {
        **({} if line is None else {"line": line}),
        **({} if question.id is None else {"question_id": question.id}),
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
    return sha256_text(dumps({"of": list(parts)}))[:22]
