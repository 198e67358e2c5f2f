"""What one review record says: scores, order, judge, and what it is a review of.

Records may be ours, the reference's (`tuple`, `category`) or Vicuna's published ones (`score`,
`text`).
"""

from __future__ import annotations

from chatbind_cli.evaluation.statistics import Pair
from chatbind_cli.jsonl import Record

Item = tuple[str, str, str]
"""A question: its id, its modality, and the pair of answerers."""

RULE_JUDGE = "rule"
"""The reviewer that compares with right answers; it does not care for the order."""

_MOST = 1e6
"""Above it, what calls itself a score or a price is none; sums of such stay finite."""
_LONGEST = 1e9


def scores_of(review: Record) -> Pair | None:
    """The scores of a review, None if it failed; an answer that was graded alone has its own twice.

    The reference writes [-1, -1] for a review that it could not read; such a pair, and whatever
    else is not two numbers from 0 to a million, is a failure.
    """
    if "error" in review:
        return None
    return _of_answers(review, review.get("tuple", review.get("score")), _MOST)


def _of_answers(review: Record, value: object, most: float) -> Pair | None:
    """Two numbers, or twice the one of an answer that was graded alone; None of anything else."""
    if not isinstance(value, list | tuple) or len(value) != (1 if is_single(review) else 2):
        return None
    if not all(type(number) in (int, float) and 0 <= number <= most for number in value):
        return None
    return float(value[0]), float(value[-1])


def failure_of(review: Record) -> str:
    """Why a failed review failed."""
    return str(review.get("error", "no two scores of at least 0"))


def metadata_of(review: Record) -> Record:
    """The record's metadata, empty where there are none."""
    metadata = review.get("metadata")
    return metadata if isinstance(metadata, dict) else {}


def paid_usd(metadata: Record) -> float | None:
    """What a review cost at most, in US dollars; None where the judge has no price.

    Replies that never came count as what they may have cost, and so do the earlier reviews that
    it replaced: failed ones, and those of an answer that has changed since.
    """
    keys = ("cost_usd", "lost_usd", "earlier_usd")
    values = [metadata.get(key) for key in keys]
    known = [usd for usd in values if isinstance(usd, int | float) and 0 <= usd <= _MOST]
    return sum(known) if known else None


def item_of(review: Record) -> Item:
    """What is drawn by the bootstrap: a question, apart for each pair of answerers.

    A file of the reference may name a question twice only if it was reviewed twice.
    """
    metadata = metadata_of(review)
    question = review.get("question_id", review.get("review_id"))
    return str(question), str(metadata.get("modality")), str(metadata.get("models"))


def models_of(review: Record) -> list[str]:
    """Who gave the first and the second answer; an empty name for one that is not known."""
    models = metadata_of(review).get("models")
    return [str(model or "") for model in models] if isinstance(models, list) else []


def is_single(review: Record) -> bool:
    """Whether one answer was graded alone."""
    models = metadata_of(review).get("models")
    return isinstance(models, list) and len(models) == 1


def lengths_of(review: Record) -> Pair | None:
    """How many characters the answers have; None where the review does not say."""
    return _of_answers(review, metadata_of(review).get("lengths"), _LONGEST)


def is_swapped(review: Record) -> bool:
    """Whether the second answer was shown first."""
    return metadata_of(review).get("order") == [2, 1]


def judge_name(review: Record) -> str:
    """The reviewer's name, empty where the review does not say."""
    return str(review.get("reviewer_id") or "")


def judge_of(review: Record) -> str:
    """Who judged: the reviewer's name, with the version that the endpoint says it ran."""
    name = judge_name(review)
    version = metadata_of(review).get("model")
    return f"{name} ({version})" if name and version and version != name else name
