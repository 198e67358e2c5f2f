"""Answers a stream of question records: what runs inside `vqa`.

Answers do not depend on what is answered beside them, nor on who answers: a file that is continued
after a kill is the same, byte for byte, as that of a run that was never disturbed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing
from functools import partial
from itertools import islice
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chatbind_cli.console import Progress
from chatbind_cli.data.work_queue import Worker, WorkQueue, follow, work_queue
from chatbind_cli.inference.answer_file import AnswerFile
from chatbind_cli.inference.answer_record import AnswerRecords
from chatbind_cli.inference.batch_file import BatchLines, read_batch
from chatbind_cli.inference.decoding import Outcome
from chatbind_cli.inference.generation_settings import GenerationSettings
from chatbind_cli.inference.question_record import odd_keys_noted, read_question
from chatbind_cli.inference.questions import Question, count_questions, open_questions
from chatbind_cli.jsonl import Line
from chatbind_cli.media.root import MediaRoot
from chatbind_cli.worker_pool import WorkerPool

if TYPE_CHECKING:
    from chatbind_cli.inference.answerer import Answerer
    from chatbind_cli.inference.engine import Engine
    from chatbind_cli.inference.loaded_model import LoadedModel

_ROOM = 2
"""Batches of questions that a worker has: the next one is read while it answers."""

_KEY = attrgetter("key")


def vqa(
    load: Callable[[], LoadedModel],
    settings: GenerationSettings,
    *,
    connect: Callable[[LoadedModel], AbstractContextManager[Engine | None]],
    choices: bool,
    media_root: MediaRoot,
    media: Mapping[str, Any],
    stores: Sequence[Path],
    batch_size: int,
    workers: int,
    prompt_style: str | None,
    pool: WorkerPool,
    **files: Any,
) -> None:
    """Answers all questions of the `files` (see `answer_file`) with a model.

    Of the fields of `MediaOptions`, `media` has those that differ from the model's training. The
    model is loaded, and an engine elsewhere found, where questions are answered.

    Raises:
        SomeRecordsFailed: some of them could not be answered.
        ChatBindError: something that all of them need is not there or broken.
    """

    def begin() -> Worker[Question, Outcome]:
        loaded = load()
        engine = open_engines.enter_context(connect(loaded))
        how = {"style": prompt_style, "engine": engine, "batch_size": batch_size}
        answerer = _answerer(loaded, media, media_root, stores, workers, **how)
        asked = {"choices": True} if choices else settings.as_record()
        metadata = _metadata(answerer, loaded, asked, media)
        return Worker(
            partial(answerer.run, settings=settings),
            room=_ROOM * batch_size,
            said={"model_id": loaded.model_id, "metadata": metadata},
        )

    with ExitStack() as open_engines:
        if pool.follows:
            follow(begin, _KEY)
            return
        answer_file(begin, settings, choices=choices, pool=pool, **files)


def answer_file(
    begin: Callable[[], Worker[Question, Outcome]],
    settings: GenerationSettings,
    *,
    choices: bool = False,
    batch: bool = False,
    questions: str,
    shard: tuple[int, int],
    limit: int | None,
    output: str,
    overwrite: bool,
    on_error: str,
    pool: WorkerPool,
) -> None:
    """Answers the questions of a file, as the help of `vqa` says for the options of those names.

    Args:
        begin: gets ready to answer; `said` holds the `model_id` and `metadata` of answers.
        settings: how, where a question does not say.
        choices: each question leaves answers to choose from.
        batch: questions and answers are lines of OpenAI's batch files.
        questions: where they are.
        shard: which stretch of them, and of how many.
        limit: how many at most.
        output: where answers go.
        overwrite: start that anew.
        on_error: what to do about a question that fails.
        pool: who answers.

    Raises:
        SomeRecordsFailed: some of them could not be answered.
        ChatBindError: something that all of them need is not there or broken.
    """
    with work_queue(pool, begin, _KEY) as queue:
        form = (BatchLines if batch else AnswerRecords)(**queue.said)
        file = AnswerFile(output, form, overwrite=overwrite, on_error=on_error)
        progress = Progress(count_questions(questions, shard, limit), "answering", "questions")
        with closing(file), progress:
            lines = islice(open_questions(questions, shard), limit)
            asked = _read(lines, settings, choices, queue.said["model_id"] if batch else None)
            answer_all(asked, file, queue, progress.advance)


def _read(
    lines: Iterator[Line], settings: GenerationSettings, choices: bool, model_id: str | None
) -> Iterator[Question]:
    """The questions in records; of a batch file, which this model answers."""
    if model_id is not None:
        return read_batch(lines, settings, model_id)
    return map(partial(read_question, settings=settings, choices=choices), odd_keys_noted(lines))


def _metadata(
    answerer: Answerer, loaded: LoadedModel, asked: Mapping[str, Any], media: Mapping[str, Any]
) -> dict[str, Any]:
    """What every answer says of how it was made."""
    return {
        **(answerer.engine.identity() | loaded.identity()),
        "prompt_style": answerer.prompts.style.name,
        **asked,
        **({"media_options": dict(media)} if media else {}),
        **answerer.media_encoder.identity(),
    }


def _answerer(
    loaded: LoadedModel,
    media: Mapping[str, Any],
    media_root: MediaRoot,
    stores: Sequence[Path],
    workers: int,
    **how: Any,
) -> Answerer:
    # they bring torch, which a leader does without
    from chatbind_cli.inference.answerer import Answerer  # noqa: PLC0415
    from chatbind_cli.inference.media_encoder import MediaEncoder, StoredEmbeddings  # noqa: PLC0415

    options = loaded.media_options(**media)
    if stores:
        return Answerer(loaded, StoredEmbeddings(stores, loaded, options), **how)
    encoder = MediaEncoder(loaded, options=options, open_media=media_root.open, workers=workers)
    return Answerer(loaded, encoder, readers=workers, **how)


def answer_all(
    questions: Iterable[Question],
    file: AnswerFile,
    queue: WorkQueue[Question, Outcome],
    on_done: Callable[[], None],
) -> None:
    """Has those questions answered that the file has no answer to, and writes that.

    Args:
        questions: as they were read.
        file: where answers go; to standard output in the order of the questions.
        queue: who answers.
        on_done: called for each question that has been dealt with.

    Raises:
        SomeRecordsFailed: every question is through, and some of them failed.
        ChatBindError: the questions cannot be read; or what a question failed with, where that
            ends the run.
    """

    def missing() -> Iterator[Question]:
        for question in questions:
            if file.wants(question):
                yield question
            else:
                on_done()

    for question, outcome in queue.results(missing(), in_order=file.is_stream):
        file.write(question, outcome)
        on_done()
    file.finish()
