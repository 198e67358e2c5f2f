"""Answers a stream of question records: what runs inside `vqa`.

Questions are taken in batches on a fixed grid of positions. A batch that was partly answered
before a kill is computed whole again, and only what is missing is written: the arithmetic of an
answer depends on its neighbours in the batch, and so a continued file is the same, byte for byte,
as that of a run that was never disturbed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from chatbind_cli.console import Progress
from chatbind_cli.data.process_group import ProcessGroup
from chatbind_cli.inbox import Inbox
from chatbind_cli.inference.answer_file import AnswerFile
from chatbind_cli.inference.answerer import Answerer
from chatbind_cli.inference.decoding import Outcome
from chatbind_cli.inference.generation_settings import GenerationSettings
from chatbind_cli.inference.loaded_model import LoadedModel
from chatbind_cli.inference.media_encoder import MediaEncoder, StoredEmbeddings
from chatbind_cli.inference.question_record import odd_keys_noted, read_question
from chatbind_cli.inference.questions import (
    Question,
    count_questions,
    gather,
    open_questions,
)
from chatbind_cli.jsonl import Line
from chatbind_cli.media.root import MediaRoot


def vqa(
    loaded: LoadedModel,
    settings: GenerationSettings,
    *,
    questions: str,
    limit: int | None,
    choices: bool,
    media_root: MediaRoot,
    media: Mapping[str, Any],
    store: Path | None,
    output: str,
    overwrite: bool,
    on_error: str,
    batch_size: int,
    workers: int,
    prompt_style: str | None,
    attn_implementation: str,
) -> None:
    """Answers all questions, as the help of `vqa` says for the options of the same names.

    Of the fields of `MediaOptions`, `media` has those that differ from the model's training.

    Raises:
        SomeRecordsFailed: some of them could not be answered.
        ChatBindError: something that all of them need is not there or broken.
    """
    encoder = _media_encoder(loaded, media, media_root, store, workers)
    answerer = Answerer(loaded, encoder, style=prompt_style, batch_size=batch_size)
    work = partial(answer_batch, answerer, settings)
    with ProcessGroup() as group:
        if not group.leads:
            group.follow(work)
            return
        metadata: dict[str, Any] = {
            "model_sha256": loaded.sha256,
            "prompt_style": answerer.prompts.style.name,
            **({"choices": True} if choices else settings.as_record()),
            "batch_size": batch_size,
            "dtype": str(loaded.dtype).removeprefix("torch."),
        }
        if attn_implementation != "auto":
            metadata["attn_implementation"] = attn_implementation
        if media:
            metadata["media_options"] = dict(media)
        file = AnswerFile(
            output,
            overwrite=overwrite,
            on_error=on_error,
            model_id=loaded.model_id,
            metadata=metadata | encoder.identity(),
        )
        progress = Progress(count_questions(questions, limit), "answering", "questions")
        with closing(file), progress:
            lines, idle_seconds = open_questions(questions)
            lines = odd_keys_noted(islice(lines, limit))
            batches = gather(lines, batch_size, idle_seconds=idle_seconds)
            read = partial(read_question, settings=settings, choices=choices)
            answer_all(batches, batch_size, file, group, work, progress.advance, read)


def _media_encoder(
    loaded: LoadedModel,
    media: Mapping[str, Any],
    media_root: MediaRoot,
    store: Path | None,
    workers: int,
) -> MediaEncoder | StoredEmbeddings:
    options = loaded.media_options(**media)
    if store is not None:
        return StoredEmbeddings(store, loaded, options)
    return MediaEncoder(loaded, options=options, open_media=media_root.open, workers=workers)


def answer_all(
    batches: Iterator[list[Line]],
    batch_size: int,
    file: AnswerFile,
    group: ProcessGroup,
    work: Callable[[list[Question]], list[Outcome]],
    on_done: Callable[[int], None] = lambda n: None,
    read: Callable[[Line], Question] = read_question,
) -> None:
    """Reads questions, has them answered, and writes what is missing in the file, in order.

    `batch_size` is that of a batch that no pause has closed; `work` is `answer_batch`; `on_done`
    hears how many questions have just been dealt with.

    Raises:
        SomeRecordsFailed: every question is through, and some of them failed.
        ChatBindError: the questions cannot be read; or what a question failed with, where that
            ends the run.
    """
    rounds = _rounds(batches, batch_size, file, group.size, on_done, read)
    for questions, outcomes in group.results(rounds, work):
        for question, outcome in zip(questions, outcomes, strict=True):
            if file.wants(question):
                file.write(question, outcome)
        on_done(len(questions))
    file.finish()


def _rounds(
    batches: Iterator[list[Line]],
    batch_size: int,
    file: AnswerFile,
    group_size: int,
    on_done: Callable[[int], None],
    read: Callable[[Line], Question],
) -> Iterator[list[list[Question]]]:
    """Batches with something to do in them, as many at once as there are processes."""
    waiting: list[list[Question]] = []
    for batch in batches:
        questions = [question for question in map(read, batch) if file.expect(question)]
        if any(map(file.wants, questions)):
            waiting.append(questions)
        else:
            on_done(len(questions))
        # a batch that is not full was closed by a pause, or is the last
        if waiting and (len(waiting) == group_size or len(batch) < batch_size):
            yield waiting
            waiting = []
    if waiting:
        yield waiting


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
    """Answers prepared questions; one outcome a question, in order."""
    inbox: Inbox[Question] = Inbox(max(1, len(questions)))
    for question in questions:
        inbox.put(question)
    inbox.close()
    outcomes = {id(question): outcome for question, outcome in answerer.engine.run(inbox, settings)}
    return [outcomes[id(question)] for question in questions]
