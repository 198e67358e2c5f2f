"""Answers a stream of question records: what runs inside `vqa`.

Questions are taken in batches on a fixed grid of positions. A batch that was partly answered
before a kill is computed whole again, and only what is missing is written: the arithmetic of an
answer depends on its neighbours in the batch, and so a continued file is the same, byte for byte,
as that of a run that was never disturbed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from chatbind_cli.answering.answer_file import AnswerFile
from chatbind_cli.answering.crew import Crew
from chatbind_cli.answering.generation import Generated
from chatbind_cli.answering.intake import Item, gather
from chatbind_cli.answering.questions import (
    answer_record,
    failed_record,
    identity_of,
    read_question,
)
from chatbind_cli.answering.session import Answerer, Prepared
from chatbind_cli.answering.settings import GenerationSettings
from chatbind_cli.console import note
from chatbind_cli.data.encoding import GPU_FAILED
from chatbind_cli.errors import ChatBindError, RecordError, SomeRecordsFailed, contained
from chatbind_cli.jsonl import Line, Record

_SHOWN = 3

Outcome = Generated | ChatBindError


@dataclass(frozen=True, kw_only=True)
class Job:
    """How questions are answered.

    Args:
        model_id: whose answers the records say they are.
        making: what every answer's metadata says about its making.
        batch_size: questions that are answered together.
        on_error: `record`: a question that fails gets a record with an `error`; `skip`: none;
            `fail`: it ends the run.
    """

    model_id: str
    making: Mapping[str, Any]
    batch_size: int
    on_error: str = "record"


@dataclass(frozen=True, slots=True)
class Entry:
    """A question in its batch.

    Args:
        id: its id, None where there is none that can be used.
        record: as it was read.
        where: file and line.
        line: the number of that line.
        problem: why it is not to be answered, None if it is.
        doubled: whether that is because its id stands before.
    """

    id: str | int | None
    record: Record
    where: str
    line: int = 0
    problem: RecordError | None = None
    doubled: bool = False


class Run:
    """Reads questions, has them answered, and writes the answers in order.

    Args:
        output: where the answers go; in the leading process only.
        crew: who works.
        work: answers a batch, see `answer_batch`.
        job: how.
        on_done: called with the number of questions that have just been dealt with.
    """

    def __init__(
        self,
        output: AnswerFile,
        crew: Crew,
        work: Callable[[list[Entry]], list[Outcome]],
        job: Job,
        on_done: Callable[[int], None] = lambda n: None,
    ) -> None:
        self._output = output
        self._crew = crew
        self._work = work
        self._job = job
        self._on_done = on_done
        self._asked = 0
        self._failures: list[str] = []
        self._doubled: list[str | int | None] = []

    def answer(self, records: Iterator[Item], *, idle_seconds: float | None = None) -> None:
        """Answers all questions.

        Args:
            records: question records with the places where they stand.
            idle_seconds: see `gather`.

        Raises:
            SomeRecordsFailed: every question is through, and some of them failed.
            ChatBindError: the questions cannot be read; or, where the job says so, what a
                question failed with.
        """
        rounds = self._rounds(gather(records, self._job.batch_size, idle_seconds=idle_seconds))
        for batch, outcomes in self._crew.results(rounds, self._work):
            for entry, outcome in zip(batch, outcomes, strict=True):
                self._settle(entry, outcome)
            self._on_done(len(batch))
        self._output.finish()
        if not self._asked:
            note("there are no questions")
        if self._doubled:
            ids = dict.fromkeys(map(str, self._doubled))
            first = ", ".join(list(ids)[:_SHOWN]) + (", ..." if len(ids) > _SHOWN else "")
            note(f"left out: {len(self._doubled)} questions whose id stands before: {first}")
        if self._failures:
            raise SomeRecordsFailed(
                f"{len(self._failures)} of {self._asked} questions failed",
                hint=f"the first: {self._failures[0]}",
            )

    def _rounds(self, batches: Iterator[list[Item]]) -> Iterator[list[list[Entry]]]:
        """Batches with something to do in them, as many at once as there are processes."""
        waiting: list[list[Entry]] = []
        for batch in batches:
            entries = [self._entry(line) for line in batch]
            self._asked += len(entries)
            if any(self._is_open(entry) for entry in entries):
                waiting.append(entries)
            else:
                self._on_done(len(entries))
            # a batch that is not full was closed by a pause, or is the last
            if waiting and (len(waiting) == self._crew.size or len(batch) < self._job.batch_size):
                yield waiting
                waiting = []
        if waiting:
            yield waiting

    def _entry(self, line: Line) -> Entry:
        record, where, number, problem = line
        identity: str | int | None = None
        try:
            identity = identity_of(record, where)
        except RecordError as error:
            problem = problem or error
        if problem is not None:
            # another line may be the question that goes by this id
            self._output.expect(("line", number), where)
            return Entry(identity, record, where, number, problem)
        first = self._output.expect(identity, where)
        if first == where:
            return Entry(identity, record, where, number)
        problem = RecordError(f"question {identity} stands at {first} already", where=where)
        return Entry(identity, record, where, number, problem, doubled=True)

    def _is_open(self, entry: Entry) -> bool:
        return entry.problem is not None or self._output.wants(entry.id)

    def _settle(self, entry: Entry, outcome: Outcome) -> None:
        """Writes what is to be written of one question."""
        if not self._is_open(entry):
            return
        job = self._job
        if isinstance(outcome, Generated):
            question = read_question(entry.record, entry.where)
            self._output.write(
                answer_record(question, outcome, model_id=job.model_id, making=job.making)
            )
            return
        if job.on_error == "fail":
            raise outcome
        self._failures.append(str(outcome))
        if entry.doubled:
            # the id has its record; a second one would make the file ambiguous
            self._doubled.append(entry.id)
        elif job.on_error == "skip":
            note(f"left out: {outcome}")
        else:
            line = None if entry.problem is None else entry.line
            self._output.write(failed_record(entry.record, entry.id, outcome, job.model_id, line))


def answer_batch(
    answerer: Answerer, settings: GenerationSettings, batch: list[Entry]
) -> list[Outcome]:
    """Answers the questions of a batch together; one outcome an entry, in order.

    Raises:
        ChatBindError: nothing can be answered (the encoder is not there).
    """
    outcomes: dict[int, Outcome] = {}
    questions = {}
    for place, entry in enumerate(batch):
        try:
            if entry.problem is not None:
                raise entry.problem
            questions[place] = read_question(entry.record, entry.where)
        except Exception as error:
            outcomes[place] = contained(error, where=entry.where)
    prepared = answerer.prepare([question.asked for question in questions.values()])
    ready: dict[int, Prepared] = {}
    for place, result in zip(questions, prepared, strict=True):
        if isinstance(result, Prepared):
            ready[place] = result
        else:
            outcomes[place] = result
    if ready:
        chosen = [(batch[place], question) for place, question in ready.items()]
        outcomes.update(zip(ready, _generated(answerer, settings, chosen), strict=True))
    return [outcomes[place] for place in range(len(batch))]


def _generated(
    answerer: Answerer, settings: GenerationSettings, questions: list[tuple[Entry, Prepared]]
) -> list[Outcome]:
    """Answers questions together, or each alone if one of them makes that fail."""
    salt = "\0".join(str(entry.id) for entry, _ in questions)
    try:
        return [*answerer.generate([asked for _, asked in questions], settings, salt=salt)]
    except GPU_FAILED:
        raise
    except Exception as error:
        if len(questions) == 1:
            return [contained(error, where=questions[0][0].where)]
        return [outcome for one in questions for outcome in _generated(answerer, settings, [one])]
