"""Answers as OpenAI's chat API gives them out: whole, in pieces, or as an error."""

from __future__ import annotations

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


def completion(generated: Generated, *, model_id: str, request_id: str, created: int) -> Record:
    """A whole reply.

    Args:
        generated: the answer, of `Answerer.run`.
        model_id: who gave it.
        request_id: what the reply is called.
        created: seconds since 1970.
    """
    choices = [
        {
            "index": index,
            "message": {"role": "assistant", "content": answer.text, "refusal": None},
            "finish_reason": answer.finish_reason,
            "logprobs": _logprobs(answer),
        }
        for index, answer in enumerate(generated.each)
    ]
    reply = _framed("chat.completion", choices, model_id, request_id, created)
    return reply | {"usage": _usage(generated)}


def chunk(
    sample: int,
    text: str,
    *,
    first: bool = False,
    model_id: str,
    request_id: str,
    created: int,
) -> Record:
    """A piece of an answer.

    Args:
        sample: of which of the answers to the question, from 0.
        text: what is new of it.
        first: whether nothing of that answer was given out before.
        model_id: see `completion`.
        request_id: the same in all pieces.
        created: the same in all pieces.
    """
    delta: Record = {"role": "assistant"} if first else {}
    choice = {"index": sample, "delta": delta | {"content": text}, "finish_reason": None}
    return _framed("chat.completion.chunk", [choice], model_id, request_id, created)


def final_chunk(
    sample: int, generated: Generated, *, model_id: str, request_id: str, created: int
) -> Record:
    """What ends one of the answers: why it ends, and its log-probabilities if asked for.

    Args:
        sample: which of the answers to the question.
        generated: all that was made of the question.
        model_id: see `chunk`.
        request_id: see `chunk`.
        created: see `chunk`.
    """
    answer = generated.each[sample]
    choice = {
        "index": sample,
        "delta": {},
        "finish_reason": answer.finish_reason,
        "logprobs": _logprobs(answer),
    }
    return _framed("chat.completion.chunk", [choice], model_id, request_id, created)


def usage_chunk(generated: Generated, *, model_id: str, request_id: str, created: int) -> Record:
    """What ends a stream that is to tell how many tokens it took."""
    reply = _framed("chat.completion.chunk", [], model_id, request_id, created)
    return reply | {"usage": _usage(generated)}


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


def _framed(
    kind: str, choices: list[Record], model_id: str, request_id: str, created: int
) -> Record:
    return {
        "id": request_id,
        "object": kind,
        "created": created,
        "model": model_id,
        "choices": choices,
    }


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
