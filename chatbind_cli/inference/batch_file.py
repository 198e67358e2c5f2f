"""OpenAI's batch files: lines that hold requests, and the lines of the answers to them.

A line of answers is the same in every run, as our records are: it tells no time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any

from chatbind_cli.console import note
from chatbind_cli.errors import ChatBindError, RecordError
from chatbind_cli.inference.answer_record import AnswerRecords, short_digest
from chatbind_cli.inference.decoding import Generated
from chatbind_cli.inference.generation_settings import GenerationSettings
from chatbind_cli.inference.openai_chat import RequestError, read_chat_request
from chatbind_cli.inference.openai_reply import Head, completion, error_body
from chatbind_cli.inference.question_record import question_in
from chatbind_cli.inference.questions import Question
from chatbind_cli.jsonl import Line, Record, record_id

_URL = "/v1/chat/completions"
_SHOWN = 80


def read_batch(
    lines: Iterable[Line], settings: GenerationSettings, model_id: str
) -> Iterator[Question]:
    """The questions in lines; one that cannot be answered has a `problem`.

    That another model is asked for than answers is noted once.

    Args:
        lines: the record of each is `{"custom_id", "method", "url", "body"}`.
        settings: the run's, which a body changes.
        model_id: who answers.
    """
    noted = False
    for line in lines:
        body = line.record.get("body")
        model = body.get("model") if isinstance(body, dict) else None
        if not noted and isinstance(model, str) and model != model_id:
            note(f"{line.where}: asks for {model[:_SHOWN]}; {model_id} answers in its place")
            noted = True
        identify = partial(record_id, keys=["custom_id"])
        yield question_in(line, identify, partial(_asked, settings=settings))


def _asked(record: Record, settings: GenerationSettings) -> Question:
    method, url, body = record.get("method", "POST"), record.get("url"), record.get("body")
    if method != "POST" or url != _URL:
        raise RecordError(f"asks for {f'{method} {url}'[:_SHOWN]}", hint=f"POST {_URL} is answered")
    if not isinstance(body, dict):
        raise RecordError("body must be an object")
    try:
        # whichever model it names: there is only one
        request = read_chat_request(body, settings=settings, model_id=None, request_id="")
    except RequestError as error:
        raise RecordError(str(error)) from error  # which of its words are wrong it says itself
    if request.stream:
        raise RecordError("stream: there is none in a file")
    return request.question


class BatchLines(AnswerRecords):
    """How answers are written down: as lines of OpenAI's output and error files."""

    key = "custom_id"

    def __init__(self, model_id: str, metadata: Mapping[str, Any]) -> None:
        super().__init__(model_id, metadata)
        self.expect = {"error": None}
        self._made = f"fp_{short_digest(model_id, metadata)}"

    def answer(self, question: Question, generated: Generated) -> Record:
        """The line of an answer."""
        made = short_digest(question.record, generated.text, self._made)
        body = completion(Head(f"chatcmpl-{made}", self.model_id, 0), generated)
        body["system_fingerprint"] = self._made
        return {
            "id": f"batch_req_{made}",
            "custom_id": question.id,
            "response": {"status_code": 200, "request_id": made, "body": body},
            "error": None,
        }

    def failure(self, question: Question, error: ChatBindError) -> Record:
        """What takes its place where there is none."""
        _, said = error_body(error)
        return {
            **({} if question.line is None else {"line": question.line}),
            "id": f"batch_req_{short_digest(question.record, str(error), self._made)}",
            "custom_id": question.id,
            "response": None,
            "error": {"code": said["error"]["type"], "message": said["error"]["message"]},
        }

    def differs(self, there: Record) -> str | None:
        """How an answer of an earlier run was made otherwise than this run makes them, if so."""
        response = there.get("response")
        body = response.get("body") if isinstance(response, dict) else None
        made = body.get("system_fingerprint") if isinstance(body, dict) else None
        if made == self._made:
            return None
        return "by another model, or with other settings (system_fingerprint)"

    def in_words(self, record: Record) -> str:
        """An answer as a person reads it: what was asked, and below it what was said."""
        told: Record = {"question_id": record[self.key]}
        if record["error"] is not None:
            return super().in_words(told | {"error": record["error"]["message"]})
        choices = record["response"]["body"]["choices"]
        return super().in_words(told | {"text": choices[0]["message"]["content"]})
