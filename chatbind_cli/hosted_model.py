"""Asks a chat model behind an OpenAI-compatible endpoint, as judges and text-only answerers do.

What a chat cannot get past is its own failure; what no chat can get past (a wrong key, a model
that is not there, an empty purse, a cost limit) is everybody's. The key comes from the environment
alone and appears in no message.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import openai

from chatbind_cli.batch_api import Batches, Reply
from chatbind_cli.cost import (
    FREE,
    SHARE_OF_BATCHES,
    Budget,
    counter_for,
    find_price,
    message_tokens,
)
from chatbind_cli.endpoint import Endpoint, RateLimit
from chatbind_cli.errors import UsageError, reason
from chatbind_cli.hosted import KEY_VARIABLE, HostedSettings, Message, Role
from chatbind_cli.jsonl import Record

_LONGEST_REPLY = 100_000
_MOST_TOKENS = 1 << 31
_GOOD = 200
_REFUSED = (400, 415, 422, 501)
_UPLOAD_S = 600.0
# So many failures in a row, without one reply between them, are the server's and not a chat's.
_FAILURES_THAT_STOP = 8


class NoReplyError(Exception):
    """One chat got no reply, after all attempts or at once."""


class Settled(NamedTuple):
    """What a batch has brought for a chat: what is known of it, and its text or an error."""

    metadata: dict[str, Any]
    text: str = ""
    error: str = ""


class HostedModel:
    """A chat model within its limits.

    Args:
        usual_tokens: of a reply, before there is one.
        spent_usd: what earlier runs paid, for the cost limit.

    Attributes:
        price: None if nobody knows.
        sending: the tasks whose request is out.

    Raises:
        UsageError: a limit on the cost without a price.
        RecordError: a price file that cannot be used.
        CheckpointError: there is no such tokenizer.
    """

    def __init__(
        self,
        name: str,
        settings: HostedSettings,
        role: Role,
        *,
        usual_tokens: int,
        spent_usd: float = 0.0,
    ) -> None:
        self.name = name
        self.price = find_price(name, settings.prices)
        if self.price is None and settings.max_cost_usd is not None:
            raise UsageError(
                f"the price of {name!r} is not known, so --max-cost cannot be kept",
                hint="give it with --prices",
            )
        self.budget = Budget(self.price or FREE, settings.max_cost_usd, spent_usd, role)
        self.count, self.counted_by = counter_for(settings.tokenizer)
        self._role = role
        self._settings = settings
        self._endpoint = self._open(
            timeout_s=settings.timeout_s,
            requests_per_minute=settings.requests_per_minute,
            refuse=_refuse_what_is_no_chat,
        )
        self.sending = self._endpoint.sending
        # Some models refuse some parameters: their other names; None for what is left out.
        self._renamed: dict[str, str | None] = {}
        self._tokens = RateLimit(settings.tokens_per_minute)
        self._reply_tokens = usual_tokens
        self._failures_in_row = 0

    def _open(self, **how: Any) -> Endpoint:
        key = os.environ.get(KEY_VARIABLE, "").strip()
        return Endpoint(self._settings.url, key=key, retries=self._settings.retries, **how)

    def batches(self, path: Path) -> Batches:
        """The batches that a file of ours names; see `Batches`."""
        endpoint = self._open(timeout_s=max(self._settings.timeout_s, _UPLOAD_S))
        return Batches(endpoint, path, f"{self.name} at {endpoint.url}")

    async def close(self) -> None:
        """Closes the connections."""
        await self._endpoint.close()

    async def ask(
        self, messages: list[Message], parameters: Mapping[str, Any], metadata: dict[str, Any]
    ) -> tuple[str, str | None]:
        """One reply within the cost limit, and why it ended.

        Args:
            messages: the chat.
            parameters: of the request, `max_tokens` among them; those that the model refuses are
                renamed or left out.
            metadata: what the reply says of itself is added to it.

        Raises:
            NoReplyError: there is none for this chat.
            ChatBindError: there will be none for any chat.
        """
        prompt_tokens = message_tokens(messages, self.count)
        # No tokenizer makes more tokens of a request than it has bytes.
        most = len(json.dumps([messages, parameters]))
        async with self.budget.request(most, parameters["max_tokens"]):
            await self._tokens.acquire(prompt_tokens + self._reply_tokens)
            completion = await self._complete(messages, parameters)
            self._failures_in_row = 0
            return self._read(completion, prompt_tokens, metadata, batch=False)

    def request(self, messages: list[Message], parameters: Mapping[str, Any]) -> Record:
        """What is sent: of the parameters those that the model takes, as it calls them."""
        named = ((self._renamed.get(name, name), value) for name, value in parameters.items())
        taken = {name: value for name, value in named if name is not None}
        return {"model": self.name, "messages": messages, **taken}

    async def _complete(self, messages: list[Message], parameters: Mapping[str, Any]) -> Record:
        """The completion of a chat, a JSON object with a message in its first choice."""
        while True:
            sent = self.request(messages, parameters)
            try:
                completion: Record = await self._endpoint.post("/chat/completions", sent)
            except openai.APIError as error:
                refusal = ""
                if isinstance(error, openai.APIStatusError) and error.status_code in _REFUSED:
                    refusal = f"{error} {error.response.text}"
                # Of many requests under way the first that is refused changes all of them.
                changed = refusal and self.request(messages, parameters) != sent
                if not changed and not self._adapt(refusal, sent):
                    # without its cause: a server's own words may hold the key
                    raise self._failure(error) from None
            else:
                return completion

    def settle(self, reply: Reply, sent: Record, names: Collection[str]) -> Settled | None:
        """Reads a reply of a batch, and books what it cost.

        It is None where the model refuses one of the parameters (their `names` when the request
        was sent; `sent` is what would go out now), and another request is to take its place.
        """
        if reply.status in _REFUSED and self._adapt(json.dumps(reply.body), names):
            return None
        about: dict[str, Any] = {"batch": reply.batch}
        if reply.status != _GOOD or not _is_chat(reply.body):
            said = f"{reply.status or 'not sent'} {json.dumps(reply.body.get('error'))}"
            words = reason(Exception(self._writable(said)))
            return Settled(about, error=f"the batch has no reply to this: {words}")
        prompt_tokens = message_tokens(sent["messages"], self.count)
        text, _ = self._read(reply.body, prompt_tokens, about, batch=True)
        return Settled(about, text)

    def _read(
        self, completion: Record, prompt_tokens: int, metadata: dict[str, Any], *, batch: bool
    ) -> tuple[str, str | None]:
        """The reply's text, and why it ended; its tokens are paid for."""
        choice = completion["choices"][0]
        message = choice["message"]
        text = self._writable(message.get("content") or message.get("refusal"))
        metadata["model"] = self._writable(completion.get("model"))
        metadata["created"] = _whole(completion.get("created")) or int(time.time())
        usage = completion.get("usage")
        usage = usage if isinstance(usage, dict) else {}
        used = {key: _whole(usage.get(key)) for key in ("prompt_tokens", "completion_tokens")}
        if used["prompt_tokens"]:
            for key, tokens in used.items():
                metadata[key] = metadata.get(key, 0) + tokens
        else:
            used = {"prompt_tokens": prompt_tokens, "completion_tokens": self.count(text)}
        self._reply_tokens = used["completion_tokens"]
        cost = self.budget.pay(**used, share=SHARE_OF_BATCHES if batch else 1.0)
        if self.price is not None:
            metadata["cost_usd"] = round(metadata.get("cost_usd", 0.0) + cost, 8)
        return text, choice.get("finish_reason")

    def _adapt(self, refusal: str, sent: Collection[str]) -> bool:
        """Renames or drops a parameter that the model refuses; False if that is not the matter."""
        if "max_completion_tokens" in refusal and "max_tokens" in sent:
            self._renamed["max_tokens"] = "max_completion_tokens"
            return True
        for name, marks in (
            ("response_format", ("response_format", "json_schema", "structured output", "grammar")),
            ("temperature", ("temperature",)),
        ):
            if name in sent and any(mark in refusal for mark in marks):
                self._renamed[name] = None
                return True
        return False

    def _failure(self, error: openai.APIError) -> Exception:
        """The failure of this chat, or of every chat where none can get past the error."""
        text = self._endpoint.in_words(error)
        hint = self._fatal(error)
        if hint is None:
            attempts = 1 + int(error.request.headers.get("x-stainless-retry-count", 0))
            text = f"{text} ({attempts} attempts)"
            self._failures_in_row += 1
            if self._failures_in_row < _FAILURES_THAT_STOP:
                return NoReplyError(text)
            text = f"{self._failures_in_row} requests in a row failed, the last with {text}"
            hint = (
                f"what is {self._role.done} is on disk; run the same command again to go on (where "
                "the endpoint refuses some, with a lower --concurrency or --requests-per-minute)"
            )
        return self._role.error(text, where=f"{self.name} at {self._endpoint.url}", hint=hint)

    def _fatal(self, error: openai.APIError) -> str | None:
        """What to do about an error that no chat gets past; None where it is not one."""
        if error.code == "insufficient_quota":
            return "the account has no quota left"
        if isinstance(error, openai.AuthenticationError):
            return f"check the key in {KEY_VARIABLE}"
        if isinstance(error, openai.PermissionDeniedError):
            return "the key may not use this model"
        if isinstance(error, openai.NotFoundError):
            return f"check --{self._role.name}-model and --{self._role.name}-url"
        return None

    def _writable(self, text: object) -> str:
        """The server's words without the key, without halves of characters, and not without end."""
        words = self._endpoint.without_key(str(text or "")[:_LONGEST_REPLY])
        return words.encode("utf-8", "replace").decode("utf-8")


def _is_chat(value: Any) -> bool:
    """Whether it is a chat completion with a message in its first choice."""
    try:
        return isinstance(value["choices"][0]["message"], dict)
    except (TypeError, LookupError):
        return False


def _refuse_what_is_no_chat(value: Any) -> None:
    if not _is_chat(value):
        raise ValueError("the reply is not a chat completion")


def _whole(value: object) -> int:
    """A count that a server sent; 0 if it is none."""
    return value if type(value) is int and 0 <= value < _MOST_TOKENS else 0
