"""What is to be judged: a question, two answers, and what belongs to them, matched by id.

Nothing is matched by its place in a file. What does not fit together (an answer that is missing
or given twice, a context that is not there) stands in `Inputs.remarks`, and what cannot be judged
for it becomes a `Case` with a `problem`, never a silent gap. Knows nothing of judges.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePath, PurePosixPath

from chatbind_cli.errors import RecordError
from chatbind_cli.jsonl import Line, Record, legible, read_lines, record_id
from chatbind_cli.media.modality import MODALITIES
from chatbind_cli.review.mismatches import Mismatches

_COCO_PREFIXES = ("COCO_val2014_", "COCO_train2014_")
_MEDIA_SUFFIXES = frozenset(
    (
        *(".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"),
        *(".mp4", ".mkv", ".mov", ".avi", ".webm", ".wav", ".mp3", ".flac", ".ogg", ".m4a"),
        *(".npy", ".csv", ".tsv", ".parquet"),
    )
)
_REFERENCE_KEYS = ("reference", "answers", "answer", "label")
ContextKey = tuple[str, str]
"""What a context is found by: a modality and a medium's name, or one of the two below and an id."""
_ANY, _QUESTION = "any", "question"

Source = Iterable[Line]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One question with its two answers, as it goes to a judge.

    Attributes:
        question: the question's record.
        answers: the two answers' records, in the order of the answer files.
        context: the captions and boxes of what the question is about.
        references: texts that count as right answers.
        models: who gave the answers: what their records say, else the name of their file.
        pair: numbers of the two answer files, from 1; None where there are only two.
        problem: why this case cannot be judged, None if it can.
        line: of a line of the questions that is none: its number.
    """

    question: Record
    answers: tuple[Record, ...] = ()
    context: Record | None = None
    references: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    pair: tuple[int, int] | None = None
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
        """The two answers themselves."""
        return tuple(str(answer["text"]) for answer in self.answers)


@dataclass(slots=True)
class Inputs:
    """The files of a review, read by id.

    The first side of `answers` is the baseline; every other side makes a pair with it.

    Attributes:
        names: the sides' files.
        not_questions: lines of the questions' file that are none, with what is wrong.
        contexts: captions and boxes by media name, from the file `contexts_name`.
        mismatches: what did not fit together so far; a run that has any does not end with exit
            code 0.
    """

    questions: dict[str, Record]
    answers: Sequence[dict[str, Record] | Source]
    names: Sequence[str]
    not_questions: Mapping[int, str] = field(default_factory=dict)
    contexts: dict[ContextKey, Record] | None = None
    contexts_name: str = ""
    references: dict[str, Record] | None = None
    mismatches: Mismatches = field(default_factory=Mismatches)
    _said: dict[str, str] = field(default_factory=dict, init=False)
    _files: list[str] = field(default_factory=list, init=False)

    @property
    def remarks(self) -> list[str]:
        """What did not fit together, in a line a file and kind; all of it after `cases`."""
        return self.mismatches.lines()

    def cases(self) -> Iterator[Case]:
        """The cases in the order of the questions, or in that of the answers that stream in.

        A question has as many cases as there are sides beside the first.

        A side of `answers` that is no dictionary is read as it comes, so that each case can be
        judged as soon as its answer is there.
        """
        self._files = distinct_names(self.names)
        for side, name in zip(self.answers, self.names, strict=True):
            if isinstance(side, dict):
                self._said[name] = _answerer(next(iter(side.values()), {}))
        stream = next((side for side in self.answers if not isinstance(side, dict)), None)
        if stream is None:
            for key in self.questions:
                yield from self._cases(key, None)
        else:
            name = self.names[list(self.answers).index(stream)]
            seen: set[str] = set()
            for key, record in self._stream(stream, name, seen):
                yield from self._cases(key, record)
            for key in self.questions:
                if key not in seen:
                    yield from self._cases(key, None)
        for side, name in zip(self.answers, self.names, strict=True):
            for key in side if isinstance(side, dict) else ():
                if key not in self.questions:
                    self.mismatches.add(name, "unasked", key)
        for line, problem in self.not_questions.items():
            yield Case(question={}, problem=problem, line=line)

    def _stream(self, stream: Source, name: str, seen: set[str]) -> Iterator[tuple[str, Record]]:
        for key, record in _keyed(stream, name, self.mismatches):
            self._said.setdefault(name, _answerer(record))
            if key in seen:
                self.mismatches.add(name, "doubled", key)
            elif key not in self.questions:
                self.mismatches.add(name, "unasked", key)
            else:
                yield key, record
            seen.add(key)

    def _cases(self, key: str, streamed: Record | None) -> Iterator[Case]:
        given = [side.get(key) if isinstance(side, dict) else streamed for side in self.answers]
        models = self._models(given)
        for other in range(1, len(given)):
            case = Case(
                question=self.questions[key],
                models=(models[0], models[other]),
                pair=(1, other + 1) if len(given) > 2 else None,
            )
            names = (self.names[0], self.names[other])
            yield self._filled(case, [given[0], given[other]], names)

    def _filled(self, case: Case, given: Sequence[Record | None], names: Sequence[str]) -> Case:
        """The case with its answers and context, or with the reason why it has none."""
        answers: list[Record] = []
        problems: list[str] = []
        key = str(case.question_id)
        for answer, name in zip(given, names, strict=True):
            if answer is None:
                self.mismatches.add(name, "missing", key)
                problems.append(f"no answer in {name}")
            elif "error" in answer:
                self.mismatches.add(name, "failed", key)
                problems.append(f"the answer in {name} failed ({answer['error']})")
            elif not isinstance(answer.get("text"), str):
                self.mismatches.add(name, "wordless", key)
                problems.append(f"the answer in {name} has no text")
            else:
                answers.append(answer)
        if problems:
            return replace(case, problem="; ".join(problems))
        question = case.question
        case = replace(case, answers=tuple(answers))
        if self.contexts is not None and case.modality is not None:
            context = _find_context(question, case.modality, self.contexts)
            if context is None:
                self.mismatches.add(self.contexts_name, "no context", key)
                problem = f"no context for {case.modality} {question[case.modality]}"
                return replace(case, problem=problem)
            case = replace(case, context=context)
        return replace(case, references=self._references(key, question, answers))

    def _models(self, given: Sequence[Record | None]) -> list[str]:
        """The sides' names; those of one name are told apart by their files."""
        models = []
        for name, answer, file in zip(self.names, given, self._files, strict=True):
            # Who did not answer one question is called as in the others that it did answer.
            model = (answer or {}).get("model_id") or self._said.get(name) or file
            models.append(str(model))
        return [
            f"{model} ({file})" if models.count(model) > 1 and model != file else model
            for model, file in zip(models, self._files, strict=True)
        ]

    def _references(self, key: str, question: Record, answers: Sequence[Record]) -> tuple[str, ...]:
        """The right answers: the reference file's, else the question's, else those carried along.

        An answer record carries the keys of the question that it answers.
        """
        if self.references is not None:
            return references_of(self.references.get(key, {}), ("text", *_REFERENCE_KEYS))
        found = map(references_of, (question, *answers))
        return next(filter(None, found), ())

    def has_references(self) -> bool:
        """Whether there is anything at all to compare answers with."""
        files = [self.questions, *(side for side in self.answers if isinstance(side, dict))]
        carried = (references_of(record) for file in files for record in file.values())
        return self.references is not None or any(carried)


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


def read_inputs(
    questions: Path | str,
    answers: Sequence[Path | str | Source],
    *,
    contexts: Path | None = None,
    references: Path | None = None,
) -> Inputs:
    """Reads the files of a review.

    Args:
        questions: the question records.
        answers: two or more answer files, the baseline first; at most one may be a stream.
        contexts: captions and boxes by media name.
        references: answers that count as right, by question id.

    Raises:
        RecordError: a file cannot be read. A line that is no record is a mismatch.
    """
    mismatches = Mismatches()
    not_questions: dict[int, str] = {}
    asked = records_by_id(questions, mismatches, not_questions)
    sides: list[dict[str, Record] | Source] = []
    names: list[str] = []
    for side in answers:
        if isinstance(side, Path | str):
            names.append(legible(str(side)))
            sides.append(records_by_id(side, mismatches))
        else:
            names.append("stdin")
            sides.append(side)
    return Inputs(
        questions=asked,
        answers=sides,
        names=names,
        not_questions=not_questions,
        contexts=None if contexts is None else _contexts(contexts, mismatches),
        contexts_name=str(contexts),
        references=None if references is None else records_by_id(references, mismatches),
        mismatches=mismatches,
    )


def distinct_names(files: Sequence[str]) -> list[str]:
    """What to call files: by their names, and as many folders above as tell them apart."""
    paths = [PurePath(file).parts for file in files]
    tails = []
    for path in paths:
        others = [other for other in paths if other != path]
        alone = (n for n in range(1, len(path)) if all(o[-n:] != path[-n:] for o in others))
        tails.append(str(PurePath(*path[-next(alone, len(path)) :])))
    short = [tail.partition(".json")[0] or tail for tail in tails]
    return short if len(set(short)) == len(set(tails)) else tails


def digest(*parts: object) -> str:
    """A short hash of JSON values, the same in every run."""
    text = json.dumps(parts, ensure_ascii=False, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:22]


def records_by_id(
    path: Path | str, mismatches: Mismatches, unusable: dict[int, str] | None = None
) -> dict[str, Record]:
    """The records by id. Of two with the same id the first counts, and the second is reported.

    Args:
        path: the file.
        mismatches: where that is reported, and what is no record with an id.
        unusable: filled with the latter, by line.
    """
    found: dict[str, Record] = {}
    name = legible(str(path))
    for key, record in _keyed(read_lines(path), name, mismatches, unusable):
        if key in found:
            mismatches.add(name, "doubled", key)
        else:
            found[key] = record
    return found


def _keyed(
    lines: Iterable[Line], name: str, mismatches: Mismatches, unusable: dict[int, str] | None = None
) -> Iterator[tuple[str, Record]]:
    for line in lines:
        if "error" in line.record and "line" in line.record and "question_id" not in line.record:
            continue  # of `vqa`: a line of its questions that was none
        try:
            if line.problem is not None:
                raise line.problem
            key = str(record_id(line.record))
        except RecordError as error:
            mismatches.add(name, "unusable", f"{line.number}: {error.what}")
            if unusable is not None:
                unusable[line.number] = f"{line.where}: {error.what}"
        else:
            yield key, line.record


def _answerer(answer: Record) -> str:
    return str(answer.get("model_id") or "")


def _contexts(path: Path, mismatches: Mismatches) -> dict[ContextKey, Record]:
    """Contexts by each name that a question may use for the media, or by the question's id."""
    found: dict[ContextKey, Record] = {}
    for record, _, number, problem in read_lines(path):
        keys = [(key, _media_key(record[key])) for key in MODALITIES if key in record]
        if not keys and "id" in record:
            keys = [(_ANY, _media_key(record["id"]))]
        if "question_id" in record:
            keys.append((_QUESTION, str(record["question_id"])))
        if problem is not None or not keys:
            what = "a context names no media" if problem is None else problem.what
            mismatches.add(str(path), "unusable", f"{number}: {what}")
            continue
        for key in keys:
            if found.setdefault(key, record) != record:
                mismatches.add(str(path), "doubled", key[1])
    return found


def _find_context(
    question: Record, modality: str, contexts: Mapping[ContextKey, Record]
) -> Record | None:
    named = question[modality]
    name = _media_key(named[0] if isinstance(named, list) and named else named)
    for key in ((modality, name), (_ANY, name), (_QUESTION, str(record_id(question)))):
        if key in contexts:
            return contexts[key]
    return None


def _media_key(name: object) -> str:
    """One spelling for `000000296284`, `000000296284.jpg` and `COCO_val2014_000000296284.jpg`."""
    text = str(name)
    for prefix in _COCO_PREFIXES:
        text = text.removeprefix(prefix)
    path = PurePosixPath(text)
    return str(path.with_suffix("")) if path.suffix.lower() in _MEDIA_SUFFIXES else text
