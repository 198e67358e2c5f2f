"""What every judge has in common, and the judge that needs no network."""

from __future__ import annotations

import asyncio
import os
from abc import ABC, abstractmethod
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from chatbind_cli.cost import FREE, Price
from chatbind_cli.errors import JudgeError
from chatbind_cli.evaluation.accuracy import chose_right, is_correct
from chatbind_cli.evaluation.cases import Case, Judgement, digest, scored_choices
from chatbind_cli.evaluation.judges.reply import scores_line
from chatbind_cli.evaluation.scores import RULE_JUDGE
from chatbind_cli.evaluation.texts import exact_match, token_f1
from chatbind_cli.hosted import KEY_VARIABLE, HostedSettings, Role, refuse_without_key
from chatbind_cli.jsonl import Record

JUDGE = Role("judge", "judged", JudgeError)


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgeSettings(HostedSettings):
    """Who judges and how.

    Attributes:
        kind: `auto` is `openai` where a key, a model or an address is given, else `rule`.
        rules: a rule file, None for our own rules.
        max_tokens: of one review.
        structured: ask for a JSON object of the scores: where the endpoint takes it, or never.
    """

    kind: Literal["auto", "openai", "rule"] = "auto"
    rules: Path | None = None
    temperature: float = 0.0
    max_tokens: int = 1024
    structured: Literal["auto", "off"] = "auto"

    @property
    def is_rule(self) -> bool:
        """Whether the judge only compares words with right answers."""
        chat = self.url or self.model or os.environ.get(KEY_VARIABLE)
        return self.kind == "rule" or (self.kind == "auto" and not chat)

    def refuse_without_key(self) -> None:
        """Raises a JudgeError where OpenAI's own endpoint would be asked; a plan needs no key."""
        if not self.is_rule:
            refuse_without_key(self, JUDGE, instead=", or --judge rule")


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What a judge said about one case; without scores it is a failure with a reason.

    Attributes:
        scores: each answer's, in the order of the answer files; None for a failure.
        content: what the judge wrote.
    """

    scores: tuple[float, ...] | None = None
    content: str = ""
    error: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)


class Judge(ABC):
    """Whoever scores answers.

    Attributes:
        name: the `reviewer_id` of its reviews.
        price: None if nobody knows.
        counted_by: what counts its tokens, empty if none are counted.
        sending: the tasks whose request is out; the others can be cancelled and cost nothing.
    """

    name: str
    price: Price | None = FREE
    counted_by = ""
    sending: AbstractSet[asyncio.Task[Any]] = frozenset()

    @abstractmethod
    def judge_hash(self, case: Case) -> str:
        """Hash of everything beside the question and the answers that the scores depend on.

        Raises:
            RecordError: the judge has no rule for this case.
        """

    @abstractmethod
    async def judge(self, judgement: Judgement) -> Verdict:
        """Scores the answers of a case, in the order in which they are to be shown.

        Raises:
            JudgeError: no case at all can be judged (a wrong key, a server that is not there).
        """

    def cache_key(self, judgement: Judgement) -> str | None:
        """The same for what would be asked in the same words; None: asking costs nothing."""
        return None

    def expected_tokens(self, case: Case) -> tuple[int, int] | None:
        """Tokens of the prompt and the most of a reply; None where nothing is sent."""
        return None

    async def close(self) -> None:  # noqa: B027  most have none
        """Lets go of connections."""


class RuleJudge(Judge):
    """Compares each answer with the right answers: the same scores every time.

    10 for a right answer and 1 for a wrong one (`accuracy.is_correct`); beside them, whether it is
    the reference word for word (`exact`), and the F1 of its words (`f1`).
    """

    name = RULE_JUDGE

    def judge_hash(self, case: Case) -> str:
        """Changes with the right answers."""
        return digest("rule-2", case.references)

    async def judge(self, judgement: Judgement) -> Verdict:
        """Scores the answers; the order in which they are shown means nothing here."""
        case = judgement.case
        if not case.references:
            return Verdict(error="no reference answer to compare with")
        correct = [
            right for answer in case.answers if (right := _is_right(answer, case)) is not None
        ]
        if len(correct) < len(case.answers):
            return Verdict(error="the reference answer is none of the choices")
        f1 = [round(token_f1(text, case.references), 4) for text in case.texts]
        scores = tuple(10.0 if good else 1.0 for good in correct)
        said = [
            f"{'right' if good else 'wrong'} (F1 {value:.2f})"
            for good, value in zip(correct, f1, strict=True)
        ]
        return Verdict(
            scores=scores,
            content=f"{scores_line(scores)}\nBy the reference answer: {', '.join(said)}.",
            metadata={
                "correct": correct,
                "exact": [exact_match(text, case.references) for text in case.texts],
                "f1": f1,
            },
        )


def _is_right(answer: Record, case: Case) -> bool | None:
    """Whether an answer is; None: it is a choice, and the right answers are none."""
    choices = scored_choices(answer)
    if choices:
        return chose_right(str(answer["text"]), choices, case.references, case.question)
    return is_correct(str(answer["text"]), case.references, case.question)
