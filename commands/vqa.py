"""`chatbind vqa`: answer question records with answer records."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from chatbind_cli import launch, worker
from chatbind_cli.errors import UsageError
from chatbind_cli.files import refuse_overlap
from chatbind_cli.inference.generation_settings import GenerationSettings
from chatbind_cli.inference.questions import piped_stdin
from chatbind_cli.media.options import MediaOptions

from ._base import GroupedOption, command
from ._inference import ModelChoice, generation_options, media_changes, model_options
from ._media import media_options
from ._options import (
    device_options,
    dispatch_options,
    dispatched,
    media_root_options,
    on_error_option,
    overwrite_option,
)

if TYPE_CHECKING:
    from chatbind_cli.media.root import MediaRoot

_input = partial(click.option, cls=GroupedOption, group="Input")


@command(
    "vqa",
    short_help="Answer question records with answer records.",
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
    type=click.Path(dir_okay=False, allow_dash=True),
    help="Question records (JSONL, or a JSON array; also compressed): question_id, text, and media "
    "under image, video, audio, depth, thermal, imu. From a pipe that pauses for half a "
    "second, what has come is answered at once.",
)
@media_root_options
@media_options
@_input(
    "--store",
    metavar="DIR",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Take embeddings from this store of `chatbind encode`, or from the embeddings folder of "
    "a training run; no media are read then.",
)
@click.option(
    "-o",
    "--output",
    "--answers-file",
    "output",
    cls=GroupedOption,
    group="Output",
    default="-",
    metavar="FILE",
    type=click.Path(dir_okay=False, allow_dash=True),
    help="Answer records, in the order of the questions. A file that is there is continued: what "
    "is answered stays, what failed is tried again. `-`: stdout, in words on a terminal.",
)
@overwrite_option
@on_error_option
@generation_options
@device_options
@click.option(
    "--batch-size",
    cls=GroupedOption,
    group="Compute",
    type=click.IntRange(min=1),
    default=16,
    help="Questions that are answered together, by their places in the file: the same batches in "
    "every run, so that an interrupted run ends with the same bytes.",
)
@click.option(
    "--num-workers",
    cls=GroupedOption,
    group="Compute",
    type=click.IntRange(min=1),
    default=2,
    help="Threads that read media.",
)
@dispatch_options
def run(
    choice: ModelChoice,
    questions: str,
    media_root: MediaRoot,
    media: MediaOptions,
    store: Path | None,
    output: str,
    overwrite: bool,
    on_error: str,
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
    _check_streams(choice, questions, plan)
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


def _check_streams(choice: ModelChoice, questions: str, plan: launch.Dispatch) -> None:
    """Refuses two readers of standard input, and questions from a terminal.

    Raises:
        UsageError: either.
    """
    if questions != "-" or plan.dry_run:
        return
    if choice.reads_stdin:
        raise UsageError(
            "the model and the questions cannot both come from standard input",
            hint="name the questions with --questions FILE",
        )
    if sys.stdin.isatty():
        raise UsageError("no questions", hint="name a file with --questions, or pipe records in")


command = run
