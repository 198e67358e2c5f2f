"""`chatbind vqa`: answer question records with answer records."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from chatbind_cli import worker
from chatbind_cli.errors import UsageError
from chatbind_cli.files import refuse_overlap
from chatbind_cli.hosted import AnswererSettings
from chatbind_cli.inference.generation_settings import GenerationSettings
from chatbind_cli.media.options import MediaOptions
from chatbind_cli.plan import Dispatch

from . import _base
from ._base import in_group
from ._engine import batch_size_option, check_engine, connected, in_flight
from ._hosted import answerer_options, check_answerer, show_plan
from ._inference import ModelChoice, model_or_other_options, sampling_options
from ._options import (
    FOLDER,
    STREAM,
    device_options,
    media_root_options,
    on_error_option,
    one_reader,
    output_option,
    overwrite_option,
    pool_options,
    shard_option,
    worker_pool,
)
from ._preprocessing import media_changes, media_options

if TYPE_CHECKING:
    from chatbind_cli.media.root import MediaRoot

_input, _compute = in_group("Input"), in_group("Compute")

_BATCH = "openai-batch"


@_base.command(
    "vqa",
    examples=[
        "chatbind vqa -m model -q eval/questions-audio.jsonl --media-root media -o answers.jsonl",
        "head -n 3 eval/questions-imu.jsonl | chatbind vqa -m model --media-root media",
    ],
    elsewhere=[
        "OPENAI_API_KEY=... chatbind vqa --answerer openai --answerer-model gpt-4o "
        "--context eval/contexts.jsonl -q eval/questions-image.jsonl -o text-only.jsonl",
    ],
)
@model_or_other_options
@answerer_options
@_input(
    "-q",
    "--questions",
    "--question-file",
    "questions",
    default="-",
    metavar="FILE",
    type=STREAM,
    help="Question records (JSONL, or a JSON array; also compressed): question_id, text, and media "
    "under image, video, audio, depth, thermal, imu. From a pipe, what has come is answered at "
    "once.",
)
@_input(
    "--input-format",
    advanced=True,
    type=click.Choice(["auto", _BATCH]),
    default="auto",
    help="openai-batch: the questions are a file for OpenAI's Batch API, requests of "
    "/v1/chat/completions whatever model they name; auto: question records.",
)
@shard_option(
    "Answer the I-th of N stretches of the questions, I from 1 to N: for the N jobs of a batch "
    "array, each with an --output of its own; `cat` joins them in the order of the file. From a "
    "pipe: every N-th question from the I-th on."
)
@_input(
    "--num-chunks",
    advanced=True,
    type=click.IntRange(min=1),
    help="LLaVA's words for --shard: how many there are.",
)
@_input(
    "--chunk-idx",
    advanced=True,
    type=click.IntRange(min=0),
    help="LLaVA's words for --shard: which one it is, from 0.",
)
@_input("--limit", metavar="N", type=click.IntRange(min=1), help="Answer the first N alone.")
@media_root_options
@media_options
@_input(
    "--store",
    metavar="DIR",
    multiple=True,
    type=FOLDER,
    help="Take embeddings from this store of `chatbind encode`, or from the embeddings folder of "
    "a training run; no media are read then. Repeat: a medium's comes from the first that has it.",
)
@output_option(
    "Answer records, in the order of the questions. A file that is there is continued: what is "
    "answered stays, what failed is tried again. `-`: stdout, in words on a terminal.",
    "--answers-file",
)
@in_group("Output")(
    "--output-format",
    advanced=True,
    type=click.Choice(["auto", _BATCH]),
    default="auto",
    help="openai-batch: answers to such a file, in OpenAI's form; auto: as the questions are.",
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
@batch_size_option
@_compute("--num-workers", type=click.IntRange(min=1), default=2, help="Threads that read media.")
@pool_options
def command(
    choice: ModelChoice,
    answerer: AnswererSettings | None,
    questions: str,
    shard: tuple[int, int],
    num_chunks: int | None,
    chunk_idx: int | None,
    limit: int | None,
    input_format: str,
    output_format: str,
    media_root: MediaRoot,
    media: MediaOptions,
    store: tuple[Path, ...],
    output: str,
    overwrite: bool,
    on_error: str,
    choices: bool,
    settings: GenerationSettings,
    device: str,
    dtype: str,
    batch_size: int,
    num_workers: int,
    plan: Dispatch,
) -> None:
    """Answer question records with answer records, in the order of the questions.

    Unless the options say otherwise, media are read as the model's training read them.
    """
    shard = _chunk(num_chunks, chunk_idx, shard)
    batch = _is_batch(input_format, output_format, answerer)
    if answerer is not None:
        files: dict[str, Any] = {"questions": questions, "shard": shard, "limit": limit}
        files |= {"output": output, "overwrite": overwrite}
        _from_contexts(answerer, settings, plan.dry_run, files, on_error)
        return
    if not choice.model:
        raise click.MissingParameter(
            param_hint="'-m' / '--model', or '--answerer'", param_type="option"
        )
    reads = not plan.dry_run and not worker.is_worker()
    if reads:
        one_reader(*choice.words_on_line(), ("the questions", questions))
        _check_stdin(questions)
    check_engine(choice, settings)
    if choices:
        _check_choices(choice, settings, batch=batch)
    plan = choice.dispatch(plan)
    refuse_overlap(output, [questions, choice.projector])
    choice = choice.resolved() if reads else choice
    words = choice.words() if reads else []
    pool = worker_pool(plan, words)
    if pool is None:
        return
    from chatbind_cli.inference.vqa import vqa  # noqa: PLC0415  help need not pay

    batch_size = in_flight(choice, batch_size)
    vqa(
        partial(choice.load, device, dtype),
        settings,
        connect=partial(connected, choice, in_flight=batch_size),
        questions=questions,
        shard=shard,
        limit=limit,
        batch=batch,
        choices=choices,
        media_root=media_root,
        stores=store,
        output=output,
        overwrite=overwrite,
        on_error=on_error,
        batch_size=batch_size,
        workers=num_workers,
        prompt_style=choice.prompt_style,
        media=media_changes(media),
        pool=pool,
    )


def _from_contexts(
    answerer: AnswererSettings,
    settings: GenerationSettings,
    dry_run: bool,
    files: dict[str, Any],
    on_error: str,
) -> None:
    """Has a hosted model answer, or says what that takes."""
    _check_stdin(files["questions"])
    refuse_overlap(files["output"], [files["questions"], answerer.contexts, answerer.prices])
    check_answerer(answerer, settings)
    from chatbind_cli.inference import text_answerer  # noqa: PLC0415  brings openai

    if dry_run:
        plan = text_answerer.plan_from_contexts(answerer, settings, **files)
        show_plan(plan.as_record("answerer", "questions"))
    else:
        text_answerer.vqa_from_contexts(answerer, settings, on_error=on_error, **files)


def _check_stdin(questions: str) -> None:
    if questions == "-" and sys.stdin.isatty():
        raise UsageError("no questions", hint="name a file with --questions, or pipe records in")


def _is_batch(input_format: str, output_format: str, answerer: AnswererSettings | None) -> bool:
    """Whether questions and answers are lines of OpenAI's batch files."""
    if answerer is not None and _BATCH in (input_format, output_format):
        raise UsageError(f"--answerer goes without {_BATCH}")
    if output_format == _BATCH and input_format != _BATCH:
        raise UsageError(f"--output-format {_BATCH} goes with --input-format {_BATCH}")
    return input_format == _BATCH


def _check_choices(choice: ModelChoice, settings: GenerationSettings, *, batch: bool) -> None:
    """Refuses what does not go with `--choices`."""
    if batch:
        raise UsageError(f"--choices goes without --input-format {_BATCH}")
    if choice.engine:
        raise UsageError("--choices goes without --engine, which tells no likelihood of a text")
    if settings.samples > 1 or settings.logprobs:
        raise UsageError("--choices goes with neither --samples nor --logprobs")


def _chunk(count: int | None, index: int | None, shard: tuple[int, int]) -> tuple[int, int]:
    """The shard, which LLaVA's words may say, too."""
    if count is None and index is None:
        return shard
    if count is None or index is None or index >= count or shard != (1, 1):
        raise UsageError(
            "--num-chunks N goes with --chunk-idx, which is less than N, and without --shard"
        )
    return index + 1, count
