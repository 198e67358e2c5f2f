"""The questions of a report: what was asked and answered, and who judged it how.

Records in, entries out, in the order of the questions. Knows nothing of HTML.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from chatbind_cli.jsonl import Record
from chatbind_cli.media.modality import MODALITIES
from chatbind_cli.review.exhibits import Cabinet, Exhibit
from chatbind_cli.review.scores import (
    Unit,
    failure_of,
    is_swapped,
    judge_name,
    judge_of,
    metadata_of,
    models_of,
    scores_of,
    unit_of,
)
from chatbind_cli.review.statistics import Pair, average, outcome
from chatbind_cli.review.summary import ALL, Summary

_WINNERS = {1: "second", 0: "tie", -1: "first"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """One review as the page shows it.

    Attributes:
        judge: who judged.
        sample: which of several, from 0.
        swapped: whether the second answer was shown first.
        scores: both as text, None for a failure.
        content: what the judge wrote.
        error: why there are no scores.
        asked_again: whether the first reply could not be read.
    """

    judge: str
    sample: int
    swapped: bool
    scores: tuple[str, str] | None
    content: str
    error: str
    asked_again: bool


@dataclass(slots=True)
class Entry:
    """One question of the report with everything that is known of it.

    Attributes:
        anchor: the name that a link to it ends in; the same in every report on these questions.
        models: who gave the answers.
        exhibits: the media that it is about.
        answers: the answers' words.
        verdicts: the reviews, judge by judge.
        winner: `first`, `second`, `tie` or `failed`.
        disagreement: whether the order of the answers changed the winner.
        judges_differ: whether the judges name different winners.
        mean: the mean scores, None if every review failed.
    """

    anchor: str
    question_id: str
    category: str
    modality: str
    run: str
    models: tuple[str, str]
    question: str = ""
    exhibits: list[Exhibit] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)
    verdicts: list[Judged] = field(default_factory=list)
    winner: str = "failed"
    disagreement: bool = False
    judges_differ: bool = False
    mean: Pair | None = None

    @property
    def marks(self) -> tuple[str, str] | None:
        """The mean scores as text."""
        return None if self.mean is None else _as_text(self.mean, digits=3)


class Entries:
    """Makes the entries of one file after the other, with anchors that no other entry has.

    Args:
        questions: question records by id; their order is that of the entries.
        answers: answer records by id, one mapping an answer file.
        cabinet: where the media come from.
    """

    def __init__(
        self,
        questions: Mapping[str, Record],
        answers: Sequence[Mapping[str, Record]],
        cabinet: Cabinet,
    ) -> None:
        self.cabinet = cabinet
        self._questions = questions
        self._places = {key: place for place, key in enumerate(questions)}
        self._answers = answers
        self._anchors: set[str] = set()

    def of(self, summary: Summary) -> list[Entry]:
        """The entries of one file of reviews."""
        found: dict[Unit, Entry] = {}
        scores: dict[Unit, list[tuple[str, str, Pair]]] = {}
        for review in summary.reviews:
            unit = unit_of(review)
            if unit not in found:
                found[unit] = self._entry(review, summary)
            pair = scores_of(review)
            found[unit].verdicts.append(_verdict(review, pair))
            if pair is not None:
                scored = str(is_swapped(review)), judge_name(review), pair
                scores.setdefault(unit, []).append(scored)
        means = summary.results.get(ALL, {})
        for unit, entry in found.items():
            _decide(entry, scores.get(unit, []), means.get(unit))
            entry.verdicts.sort(key=lambda judged: (judged.judge, judged.sample, judged.swapped))
        last = len(self._places)
        return sorted(found.values(), key=lambda e: self._places.get(e.question_id, last))

    def _entry(self, review: Record, summary: Summary) -> Entry:
        metadata = metadata_of(review)
        question_id = str(review.get("question_id", ""))
        question = self._questions.get(question_id, {})
        media = _media_of(question)
        modality = str(metadata.get("modality") or next(iter(media), "text"))
        sides = summary.models
        known = all(len(side) == 1 for side in sides)
        models = [side[0] for side in sides] if known else models_of(review)
        said = metadata.get("pair")
        usable = isinstance(said, list) and all(isinstance(number, int) for number in said)
        pair = [number - 1 for number in (said if usable and said else (1, 2))]
        return Entry(
            anchor=self._anchor(question_id),
            question_id=question_id,
            category=str(review.get("category") or question.get("category") or "default").strip(),
            modality=modality,
            run=summary.name,
            models=(models[0], models[1]) if len(models) == 2 else ("", ""),
            question=str(question.get("text", "")),
            exhibits=[
                exhibit
                for sense, names in media.items()
                for exhibit in self.cabinet.show(sense, names)
            ],
            answers=[
                _answer_text(self._answers[number].get(question_id))
                for number in pair
                if 0 <= number < len(self._answers)
            ],
        )

    def _anchor(self, question_id: str) -> str:
        plain = "q-" + (re.sub(r"[^A-Za-z0-9_.-]+", "-", question_id) or "none")
        anchor, number = plain, 1
        while anchor in self._anchors:
            number += 1
            anchor = f"{plain}--{number}"
        self._anchors.add(anchor)
        return anchor


def _media_of(question: Record) -> dict[str, list[str]]:
    """The media of a question by modality; a question may be about several senses."""
    found = {}
    for modality in MODALITIES:
        named = question.get(modality) or []
        names = [str(name) for name in (named if isinstance(named, list) else [named])]
        if names:
            found[modality] = names
    return found


def _answer_text(answer: Record | None) -> str:
    if answer is None:
        return "(no answer)"
    return str(answer.get("text", answer.get("error", "")))


def _verdict(review: Record, pair: Pair | None) -> Judged:
    metadata = metadata_of(review)
    sample = metadata.get("sample")
    return Judged(
        judge=judge_of(review),
        sample=sample if isinstance(sample, int) else 0,
        swapped=is_swapped(review),
        scores=None if pair is None else _as_text(pair),
        content=str(review.get("content") or review.get("text") or ""),
        error="" if pair is not None else failure_of(review),
        asked_again=metadata.get("asked_again") is True,
    )


def _as_text(pair: Pair, digits: int = 6) -> tuple[str, str]:
    return f"{pair[0]:.{digits}g}", f"{pair[1]:.{digits}g}"


def _decide(entry: Entry, scores: Sequence[tuple[str, str, Pair]], mean: Pair | None) -> None:
    """Fills in who won, and whether both orders and all judges say so.

    A question that is in no mean, because it was judged in one order only, shows that order's.
    """
    if not scores:
        return
    entry.mean = mean or average([pair for _, _, pair in scores])
    entry.winner = _WINNERS[outcome(entry.mean)]
    entry.disagreement = _differ((order, pair) for order, _, pair in scores)
    entry.judges_differ = _differ((judge, pair) for _, judge, pair in scores)


def _differ(scores: Iterable[tuple[str, Pair]]) -> bool:
    """Whether the mean scores of each group name different winners."""
    groups: dict[str, list[Pair]] = {}
    for group, pair in scores:
        groups.setdefault(group, []).append(pair)
    return len({outcome(average(pairs)) for pairs in groups.values()}) > 1
