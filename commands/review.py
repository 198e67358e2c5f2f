"""`chatbind review`: let a judge score two sets of answers."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import IO, TYPE_CHECKING, Any

import click

from chatbind_cli.artifacts import emit_record
from chatbind_cli.console import Progress, note
from chatbind_cli.errors import SomeRecordsFailed, UsageError
from chatbind_cli.jsonl import RecordWriter, read_records
from chatbind_cli.review.cases import Inputs, read_inputs
from chatbind_cli.review.judges import Judge, RuleJudge
from chatbind_cli.review.records import finished, put_in_order
from chatbind_cli.review.rules import Rules, load_rules

from . import _base
from ._base import GroupedOption, ListOption
from ._options import device_options, on_error_option, output_option, overwrite_option

if TYPE_CHECKING:
    from chatbind_cli.review.bill import Price
    from chatbind_cli.review.run import Outcome, RunOptions

_DEFAULT_MODEL = "gpt-4o"
_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_input = partial(click.option, cls=GroupedOption, group="Input")
_judge = partial(click.option, cls=GroupedOption, group="Judge")
_limit = partial(click.option, cls=GroupedOption, group="Limits")


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
        "chatbind review --question questions.jsonl --answer-list reference.jsonl answers.jsonl "
        "--judge-model gpt-4o --max-cost 5 -o gpt4o.jsonl --dry-run",
        "chatbind review --question questions.jsonl --answer-list reference.jsonl answers.jsonl "
        "--judge local --judge-model toy/llama -o local.jsonl --dry-run",
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
    metavar="A B...",
    type=click.Path(dir_okay=False, allow_dash=True),
    help="Two answer files, the baseline first; of more, each is paired with the first. `-` is "
    "stdin; with only one file, the other is stdin.",
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
    type=click.Choice(["auto", "openai", "local", "rule"]),
    default="auto",
    help="openai: a chat model at an endpoint; local: a causal language model in this process; "
    "rule: word overlap with the right answers, no model; auto: openai if OPENAI_API_KEY, "
    "--judge-url or --judge-model is given, else rule.",
)
@_judge(
    "--judge-url",
    metavar="URL",
    help="OpenAI-compatible endpoint, as http://localhost:8000/v1; default: OpenAI's. "
    "The key comes from the environment (OPENAI_API_KEY).",
)
@_judge(
    "--judge-model",
    help="The judge's name there, or the local model's folder.  [default: gpt-4o]",
)
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
    help="Ask for the scores as a JSON object where the endpoint can be held to one.",
)
@_limit(
    "--concurrency",
    type=click.IntRange(min=1),
    default=8,
    help="Judgements at a time; fewer while the endpoint refuses some.",
)
@_limit(
    "--requests-per-minute",
    type=click.FloatRange(min=0, min_open=True),
    help="The endpoint's limit.  [default: none but what it asks for]",
)
@_limit(
    "--tokens-per-minute",
    type=click.FloatRange(min=0, min_open=True),
    help="The same in tokens, sent and received.",
)
@_limit("--timeout", type=click.FloatRange(min=0.01), default=120.0, help="Seconds a request.")
@_limit("--retries", type=click.IntRange(min=0), default=5, help="Further attempts a request.")
@_limit(
    "--grace",
    type=click.FloatRange(min=0),
    default=15.0,
    help="Seconds that judgements under way get to finish when the run is interrupted.",
)
@_limit(
    "--max-cost",
    type=click.FloatRange(min=0),
    metavar="USD",
    help="Stop before the reviews in the output file cost more than this.",
)
@_limit(
    "--prices",
    type=_FILE,
    help='TOML file of prices: ["my-judge"] with input = 2.5 and output = 10.0, in USD a million '
    "tokens; default: our own table of well-known models.",
)
@_limit(
    "--tokenizer",
    metavar="NAME",
    help="Counts tokens: a tokenizer's folder, or tiktoken:o200k_base; default: an estimate.",
)
@_limit(
    "--dry-run", is_flag=True, help="Print how many requests, tokens and USD it takes, and stop."
)
@device_options
@output_option("Review records; continued if the file is there. `-`: stdout.")
@overwrite_option
@on_error_option
def command(
    questions: Path,
    answers: tuple[str, ...],
    contexts: Path | None,
    references: Path | None,
    judge: str,
    orders: str | None,
    samples: int,
    concurrency: int,
    grace: float,
    dry_run: bool,
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
        chat = asked["judge_url"] or asked["judge_model"] or os.environ.get("OPENAI_API_KEY")
        judge = "openai" if chat else "rule"
    is_rule = judge == "rule"
    # Context is for a judge who reads it; a rule that compares words needs none.
    inputs = read_inputs(
        questions,
        _answer_sources(answers),
        contexts=None if is_rule else contexts,
        references=references,
    )
    options = RunOptions(
        orders=orders or ("as-given" if is_rule else "both"),  # type: ignore[arg-type]
        samples=samples,
        concurrency=1 if is_rule else concurrency,
        on_error=on_error,
        grace_s=grace,
    )
    done, spent = (set(), 0.0) if overwrite else finished(output)
    price = _price(judge, asked)
    judge_object, counted_by = _make_judge(judge, asked, concurrency, price, spent, dry_run)
    if dry_run:
        _show_plan(inputs, judge_object, options, done, price, counted_by)
        return
    note(f"judge: {judge_object.name}")
    if samples > 1 and not is_rule and asked["temperature"] == 0:
        note("--samples asks for the same words again and again unless --temperature is above 0")
    pairs = len(inputs.answers) - 1
    total = len(inputs.questions) * pairs * samples * (2 if options.orders == "both" else 1)
    with (
        _termination_as_interrupt(),
        RecordWriter(output, key="review_id", overwrite=overwrite) as writer,
        Progress(total, "judging", "reviews") as progress,
    ):
        outcome = run_reviews(
            inputs.cases(), judge_object, writer, options, on_done=progress.advance
        )
    _conclude(inputs, outcome, output)


def _answer_sources(answers: Sequence[str]) -> list[Any]:
    """The sides; a stream of records for the one that is standard input."""
    names = list(answers)
    if len(names) == 1 and names[0] != "-" and not sys.stdin.isatty():
        names.append("-")
    if len(names) < 2 or names.count("-") > 1:
        raise UsageError(
            f"--answer-list needs at least two answer files, not {len(names)}"
            if names.count("-") < 2
            else "--answer-list can read only one side from stdin",
            hint="as in --answer-list reference.jsonl answers.jsonl, or one of them as `-`",
        )
    for name in names:
        if name != "-" and (not Path(name).exists() or Path(name).is_dir()):
            raise UsageError("there is no such answer file", where=name)
    return [read_records("-", stdin=_stdin()) if name == "-" else Path(name) for name in names]


def _stdin() -> IO[bytes]:
    return sys.stdin.buffer


def _price(judge: str, asked: dict[str, Any]) -> Price | None:
    """What the judge's tokens cost, None if nobody knows."""
    from chatbind_cli.review.bill import FREE, find_price, load_prices  # noqa: PLC0415

    prices = load_prices(asked["prices"])
    model = asked["judge_model"] or _DEFAULT_MODEL
    price = find_price(model, prices) if judge == "openai" else FREE
    if price is None and asked["max_cost"] is not None:
        raise UsageError(
            f"the price of {model!r} is not known, so --max-cost cannot be kept",
            hint="give it with --prices",
        )
    return price


def _make_judge(
    kind: str,
    asked: dict[str, Any],
    concurrency: int,
    price: Price | None,
    spent: float,
    dry_run: bool,
) -> tuple[Judge, str]:
    """The judge, and the name of what it counts tokens with."""
    if kind == "rule":
        return RuleJudge(), ""
    rules = load_rules(asked["rules"]) if asked["rules"] else Rules()
    if kind == "local":
        return _local_judge(rules, asked, concurrency), "the judge's own tokenizer"
    from chatbind_cli.review.bill import FREE  # noqa: PLC0415
    from chatbind_cli.review.chat_judge import ChatJudge, ChatJudgeOptions  # noqa: PLC0415
    from chatbind_cli.review.tokens import counter_for  # noqa: PLC0415

    count, counted_by = counter_for(asked["tokenizer"])
    options = ChatJudgeOptions(
        model=asked["judge_model"] or _DEFAULT_MODEL,
        base_url=asked["judge_url"],
        temperature=asked["temperature"],
        max_tokens=asked["max_tokens"],
        structured=asked["structured"],
        timeout_s=asked["timeout"],
        retries=asked["retries"],
        concurrency=concurrency,
        requests_per_minute=asked["requests_per_minute"],
        tokens_per_minute=asked["tokens_per_minute"],
        price=price or FREE,
        max_cost_usd=asked["max_cost"],
        spent_usd=spent,
        count=count,
    )
    return ChatJudge(rules, options, will_ask=not dry_run), counted_by


def _local_judge(rules: Rules, asked: dict[str, Any], concurrency: int) -> Judge:
    from chatbind_cli.review.local_judge import LocalJudge, LocalJudgeOptions  # noqa: PLC0415

    if not asked["judge_model"]:
        raise UsageError("--judge local needs --judge-model, a language model's folder")
    options = LocalJudgeOptions(
        model=asked["judge_model"],
        device=asked["device"],
        dtype=asked["dtype"],
        temperature=asked["temperature"],
        max_tokens=asked["max_tokens"],
        batch_size=concurrency,
    )
    return LocalJudge(rules, options)


def _show_plan(
    inputs: Inputs,
    judge: Judge,
    options: RunOptions,
    done: set[str],
    price: Price | None,
    counted_by: str,
) -> None:
    from chatbind_cli.review.plan import make_plan  # noqa: PLC0415

    plan = make_plan(inputs.cases(), judge, options, done=done, price=price, counted_by=counted_by)
    for remark in inputs.remarks:
        note(remark)
    if sys.stdout.isatty():
        click.echo("\n".join(plan.lines()))
    else:
        emit_record(plan.record())


@contextmanager
def _termination_as_interrupt() -> Iterator[None]:
    """Lets SIGTERM (a batch system's first word) end the run as Ctrl-C does."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _conclude(inputs: Inputs, outcome: Outcome, output: str) -> None:
    """Says what was done, puts the file in order, and decides the exit code."""
    if Path(output).is_file():  # not a pipe or a device
        put_in_order(Path(output), outcome.tasks)
    for remark in inputs.remarks:
        note(remark)
    parts = [f"{outcome.judged} reviews made"]
    if outcome.reused:
        parts.append(f"{outcome.reused} were there already")
    if outcome.tokens[0]:
        parts.append(f"{outcome.tokens[0]} tokens sent, {outcome.tokens[1]} received")
    if outcome.cost_usd:
        parts.append(f"{outcome.cost_usd:.4f} USD")
    if outcome.failed:
        parts.append(f"{outcome.failed} failed")
    note(", ".join(parts))
    if outcome.failed or inputs.remarks:
        what = [f"{outcome.failed} reviews failed"] if outcome.failed else []
        what += ["the files do not fit together, as said above"] if inputs.remarks else []
        raise SomeRecordsFailed(" and ".join(what))
