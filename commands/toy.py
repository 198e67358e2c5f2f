"""`chatbind toy`: make a small world to try everything in."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from chatbind_cli.artifacts import artifact_record, emit_record

from . import _base
from ._options import overwrite_option, seed_option

if TYPE_CHECKING:
    from chatbind_cli.jsonl import Record


@_base.command(
    "toy",
    examples=[
        "chatbind toy .",
        "chatbind toy small --quick",
    ],
)
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@_base.in_group("Output")(
    "--quick",
    is_flag=True,
    help="A few files of each kind and models that have learned nothing: the same layout in a few "
    "seconds, for trying out commands.",
)
@_base.in_group("Output")(
    "--huggingface",
    is_flag=True,
    help="A small PE-AV, too (DIR/pe-av): an encoder of pictures, films and sounds in the layout "
    "of the Hugging Face hub, in two minutes more.",
)
@overwrite_option
@seed_option
def command(folder: Path, quick: bool, huggingface: bool, overwrite: bool, seed: int) -> None:
    """Make a small world to try everything in: the ten digits in six modalities.

    Writes pictures, films, sounds, reliefs, warm imprints and taps of digits, captions,
    conversations and questions about them, and trains a small ImageBind, a small LLaMA and a
    ChatBind model of the two, in about two minutes on two CPU cores. Nothing is downloaded; the
    same seed gives the same world. Called again, it goes on where it was stopped. The examples of
    every command work in DIR; DIR/README.txt says what is there.
    """
    from chatbind_cli.toy.world import make_world  # noqa: PLC0415 - loads torch

    for_a_person = sys.stdout.isatty()
    tell = _say if for_a_person else emit_record
    make_world(
        folder, seed=seed, quick=quick, overwrite=overwrite, tell=tell, huggingface=huggingface
    )
    if for_a_person:
        click.echo((folder / "README.txt").read_text(encoding="utf-8"))
    else:
        emit_record(artifact_record("toy", folder, made_by="toy"))


def _say(record: Record) -> None:
    """A line for a person: stages as they end, and the loss now and then."""
    stage = f"{record['stage']:10}"
    if record.get("status") in ("done", "there already"):
        seconds = f" in {record['seconds']:.0f} s" if "seconds" in record else ""
        click.echo(f"{stage} {record['status']}{seconds}")
    elif "loss" in record:
        click.echo(f"{stage} {record['part']:8} step {record['step']:5}  loss {record['loss']:.3f}")
