"""`vqa` as a whole: a model, a file of questions, a file of answers, and the processes between.

The options of the command, made into the parts that do the work.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

from chatbind_cli.answering.answer_file import AnswerFile
from chatbind_cli.answering.crew import Crew, assemble_crew
from chatbind_cli.answering.intake import IDLE_SECONDS, Item, may_pause, own_stream
from chatbind_cli.answering.opening import EncoderFinder, OpenedModel
from chatbind_cli.answering.perception import Perceiver, Perception, StoredPerception
from chatbind_cli.answering.run import Entry, Job, Outcome, Run, answer_batch
from chatbind_cli.answering.session import Answerer
from chatbind_cli.answering.settings import GenerationSettings
from chatbind_cli.console import Progress
from chatbind_cli.data.lookup import open_stores
from chatbind_cli.data.store import EmbeddingStore
from chatbind_cli.jsonl import read_lines
from chatbind_cli.media.root import MediaRoot

_MOST_COUNTED = 1 << 30  # bytes that are read only to tell how long it will take


@dataclass(frozen=True, kw_only=True)
class Service:
    """What the command's options say, but for the model.

    Args:
        questions: file of question records, `-` for standard input.
        media_root: where the records' media lie.
        store: embedding store in place of media and encoder.
        output: file of answer records, `-` for standard output.
        overwrite: start the file anew.
        on_error: see `Job`.
        settings: of generation.
        batch_size: questions that are answered together.
        workers: threads that read media.
        encoder: where the encoder is; None: where the model says.
        allow_encoder_mismatch: take another encoder than that of training.
        prompt_style: None for the model's own.
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
    encoder: Path | None
    allow_encoder_mismatch: bool
    prompt_style: str | None
    media: Mapping[str, Any]

    def run(self, opened: OpenedModel) -> None:
        """Answers all questions.

        Raises:
            SomeRecordsFailed: some of them could not be answered.
            ChatBindError: something that all of them need is not there or broken.
        """
        answerer = Answerer(
            opened.bundle.model,
            opened.bundle.tokenizer,
            self._perceiver(opened),
            style=self.prompt_style,
        )
        work = partial(answer_batch, answerer, self.settings)
        crew = assemble_crew()
        try:
            if crew.leads:
                self._lead(opened, answerer.prompts.style.name, crew, work)
            else:
                crew.follow(work)
        finally:
            crew.close()

    def _lead(
        self,
        opened: OpenedModel,
        style: str,
        crew: Crew,
        work: Callable[[list[Entry]], list[Outcome]],
    ) -> None:
        making = self._making(opened, style)
        job = Job(
            model_id=opened.model_id,
            making=making,
            batch_size=self.batch_size,
            on_error=self.on_error,
        )
        with ExitStack() as stack:
            output = stack.enter_context(
                AnswerFile(
                    self.output, overwrite=self.overwrite, model_id=job.model_id, making=making
                )
            )
            progress = stack.enter_context(Progress(self._count(), "answering", "questions"))
            records, idle = self._records()
            Run(output, crew, work, job, progress.advance).answer(records, idle_seconds=idle)

    def _making(self, opened: OpenedModel, style: str) -> dict[str, Any]:
        """What every answer's metadata says, so that answers of different making never mix."""
        making: dict[str, Any] = {
            "model_sha256": opened.sha256,
            "prompt_style": style,
            **self.settings.as_record(),
            "batch_size": self.batch_size,
            "dtype": str(opened.dtype).removeprefix("torch."),
        }
        if self.media:
            making["media_options"] = dict(self.media)
        if self.store is None:
            return making | self._finder(opened).identity()
        meta = self._stores(opened)[0].meta
        making["store_dtypes"] = [meta.encoder_dtype, meta.dtype]
        if not self._pinned(opened):
            making["encoder_sha256"] = meta.encoder_sha256
        return making

    def _pinned(self, opened: OpenedModel) -> str | None:
        """The hash of the encoder's weights that the embeddings must come from, if any."""
        sha256 = (opened.bundle.config.encoder or {}).get("sha256")
        return None if self.allow_encoder_mismatch else sha256

    def _stores(self, opened: OpenedModel) -> list[EmbeddingStore]:
        assert self.store is not None
        return open_stores(
            self.store,
            encoder_sha256=self._pinned(opened),
            dim=opened.bundle.config.embedding_dim,
        )

    def _finder(self, opened: OpenedModel) -> EncoderFinder:
        return EncoderFinder(opened, self.encoder, self.allow_encoder_mismatch)

    def _records(self) -> tuple[Iterator[Item], float | None]:
        """The question records, and how long they may pause."""
        if self.questions == "-":
            stream: IO[bytes] = sys.stdin.buffer
            if not may_pause(stream):
                return read_lines("-", stdin=stream), None
            return read_lines("-", stdin=own_stream(stream)), IDLE_SECONDS
        path = Path(self.questions)
        if path.is_fifo():
            return read_lines("-", stdin=path.open("rb")), IDLE_SECONDS
        return read_lines(path), None

    def _count(self) -> int | None:
        """How many questions there are, where that is quickly told; for the progress bar."""
        path = Path(self.questions)
        if self.questions == "-" or not path.is_file():
            return None
        with path.open("rb") as file:
            if file.peek(1)[:1] != b"{" or path.stat().st_size > _MOST_COUNTED:
                return None
            return sum(part.count(b"\n") for part in iter(partial(file.read, 1 << 20), b""))

    def _perceiver(self, opened: OpenedModel) -> Perceiver:
        options = opened.media_options(**self.media)
        if self.store is not None:
            return StoredPerception(self._stores(opened), options)
        return Perception(
            self._finder(opened).open,
            options=options,
            open_media=self.media_root.open,
            workers=self.workers,
        )
