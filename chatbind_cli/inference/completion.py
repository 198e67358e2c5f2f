"""What is asked of an engine over HTTP, and what it says: `/v1/completions` of vLLM.

A prompt goes out as embeddings (vLLM's `--enable-prompt-embeds`), and token ids come back.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from chatbind_cli.errors import RecordError
from chatbind_cli.inference.asks import hashed
from chatbind_cli.inference.generation_settings import GenerationSettings
from chatbind_cli.inference.sampling import NOT_FINITE
from chatbind_cli.jsonl import Record

_MOST_IDS = 1 << 31
_NEVER = -100.0  # the least that the API knows


class BadReplyError(Exception):
    """A reply that is none."""


@dataclass(frozen=True, slots=True)
class Answered:
    """One answer of an engine.

    Attributes:
        ids: its tokens, end token included.
        logprobs: the model's own log-probability of each; empty where not asked for.
    """

    ids: list[int]
    logprobs: list[float]


def request_of(
    embeddings: torch.Tensor,
    settings: GenerationSettings,
    *,
    room: int,
    end_ids: Sequence[int],
    never: Sequence[int],
    stops: Sequence[str],
    salt: str,
) -> Record:
    """The body of a request, but for the name of the model.

    Args:
        embeddings: of the prompt, [length, width].
        settings: how it is answered.
        room: most tokens of the answer.
        end_ids: tokens that end it.
        never: tokens that it must not have.
        stops: texts that end it.
        salt: with `settings.seed`, what decides what is drawn.

    Raises:
        UsageError: see `GenerationSettings.refuse_elsewhere`.
        RecordError: the embeddings are no finite numbers.
    """
    settings.refuse_elsewhere()
    body: Record = {
        "prompt": [],
        "prompt_embeds": _encoded(embeddings),
        "return_token_ids": True,
        "max_tokens": room,
        "temperature": settings.temperature,
        "n": settings.samples,
        "stop": list(stops),
        "stop_token_ids": list(end_ids),
        "logit_bias": {str(index): _NEVER for index in never},
        # said in any case: a served folder may have others in its generation_config.json
        "top_p": settings.top_p if settings.sampled else 1.0,
        "top_k": settings.top_k if settings.sampled else 0,
        "min_p": settings.min_p if settings.sampled else 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
    }
    if settings.sampled:
        # the engine adds the number of the sample to it, and both must fit in int64
        body["seed"] = hashed(f"{settings.seed}\0{salt}", 62)
    if settings.logprobs:
        body["logprobs"] = 1
    return body


def _encoded(embeddings: torch.Tensor) -> str:
    """A tensor as the API takes it. A wrong one could bring a server down, so it is looked at.

    Raises:
        RecordError: a number of it is not finite.
    """
    assert embeddings.dim() == 2 and embeddings.is_floating_point() and len(embeddings) > 0
    if not bool(embeddings.isfinite().all()):
        raise RecordError(NOT_FINITE)
    buffer = io.BytesIO()
    # a copy: of a view, the whole that it is a part of would be saved
    torch.save(embeddings.detach().cpu().contiguous().clone(), buffer)
    return base64.b64encode(buffer.getbuffer()).decode()


def answers_in(reply: Any, body: Record) -> list[Answered]:
    """The answers in a reply, by their numbers.

    Raises:
        BadReplyError: the reply is not one to this request.
    """
    choices = reply.get("choices") if isinstance(reply, dict) else None
    if not isinstance(choices, list) or len(choices) != body["n"]:
        raise BadReplyError(f"it has not the {body['n']} answers that it was asked for")
    answers: dict[int, Answered] = {}
    for place, choice in enumerate(choices):
        index = choice.get("index", place) if isinstance(choice, dict) else None
        if type(index) is not int or not 0 <= index < body["n"] or index in answers:
            raise BadReplyError("its answers have no numbers")
        answers[index] = piece_of(choice, body)
    return [answers[index] for index in range(body["n"])]


def piece_of(choice: Record, body: Record) -> Answered:
    """An answer, or the next piece of one.

    Raises:
        BadReplyError: it has no token ids, or more than were asked for.
    """
    ids = choice.get("token_ids")
    if not isinstance(ids, list) or not all(map(_is_id, ids)):
        raise BadReplyError("it has no token ids")
    if len(ids) > body["max_tokens"]:
        raise BadReplyError(f"it has {len(ids)} tokens, and {body['max_tokens']} were wanted")
    logprobs: list[float] = []
    if "logprobs" in body:
        told = choice.get("logprobs")
        given = told.get("token_logprobs") if isinstance(told, dict) else None
        # of a token that the bias forbids there may be none
        if not isinstance(given, list) or len(given) != len(ids) or not all(map(_number, given)):
            raise BadReplyError("it has no log-probabilities")
        logprobs = [float(number) for number in given]
    return Answered(ids, logprobs)


def _is_id(value: object) -> bool:
    return type(value) is int and 0 <= value < _MOST_IDS


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
