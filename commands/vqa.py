"""`chatbind vqa`: answer question records with answer records."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from chatbind_cli import launch, worker
from chatbind_cli.errors import UsageError
from chatbind_cli.files import refuse_overlap
from chatbind_cli.inference.generation_settings import GenerationSettings
from chatbind_cli.inference.questions import piped_stdin
from chatbind_cli.media.options import MediaOptions

from . import _base
from ._base import in_group
from ._inference import ModelChoice, media_changes, media_options, model_options, sampling_options
from ._options import (
    FOLDER,
    STREAM,
    device_options,
    dispatch_options,
    dispatched,
    media_root_options,
    on_error_option,
    one_reader,
    output_option,
    overwrite_option,
)

if TYPE_CHECKING:
    from chatbind_cli.media.root import MediaRoot

_input, _compute = in_group("Input"), in_group("Compute")


@_base.command(
    "vqa",
    examples=[
        "chatbind vqa -m model -q eval/questions-audio.jsonl --media-root media -o answers.jsonl",
        "head -n 3 eval/questions-imu.jsonl | chatbind vqa -m model --media-root media",
    ],
)
@model_options
@_input(
    "-q",
    "--questions",
    "--question-file",
    "questions",
    default="-",
    metavar="FILE",
    type=STREAM,
    help="Question records (JSONL, or a JSON array; also compressed): question_id, text, and media "
    "under image, video, audio, depth, thermal, imu. From a pipe that pauses for half a "
    "second, what has come is answered at once.",
)
@_input("--limit", metavar="N", type=click.IntRange(min=1), help="Answer the first N alone.")
@media_root_options
@media_options
@_input(
    "--store",
    metavar="DIR",
    type=FOLDER,
    help="Take embeddings from this store of `chatbind encode`, or from the embeddings folder of "
    "a training run; no media are read then.",
)
@output_option(
    "Answer records, in the order of the questions. A file that is there is continued: what is "
    "answered stays, what failed is tried again. `-`: stdout, in words on a terminal.",
    "--answers-file",
)
@overwrite_option
@on_error_option
@in_group("Generation")(
    "--choices",
    is_flag=True,
    help="Answer with the likeliest of the answers that a record lists under `choices`, or of the "
    "letters that its text offers (A. cat, (B) dog); the answer record says how likely each is.",
)
@sampling_options
@device_options
@_compute(
    "--batch-size",
    type=click.IntRange(min=1),
    default=16,
    help="Questions that are answered together, by their places in the file: the same batches in "
    "every run, so that an interrupted run ends with the same bytes.",
)
@_compute("--num-workers", type=click.IntRange(min=1), default=2, help="Threads that read media.")
@dispatch_options
def command(
    choice: ModelChoice,
    questions: str,
    limit: int | None,
    media_root: MediaRoot,
    media: MediaOptions,
    store: Path | None,
    output: str,
    overwrite: bool,
    on_error: str,
    choices: bool,
    settings: GenerationSettings,
    device: str,
    dtype: str,
    batch_size: int,
    num_workers: int,
    plan: launch.Dispatch,
) -> None:
    """Answer question records with answer records, in the order of the questions.

    Unless the options say otherwise, media are read as the model's training read them.
    """
    if not plan.dry_run:
        one_reader(*choice.words_on_line(), ("the questions", questions))
        if questions == "-" and sys.stdin.isatty():
            raise UsageError(
                "no questions", hint="name a file with --questions, or pipe records in"
            )
    if choices and (settings.samples > 1 or settings.logprobs):
        raise UsageError("--choices goes with neither --samples nor --logprobs")
    refuse_overlap(output, [questions, choice.projector])
    words: list[str] = []
    if not plan.dry_run and not worker.is_worker():
        choice = choice.resolved()
        words = choice.words()
    wants_pipe = questions == "-" and launch.needs_workers(plan) and not plan.dry_run
    with piped_stdin(wants_pipe) as pipe:
        if dispatched(plan, [*words, "--questions", str(pipe)] if pipe else words):
            return
    from chatbind_cli.inference.vqa import vqa  # noqa: PLC0415  torch

    vqa(
        choice.load(device, dtype),
        settings,
        questions=questions,
        limit=limit,
        choices=choices,
        media_root=media_root,
        store=store,
        output=output,
        overwrite=overwrite,
        on_error=on_error,
        batch_size=batch_size,
        workers=num_workers,
        prompt_style=choice.prompt_style,
        attn_implementation=choice.attn_implementation,
        media=media_changes(media),
    )
