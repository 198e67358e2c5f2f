"""`chatbind summarize`: tabulate review records."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import click

from chatbind_cli.artifacts import emit_record
from chatbind_cli.console import note
from chatbind_cli.errors import RecordError, UsageError
from chatbind_cli.files import replace_file
from chatbind_cli.jsonl import Record, read_records, record_id
from chatbind_cli.review import tables
from chatbind_cli.review.summary import Summary, summarize

from . import _base
from ._base import GroupedOption, ListOption

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_input = partial(click.option, cls=GroupedOption, group="Input")
_output = partial(click.option, cls=GroupedOption, group="Output")

# Names of review files in a folder, as the seed's scripts write them and as Vicuna published them.
_PREFIXES = ("gpt4_text_", "reviews_", "review_")
_PATTERNS = ("gpt4_text*.jsonl", "review*.jsonl", "review*.json")
_FOLDERS = (".", "review", "reviews")


@_base.command(
    "summarize",
    short_help="Tabulate review records.",
    examples=[
        "chatbind summarize reviews.jsonl",
        "chatbind summarize reviews.jsonl --json | jq .relative",
        "chatbind summarize reviews.jsonl --by modality --format markdown",
        "chatbind summarize reviews.jsonl --html report.html --questions questions.jsonl "
        "--answers reference.jsonl answers.jsonl",
    ],
)
@click.argument(
    "reviews", nargs=-1, type=click.Path(dir_okay=False, allow_dash=True), metavar="[REVIEWS]..."
)
@click.option(
    "-f",
    "--files",
    cls=ListOption,
    group="Input",
    type=click.Path(dir_okay=False, allow_dash=True),
    help="Review files, as the words without an option.",
)
@_input(
    "-d",
    "--dir",
    "folder",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder with review files (gpt4_text*.jsonl, review*.jsonl).",
)
@click.option(
    "-i",
    "--ignore",
    cls=ListOption,
    group="Input",
    metavar="ID",
    help="Questions to leave out.",
)
@_output(
    "--by",
    type=click.Choice(["category", "modality", "judge"]),
    default="category",
    help="What makes a line of the table.",
)
@_output(
    "--format",
    "form",
    type=click.Choice(["auto", "table", "markdown", "csv", "json"]),
    default="auto",
    help="auto: a table on a terminal, else a JSON record a line.",
)
@_output(
    "--html",
    "page",
    metavar="FILE",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Also write a report that one can browse: figures, charts and every review in one file.",
)
@_input(
    "-q",
    "--questions",
    "--question",
    "questions",
    type=_FILE,
    help="Question records, for the report.",
)
@click.option(
    "--answers",
    "--answer-list",
    "answers",
    cls=ListOption,
    group="Input",
    metavar="A B",
    type=_FILE,
    help="The two answer files, for the report.",
)
@_output("--json", "as_json", is_flag=True, help="The same as --format json.")
def command(
    reviews: tuple[str, ...],
    files: tuple[str, ...],
    folder: Path | None,
    ignore: tuple[str, ...],
    by: str,
    form: str,
    as_json: bool,
    page: Path | None,
    questions: Path | None,
    answers: tuple[Path, ...],
) -> None:
    """Tabulate review records: mean scores, and the second's as a percentage of the first's.

    Without files, reviews come from standard input, or on a terminal from the review files in
    this folder, `review` or `reviews`. Each file has figures of its own. Failed reviews are
    counted, and are in no mean.
    """
    sources = _sources([*reviews, *files], folder)
    summaries = [
        summarize(
            (record for record, _ in read_records(source)),
            name=_name(source),
            by=by,
            ignore=ignore,
        )
        for source in sources
    ]
    for source, summary in zip(sources, summaries, strict=True):
        if not summary.reviews:
            where = "<stdin>" if source == "-" else source
            raise RecordError("holds no reviews", where=where, hint="see `chatbind review`")
    _print(summaries, "json" if as_json else form)
    if page is not None:
        _write_report(page, summaries, questions, answers)
    for summary in summaries:
        for reason, count in summary.failures.items():
            note(f"{summary.name}: {count} failed, in no mean: {reason}")
    if not any(row.n for summary in summaries for row in summary.rows):
        raise RecordError("every review failed, so there is nothing to average")


def _print(summaries: Sequence[Summary], form: str) -> None:
    if form == "auto":
        form = "table" if sys.stdout.isatty() else "json"
    if form == "json":
        for summary in summaries:
            for row in summary.rows:
                emit_record(row.record())
    elif form == "table":
        tables.print_table(summaries, sys.stdout)
    else:
        text = tables.markdown_table if form == "markdown" else tables.csv_table
        click.echo(text(summaries), nl=False)


def _write_report(
    page: Path, summaries: Sequence[Summary], questions: Path | None, answers: Sequence[Path]
) -> None:
    from chatbind_cli.review.report import render_report  # noqa: PLC0415  brings importlib.resources

    text = render_report(
        summaries,
        questions=None if questions is None else _by_id(questions),
        answers=[_by_id(path) for path in answers],
    )
    with replace_file(page) as temporary:
        temporary.write_text(text, encoding="utf-8")
    note(f"report: {page}")


def _by_id(path: Path) -> dict[str, Record]:
    return {str(record_id(record)): record for record, _ in read_records(path)}


def _sources(names: Sequence[str], folder: Path | None) -> list[str]:
    """The review files that are meant, by the words of the call or by where they usually are."""
    found = list(names)
    if folder is not None:
        found += _in_folder(folder)
        if not found:
            raise UsageError(f"no file named {' or '.join(_PATTERNS)}", where=str(folder))
    if found:
        return found
    if not sys.stdin.isatty():
        return ["-"]
    for name in _FOLDERS:
        found += _in_folder(Path(name))
    if not found:
        raise UsageError(
            "no reviews: nothing on standard input, and no review files here",
            hint="name a file, a folder with --dir, or pipe `chatbind review` into it",
        )
    return found


def _in_folder(folder: Path) -> Iterator[str]:
    paths = {path for pattern in _PATTERNS for path in folder.glob(pattern) if path.is_file()}
    return (str(path) for path in sorted(paths))


def _name(source: str) -> str:
    """What a file's reviews are of: `gpt4_text_chatbind.jsonl` is about `chatbind`."""
    if source == "-":
        return "stdin"
    name = Path(source).name.partition(".json")[0]
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    return name or source
