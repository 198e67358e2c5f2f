"""The judge that is a chat model behind an OpenAI-compatible endpoint.

One question, and one more with the form repeated if the scores cannot be read; after that it is a
failed verdict with all that was said. What no case can get past (a wrong key, a model that is not
there, an empty purse, a cost limit) stops the run. The key comes from the environment alone and
appears in no message.
"""

from __future__ import annotations

import json
import os
import time
from typing import Any

import openai

from chatbind_cli.endpoint import Endpoint, RateLimit
from chatbind_cli.errors import JudgeError, UsageError
from chatbind_cli.evaluation.cases import Case, digest
from chatbind_cli.evaluation.judges.cost import (
    FREE,
    USUAL_REVIEW_TOKENS,
    Budget,
    counter_for,
    find_price,
    message_tokens,
)
from chatbind_cli.evaluation.judges.judge import KEY_VARIABLE, Judge, JudgeSettings, Verdict
from chatbind_cli.evaluation.judges.reply import UnreadableScores, read_review, schema
from chatbind_cli.evaluation.prompts import (
    VERSION,
    Message,
    ask_again,
    build_messages,
    find_rule,
    fingerprint,
    read_rules,
)
from chatbind_cli.files import sha256_text
from chatbind_cli.jsonl import Record

DEFAULT_MODEL = "gpt-4o"
_LONGEST_REVIEW = 100_000
_MOST_TOKENS = 1 << 31
# So many failures in a row, without one judgement between them, are the server's and not a case's.
_FAILURES_THAT_STOP = 8
_FORMAT = {
    "type": "json_schema",
    "json_schema": {"name": "review", "strict": True, "schema": schema(single=False)},
}
_FATAL: dict[type[Exception], str] = {
    openai.AuthenticationError: f"check the key in {KEY_VARIABLE}",
    openai.PermissionDeniedError: "the key may not use this model",
    openai.NotFoundError: "check --judge-model and --judge-url",
}


class NoReplyError(Exception):
    """One chat got no reply, after all attempts or at once."""


class ChatJudge(Judge):
    """Asks a chat model for the scores.

    Args:
        settings: which model, and how it is asked.
        spent_usd: what earlier runs paid, for the cost limit.

    Raises:
        UsageError: a limit on the cost without a price.
        RecordError: a rule or price file that cannot be used.
        CheckpointError: there is no such tokenizer.
    """

    def __init__(self, settings: JudgeSettings, *, spent_usd: float = 0.0) -> None:
        self.name = settings.model or DEFAULT_MODEL
        self.price = find_price(self.name, settings.prices)
        if self.price is None and settings.max_cost_usd is not None:
            raise UsageError(
                f"the price of {self.name!r} is not known, so --max-cost cannot be kept",
                hint="give it with --prices",
            )
        self.budget = Budget(self.price or FREE, settings.max_cost_usd, spent_usd)
        self._count, self.counted_by = counter_for(settings.tokenizer)
        self._rules = None if settings.rules is None else read_rules(settings.rules)
        self._settings = settings
        self._endpoint = Endpoint(
            settings.url,
            key=os.environ.get(KEY_VARIABLE, "").strip(),
            timeout_s=settings.timeout_s,
            retries=settings.retries,
            requests_per_minute=settings.requests_per_minute,
            refuse=_refuse_what_is_no_chat,
        )
        self.sending = self._endpoint.sending
        # Some models refuse some of these; what is refused is renamed or left out.
        self._parameters: dict[str, Any] = {
            "temperature": settings.temperature,
            "max_tokens": settings.max_tokens,
        }
        if settings.structured == "auto":
            self._parameters["response_format"] = _FORMAT
        self._tokens = RateLimit(settings.tokens_per_minute)
        self._reply_tokens = USUAL_REVIEW_TOKENS
        self._failures_in_row = 0

    def judge_hash(self, case: Case) -> str:
        """Changes with the rule, the context, the model's name and how it is asked."""
        settings = self._settings
        asked = [self.name, settings.temperature, settings.max_tokens, settings.structured]
        rule = fingerprint(find_rule(case, self._rules))
        shown = [case.context, case.references] if case.single else case.context
        return digest(f"chat-{VERSION}", rule, shown, asked)

    def cache_key(self, case: Case, *, swapped: bool, sample: int) -> str:
        """Follows every word that is sent, and to where."""
        settings = self._settings
        messages = build_messages(case, find_rule(case, self._rules), swapped=swapped)
        where = settings.url or os.environ.get("OPENAI_BASE_URL")
        asked = [self.name, where, settings.temperature, settings.max_tokens, settings.structured]
        return sha256_text(json.dumps([VERSION, messages, asked, sample]))

    def expected_tokens(self, case: Case) -> tuple[int, int]:
        """Tokens of the prompt for a case, and the most that the reply may have."""
        messages = build_messages(case, find_rule(case, self._rules))
        return message_tokens(messages, self._count), self._settings.max_tokens

    async def judge(self, case: Case, *, swapped: bool) -> Verdict:
        """Asks for the scores, and once more if they cannot be read."""
        rule = find_rule(case, self._rules)
        messages = build_messages(case, rule, swapped=swapped)
        metadata: dict[str, Any] = {"rule": fingerprint(rule)}
        said: list[str] = []
        error = ""
        for again in (False, True):
            try:
                reply = await self._ask(messages, metadata, structured=not again)
                scores, readable = read_review(reply, single=case.single)
            except NoReplyError as failure:
                error = str(failure)
                break
            except UnreadableScores as failure:
                error = f"the scores cannot be read: {failure}"
                said.append(reply)
                messages = ask_again(messages, reply, single=case.single)
                continue
            said.append(readable)
            if again:
                metadata["asked_again"] = True
            return Verdict(
                scores=scores[::-1] if swapped else scores,
                content="\n\n".join(said),
                metadata=metadata,
            )
        return Verdict(content="\n\n".join(said), error=error, metadata=metadata)

    async def close(self) -> None:
        """Closes the connections."""
        await self._endpoint.close()

    async def _ask(
        self, messages: list[Message], metadata: dict[str, Any], *, structured: bool
    ) -> str:
        """One reply within the cost limit; what it says of itself goes to the metadata."""
        prompt_tokens = message_tokens(messages, self._count)
        # No tokenizer makes more tokens of a request than it has bytes.
        most = len(json.dumps([messages, self._parameters]))
        async with self.budget.request(most, self._settings.max_tokens):
            await self._tokens.acquire(prompt_tokens + self._reply_tokens)
            completion = await self._complete(messages, structured=structured)
            self._failures_in_row = 0
            return self._read(completion, prompt_tokens, metadata)

    async def _complete(self, messages: list[Message], *, structured: bool) -> Record:
        """The completion of a chat, a JSON object with a message in its first choice.

        Raises:
            NoReplyError: there is none for this chat.
            JudgeError: there will be none for any chat.
        """
        while True:
            parameters = dict(self._parameters)
            sent = dict(parameters)
            if not structured:
                sent.pop("response_format", None)
            try:
                completion: Record = await self._endpoint.post(
                    "/chat/completions", {"model": self.name, "messages": messages, **sent}
                )
            except openai.APIError as error:
                if not self._adapt(error, parameters):
                    # without its cause: a server's own words may hold the key
                    raise self._failure(error) from None
            else:
                return completion

    def _read(self, completion: Record, prompt_tokens: int, metadata: dict[str, Any]) -> str:
        """The reply's text; its tokens are paid for."""
        message = completion["choices"][0]["message"]
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
            used = {"prompt_tokens": prompt_tokens, "completion_tokens": self._count(text)}
        self._reply_tokens = used["completion_tokens"]
        cost = self.budget.pay(**used)
        if self.price is not None:
            metadata["cost_usd"] = round(metadata.get("cost_usd", 0.0) + cost, 8)
        return text

    def _adapt(self, error: openai.APIError, sent: dict[str, Any]) -> bool:
        """Renames or drops a parameter that the model refuses; False if that is not the matter.

        Of many requests under way the first that is refused changes the parameters for all.
        """
        if not isinstance(error, openai.APIStatusError):
            return False
        if error.status_code not in (400, 415, 422, 501):
            return False
        if sent != self._parameters:
            return True
        text = f"{error} {error.response.text}"
        if "max_completion_tokens" in text and "max_tokens" in self._parameters:
            self._parameters["max_completion_tokens"] = self._parameters.pop("max_tokens")
            return True
        for name, marks in (
            ("response_format", ("response_format", "json_schema", "structured output", "grammar")),
            ("temperature", ("temperature",)),
        ):
            if name in self._parameters and any(mark in text for mark in marks):
                del self._parameters[name]
                return True
        return False

    def _failure(self, error: openai.APIError) -> Exception:
        """The failure of this chat, or of every chat where none can get past the error."""
        text = self._endpoint.in_words(error)
        hint = _FATAL.get(type(error))
        if error.code == "insufficient_quota":
            hint = "the account has no quota left"
        if hint is None:
            attempts = 1 + int(error.request.headers.get("x-stainless-retry-count", 0))
            text = f"{text} ({attempts} attempts)"
            self._failures_in_row += 1
            if self._failures_in_row < _FAILURES_THAT_STOP:
                return NoReplyError(text)
            text = f"{self._failures_in_row} requests in a row failed, the last with {text}"
            hint = (
                "what is judged is on disk; run the same command again to go on (where the "
                "endpoint refuses some, with a lower --concurrency or --requests-per-minute)"
            )
        where = f"{self.name} at {self._endpoint.url}"
        return JudgeError(text, where=where, hint=hint)

    def _writable(self, text: object) -> str:
        """The server's words without the key, without halves of characters, and not without end."""
        words = self._endpoint.without_key(str(text or "")[:_LONGEST_REVIEW])
        return words.encode("utf-8", "replace").decode("utf-8")


def _refuse_what_is_no_chat(value: Any) -> None:
    try:
        good = isinstance(value["choices"][0]["message"], dict)
    except (TypeError, LookupError):
        good = False
    if not good:
        raise ValueError("the reply is not a chat completion")


def _whole(value: object) -> int:
    """A count that a server sent; 0 if it is none."""
    return value if type(value) is int and 0 <= value < _MOST_TOKENS else 0
