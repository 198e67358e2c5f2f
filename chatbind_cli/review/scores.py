"""The two scores of a review: found in what a judge wrote, and read back from a record.

The form asked for is two numbers on the first line ("8 7"). Judges also write "8, 7",
"**8 7**", "8/10 7/10", "Assistant 1: 8 Assistant 2: 7", or put the pair last ("(8, 7)"); all of
these are read, because there is only one way to understand them; so is the JSON object of
`SCHEMA`, which endpoints with structured output can be held to. Everything else is unreadable,
which is never a number.

Records may be ours, the reference's (`tuple`, `category`) or Vicuna's published ones (`score`,
`text`).
"""

from __future__ import annotations

import json
import re
from typing import Any

from chatbind_cli.jsonl import Record
from chatbind_cli.review.statistics import Pair

Unit = tuple[str, str, str]
"""A question: its id, its modality, and the pair of answerers."""

RULE_JUDGE = "rule"
"""The reviewer that compares with right answers; it does not care for the order."""

LOWEST, HIGHEST = 0.0, 10.0
"""The scale. Judges are asked for 1-10, and some answer 0 for "no answer at all"."""

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "score_1": {"type": "number", "description": "score of the first answer, 1 to 10"},
        "score_2": {"type": "number", "description": "score of the second answer, 1 to 10"},
        "explanation": {"type": "string", "description": "why these scores"},
    },
    "required": ["score_1", "score_2", "explanation"],
    "additionalProperties": False,
}
"""The JSON schema of a review in structured output; the scores come first, as in the text form."""

_NUMBER = r"[+-]?(?:\d+(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d+)?"
_ENDED_NUMBER = rf"{_NUMBER}\.?"  # "7. 8.", which the reference reads
_OF_TEN = r"(?:\s*/\s*10(?:\.0)?(?!\d)|\s+out\s+of\s+10)?"
_PREFIX = r"(?:(?:final\s+)?(?:scores?|ratings?|output|answer)\s*[:=]\s*)?"
_PAIR = re.compile(
    rf"{_PREFIX}[(\[]?\s*({_ENDED_NUMBER}){_OF_TEN}"
    rf"(?:\s*[,;|&]\s*|\s+and\s+|\s+)({_ENDED_NUMBER}){_OF_TEN}"
    r"\s*[)\]]?\s*[.,;]?",
    re.IGNORECASE,
)
_LABEL = r"[^\W\d]+\s+([12])\s*(?:\([^()]*\)\s*)?[:=]"
_LABELLED = re.compile(
    rf"\b{_LABEL}\s*({_NUMBER}){_OF_TEN}"
    # A number that goes on as a sentence ("2 of the 5", "7 or 8", "4 / 5", "1,5") is no score.
    rf"(?=\s*$|[.,;](?:\s|$)|\s*[(\[]|\s+[-–—]\s|\s+(?:and\s+)?{_LABEL.replace('([12])', '[12]')})",
    re.IGNORECASE,
)
_DECORATION = str.maketrans("", "", "*_`#")
_FENCED = re.compile(r"```(?:json)?\s*(\{.*\})\s*```", re.DOTALL)
_THOUGHT_BEGINS, _THOUGHT_ENDS = "<think>", "</think>"
_MOST = 1e6
"""Above it, what calls itself a score or a price is none; sums of such stay finite."""


class UnreadableScores(ValueError):
    """A review does not say two scores in a form that can be read in only one way."""


def read_scores(text: str) -> Pair:
    """The scores of the first and of the second answer.

    Args:
        text: what the judge wrote.

    Raises:
        UnreadableScores: there are not two scores, or they lie outside the scale.
    """
    structured = read_object(text)
    if structured is not None:
        return structured[0]
    text = _without_thoughts(text)
    lines = [line.translate(_DECORATION).strip() for line in text.splitlines()]
    lines = [line for line in lines if line]
    if not lines:
        raise UnreadableScores("the judge wrote nothing")
    first = _PAIR.fullmatch(lines[0])
    if first is not None:
        if len(lines) > 1 and _PAIR.fullmatch(lines[1]):
            raise UnreadableScores("the first two lines are pairs of numbers: which are scores?")
        return _on_scale(first[1], first[2])
    labelled = _labelled(lines)
    if labelled is not None:
        return _on_scale(*labelled)
    last = _PAIR.fullmatch(lines[-1])
    # Without brackets a last line such as "1 2" could be anything.
    if last is not None and lines[-1].endswith((")", "]", ").", "].")):
        return _on_scale(last[1], last[2])
    shown = lines[0] if len(lines[0]) <= 60 else lines[0][:57] + "..."
    raise UnreadableScores(f"no two scores in {shown!r}")


def read_object(text: str) -> tuple[Pair, str] | None:
    """The scores and the explanation of a review in the form of `SCHEMA`.

    Returns:
        None if the text is no JSON object.

    Raises:
        UnreadableScores: it is one, without two scores on the scale; or there are thoughts alone.
    """
    stripped = _without_thoughts(text).strip()
    fenced = _FENCED.fullmatch(stripped)
    try:
        value = json.loads(fenced[1] if fenced else stripped)
    except (ValueError, RecursionError):  # no JSON, or a number of thousands of digits
        return None
    if not isinstance(value, dict):
        return None
    scores = [value.get("score_1"), value.get("score_2")]
    if any(isinstance(score, bool) or not isinstance(score, int | float) for score in scores):
        raise UnreadableScores("no two scores in the JSON object")
    return _on_scale(str(scores[0]), str(scores[1])), str(value.get("explanation", ""))


def _without_thoughts(text: str) -> str:
    """What comes after the judge's thoughts; some models leave the mark at their beginning out.

    Raises:
        UnreadableScores: they have no end.
    """
    if _THOUGHT_ENDS in text:
        return text.rpartition(_THOUGHT_ENDS)[2]
    if text.lstrip().startswith(_THOUGHT_BEGINS):
        raise UnreadableScores("the judge was cut off while it was thinking")
    return text


def _labelled(lines: list[str]) -> tuple[str, str] | None:
    """The scores of lines like "Assistant 1: 8", if each label has exactly one value."""
    values: dict[str, set[str]] = {"1": set(), "2": set()}
    for line in lines:
        for match in _LABELLED.finditer(line):
            values[match[1]].add(match[2])
    if len(values["1"]) == len(values["2"]) == 1:
        return values["1"].pop(), values["2"].pop()
    return None


def _on_scale(first: str, second: str) -> Pair:
    scores = float(first), float(second)
    for score in scores:
        if not LOWEST <= score <= HIGHEST:
            raise UnreadableScores(f"score {score:g} is not on the scale of 1 to 10")
    return scores


def scores_of(review: Record) -> Pair | None:
    """The scores of a review, None if it failed.

    The reference writes [-1, -1] for a review that it could not read; such a pair, and whatever
    else is not two numbers from 0 to a million, is a failure.
    """
    if "error" in review:
        return None
    value = review.get("tuple", review.get("score"))
    if not isinstance(value, list | tuple) or len(value) != 2:
        return None
    for score in value:
        if isinstance(score, bool) or not isinstance(score, int | float):
            return None
        if not 0 <= score <= _MOST:
            return None
    return float(value[0]), float(value[1])


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


def unit_of(review: Record) -> Unit:
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
