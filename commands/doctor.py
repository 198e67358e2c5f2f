"""`chatbind doctor`: what this machine can do."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from chatbind_cli.artifacts import emit_record
from chatbind_cli.doctor import NOTE, OK, PROBLEM, examine
from chatbind_cli.errors import ChatBindError
from chatbind_cli.jsonl import Record

from . import _base
from ._base import in_group
from ._options import NEW_FOLDER

_MARKS = {OK: ("ok", "green"), NOTE: ("note", "yellow"), PROBLEM: ("FAIL", "red")}


@_base.command(
    "doctor",
    examples=[
        "chatbind doctor --no-network",
        "chatbind doctor --no-network --json > doctor.jsonl",
    ],
)
@in_group("What")(
    "-o",
    "--output",
    default=".",
    metavar="DIR",
    type=NEW_FOLDER,
    help="The folder that downloads land below, as in `download`.",
)
@in_group("What")(
    "--network/--no-network",
    default=True,
    help="Whether to ask the hub if it answers and takes the token.",
)
@in_group("Output")(
    "--json",
    "as_json",
    is_flag=True,
    help="Records, on a terminal too.",
)
def command(output: Path, network: bool, as_json: bool) -> None:
    """Tell what this machine can do, and what is missing.

    Looks at Python and the packages, devices, their dtypes and kernels for attention, decoders (a
    small recording of each kind of media is made and read), memory and disk, the hub and the token
    (which is not shown). Exit 0 if media can be encoded and models can answer, 1 if not; notes are
    about what could be better. What of the catalogue is here: `chatbind download --list`.
    """
    as_records = as_json or not sys.stdout.isatty()
    problems: list[Record] = []
    for found in examine(output, network=network):
        _tell(found, as_records)
        if found["status"] == PROBLEM:
            problems.append(found)
    if problems:
        first = problems[0]
        raise ChatBindError(
            f"{len(problems)} problem(s) keep this machine from the main job; the first: "
            f"{first['area']} {first['name']}: {first['value']}",
            hint=first.get("hint"),
        )


def _tell(found: Record, as_records: bool) -> None:
    if as_records:
        emit_record(found)
        return
    word, colour = _MARKS[found["status"]]
    hint = f" ({found['hint']})" if "hint" in found else ""
    mark = click.style(f"{word:<4}", fg=colour)
    click.echo(f"{mark}  {found['area']:<9} {found['name']:<32} {found['value']}{hint}")
