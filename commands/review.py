"""`chatbind review`: let a judge score two sets of answers."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click

from chatbind_cli.console import Progress, note
from chatbind_cli.errors import SomeRecordsFailed, UsageError
from chatbind_cli.jsonl import RecordWriter, read_records
from chatbind_cli.review.cases import Inputs, read_inputs
from chatbind_cli.review.judges import Judge, RuleJudge
from chatbind_cli.review.records import put_in_order
from chatbind_cli.review.rules import Rules, load_rules

from . import _base
from ._base import GroupedOption, ListOption
from ._options import on_error_option, output_option, overwrite_option

if TYPE_CHECKING:
    from chatbind_cli.review.run import Outcome

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_input = partial(click.option, cls=GroupedOption, group="Input")
_judge = partial(click.option, cls=GroupedOption, group="Judge")


@_base.command(
    "review",
    short_help="Let a judge score two sets of answers.",
    examples=[
        "chatbind review --question questions.jsonl --answer-list reference.jsonl answers.jsonl "
        "--judge rule -o reviews.jsonl",
        "chatbind vqa -m model -q questions.jsonl --media-root toy/media "
        "| chatbind review --question questions.jsonl --answer-list reference.jsonl - --judge rule "
        "| chatbind summarize",
        "OPENAI_API_KEY=... chatbind review --question qa90_questions.jsonl "
        "--context caps_boxes.jsonl --answer-list qa90_gpt4_answer.jsonl answers.jsonl "
        "--rule rule.json -o reviews.jsonl",
        "chatbind review --question questions.jsonl --answer-list reference.jsonl answers.jsonl "
        "--judge-url http://localhost:8000/v1 --judge-model judge -o reviews.jsonl",
    ],
)
@_input(
    "--question",
    "--questions",
    "-q",
    "questions",
    required=True,
    type=_FILE,
    help="Question records.",
)
@click.option(
    "--answer-list",
    "--answers",
    "answers",
    cls=ListOption,
    group="Input",
    metavar="A B",
    type=click.Path(dir_okay=False, allow_dash=True),
    help="The two answer files, the baseline first; `-`, or only one file: the other is stdin.",
)
@_input(
    "--context",
    "--contexts",
    "contexts",
    type=_FILE,
    help="Captions and boxes of the media, for a judge who cannot see them.",
)
@_input(
    "--rule",
    "--rules",
    "rules",
    type=_FILE,
    help="JSON file of rules by category; default: our own rules.",
)
@_input(
    "--reference",
    "references",
    type=_FILE,
    help="Answers that count as right, for `--judge rule`; default: the question's `reference` "
    "or `answer`, else the first answer file.",
)
@_judge(
    "--judge",
    type=click.Choice(["auto", "openai", "rule"]),
    default="auto",
    help="openai: a chat model; rule: word overlap with the right answers, no network; auto: "
    "openai if OPENAI_API_KEY, --judge-url or --judge-model is given, else rule.",
)
@_judge(
    "--judge-url",
    metavar="URL",
    help="OpenAI-compatible endpoint, as http://localhost:8000/v1; default: OpenAI's. "
    "The key comes from the environment (OPENAI_API_KEY).",
)
@_judge("--judge-model", help="The judge's name there.  [default: gpt-4o]")
@_judge(
    "--orders",
    type=click.Choice(["both", "as-given", "random"]),
    help="Show the answers in both orders (two reviews), as given, or in an order drawn by the "
    "question.  [default: both; as-given for the rule judge, which has no preference]",
)
@_judge("--samples", type=click.IntRange(min=1), default=1, help="Reviews a question and order.")
@_judge("--temperature", type=click.FloatRange(min=0), default=0.0, help="Of the judge.")
@_judge("--max-tokens", type=click.IntRange(min=1), default=1024, help="Tokens of a review.")
@_judge("--concurrency", type=click.IntRange(min=1), default=8, help="Requests at a time.")
@_judge("--timeout", type=click.FloatRange(min=0.01), default=120.0, help="Seconds a request.")
@_judge("--retries", type=click.IntRange(min=0), default=5, help="Further attempts a request.")
@output_option("Review records; continued if the file is there. `-`: stdout.")
@overwrite_option
@on_error_option
def command(
    questions: Path,
    answers: tuple[str, ...],
    contexts: Path | None,
    references: Path | None,
    judge: str,
    judge_url: str | None,
    judge_model: str | None,
    orders: str | None,
    samples: int,
    concurrency: int,
    output: str,
    overwrite: bool,
    on_error: Any,
    **asked: Any,
) -> None:
    """Let a judge score two sets of answers, matched by question id.

    A failed review is written with an `error` and without scores, and the same command again
    makes only what is missing. Exit code 3: a review failed, or the files did not fit together.
    """
    from chatbind_cli.review.run import RunOptions, run_reviews  # noqa: PLC0415  brings asyncio

    if judge == "auto":
        chat = judge_url or judge_model or os.environ.get("OPENAI_API_KEY")
        judge = "openai" if chat else "rule"
    is_rule = judge == "rule"
    # Context is for a judge who reads it; a rule that compares words needs none.
    inputs = read_inputs(
        questions,
        _answer_sources(answers),
        contexts=None if is_rule else contexts,
        references=references,
    )
    judge_object = _make_judge(judge, judge_url, judge_model, asked)
    note(f"judge: {judge_object.name}")
    options = RunOptions(
        orders=orders or ("as-given" if is_rule else "both"),  # type: ignore[arg-type]
        samples=samples,
        concurrency=1 if is_rule else concurrency,
        on_error=on_error,
    )
    total = len(inputs.questions) * samples * (2 if options.orders == "both" else 1)
    with (
        RecordWriter(output, key="review_id", overwrite=overwrite) as writer,
        Progress(total, "judging", "reviews") as progress,
    ):
        outcome = run_reviews(
            inputs.cases(), judge_object, writer, options, on_done=progress.advance
        )
    _conclude(inputs, outcome, output)


def _answer_sources(answers: Sequence[str]) -> list[Any]:
    """The two sides; a stream of records for the one that is standard input."""
    names = list(answers)
    if len(names) == 1 and names[0] != "-" and not sys.stdin.isatty():
        names.append("-")
    if len(names) != 2 or names.count("-") > 1:
        raise UsageError(
            f"--answer-list needs two answer files, not {len(names)}"
            if names.count("-") < 2
            else "--answer-list can read only one side from stdin",
            hint="as in --answer-list reference.jsonl answers.jsonl, or one of them as `-`",
        )
    for name in names:
        if name != "-" and not Path(name).is_file():
            raise UsageError("there is no such answer file", where=name)
    return [read_records("-", stdin=_stdin()) if name == "-" else Path(name) for name in names]


def _stdin() -> IO[bytes]:
    return sys.stdin.buffer


def _make_judge(kind: str, url: str | None, model: str | None, asked: dict[str, Any]) -> Judge:
    if kind == "rule":
        return RuleJudge()
    from chatbind_cli.review.chat_judge import (  # noqa: PLC0415  brings asyncio
        DEFAULT_MODEL,
        ChatJudge,
        ChatJudgeOptions,
    )

    options = ChatJudgeOptions(
        model=model or DEFAULT_MODEL,
        base_url=url,
        temperature=asked["temperature"],
        max_tokens=asked["max_tokens"],
        timeout_s=asked["timeout"],
        retries=asked["retries"],
    )
    rules = asked["rules"]
    return ChatJudge(load_rules(rules) if rules else Rules(), options)


def _conclude(inputs: Inputs, outcome: Outcome, output: str) -> None:
    """Says what was done, puts the file in order, and decides the exit code."""
    if output != "-":
        put_in_order(Path(output), outcome.tasks)
    for remark in inputs.remarks:
        note(remark)
    parts = [f"{outcome.judged} reviews made"]
    if outcome.reused:
        parts.append(f"{outcome.reused} were there already")
    if outcome.tokens[0]:
        parts.append(f"{outcome.tokens[0]} tokens sent, {outcome.tokens[1]} received")
    if outcome.failed:
        parts.append(f"{outcome.failed} failed")
    note(", ".join(parts))
    if outcome.failed or inputs.remarks:
        what = [f"{outcome.failed} reviews failed"] if outcome.failed else []
        what += [f"{len(inputs.remarks)} remarks on the input"] if inputs.remarks else []
        raise SomeRecordsFailed(" and ".join(what))
