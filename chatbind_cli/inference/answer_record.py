"""Answer records: what is written of an answer, or of a question that has none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from chatbind_cli.console import printable
from chatbind_cli.errors import ChatBindError
from chatbind_cli.files import sha256_text
from chatbind_cli.inference.decoding import Generated
from chatbind_cli.inference.questions import Question
from chatbind_cli.jsonl import Record, dumps

_OF_ONE_ANSWER = frozenset(
    {
        *("n_tokens", "finish_reason", "generation"),
        # of a hosted model's
        *("model", "created", "prompt_tokens", "completion_tokens", "cost_usd"),
    }
)
"""What the `metadata` of an answer says of it alone; the rest is the same in all of a run."""

# what an answer record says itself, and what only says how the question was asked
_NOT_CARRIED = (
    *("question_id", "id", "text", "prompt", "generation"),
    *("answer_id", "model_id", "metadata", "error", "line"),
    *("logprobs", "samples"),
)
_ASKED = ("question_id", "prompt")
_DIGITS = 6


class AnswerRecords:
    """How answers are written down: as records of our own.

    Args:
        model_id: whose answers these are.
        metadata: what every answer of a run says of how it was generated.

    Attributes:
        key: the key of the question's id.
        expect: what every record has beside it that is no failure (see `RecordWriter`).
    """

    key = "question_id"

    def __init__(self, model_id: str, metadata: Mapping[str, Any]) -> None:
        self.model_id = model_id
        self.metadata = metadata
        self.expect: dict[str, Any] = {"model_id": model_id}

    def answer(self, question: Question, generated: Generated) -> Record:
        """The record of an answer; what it is made of is in its `answer_id`, `metadata` too."""
        own = {} if question.settings is None else {"generation": question.record.get("generation")}
        made = {**self.metadata, **own}
        return {
            "question_id": question.id,
            "prompt": question.text,
            "text": generated.text,
            "answer_id": _identity(question, generated.text, self.model_id, made),
            "model_id": self.model_id,
            **_carried(question.record),
            **told(generated),
            "metadata": {
                "n_tokens": generated.n_tokens,
                "finish_reason": generated.finish_reason,
                **generated.about,
                **made,
            },
        }

    def failure(self, question: Question, error: ChatBindError) -> Record:
        """What takes its place where there is none.

        It has every key of one beside its `error`, for readers that know no errors.
        """
        prompt = question.record.get("text")
        return {
            **({} if question.line is None else {"line": question.line}),
            "question_id": question.id,
            "prompt": prompt if isinstance(prompt, str) else "",
            "text": "",
            "error": str(error),
            "answer_id": _identity(question, "", self.model_id, {}),
            "model_id": self.model_id,
            **_carried(question.record),
            "metadata": {},
        }

    def differs(self, there: Record) -> str | None:
        """How an answer of an earlier run was made otherwise than this run makes them, if so."""
        before = there.get("metadata")
        both = before.keys() & self.metadata.keys() if isinstance(before, dict) else ()
        if not both or not isinstance(before, dict):
            return None  # somebody else's file, which does not say
        keys = (before.keys() | self.metadata.keys()) - _OF_ONE_ANSWER
        for key in sorted(keys, key=lambda key: (key not in both, key)):
            if before.get(key) != self.metadata.get(key):
                return f"with {key} {before.get(key)!r}, this run has {self.metadata.get(key)!r}"
        return None

    def in_words(self, record: Record) -> str:
        """An answer as a person reads it: what was asked, and below it what was said."""
        said = f"error: {record['error']}" if "error" in record else record.get("text")
        asked = "  ".join(" ".join(str(record.get(key, "")).split()) for key in _ASKED)
        return printable(f"{asked.rstrip()}\n    {said}")


def told(generated: Generated) -> Record:
    """What an answer tells beside its text."""
    record: Record = {}
    if generated.choices:
        record["choices"] = [
            {
                "text": choice.text,
                "logprob": round(choice.logprob, _DIGITS),
                "logprob_per_token": round(choice.logprob / choice.n_tokens, _DIGITS),
            }
            for choice in generated.choices
        ]
    if generated.tokens is not None and generated.logprobs is not None:
        record["logprobs"] = [
            {"token": token, "logprob": round(logprob, _DIGITS)}
            for token, logprob in zip(generated.tokens, generated.logprobs, strict=True)
        ]
    if generated.samples:
        record["samples"] = [
            {
                "text": sample.text,
                "n_tokens": sample.n_tokens,
                "finish_reason": sample.finish_reason,
                **told(sample),
            }
            for sample in generated.samples
        ]
    return record


def _identity(question: Question, text: str, model_id: str, metadata: Mapping[str, Any]) -> str:
    media = [[medium.modality, medium.name] for medium in question.media]
    weights = [medium.weight for medium in question.media]
    special = {
        "earlier": question.earlier,
        "system": question.system,
        "mix": question.mix,
        "weights": weights if any(weight != 1.0 for weight in weights) else None,
        "choices": question.choices,
    }
    special = {key: value for key, value in special.items() if value}
    parts = (question.id, question.text, media, text, model_id, metadata)
    return short_digest(*parts, *([special] if special else []))


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
