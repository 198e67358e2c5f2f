"""Answers a stream of question records: what runs inside `vqa`.

Questions are taken in batches on a fixed grid of positions. A batch that was partly answered
before a kill is computed whole again, and only what is missing is written: the arithmetic of an
answer depends on its neighbours in the batch, and so a continued file is the same, byte for byte,
as that of a run that was never disturbed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from chatbind_cli.console import Progress, note
from chatbind_cli.data.encoding import GPU_FAILED
from chatbind_cli.data.process_group import ProcessGroup
from chatbind_cli.errors import ChatBindError, SomeRecordsFailed, contained
from chatbind_cli.inference.answer_file import AnswerFile, DoubledQuestionError
from chatbind_cli.inference.answerer import Answerer
from chatbind_cli.inference.batching import count_questions, gather, open_questions
from chatbind_cli.inference.decoding import Generated
from chatbind_cli.inference.generation_settings import GenerationSettings
from chatbind_cli.inference.loading import LoadedModel
from chatbind_cli.inference.media_encoder import MediaEncoder, StoredEmbeddings
from chatbind_cli.inference.questions import Question, read_question
from chatbind_cli.jsonl import Line
from chatbind_cli.media.root import MediaRoot

_SHOWN = 3

Outcome = Generated | ChatBindError


@dataclass(frozen=True, kw_only=True)
class VqaRequest:
    """What the options of `vqa` say, but for the model.

    Args:
        questions: file of question records, `-` for standard input.
        media_root: where the records' media lie.
        store: embedding store in place of media and encoder.
        output: file of answer records, `-` for standard output.
        overwrite: start the file anew.
        on_error: `record`: a question that fails gets a record with an `error`; `skip`: none;
            `fail`: it ends the run.
        settings: of generation.
        batch_size: questions that are answered together.
        workers: threads that read media.
        prompt_style: None for the model's own.
        attn_implementation: as the user said it.
        media: fields of `MediaOptions` that differ from the model's training.
    """

    questions: str
    media_root: MediaRoot
    store: Path | None
    output: str
    overwrite: bool
    on_error: str
    settings: GenerationSettings
    batch_size: int
    workers: int
    prompt_style: str | None
    attn_implementation: str
    media: Mapping[str, Any]


def vqa(loaded: LoadedModel, request: VqaRequest) -> None:
    """Answers all questions.

    Raises:
        SomeRecordsFailed: some of them could not be answered.
        ChatBindError: something that all of them need is not there or broken.
    """
    answerer = Answerer(loaded, _media_encoder(loaded, request), style=request.prompt_style)
    work = partial(answer_batch, answerer, request.settings)
    with ProcessGroup() as group:
        if not group.leads:
            group.follow(work)
            return
        output = AnswerFile(
            request.output,
            overwrite=request.overwrite,
            model_id=loaded.model_id,
            metadata=_metadata(loaded, answerer, request),
        )
        with (
            closing(output),
            Progress(count_questions(request.questions), "answering", "questions") as progress,
        ):
            run = Run(output, group, work, request.batch_size, request.on_error, progress.advance)
            lines, idle_seconds = open_questions(request.questions)
            run.answer(lines, idle_seconds=idle_seconds)


def _media_encoder(loaded: LoadedModel, request: VqaRequest) -> MediaEncoder | StoredEmbeddings:
    options = loaded.media_options(**request.media)
    if request.store is not None:
        return StoredEmbeddings(request.store, loaded, options)
    return MediaEncoder(
        loaded,
        options=options,
        open_media=request.media_root.open,
        workers=request.workers,
    )


def _metadata(loaded: LoadedModel, answerer: Answerer, request: VqaRequest) -> dict[str, Any]:
    """What every answer says of how it was generated, so that unlike answers never mix."""
    metadata: dict[str, Any] = {
        "model_sha256": loaded.sha256,
        "prompt_style": answerer.prompts.style.name,
        **request.settings.as_record(),
        "batch_size": request.batch_size,
        "dtype": str(loaded.dtype).removeprefix("torch."),
    }
    if request.attn_implementation != "auto":
        metadata["attn_implementation"] = request.attn_implementation
    if request.media:
        metadata["media_options"] = dict(request.media)
    return metadata | answerer.media_encoder.identity()


class Run:
    """Reads questions, has them answered, and writes the answers in order.

    Args:
        output: where the answers go.
        group: the processes that answer.
        work: answers a batch, see `answer_batch`.
        batch_size: questions that are answered together.
        on_error: see `VqaRequest`.
        on_done: called with the number of questions that have just been dealt with.
    """

    def __init__(
        self,
        output: AnswerFile,
        group: ProcessGroup,
        work: Callable[[list[Question]], list[Outcome]],
        batch_size: int,
        on_error: str = "record",
        on_done: Callable[[int], None] = lambda n: None,
    ) -> None:
        self._output = output
        self._group = group
        self._work = work
        self._batch_size = batch_size
        self._on_error = on_error
        self._on_done = on_done
        self._asked = 0
        self._failures: list[str] = []
        self._doubled: list[str | int | None] = []

    def answer(self, lines: Iterator[Line], *, idle_seconds: float | None = None) -> None:
        """Answers all questions.

        Args:
            lines: question records with the places where they stand.
            idle_seconds: see `gather`.

        Raises:
            SomeRecordsFailed: every question is through, and some of them failed.
            ChatBindError: the questions cannot be read; or, with `fail`, what a question failed
                with.
        """
        rounds = self._rounds(gather(lines, self._batch_size, idle_seconds=idle_seconds))
        for batch, outcomes in self._group.results(rounds, self._work):
            for question, outcome in zip(batch, outcomes, strict=True):
                self._write(question, outcome)
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

    def _rounds(self, batches: Iterator[list[Line]]) -> Iterator[list[list[Question]]]:
        """Batches with something to do in them, as many at once as there are processes."""
        waiting: list[list[Question]] = []
        for batch in batches:
            questions = [self._output.expect(read_question(line)) for line in batch]
            self._asked += len(questions)
            if any(map(self._output.wants, questions)):
                waiting.append(questions)
            else:
                self._on_done(len(questions))
            # a batch that is not full was closed by a pause, or is the last
            if waiting and (len(waiting) == self._group.size or len(batch) < self._batch_size):
                yield waiting
                waiting = []
        if waiting:
            yield waiting

    def _write(self, question: Question, outcome: Outcome) -> None:
        """Writes what is to be written of one question."""
        if not self._output.wants(question):
            return
        if isinstance(outcome, Generated):
            self._output.write(question, outcome)
            return
        if self._on_error == "fail":
            raise outcome
        self._failures.append(str(outcome))
        if isinstance(question.problem, DoubledQuestionError):
            # the id has its record; a second one would make the file ambiguous
            self._doubled.append(question.id)
        elif self._on_error == "skip":
            note(f"left out: {outcome}")
        else:
            self._output.write(question, outcome)


def answer_batch(
    answerer: Answerer, settings: GenerationSettings, batch: Sequence[Question]
) -> list[Outcome]:
    """Answers the questions of a batch together; one outcome a question, in order.

    Raises:
        ChatBindError: nothing can be answered (the encoder is not there).
    """
    questions = answerer.prepare(batch)
    ready = [question for question in questions if question.problem is None]
    outcomes = iter(_generated(answerer, settings, ready))
    return [question.problem or next(outcomes) for question in questions]


def _generated(
    answerer: Answerer, settings: GenerationSettings, questions: list[Question]
) -> list[Outcome]:
    """Answers questions together, or each alone if one of them makes that fail."""
    salt = "\0".join(str(question.id) for question in questions)
    try:
        return [*answerer.generate(questions, settings, salt=salt)]
    except GPU_FAILED:
        raise
    except Exception as error:
        if len(questions) == 1:
            return [contained(error, where=str(questions[0].where))]
        return [outcome for one in questions for outcome in _generated(answerer, settings, [one])]
