"""What every judge has in common, and the judge that needs no network.

A judge gives a `Verdict` for a case; a verdict without scores is a failure with a reason, never a
number. Knows nothing of files (`run`) or of chat models (`chat_judge`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from chatbind_cli.review.cases import Case, digest
from chatbind_cli.review.texts import contains_words, exact_match, token_f1


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
    """Compares each answer with a reference answer: no network, the same scores every time.

    10 for the same words, else 1 + 8 x F1 of the words, so that an answer that is not the
    reference stays at or below 9.
    """

    name = "rule"

    def fingerprint(self, case: Case) -> str:
        """Changes with the right answers."""
        return digest("rule-1", case.references, case.question.get("label"))

    async def judge(self, case: Case, *, swapped: bool, sample: int) -> Verdict:
        """Scores both answers; the order in which they are shown means nothing here."""
        if not case.references:
            return Verdict(error="no reference answer to compare with")
        f1 = [token_f1(text, case.references) for text in case.texts]
        exact = [exact_match(text, case.references) for text in case.texts]
        first, second = (
            10.0 if same else round(1 + 8 * overlap, 2)
            for same, overlap in zip(exact, f1, strict=True)
        )
        metadata: dict[str, Any] = {"exact": exact, "f1": [round(value, 4) for value in f1]}
        label = case.question.get("label")
        if label is not None:
            labels = [str(item) for item in (label if isinstance(label, list) else [label])]
            metadata["label"] = [contains_words(text, labels) for text in case.texts]
        likeness = ", ".join(
            "the same words" if same else f"F1 {value:.2f}"
            for same, value in zip(exact, f1, strict=True)
        )
        content = f"{first:g} {second:g}\nCompared with the reference answer: {likeness}."
        return Verdict(scores=(first, second), content=content, metadata=metadata)

    def stop(self) -> None:
        """There is nothing that takes time."""

    async def close(self) -> None:
        """There is nothing to let go of."""
