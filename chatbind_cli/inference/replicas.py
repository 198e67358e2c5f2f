"""Engines over HTTP that serve one model: who is asked next, and who is left out.

Each is known by its answer to the model's probe before it is asked anything else, and again after
a failure. What cannot be asked any more is left out, and its questions go to the others.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, TypeVar

import httpx
import openai

from chatbind_cli.console import note
from chatbind_cli.endpoint import Endpoint
from chatbind_cli.errors import EngineError, RecordError
from chatbind_cli.inference.completion import Answered, BadReplyError, answers_in, piece_of
from chatbind_cli.jsonl import Record
from chatbind_cli.model.probe import Step, difference
from chatbind_cli.urls import check_url

KEY_VARIABLE: Final = "CHATBIND_ENGINE_KEY"

_TIMEOUT_S = 1800.0  # of one answer, those before it in a full server's queue included
_RETRIES = 2
_LARGEST_REPLY = 64 << 20
_TRIES = 3  # of a question, on whatever replica: then it is the question
_MOST_CONTEXT = 1 << 24
_ALL_LEFT = "no engine is left; what is answered stays, and the same command goes on with the rest"
# a request that will not be better received elsewhere, or later
_REFUSED = (400, 413, 422)

T = TypeVar("T")


class Replica:
    """One engine.

    Attributes:
        url: as messages may show it.
        load: requests that it has at the moment.
        problem: why it is not asked any more.
        longest_context: tokens of prompt and answer together, if it says so.
    """

    def __init__(self, url: str, key: str) -> None:
        check_url(url)
        self._endpoint = Endpoint(
            url.rstrip("/"),
            key=key,
            timeout_s=_TIMEOUT_S,
            retries=_RETRIES,
            largest_reply=_LARGEST_REPLY,
            refuse=_refuse_no_object,
        )
        self.url = self._endpoint.url.rstrip("/")
        self.load = 0
        self.problem: str | None = None
        self.longest_context: int | None = None
        self._model = ""
        self._known_at = -1.0
        self._checking = asyncio.Lock()

    async def check(self, probe: Record, expected: Sequence[Step], since: float) -> None:
        """Asks the probe, unless it was answered after `since`; a `problem` is what is wrong.

        Raises:
            EngineError: it serves another model.
        """
        async with self._checking:
            if self.problem is not None or self._known_at >= since:
                return
            try:
                await self._find_model()
                [answer] = answers_in(await self._post(probe), probe)
            except (openai.APIError, BadReplyError) as error:
                self.problem = self.in_words(error)
                return
            unlike = difference(expected, answer.ids, answer.logprobs)
            if unlike is not None:
                raise EngineError(
                    f"serves another model ({unlike})",
                    where=self.url,
                    hint="it must serve what `chatbind convert --language-model` made of -m",
                )
            self._known_at = time.monotonic()

    async def _find_model(self) -> None:
        """Reads what it serves."""
        told = await self._endpoint.get("/models")
        models = told.get("data") if isinstance(told, dict) else None
        model = models[0] if isinstance(models, list) and models else None
        if not isinstance(model, dict) or not isinstance(model.get("id"), str):
            raise BadReplyError("it names no model")
        self._model = model["id"]
        longest = model.get("max_model_len")
        if type(longest) is int and 0 < longest < _MOST_CONTEXT:
            self.longest_context = longest

    async def _post(self, body: Record) -> Any:
        return await self._endpoint.post("/completions", {"model": self._model, **body})

    async def answers(self, body: Record) -> list[Answered]:
        """The answers to a request.

        Raises:
            openai.APIError: there are none.
            BadReplyError: what came is none.
        """
        return answers_in(await self._post(body), body)

    async def growing(self, body: Record, show: Callable[[list[int]], None]) -> Answered:
        """The answer to a request; `show` is called with its tokens so far, with every few more.

        Raises:
            openai.APIError: there is none.
            httpx.HTTPError: it broke off.
            BadReplyError: what came is none.
        """
        whole, ended = Answered([], []), False
        async for event in self._endpoint.stream("/completions", {"model": self._model, **body}):
            choices = event.get("choices") if isinstance(event, dict) else None
            if choices == []:  # what it says of tokens used
                continue
            if not isinstance(choices, list) or not isinstance(choices[0], dict):
                raise BadReplyError("a piece of it is none")
            piece = piece_of(choices[0], body)
            whole.ids.extend(piece.ids)
            whole.logprobs.extend(piece.logprobs)
            if len(whole.ids) > body["max_tokens"]:
                raise BadReplyError("it has more tokens than were wanted")
            show(whole.ids)
            ended = ended or choices[0].get("finish_reason") is not None
        if not ended:
            raise BadReplyError("it ends in the middle")
        return whole

    async def close(self) -> None:
        """Closes the connections."""
        await self._endpoint.close()

    def in_words(self, error: Exception) -> str:
        """An error on one line, without the key."""
        if isinstance(error, BadReplyError):
            return f"a reply that cannot be read ({error})"
        return self._endpoint.in_words(error)


class Replicas:
    """Engines that serve one model.

    Args:
        urls: their addresses, each ending in `/v1`.
        key: what they want to see; empty where they want none.
        probe: the request for the model's probe.
        expected: its answer.

    Raises:
        UsageError: an address is none.
    """

    def __init__(
        self, urls: Sequence[str], *, key: str, probe: Record, expected: Sequence[Step]
    ) -> None:
        self._all = [Replica(url, key) for url in dict.fromkeys(urls)]
        self._probe = probe
        self._expected = expected
        self._told: set[str] = set()

    @property
    def longest_context(self) -> int | None:
        """Tokens of prompt and answer together that all have room for, if they say so."""
        known = [r.longest_context for r in self._alive() if r.longest_context is not None]
        return min(known, default=None)

    def _alive(self) -> list[Replica]:
        return [replica for replica in self._all if replica.problem is None]

    async def connect(self) -> None:
        """Finds out who is there, and has the model.

        Raises:
            EngineError: nobody is there, or one serves another model.
        """
        checks = [replica.check(self._probe, self._expected, 0.0) for replica in self._all]
        await asyncio.gather(*checks)
        self._tell("is the server up, and does its address end in /v1?")

    def _tell(self, hint: str = _ALL_LEFT) -> None:
        """Says once who is left out.

        Raises:
            NoEngineLeftError: all are.
        """
        alive = self._alive()
        for replica in self._all:
            if replica.problem is not None and alive and replica.url not in self._told:
                self._told.add(replica.url)
                note(f"{replica.url} is left out: {replica.problem}")
        if not alive:
            last = self._all[-1]
            raise NoEngineLeftError(last.problem or "", where=last.url, hint=hint)

    async def ask(self, call: Callable[[Replica], Awaitable[T]]) -> T:
        """What `call` makes of the replica that has least to do, or of another if that fails.

        Raises:
            RecordError: the engine refuses the request.
            NoEngineLeftError: nobody can be asked any more.
            EngineError: it failed too often.
        """
        for left in reversed(range(_TRIES)):
            self._tell()
            replica = min(self._alive(), key=lambda replica: replica.load)
            sent = time.monotonic()
            replica.load += 1
            try:
                return await call(replica)
            except (openai.APIError, httpx.HTTPError, BadReplyError) as error:
                said = replica.in_words(error)
                if isinstance(error, openai.APIStatusError) and error.status_code in _REFUSED:
                    raise RecordError(f"the engine refuses it ({said})") from None
            finally:
                replica.load -= 1
            # where the replica has died with it, that is told, and not the question's fault
            await self._look_at(replica, sent)
            self._tell()
            if not left:
                raise EngineError(f"failed {_TRIES} times, the last with {said}") from None
        raise AssertionError

    async def _look_at(self, replica: Replica, since: float) -> None:
        try:
            await replica.check(self._probe, self._expected, since)
        except EngineError as error:  # it was restarted with another
            replica.problem = error.what

    async def close(self) -> None:
        """Closes the connections."""
        for replica in self._all:
            await replica.close()


class NoEngineLeftError(EngineError):
    """Nobody can be asked any more."""


def _refuse_no_object(value: Any) -> None:
    if not isinstance(value, dict):
        raise ValueError("the reply is no JSON object")
