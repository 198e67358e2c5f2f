"""The two numbers, or the one, in what a judge wrote.

The form asked for is two numbers on the first line ("8 7"). Judges also write "8, 7",
"**8 7**", "8/10 7/10", "Assistant 1: 8 Assistant 2: 7", or put the pair last ("(8, 7)"); all of
these are read, because there is only one way to understand them; so is the JSON object that
endpoints with structured output can be held to (`response_format`). Everything else is
unreadable, which is never a number.

One number is asked for as in FastChat's MT-bench, "Rating: [[7]]"; "7" or "7/10" on the first
line, and "Rating: 7" on any, are read as well, unless the judge wrote two that differ.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

_LOWEST, _HIGHEST = 0.0, 10.0
"""The scale. Judges are asked for 1-10, and some answer 0 for "no answer at all"."""

_KEYS = {
    False: {
        "score_1": "score of the first answer, 1 to 10",
        "score_2": "score of the second answer, 1 to 10",
    },
    True: {"score": "score of the answer, 1 to 10"},
}
"""Of the JSON object of a review, by whether it is of one answer."""

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
_RATING = re.compile(rf"\[\[\s*({_NUMBER}){_OF_TEN}\s*\]\]")
_ONE = re.compile(
    rf"((?:(?:final|overall)\s+)?(?:score|rating)\s*[:=]\s*)?[(\[]?({_ENDED_NUMBER}){_OF_TEN}[)\]]?"
    r"[.,;]?",
    re.IGNORECASE,
)
_DECORATION = str.maketrans("", "", "*_`#")
_FENCED = re.compile(r"```(?:json)?\s*(\{.*\})\s*```", re.DOTALL)
_THOUGHT_BEGINS, _THOUGHT_ENDS = "<think>", "</think>"


class UnreadableScores(ValueError):
    """A review does not say its scores in a form that can be read in only one way."""


def response_format(*, single: bool) -> dict[str, Any]:
    """The form that structured output is held to; scores come first, as in the text form."""
    numbers = {key: {"type": "number", "description": of} for key, of in _KEYS[single].items()}
    properties = {**numbers, "explanation": {"type": "string", "description": "why"}}
    schema = {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
    described = {"name": "review", "strict": True, "schema": schema}
    return {"type": "json_schema", "json_schema": described}


def scores_line(scores: Sequence[float]) -> str:
    """Scores as they stand on the first line of a review."""
    return " ".join(f"{score:g}" for score in scores)


def read_review(text: str, *, single: bool = False) -> tuple[tuple[float, ...], str]:
    """The scores in what a judge wrote of two answers, or of one, and the review as it is kept.

    Returns:
        The scores, and the text; of an object the same in the seed's form, scores on the first
        line, which other programs read.

    Raises:
        UnreadableScores: there are not so many scores, or they lie outside the scale.
    """
    words = _without_thoughts(text)
    value = _json_object(words)
    if value is None:
        return _read_rating(words) if single else _read_lines(words), text
    found = [value.get(key) for key in _KEYS[single]]
    if any(isinstance(score, bool) or not isinstance(score, int | float) for score in found):
        raise UnreadableScores(f"no {'score' if single else 'two scores'} in the JSON object")
    scores = _on_scale(*map(str, found))
    return scores, f"{scores_line(scores)}\n{value.get('explanation', '')}".rstrip()


def _json_object(text: str) -> dict[str, Any] | None:
    text = text.strip()
    fenced = _FENCED.fullmatch(text)
    try:
        value = json.loads(fenced[1] if fenced else text)
    except (ValueError, RecursionError):  # no JSON, or a number of thousands of digits
        return None
    return value if isinstance(value, dict) else None


def _read_rating(text: str) -> tuple[float, ...]:
    """The number in double brackets, or alone on the first line, or with a label on any."""
    lines = _lines(text)
    ones = [_ONE.fullmatch(line) for line in lines]
    found = _RATING.findall(text)
    found += [one[2] for one in ones if one is not None and one[1]]
    # of two bare numbers either could be the score
    found += [one[2] for one in ones[: 2 if ones[0] else 1] if one is not None]
    if not found:
        raise _unreadable("no score", lines)
    scores = {_on_scale(number) for number in found}
    if len(scores) > 1:
        raise UnreadableScores("the judge wrote several scores that differ")
    return scores.pop()


def _lines(text: str) -> list[str]:
    """What is written, without its decoration; at least a line."""
    lines = [line.translate(_DECORATION).strip() for line in text.splitlines()]
    lines = [line for line in lines if line]
    if not lines:
        raise UnreadableScores("the judge wrote nothing")
    return lines


def _unreadable(what: str, lines: list[str]) -> UnreadableScores:
    shown = lines[0] if len(lines[0]) <= 60 else lines[0][:57] + "..."
    return UnreadableScores(f"{what} in {shown!r}")


def _read_lines(text: str) -> tuple[float, ...]:
    """The pair on the first line, or beside labels, or in brackets on the last line."""
    lines = _lines(text)
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
    raise _unreadable("no two scores", lines)


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


def _on_scale(*numbers: str) -> tuple[float, ...]:
    scores = tuple(map(float, numbers))
    for score in scores:
        if not _LOWEST <= score <= _HIGHEST:
            raise UnreadableScores(f"score {score:g} is not on the scale of 1 to 10")
    return scores
