"""Requests of OpenAI's chat API, each made into a question.

Bodies come from strangers: their shape is checked all the way down before anything of them is used,
and media stay names until a worker reads them. A parameter that would change the answer and cannot
be honoured is refused by name, never passed over.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from chatbind_cli.console import printable
from chatbind_cli.errors import ChatBindError, UsageError
from chatbind_cli.inference.generation_settings import GenerationSettings
from chatbind_cli.inference.questions import Question
from chatbind_cli.jsonl import Record
from chatbind_cli.media.medium import Medium
from chatbind_cli.media.modality import MODALITIES
from chatbind_cli.model.turns import GPT, HUMAN, Content, Turn

SEEDED = "seeded"
"""The id of every question whose request says `seed`: draws depend on seed and id."""

_MOST_MESSAGES = 1000
_MOST_PARTS = 1000
_MOST_MEDIA = 64
_MOST_ANSWERS = 128  # as OpenAI's
_LONGEST_ADDRESS = 10_000
_SHOWN = 60

_SETTINGS = {
    "max_completion_tokens": "max_new_tokens",
    "max_tokens": "max_new_tokens",
    "temperature": "temperature",
    "top_p": "top_p",
    "stop": "stop",
    "seed": "seed",
    "n": "samples",
    "logprobs": "logprobs",
    # not OpenAI's
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
}
_NEUTRAL: Mapping[str, Sequence[Any]] = {
    "audio": (),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "prediction": (),
    "presence_penalty": (0,),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "verbosity": ("medium",),
    "web_search_options": (),
}
"""What cannot be honoured, each with the values that ask for nothing."""
_PASSED_OVER = (
    *("user", "metadata", "store", "service_tier", "safety_identifier", "parallel_tool_calls"),
    *("prompt_cache_key", "prompt_cache_retention"),
)
"""They change no answer."""
_READ = ("model", "messages", "stream", "stream_options", *_SETTINGS)

_ROLES = {"user": HUMAN, "assistant": GPT}
_ADDRESSES = {"image_url": "image", "video_url": "video", "audio_url": "audio"}
_PARTS = ("text", *_ADDRESSES, "input_audio", "media")
_KINDS = {str: "text", dict: "an object", list: "a list", bool: "true or false", type(None): "null"}


class RequestError(ChatBindError):
    """A request that is not answered as it stands.

    Args:
        what: what is wrong.
        param: with what of it, as OpenAI names it.
        hint: what to do about it.
        status: of the reply.
        code: OpenAI's word for it, if it has one.
    """

    def __init__(
        self,
        what: str,
        param: str | None = None,
        *,
        hint: str | None = None,
        status: int = 400,
        code: str | None = None,
    ) -> None:
        super().__init__(what, where=param, hint=hint)
        self.param = param
        self.status = status
        self.code = code


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """What somebody asks for.

    Args:
        question: what is asked; its `settings` are the request's, if they differ from the run's.
        stream: whether the answer is to come in pieces.
        include_usage: whether such a stream tells at its end how many tokens it took.
    """

    question: Question
    stream: bool
    include_usage: bool


def read_chat_request(
    body: Record, *, settings: GenerationSettings, model_id: str | None, request_id: str
) -> ChatRequest:
    """The question in the body of a request to `/v1/chat/completions`.

    Messages of one role that follow each other are one turn. The parts of a turn go to lines of
    their own, as questions with media were learned, unless white space parts them already.

    Args:
        body: any JSON object.
        settings: what holds where the request says nothing.
        model_id: the only model that there is; None: the request may name any.
        request_id: the question's id, unless the request has a seed.

    Raises:
        RequestError: what is wrong with it.
    """
    _check_names(body)
    model = _optional(body, "model", str)
    if model is not None and model_id is not None:
        check_model(model, model_id)
    own = _settings(body, settings)
    system, turns = _dialogue(body.get("messages"))
    question = Question(
        text=turns[-1].text,
        media=tuple(medium for turn in turns for medium in turn.media),
        system=system,
        earlier=tuple((turn.role, turn.text) for turn in turns[:-1]),
        turns=turns,
        id=request_id if body.get("seed") is None else SEEDED,
        settings=None if own == settings else own,
    )
    options = _optional(body, "stream_options", dict) or {}
    return ChatRequest(
        question,
        stream=bool(_optional(body, "stream", bool)),
        include_usage=bool(_optional(options, "include_usage", bool, "stream_options.")),
    )


def check_model(name: Any, model_id: str) -> None:
    """Refuses what is asked of another model.

    Raises:
        RequestError: `name` is not its name.
    """
    if name != model_id:
        said = repr(name[:_SHOWN]) if isinstance(name, str) else "of that name"
        raise RequestError(
            f"there is no model {said}",
            "model",
            hint=f"there is {model_id}",
            status=404,
            code="model_not_found",
        )


def _check_names(body: Record) -> None:
    """Refuses parameters that there are not, or that cannot be honoured."""
    for name, value in body.items():
        if name in _READ or name in _PASSED_OVER:
            continue
        if name not in _NEUTRAL:
            near = get_close_matches(name[:_SHOWN], (*_READ, *_NEUTRAL), n=1)
            hint = f"did you mean {near[0]}?" if near else None
            raise RequestError("is no parameter of a request", printable(name[:_SHOWN]), hint=hint)
        if value is not None and value not in _NEUTRAL[name]:
            raise RequestError(f"cannot be {_said(value)} here", name, hint="leave it out")


def _said(value: Any) -> str:
    """A value of a request in a message: itself if it is short and plain, else what it is."""
    if isinstance(value, bool | int | float) or (isinstance(value, str) and len(value) < _SHOWN):
        return repr(value)[:_SHOWN]
    return _KINDS.get(type(value), "a number")


def _optional(record: Record, name: str, kind: type, before: str = "") -> Any:
    """A value of one type, or None where it is not said."""
    value = record.get(name)
    if value is not None and type(value) is not kind:
        raise RequestError(f"must be {_KINDS[kind]}, not {_said(value)}", before + name)
    return value


def _settings(body: Record, settings: GenerationSettings) -> GenerationSettings:
    """The run's settings with the request's own."""
    asked = {name: field for name, field in _SETTINGS.items() if body.get(name) is not None}
    values = {field: body[name] for name, field in asked.items()}
    if any(values[field] != body[name] for name, field in asked.items()):
        raise RequestError("differs from max_completion_tokens", "max_tokens")
    try:
        changed = settings.changed(values)
    except UsageError as error:
        # the settings have names of their own, which whoever asked has never seen
        named = (n for n, field in asked.items() if re.search(rf"\b{field}\b", error.what))
        name = next(named, None)
        what = error.what if name is None else error.what.removeprefix(f"{asked[name]} ")
        raise RequestError(what, name, hint=error.hint) from error
    if changed.samples > _MOST_ANSWERS:
        raise RequestError(f"is {changed.samples}", "n", hint=f"{_MOST_ANSWERS} are the most")
    return changed


def _dialogue(messages: Any) -> tuple[str | None, tuple[Turn, ...]]:
    """The system text, and what was said; the last is a question."""
    if not isinstance(messages, list) or not messages:
        raise RequestError("must be a list of messages", "messages")
    parts = sum(len(m["content"]) for m in messages if _has_parts(m))
    if len(messages) > _MOST_MESSAGES or parts > _MOST_PARTS:
        limits = f"{_MOST_MESSAGES:,} messages and {_MOST_PARTS:,} parts are the most"
        raise RequestError("are too many", "messages", hint=limits)
    said = [_message(message, f"messages[{n}]") for n, message in enumerate(messages)]
    system = None
    if said[0][0] is None:
        system = "\n".join(part for part in said.pop(0)[1] if isinstance(part, str))
    groups: list[tuple[str, list[str | Medium]]] = []
    for number, (role, content) in enumerate(said, start=len(messages) - len(said)):
        if role is None:
            raise RequestError(
                "only the first message may be from the system", f"messages[{number}].role"
            )
        if not groups and role == GPT:
            raise RequestError("a dialogue begins with the user", f"messages[{number}].role")
        if groups and groups[-1][0] == role:
            groups[-1][1].extend(content)
        else:
            groups.append((role, content))
    if not groups or groups[-1][0] != HUMAN:
        last = f"messages[{len(messages) - 1}].role"
        raise RequestError("the last message must be from the user", last)
    if sum(isinstance(part, Medium) for _, content in groups for part in content) > _MOST_MEDIA:
        raise RequestError(f"more than {_MOST_MEDIA} media", "messages")
    return system, tuple(Turn(role, _on_lines(content)) for role, content in groups)


def _has_parts(message: Any) -> bool:
    return isinstance(message, dict) and isinstance(message.get("content"), list)


def _message(message: Any, param: str) -> tuple[str | None, list[str | Medium]]:
    """Whose message it is (None: the system's), and its parts."""
    if not isinstance(message, dict):
        raise RequestError(f"must be an object, not {_said(message)}", param)
    role = message.get("role")
    if role not in ("system", "developer", *_ROLES):
        raise RequestError(
            f"is {_said(role)}",
            f"{param}.role",
            hint="there are system, developer, user and assistant",
        )
    for key in ("tool_calls", "function_call", "audio"):
        if message.get(key):
            raise RequestError("is not read here", f"{param}.{key}")
    content = message.get("content")
    place = f"{param}.content"
    if isinstance(content, str):
        parts: list[str | Medium] = [content]
    elif isinstance(content, list) and content:
        parts = [read_part(part, f"{place}[{n}]") for n, part in enumerate(content)]
    elif content is None and role == "assistant":
        parts = []  # as other servers give out an empty answer
    else:
        raise RequestError("must be text or a list of parts", place)
    if role != "user" and any(isinstance(part, Medium) for part in parts):
        raise RequestError("only the user's messages can have media", place)
    if role == "user" and not any(isinstance(part, Medium) or part.strip() for part in parts):
        raise RequestError("is empty", place)
    return _ROLES.get(role), parts


def read_part(part: Any, param: str) -> str | Medium:
    """A part of a message: its text, or the medium that it names."""
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(kind, str) or kind not in _PARTS:
        what = f"is of the type {_said(kind)}" if isinstance(part, dict) else "must be an object"
        raise RequestError(what, param, hint=f"there are {', '.join(_PARTS)}")
    if kind == "text":
        return _text(part.get("text"), f"{param}.text")
    if kind == "media":
        modality = _optional(part, "modality", str, f"{param}.")
        if modality not in (None, *MODALITIES):
            raise RequestError(
                f"is {_said(modality)}",
                f"{param}.modality",
                hint=f"there are {', '.join(MODALITIES)}",
            )
        return Medium(modality, _address(part.get("url"), f"{param}.url"))
    inner = part.get(kind)
    if not isinstance(inner, dict):
        raise RequestError("must be an object", f"{param}.{kind}")
    if kind == "input_audio":
        # what format it has, its content says
        content = _text(inner.get("data"), f"{param}.input_audio.data")
        _optional(inner, "format", str, f"{param}.input_audio.")
        return Medium("audio", f"data:;base64,{content}")
    return Medium(_ADDRESSES[kind], _address(inner.get("url"), f"{param}.{kind}.url"))


def _text(value: Any, param: str) -> str:
    if not isinstance(value, str):
        raise RequestError(f"must be text, not {_said(value)}", param)
    return value


def _address(value: Any, param: str) -> str:
    address = _text(value, param)
    if not address:
        raise RequestError("is empty", param)
    if len(address) > _LONGEST_ADDRESS and address[:5].lower() != "data:":
        limit = f"{_LONGEST_ADDRESS:,} characters are the most"
        raise RequestError("is too long an address", param, hint=limit)
    return address


def _on_lines(parts: Sequence[str | Medium]) -> Content:
    """Parts in turn, each on a line of its own unless white space parts it from the one before."""
    content: list[str | Medium] = []
    for part in parts:
        if part == "":
            continue
        if content and not (_is_space(content[-1], -1) or _is_space(part, 0)):
            content.append("\n")
        content.append(part)
    return tuple(content)


def _is_space(part: str | Medium, at: int) -> bool:
    return isinstance(part, str) and part[at].isspace()
