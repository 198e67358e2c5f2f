"""The judge that is a chat model behind an OpenAI-compatible endpoint.

One question, and one more with the form repeated if the scores cannot be read; after that it is a
failed verdict with all that was said. A judge whose scores can never be read stops the run.
"""

from __future__ import annotations

import json
import os
from typing import Any

from chatbind_cli.cost import USUAL_REVIEW_TOKENS, message_tokens
from chatbind_cli.errors import JudgeError, reason
from chatbind_cli.evaluation.cases import Case, Judgement, digest
from chatbind_cli.evaluation.judges.judge import JUDGE, Judge, JudgeSettings, Verdict
from chatbind_cli.evaluation.judges.reply import UnreadableScores, read_review, response_format
from chatbind_cli.evaluation.prompts import (
    VERSION,
    ask_again,
    build_messages,
    find_rule,
    fingerprint,
    read_rules,
)
from chatbind_cli.files import sha256_text
from chatbind_cli.hosted import Message
from chatbind_cli.hosted_model import HostedModel, NoReplyError, Settled
from chatbind_cli.jsonl import Record

DEFAULT_MODEL = "gpt-4o"
# So many judgements in a row without readable scores are the judge's and not a case's.
_UNREADABLE_THAT_STOP = 20
_NO_REPLY = Settled({}, error="the batch has no reply to this")


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
        self.model = HostedModel(
            self.name, settings, JUDGE, usual_tokens=USUAL_REVIEW_TOKENS, spent_usd=spent_usd
        )
        self.price, self.counted_by = self.model.price, self.model.counted_by
        self.sending = self.model.sending
        self._rules = None if settings.rules is None else read_rules(settings.rules)
        self._settings = settings
        self._parameters: dict[str, Any] = {
            "temperature": settings.temperature,
            "max_tokens": settings.max_tokens,
        }
        self.batched: dict[str, Settled] | None = None
        self._unreadable = 0
        self._last_words = ""

    def judge_hash(self, case: Case) -> str:
        """Changes with the rule, the context, the model's name and how it is asked."""
        settings = self._settings
        asked = [self.name, settings.temperature, settings.max_tokens, settings.structured]
        rule = fingerprint(find_rule(case, self._rules))
        shown = [case.context, case.references] if case.single else case.context
        return digest(f"chat-{VERSION}", rule, shown, asked)

    def cache_key(self, judgement: Judgement) -> str:
        """Follows every word that is sent, and to where."""
        settings = self._settings
        messages = self._messages(judgement)
        where = settings.url or os.environ.get("OPENAI_BASE_URL")
        asked = [self.name, where, settings.temperature, settings.max_tokens, settings.structured]
        return sha256_text(json.dumps([VERSION, messages, asked, judgement.sample]))

    def expected_tokens(self, case: Case) -> tuple[int, int]:
        """Tokens of the prompt for a case, and the most that the reply may have."""
        messages = build_messages(case, find_rule(case, self._rules))
        return message_tokens(messages, self.model.count), self._settings.max_tokens

    def first_request(self, judgement: Judgement) -> Record:
        """What is sent first, as far as is known what the model takes."""
        asked = self._asked(judgement.case, again=False)
        return self.model.request(self._messages(judgement), asked)

    def _messages(self, judgement: Judgement) -> list[Message]:
        rule = find_rule(judgement.case, self._rules)
        return build_messages(judgement.case, rule, swapped=judgement.swapped)

    def _asked(self, case: Case, *, again: bool) -> dict[str, Any]:
        if self._settings.structured != "auto" or again:
            return self._parameters
        return {**self._parameters, "response_format": response_format(single=case.single)}

    async def judge(self, judgement: Judgement) -> Verdict:
        """Asks for the scores, and once more if they cannot be read.

        Where there are replies of batches (`batched`, by `cache_key`), theirs is the first one.

        Raises:
            JudgeError: no case can be judged, or none of the last ones could be read.
        """
        if self._unreadable >= _UNREADABLE_THAT_STOP:
            # here, and not where the last of them failed: that one is paid for, and written
            raise JudgeError(
                f"{self._unreadable} judgements in a row have no readable scores; the last words: "
                f"{self._last_words!r}",
                where=self.name,
                hint="what is judged is on disk; give another --judge-model or --rule, or more "
                "--max-tokens",
            )
        case, messages = judgement.case, self._messages(judgement)
        metadata: dict[str, Any] = {"rule": fingerprint(find_rule(case, self._rules))}
        said: list[str] = []
        error = ""
        for again in (False, True):
            try:
                if self.batched is not None and not again:
                    settled = self.batched.get(self.cache_key(judgement), _NO_REPLY)
                    metadata |= settled.metadata
                    if settled.error:
                        raise NoReplyError(settled.error)
                    reply = settled.text
                else:
                    asked = self._asked(case, again=again)
                    reply, _ = await self.model.ask(messages, asked, metadata)
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
            self._unreadable = 0
            return Verdict(
                scores=scores[::-1] if judgement.swapped else scores,
                content="\n\n".join(said),
                metadata=metadata,
            )
        if len(said) > 1:
            self._unreadable, self._last_words = self._unreadable + 1, reason(Exception(said[-1]))
        return Verdict(content="\n\n".join(said), error=error, metadata=metadata)

    async def close(self) -> None:
        """Closes the connections."""
        await self.model.close()
