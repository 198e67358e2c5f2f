"""`chatbind doctor`: what this machine can do."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from chatbind_cli.artifacts import emit_record
from chatbind_cli.doctor.finding import NOTE, OK, PROBLEM, Finding
from chatbind_cli.errors import ChatBindError

from . import _base
from ._base import GroupedOption

_MARKS = {OK: ("ok", "green"), NOTE: ("note", "yellow"), PROBLEM: ("FAIL", "red")}


@_base.command(
    "doctor",
    short_help="Tell what this machine can do, and what is missing.",
    examples=[
        "chatbind doctor --no-network",
        "chatbind doctor --no-network --json > doctor.jsonl",
    ],
)
@click.option(
    "-o",
    "--output",
    cls=GroupedOption,
    group="What",
    default=".",
    metavar="DIR",
    type=click.Path(file_okay=False, path_type=Path),
    help="The folder that downloads land below, as in `download`.",
)
@click.option(
    "--network/--no-network",
    cls=GroupedOption,
    group="What",
    default=True,
    help="Whether to ask the hub if it answers and takes the token.",
)
@click.option(
    "--json",
    "as_json",
    cls=GroupedOption,
    group="Output",
    is_flag=True,
    help="Records, on a terminal too.",
)
def command(output: Path, network: bool, as_json: bool) -> None:
    """Tell what this machine can do, and what is missing.

    Looks at Python and the packages, devices and their dtypes, memory and disk, decoders (a second
    of each kind of media is made and read), the hub and the token (which is not shown), and what
    of the catalogue is here. Exit 0 if media can be encoded and models can answer, 1 if not; notes
    are about what could be better.
    """
    from chatbind_cli.doctor.visit import examine  # noqa: PLC0415  loads torch as it goes

    as_records = as_json or not sys.stdout.isatty()
    problems: list[Finding] = []
    for finding in examine(output, network=network):
        _tell(finding, as_records)
        if finding.status == PROBLEM:
            problems.append(finding)
    if problems:
        first = problems[0]
        raise ChatBindError(
            f"{len(problems)} problem(s) keep this machine from the main job; the first: "
            f"{first.area} {first.name}: {first.value}",
            hint=first.hint,
        )


def _tell(finding: Finding, as_records: bool) -> None:
    if as_records:
        emit_record(finding.record())
        return
    word, colour = _MARKS[finding.status]
    hint = f" ({finding.hint})" if finding.hint else ""
    mark = click.style(f"{word:<4}", fg=colour)
    click.echo(f"{mark}  {finding.area:<8} {finding.name:<32} {finding.value}{hint}")
