"""Answers as OpenAI's chat API gives them out: whole, in pieces, or as an error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from chatbind_cli.errors import (
    ChatBindError,
    CheckpointError,
    EngineError,
    MediaError,
    RecordError,
    UsageError,
)
from chatbind_cli.inference.decoding import Generated
from chatbind_cli.inference.openai_chat import RequestError
from chatbind_cli.jsonl import Record

_LEAST_LOGPROB = -9999.0  # OpenAI's word for never; JSON has no infinity
_DIGITS = 6
_CHUNK = "chat.completion.chunk"


@dataclass(frozen=True, slots=True)
class Head:
    """What a reply says of itself, all pieces of one alike.

    Args:
        id: what it is called.
        model: who gave it.
        created: seconds since 1970.
    """

    id: str
    model: str
    created: int

    def reply(self, kind: str, choices: list[Record]) -> Record:
        """A reply, or a piece of one."""
        said = {"id": self.id, "object": kind, "created": self.created, "model": self.model}
        return said | {"choices": choices}


def completion(head: Head, generated: Generated) -> Record:
    """A whole reply, of an answer of `Answerer.run`."""
    choices = [
        {
            "index": index,
            "message": {"role": "assistant", "content": answer.text, "refusal": None},
            "finish_reason": answer.finish_reason,
            "logprobs": _logprobs(answer),
        }
        for index, answer in enumerate(generated.each)
    ]
    return head.reply("chat.completion", choices) | {"usage": _usage(generated)}


def chunk(head: Head, sample: int, text: str, *, first: bool = False) -> Record:
    """A piece of an answer.

    Args:
        head: of the reply.
        sample: of which of the answers to the question, from 0.
        text: what is new of it.
        first: whether nothing of that answer was given out before.
    """
    delta: Record = {"role": "assistant"} if first else {}
    choice = {"index": sample, "delta": delta | {"content": text}, "finish_reason": None}
    return head.reply(_CHUNK, [choice])


def final_chunk(head: Head, sample: int, generated: Generated) -> Record:
    """What ends one of the answers: why it ends, and its log-probabilities if asked for.

    Args:
        head: of the reply.
        sample: which of the answers to the question.
        generated: all that was made of the question.
    """
    answer = generated.each[sample]
    choice = {
        "index": sample,
        "delta": {},
        "finish_reason": answer.finish_reason,
        "logprobs": _logprobs(answer),
    }
    return head.reply(_CHUNK, [choice])


def usage_chunk(head: Head, generated: Generated) -> Record:
    """What ends a stream that is to tell how many tokens it took."""
    return head.reply(_CHUNK, []) | {"usage": _usage(generated)}


def error_body(error: Exception) -> tuple[int, Record]:
    """The status and the body of the reply to a request that failed."""
    if isinstance(error, RequestError):
        kind = "server_error" if error.status >= 500 else "invalid_request_error"
        said = error_record(str(error), kind, param=error.param, code=error.code)
        return error.status, said
    # a chat template that takes no system text is a CheckpointError
    if isinstance(error, MediaError | RecordError | UsageError | CheckpointError):
        return 400, error_record(str(error))
    if isinstance(error, EngineError):
        # where it is, is nobody's business
        return 503, error_record(error.what, "server_error", code="engine_unavailable")
    # what an unexpected exception says of the inside of the program is nobody's business
    what = str(error) if isinstance(error, ChatBindError) else "the server has failed"
    return 500, error_record(what, "server_error")


def error_record(
    message: str,
    kind: str = "invalid_request_error",
    *,
    param: str | None = None,
    code: str | None = None,
) -> Record:
    """An error in OpenAI's form.

    Args:
        message: one line.
        kind: its `type`.
        param: what of the request is wrong.
        code: a word for programs.
    """
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _usage(generated: Generated) -> Record:
    said = sum(answer.n_tokens for answer in generated.each)
    read = generated.n_prompt
    return {"prompt_tokens": read, "completion_tokens": said, "total_tokens": read + said}


def _logprobs(answer: Generated) -> dict[str, Any] | None:
    if answer.tokens is None or answer.logprobs is None:
        return None
    content = [
        {
            "token": token,
            "logprob": round(max(logprob, _LEAST_LOGPROB), _DIGITS),
            "bytes": list(token.encode()),
            "top_logprobs": [],
        }
        for token, logprob in zip(answer.tokens, answer.logprobs, strict=True)
    ]
    return {"content": content, "refusal": None}
