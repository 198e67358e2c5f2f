"""What a run would do and cost, without asking anybody.

Knows nothing of how a judge works beyond how many tokens it would be sent.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass
from typing import Protocol

from chatbind_cli.jsonl import Record
from chatbind_cli.review.bill import FREE, Price
from chatbind_cli.review.cases import Case
from chatbind_cli.review.judges import Judge
from chatbind_cli.review.run import RunOptions, tasks_of
from chatbind_cli.review.tokens import ESTIMATE

_USUAL_REVIEW_TOKENS = 200
"""Two scores and a paragraph; GPT-4's published reviews of Vicuna have about 150."""


class CountingJudge(Judge, Protocol):
    """A judge that knows how much it would be sent."""

    def expected_tokens(self, case: Case) -> tuple[int, int]:
        """Tokens of the prompt, and the most that the reply may have."""
        ...


@dataclass(slots=True, kw_only=True)
class Plan:
    """What a run would do.

    Attributes:
        judge: who would judge.
        judgements: judgements that the files ask for.
        done: those that are in the output already.
        failing: those that cannot be judged (a missing answer or context).
        requests: requests that would go out, if every reply can be read.
        prompt_tokens: what would be sent.
        completion_tokens: what would come back, if reviews are of the usual length.
        completion_tokens_at_most: the same if every review is as long as allowed.
        cost_usd: the cost of `completion_tokens`; None without a price.
        cost_usd_at_most: the cost of `completion_tokens_at_most`.
        counted_by: the tokenizer, or `ESTIMATE`.
        price: the price that the costs are reckoned with, its source and its age.
    """

    judge: str
    judgements: int = 0
    done: int = 0
    failing: int = 0
    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    completion_tokens_at_most: int = 0
    cost_usd: float | None = None
    cost_usd_at_most: float | None = None
    counted_by: str = ""
    price: str = ""

    def record(self) -> Record:
        """The plan as a record."""
        return asdict(self)

    def lines(self) -> list[str]:
        """The plan in words."""
        lines = [
            f"judge: {self.judge}",
            f"judgements: {self.judgements:,} ({self.done:,} are there already, "
            f"{self.failing:,} cannot be made)",
            f"requests: {self.requests:,}",
        ]
        if self.counted_by:
            counted = f"counted: {self.counted_by}"
            if self.counted_by == ESTIMATE:
                counted = "an estimate; --tokenizer counts"
            lines.append(
                f"tokens: {self.prompt_tokens:,} to send, about {self.completion_tokens:,} and at "
                f"most {self.completion_tokens_at_most:,} to receive ({counted})"
            )
        if self.cost_usd is not None and self.cost_usd_at_most is not None:
            lines.append(
                f"cost: about {self.cost_usd:.2f} USD, at most {self.cost_usd_at_most:.2f} USD"
            )
            if self.price:
                lines.append(f"price: {self.price}")
        elif self.requests:
            lines.append("cost: unknown, the judge has no price (see --prices)")
        return lines


def make_plan(
    cases: Iterable[Case],
    judge: Judge,
    options: RunOptions,
    *,
    done: Collection[str] = (),
    price: Price | None = None,
    counted_by: str = "",
) -> Plan:
    """Counts what `run_reviews` would do.

    Args:
        cases: what is to be judged.
        judge: the judge; its tokens are counted if it is a `CountingJudge`.
        options: how often and in which order.
        done: ids of the reviews that are there.
        price: the judge's price, None if it is not known.
        counted_by: what the judge counts tokens with.
    """
    plan = Plan(judge=judge.name, counted_by=counted_by)
    expected = getattr(judge, "expected_tokens", None)
    for case in cases:
        tokens: tuple[int, int] | None = None
        for task in tasks_of(case, judge, options):
            plan.judgements += 1
            if task.review_id in done:
                plan.done += 1
            elif task.case.problem is not None:
                plan.failing += 1
            elif expected is not None:
                tokens = tokens or expected(task.case)
                plan.requests += 1
                plan.prompt_tokens += tokens[0]
                plan.completion_tokens += min(_USUAL_REVIEW_TOKENS, tokens[1])
                plan.completion_tokens_at_most += tokens[1]
    if price is not None:
        plan.cost_usd = round(price.cost_usd(plan.prompt_tokens, plan.completion_tokens), 6)
        plan.price = price.text() if price is not FREE else ""
        most = plan.completion_tokens_at_most
        plan.cost_usd_at_most = round(price.cost_usd(plan.prompt_tokens, most), 6)
    return plan
