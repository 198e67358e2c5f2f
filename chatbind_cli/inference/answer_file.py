"""The file of answers: continued by id, and in the order of the questions at the end.

While a run works, records are appended as they are done, in whatever order. When the last question
is through, the file is put in order once, and replaced whole. What goes to standard output has to
come in order.
"""

from __future__ import annotations

import json
from collections.abc import Hashable
from contextlib import suppress
from pathlib import Path

from chatbind_cli.console import note
from chatbind_cli.errors import ChatBindError, RecordError, SomeRecordsFailed
from chatbind_cli.files import replace_file
from chatbind_cli.inference.answer_record import AnswerRecords
from chatbind_cli.inference.decoding import Generated
from chatbind_cli.inference.questions import Question
from chatbind_cli.jsonl import Record, RecordWriter, read_records

_SHOWN = 3


class AnswerFile:
    """Where answers go, and what is done about questions that have none.

    Args:
        target: a path, or `-` for standard output.
        form: how answers are written down. A file with another model's is not continued, nor one
            whose first answer was generated otherwise: they would not be comparable.
        overwrite: start anew instead of continuing what is there.
        on_error: `record`: a question that fails gets a record with an `error`; `skip`: none;
            `fail`: it ends the run.

    Attributes:
        is_stream: answers go to standard output or a pipe, where they have to come in order.

    Raises:
        RecordError: the file there cannot be continued.
    """

    def __init__(
        self,
        target: str | Path,
        form: AnswerRecords,
        *,
        overwrite: bool = False,
        on_error: str = "record",
    ) -> None:
        self._form = form
        self._path = None if str(target) == "-" else Path(target)
        self.is_stream = self._path is None or (self._path.exists() and not self._path.is_file())
        if self._path is not None and not overwrite:
            _check_first(self._path, form)
        self._on_error = on_error
        self._writer = RecordWriter(
            target,
            key=form.key,
            overwrite=overwrite,
            expect=form.expect,
            in_words=form.in_words,
        )
        self._places: dict[Hashable, str | None] = {}
        self._doubled: list[str] = []
        self._failures: list[ChatBindError] = []

    def wants(self, question: Question) -> bool:
        """Whether the answer to the question that is next in line is still missing.

        Raises:
            ChatBindError: its id stands before, and a failure ends the run.
        """
        if question.key not in self._places:
            self._places[question.key] = question.where
            return question.line is not None or question.id not in self._writer.done
        # the id has its record; a second one would make the file ambiguous
        self._doubled.append(str(question.id))
        first = self._places[question.key]
        problem = f"question {question.id} stands at {first} already"
        self._fail(RecordError(problem, where=question.where))
        return False

    def write(self, question: Question, outcome: Generated | ChatBindError) -> None:
        """Writes one answer, or why there is none, and hands it to the operating system.

        Raises:
            ChatBindError: there is none, and a failure ends the run.
        """
        if isinstance(outcome, Generated):
            self._writer.write(self._form.answer(question, outcome))
            return
        self._fail(outcome)
        if self._on_error == "skip":
            note(f"left out: {outcome}")
        else:
            self._writer.write(self._form.failure(question, outcome))

    def _fail(self, error: ChatBindError) -> None:
        if self._on_error == "fail":
            raise error
        self._failures.append(error)

    def finish(self) -> None:
        """Puts the file in the order of the questions; answers to others stay behind them.

        Call it when every question is through.

        Raises:
            SomeRecordsFailed: questions have failed.
        """
        self._writer.close()
        if self._path is not None and not self.is_stream:
            self._order(self._path)
        if not self._places:
            note("there are no questions")
        if self._doubled:
            ids = list(dict.fromkeys(self._doubled))
            first = ", ".join(ids[:_SHOWN]) + (", ..." if len(ids) > _SHOWN else "")
            note(f"left out: {len(self._doubled)} questions whose id stands before: {first}")
        if self._failures:
            asked = len(self._places) + len(self._doubled)
            raise SomeRecordsFailed(
                f"{len(self._failures)} of {asked} questions failed",
                hint=f"the first: {self._failures[0]}",
            )

    def _order(self, path: Path) -> None:
        order = {key: number for number, key in enumerate(self._places)}
        lines: list[tuple[int, int, int]] = []
        start = 0
        with path.open("rb") as file:
            for line in file:
                record = json.loads(line)
                key = ("line", record["line"]) if "line" in record else record[self._form.key]
                end = start + len(line)
                lines.append((order.get(key, len(order)), start, end))
                start = end
        ordered = sorted(lines)
        if ordered == lines:
            return
        # line by line: there may be more than memory holds
        with replace_file(path) as temporary, path.open("rb") as old, temporary.open("wb") as new:
            for _, start, end in ordered:
                old.seek(start)
                new.write(old.read(end - start))

    def close(self) -> None:
        """Closes the file, in whatever order it is."""
        self._writer.close()


def _check_first(path: Path, form: AnswerRecords) -> None:
    """Compares how the file's first answer was generated with how this run generates them.

    Raises:
        RecordError: they differ.
    """
    there: Record | None = None
    if path.is_file():
        with suppress(RecordError):  # a broken line is the writer's business
            records = (record for record, _ in read_records(path))
            there = next((r for r in records if r.get("error") is None), None)
    differs = form.differs(there) if there is not None else None
    if differs is not None:
        raise RecordError(
            f"its answers were made {differs}",
            where=str(path),
            hint="give another output file, or --overwrite",
        )
