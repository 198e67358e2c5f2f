"""The two numbers in what a judge wrote.

The form asked for is two numbers on the first line ("8 7"). Judges also write "8, 7",
"**8 7**", "8/10 7/10", "Assistant 1: 8 Assistant 2: 7", or put the pair last ("(8, 7)"); all of
these are read, because there is only one way to understand them; so is the JSON object of
`SCHEMA`, which endpoints with structured output can be held to. Everything else is unreadable,
which is never a number.
"""

from __future__ import annotations

import json
import re
from typing import Any

_LOWEST, _HIGHEST = 0.0, 10.0
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


class UnreadableScores(ValueError):
    """A review does not say two scores in a form that can be read in only one way."""


def read_review(text: str) -> tuple[tuple[float, float], str]:
    """The scores of the first and of the second answer, and the review as it is kept.

    Args:
        text: what the judge wrote.

    Returns:
        The scores, and the text; of an object the same in the seed's form, scores on the first
        line, which other programs read.

    Raises:
        UnreadableScores: there are not two scores, or they lie outside the scale.
    """
    words = _without_thoughts(text)
    value = _json_object(words)
    if value is None:
        return _read_lines(words), text
    scores = [value.get("score_1"), value.get("score_2")]
    if any(isinstance(score, bool) or not isinstance(score, int | float) for score in scores):
        raise UnreadableScores("no two scores in the JSON object")
    first, second = _on_scale(str(scores[0]), str(scores[1]))
    return (first, second), f"{first:g} {second:g}\n{value.get('explanation', '')}".rstrip()


def _json_object(text: str) -> dict[str, Any] | None:
    text = text.strip()
    fenced = _FENCED.fullmatch(text)
    try:
        value = json.loads(fenced[1] if fenced else text)
    except (ValueError, RecursionError):  # no JSON, or a number of thousands of digits
        return None
    return value if isinstance(value, dict) else None


def _read_lines(text: str) -> tuple[float, float]:
    """The pair on the first line, or beside labels, or in brackets on the last line."""
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


def _on_scale(first: str, second: str) -> tuple[float, float]:
    scores = float(first), float(second)
    for score in scores:
        if not _LOWEST <= score <= _HIGHEST:
            raise UnreadableScores(f"score {score:g} is not on the scale of 1 to 10")
    return scores
