"""`chatbind inspect`: what training will see, before it begins."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from chatbind_cli.artifacts import emit_record
from chatbind_cli.console import printable
from chatbind_cli.errors import RecordError, SomeRecordsFailed, UsageError
from chatbind_cli.jsonl import Record
from chatbind_cli.plots import check_plot

from . import _base
from ._base import in_group
from ._options import FILE, FOLDER, NEW_FILE, encoder_option, media_root_options
from ._training import style_name
from ._training_options import model_options

if TYPE_CHECKING:
    from chatbind_cli.training.survey import Reader

_input, _output, _pairs = in_group("Input"), in_group("Output"), in_group("Pairs of media")
_COLOURS: dict[str, dict[str, Any]] = {
    "read": {"dim": True},
    "trained": {"fg": "green"},
    "medium": {"fg": "magenta"},
}
_SHARES = ("trained", "prefix", "padding", "grouped", "packed", "cut", "untrained")
_BAR = 40


@_base.command(
    "inspect",
    examples=[
        "chatbind inspect train/instructions.json -m llama --media-root media",
        "chatbind inspect train/captions.json -m llama --json | tail -n 1",
        "chatbind inspect --pairs eval/pairs.jsonl --encoder imagebind --media-root media",
    ],
    elsewhere=[
        "chatbind inspect --pairs pairs.jsonl --encoder checkpoints/imagebind --encoder "
        "hf:google/embeddinggemma-2 --plot pairs.svg",
    ],
)
@click.argument("data", metavar="[DATA]", required=False, type=FILE)
@_input(
    "-m",
    "--model",
    metavar="DIR",
    type=FOLDER,
    help="The language model (or ChatBind model) that is to be trained; no weights are read.",
)
@_input(
    "--projector",
    metavar="FILE",
    type=FILE,
    help="As in `finetune`: it says the prompt style where --prompt-style does not.",
)
@_input(
    "--limit",
    type=click.IntRange(min=0),
    default=10_000,
    help="Samples that the figures are of, drawn evenly; 0: all.",
)
@_input(
    "--per-device-train-batch-size",
    "batch_size",
    type=click.IntRange(min=1),
    default=16,
    help="For the shares of padding.",
)
@model_options
@_pairs(
    "--pairs",
    metavar="FILE",
    type=FILE,
    help="In place of DATA: records that name two media of the same thing, such as "
    '{"image": "dog.jpg", "audio": "bark.wav"}; those of one `class` count as the same.',
)
@encoder_option("Pairs of media", "Measured.", several="each by itself, side by side")
@_pairs(
    "--plot",
    metavar="FILE",
    type=NEW_FILE,
    help="A picture of it: .svg, .png or .pdf.",
)
@media_root_options
@_output("--show", type=click.IntRange(min=0), default=3, help="Samples that are shown whole.")
@_output("--json", "as_json", is_flag=True, help="Records, on a terminal too.")
def command(data: Path | None, pairs: Path | None, as_json: bool, **asked: Any) -> None:
    """Show training data as a model will see them, or how well encoders' senses agree.

    Of DATA: a few samples, their trained words in green; lengths; how much of a batch is the
    prefix that all samples share, or padding (as drawn, grouped by length, packed in rows); what is
    cut; which records are bad. Of --pairs: how often the nearest neighbour in the other modality is
    the same thing, which foretells what a projector that has seen images only will understand. Exit
    code 3: some records or media cannot be used.
    """
    as_json = as_json or not sys.stdout.isatty()
    if (data is None) == (pairs is None):
        raise UsageError("give DATA or --pairs, one of them")
    bad = _inspect_pairs(pairs, as_json, asked) if pairs else _inspect_data(data, as_json, asked)
    if bad:
        raise SomeRecordsFailed(f"{bad} record(s) or media cannot be used")


def _inspect_data(path: Path | None, as_json: bool, asked: dict[str, Any]) -> int:
    """Tells of training data; returns how many records and media cannot be used."""
    from chatbind_cli.data.checked import checked_ahead  # noqa: PLC0415
    from chatbind_cli.data.conversations import Media  # noqa: PLC0415
    from chatbind_cli.training.data_files import DataFile  # noqa: PLC0415
    from chatbind_cli.training.inputs import missing_media, read_conversations  # noqa: PLC0415
    from chatbind_cli.training.survey import survey  # noqa: PLC0415

    if asked["model"] is None:
        raise UsageError("DATA needs -m MODEL: its tokenizer makes the tokens")
    if asked["encoder"] or asked["plot"]:
        raise UsageError("--encoder and --plot are for --pairs")
    assert path is not None
    with checked_ahead([path]):
        reader = _reader(asked)
        conversations, bad = read_conversations([DataFile(path)])
    if asked["media_root"].folder is not None:
        missing = missing_media(asked["media_root"], Media(conversations))
        bad += [{str(m.modality): m.name, "error": why} for m, why in missing.items()]
    for index in range(min(asked["show"], len(conversations))):
        if as_json:
            emit_record(reader.sample(conversations[index]))
        else:
            _show_sample(reader, conversations[index])
    for record in bad[: None if as_json else asked["show"]]:
        emit_record(record) if as_json else click.secho(printable(record["error"]), fg="red")
    limit = asked["limit"] or len(conversations)
    chosen = range(0, len(conversations), -(-len(conversations) // limit))
    figures = {**survey(reader, conversations, chosen, asked["batch_size"]), "bad": len(bad)}
    emit_record(figures) if as_json else _show_figures(figures)
    return len(bad)


def _reader(asked: dict[str, Any]) -> Reader:
    from chatbind_cli.data.tokens import PromptEncoder  # noqa: PLC0415
    from chatbind_cli.model.assemble import read_without_weights  # noqa: PLC0415
    from chatbind_cli.training.longest import longest_sample  # noqa: PLC0415
    from chatbind_cli.training.survey import Reader  # noqa: PLC0415

    tokenizer, config = read_without_weights(
        asked["model"],
        projector=asked["projector"],
        prompt_style=style_name(asked["prompt_style"]),
        use_start_end=asked["use_start_end"],
        tokens_per_embedding=asked["tokens_per_embedding"],
    )
    return Reader(
        PromptEncoder(tokenizer, config),
        tokenizer,
        config.im_patch_id,
        config.tokens_per_embedding,
        longest_sample(asked["model"], asked["model_max_length"]),
    )


def _show_sample(reader: Reader, conversation: Any) -> None:
    record = reader.sample(conversation)
    trained = sum(record["trained"])
    cut = f", {record['cut']} more are cut off" if record["cut"] else ""
    click.secho(
        f"{record['where']}: {len(record['tokens'])} tokens, {trained} trained{cut}", bold=True
    )
    for kind, text in reader.pieces(conversation):
        click.secho(printable(text), nl=False, **_COLOURS[kind])
    click.echo("\n")


def _show_figures(figures: Record) -> None:
    tokens = figures["tokens"]
    of = (
        ""
        if figures["looked_at"] == figures["samples"]
        else f", {figures['looked_at']:,} looked at"
    )
    click.secho(f"{figures['samples']:,} samples{of}", bold=True)
    media = ", ".join(f"{n:,} {modality}" for modality, n in figures["media"].items())
    click.echo(f"media: {media or 'none'}")
    click.echo("tokens: " + ", ".join(f"{name} {n:,}" for name, n in tokens.items()))
    most = max(n for _, n in figures["histogram"])
    for longest, n in figures["histogram"]:
        click.echo(f"{longest:>8,}  {'█' * round(_BAR * n / most):<{_BAR}} {n:,}")
    words = ", ".join(f"{name} {figures[name]:.1%}" for name in _SHARES)
    click.echo(f"{words}; bad records or media: {figures['bad']:,}")


def _inspect_pairs(path: Path, as_json: bool, asked: dict[str, Any]) -> int:
    """Tells how well encoders' senses agree; returns how many records and media cannot be used."""
    from chatbind_cli.data.encoding import EncodingOptions  # noqa: PLC0415
    from chatbind_cli.data.pairs import (  # noqa: PLC0415
        Pair,
        compare_encoders,
        plot_retrieval,
        read_pairs,
    )
    from chatbind_cli.device import resolve_device  # noqa: PLC0415
    from chatbind_cli.encoders.opening import open_encoder  # noqa: PLC0415
    from chatbind_cli.media.options import MediaOptions  # noqa: PLC0415

    if not asked["encoder"]:
        raise UsageError("--pairs needs --encoder")
    if asked["plot"] is not None:
        check_plot(asked["plot"])
    records = list(read_pairs(path))
    pairs = [record for record in records if isinstance(record, Pair)]
    bad = [record for record in records if isinstance(record, RecordError)]
    if not pairs:
        raise bad[0] if bad else RecordError("names no pairs", where=str(path))
    device = resolve_device("auto")
    references = list(dict.fromkeys(asked["encoder"]))
    opened = [open_encoder(reference, device=device) for reference in references]
    each = (opened.pop(0) for _ in references)  # so that none keeps its towers in memory
    how = EncodingOptions(media=MediaOptions())
    found, unusable = compare_encoders(pairs, each, asked["media_root"], how)
    errors = [*map(str, bad), *unusable]
    for error in errors:
        emit_record({"error": error}) if as_json else click.secho(printable(error), fg="red")
    if not as_json:
        _show_pairs(found)
    for record in found if as_json else ():
        emit_record(record)
    if found and asked["plot"] is not None:
        plot_retrieval(found, asked["plot"])
    return len(errors)


_HEAD = ("pairs", "R@1 there", "back", "chance", "R@5 there", "back", "chance", "gap", "outlook")
_FIGURES = tuple(f"{name}_at_{k}" for k in (1, 5) for name in ("recall", "recall_back", "chance"))


def _show_pairs(found: Sequence[Record]) -> None:
    """A table a pair of modalities, a line an encoder; columns are as wide in all of them."""
    rows = [
        (
            record["encoder"],
            f"{record['pairs']:,}",
            *(f"{record[name]:.1%}" for name in _FIGURES),
            f"{record['gap']:.2f}",
            record["outlook"],
        )
        for record in found
    ]
    heads = [(f"{record['first']} and {record['second']}", *_HEAD) for record in found]
    widths = [max(map(len, column)) for column in zip(*heads, *rows, strict=True)]
    before = None
    for head, row in zip(heads, rows, strict=True):
        if head != before:
            click.secho(_line(head, widths), bold=True)
        click.echo(_line(row, widths))
        before = head


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    ends = (0, len(row) - 1)
    cells = [
        cell.ljust(width) if column in ends else cell.rjust(width)
        for column, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]
    return printable("  ".join(cells).rstrip())
