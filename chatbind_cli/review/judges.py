"""What every judge has in common, and the judge that needs no network.

A judge gives a `Verdict` for a case; a verdict without scores is a failure with a reason, never a
number. Knows nothing of files (`run`) or of chat models (`chat_judge`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from chatbind_cli.review.accuracy import is_correct
from chatbind_cli.review.cases import Case, digest
from chatbind_cli.review.scores import RULE_JUDGE
from chatbind_cli.review.texts import exact_match, token_f1


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What a judge said about one case.

    Attributes:
        scores: the score of each answer in the order of the answer files, None for a failure.
        content: what the judge wrote.
        error: why there are no scores.
        metadata: what else is known of this judgement.
    """

    scores: tuple[float, float] | None = None
    content: str = ""
    error: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)


class Stopped(Exception):
    """A judgement was given up because the run ends; nothing is to be written for it."""


class Judge(Protocol):
    """Whoever scores answers.

    Attributes:
        name: the `reviewer_id` of its reviews.
    """

    name: str

    def fingerprint(self, case: Case) -> str:
        """Hash of everything beside the question and the answers that the scores depend on.

        Raises:
            RecordError: the judge has no rule for this case.
        """
        ...

    async def judge(self, case: Case, *, swapped: bool, sample: int) -> Verdict:
        """Scores both answers.

        Raises:
            JudgeError: no case at all can be judged (a wrong key, a server that is not there).
            Stopped: `stop` was called before the scores were there.
        """
        ...

    def stop(self) -> None:
        """Starts nothing new; what is under way may finish."""
        ...

    async def close(self) -> None:
        """Lets go of connections."""
        ...


class RuleJudge:
    """Compares each answer with the right answers: no network, the same scores every time.

    10 for a right answer and 1 for a wrong one (`accuracy.is_correct`); beside them, whether it is
    the reference word for word (`exact`), and the F1 of its words (`f1`).
    """

    name = RULE_JUDGE

    def fingerprint(self, case: Case) -> str:
        """Changes with the right answers."""
        return digest("rule-2", case.references)

    async def judge(self, case: Case, *, swapped: bool, sample: int) -> Verdict:
        """Scores both answers; the order in which they are shown means nothing here."""
        if not case.references:
            return Verdict(error="no reference answer to compare with")
        correct = [is_correct(text, case.references, case.question) for text in case.texts]
        f1 = [round(token_f1(text, case.references), 4) for text in case.texts]
        first, second = (10.0 if good else 1.0 for good in correct)
        said = [
            f"{'right' if good else 'wrong'} (F1 {value:.2f})"
            for good, value in zip(correct, f1, strict=True)
        ]
        return Verdict(
            scores=(first, second),
            content=f"{first:g} {second:g}\nBy the reference answer: {', '.join(said)}.",
            metadata={
                "correct": correct,
                "exact": [exact_match(text, case.references) for text in case.texts],
                "f1": f1,
            },
        )

    def stop(self) -> None:
        """There is nothing that takes time."""

    async def close(self) -> None:
        """There is nothing to let go of."""
