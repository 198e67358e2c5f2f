"""A judge behind any OpenAI-compatible chat endpoint.

Tries again what can pass (a full server, a broken connection, a cut-off reply), a bounded number
of times; stops the run for what cannot (a wrong key, a model that is not there, an empty purse, a
cost limit); and turns the rest into a failed verdict. The key comes from the environment alone
and appears in no message. Knows nothing of files.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, cast

from chatbind_cli.errors import JudgeError
from chatbind_cli.jsonl import Record
from chatbind_cli.review.asking import NoReplyError, ask_for_scores, find_rule
from chatbind_cli.review.bill import FREE, Bill, Price
from chatbind_cli.review.cases import Case, digest
from chatbind_cli.review.chat_errors import (
    KEY_VARIABLE,
    asked_wait_s,
    hopeless,
    is_too_many,
    may_be_charged,
    may_pass,
    one_line,
    shown_cause,
    without_key,
)
from chatbind_cli.review.judges import Stopped, Verdict
from chatbind_cli.review.pace import Pace
from chatbind_cli.review.prompts import VERSION, Message, build_messages
from chatbind_cli.review.reply import SCHEMA
from chatbind_cli.review.rules import Rules
from chatbind_cli.review.tokens import Counter, estimate, message_tokens, most_tokens

if TYPE_CHECKING:
    import httpx
    import openai

_LARGEST_REPLY = 4 << 20
"""Bytes of a reply, as sent and as unpacked; a long review has a few thousand."""
_LONGEST_REVIEW = 100_000
_MOST_TOKENS = 1 << 31
# So many failures in a row, without one judgement between them, are the server's and not a case's.
_FAILURES_THAT_STOP = 8
_FORMAT = {
    "type": "json_schema",
    "json_schema": {"name": "review", "strict": True, "schema": SCHEMA},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatJudgeOptions:
    """How to reach and to ask the judge.

    Attributes:
        model: the model's name at the endpoint.
        base_url: the endpoint, ending in `/v1`; None for OpenAI's own (or `OPENAI_BASE_URL`).
        temperature: 0 for the most likely words.
        max_tokens: most tokens of one review.
        structured: ask for a JSON object of the scores: where the endpoint takes it, or never.
        timeout_s: longest wait for one reply.
        retries: further attempts after the first.
        first_wait_s: pause before the second attempt; doubles from attempt to attempt.
        longest_wait_s: longest pause, also where the server asks for a longer one.
        concurrency: most requests at a time; fewer while the server refuses some.
        requests_per_minute: the endpoint's limit, None if there is none.
        tokens_per_minute: the same in tokens, sent and received.
        price: what tokens cost.
        max_cost_usd: the line that is not crossed, None for no line.
        spent_usd: what counts as spent when the run starts.
        on_paid: called with each amount as soon as it is paid, in USD.
        count: counts a text's tokens.
    """

    model: str
    base_url: str | None = None
    temperature: float = 0.0
    max_tokens: int = 1024
    structured: Literal["auto", "off"] = "auto"
    timeout_s: float = 120.0
    retries: int = 5
    first_wait_s: float = 1.0
    longest_wait_s: float = 60.0
    concurrency: int = 8
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    price: Price = FREE
    max_cost_usd: float | None = None
    spent_usd: float = 0.0
    on_paid: Callable[[float], None] = lambda usd: None
    count: Counter = field(default=estimate)


class ChatJudge:
    """Asks a chat model for the scores.

    Args:
        rules: what the judge is asked to do.
        options: how to reach it.
        will_ask: whether requests will go out; a plan needs no key.

    Raises:
        JudgeError: OpenAI's own endpoint is meant, and there is no key.
    """

    def __init__(self, rules: Rules, options: ChatJudgeOptions, *, will_ask: bool = True) -> None:
        import openai

        self.name = options.model
        self._rules = rules
        self._options = options
        self._secret = os.environ.get(KEY_VARIABLE, "")
        elsewhere = options.base_url or os.environ.get("OPENAI_BASE_URL")
        if will_ask and not self._secret and not elsewhere:
            raise JudgeError(
                f"no API key in {KEY_VARIABLE}",
                hint=f"set {KEY_VARIABLE}, give --judge-url of a local server, or --judge rule",
            )
        self._client = openai.AsyncOpenAI(
            http_client=cast(Any, _bounded_client()),  # declared as a fork of httpx from 3.0 on
            # A local server needs no key, but the client wants one.
            api_key=self._secret or "none",
            base_url=options.base_url,
            timeout=options.timeout_s,
            max_retries=0,
        )
        # Some models refuse some of these; what is refused is renamed or left out (`_adapt`).
        self._parameters: dict[str, Any] = {
            "temperature": options.temperature,
            "max_tokens": options.max_tokens,
        }
        if options.structured == "auto":
            self._parameters["response_format"] = _FORMAT
        self._pace = Pace(
            requests_per_minute=options.requests_per_minute,
            tokens_per_minute=options.tokens_per_minute,
            most_at_a_time=options.concurrency,
        )
        self._bill = Bill(
            options.price,
            limit_usd=options.max_cost_usd,
            spent_usd=options.spent_usd,
            on_paid=options.on_paid,
        )
        self._failures_in_row = 0
        self._jitter = random.Random()  # noqa: S311  spreads the load, keeps no secret

    @property
    def spent_usd(self) -> float:
        """What has been spent, `options.spent_usd` included."""
        return self._bill.spent_usd

    def fingerprint(self, case: Case) -> str:
        """Changes with the rule, the context, the model's name and how it is asked."""
        options = self._options
        asked = [options.model, options.temperature, options.max_tokens, options.structured]
        rule = find_rule(self._rules, case)
        return digest(f"chat-{VERSION}", rule.fingerprint, case.context, asked)

    async def judge(self, case: Case, *, swapped: bool, sample: int) -> Verdict:
        """Asks for the scores, and once more if they cannot be read."""
        rule = find_rule(self._rules, case)
        return await ask_for_scores(self._ask, case, rule, swapped=swapped)

    def expected_tokens(self, case: Case) -> tuple[int, int]:
        """Tokens of the prompt for a case, and the most that the reply may have."""
        messages = build_messages(case, find_rule(self._rules, case))
        return message_tokens(messages, self._options.count), self._options.max_tokens

    def stop(self) -> None:
        """Sends no more requests; those under way may finish."""
        self._pace.stop()

    async def close(self) -> None:
        """Closes the connections."""
        await self._client.close()

    async def _ask(self, messages: list[Message], metadata: dict[str, Any], again: bool) -> str:
        """One reply, with as many attempts as are allowed.

        Raises:
            NoReplyError: none came for this case.
            JudgeError: none will come for any case.
            Stopped: the run ends.
        """
        import openai

        attempt = 0
        while True:
            sent = dict(self._parameters)
            try:
                reply = await self._attempt(messages, metadata, again)
            except (JudgeError, Stopped):
                raise
            # A body that is cut off or is no JSON reaches us as ValueError, TypeError or the like.
            except Exception as error:
                if isinstance(error, openai.APIStatusError) and self._adapt(error, sent):
                    continue
                await self._after(error, attempt)
            else:
                self._failures_in_row = 0
                return reply
            attempt += 1

    async def _attempt(self, messages: list[Message], metadata: dict[str, Any], again: bool) -> str:
        """One request, in its turn and within the cost limit."""
        import openai

        options = self._options
        prompt = message_tokens(messages, options.count)
        beside = json.dumps(self._parameters.get("response_format", ""))
        most = most_tokens(messages, beside=beside)
        reserved = await self._bill.reserve(most, options.max_tokens)
        charged, good, unused, entered = False, False, 0, None
        try:
            entered = await self._pace.enter(prompt + options.max_tokens)
            charged = True  # unless the server says that it refused
            reply, usage = await self._request(messages, metadata, again)
            charged, good = False, True
            unused = prompt + options.max_tokens - sum(usage)
            self._bill.learn(most, usage[0])
            cost = self._bill.settle(reserved, *usage)
            reserved = 0.0
            if options.price is not FREE:
                metadata["cost_usd"] = round(metadata.get("cost_usd", 0.0) + cost, 8)
            return reply
        except openai.APIError as error:
            charged = may_be_charged(error)
            unused = 0 if charged else prompt + options.max_tokens
            if entered is not None and is_too_many(error):
                self._pace.too_many(entered, min(asked_wait_s(error), options.longest_wait_s))
            raise
        finally:
            if reserved:
                self._bill.release(reserved, charged=charged)
                if charged:
                    metadata["lost_usd"] = round(metadata.get("lost_usd", 0.0) + reserved, 8)
            if entered is not None:
                self._pace.leave(unused_tokens=unused, good=good)

    async def _request(
        self, messages: list[Message], metadata: dict[str, Any], again: bool
    ) -> tuple[str, tuple[int, int]]:
        """The reply's text, and the tokens of prompt and reply."""
        parameters: dict[str, Any] = {**self._parameters, "messages": messages}
        if again:
            parameters.pop("response_format", None)  # the object did not help the first time
        # The client's own limit is on each wait for more, and a reply may come byte by byte.
        async with asyncio.timeout(self._options.timeout_s):
            reply = await self._client.chat.completions.with_raw_response.create(
                model=self._options.model, **parameters
            )
        completion = _decoded(reply.content)  # the client's own models take 200 x the memory
        choices = completion.get("choices")
        first = choices[0] if isinstance(choices, list) and choices else None
        message = _object(first).get("message")
        if not isinstance(message, dict):
            raise ValueError("the reply is not a chat completion")
        text = self._writable(str(message.get("content") or message.get("refusal") or ""))
        metadata["model"] = self._writable(str(completion.get("model") or ""))
        metadata["created"] = _number(completion.get("created")) or int(time.time())
        usage = _object(completion.get("usage"))
        counted = _number(usage.get("prompt_tokens")), _number(usage.get("completion_tokens"))
        if not counted[0]:
            return text, (message_tokens(messages, self._options.count), self._options.count(text))
        for key, tokens in zip(("prompt_tokens", "completion_tokens"), counted, strict=True):
            metadata[key] = metadata.get(key, 0) + tokens
        return text, counted

    def _writable(self, text: str) -> str:
        """The server's words without the key, without halves of characters, and not without end."""
        return (
            without_key(text[:_LONGEST_REVIEW], self._secret)
            .encode("utf-8", "replace")
            .decode("utf-8")
        )

    def _adapt(self, error: openai.APIStatusError, sent: dict[str, Any]) -> bool:
        """Renames or drops a parameter that the model refuses; False if that is not the matter.

        Of many requests under way the first that is refused changes the parameters for all.
        """
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

    async def _after(self, error: Exception, attempt: int) -> None:
        """Waits before the next attempt, if there is to be one.

        Raises:
            NoReplyError: this case has had its attempts.
            JudgeError: no case will get a reply.
        """
        hint = hopeless(error)
        if hint is not None:
            cause = shown_cause(error, secret=self._secret)
            raise JudgeError(self._text(error), where=self._where, hint=hint) from cause
        if attempt == self._options.retries or not may_pass(error):
            cause = shown_cause(error, secret=self._secret)
            raise self._given_up(error, attempt + 1) from cause
        options = self._options
        wait = options.first_wait_s * 2**attempt * self._jitter.uniform(0.5, 1.0)
        await self._pace.rest(min(wait, options.longest_wait_s))

    def _given_up(self, error: Exception, attempts: int) -> Exception:
        """The failure of one case; after several in a row, a `JudgeError` instead."""
        self._failures_in_row += 1
        if self._failures_in_row >= _FAILURES_THAT_STOP:
            return JudgeError(
                f"{self._failures_in_row} requests in a row failed, the last with "
                f"{self._text(error)}",
                where=self._where,
                hint="what is judged is on disk; run the same command again to go on",
            )
        return NoReplyError(f"{self._text(error)} ({attempts} attempts)")

    @property
    def _where(self) -> str:
        url = self._client.base_url.copy_with(userinfo=b"")  # a password may stand in it
        return f"{self._options.model} at {url}"

    def _text(self, error: Exception) -> str:
        return one_line(error, secret=self._secret, timeout_s=self._options.timeout_s)


def _bounded_client() -> httpx.AsyncClient:
    """Asks for replies as they are, and reads no more of one than it may have."""
    import httpx

    return httpx.AsyncClient(
        headers={"Accept-Encoding": "identity"},
        follow_redirects=True,
        event_hooks={"response": [_read_bounded]},
        limits=httpx.Limits(max_connections=None),  # `Pace` says how many
    )


async def _read_bounded(response: httpx.Response) -> None:
    """Reads the body before the client does, and unpacks it, if need be, no further than it may go.

    Raises:
        ValueError: it is too large, or packed in a way that was not asked for.
    """
    import httpx

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
    response.stream = httpx.ByteStream(bytes(body))


def _decoded(content: bytes) -> Record:
    try:
        return _object(json.loads(content))
    except (ValueError, RecursionError) as error:
        raise ValueError("the reply is not JSON") from error


def _object(value: object) -> Record:
    """A JSON object that a server sent; empty if it is none."""
    return value if isinstance(value, dict) else {}


def _number(value: object) -> int:
    """A count that a server sent; 0 if it is none."""
    return value if type(value) is int and 0 <= value < _MOST_TOKENS else 0
