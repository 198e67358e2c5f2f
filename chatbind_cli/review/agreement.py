"""Do several judges, who saw the same answers, prefer the same one?

Knows nothing of scores beyond who has the higher one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

from chatbind_cli.jsonl import Record
from chatbind_cli.review.scores import Unit, metadata_of, scores_of, unit_of
from chatbind_cli.review.statistics import Pair, average, cohens_kappa, outcome


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """How two judges agree on who is better (first, tie, second).

    Attributes:
        judges: their names.
        n: questions that both have judged.
        same: share of them with the same outcome.
        kappa: Cohen's kappa; None where chance alone explains all.
    """

    judges: tuple[str, str]
    n: int
    same: float
    kappa: float | None

    def text(self) -> str:
        """In words."""
        kappa = "undefined" if self.kappa is None else f"{self.kappa:.2f}"
        return (
            f"{self.judges[0]} and {self.judges[1]} agree on {100 * self.same:.1f} % of {self.n} "
            f"questions (Cohen's kappa {kappa})"
        )


def agreements(reviews: Iterable[Record]) -> list[Agreement]:
    """Every pair of judges that have questions in common.

    Args:
        reviews: of any number of files; failed ones count for nothing.
    """
    scores: dict[str, dict[tuple[Unit, str], list[Pair]]] = {}
    for review in reviews:
        pair = scores_of(review)
        if pair is not None and review.get("reviewer_id"):
            units = scores.setdefault(str(review["reviewer_id"]), {})
            units.setdefault((unit_of(review), _answers_of(review)), []).append(pair)
    outcomes = {
        judge: {unit: outcome(average(pairs)) for unit, pairs in units.items()}
        for judge, units in scores.items()
    }
    found = []
    for first, second in combinations(outcomes, 2):
        shared = [unit for unit in outcomes[first] if unit in outcomes[second]]
        if shared:
            sides = [[outcomes[judge][unit] for unit in shared] for judge in (first, second)]
            found.append(_agreement((first, second), sides))
    return found


def _answers_of(review: Record) -> str:
    """Tells the answers that were seen apart from others to the same question."""
    ids = [review.get("answer1_id"), review.get("answer2_id")]
    return str(metadata_of(review).get("answers") or ids)


def _agreement(judges: tuple[str, str], sides: Sequence[Sequence[int]]) -> Agreement:
    same = sum(a == b for a, b in zip(*sides, strict=True)) / len(sides[0])
    kappa = cohens_kappa(*sides)
    return Agreement(
        judges=judges,
        n=len(sides[0]),
        same=round(same, 4),
        kappa=None if kappa is None else round(kappa, 4),
    )
