"""The judge that is a chat model behind an endpoint.

One question, and one more with the form repeated if the scores cannot be read; after that it is a
failed verdict with all that was said. What no case can get past (a wrong key, a model that is not
there, an empty purse, a cost limit) stops the run.
"""

from __future__ import annotations

import json
import time
from typing import Any

from chatbind_cli.errors import JudgeError, UsageError
from chatbind_cli.evaluation.cases import Case, digest
from chatbind_cli.evaluation.judges.cost import (
    FREE,
    Budget,
    counter_for,
    find_price,
    message_tokens,
)
from chatbind_cli.evaluation.judges.endpoint import Endpoint, NoReplyError
from chatbind_cli.evaluation.judges.judge import Judge, JudgeSettings, Verdict
from chatbind_cli.evaluation.judges.reply import UnreadableScores, in_text_form, read_scores
from chatbind_cli.evaluation.prompts import VERSION, Message, Rules, ask_again, build_messages
from chatbind_cli.jsonl import Record

DEFAULT_MODEL = "gpt-4o"
_LONGEST_REVIEW = 100_000
_MOST_TOKENS = 1 << 31
# So many failures in a row, without one judgement between them, are the server's and not a case's.
_FAILURES_THAT_STOP = 8


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
        self._rules = Rules(settings.rules)
        self._settings = settings
        self._endpoint = Endpoint(settings, self.name)
        self.sending = self._endpoint.sending
        self._failures_in_row = 0

    def judge_hash(self, case: Case) -> str:
        """Changes with the rule, the context, the model's name and how it is asked."""
        settings = self._settings
        asked = [self.name, settings.temperature, settings.max_tokens, settings.structured]
        rule = self._rules.find(case)
        return digest(f"chat-{VERSION}", rule.fingerprint, case.context, asked)

    def expected_tokens(self, case: Case) -> tuple[int, int]:
        """Tokens of the prompt for a case, and the most that the reply may have."""
        messages = build_messages(case, self._rules.find(case))
        return message_tokens(messages, self._count), self._settings.max_tokens

    async def judge(self, case: Case, *, swapped: bool) -> Verdict:
        """Asks for the scores, and once more if they cannot be read."""
        rule = self._rules.find(case)
        messages = build_messages(case, rule, swapped=swapped)
        metadata: dict[str, Any] = {"rule": rule.fingerprint}
        said: list[str] = []
        error = ""
        for again in (False, True):
            try:
                reply = await self._ask(messages, metadata, structured=not again)
                scores = read_scores(reply)
            except NoReplyError as failure:
                error = str(failure)
                break
            except UnreadableScores as failure:
                error = f"the scores cannot be read: {failure}"
                said.append(reply)
                messages = ask_again(messages, reply)
                continue
            said.append(in_text_form(reply))
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
        most = len(json.dumps([messages, self._endpoint.parameters]))
        async with self.budget.request(most, self._settings.max_tokens):
            try:
                completion = await self._endpoint.complete(
                    messages, prompt_tokens=prompt_tokens, structured=structured
                )
            except NoReplyError as error:
                self._stop_after_many(str(error))
                raise
            self._failures_in_row = 0
            return self._read(completion, prompt_tokens, metadata)

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
        self._endpoint.used(used["completion_tokens"])
        cost = self.budget.pay(**used)
        if self.price is not None:
            metadata["cost_usd"] = round(metadata.get("cost_usd", 0.0) + cost, 8)
        return text

    def _stop_after_many(self, error: str) -> None:
        """Ends the run where nothing but failures comes back."""
        self._failures_in_row += 1
        if self._failures_in_row >= _FAILURES_THAT_STOP:
            raise JudgeError(
                f"{self._failures_in_row} requests in a row failed, the last with {error}",
                where=self._endpoint.where,
                hint="what is judged is on disk; run the same command again to go on (where the "
                "endpoint refuses some, with a lower --concurrency or --requests-per-minute)",
            ) from None

    def _writable(self, text: object) -> str:
        """The server's words without the key, without halves of characters, and not without end."""
        words = self._endpoint.without_key(str(text or "")[:_LONGEST_REVIEW])
        return words.encode("utf-8", "replace").decode("utf-8")


def _whole(value: object) -> int:
    """A count that a server sent; 0 if it is none."""
    return value if type(value) is int and 0 <= value < _MOST_TOKENS else 0
