"""An OpenAI-compatible chat endpoint, through the `openai` client.

The client tries again what can pass (a full server, a broken connection, a cut-off reply) and
waits as long as a server asks (`Retry-After`). Each of its attempts keeps the limits a minute, ends
in time, and reads no more than a reply may have. The key comes from the environment alone and
appears in no message.
"""

from __future__ import annotations

import asyncio
import json
import os
import zlib
from typing import Any, cast

import httpx
import openai
from aiolimiter import AsyncLimiter

from chatbind_cli.errors import JudgeError, reason
from chatbind_cli.evaluation.judges.cost import USUAL_REVIEW_TOKENS
from chatbind_cli.evaluation.judges.judge import KEY_VARIABLE, JudgeSettings
from chatbind_cli.evaluation.judges.reply import SCHEMA
from chatbind_cli.evaluation.prompts import Message
from chatbind_cli.jsonl import Record
from chatbind_cli.urls import public_url

_SECRET_AT_LEAST = 12
"""A key that is shorter is a word (`none`, `EMPTY`) that local servers are given."""

_LARGEST_REPLY = 4 << 20
"""Bytes of a reply, as sent and as unpacked; a long review has a few thousand."""

_FORMAT = {
    "type": "json_schema",
    "json_schema": {"name": "review", "strict": True, "schema": SCHEMA},
}


class NoReplyError(Exception):
    """One chat got no reply, after all attempts or at once."""


class Endpoint:
    """Sends chats and returns completions.

    Args:
        settings: where it is and how it is asked.
        model: the model's name there.

    Attributes:
        parameters: what goes out beside a chat. Some models refuse some of these; what is refused
            is renamed or left out.
        sending: the tasks whose request is out, and not waiting for its turn or for another try.
    """

    def __init__(self, settings: JudgeSettings, model: str) -> None:
        self._secret = os.environ.get(KEY_VARIABLE, "").strip()
        self._model = model
        self._timeout_s = settings.timeout_s
        http_client = _Client(settings.timeout_s, _limiter(settings.requests_per_minute))
        self.sending = http_client.sending
        self._client = openai.AsyncOpenAI(
            http_client=cast(Any, http_client),  # declared as a fork of httpx from 3.0 on
            # A local server needs no key, but the client wants one.
            api_key=self._secret or "none",
            base_url=settings.url,
            timeout=settings.timeout_s,
            max_retries=settings.retries,
        )
        self.parameters: dict[str, Any] = {
            "temperature": settings.temperature,
            "max_tokens": settings.max_tokens,
        }
        if settings.structured == "auto":
            self.parameters["response_format"] = _FORMAT
        self._tokens = _limiter(settings.tokens_per_minute)
        self._owed_tokens = 0

    async def complete(
        self, messages: list[Message], *, prompt_tokens: int, structured: bool = True
    ) -> Record:
        """The completion of a chat, a JSON object with a message in its first choice.

        Args:
            messages: the chat.
            prompt_tokens: what it counts for in the limit of tokens a minute.
            structured: whether an object of scores may be asked for.

        Raises:
            NoReplyError: there is none for this chat.
            JudgeError: there will be none for any chat.
        """
        # What earlier replies had more or fewer tokens than was reckoned is made up for here.
        tokens = prompt_tokens + USUAL_REVIEW_TOKENS + self._owed_tokens
        self._owed_tokens = 0
        await _acquire(self._tokens, tokens)
        while True:
            parameters = dict(self.parameters)
            sent = parameters if structured else _without(parameters, "response_format")
            try:
                reply = await self._client.chat.completions.with_raw_response.create(
                    model=self._model, messages=cast(Any, messages), **sent
                )
            except openai.APIError as error:
                if not self._adapt(error, parameters):
                    # without its cause: a server's own words may hold the key
                    raise self._failure(error) from None
            else:
                # The client's own models take 200 times the memory.
                return cast(Record, json.loads(reply.content))

    def used(self, completion_tokens: int) -> None:
        """Says how many tokens a reply had, for the limit a minute."""
        self._owed_tokens += completion_tokens - USUAL_REVIEW_TOKENS

    async def close(self) -> None:
        """Closes the connections."""
        await self._client.close()

    def without_key(self, text: str) -> str:
        """The text as it may be shown and written, also where a server has repeated the key."""
        secret = self._secret
        return text.replace(secret, "[key]") if len(secret) >= _SECRET_AT_LEAST else text

    def _adapt(self, error: openai.APIError, sent: dict[str, Any]) -> bool:
        """Renames or drops a parameter that the model refuses; False if that is not the matter.

        Of many requests under way the first that is refused changes the parameters for all.
        """
        if not isinstance(error, openai.APIStatusError):
            return False
        if error.status_code not in (400, 415, 422, 501):
            return False
        if sent != self.parameters:
            return True
        text = f"{error} {error.response.text}"
        if "max_completion_tokens" in text and "max_tokens" in self.parameters:
            self.parameters["max_completion_tokens"] = self.parameters.pop("max_tokens")
            return True
        for name, marks in (
            ("response_format", ("response_format", "json_schema", "structured output", "grammar")),
            ("temperature", ("temperature",)),
        ):
            if name in self.parameters and any(mark in text for mark in marks):
                del self.parameters[name]
                return True
        return False

    def _failure(self, error: openai.APIError) -> Exception:
        """The failure of this chat, or of every chat where none can get past the error."""
        text = self._in_words(error)
        hints: dict[type[Exception], str] = {
            openai.AuthenticationError: f"check the key in {KEY_VARIABLE}",
            openai.PermissionDeniedError: "the key may not use this model",
            openai.NotFoundError: "check --judge-model and --judge-url",
        }
        hint = hints.get(type(error))
        if error.code == "insufficient_quota":
            hint = "the account has no quota left"
        if hint is not None:
            return JudgeError(text, where=self.where, hint=hint)
        attempts = 1 + int(error.request.headers.get("x-stainless-retry-count", 0))
        return NoReplyError(f"{text} ({attempts} attempts)")

    @property
    def where(self) -> str:
        """The model and its address, for messages."""
        return f"{self._model} at {public_url(str(self._client.base_url))}"

    def _in_words(self, error: openai.APIError) -> str:
        """The error on one short line, without the key."""
        text, cause = str(error), error.__cause__
        if isinstance(error, openai.APITimeoutError):
            text = f"no reply within {self._timeout_s:g} s"
        elif isinstance(cause, httpx.DecodingError):
            text = f"a reply that cannot be read ({cause})"
        elif isinstance(error, openai.APIConnectionError):
            text = f"no connection ({cause or error})"
        elif isinstance(error, openai.APIStatusError) and " - " not in text:
            text += f" {error.response.text}"  # words in a form that is not OpenAI's
        return reason(Exception(self.without_key(text)))


class _Client(httpx.AsyncClient):
    """Every attempt in its turn and within its time, every reply as it is and of a bounded size."""

    def __init__(self, timeout_s: float, limiter: AsyncLimiter | None) -> None:
        super().__init__(
            headers={"Accept-Encoding": "identity"},
            follow_redirects=True,
            event_hooks={"response": [_read_bounded]},
            limits=httpx.Limits(max_connections=None),  # the number of judgements says how many
        )
        self.sending: set[asyncio.Task[Any]] = set()
        self._timeout_s = timeout_s
        self._limiter = limiter

    async def send(self, request: httpx.Request, **options: Any) -> httpx.Response:
        """Sends one request; the client's own limit is on each wait for a piece of the reply."""
        task = cast(asyncio.Task[Any], asyncio.current_task())
        await _acquire(self._limiter, 1)
        self.sending.add(task)
        try:
            async with asyncio.timeout(self._timeout_s):
                return await super().send(request, **options)
        except TimeoutError as error:
            raise httpx.ReadTimeout("the reply took too long", request=request) from error
        finally:
            self.sending.discard(task)


async def _read_bounded(response: httpx.Response) -> None:
    """Reads the body before the client does, and unpacks it, if need be, no further than it may go.

    Raises:
        DecodingError: it is too large, packed in a way that was not asked for, or no completion.
    """
    try:
        coding = response.headers.pop("content-encoding", "identity")
        if coding not in ("identity", "gzip"):
            raise ValueError("it is compressed, which was not asked for")
        gzip = zlib.decompressobj(wbits=31) if coding == "gzip" else None
        body = bytearray()
        stream = cast(httpx.AsyncByteStream, response.stream)
        async for chunk in stream:
            room = _LARGEST_REPLY + 1 - len(body)
            body += chunk[:room] if gzip is None else gzip.decompress(chunk, room)
            if len(body) > _LARGEST_REPLY:
                raise ValueError(f"it has more than {_LARGEST_REPLY >> 20} MiB")
        await stream.aclose()
        if response.is_success:
            _check_completion(bytes(body))
    except (ValueError, zlib.error) as error:
        raise httpx.DecodingError(str(error), request=response.request) from error
    response.stream = httpx.ByteStream(bytes(body))


def _check_completion(body: bytes) -> None:
    try:
        value = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ValueError("the reply is not JSON") from error
    try:
        good = isinstance(value["choices"][0]["message"], dict)
    except (TypeError, LookupError):
        good = False
    if not good:
        raise ValueError("the reply is not a chat completion")


def _limiter(per_minute: float | None) -> AsyncLimiter | None:
    """A second's worth of a limit may go at once; servers count in windows that are longer."""
    return None if per_minute is None else AsyncLimiter(per_minute / 60, 1)


async def _acquire(limiter: AsyncLimiter | None, amount: float) -> None:
    """Waits until so much may go, in pieces of what may go at once."""
    while limiter is not None and amount > 0:
        piece = min(amount, limiter.max_rate)
        await limiter.acquire(piece)
        amount -= piece


def _without(parameters: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in parameters.items() if key != name}
