"""The file of answers: continued by id, and in the order of the questions at the end.

While a run works, records are appended; a question that failed in an earlier run and succeeds in
this one lands behind those that were done already. When the last question is through, the file is
put in order once, and replaced whole.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from chatbind_cli.console import printable
from chatbind_cli.errors import ChatBindError, RecordError
from chatbind_cli.files import replace_file
from chatbind_cli.inference.decoding import Generated
from chatbind_cli.inference.questions import Question, answer_record, failed_record
from chatbind_cli.jsonl import Record, RecordWriter, read_records

KEY = "question_id"

_OF_ONE_ANSWER = {"n_tokens", "finish_reason"}


class DoubledQuestionError(RecordError):
    """The id of a question is that of one before."""


class AnswerFile:
    """Where answers go.

    Args:
        target: a path, or `-` for standard output.
        overwrite: start anew instead of continuing what is there.
        model_id: whose answers these are; a file with another model's is not continued.
        metadata: what every answer of this run says of how it was generated; a file whose first
            answer was generated otherwise is not continued, since its answers would not be
            comparable.

    Raises:
        RecordError: the file there cannot be continued.
    """

    def __init__(
        self,
        target: str | Path,
        *,
        overwrite: bool = False,
        model_id: str,
        metadata: Mapping[str, Any],
    ) -> None:
        self._path = None if str(target) == "-" else Path(target)
        if self._path is not None and not overwrite:
            _check_metadata(self._path, metadata)
        self._model_id = model_id
        self._metadata = metadata
        self._writer = RecordWriter(
            target,
            key=KEY,
            overwrite=overwrite,
            expect={"model_id": model_id},
            in_words=in_words,
        )
        self._continued = bool(self._writer.done)
        self._order: dict[Hashable, tuple[int, str | None]] = {}

    def expect(self, question: Question) -> Question:
        """Notes that a question is next in line; one whose id stands before is a problem."""
        key = question.id if question.line is None else ("line", question.line)
        _, first = self._order.setdefault(key, (len(self._order), question.where))
        if first == question.where:
            return question
        problem = DoubledQuestionError(
            f"question {question.id} stands at {first} already", where=question.where
        )
        return replace(question, problem=problem)

    def wants(self, question: Question) -> bool:
        """Whether the answer to a question is still missing."""
        doubled = isinstance(question.problem, DoubledQuestionError)
        return doubled or question.line is not None or question.id not in self._writer.done

    def write(self, question: Question, outcome: Generated | ChatBindError) -> None:
        """Writes one answer, or why there is none, and hands it to the operating system."""
        if isinstance(outcome, Generated):
            record = answer_record(
                question, outcome, model_id=self._model_id, metadata=self._metadata
            )
        else:
            record = failed_record(question, outcome, model_id=self._model_id)
        self._writer.write(record)

    def finish(self) -> None:
        """Puts the file in the order of the questions; answers to others stay behind them.

        Call it when every question is through.
        """
        self._writer.close()
        if self._path is None or not self._continued:
            return
        places = list(_places(self._path))
        last = (len(self._order), None)
        ordered = sorted(places, key=lambda place: self._order.get(place[0], last)[0])
        if ordered == places:
            return
        with (
            replace_file(self._path) as temporary,
            self._path.open("rb") as old,
            temporary.open("wb") as new,
        ):
            for _, start, end in ordered:
                old.seek(start)
                new.write(old.read(end - start))

    def close(self) -> None:
        """Closes the file, in whatever order it is."""
        self._writer.close()


def in_words(record: Record) -> str:
    """An answer as a person reads it: what was asked, and below it what was said."""
    said = record.get("text", f"error: {record.get('error')}")
    asked = "  ".join(" ".join(str(record.get(key, "")).split()) for key in (KEY, "prompt"))
    return printable(f"{asked.rstrip()}\n    {said}")


def _check_metadata(path: Path, metadata: Mapping[str, Any]) -> None:
    """Compares how the file's first answer was generated with how this run generates them.

    Raises:
        RecordError: they differ.
    """
    first = _first_answer(path)
    if first is None:
        return
    there = first.get("metadata")
    if not isinstance(there, dict) or not there.keys() & metadata.keys():
        # somebody else's file, which does not say
        return
    both = there.keys() & metadata.keys()
    keys = (there.keys() | metadata.keys()) - _OF_ONE_ANSWER
    for key in sorted(keys, key=lambda key: (key not in both, key)):
        if there.get(key) != metadata.get(key):
            raise RecordError(
                f"its answers were made with {key} {there.get(key)!r}, "
                f"this run has {metadata.get(key)!r}",
                where=str(path),
                hint="give another output file, or --overwrite",
            )


def _first_answer(path: Path) -> Record | None:
    """The first whole record without an error; a broken one is the writer's business."""
    if not path.is_file():
        return None
    try:
        for record, _ in read_records(path):
            if "error" not in record:
                return record
    except RecordError:
        return None
    return None


def _places(path: Path) -> Iterator[tuple[Hashable, int, int]]:
    """The id, start and end of every line; the id of what was no question is its line's number."""
    with path.open("rb") as file:
        lines = [len(line) for line in file]
    start = 0
    for (record, _), length in zip(read_records(path), lines, strict=True):
        identity = ("line", record["line"]) if "line" in record else record[KEY]
        yield identity, start, start + length
        start += length
