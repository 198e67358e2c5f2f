"""What is to be judged: a question, two answers, and what belongs to them, matched by id.

Nothing is matched by its place in a file. What does not fit together (an answer that is missing
or given twice, a context that is not there) stands in `Inputs.remarks`, and what cannot be judged
for it becomes a `Case` with a `problem`, never a silent gap.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, combinations, count
from pathlib import Path
from typing import Literal

from chatbind_cli.evaluation.contexts import Contexts
from chatbind_cli.evaluation.files import (
    DOUBLED,
    Mismatches,
    distinct_names,
    keyed,
    records_by_id,
)
from chatbind_cli.files import sha256_text
from chatbind_cli.jsonl import Line, Record, legible, record_id
from chatbind_cli.media.modality import MODALITIES

_REFERENCE_KEYS = ("reference", "answers", "answer", "label")
_STDIN = "stdin"

Compared = Literal["baseline", "all", "single"]
"""Answer files judged together: each other one with the first, each with each other, or none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One question with its two answers, or with one, as it goes to a judge.

    Attributes:
        answers: their records, in the order of the answer files.
        context: the captions and boxes of what the question is about.
        references: texts that count as right answers.
        models: who gave the answers: what their records say, else the name of their file.
        pair: numbers of the answer files, from 1; None where there are only two, both compared.
        single: whether one answer is judged alone.
        problem: why this case cannot be judged, None if it can.
        line: of a line of the questions that is none: its number.
    """

    question: Record
    answers: tuple[Record, ...] = ()
    context: Record | None = None
    references: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    pair: tuple[int, ...] | None = None
    single: bool = False
    problem: str | None = None
    line: int | None = None

    @property
    def question_id(self) -> str | int | None:
        """The id that everything is matched by; None for a line that is no question."""
        return None if self.line is not None else record_id(self.question)

    @property
    def category(self) -> str:
        """The question's category, `default` where it names none."""
        return str(self.question.get("category", "default"))

    @property
    def modality(self) -> str | None:
        """What the question is about, None for plain text."""
        return next((name for name in MODALITIES if self.question.get(name)), None)

    @property
    def texts(self) -> tuple[str, ...]:
        """The answers themselves."""
        return tuple(str(answer["text"]) for answer in self.answers)


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """One judgement to be made: a case, the order in which it is shown, and which sample it is."""

    case: Case
    swapped: bool
    sample: int
    judge: str
    judge_hash: str

    @cached_property
    def review_id(self) -> str:
        """The same for the same question, answers, judge, rule, order and sample."""
        return digest(self.review_key, self.input_hash, self.judge_hash)

    @cached_property
    def review_key(self) -> str:
        """The same for every review that fills this place in a report."""
        case = self.case
        about = [str(case.line or case.question_id), case.modality, list(case.models)]
        return digest(about, self.judge, self.swapped, self.sample)

    @cached_property
    def input_hash(self) -> str:
        """The same for the same words of question and answers."""
        question = {key: value for key, value in self.case.question.items() if key != "metadata"}
        return digest(question, self.case.texts, self.case.problem)


class Inputs:
    """The files of a review, read by id.

    Args:
        answers: two or more answer files, the baseline first; one is enough where each is judged
            alone. At most one may be a stream: it is read as it comes, so that each case
            can be judged as soon as its answer is there.
        compared: which of them are, each pair once and the earlier file first.
        references: answers that count as right, by question id.

    Attributes:
        questions: the questions' records by id.
        name: the questions' file.
        names: the answers' files.
        sides: places in `names` of those that are judged together.

    Raises:
        RecordError: a file cannot be read. A line that is no record is a mismatch.
    """

    def __init__(
        self,
        questions: Path,
        answers: Sequence[Path | Iterable[Line]],
        *,
        compared: Compared = "baseline",
        contexts: Path | None = None,
        references: Path | None = None,
    ) -> None:
        self._mismatches = mismatches = Mismatches()
        self._not_questions: dict[int, str] = {}
        self.name = legible(str(questions))
        self.questions = records_by_id(questions, mismatches, self._not_questions)
        self.names: list[str] = []
        self._sides: list[dict[str, Record]] = []
        self._stream: Iterable[Line] = ()
        self._streamed: dict[str, Record] = {}
        for side in answers:
            if isinstance(side, Path):
                self.names.append(legible(str(side)))
                self._sides.append(records_by_id(side, mismatches))
            else:
                self.names.append(_STDIN)
                self._sides.append(self._streamed)
                self._stream = side
        self._contexts_name = str(contexts)
        self._contexts = None if contexts is None else Contexts(contexts, mismatches)
        self._references = None if references is None else records_by_id(references, mismatches)
        # The first ones keep their names when others are added: a review is continued by them.
        n_files = len(self.names)
        self._files = [distinct_names(self.names[: n + 1])[-1] for n in range(n_files)]
        self._single = compared == "single"
        self.sides = [
            together
            for together in combinations(range(n_files), 1 if self._single else 2)
            if compared != "baseline" or together[0] == 0
        ]

    @property
    def remarks(self) -> list[str]:
        """What did not fit together, in a line a file and kind; all of it after `cases`.

        A run that has any does not end with exit code 0.
        """
        return self._mismatches.lines()

    def has_references(self) -> bool:
        """Whether there is anything at all to compare answers with."""
        records = (record for file in (self.questions, *self._sides) for record in file.values())
        return self._references is not None or any(map(references_of, records))

    def cases(self) -> Iterator[Case]:
        """The cases in the order of the questions, or in that of the answers that stream in.

        A question has a case for each of `sides`.
        """
        for key, record in keyed(self._stream, _STDIN, self._mismatches):
            if key in self._streamed:
                self._mismatches.add(_STDIN, DOUBLED, key)
                continue
            self._streamed[key] = record
            if key in self.questions:
                yield from self._cases(key)
        early = set(self._streamed)
        for key in self.questions:
            if key not in early:
                yield from self._cases(key)
        for name, side in zip(self.names, self._sides, strict=True):
            for key in side:
                if key not in self.questions:
                    self._mismatches.add(name, "answers what was not asked: question", key)
        for line, problem in self._not_questions.items():
            yield Case(question={}, problem=problem, line=line, single=self._single)

    def _cases(self, key: str) -> Iterator[Case]:
        models = self._models(key)
        numbered = self._single or len(self.names) > 2
        for sides in self.sides:
            case = Case(
                question=self.questions[key],
                models=tuple(models[side] for side in sides),
                pair=tuple(side + 1 for side in sides) if numbered else None,
                single=self._single,
            )
            yield self._filled(key, case, sides)

    def _filled(self, key: str, case: Case, sides: Sequence[int]) -> Case:
        """The case with its answers and context, or with the reason why it has none."""
        answers: list[Record] = []
        problems: list[str] = []
        for name, answer in ((self.names[side], self._sides[side].get(key)) for side in sides):
            if answer is None:
                self._mismatches.add(name, "no answer to question", key)
                problems.append(f"no answer in {name}")
            elif "error" in answer:
                self._mismatches.add(name, "a failed answer to question", key)
                problems.append(f"the answer in {name} failed ({answer['error']})")
            elif not isinstance(answer.get("text"), str):
                self._mismatches.add(name, "no text in the answer to question", key)
                problems.append(f"the answer in {name} has no text")
            else:
                answers.append(answer)
        if problems:
            return replace(case, problem="; ".join(problems))
        case = replace(case, answers=tuple(answers))
        if self._contexts is not None and case.modality is not None:
            named = case.question[case.modality]
            medium = named[0] if isinstance(named, list) else named
            context = self._contexts.of(case.modality, medium)
            if context is None:
                self._mismatches.add(self._contexts_name, "no context for question", key)
                return replace(case, problem=f"no context for {case.modality} {named}")
            case = replace(case, context=context)
        right = right_answers(key, case.question, case.answers, self._references)
        return replace(case, references=right)

    def _models(self, key: str) -> list[str]:
        """The sides' names; one that an earlier side has already gets its file's behind it."""
        models: list[str] = []
        for side, file in zip(self._sides, self._files, strict=True):
            # Who did not answer one question is called as in the others that it did answer.
            records = (side.get(key, {}), next(iter(side.values()), {}))
            named = (record["model_id"] for record in records if record.get("model_id"))
            name = str(next(named, file))
            names = chain([name, f"{name} ({file})"], (f"{name} ({file}, {n})" for n in count(2)))
            models.append(next(name for name in names if name not in models))
        return models


def scored_choices(answer: Record) -> list[str]:
    """The choices whose likelihood an answer record tells (see `vqa --choices`); else none."""
    given = answer.get("choices")
    items = given if isinstance(given, list) else []
    texts = [item.get("text") for item in items if isinstance(item, dict)]
    return [text for text in texts if isinstance(text, str)]


def right_answers(
    key: str,
    question: Record,
    answers: Iterable[Record],
    references: Mapping[str, Record] | None,
) -> tuple[str, ...]:
    """What counts as right: the reference file's, else the question's, else those carried along.

    An answer record carries the keys of the question that it answers.
    """
    if references is not None:
        return references_of(references.get(key, {}), ("text", *_REFERENCE_KEYS))
    found = map(references_of, (question, *answers))
    return next(filter(None, found), ())


def references_of(record: Record, keys: Sequence[str] = _REFERENCE_KEYS) -> tuple[str, ...]:
    """The right answers that a record carries: words, a number, or a list, as VQA's annotations."""
    given = next((record[key] for key in keys if record.get(key) is not None), None)
    found = []
    for item in given if isinstance(given, list) else [given]:
        value = item.get("answer") if isinstance(item, dict) else item
        if isinstance(value, bool):
            value = "yes" if value else "no"
        if isinstance(value, str | int | float) and str(value).strip():
            found.append(str(value))
    return tuple(dict.fromkeys(found))


def digest(*parts: object) -> str:
    """A short hash of JSON values, the same in every run."""
    return sha256_text(json.dumps(parts, ensure_ascii=False, sort_keys=True, default=str))[:22]
