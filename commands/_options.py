"""Options that several commands share, so that they read and mean the same everywhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import reduce, wraps
from pathlib import Path
from typing import Any, TypeVar

import click

from chatbind_cli import launch
from chatbind_cli.console import note

from ._base import GroupedOption

F = TypeVar("F", bound=Callable[..., Any])
Decorator = Callable[[F], F]


def stack(*decorators: Callable[[Any], Any]) -> Callable[[F], F]:
    """Several option decorators as one; the first one's option comes first in the help."""

    def wrap(function: F) -> F:
        return reduce(lambda wrapped, decorate: decorate(wrapped), reversed(decorators), function)

    return wrap


def output_option(help_text: str) -> Callable[[F], F]:
    """`-o/--output`: a file, or `-` for stdout."""
    return click.option(
        "-o",
        "--output",
        cls=GroupedOption,
        group="Output",
        default="-",
        metavar="FILE",
        type=click.Path(dir_okay=False, allow_dash=True),
        help=help_text,
    )


overwrite_option = click.option(
    "--overwrite",
    is_flag=True,
    cls=GroupedOption,
    group="Output",
    help="Start anew instead of continuing what is there; only what this command made, and has "
    "on its record, is replaced.",
)

on_error_option = click.option(
    "--on-error",
    cls=GroupedOption,
    group="Output",
    type=click.Choice(["record", "skip", "fail"]),
    default="record",
    help="A record that fails: write it with its id and an `error`, leave it out, or stop.",
)

seed_option = click.option(
    "--seed",
    cls=GroupedOption,
    group="Compute",
    type=click.IntRange(min=0),
    default=0,
    help="Seed of everything random.",
)

device_options = stack(
    click.option(
        "--device",
        cls=GroupedOption,
        group="Compute",
        default="auto",
        help="auto (a GPU where there is one), cpu, cuda, cuda:1, mps.",
    ),
    click.option(
        "--dtype",
        cls=GroupedOption,
        group="Compute",
        type=click.Choice(["auto", "float32", "float16", "bfloat16"]),
        default="auto",
        help="Numbers of the model; auto: bfloat16 on a GPU, float32 on a CPU.",
    ),
)

media_root_options = stack(
    click.option(
        "--media-root",
        "--image-folder",
        "media_root",
        cls=GroupedOption,
        group="Media",
        metavar="DIR",
        type=click.Path(file_okay=False, path_type=Path),
        help="Folder that the media paths of records start from.",
    ),
    click.option(
        "--media-prefix",
        cls=GroupedOption,
        group="Media",
        default="",
        help="Put before the file names of records, as COCO_val2014_; a folder named after "
        "COCO's 2014 pictures (val2014, coco2014_val) needs none.",
    ),
    click.option(
        "--allow-outside",
        is_flag=True,
        cls=GroupedOption,
        group="Media",
        help="Let records name files outside the media root.",
    ),
)

_dispatch_options = stack(
    click.option(
        "--num-processes",
        cls=GroupedOption,
        group="Dispatch",
        type=click.IntRange(min=1),
        help="Worker processes over all machines; default: one a GPU, else one.",
    ),
    click.option(
        "--num-machines",
        cls=GroupedOption,
        group="Dispatch",
        type=click.IntRange(min=1),
        help="Machines; default: $SLURM_NNODES, else 1.",
    ),
    click.option(
        "--machine-rank",
        cls=GroupedOption,
        group="Dispatch",
        type=click.IntRange(min=0),
        help="This machine's number, from 0; default: $SLURM_NODEID, else 0.",
    ),
    click.option(
        "--main-address",
        cls=GroupedOption,
        group="Dispatch",
        metavar="HOST:PORT",
        help="Where machine 0 listens; default: the first host of $SLURM_JOB_NODELIST.",
    ),
    click.option(
        "--launch-config",
        cls=GroupedOption,
        group="Dispatch",
        metavar="YAML",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        help="A config of `accelerate config` to launch with.",
    ),
    click.option(
        "--dry-run",
        is_flag=True,
        cls=GroupedOption,
        group="Dispatch",
        help="Print the command line that would run, and stop.",
    ),
)


def dispatch_options(function: F) -> F:
    """The options of `launch.Dispatch`, handed to the function as one argument `plan`."""

    @wraps(function)
    def packed(*args: Any, **kwargs: Any) -> Any:
        names = ("num_processes", "num_machines", "machine_rank", "main_address")
        more = ("launch_config", "dry_run")
        values = {name: kwargs.pop(name) for name in (*names, *more)}
        plan = launch.Dispatch(device=kwargs.get("device", "auto"), **values)
        return function(*args, plan=plan, **kwargs)

    return _dispatch_options(packed)  # type: ignore[return-value]


def dispatched(plan: launch.Dispatch, extra: Sequence[str] = ()) -> bool:
    """Runs the command that is being handled in worker processes, where the plan wants that.

    Args:
        plan: what `dispatch_options` gave.
        extra: words that replace what this process has read from its standard input.

    Returns:
        Whether the work is done; else the caller goes on in this process.
    """
    invocation = click.get_current_context().obj
    return launch.dispatch(invocation or sys.argv[1:], plan, extra)


def without_effect(*names: str, because: str, needs_value: bool = False) -> Callable[[F], F]:
    """An option of the seed that is accepted, does nothing here, and says so when it is used.

    Args:
        names: its spellings.
        because: why, in a few words that end the sentence "has no effect: ...".
        needs_value: whether a value always follows; only then may it begin with a minus.
    """

    def tell(ctx: click.Context, param: click.Parameter, value: object) -> None:
        # the process that started the workers has said it already
        if value is not None and not launch.is_worker():
            note(f"{names[0]} has no effect: {because}")

    return click.option(
        *names,
        cls=GroupedOption,
        group="Accepted for the seed's sake",
        expose_value=False,
        callback=tell,
        metavar="VALUE" if needs_value else "[VALUE]",
        **({} if needs_value else {"is_flag": False, "flag_value": "true"}),
        help=f"No effect: {because}.",
    )
