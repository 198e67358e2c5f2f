"""A judge behind any OpenAI-compatible chat endpoint.

Tries again what can pass (a full server, a broken connection, a cut-off reply), a bounded number
of times; stops the run for what cannot (a wrong key, a model that is not there, an empty purse);
and turns the rest into a failed verdict. The key comes from the environment alone and appears in
no message. Knows nothing of files.
"""

from __future__ import annotations

import asyncio
import os
import random
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from chatbind_cli.errors import JudgeError
from chatbind_cli.review.cases import Case, digest
from chatbind_cli.review.judges import Verdict
from chatbind_cli.review.prompts import VERSION, Message, ask_again, build_messages
from chatbind_cli.review.rules import Rule, Rules
from chatbind_cli.review.scores import UnreadableScores, read_scores

if TYPE_CHECKING:
    import openai

DEFAULT_MODEL = "gpt-4o"
KEY_VARIABLE = "OPENAI_API_KEY"

# So many failures in a row, without one judgement between them, are the server's and not a case's.
_FAILURES_THAT_STOP = 8
_SHORT = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatJudgeOptions:
    """How to reach and to ask the judge.

    Attributes:
        model: the model's name at the endpoint.
        base_url: the endpoint, ending in `/v1`; None for OpenAI's own (or `OPENAI_BASE_URL`).
        temperature: 0 for the most likely words.
        max_tokens: most tokens of one review.
        timeout_s: longest wait for one reply.
        retries: further attempts after the first.
        first_wait_s: pause before the second attempt; doubles from attempt to attempt.
        longest_wait_s: longest pause, also where the server asks for a longer one.
    """

    model: str = DEFAULT_MODEL
    base_url: str | None = None
    temperature: float = 0.0
    max_tokens: int = 1024
    timeout_s: float = 120.0
    retries: int = 5
    first_wait_s: float = 1.0
    longest_wait_s: float = 60.0


class _NoReplyError(Exception):
    """One case got no reply, after all attempts or at once."""


class ChatJudge:
    """Asks a chat model for the scores.

    Args:
        rules: what the judge is asked to do.
        options: how to reach it.

    Raises:
        JudgeError: OpenAI's own endpoint is meant, and there is no key.
    """

    def __init__(self, rules: Rules, options: ChatJudgeOptions) -> None:
        import openai

        self.name = options.model
        self._rules = rules
        self._options = options
        self._secret = os.environ.get(KEY_VARIABLE, "")
        if not self._secret and not (options.base_url or os.environ.get("OPENAI_BASE_URL")):
            raise JudgeError(
                f"no API key in {KEY_VARIABLE}",
                hint=f"set {KEY_VARIABLE}, give --judge-url of a local server, or --judge rule",
            )
        self._client = openai.AsyncOpenAI(
            # A local server needs no key, but the client wants one.
            api_key=self._secret or "none",
            base_url=options.base_url,
            timeout=options.timeout_s,
            max_retries=0,
        )
        # Newer models refuse some of these; what is refused is renamed or left out (`_adapt`).
        self._parameters: dict[str, Any] = {
            "temperature": options.temperature,
            "max_tokens": options.max_tokens,
        }
        self._not_before = 0.0  # the loop's time before which the server wants no request
        self._failures_in_row = 0
        self._jitter = random.Random()  # noqa: S311  spreads the load, keeps no secret

    def _rule(self, case: Case) -> Rule:
        with_context = case.context is not None
        return self._rules.find(case.category, case.modality, with_context=with_context)

    def fingerprint(self, case: Case) -> str:
        """Changes with the rule, the context, the model's name and how it is asked."""
        options = asdict(self._options)
        asked = [options[key] for key in ("model", "temperature", "max_tokens")]
        return digest(f"chat-{VERSION}", self._rule(case).fingerprint, case.context, asked)

    async def judge(self, case: Case, *, swapped: bool, sample: int) -> Verdict:
        """Asks for the scores, and once more if they cannot be read."""
        rule = self._rule(case)
        messages = build_messages(case, rule, swapped=swapped)
        metadata: dict[str, Any] = {"rule": rule.fingerprint}
        said: list[str] = []
        problem = ""
        for attempt in range(2):
            try:
                reply = await self._ask(messages, metadata)
            except _NoReplyError as error:
                return Verdict(content="\n\n".join(said), error=str(error), metadata=metadata)
            said.append(reply)
            try:
                scores = read_scores(reply)
            except UnreadableScores as error:
                problem = str(error)
                messages = ask_again(messages, reply)
                continue
            if attempt:
                metadata["asked_again"] = True
            content = "\n\n".join(said)
            return Verdict(
                scores=scores[::-1] if swapped else scores, content=content, metadata=metadata
            )
        error_text = f"the scores cannot be read: {problem}"
        return Verdict(content="\n\n".join(said), error=error_text, metadata=metadata)

    async def close(self) -> None:
        """Closes the connections."""
        await self._client.close()

    async def _ask(self, messages: list[Message], metadata: dict[str, Any]) -> str:
        """One reply, with as many attempts as are allowed.

        Raises:
            _NoReplyError: none came for this case.
            JudgeError: none will come for any case.
        """
        import openai

        attempt = 0
        while True:
            await self._wait_for_server()
            try:
                reply = await self._request(messages, metadata)
            except openai.BadRequestError as error:
                if not self._adapt(error):
                    raise _NoReplyError(self._text(error)) from error
            # A body that is cut off or is no JSON reaches us as ValueError, TypeError or the like.
            except (openai.APIError, ValueError, TypeError, LookupError) as error:
                self._stop_if_hopeless(error)
                if attempt == self._options.retries or not _may_pass(error):
                    raise self._given_up(error, attempt + 1) from error
                self._postpone(error, attempt)
                attempt += 1
            else:
                self._failures_in_row = 0
                return reply

    async def _request(self, messages: list[Message], metadata: dict[str, Any]) -> str:
        parameters: dict[str, Any] = {**self._parameters, "messages": messages}
        completion = await self._client.chat.completions.create(
            model=self._options.model, **parameters
        )
        choices = getattr(completion, "choices", None)
        if not choices or choices[0].message is None:
            raise ValueError("the reply is not a chat completion")
        metadata["model"] = completion.model
        metadata["created"] = completion.created
        if completion.usage is not None:
            for key in ("prompt_tokens", "completion_tokens"):
                metadata[key] = metadata.get(key, 0) + (getattr(completion.usage, key) or 0)
        return choices[0].message.content or ""

    def _adapt(self, error: openai.BadRequestError) -> bool:
        """Renames or drops a parameter that the model refuses; False if that is not the matter."""
        text = str(error)
        if "max_completion_tokens" in text and "max_tokens" in self._parameters:
            self._parameters["max_completion_tokens"] = self._parameters.pop("max_tokens")
            return True
        if "temperature" in text and "temperature" in self._parameters:
            del self._parameters["temperature"]
            return True
        return False

    def _stop_if_hopeless(self, error: Exception) -> None:
        import openai

        hint = None
        if isinstance(error, openai.AuthenticationError):
            hint = f"check the key in {KEY_VARIABLE}"
        elif isinstance(error, openai.PermissionDeniedError):
            hint = "the key may not use this model"
        elif isinstance(error, openai.NotFoundError):
            hint = "check --judge-model and --judge-url"
        elif isinstance(error, openai.RateLimitError) and error.code == "insufficient_quota":
            hint = "the account has no quota left"
        if hint is not None:
            raise JudgeError(self._text(error), where=self._where, hint=hint) from error

    def _given_up(self, error: Exception, attempts: int) -> _NoReplyError:
        """The failure of one case; after several in a row, a `JudgeError` instead."""
        self._failures_in_row += 1
        if self._failures_in_row >= _FAILURES_THAT_STOP:
            raise JudgeError(
                f"{self._failures_in_row} requests in a row failed, the last with "
                f"{self._text(error)}",
                where=self._where,
                hint="what is judged is on disk; run the same command again to go on",
            ) from error
        return _NoReplyError(f"{self._text(error)} ({attempts} attempts)")

    def _postpone(self, error: Exception, attempt: int) -> None:
        """Sets the time before which no request goes out, for all cases in flight."""
        options = self._options
        wait = options.first_wait_s * 2**attempt * self._jitter.uniform(0.5, 1.0)
        wait = min(max(wait, _asked_wait_s(error)), options.longest_wait_s)
        self._not_before = max(self._not_before, asyncio.get_running_loop().time() + wait)

    async def _wait_for_server(self) -> None:
        loop = asyncio.get_running_loop()
        while (wait := self._not_before - loop.time()) > 0:
            await asyncio.sleep(wait)

    @property
    def _where(self) -> str:
        return f"{self._options.model} at {self._client.base_url}"

    def _text(self, error: Exception) -> str:
        """The error on one short line, without the key."""
        import openai

        text = " ".join(str(error).split())
        if isinstance(error, openai.APITimeoutError):
            text = f"no reply within {self._options.timeout_s:g} s"
        elif isinstance(error, openai.APIConnectionError):
            text = f"no connection ({error.__cause__ or error})"
        elif not isinstance(error, openai.APIStatusError):
            text = f"a reply that cannot be read ({text})"
        if self._secret:
            text = text.replace(self._secret, "[key]")
        return text if len(text) <= _SHORT else text[: _SHORT - 3] + "..."


def _may_pass(error: Exception) -> bool:
    """Whether the same request may go well the next time."""
    import openai

    if isinstance(error, openai.APIStatusError):
        return error.status_code in (408, 409, 425, 429) or error.status_code >= 500
    return True


def _asked_wait_s(error: Exception) -> float:
    """The seconds that the server asks to wait, 0 where it does not say."""
    response = getattr(error, "response", None)
    value = response.headers.get("retry-after", "") if response is not None else ""
    try:
        return max(0.0, float(value))
    except ValueError:
        return 0.0
