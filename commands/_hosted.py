"""Hosted chat models: within which limits one is asked, and the one that answers questions."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection
from functools import partial
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from chatbind_cli.artifacts import emit_record
from chatbind_cli.errors import UsageError
from chatbind_cli.hosted import AnswererSettings
from chatbind_cli.jsonl import Record

from ._base import GroupedOption, in_group
from ._options import FILE, gather, stack

if TYPE_CHECKING:
    from chatbind_cli.inference.generation_settings import GenerationSettings

_RATE = click.FloatRange(min=0, min_open=True)
_HERE = ("Model", "Media", "Compute", "Dispatch")
_GROUP = "Text-only answerer"
_answerer = in_group(_GROUP)


def hosted_limits(group: str, what: str, *, advanced: bool = False) -> Callable[[Any], Any]:
    """How many requests go out, how fast, how often, and at what cost.

    Args:
        group: the heading.
        what: what is asked for, in the plural.
        advanced: `--help-all` alone lists them.
    """
    option = partial(in_group(group), advanced=advanced)
    rare = partial(in_group(group), advanced=True)
    return stack(
        option(
            "--concurrency",
            type=click.IntRange(min=1),
            default=8,
            help=f"{what.capitalize()} at a time.",
        ),
        option(
            "--requests-per-minute",
            type=_RATE,
            help="The endpoint's limit.  [default: none but what it asks for]",
        ),
        rare("--tokens-per-minute", type=_RATE, help="The same in tokens, sent and received."),
        rare(
            "--timeout",
            "timeout_s",
            type=click.FloatRange(min=0.01),
            default=120.0,
            help="Seconds a request.",
        ),
        rare(
            "--retries",
            type=click.IntRange(min=0),
            default=5,
            help="Further attempts a request, each after a longer pause, or the one that is asked "
            "for.",
        ),
        option(
            "--max-cost",
            "max_cost_usd",
            type=click.FloatRange(min=0),
            metavar="USD",
            help=f"Stop before the {what} in the output file cost more than this.",
        ),
        option(
            "--prices",
            type=FILE,
            help='TOML file of prices: ["my-model"] with input = 2.5 and output = 10.0, in USD a '
            "million tokens; default: our own dated table of well-known models (--dry-run says "
            "its age).",
        ),
        rare(
            "--tokenizer",
            metavar="NAME",
            help="Counts tokens: a tokenizer's folder, or tiktoken:o200k_base; default: an "
            "estimate.",
        ),
    )


def check_answerer(answerer: AnswererSettings, settings: GenerationSettings) -> None:
    """Refuses what is said of a model that answers here.

    Raises:
        UsageError: something is.
    """
    given = [*_given(_HERE, but=("dry_run",)), *_given(named=("store", "choices"))]
    if given:
        raise UsageError(
            f"{given[0]} goes without --answerer, which perceives no media and runs elsewhere"
        )
    if answerer.model is None:
        raise UsageError("--answerer needs the model's name", hint="give --answerer-model")
    settings.refuse_hosted()


def _chosen(
    answerer: str | None, answerer_model: str | None, answerer_url: str | None, **limits: Any
) -> AnswererSettings | None:
    if answerer is not None:
        return AnswererSettings(model=answerer_model, url=answerer_url, **limits)
    given = _given((_GROUP,))
    if given:
        raise UsageError(f"{given[0]} goes with --answerer")
    return None


def _given(
    groups: Collection[str] = (), *, named: Collection[str] = (), but: Collection[str] = ()
) -> list[str]:
    """The options of some groups, or of some names, that stand on the command line."""
    context = click.get_current_context()
    return [
        next(word for word in param.opts if word.startswith("--"))
        for param in context.command.params
        if isinstance(param, GroupedOption)
        and (param.group in groups or param.name in named)
        and param.name not in but
        and context.get_parameter_source(param.name or "") is ParameterSource.COMMANDLINE
    ]


answerer_options = gather(
    "answerer",
    _chosen,
    _answerer(
        "--answerer",
        type=click.Choice(["openai"]),
        help="In place of -m: a chat model at an OpenAI-compatible endpoint, which perceives "
        "nothing and answers from captions and boxes. How good a model is without its senses.",
    ),
    _answerer("--answerer-model", metavar="NAME", help="The answerer's name there."),
    _answerer(
        "--answerer-url",
        metavar="URL",
        help="Its endpoint, as http://localhost:8000/v1; default: OpenAI's. The key comes from the "
        "environment (OPENAI_API_KEY).",
    ),
    _answerer(
        "--context",
        "--contexts",
        "contexts",
        type=FILE,
        help="Captions and boxes of the media, as for `review`.",
    ),
    hosted_limits(_GROUP, "answers", advanced=True),
)
"""The hosted model that answers, handed to the function as one argument `answerer`, or None."""


def show_plan(plan: Record) -> None:
    """Prints what a run would take: a record, or lines on a terminal."""
    if not sys.stdout.isatty():
        emit_record(plan)
        return
    for name, value in plan.items():
        if value != "":
            shown = "unknown, see --prices" if value is None else value
            click.echo(f"{name.replace('_', ' ')}: {shown}")
