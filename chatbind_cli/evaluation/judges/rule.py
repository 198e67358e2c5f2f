"""The judge that needs no network: each answer beside the right answers."""

from __future__ import annotations

from chatbind_cli.evaluation.accuracy import is_correct
from chatbind_cli.evaluation.cases import Case, digest
from chatbind_cli.evaluation.judges.judge import Judge, Verdict
from chatbind_cli.evaluation.scores import RULE_JUDGE
from chatbind_cli.evaluation.texts import exact_match, token_f1


class RuleJudge(Judge):
    """Compares each answer with the right answers: the same scores every time.

    10 for a right answer and 1 for a wrong one (`accuracy.is_correct`); beside them, whether it is
    the reference word for word (`exact`), and the F1 of its words (`f1`).
    """

    name = RULE_JUDGE

    def judge_hash(self, case: Case) -> str:
        """Changes with the right answers."""
        return digest("rule-2", case.references)

    async def judge(self, case: Case, *, swapped: bool) -> Verdict:
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
