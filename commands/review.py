"""`chatbind review`: let a judge score sets of answers."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from chatbind_cli.errors import UsageError
from chatbind_cli.files import cache_folder, refuse_overlap
from chatbind_cli.jsonl import read_lines

from . import _base
from ._base import ListOption, in_group
from ._hosted import hosted_limits, show_plan
from ._options import FILE, on_error_option, output_option, overwrite_option

_input = in_group("Input")
_judge = in_group("Judge")
_limit = in_group("Limits")
_AUDIO = (
    "chatbind review --question eval/questions-audio.jsonl --answer-list "
    "eval/answers-reference-audio.jsonl eval/answers-model-audio.jsonl"
)


def _cache(context: click.Context, param: click.Parameter, given: str | None) -> Path | None:
    if given == "off":
        return None
    return cache_folder() / "judgements" if given is None else Path(given)


@_base.command(
    "review",
    examples=[
        f"{_AUDIO} --judge rule -o reviews.jsonl",
        "chatbind vqa -m model -q eval/questions-image.jsonl --media-root media | chatbind "
        "review --question eval/questions-image.jsonl --answer-list "
        "eval/answers-reference-image.jsonl - --judge rule | chatbind summarize",
        f"{_AUDIO} --judge-model gpt-4o --max-cost 5 -o gpt4o.jsonl --dry-run",
    ],
    elsewhere=[
        f"OPENAI_API_KEY=... {_AUDIO} --context eval/contexts.jsonl -o gpt.jsonl",
        f"{_AUDIO} --judge-url http://localhost:8000/v1 --judge-model judge -o served.jsonl",
    ],
)
@_input(
    "--question",
    "--questions",
    "-q",
    "questions",
    required=True,
    type=FILE,
    help="Question records.",
)
@in_group("Input", ListOption)(
    "--answer-list",
    "--answers",
    "answers",
    metavar="A B...",
    type=click.Path(exists=True, dir_okay=False, allow_dash=True),
    help="Two or more answer files, the baseline first. `-` is stdin; where one is missing, it is "
    "stdin.",
)
@_input(
    "--mode",
    type=click.Choice(["pair", "single"]),
    default="pair",
    help="Score the answers of two files side by side, or each answer alone; then one file is "
    "enough.",
)
@_input(
    "--pairs",
    type=click.Choice(["baseline", "all"]),
    help="Of more than two answer files, compare each with the first, or each with each other.  "
    "[default: baseline]",
)
@_input(
    "--context",
    "--contexts",
    "contexts",
    type=FILE,
    help="Captions and boxes of the media, for a judge who cannot see them.",
)
@_input(
    "--rule",
    "--rules",
    "rules",
    type=FILE,
    help="JSON file of rules by category; default: our own rules.",
)
@_input(
    "--reference",
    "references",
    type=FILE,
    help="Answers that count as right, for `--judge rule` and `--mode single`: an answer file; "
    "default: the question's `reference`, `answers`, `answer` or `label`. Of several, one is "
    "enough.",
)
@_judge(
    "--judge",
    "kind",
    type=click.Choice(["auto", "openai", "rule"]),
    default="auto",
    help="openai: a chat model at an endpoint; rule: right (10) or wrong (1) by a reference "
    "answer, no model; auto: openai if OPENAI_API_KEY, --judge-url or --judge-model is given, else "
    "rule.",
)
@_judge(
    "--judge-url",
    "url",
    metavar="URL",
    help="OpenAI-compatible endpoint, as http://localhost:8000/v1 of `vllm serve MODEL`; default: "
    "OpenAI's. The key comes from the environment (OPENAI_API_KEY).",
)
@_judge("--judge-model", "model", help="The judge's name there.  [default: gpt-4o]")
@_judge(
    "--orders",
    type=click.Choice(["both", "as-given", "random"]),
    help="Show the answers in both orders (two reviews), as given, or in an order drawn by the "
    "question.  [default: both; as-given for the rule judge, which has no preference]",
)
@_judge("--samples", type=click.IntRange(min=1), default=1, help="Reviews a question and order.")
@_judge("--temperature", type=click.FloatRange(min=0), default=0.0, help="Of the judge.")
@_judge("--max-tokens", type=click.IntRange(min=1), default=1024, help="Tokens of a review.")
@_judge(
    "--structured",
    type=click.Choice(["auto", "off"]),
    default="auto",
    advanced=True,
    help="Ask for the scores as a JSON object where the endpoint can be held to one.",
)
@_judge(
    "--batch",
    type=click.Choice(["wait", "leave"]),
    is_flag=False,
    flag_value="wait",
    metavar="[wait|leave]",
    help="Ask in batches, which are done within a day, at half the price (OpenAI's Batch API); "
    "leave: exit with 75 while they are not. The same command takes them up.",
)
@hosted_limits("Limits", "reviews")
@_limit(
    "--grace",
    advanced=True,
    type=click.FloatRange(min=0),
    default=15.0,
    help="Seconds that judgements under way get to finish when the run is interrupted.",
)
@_limit(
    "--cache",
    metavar="DIR|off",
    callback=_cache,
    help="Judgements of other runs on the same questions and answers, whatever their files are "
    "called.  [default: the user's cache folder]",
)
@_limit(
    "--dry-run", is_flag=True, help="Print how many requests, tokens and USD it takes, and stop."
)
@output_option(
    "Review records; continued if the file is there. `-`: stdout, in words on a terminal."
)
@overwrite_option
@on_error_option
def command(
    questions: Path,
    answers: tuple[str, ...],
    contexts: Path | None,
    references: Path | None,
    mode: Any,
    pairs: Any,
    orders: Any,
    samples: int,
    concurrency: int,
    grace: float,
    cache: Path | None,
    batch: Any,
    dry_run: bool,
    output: str,
    overwrite: bool,
    on_error: Any,
    **judge: Any,
) -> None:
    """Let a judge score sets of answers, matched by question id.

    A failed review is written with an `error` and without scores, and the same command again
    makes only what is missing. Exit code 3: a review failed, or the files did not fit together.
    """
    given = [questions, *answers, contexts, references, judge["rules"], judge["prices"]]
    refuse_overlap(output, given)
    from chatbind_cli.evaluation.cases import Inputs  # noqa: PLC0415  they bring asyncio
    from chatbind_cli.evaluation.judges.judge import JudgeSettings  # noqa: PLC0415
    from chatbind_cli.evaluation.judging import ReviewOptions  # noqa: PLC0415
    from chatbind_cli.evaluation.review import Review  # noqa: PLC0415

    single = mode == "single"
    if single and (pairs or orders):
        raise UsageError("--pairs and --orders have no meaning where each answer is judged alone")
    settings = JudgeSettings(**judge)
    if settings.is_rule:
        contexts, concurrency = None, 1  # it compares words
    options = ReviewOptions(
        orders=orders or ("as-given" if settings.is_rule or single else "both"),
        samples=samples,
        concurrency=concurrency,
        on_error=on_error,
        grace_s=grace,
        cache=cache,
        batch=batch,
    )
    inputs = Inputs(
        questions,
        _sides(answers, 1 if single else 2),
        compared=mode if single else pairs or "baseline",
        contexts=contexts,
        references=references,
    )
    review = Review(inputs, settings, options, output=output, overwrite=overwrite)
    if dry_run:
        show_plan(review.plan().as_record("judge", "judgements"))
        review.conclude()
        return
    # A batch system's first word ends the run as Ctrl-C does.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        outcome = review.make()
    finally:
        signal.signal(signal.SIGTERM, before)
    review.conclude(outcome)


def _sides(answers: Sequence[str], at_least: int) -> list[Any]:
    """The sides; a stream of records for the one that is standard input."""
    names = list(answers)
    if len(names) == at_least - 1 and "-" not in names and not sys.stdin.isatty():
        names.append("-")
    if len(names) < at_least or names.count("-") > 1:
        raise UsageError(
            f"--answer-list needs at least {('one answer file', 'two answer files')[at_least - 1]}"
            ", and at most one of them from stdin",
            hint="as in --answer-list reference.jsonl answers.jsonl, or one of them as `-`",
        )
    return [read_lines("-") if name == "-" else Path(name) for name in names]
